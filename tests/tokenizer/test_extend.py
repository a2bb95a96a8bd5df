"""The written folder against SentencePiece's own encoder and transformers' AutoTokenizer, for bases of both kinds."""

import hashlib
import json
import re
import subprocess
import sys

import pytest
import sentencepiece
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_bases import ARABIC as ARABIC_TEXTS
from tiny_bases import ENGLISH as ENGLISH_TEXTS
from tiny_bases import MISTRAL as BASE
from tiny_bases import TEMPLATE, both_forms, byte_level, llama_like, sentencepiece_model
from transformers import AutoTokenizer

from ain_jax.tokenizer import extend as extending
from ain_jax.tokenizer import folder as files
from ain_jax.tokenizer.base import open_base
from ain_jax.tokenizer.chat import CHATML_TEMPLATE, encode_texts, load_tokenizer
from ain_jax.tokenizer.extend import SPECIAL_TOKENS, extend, main, padded_vocab, remake
from ain_jax.tokenizer.folder import read_extension, tokenizer_json

LETTERS = f"[{extending.ARABIC.letters}{extending.ARABIC.marks}]"


@pytest.fixture(scope="module")
def extension(tmp_path_factory):
    return extend(BASE, ARABIC_TEXTS, out_dir=tmp_path_factory.mktemp("tokenizer") / "ar", pieces=200)


@pytest.fixture(scope="module")
def forms(extension):
    """SentencePiece before and after, and AutoTokenizer of the folder."""
    after = sentencepiece.SentencePieceProcessor(model_file=str(extension.folder / "tokenizer.model"))
    before = sentencepiece.SentencePieceProcessor(model_file=str(BASE))
    return before, after, AutoTokenizer.from_pretrained(str(extension.folder))


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Bases of both kinds in the forms of registries, each with its extension by 80 pieces."""
    root = tmp_path_factory.mktemp("folders")
    bases = {
        "qwen": byte_level(root / "qwen", norm=tokenizers.normalizers.NFC()),
        "smollm": byte_level(root / "smollm", regex=None),
        "llama3": byte_level(root / "llama3", ignore_merges=True),
        "gaps": byte_level(root / "gaps", gaps=True),
        "llama2": llama_like(root / "llama2"),
        "pairs": llama_like(root / "pairs", "pairs"),
        "both": both_forms(root / "both"),
    }
    return {n: (p, extend(p, ARABIC_TEXTS, out_dir=root / f"{n}+", pieces=80)) for n, p in bases.items()}


KINDS = ("qwen", "smollm", "llama3", "gaps", "llama2", "pairs", "both")


def test_special_tokens_and_pieces_stand_behind_the_base(extension, forms):
    before, after, auto = forms
    assert [after.IdToPiece(i) for i in range(32000)] == [before.IdToPiece(i) for i in range(32000)]
    assert extension.special_tokens == {token: 32000 + i for i, token in enumerate(SPECIAL_TOKENS)}
    assert (extension.first_piece, extension.size, after.GetPieceSize()) == (32007, 32207, 32207)
    assert auto.convert_tokens_to_ids(list(SPECIAL_TOKENS)) == list(range(32000, 32007))
    assert all(after.IsControl(32000 + i) for i in range(7))
    for index, piece in enumerate(extension.pieces, 32007):
        assert after.PieceToId(piece) == auto.convert_tokens_to_ids(piece) == index
        assert all(re.match(LETTERS, c) for c in piece.lstrip("▁")) or len(piece) == 1, piece
    assert (auto.bos_token_id, auto.eos_token_id, auto.pad_token_id) == (1, 32001, 32006)
    assert (padded_vocab(32207), padded_vocab(64), padded_vocab(65, 8)) == (32256, 64, 72)


def test_replaced_ids_spell_the_piece(extension, forms):
    before, _after, _ = forms
    for piece, ids in zip(extension.pieces, extension.replaces, strict=True):
        spelt = before.decode([13, *ids])  # a newline first, or decoding would drop a blank
        assert spelt == "\n" + piece.replace("▁", " ") and len(ids) >= 2


def test_every_piece_is_emitted(extension, forms):
    _, after, _auto = forms
    for index, piece in enumerate(extension.pieces, 32007):
        ids = after.encode("\n" + piece.replace("▁", " "))
        assert ids[-1] == index and len(ids) == 3, (piece, ids)  # the dummy blank, the newline, the piece


def test_tokenizer_json_is_what_the_grown_model_gives(extension):
    """Growing the base's tokenizer.json and converting the grown SentencePiece model are two ways to one file."""
    model = files.read_model(extension.folder / "tokenizer.model")
    written = json.loads((extension.folder / "tokenizer.json").read_text(encoding="utf-8"))
    assert written == tokenizer_json(model)


def test_fewer_tokens_for_arabic_none_changed_for_english(forms):
    before, after, _ = forms
    arabic_before, arabic_after = (sum(map(len, form.encode(ARABIC_TEXTS))) for form in (before, after))
    assert arabic_after < 0.6 * arabic_before
    assert before.encode(ENGLISH_TEXTS) == after.encode(ENGLISH_TEXTS)


PLAIN = [
    "",
    " ",
    "  a",
    "a  b ",
    "\n",
    " \n\t x\r\n",
    " كتاب",
    "  كتاب   علم\nال",
    "é 日本 🙂",
    "ـــ كـتاب",
    'Hello , world . I \'m "here" ?',
    "x" * 500,
]


def test_auto_tokenizer_equals_sentencepiece(forms):
    _before, after, auto = forms
    for text in [*PLAIN, *ARABIC_TEXTS, *ENGLISH_TEXTS]:
        assert auto.encode(text) == after.encode(text), repr(text)
        assert auto.decode(after.encode(text)) == text == after.decode(after.encode(text))


TEXTS = st.text(
    st.one_of(st.sampled_from("  \n\tابتثكمنالةىء\u064b\u064f\u0651\u0640٣،؟abz.🙂é"), st.characters(codec="utf-8")),
    max_size=40,
).filter(lambda text: "▁" not in text)


@settings(max_examples=150, deadline=None)
@given(TEXTS)
def test_any_text_comes_back_and_both_forms_agree(forms, text):
    before, after, auto = forms
    ids = after.encode(text)
    assert encode_texts(auto, [text])[0].tolist() == ids  # "<|pad|>" in a text is no special token
    assert after.decode(ids) == before.decode(before.encode(text))
    assert auto.decode(ids) == text


@settings(max_examples=100, deadline=None)
@given(st.text(st.characters(codec="utf-8", max_codepoint=0x5FF), max_size=40))
def test_text_without_new_characters_keeps_its_ids(forms, text):
    before, after, _ = forms
    assert after.encode(text) == before.encode(text)


@pytest.fixture(scope="module")
def opened(folders):
    """Each base's own tokenizer.json, and AutoTokenizer of its extension."""
    form = lambda folder: tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    return {name: (form(path), load_tokenizer(extension.folder)) for name, (path, extension) in folders.items()}


@pytest.fixture(scope="module")
def written(folders):
    """The tokenizer.json of each extension."""
    return {
        name: tokenizers.Tokenizer.from_file(str(extension.folder / "tokenizer.json"))
        for name, (_, extension) in folders.items()
    }


@pytest.mark.parametrize("name", KINDS)
def test_old_ids_and_special_tokens_do_not_move(folders, opened, name):
    path, extension = folders[name]
    base, (before, auto) = open_base(path), opened[name]
    assert {piece: auto.convert_tokens_to_ids(piece) for piece in base.ids} == before.get_vocab()
    assert extension.base_size == base.size == max(before.get_vocab().values()) + 1
    assert list(extension.special_tokens.values()) == list(range(base.size, extension.first_piece))
    pieces = auto.convert_ids_to_tokens(list(range(extension.first_piece, extension.size)))
    assert tuple(pieces) == extension.pieces and len(auto) == len(base.ids) + extension.size - base.size
    own = base.chat_template is not None
    assert len(extension.special_tokens) == (0 if own else 7)
    assert auto.chat_template == (TEMPLATE if own else CHATML_TEMPLATE)
    assert auto.clean_up_tokenization_spaces is False  # or " ." would come back as "."
    assert auto.eos_token == "<|im_end|>" and auto.pad_token == ("<|endoftext|>" if own else "<|pad|>")
    for token in base.special:
        assert auto.encode(f"a{token}b", add_special_tokens=False).count(base.ids[token]) == 1


@pytest.mark.parametrize("name", KINDS)
def test_english_keeps_every_id_and_arabic_comes_back(opened, name):
    before, auto = opened[name]
    special = "".join(token.content for token in before.get_added_tokens_decoder().values())
    for text in [*ENGLISH_TEXTS, "  two  blanks", "\n\n x\t", "I'm 1234 é 日本 🙂", special, f"a {special}\n"]:
        assert auto.encode(text) == before.encode(text).ids, text  # a BOS included
    for text in [*ARABIC_TEXTS, *PLAIN]:
        ids = before.encode(text, add_special_tokens=False).ids
        assert auto.decode(auto.encode(text, add_special_tokens=False)) == before.decode(ids), text


@settings(max_examples=100, deadline=None)
@given(TEXTS)
def test_auto_tokenizer_equals_tokenizer_json(opened, written, text):
    for name, (before, auto) in opened.items():
        ids = auto.encode(text)
        assert ids == written[name].encode(text).ids, name
        if not re.search(r"[\u0600-\u06ff]|<\|", text):  # a new special token is cut otherwise
            assert ids == before.encode(text).ids, name


def test_a_folder_with_both_forms_gives_both(folders):
    path, extension = folders["both"]
    after = sentencepiece.SentencePieceProcessor(model_file=str(extension.folder / "tokenizer.model"))
    form = tokenizers.Tokenizer.from_file(str(extension.folder / "tokenizer.json"))
    old = sentencepiece.SentencePieceProcessor(model_file=str(path / "tokenizer.model"))
    old_form = tokenizers.Tokenizer.from_file(str(path / "tokenizer.json"))
    assert after.GetPieceSize() == extension.size
    agreed = [t for t in [*ARABIC_TEXTS, *ENGLISH_TEXTS, *PLAIN] if old.encode(t) == old_form.encode(t).ids]
    assert len(agreed) > len(ARABIC_TEXTS) and [after.encode(t) for t in agreed] == [form.encode(t).ids for t in agreed]


def test_ids_that_only_tokenizer_json_has_are_filled_in_the_model(tmp_path):
    folder = both_forms(tmp_path / "base")
    data = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    picture = {"id": 600, "content": "<picture>", "single_word": False, "lstrip": False, "rstrip": False}
    data["added_tokens"].append(picture | {"normalized": False, "special": True})
    (folder / "tokenizer.json").write_text(json.dumps(data), encoding="utf-8")
    extension = extend(folder, ARABIC_TEXTS, out_dir=tmp_path / "out", pieces=20)
    after = sentencepiece.SentencePieceProcessor(model_file=str(extension.folder / "tokenizer.model"))
    assert extension.base_size == 601 and after.IdToPiece(600) == "<picture>" and after.IsControl(600)
    assert after.GetPieceSize() == extension.size == 601 + 7 + 20


def test_same_arguments_give_the_same_bytes(extension, tmp_path):
    again = extend(BASE, ARABIC_TEXTS, out_dir=tmp_path / "again", pieces=200)
    assert again.fingerprint == extension.fingerprint
    for name in sorted(path.name for path in extension.folder.iterdir()):
        assert (tmp_path / "again" / name).read_bytes() == (extension.folder / name).read_bytes(), name
    assert read_extension(extension.folder) == extension
    manifest = json.loads((extension.folder / "extension.json").read_text(encoding="utf-8"))
    assert manifest["base_sha256"] == hashlib.sha256(BASE.read_bytes()).hexdigest()
    assert manifest["number_of_pieces"] == 200 and manifest["corpus"]["texts"] == len(ARABIC_TEXTS)
    choices = {"marks": "keep", "tatweel": "strip", "digits": "separate", "cap": 4_000_000, "longest": 16}
    assert choices.items() <= manifest["settings"].items()


@pytest.mark.parametrize("name", ["qwen", "llama2"])
def test_an_extension_is_made_again_from_its_manifest(folders, tmp_path, name):
    path, made = folders[name]
    again = remake(made.folder, path, ARABIC_TEXTS, out_dir=tmp_path / "again")
    assert {f.name: f.read_bytes() for f in again.folder.iterdir()} == {
        f.name: f.read_bytes() for f in made.folder.iterdir()
    }
    with pytest.raises(ValueError, match="the texts have SHA-256"):
        remake(made.folder, path, [*ARABIC_TEXTS, "آخر"], out_dir=tmp_path / "more")
    other = next(p for n, (p, _) in folders.items() if n not in (name, "pairs"))
    with pytest.raises(ValueError, match=r"has SHA-256 .*was made from"):
        remake(made.folder, other, ARABIC_TEXTS, out_dir=tmp_path / "other")
    assert [p.name for p in tmp_path.iterdir()] == ["again"]


def test_a_changed_folder_is_noticed(extension, tmp_path):
    for path in extension.folder.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    (tmp_path / "chat_template.jinja").write_text("other")
    with pytest.raises(ValueError, match="a file was changed"):
        read_extension(tmp_path)
    (tmp_path / "extension.json").unlink()
    with pytest.raises(ValueError, match="is missing"):
        read_extension(tmp_path)


def test_a_base_without_the_blank_in_front(tmp_path):
    base = sentencepiece_model(tmp_path / "base", add_dummy_prefix=False, user_defined_symbols=["<tab>"])
    extension = extend(base, ["كتاب كتاب كتب كتاب"] * 3, out_dir=tmp_path / "out", pieces=6)
    after = sentencepiece.SentencePieceProcessor(model_file=str(extension.folder / "tokenizer.model"))
    auto = AutoTokenizer.from_pretrained(str(extension.folder))
    for text in ["the fox", " كتاب  كتب the", "كتاب<tab>the"]:
        assert auto.encode(text) == after.encode(text), text
        assert auto.decode(auto.encode(text)) == text
    assert {"▁كتاب", "كتاب"} & set(extension.pieces)


FAULTS = [
    ({"texts": []}, "corpus is empty"),
    ({"texts": ["only English", "here"]}, "no Arabic letter"),
    ({"texts": ["ﻟﻐﺔ ﻟﻐﺔ"]}, "presentation forms"),
    ({"pieces": 100000}, r"100000 pieces were asked for, but the corpus holds \d+"),
    ({"pieces": 0}, "pieces=0, expected at least 1"),
    ({"texts": ["كتاب", "a\udcff"]}, "text 2, character 1: a lone surrogate"),
    ({"marks": "drop"}, "marks is 'drop', expected 'keep' or 'strip'"),
    ({"special_tokens": ("<s>",)}, "already in the base"),
    ({"special_tokens": ("<|im_end|>", "<|pad|>", "<|pad|>")}, "given twice"),
    ({"pad_token": "<|nothing|>"}, "pad_token is '<|nothing|>', expected one of"),
    ({"eos_token": "<|nothing|>"}, "eos_token is '<|nothing|>', expected one of"),
]


@pytest.mark.parametrize(("change", "message"), FAULTS)
def test_faults_speak_and_write_nothing(folders, tmp_path, change, message):
    arguments = {"texts": ["كتاب كتاب كتاب"], "pieces": 3} | change
    with pytest.raises(ValueError, match=message.replace("|", r"\|")):
        extend(folders["llama2"][0], arguments.pop("texts"), out_dir=tmp_path / "out", **arguments)
    assert list(tmp_path.iterdir()) == []


def test_nothing_is_overwritten(folders, tmp_path, monkeypatch):
    base = folders["llama2"][0]
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("mine")
    with pytest.raises(ValueError, match="already exists"):
        extend(base, iter(lambda: 1 / 0, 1), out_dir=tmp_path / "out", pieces=2)  # and no text is read
    monkeypatch.setattr(extending.folder.os, "fsync", lambda _: 1 / 0)  # as if the disk were full
    with pytest.raises(ZeroDivisionError):
        extend(base, ["كتاب كتاب"], out_dir=tmp_path / "new", pieces=2)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_the_command(tmp_path, capsys, folders):
    (tmp_path / "ar.txt").write_text("\n".join(ARABIC_TEXTS), encoding="utf-8")
    path, _ = folders["qwen"]
    options = ["--base", str(path), "--text", str(tmp_path / "ar.txt"), "--pieces", "30"]
    main([*options, "--out", str(tmp_path / "out"), "--marks", "strip"])
    extension = read_extension(tmp_path / "out")
    assert f"30 pieces behind {extension.base_size} ids" in capsys.readouterr().out
    same = extend(path, ARABIC_TEXTS, out_dir=tmp_path / "same", pieces=30, marks="strip")
    assert same.fingerprint == extension.fingerprint
    with pytest.raises(SystemExit, match="error: .* already exists"):
        main([*options, "--out", str(tmp_path / "out")])
    command = [sys.executable, "-m", "ain_jax.tokenizer.extend", "--help"]
    assert "--odd-share" in subprocess.run(command, capture_output=True, text=True, check=True).stdout
