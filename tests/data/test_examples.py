"""Records become the ids, masks, groups and pictures that they should, once, and what cannot be learnt is told."""

import dataclasses
import itertools

import numpy as np
import pytest
import worked
from hypothesis import given
from hypothesis import strategies as st

from ain_jax.data import examples as module
from ain_jax.data.examples import tokenise
from ain_jax.data.formats import Message, Record
from ain_jax.data.images import ImageSettings, preprocess
from ain_jax.tokenizer import chat

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
    assert len(marks) == 5 == len(list(tmp_path.iterdir()))


@given(st.integers(1, 60), st.integers(2, 12))
def test_windows_of_a_long_text_predict_each_token_once(count, length):
    ids = np.arange(count)
    windows = list(module._windows(ids, length))
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
    assert not list(tmp_path.iterdir())


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
