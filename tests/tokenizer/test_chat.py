"""Conversations to ids and mask: worked by hand, and against transformers' own apply_chat_template."""

import functools
import json
import operator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import tokenizers
from hypothesis import example, given, settings
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast

from ain_jax.tokenizer import chat
from ain_jax.tokenizer.chat import (
    CHATML_TEMPLATE,
    Chat,
    encode_chat,
    encode_chats,
    encode_prompt,
    encode_texts,
    end_of_turn,
    load_tokenizer,
)
from ain_jax.tokenizer.chat_render import Renderer
from ain_jax.tokenizer.extend import extend

BASE = Path(chat.__file__).parents[1] / "sample" / "tokenizer" / "mistral_v1.model"
TEXTS = ["ما هذه الكلمة؟ هذه الكلمة هي الحرية", "اقرأ الكلمة", "هذه هي الحرية"] * 2


@dataclass(frozen=True)
class Message:
    role: str
    content: str


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return extend(BASE, TEXTS, out_dir=tmp_path_factory.mktemp("chat") / "t", pieces=15).folder


@pytest.fixture(scope="module")
def tokenizer(folder):
    return load_tokenizer(folder)


@pytest.fixture
def template(folder):
    """The tokenizer with another template."""

    def with_template(text):
        tokenizer = load_tokenizer(folder)
        tokenizer.chat_template = text
        return tokenizer

    return with_template


def turns(*contents, roles=("user", "assistant")):
    return [{"role": roles[i % len(roles)], "content": content} for i, content in enumerate(contents)]


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


PLAIN_CHATML = CHATML_TEMPLATE.replace("{%- generation -%}", "").replace("{%- endgeneration -%}", "")


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


EACH = "{% for m in messages %}<|im_start|>{{ m['role'] }}\n"
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


# Templates with the habits of published ones. GEN ... END stand for generation markers: transformers reads the mask
# from these, we from the same template without them.
HABITS = {
    "default system prompt, as Qwen2.5": "{% if tools %}{{ tools | tojson }}{% endif %}"
    "{% if messages[0]['role'] != 'system' %}<|im_start|>system\nI am Q.<|im_end|>\n{% endif %}"
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' %}"
    "GEN{{ m.content + '<|im_end|>' }}END{% else %}{{ m.content + '<|im_end|>' }}{% endif %}{{ '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}",
    "date, tools, trimmed words, as Llama-3.2": "{{ bos_token }}<|im_start|>system\n\nToday: "
    "{{ strftime_now('%d %b %Y') }}\n{% if tools is not none %}tools{% endif %}"
    "{% if messages[0].role == 'system' %}{{ messages[0].content | trim }}{% set turns = messages[1:] %}"
    "{% else %}{% set turns = messages %}{% endif %}<|im_end|>"
    "{% for m in turns %}<|im_start|>{{ m.role + '\n\n' }}{% if m.role == 'assistant' %}"
    "GEN{{ m.content | trim + '<|im_end|>' }}END{% else %}{{ m.content | trim + '<|im_end|>' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>{{ 'assistant\n\n' }}{% endif %}",
    "another role name, folded system, turns that alternate, as Gemma": "{{ bos_token }}"
    "{% set first = messages[0].content + '\n\n' if messages[0].role == 'system' else '' %}"
    "{% for m in (messages[1:] if first else messages) %}"
    "{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('must alternate') }}{% endif %}"
    "<|im_start|>{{ 'model' if m.role == 'assistant' else m.role }}\n{% if m.role == 'assistant' %}"
    "GEN{{ m.content | trim + '<|im_end|>' }}END{% else %}{{ first if loop.first else '' }}{{ m.content | trim }}"
    "<|im_end|>{% endif %}{{ '\n' }}{% endfor %}{% if add_generation_prompt %}<|im_start|>model\n{% endif %}",
    "no prompt of its own, as Mistral-v1": "{{ bos_token }}{% set first = '' %}"
    "{% for m in messages %}{% if m.role == 'user' %}{{ '[INST] ' + m.content.strip() + ' [/INST]' }}"
    "{% elif m.role == 'system' %}{{ m.content }}{% else %}GEN{{ ' ' + m.content.strip() + ' ' + eos_token }}END"
    "{% endif %}{% endfor %}",
    "system words in the last question, as Mistral-v3": "{{ bos_token }}"
    "{% set turns = messages[1:] if messages[0].role == 'system' else messages %}"
    "{% set asked = turns | selectattr('role', 'equalto', 'user') | list | length %}{% set ns = namespace(n=0) %}"
    "{% for m in turns %}{% if m.role == 'user' %}{% set ns.n = ns.n + 1 %}[INST] "
    "{% if ns.n == asked and messages[0].role == 'system' %}{{ messages[0].content + '\n\n' }}{% endif %}"
    "{{ m.content }}[/INST]{% else %}GEN{{ ' ' + m.content + eos_token }}END{% endif %}{% endfor %}",
    "thoughts left out of earlier turns, an empty one in the last, as Qwen3": "{% for m in messages %}"
    "<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' %}GEN{% set answer = m.content.split('</think>')[-1] %}"
    "{% set thought = m.content.split('</think>')[0].split('<think>')[-1].strip('\n') if '</think>' in m.content "
    "else '' %}{% if loop.last %}{{ '<think>\n' + thought + '\n</think>\n\n' + answer.lstrip('\n') }}"
    "{% else %}{{ answer.lstrip('\n') if thought else answer }}{% endif %}<|im_end|>END"
    "{% else %}{{ m.content }}<|im_end|>{% endif %}{{ '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}",
    "a prompt that says more than the conversation, as DeepSeek-R1": "{{ bos_token }}{% for m in messages %}"
    "{% if m.role == 'assistant' %}<|im_start|>GEN{{ m.content.split('</think>')[-1] }}</s>END"
    "{% else %}{{ m.role + ':' + m.content }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|><think>\n{% endif %}",
    "another end behind the last turn, as Phi-4": "{% for m in messages %}<|im_start|>{{ m.role }}|"
    "{% if m.role == 'assistant' %}GEN{{ m.content }}<|im_end|>END{% else %}{{ m.content }}<|im_end|>{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant|{% else %}</s>{% endif %}",
    "a prompt always there": "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' %}"
    "GEN{{ m.content | trim }}<|im_end|>END{% else %}{{ m.content | trim }}<|im_end|>{% endif %}{% endfor %}"
    "<|im_start|>{{ 'assistant\n' }}",
    "a prompt behind the last question alone, as Zephyr": "{% for m in messages %}{{ '<|' + m.role + '|>\n' }}"
    "{% if m.role == 'assistant' %}GEN{{ m.content + eos_token }}END{% else %}{{ m.content + eos_token }}{% endif %}"
    "{{ '\n' }}{% if loop.last and add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}{% endfor %}",
}
WORDS = st.text(st.sampled_from("ab ها\n .<|>é🙂"), max_size=8)


@pytest.mark.parametrize("habit", HABITS)
@settings(max_examples=12, deadline=None)
@given(st.booleans(), st.lists(st.tuples(WORDS, st.booleans(), WORDS), min_size=1, max_size=4))
@example(False, [("", False, "\n"), ("", False, "")])
@example(False, [("", False, "\na "), ("", False, "ها")])  # as the last, an answer would lose its blanks
def test_rendering_finds_what_markers_would_say(tokenizer, habit, system, pairs):
    """Blanks at the edges, empty words, thoughts, repeated words: the mask of the marked template, or a refusal."""
    talk = [{"role": "system", "content": "Be brief."}] * system
    for number, (asked, thinks, said) in enumerate(pairs):
        thinks &= "Qwen3" in habit or ("R1" in habit and number + 1 < len(pairs))
        said = f"<think>\nhm\n</think>\n\n{said}" if thinks else said
        talk += [{"role": "user", "content": asked}, {"role": "assistant", "content": said}]
    marked = HABITS[habit].replace("GEN", "{% generation %}").replace("END", "{% endgeneration %}")
    plain = HABITS[habit].replace("GEN", "").replace("END", "")
    before, tokenizer.eos_token = (tokenizer.chat_template, tokenizer.eos_token), "</s>"
    try:
        options = {"tokenize": True, "return_dict": True, "return_assistant_tokens_mask": True}
        theirs = tokenizer.apply_chat_template(talk, chat_template=marked, **options)
        tokenizer.chat_template = plain
        ids, learn = encode_chat(tokenizer, talk)
        renders = tokenizer.apply_chat_template(talk, tokenize=True, return_dict=True)["input_ids"]
        assert end_of_turn(tokenizer) in ("<|im_end|>", "</s>")
    finally:
        tokenizer.chat_template, tokenizer.eos_token = before
    assert ids.tolist() == theirs["input_ids"] == renders
    assert_same(ids, learn, theirs["assistant_masks"], tokenizer, habit)


def assert_same(ids, learn, masks, tokenizer, habit):
    """One mask; behind its last turn Phi-4 writes the tokenizer's end as well, which is learnt too."""
    expected = [bool(x) for x in masks]
    if "Phi-4" in habit:
        assert ids[-1] == tokenizer.convert_tokens_to_ids("</s>") and learn[-1]
        expected[-1] = True
    assert learn.tolist() == expected


def learnt(tokenizer, messages, settings, counts=()):
    """What is learnt, run by run."""
    ids, learn = encode_chat(tokenizer, messages, counts, settings)
    edges = np.flatnonzero(np.diff(np.concatenate([[0], learn, [0]]))).reshape(-1, 2)
    return [tokenizer.decode(ids[start:end]) for start, end in edges]


FOUR = turns("Be brief.", "a", "b", "c", "d", roles=("system", "user", "assistant", "user", "assistant"))
ROLES_AND_TURNS = [
    (Chat(), ["b<|im_end|>", "d<|im_end|>"]),
    (Chat(turns="last"), ["d<|im_end|>"]),
    (Chat(learn=("user", "assistant")), ["a<|im_end|>", "b<|im_end|>", "c<|im_end|>", "d<|im_end|>"]),
    (Chat(learn=("system",)), ["Be brief.<|im_end|>"]),
    (Chat(learn=("user",), turns="last"), ["c<|im_end|>"]),
]


@pytest.mark.parametrize("marked", [True, False])
@pytest.mark.parametrize(("chosen", "expected"), ROLES_AND_TURNS)
def test_roles_and_turns_that_learn(template, marked, chosen, expected):
    tokenizer = template(CHATML_TEMPLATE if marked else PLAIN_CHATML)
    assert learnt(tokenizer, FOUR, chosen) == expected


def test_the_last_turn_of_a_template_with_two_markers_a_turn(template):
    said = "{% generation %}{{ m['content'] }}{% endgeneration %}BETWEEN{% generation %}<|im_end|>{% endgeneration %}"
    told = "{% if m['role'] == 'assistant' %}" + said + "{% else %}{{ m['content'] }}<|im_end|>{% endif %}{% endfor %}"
    assert learnt(template(EACH + told.replace("BETWEEN", "")), FOUR, Chat(turns="last")) == ["d<|im_end|>"]
    with pytest.raises(
        ValueError, match="ends in 'd' and the end-of-turn token is not learnt"
    ):  # each block has to end
        encode_chat(template(EACH + told.replace("BETWEEN", "|")), FOUR, (), Chat(turns="last"))
    two = told.replace("{{ m['content'] }}{% endg", "</s>{% endg", 1).replace(
        "<|im_end|>{% endg", "{{ m['content'] }}</s>{% endg"
    )
    assert learnt(template(EACH + two.replace("BETWEEN", "|")), FOUR, Chat(turns="last")) == ["</s>", "d</s>"]


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"template": "chatlm"}, "no chat template 'chatlm', perhaps 'chatml'"),
        ({"learn": ("asistant",)}, "no role 'asistant', expected some of system, user, assistant, perhaps 'assistant'"),
        ({"learn": "user"}, "learn = 'user': expected one or more roles"),
        ({"learn": ()}, "expected one or more roles"),
        ({"learn": ("user", "user")}, "named twice"),
        ({"turns": "first", "learn": ("x",)}, "no role 'x'.*; turns = 'first': expected 'all' or 'last'"),
    ],
)
def test_wrong_settings(wrong, message):
    with pytest.raises(ValueError, match=message):
        Chat(**wrong)


def test_beginning_tokens_may_open_turns(template):
    """Llama-2 writes one before each question; two in a row, or one in the middle of a turn, are a fault."""
    text = (
        "{% for m in messages %}{% if m['role'] == 'user' %}<s>[INST] {{ m['content'] }} [/INST]"
        "{% else %}{% generation %} {{ m['content'] }} </s>{% endgeneration %}{% endif %}{% endfor %}"
    )
    ids, _ = encode_chat(template(text), turns("a", "b", "c", "d"))
    assert (ids == 1).sum() == 2
    with pytest.raises(ValueError, match="2 beginning tokens '<s>', one of them at character 3, .*'<s><s>\\[INST"):
        encode_chat(template("<s>" + text), turns("a", "b"))


DROPPED = [
    (
        "{% for m in messages if m['role'] != 'system' %}",
        FOUR,
        r"leaves out message 0 \(system\).*'Be brief.' is not in",
    ),
    ("{% for m in messages[-4:] %}", turns("a1", "b2", "c3", "d4", "e5", "f6"), r"leaves out message 0 \(user\)"),
]


@pytest.mark.parametrize("marked", [True, False])
@pytest.mark.parametrize(("loop", "messages", "message"), DROPPED)
def test_a_template_that_drops_a_message(template, marked, loop, messages, message):
    text = (CHATML_TEMPLATE if marked else PLAIN_CHATML).replace("{%- for message in messages -%}", loop, 1)
    text = text.replace("message['", "m['")
    with pytest.raises(ValueError, match=message):
        encode_chat(template(text), messages)


def test_a_template_that_drops_the_last_thoughts(template):
    text = HABITS["a prompt that says more than the conversation, as DeepSeek-R1"].replace("GEN", "").replace("END", "")
    with pytest.raises(ValueError, match=r"leaves out the thoughts of message 1 \(assistant\): 'hm' is not in"):
        encode_chat(template(text), turns("a", "<think>hm</think>b"))


def test_a_template_that_looks_at_the_words(template):
    """Marks would change what it writes: the answer is found by rendering the beginnings, or all is refused."""
    text = "{% for m in messages %}{{ m['role'] }}:{{ '!' if m['content'][0] == 'b' else '?' }}{{ m['content'] }}"
    text += "<|im_end|>{% endfor %}{% if add_generation_prompt %}assistant:{% endif %}"
    assert learnt(template(text), turns("a", "b"), Chat()) == ["!b<|im_end|>"]
    with pytest.raises(ValueError, match="no generation markers for what is to be learnt"):
        encode_chat(template(text), turns("b", "a"), (), Chat(learn=("user",)))
    with pytest.raises(ValueError, match="is no beginning of the whole"):
        encode_chat(template(text + "{{ messages | length }}"), turns("a", "b", "c", "b"))


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
    monkeypatch.setattr("ain_jax.tokenizer.chat._encode", lambda _, texts: [backend.encode(t) for t in texts])
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
