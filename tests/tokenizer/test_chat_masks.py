"""Which words of a conversation are learnt: templates with the habits of published ones, roles, turns and refusals."""

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from talks import EACH, PLAIN_CHATML, turns

from ain_jax.tokenizer.chat import (
    CHATML_TEMPLATE,
    Chat,
    encode_chat,
    end_of_turn,
)

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
