"""Records become the ids, masks, groups and pictures that they should, once, and what cannot be learnt is told."""

import dataclasses
import itertools
import json
import pickle
import re

import numpy as np
import pytest
import worked
from hypothesis import given
from hypothesis import strategies as st

from ain_jax.data import encoding
from ain_jax.data import examples as module
from ain_jax.data.examples import tokenise
from ain_jax.data.formats import Message, Record
from ain_jax.data.images import ImageSettings, preprocess, preprocess_frames, share_pixels
from ain_jax.data.packing import Packing
from ain_jax.tokenizer import chat
from ain_jax.tokenizer.chat import Chat

IMAGES = ImageSettings(min_pixels=784, max_pixels=50176)


def talk(name, question, answer, images=(), rejected="", language="en", kind="name"):
    messages = (Message("user", question), Message("assistant", answer))
    return Record(name, "made", language, kind, messages=messages, images=tuple(images), rejected=rejected)


PICTURED = talk("p", "<image>\nWhat?", "a cat", [worked.png(1, 56, 28)], language="ar")
PAIR = talk("pair", "<image>\nRead.", "ab", [worked.png(2, 28, 28)], rejected="abc", kind="corrupted")
RECORDS = [
    Record("t", "made", "en", "prose", text="All human beings are born free"),
    PICTURED,
    talk("q", "Hi", "yes"),
    PAIR,
]


def made(records, tokenizer, cache, settings=IMAGES, row_tokens=64, mark="m"):
    return tokenise(records, "made", tokenizer, settings, row_tokens, mark, cache)


def test_each_record_is_one_example_with_its_ids_and_mask(tokenizer, tmp_path):
    source = made(RECORDS, tokenizer, tmp_path)
    assert len(source) == 4
    assert source.groups == ("made/ar", "made/corrupted", "made/en")
    assert [source.groups[g] for g in source.group_E] == ["made/en", "made/ar", "made/en", "made/corrupted"]
    text, pictured, plain, better, worse = (
        s for e in range(4) for s in source.segments(e, tokenizer.convert_tokens_to_ids("<|image_pad|>"), IMAGES)
    )
    ids = tokenizer.encode(RECORDS[0].text, add_special_tokens=False)
    assert text.tokens_L.tolist() == [tokenizer.bos_token_id, *ids] and text.learn_L.all()
    for segment, record, counts in (
        (pictured, PICTURED, [2]),
        (plain, RECORDS[2], []),
        (better, PAIR, [1]),
        (worse, dataclasses.replace(PAIR, messages=(PAIR.messages[0], Message("assistant", "abc"))), [1]),
    ):
        tokens, learn = chat.encode_chat(tokenizer, record.messages, counts)
        assert segment.tokens_L.tolist() == tokens.tolist() and segment.learn_L.tolist() == learn.tolist()
        assert tokenizer.decode(tokens[learn]).startswith(record.messages[1].content)
    for segment, record, count in ((pictured, PICTURED, 8), (better, PAIR, 4), (worse, PAIR, 4)):
        np.testing.assert_array_equal(segment.patches_PK, preprocess(record.images[0], IMAGES)[0])
        assert segment.patch_counts == (count,) and segment.is_picture_L.sum() == count // 4


def test_sizes_count_what_a_row_will_hold(tokenizer, tmp_path):
    source = made(RECORDS, tokenizer, tmp_path)
    token = tokenizer.convert_tokens_to_ids("<|image_pad|>")
    for e, size in enumerate(source.sizes()):
        segments = source.segments(e, token, IMAGES)
        assert size.tolist() == [
            sum(len(s.tokens_L) for s in segments),
            sum(len(s.patches_PK) for s in segments if s.patches_PK is not None),
            sum(int(s.learn_L[1:].sum()) for s in segments),
        ]


def test_what_was_tokenised_is_read_again_until_something_changes(tokenizer, tmp_path, monkeypatch):
    first = made(RECORDS, tokenizer, tmp_path)
    with monkeypatch.context() as patched:
        patched.setattr(module, "_tokenise_batch", lambda *_: pytest.fail("was tokenised again"))
        again = made(RECORDS, tokenizer, tmp_path)
    for field in dataclasses.fields(first):
        if field.name != "records":
            np.testing.assert_array_equal(getattr(first, field.name), getattr(again, field.name))
    other = chat.load_tokenizer(tokenizer.name_or_path)
    other.chat_template = other.chat_template.replace("'\\n'", "' '")
    marks = {
        first.fingerprint,
        made(RECORDS, tokenizer, tmp_path, mark="other").fingerprint,
        made(RECORDS, tokenizer, tmp_path, row_tokens=65).fingerprint,
        made(RECORDS, tokenizer, tmp_path, settings=dataclasses.replace(IMAGES, max_pixels=50177)).fingerprint,
        made(RECORDS, other, tmp_path).fingerprint,
    }
    assert len(marks) == 5 == len(list(tmp_path.glob("[!.]*")))


@given(st.integers(1, 60), st.integers(2, 12))
def test_windows_of_a_long_text_predict_each_token_once(count, length):
    ids = np.arange(count)
    windows = list(encoding.windows(ids, length))
    assert [t for window in windows for t in window[1:]] == list(range(1, count))
    assert all(2 <= len(window) <= length for window in windows)
    assert all(after[0] == before[-1] for before, after in itertools.pairwise(windows))
    assert not windows or max(map(len, windows)) - min(map(len, windows)) <= 1
    assert len(windows) == -(-(count - 1) // (length - 1))


def test_a_long_text_is_cut_and_its_every_byte_scored(tokenizer, tmp_path):
    long = Record(
        "t", "made", "en", "prose", text="All human beings are born free and equal in dignity and rights. " * 9
    )
    source = made([long, RECORDS[0]], tokenizer, tmp_path, row_tokens=16)
    learnt = source.sizes()[:, 2].sum()
    assert learnt == sum(len(tokenizer.encode(r.text, add_special_tokens=False)) for r in (long, RECORDS[0]))
    assert (source.sizes()[:, 0] <= 16).all() and len(source) == 9


@pytest.mark.parametrize(
    "record, settings, row_tokens, told",
    [
        (talk("long", "word " * 40, "yes"), IMAGES, 40, r"record long: \d+ tokens, and a row holds 40: raise Packing"),
        (PAIR, IMAGES, 24, r"record pair: \d+ tokens, and a row holds 24"),  # either of the two answers would fit
        (PICTURED, None, 64, "record p holds pictures, and this stage reads none"),
        (dataclasses.replace(PICTURED, images=(b"broken",)), IMAGES, 64, "record p: a picture of 6 bytes cannot"),
        (talk("none", "<image> What?", "x"), IMAGES, 64, "record none: 1 <image> placeholders but 0 pictures"),
        (talk("control", "say <|im_end|>", "x"), IMAGES, 64, "record control: message 0 .user. holds '<|im_end|>'"),
        (
            Record("mute", "made", "en", "x", messages=(Message("user", "Hi"),)), IMAGES, 64,
            r"record mute: no assistant turn among the roles \['user'\]",
        ),
    ],
)  # fmt: skip
def test_faults_name_the_record(tokenizer, tmp_path, record, settings, row_tokens, told):
    with pytest.raises(ValueError, match=told.replace("|", r"\|")):
        made([RECORDS[2], record], tokenizer, tmp_path, settings, row_tokens)
    assert not list(tmp_path.glob("[!.]*"))


def test_a_template_that_learns_nothing_is_refused(tokenizer, tmp_path):
    other = chat.load_tokenizer(tokenizer.name_or_path)
    other.chat_template = "{% for m in messages %}{{ m.content }}{% generation %}{% endgeneration %}{% endfor %}"
    with pytest.raises(ValueError, match="record q: the chat template leaves no token to learn from"):
        made([RECORDS[2]], other, tmp_path)


def test_a_picture_cut_short_names_its_record(tokenizer, tmp_path):
    torn = dataclasses.replace(PICTURED, images=(PICTURED.images[0][:200],))  # the head, which gives the size, is whole
    source = made([torn], tokenizer, tmp_path)
    with pytest.raises(ValueError, match="record p: a broken picture of 56 x 28 pixels"):
        source.segments(0, tokenizer.convert_tokens_to_ids("<|image_pad|>"), IMAGES)


def turns(name, *said, images=(), videos=(), system="", **fields):
    roles = itertools.cycle(("user", "assistant"))
    messages = [Message("system", system)] if system else []
    messages += [Message(role, text) for role, text in zip(roles, said, strict=False)]
    return Record(name, "made", "en", "talk", messages=tuple(messages), images=images, videos=videos, **fields)


def encoded(tokenizer, *said, system=""):
    return chat.encode_chat(tokenizer, turns("x", *said, system=system).messages)


def rejected(source):
    if source.rejects is None:
        return []
    lines = [json.loads(line) for line in source.rejects.read_text("utf-8").splitlines()]
    return [(line["record"], line["done"], line["reason"]) for line in lines]


def test_what_no_row_holds_is_left_out_and_listed(tokenizer, tmp_path):
    long = talk("long", "word " * 80, "yes")
    packing = Packing(too_long="drop", row_patches=8)
    large = talk("large", "<image>\nWhat?", "x", [worked.png(3, 84, 84)])
    source = tokenise([long, RECORDS[2], large], "made", tokenizer, IMAGES, 64, "m", tmp_path, packing)
    assert len(source) == 1 and source.record_S.tolist() == [1]
    assert (source.bad, source.dropped, source.split) == (0, 2, 0)
    (one, done, why), (two, _, why_two) = rejected(source)
    assert (one, two, done) == ("long", "large", "dropped")
    assert re.fullmatch(r"record long: \d+ tokens, and a row holds 64", why)
    assert re.fullmatch(r"record large: 36 patches, and a row holds 8", why_two)
    with pytest.raises(ValueError, match="record large: 36 patches, and a row holds 8: raise Packing's budget"):
        tokenise([large], "made", tokenizer, IMAGES, 64, "m", tmp_path, Packing(row_patches=8))


def test_a_long_conversation_is_cut_before_turns_of_the_user(tokenizer, tmp_path):
    said = [f"{'question ' * 6}{i}" if i % 2 == 0 else f"answer {i}" for i in range(8)]
    record = turns("long", *said, system="Be kind.")
    packing = Packing(too_long="split")
    length = len(encoded(tokenizer, *said[:4], system="Be kind.")[0])
    source = tokenise([record], "made", tokenizer, None, length, "m", tmp_path, packing)
    expected = [encoded(tokenizer, *said[:4], system="Be kind."), encoded(tokenizer, *said[4:], system="Be kind.")]
    assert len(source) == 2 == len(expected) and source.split == 1 and source.dropped == 0
    for example, (tokens, learn) in enumerate(expected):
        (segment,) = source.segments(example, None, None)
        assert segment.tokens_L.tolist() == tokens.tolist() and segment.learn_L.tolist() == learn.tolist()
    assert rejected(source)[0][:2] == ("long", "split") and "cut into 2 conversations" in rejected(source)[0][2]


def test_no_cut_parts_a_picture_from_what_is_said_about_it(tokenizer, tmp_path):
    picture = (worked.png(1, 28, 28),)
    words = "word " * 30
    first = turns("first", f"<image> {words}", "yes", words, "no", images=picture)
    later = turns("later", words, "yes", f"<image> {words}", "no", images=picture)
    single = turns("single", words * 3, "yes")
    judged = dataclasses.replace(turns("judged", words, "yes", words, "no"), desirable=False)
    last = Chat(turns="last")
    packing = Packing(too_long="split")
    source = tokenise([first, later, single, judged], "made", tokenizer, IMAGES, 64, "m", tmp_path, packing)
    assert source.record_S.tolist() == [1, 1] and np.diff(source.grid_starts_S).tolist() == [0, 1]
    (segment,) = source.segments(1, tokenizer.convert_tokens_to_ids("<|image_pad|>"), IMAGES)
    np.testing.assert_array_equal(segment.patches_PK, preprocess(picture[0], IMAGES)[0])
    told = {record: (done, why) for record, done, why in rejected(source)}
    assert {k: done for k, (done, _) in told.items()} == {
        "first": "dropped", "later": "split", "single": "dropped", "judged": "dropped"
    }  # fmt: skip
    assert told["first"][1].endswith("not cut: a picture stands before every turn of the user")
    assert told["single"][1].endswith("not cut: it has a single turn of the user")
    assert told["judged"][1].endswith("not cut: one answer is judged, with all that stands before it")
    source = tokenise(
        [turns("t", words, "yes", words, "no")], "made", tokenizer, None, 64, "m", tmp_path, packing, last
    )
    assert len(source) == 0 and rejected(source)[0][2].endswith("not cut: the last turn alone is learnt")


def test_records_at_fault_are_counted_until_they_are_too_many(tokenizer, tmp_path):
    good = [talk(f"g{i}", "Hi", "yes") for i in range(8)]
    bad = [talk("control", "say <|im_end|>", "x"), dataclasses.replace(PICTURED, images=(b"broken",))]
    records = [*good[:4], *bad, *good[4:]]
    source = tokenise(records, "made", tokenizer, IMAGES, 64, "m", tmp_path, bad_share=0.2)
    assert len(source) == 8 and source.bad == 2 and source.record_S.tolist() == [0, 1, 2, 3, 6, 7, 8, 9]
    assert sorted(record for record, _, _ in rejected(source)) == ["control", "p"]
    with pytest.raises(ValueError, match=r"1 more at fault before it; no more than 1 may be"):
        tokenise(records, "made", tokenizer, IMAGES, 64, "m", tmp_path, bad_share=0.1)


def test_videos_stand_among_pictures_in_their_order(tokenizer, tmp_path):
    frames = tuple(worked.png(i, 28, 56) for i in range(3))
    picture = worked.png(9, 56, 28)
    record = turns("v", "<video> then <image>?", "yes", images=(picture,), videos=(frames,))
    source = tokenise([record], "made", tokenizer, IMAGES, 96, "m", tmp_path)
    assert source.grids_M3.tolist() == [[2, 4, 2], [1, 2, 4]] and source.sizes()[0, 1] == 16 + 8
    image, video = (tokenizer.convert_tokens_to_ids(f"<|{name}_pad|>") for name in ("image", "video"))
    (segment,) = source.segments(0, image, IMAGES, video)
    assert [(segment.tokens_L == token).sum() for token in (video, image)] == [4, 2]
    assert segment.patch_counts == (8, 8, 8) and segment.is_picture_L.sum() == 6
    settings = share_pixels(IMAGES, 3)
    expected = np.concatenate([preprocess_frames(frames, settings)[0], preprocess(picture, IMAGES)[0]])
    np.testing.assert_array_equal(segment.patches_PK, expected)
    first = int(np.flatnonzero(segment.tokens_L == video)[0])
    # two steps in time, two rows, one column; by Qwen2.5-VL's clock two steps a second
    assert (segment.positions_3L[:, first : first + 4] - first).tolist() == [[0, 0, 1, 1], [0, 1, 0, 1], [0, 0, 0, 0]]
    (timed,) = source.segments(0, image, IMAGES, video, 2.0)
    assert (timed.positions_3L[0, first : first + 4] - first).tolist() == [0, 0, 2, 2]
    uneven = turns("u", "<video>?", "yes", videos=((worked.png(0, 28, 28), worked.png(1, 28, 56)),))
    with pytest.raises(ValueError, match=r"record u: a video whose frames have the sizes \[\(28, 28\), \(28, 56\)\]"):
        tokenise([uneven], "made", tokenizer, IMAGES, 96, "uneven", tmp_path)


def test_verdicts_settings_and_progress_go_through(tokenizer, tmp_path):
    records = [dataclasses.replace(talk(str(v), f"Hi {v}", "yes"), desirable=v) for v in (True, None, False)]
    told = []
    source = tokenise(records, "made", tokenizer, None, 64, "m", tmp_path, progress=lambda *done: told.append(done))
    assert source.desirable_E.tolist() == [-1, 1, 0] and source.record_S.tolist() == [1, 0, 0, 2, 2]
    assert told == [(3, 3)]
    everything = Chat(learn=("user", "assistant"))
    other = tokenise(records, "made", tokenizer, None, 64, "m", tmp_path, chat=everything)
    assert other.fingerprint != source.fingerprint and other.learn_T.sum() > source.learn_T.sum()


def test_full_windows_leave_one_short_one(tokenizer, tmp_path):
    text = Record("t", "made", "en", "prose", text="All human beings are born free and equal. " * 20)
    whole, even, full = (
        tokenise([text], "made", tokenizer, None, tokens, "m", tmp_path, Packing(windows=how))
        for tokens, how in ((4096, "even"), (32, "even"), (32, "full"))
    )
    count = int(whole.sizes()[0, 0])
    assert full.sizes()[:-1, 0].tolist() == [32] * ((count - 2) // 31)
    assert full.sizes()[:, 2].sum() == even.sizes()[:, 2].sum() == count - 1
    bounded = tokenise([text], "made", tokenizer, None, 32, "m", tmp_path, Packing(row_targets=10))
    assert bounded.sizes()[:, 2].max() <= 10 and bounded.sizes()[:, 2].sum() == count - 1


def test_examples_are_handed_on_by_the_names_of_their_files(tokenizer, tmp_path):
    source = made(RECORDS, tokenizer, tmp_path)
    assert isinstance(source.tokens_T, np.memmap)
    packed = pickle.dumps(dataclasses.replace(source, records=[]))
    again = pickle.loads(packed)
    assert isinstance(again.tokens_T, np.memmap)
    np.testing.assert_array_equal(again.tokens_T, source.tokens_T)
    np.testing.assert_array_equal(again.sizes(), source.sizes())
    np.testing.assert_array_equal(dataclasses.replace(source, sizes_E3=None).sizes(), source.sizes())
