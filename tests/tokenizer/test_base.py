"""Bases opened from their files: what each form is found to be, and what is refused."""

import hashlib
import json

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_bases import ARABIC, ENGLISH, MISTRAL, TEMPLATE, both_forms, byte_level, llama_like, sentencepiece_model

from ain_jax.tokenizer.base import byte_of, character_of, open_base
from ain_jax.tokenizer.folder import processor, read_model


def test_a_sentencepiece_model():
    base = open_base(MISTRAL)
    assert (base.kind, base.size, base.prefix, base.chat_template) == ("sentencepiece", 32000, True, None)
    assert base.sha256 == hashlib.sha256(MISTRAL.read_bytes()).hexdigest()
    slow = processor(read_model(MISTRAL))
    assert base.pieces() == [slow.IdToPiece(index) for index in range(32000)]
    assert [e.ids for e in base.backend.encode_batch(ARABIC + ENGLISH)] == slow.encode(ARABIC + ENGLISH)
    assert base.special == {"<unk>": 0, "<s>": 1, "</s>": 2}
    assert base.named == {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    shown = [base.text(piece) for piece in ("▁ال", "<0xD8>", "<0x0A>", "<s>")]
    assert shown == [" ال", None, "\n", "<s>"]


@pytest.mark.parametrize("spelling", ["text", "pairs"])
def test_a_llama_folder_of_tokenizer_json_alone(tmp_path, spelling):
    base = open_base(llama_like(tmp_path / "base", spelling))
    assert (base.kind, base.model, base.prefix, base.size) == ("sentencepiece", None, True, 600)
    assert base.config["tokenizer_class"] == "LlamaTokenizer" and base.chat_template is None
    assert base.named == {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    assert base.backend.encode("a").tokens[0] == "<s>"
    assert base.cutter.encode(" a b").tokens == ["▁a", "▁b"] != base.cutter.encode("a b").tokens


def test_a_byte_level_folder_with_tokens_behind_its_vocabulary(tmp_path):
    base = open_base(byte_level(tmp_path / "base", 700))
    assert (base.kind, base.model, base.prefix, base.size) == ("byte_level", None, False, 704)
    assert base.special == {"<|endoftext|>": 700, "<|im_start|>": 701, "<|im_end|>": 702}
    assert base.added == {*base.special, "<think>"}
    assert base.chat_template == TEMPLATE and base.pieces()[702:] == ["<|im_end|>", "<think>"]
    assert base.named == {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"}
    assert [base.text(piece) for piece in ("Ġthe", "Ø§ÙĦ", "Ø", "<|im_end|>")] == [" the", "ال", None, "<|im_end|>"]
    # a file is taken alone
    alone = open_base(tmp_path / "base" / "tokenizer.json")
    assert (alone.size, alone.config, alone.chat_template) == (704, {}, None)


def test_ids_may_have_gaps(tmp_path):
    base = open_base(byte_level(tmp_path / "base", 700, gaps=True))
    assert base.size == 708 and base.pieces()[699:705] == [base.pieces()[699], "", "", "", "", "<|endoftext|>"]
    assert base.backend.encode("<|im_end|>").ids == [706]


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    return open_base(MISTRAL), open_base(byte_level(tmp_path_factory.mktemp("two") / "base"))


@settings(deadline=None)
@given(st.text(st.characters(codec="utf-8", exclude_characters="▁<"), max_size=20))
def test_pieces_and_texts_are_each_others_inverse(two, text):
    for base in two:
        assert base.text(base.piece(text)) == text


def test_the_byte_alphabet_is_the_librarys():
    assert set(byte_of()) == set(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    split = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    for character in "aé ∑🙂\n\x00ال":
        ((shown, _),) = split.pre_tokenize_str(character)
        assert "".join(map(character_of().__getitem__, character.encode())) == shown


def test_a_folder_with_both_forms(tmp_path):
    folder = both_forms(tmp_path / "base")
    base = open_base(folder)
    assert base.model is not None and base.size == len(base.model.pieces) == 600
    assert "Prepend" in str(base.data["normalizer"])  # the file's own, not one made from the model
    alone = open_base(folder / "tokenizer.model")
    assert alone.model is not None and "Prepend" not in str(alone.data["normalizer"])


def changed(folder, change):
    data = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    change(data)
    (folder / "tokenizer.json").write_text(json.dumps(data), encoding="utf-8")
    return folder


def test_forms_that_disagree_are_refused(tmp_path):
    folder = both_forms(tmp_path / "base")
    changed(folder, lambda data: data["model"]["merges"].reverse())
    with pytest.raises(ValueError, match=r"tokenizer.json cuts 'Hello world' into \[.*\], tokenizer.model into"):
        open_base(folder)


def test_a_config_that_contradicts_the_ids_is_refused(tmp_path):
    folder = byte_level(tmp_path / "base")
    config = json.loads((folder / "tokenizer_config.json").read_text()) | {
        "added_tokens_decoder": {"701": {"content": "<|im_start|>"}, "710": {"content": "<extra>"}}
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="gives '<extra>' the id 710, tokenizer.json None; save the folder anew"):
        open_base(folder)


def replaced(**parts):
    return lambda data: data["model"].update(parts)


BAD_JSON = [
    (lambda data: data.pop("model"), "no model with a vocabulary"),
    (replaced(type="WordPiece"), "its type is WordPiece, expected BPE"),
    (replaced(type="Unigram"), "its type is Unigram, expected BPE"),
    (replaced(dropout=0.1, end_of_word_suffix="</w>"), "dropout is 0.1.*end_of_word_suffix is '</w>'"),
    (lambda data: data.update(pre_tokenizer=None), "no byte fallback"),
    (lambda data: data.update(normalizer={"type": "Lowercase"}), r"rewrites text \(Lowercase\)"),
    (lambda data: [data["model"]["vocab"].pop(c) for c in list(byte_of())[:40]], "lacks 40 of 256 bytes"),
    (lambda data: data["model"].update(merges=[["zz", "qqq"]]), "no tokenizer that the tokenizers library opens"),
]


@pytest.mark.parametrize(("change", "message"), BAD_JSON)
def test_byte_level_files_that_cannot_be_extended(tmp_path, change, message):
    with pytest.raises(ValueError, match=message):
        open_base(changed(byte_level(tmp_path / "base"), change))


BAD_LLAMA = [
    (replaced(byte_fallback=False), "no byte fallback"),
    (lambda data: data["model"]["vocab"].pop("<0x41>"), "lacks some of the pieces <0x00> to <0xFF>"),
    (lambda data: data.update(normalizer={"type": "NFKC"}), r"rewrites text \(NFKC\), expected identity"),
    (lambda data: data.update(pre_tokenizer={"type": "Whitespace"}), r"before its merges \(Whitespace\)"),
]


@pytest.mark.parametrize(("change", "message"), BAD_LLAMA)
def test_sentencepiece_files_that_cannot_be_extended(tmp_path, change, message):
    with pytest.raises(ValueError, match=message):
        open_base(changed(llama_like(tmp_path / "base"), change))


BAD_MODELS = [
    ({"model_type": "unigram", "vocab_size": 400}, "type is UNIGRAM, expected BPE"),
    ({"byte_fallback": False}, "no byte fallback"),
    ({"normalization_rule_name": "nmt_nfkc"}, "rewrites text"),
    ({"treat_whitespace_as_suffix": True}, "suffixes"),
]


@pytest.mark.parametrize(("options", "message"), BAD_MODELS)
def test_models_that_cannot_be_extended(tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        open_base(sentencepiece_model(tmp_path, **options))


def test_what_is_no_tokenizer(tmp_path):
    (tmp_path / "a.txt").write_text("text")
    (tmp_path / "a.json").write_text("{")
    (tmp_path / "b.json").write_text("[]")
    for path, message in [
        (tmp_path / "a.txt", "not a SentencePiece model"),
        (tmp_path / "none.model", "cannot be read"),
        (tmp_path / "none.json", "cannot be read"),
        (tmp_path / "a.json", "is no JSON"),
        (tmp_path / "b.json", "expected an object"),
        (tmp_path, "holds neither tokenizer.json nor tokenizer.model"),
    ]:
        with pytest.raises(ValueError, match=message):
            open_base(path)
