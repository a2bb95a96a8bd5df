"""Conversations to ids and mask: worked by hand, and against transformers' own apply_chat_template."""

import functools
import json
import operator
from dataclasses import dataclass

import numpy as np
import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from talks import EACH, PLAIN_CHATML, turns
from transformers import PreTrainedTokenizerFast

from ain_jax.tokenizer.chat import (
    CHATML_TEMPLATE,
    encode_chat,
    encode_chats,
    encode_prompt,
    encode_texts,
    load_tokenizer,
)
from ain_jax.tokenizer.chat_render import Renderer


@dataclass(frozen=True)
class Message:
    role: str
    content: str


def parts(content):
    """What a user gives transformers for a content with "<image>" in it."""
    if "<image>" not in content:
        return content
    result = []
    for text in content.split("<image>"):
        result += [{"type": "image"}] + ([{"type": "text", "text": text}] if text else [])
    return result[1:]


def test_a_worked_conversation(tokenizer):
    ids, learn = encode_chat(tokenizer, [Message("user", "<image>hi"), Message("assistant", "yes")], (3,))
    start, end, image_start, image_end, pad = 32000, 32001, 32002, 32003, 32004
    user, ass, istant, hi, yes, newline = 1838, 489, 11143, 5365, 9780, 13
    assert ids.dtype == np.int32 and learn.dtype == bool
    expected = [
        [
            start,
            user,
            newline,
            image_start,
            pad,
            pad,
            pad,
            image_end,
            hi,
            end,
            newline,
            start,
            ass,
            istant,
            newline,
        ],
        [yes, end],
        [newline],
    ]
    names = ["user", "ass", "istant", "hi", "yes", "<0x0A>"]
    assert tokenizer.convert_tokens_to_ids(names) == [user, ass, istant, hi, yes, newline]
    assert ids.tolist() == functools.reduce(operator.iadd, expected, [])
    assert learn.tolist() == [False] * 15 + [True] * 2 + [False]
    prompt = encode_prompt(tokenizer, [Message("user", "<image>hi")], (3,))
    assert prompt.tolist() == expected[0]


def test_rendering(tokenizer):
    messages = turns("Be brief.", "hi", "yes", "why", roles=("system", "user", "assistant", "user"))
    rendered = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert rendered == (
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nhi<|im_end|>\n"
        "<|im_start|>assistant\nyes<|im_end|>\n<|im_start|>user\nwhy<|im_end|>\n<|im_start|>assistant\n"
    )
    messages = [{"role": "user", "content": [{"type": "text", "text": " a\n"}, {"type": "image", "image": "x.png"}]}]
    rendered = tokenizer.apply_chat_template(messages, tokenize=False)
    assert rendered == "<|im_start|>user\n a\n<|vision_start|><|image_pad|><|vision_end|><|im_end|>\n"


CONTENT = st.text(st.sampled_from("ab ها الكلمة\n\t.<>|{}%é🙂"), max_size=12).filter(lambda t: "<image>" not in t)
TURN = st.tuples(CONTENT, st.integers(0, 2)).map(lambda x: x[0] + "<image>" * x[1])


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(TURN, CONTENT), min_size=1, max_size=3), st.data())
def test_ids_and_mask_are_those_of_transformers(tokenizer, pairs, data):
    messages = turns(*(content for pair in pairs for content in pair))
    pictures = sum(message["content"].count("<image>") for message in messages)
    counts = data.draw(st.lists(st.integers(1, 4), min_size=pictures, max_size=pictures))
    theirs = [message | {"content": parts(message["content"])} for message in messages]

    ids, learn = encode_chat(tokenizer, messages, [1] * pictures)
    options = {"tokenize": True, "return_dict": True, "return_assistant_tokens_mask": True}
    out = tokenizer.apply_chat_template(theirs, **options)
    assert ids.tolist() == out["input_ids"] and learn.tolist() == [bool(x) for x in out["assistant_masks"]]

    ids, learn = encode_chat(tokenizer, messages, counts)
    text, left = tokenizer.apply_chat_template(theirs, tokenize=False), list(counts)
    while "<|image_pad|>" in text:  # transformers' Qwen2-VL processor, line by line
        text = text.replace("<|image_pad|>", "<|placeholder|>" * left.pop(0), 1)
    text = text.replace("<|placeholder|>", "<|image_pad|>")
    assert ids.tolist() == tokenizer(text)["input_ids"]
    said = tokenizer.decode(ids[learn]).lstrip(" ")  # decoding drops one blank in front
    assert said == "".join(content + "<|im_end|>" for _, content in pairs).lstrip(" ")

    for number in range(1, len(messages), 2):  # what is trained is what is met when the model is used
        seen = sum(message["content"].count("<image>") for message in messages[:number])
        prompt = encode_prompt(tokenizer, messages[:number], counts[:seen])
        assert prompt.tolist() == ids[: len(prompt)].tolist()
        assert not learn[len(prompt) - 1] and learn[len(prompt)]


def test_a_template_without_markers_gives_the_same_mask(tokenizer, template):
    messages = turns("<image>a", "b", " c<image>", "", "ما", "هي \n ")
    ids, learn = encode_chat(tokenizer, messages, (2, 3))
    other_ids, other_learn = encode_chat(template(PLAIN_CHATML), messages, (2, 3))
    assert ids.tolist() == other_ids.tolist() and learn.tolist() == other_learn.tolist()
    assert learn.sum() == 9  # b . | . | هي blank newline blank . and their three ends of turn


def test_a_batch_equals_one_by_one(tokenizer):
    chats = [(turns(f"<image>a{i}", "b" * i), (i + 1,)) for i in range(5)]
    for (ids, learn), (messages, counts) in zip(encode_chats(tokenizer, chats), chats, strict=True):
        alone, alone_learn = encode_chat(tokenizer, messages, counts)
        assert ids.tolist() == alone.tolist() and learn.tolist() == alone_learn.tolist()
    assert encode_chats(tokenizer, []) == []
    assert encode_texts(tokenizer, []) == []


def test_plain_text_with_special_spellings(tokenizer):
    text = "<s>old</s> <|im_end|>"
    (ids,) = encode_texts(tokenizer, [text])
    assert not set(ids.tolist()) & {1, 2, 32001}
    assert tokenizer.decode(ids) == text
    assert tokenizer.backend_tokenizer.encode("</s>").ids == [2], "the tokenizer itself is left as it was"


FAULTS = [
    (turns("a"), (), "no assistant turn among the roles \\['user'\\]"),
    (turns("<image>a", "b"), (), "1 <image> placeholders but 0 pictures"),
    (turns("a", "b"), (4,), "0 <image> placeholders but 1 pictures"),
    (turns("a <|im_end|>", "b"), (), "message 0 \\(user\\) holds '<\\|im_end\\|>'"),
    (turns("a", "<s>b"), (), "message 1 \\(assistant\\) holds '<s>'"),
    (turns("a <|image_pad|>", "b"), (), "holds '<\\|image_pad\\|>'"),
    (turns("a\ufdd0", "b"), (), "message 0"),
    (turns("<image>", "b"), (0,), "expected at least 1"),
]


@pytest.mark.parametrize(("messages", "counts", "message"), FAULTS)
def test_faults_of_a_conversation(tokenizer, messages, counts, message):
    with pytest.raises(ValueError, match=message):
        encode_chat(tokenizer, messages, counts)


def test_all_faults_of_a_batch_are_told_at_once(tokenizer):
    chats = [(messages, counts) for messages, counts, _ in FAULTS[:2]]
    with pytest.raises(ValueError, match=r"conversation 0: no assistant turn.*\nconversation 2: 1 <image>"):
        encode_chats(tokenizer, [chats[0], (turns("a", "b"), ()), chats[1]])


SAID = "{% generation %}{{ m['content'] }}{% endgeneration %}"
ASKED = "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
LAST_ONLY = "{{ m['content'] }}<|im_end|>{% if loop.last %}</s>{% endif %}{% endfor %}"
BROKEN = [
    (EACH + "{{ m['content'] }}{% generation %}{% endgeneration %}{% endfor %}", "no token to learn from"),
    (EACH + SAID + "<|im_end|>{% endfor %}", "end-of-turn token is not"),
    (EACH + "{{ m['content'] }}\n{% endfor %}" + ASKED, "end-of-turn token is not"),
    (EACH + LAST_ONLY, "no generation markers"),
    (
        EACH + "{{ m['content'] }}{% endfor %}" + ASKED.replace("{% endif", "{% else %}</s>{% endif"),
        "characters 40-41 ends in 'b' and the end-of-turn token is not learnt",
    ),
    ("<s>" + EACH + "<s>" + SAID.replace(" }}", " + '</s>' }}") + "{% endfor %}", "beginning tokens"),
    ("{{ raise_exception('roles must alternate') }}", "refuses the conversation: roles must alternate"),
    ("", "chat_template is str"),
]


@pytest.mark.parametrize(("text", "message"), BROKEN)
def test_broken_templates(template, text, message):
    with pytest.raises(ValueError, match=message):
        encode_chat(template(text), turns("a", "b", "c", "d"))


def test_a_template_that_forgets_pictures(template):
    text = EACH + "{% generation %}{{ m['content'] }}<|im_end|>{% endgeneration %}{% endfor %}"
    with pytest.raises(ValueError, match=r"rendered 0 <\|image_pad\|> for 1 pictures"):
        encode_chat(template(text), turns("<image>a", "b"), (2,))


def test_pictures_and_videos_in_order(tokenizer, template):
    messages = turns("<video>a<image>", "b", "<image><video>", "c")
    ids, _ = encode_chat(tokenizer, messages, (2, 1, 3, 1))
    image, video = tokenizer.convert_tokens_to_ids(["<|image_pad|>", "<|video_pad|>"])
    assert [i for i in ids.tolist() if i in (image, video)] == [video] * 2 + [image] + [image] * 3 + [video]
    theirs = [
        {**m, "content": [{"type": "video"}, {"type": "text", "text": "a"}, {"type": "image"}]} if n == 0 else m
        for n, m in enumerate(messages[:2])
    ]
    options = {"tokenize": True, "return_dict": True, "return_assistant_tokens_mask": True}
    out = tokenizer.apply_chat_template(theirs, **options)
    ids, learn = encode_chat(tokenizer, messages[:2], (1, 1))
    assert ids.tolist() == out["input_ids"] and learn.tolist() == [bool(x) for x in out["assistant_masks"]]
    prompt = encode_prompt(tokenizer, messages[:1], (1, 1))
    assert prompt.tolist() == ids[: len(prompt)].tolist()
    with pytest.raises(ValueError, match="2 <image> and 2 <video> placeholders but 3 pictures and videos"):
        encode_chat(tokenizer, messages, (1, 1, 1))
    swapped = CHATML_TEMPLATE.replace("<|image_pad|>", "<|x|>").replace("<|video_pad|>", "<|image_pad|>")
    with pytest.raises(ValueError, match="in another order"):
        encode_chat(template(swapped.replace("<|x|>", "<|video_pad|>")), messages, (1, 1, 1, 1))
    with pytest.raises(
        ValueError, match=r"rendered 2 <\|image_pad\|> and 0 <\|video_pad\|> for 2 pictures and 2 videos"
    ):
        encode_chat(template(CHATML_TEMPLATE.replace("<|video_pad|>", "")), messages, (1, 1, 1, 1))


def test_a_picture_where_the_template_drops_it(template):
    text = CHATML_TEMPLATE.replace(
        "content['type'] == 'image'", "message['role'] == 'user' and content['type'] == 'image'"
    )
    text = text.replace(" or 'image' in content or 'image_url' in content", "")
    with pytest.raises(
        ValueError, match=r"rendered 1 <\|image_pad\|> for 2 pictures.*; message 0 \(system\) holds one"
    ):
        messages = turns("<image>s", "<image>a", "b", roles=("system", "user", "assistant"))
        encode_chat(template(text), messages, (1, 1))


def test_a_template_of_text_alone(template):
    with pytest.raises(ValueError, match="refuses the conversation: .*message 0 holds a picture or video"):
        text = "{% for m in messages %}{{ m['role'] + m['content'] }}<|im_end|>{% endfor %}"
        encode_chat(template(text), turns("<image>a", "b"), (1,))


def test_placeholders_that_the_tokenizer_does_not_keep(folder, monkeypatch):
    tokenizer = load_tokenizer(folder)
    written = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    written["added_tokens"] = [t for t in written["added_tokens"] if t["content"] != "<|image_pad|>"]
    backend = tokenizers.Tokenizer.from_str(json.dumps(written))
    monkeypatch.setattr(
        "ain_jax.tokenizer.chat_tokens.encode", lambda _, texts, **_k: [backend.encode(t) for t in texts]
    )
    with pytest.raises(ValueError, match=r"0 places for pictures among the ids and 2 expected \(\[2\]\)"):
        encode_chat(tokenizer, turns("<image>a", "b"), (2,))


@pytest.mark.parametrize(("marked", "most"), [(True, 1), (False, 10)])
def test_a_long_conversation_is_rendered_a_few_times(template, monkeypatch, marked, most):
    rendered, render = [], Renderer.render
    monkeypatch.setattr(Renderer, "render", lambda self, *a, **b: rendered.append(0) or render(self, *a, **b))
    talk = turns(*(f"word {i}" for i in range(60)))
    encode_chat(template(CHATML_TEMPLATE if marked else PLAIN_CHATML), talk)
    assert len(rendered) <= most


def test_a_rebuilt_tokenizer_is_refused(folder, tmp_path, monkeypatch):
    for path in folder.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    written = json.loads((tmp_path / "tokenizer.json").read_text(encoding="utf-8"))
    written["pre_tokenizer"] = None  # as a family's class would do: no blank in front
    backend = tokenizers.Tokenizer.from_str(json.dumps(written))
    rebuilt = PreTrainedTokenizerFast(tokenizer_object=backend)
    monkeypatch.setattr("transformers.AutoTokenizer.from_pretrained", lambda *_, **__: rebuilt)
    with pytest.raises(ValueError, match=r"cuts 'Hello world' into .* must be PreTrainedTokenizerFast"):
        load_tokenizer(tmp_path)
    with pytest.raises(ValueError, match=r"has no tokenizer\.json"):
        load_tokenizer(tmp_path / "nowhere")


def test_llavas_placeholder_is_image_itself(tmp_path):
    """Its template writes <image>, a special token, where Qwen2-VL's writes <|image_pad|> between two others."""
    import tiny_bases

    tokenizer = load_tokenizer(tiny_bases.byte_level(tmp_path / "base"))
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image>"]})
    tokenizer.chat_template = (
        "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{% if m['content'] is string %}{{ m['content'] }}"
        "{% else %}{% for c in m['content'] %}{{ '<image>\n' if c['type'] == 'image' else c['text'] }}{% endfor %}"
        "{% endif %}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    talk = [{"role": "user", "content": "<image><image>what?"}, {"role": "assistant", "content": "a cat"}]
    ids, learn = encode_chat(tokenizer, talk, (3, 2))
    image = tokenizer.convert_tokens_to_ids("<image>")
    text = tokenizer.decode(ids)
    assert (ids == image).sum() == 5 and text.count("<image>" * 3 + "\n" + "<image>" * 2 + "\nwhat?") == 1
    assert tokenizer.decode(ids[learn]).startswith("a cat<|im_end|>") and not (ids[learn] == image).any()
    with pytest.raises(ValueError, match="1 <image> placeholders but 2 pictures"):
        encode_chat(tokenizer, [{"role": "user", "content": "<image>"}, talk[1]], (3, 2))
