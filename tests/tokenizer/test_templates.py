"""Our named chat templates, and the tokenizer folders that get one: text worked by hand, ids as transformers'."""

import json
import random

import pytest
import tiny_bases
import tokenizers
from transformers import AutoTokenizer

from ain_jax.tokenizer import templates
from ain_jax.tokenizer.chat import Chat, encode_chat, encode_prompt, end_of_turn, load_tokenizer
from ain_jax.tokenizer.with_template import with_template

TALK = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "hi"},
    {"role": "assistant", "content": "yes"},
    {"role": "user", "content": "why?"},
    {"role": "assistant", "content": "ها"},
]
# The conversation as the families' descriptions have it; [...] is learnt.
WRITTEN = {
    "chatml": "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"
    "[yes<|im_end|>]\n<|im_start|>user\nwhy?<|im_end|>\n<|im_start|>assistant\n[ها<|im_end|>]\n",
    "llama2": "<s>{INST} <<SYS>>\nBe brief.\n<</SYS>>\n\nhi {/INST}[ yes </s>]<s>{INST} why? {/INST}[ ها </s>]",
    "llama3": "<s><|start_header_id|>system<|end_header_id|>\n\nBe brief.<|eot_id|>"
    "<|start_header_id|>user<|end_header_id|>\n\nhi<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n"
    "[yes<|eot_id|>]<|start_header_id|>user<|end_header_id|>\n\nwhy?<|eot_id|>"
    "<|start_header_id|>assistant<|end_header_id|>\n\n[ها<|eot_id|>]",
    "gemma": "<s><start_of_turn>user\nBe brief.\n\nhi<end_of_turn>\n<start_of_turn>model\n[yes<end_of_turn>]\n"
    "<start_of_turn>user\nwhy?<end_of_turn>\n<start_of_turn>model\n[ها<end_of_turn>]\n",
    "mistral": "<s>{INST} Be brief.\n\nhi {/INST}[ yes</s>]{INST} why? {/INST}[ ها</s>]",
    "zephyr": "<|system|>\nBe brief.</s>\n<|user|>\nhi</s>\n<|assistant|>\n[yes</s>]\n<|user|>\nwhy?</s>\n"
    "<|assistant|>\n[ها</s>]\n",
    "alpaca": "<s>Be brief.\n\n### Instruction:\nhi\n\n### Response:\n[yes</s>]\n\n### Instruction:\nwhy?\n\n"
    "### Response:\n[ها</s>]",
    "plain": "<s>Be brief.\nhi\n[yes</s>]\nwhy?\n[ها</s>]\n",
    "llava": "<s>Be brief. USER: hi ASSISTANT:[ yes</s>]USER: why? ASSISTANT:[ ها</s>]",
}
WRITTEN["qwen2_vl"] = WRITTEN["llava_chatml"] = WRITTEN["chatml"]


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return tiny_bases.llama_like(tmp_path_factory.mktemp("templates") / "base")


@pytest.fixture(scope="module")
def written(base, tmp_path_factory):
    place = tmp_path_factory.mktemp("with_template")
    return {name: with_template(base, name, place / name, 640) for name in templates.TABLE}


@pytest.fixture(scope="module")
def opened(written):
    return {name: load_tokenizer(found.folder) for name, found in written.items()}


@pytest.mark.parametrize("name", templates.TABLE)
def test_what_is_written_and_learnt(opened, name):
    tokenizer = opened[name]
    plain = WRITTEN[name].replace("[", "").replace("]", "").replace("{", "[").replace("}", "]")
    assert tokenizer.apply_chat_template(TALK, tokenize=False) == plain
    ids, learn = encode_chat(tokenizer, TALK)
    theirs = tokenizer.apply_chat_template(TALK, return_dict=True, return_assistant_tokens_mask=True)
    assert ids.tolist() == theirs["input_ids"] and learn.tolist() == [bool(x) for x in theirs["assistant_masks"]]
    learnt = [part.partition("]")[0] for part in WRITTEN[name].split("[")[1:]]
    for text, part in zip(learnt, runs(ids, learn), strict=True):
        assert (
            part == tokenizer.encode(text, add_special_tokens=False) or tokenizer.decode(part).lstrip() == text.lstrip()
        )
    assert tokenizer.eos_token == end_of_turn(tokenizer) == learnt[0].split(" ")[-1].removeprefix("yes")
    without = plain.rpartition(learnt[-1])[0]
    assert tokenizer.apply_chat_template(TALK[:-1], tokenize=False, add_generation_prompt=True) == without
    assert encode_prompt(tokenizer, TALK[:-1]).tolist() == ids[: len(ids) - tail(learn)].tolist()


def runs(ids, learn):
    """The ids of each run of learnt tokens."""
    result = []
    for index, (token, said) in enumerate(zip(ids.tolist(), learn, strict=True)):
        if said and (index == 0 or not learn[index - 1]):
            result.append([])
        if said:
            result[-1].append(token)
    return result


def tail(learn):
    """How many tokens stand from the last answer's first on."""
    last = [i for i in range(1, len(learn)) if learn[i] and not learn[i - 1]][-1]
    return len(learn) - last


@pytest.mark.parametrize("name", templates.TABLE)
def test_marked_and_unmarked_give_one_mask(opened, name, monkeypatch):
    """Without its markers each template is read by rendering, to the same mask; with blanks at the edges too."""
    tokenizer = opened[name]
    talks = [
        TALK,
        TALK[1:],
        [*TALK[1:3], {"role": "user", "content": " so \n"}, {"role": "assistant", "content": "\n a  "}],
    ]
    expected = [encode_chat(tokenizer, talk) for talk in talks]
    text = tokenizer.chat_template
    for mark, other in (("{%- generation -%}", "{%- if true -%}"), ("{%- endgeneration -%}", "{%- endif -%}")):
        assert mark in text
        text = text.replace(mark, other)  # not taken out: it cuts blanks around it
    monkeypatch.setattr(tokenizer, "chat_template", text)
    for talk, (ids, learn) in zip(talks, expected, strict=True):
        again, said = encode_chat(tokenizer, talk)
        assert again.tolist() == ids.tolist() and said.tolist() == learn.tolist()


def test_new_tokens_take_spare_rows(base, written):
    found = written["llama3"]
    assert found.special_tokens == {"<|start_header_id|>": 600, "<|end_header_id|>": 601, "<|eot_id|>": 602}
    assert (found.size, found.rows, found.end_of_turn, found.stop_token_ids) == (603, 640, "<|eot_id|>", (602, 2))
    config = json.loads((found.folder / "tokenizer_config.json").read_text(encoding="utf-8"))
    assert config["eos_token"] == "<|eot_id|>" and config["bos_token"] == "<s>"
    assert (written["llama2"].size, written["llama2"].special_tokens, written["llama2"].stop_token_ids) == (
        600,
        {},
        (2,),
    )


def test_tables_grow_where_rows_do_not_suffice(base, tmp_path):
    assert with_template(base, "gemma", tmp_path / "a", 602).rows == 602
    assert with_template(base, "gemma", tmp_path / "b", 601).rows == 640
    with pytest.raises(ValueError, match="has 600 ids, and the model 599 rows"):
        with_template(base, "gemma", tmp_path / "c", 599)


@pytest.mark.parametrize("make", [tiny_bases.byte_level, tiny_bases.both_forms, None])
def test_old_text_keeps_its_ids(make, base, tmp_path):
    """Real text and random characters, cut by the base's own file and by the folder opened with transformers."""
    base = base if make is None else make(tmp_path / "base")
    found = with_template(base, "qwen2_vl", tmp_path / "out", 1024)
    old = tokenizers.Tokenizer.from_file(str(base / "tokenizer.json"))
    new = AutoTokenizer.from_pretrained(str(found.folder))
    draw = random.Random(5)
    noise = ["".join(draw.choices("ab  \n<|>_é🙂هاا.1", k=30)) for _ in range(100)]
    for text in (*tiny_bases.ENGLISH[:40], *tiny_bases.ARABIC[:40], *noise):
        assert new.encode(text, add_special_tokens=False) == old.encode(text, add_special_tokens=False).ids
    for token, index in found.special_tokens.items():
        assert new.encode(f"a{token}b", add_special_tokens=False).count(index) == 1
    assert len(new) == found.size and new.eos_token == "<|im_end|>"


def test_refusals(base, tmp_path):
    with pytest.raises(
        ValueError, match="no chat template 'chatlm', perhaps 'chatml': expected one of chatml, qwen2_vl"
    ):
        templates.named("chatlm")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").write_text("")
    with pytest.raises(ValueError, match="already exists"):
        with_template(base, "chatml", tmp_path / "full", 640)
    level = tiny_bases.byte_level(tmp_path / "level")
    data = json.loads((level / "tokenizer.json").read_text(encoding="utf-8"))
    for token in data["added_tokens"]:
        token["special"] = False
    (level / "tokenizer.json").write_text(json.dumps(data), encoding="utf-8")
    with pytest.raises(ValueError, match=r"has <\|im_start\|>, <\|im_end\|> as common pieces"):
        with_template(level, "chatml", tmp_path / "common", 1024)
    config = json.loads((level / "tokenizer_config.json").read_text(encoding="utf-8"))
    (level / "tokenizer_config.json").write_text(json.dumps({**config, "eos_token": None}), encoding="utf-8")
    with pytest.raises(ValueError, match="names no eos_token"):
        with_template(level, "mistral", tmp_path / "endless", 1024)


def test_a_template_named_in_the_settings(opened, monkeypatch):
    expected = [part.tolist() for part in encode_chat(opened["llama2"], TALK)]
    tokenizer = opened["plain"]
    assert [part.tolist() for part in encode_chat(tokenizer, TALK, (), Chat("llama2"))] == expected
    with pytest.raises(ValueError, match=r"needs the special tokens <\|im_start\|>, <\|im_end\|>"):
        encode_chat(tokenizer, TALK, (), Chat("chatml"))
    monkeypatch.setattr(tokenizer, "chat_template", None)
    with pytest.raises(ValueError, match="name one by Chat.template"):
        encode_chat(tokenizer, TALK)


def test_pictures_and_videos(opened):
    tokenizer = opened["qwen2_vl"]
    talk = [{"role": "user", "content": "<video>a<image><video>"}, {"role": "assistant", "content": "b"}]
    ids, learn = encode_chat(tokenizer, talk, (3, 1, 2))
    kinds = tokenizer.convert_tokens_to_ids(["<|video_pad|>", "<|image_pad|>"])
    video, image = kinds
    assert [i for i in ids.tolist() if i in kinds] == [video] * 3 + [image] + [video] * 2
    assert tokenizer.decode(ids).startswith("<|im_start|> system\nYou are a helpful assistant.<|im_end|>")
    assert not learn[: len(ids) - tail(learn)].any()
    talk[0]["content"] = "a<image>"
    for name in ("llama3", "mistral"):
        with pytest.raises(ValueError, match=r"has no token <\|image_pad\|>"):
            encode_chat(opened[name], talk, (1,))


@pytest.fixture(scope="module")
def over_qwen2(tmp_path_factory):
    """Qwen2's kind of tokenizer with a token for pictures."""
    place = tmp_path_factory.mktemp("over_qwen2")
    return load_tokenizer(
        with_template(tiny_bases.byte_level(place / "base"), "llava_chatml", place / "made", 710).folder
    )


def test_marks_are_learnt_where_pangea_learns_them(over_qwen2):
    """As Pangea's loader: every id of a turn's mark or of a line break alone gets its label back, whoever speaks."""
    ids, learn = encode_chat(over_qwen2, TALK)
    marks = ("<|im_start|>", "<|im_end|>", "\n")
    again, more = encode_chat(over_qwen2, TALK, (), Chat(also_learn=marks))
    wanted = {over_qwen2.convert_tokens_to_ids(mark.replace("\n", "Ċ")) for mark in marks}
    assert ids.tolist() == again.tolist()
    assert more.tolist() == [
        bool(one or index in wanted) for index, one in zip(ids.tolist(), learn.tolist(), strict=True)
    ]
    assert 2 * learn.sum() < more.sum() < len(ids)


@pytest.mark.parametrize(
    ("also", "words"),
    [
        (("assistant\n",), "expected single tokens, and this tokenizer cuts 'assistant"),
        (("",), "also_learn = \\(''"),
    ],
)
def test_what_is_no_token_is_not_learnt(over_qwen2, also, words):
    with pytest.raises(ValueError, match=words):
        encode_chat(over_qwen2, TALK, (), Chat(also_learn=also))


def test_a_picture_over_qwen2(over_qwen2):
    talk = [{"role": "user", "content": "<image>\nhi"}, {"role": "assistant", "content": "yes"}]
    ids, learn = encode_chat(over_qwen2, talk, (2,))
    assert over_qwen2.decode(ids) == (
        "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n<image><image>\nhi<|im_end|>\n"
        "<|im_start|>assistant\nyes<|im_end|>\n"
    )
    assert over_qwen2.decode(ids[learn]) == "yes<|im_end|>"
