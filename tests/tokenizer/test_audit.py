"""The audit passes a good folder, and each kind of damage fails the check that is meant for it."""

import json
import shutil

import pytest
from tiny_bases import ARABIC, ENGLISH, MISTRAL, both_forms, byte_level, llama_like, sentencepiece_model

from ain_jax import sample
from ain_jax.tokenizer import folder as files
from ain_jax.tokenizer.audit import audit, main
from ain_jax.tokenizer.chat import CHATML_TEMPLATE
from ain_jax.tokenizer.extend import extend

LINES = sample.rows("udhr")
TEXTS = {
    "ar": [line["ar"] for line in LINES],
    "en": [line["en"] for line in LINES],
    "odd": ["", "  a  b", "\tx\n", " كتاب", "▁x", "Ġx", "</s>كتاب<|im_end|>", "<|im_end|> <|im_start|>a", "é 🙂"],
}


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A small base, so that many damaged copies are audited quickly."""
    return sentencepiece_model(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module")
def extension(base, tmp_path_factory):
    return extend(base, TEXTS["ar"], out_dir=tmp_path_factory.mktemp("audit") / "t", pieces=100)


@pytest.fixture(scope="module")
def bytes_base(tmp_path_factory):
    return byte_level(tmp_path_factory.mktemp("bytes") / "base")


@pytest.fixture(scope="module")
def bytes_extension(bytes_base, tmp_path_factory):
    return extend(bytes_base, TEXTS["ar"], out_dir=tmp_path_factory.mktemp("audit") / "b", pieces=100)


def test_a_good_folder_passes(tmp_path):
    extension = extend(MISTRAL, TEXTS["ar"], out_dir=tmp_path / "t", pieces=100)
    report = audit(MISTRAL, extension.folder, TEXTS)
    report.raise_if_failed()
    assert report.failures == [] and report.notes == []
    assert report.checked["every new piece is reachable"] == 100
    assert report.checked["old text keeps its ids"] >= len(LINES)
    number = 2 * len(LINES) + len(TEXTS["odd"])
    assert report.checked["AutoTokenizer and tokenizer.json agree"] == number
    assert report.checked["round trip of SentencePiece"] == number - 1  # all but the text with ▁ in it
    assert report.checked["SentencePiece and tokenizer.json agree"] == number


@pytest.mark.parametrize("make", [llama_like, byte_level])
def test_good_folders_of_tokenizer_json_alone_pass(tmp_path, make):
    base = make(tmp_path / "base")
    extension = extend(base, ARABIC, out_dir=tmp_path / "t", pieces=100)
    report = audit(base, extension.folder, TEXTS | {"more": iter(ENGLISH)})
    report.raise_if_failed()
    assert report.notes == [] and "SentencePiece and tokenizer.json agree" not in report.checked
    assert report.checked["round trip of tokenizer.json"] >= 2 * len(LINES) + len(ENGLISH)
    assert report.checked["the base's added tokens are cut as before"] == (4 if make is byte_level else 3)


def test_texts_on_which_the_bases_own_forms_disagree_are_listed(tmp_path):
    base = both_forms(tmp_path / "base")
    data = json.loads((base / "tokenizer.json").read_text(encoding="utf-8"))
    plain = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": False}
    data["added_tokens"].append({"id": 600, "content": "  ", **plain})  # which the SentencePiece model does not know
    (base / "tokenizer.json").write_text(json.dumps(data), encoding="utf-8")
    extension = extend(base, ARABIC, out_dir=tmp_path / "t", pieces=50)
    report = audit(base, extension.folder, {"en": ENGLISH, "odd": ["a", "a  b", "كتاب", "كتاب  كتاب"]})
    report.raise_if_failed()
    assert report.notes == ["odd: in 2 texts the base's own two forms disagree (1, 3)"]
    assert report.checked["SentencePiece and tokenizer.json agree"] == len(ENGLISH) + 2


def bytes_damaged(extension, tmp_path, change):
    """A copy of a byte-level folder, its tokenizer.json changed and the manifest made to fit."""
    contents = {path.name: path.read_bytes() for path in extension.folder.iterdir()}
    manifest = json.loads(contents.pop("extension.json"))
    written = json.loads(contents["tokenizer.json"])
    change(written)
    contents["tokenizer.json"] = json.dumps(written).encode()
    manifest["fingerprint"] = files.fingerprint(contents)
    contents["extension.json"] = json.dumps(manifest).encode()
    files.write(tmp_path / "damaged", contents)
    return tmp_path / "damaged"


def english_merges(written):
    merges = written["model"]["merges"]
    merges[:200] = merges[:200][::-1]


def swapped(written):
    vocabulary = written["model"]["vocab"]
    a, b = list(vocabulary)[300:302]
    vocabulary[a], vocabulary[b] = vocabulary[b], vocabulary[a]


def one_merge_less(written):
    written["model"]["merges"].pop()


def not_decoded(written):
    written["decoder"] = None


def token_moved(written):
    written["added_tokens"] = [token for token in written["added_tokens"] if token["content"] != "<think>"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (english_merges, "old text keeps its ids: en text "),
        (swapped, "old pieces keep their ids: id 300 was"),
        (one_merge_less, "every new piece is reachable: tokenizer.json cuts"),
        (not_decoded, "round trip of tokenizer.json: ar text 0"),
        (not_decoded, "no ▁ or Ġ is left over: ar text 1"),
        (token_moved, "the base's added tokens are cut as before: 'a<think>b"),
        (english_merges, "the chat template renders: an English conversation was"),
    ],
)
def test_damage_to_a_byte_level_folder_is_found(bytes_base, bytes_extension, tmp_path, change, message):
    report = audit(bytes_base, bytes_damaged(bytes_extension, tmp_path, change), TEXTS)
    with pytest.raises(ValueError) as error:
        report.raise_if_failed()
    assert message in str(error.value)


def test_another_base_is_noticed(bytes_base, extension):
    report = audit(bytes_base, extension.folder, {"en": ["a"]})
    assert report.failures[0].startswith("the base is the one that was extended: ")


def test_a_changed_share_may_be_allowed(bytes_base, bytes_extension, tmp_path):
    damaged = bytes_damaged(bytes_extension, tmp_path, english_merges)
    check = "old text keeps its ids"
    for share, fails in ((1.0, False), (0.001, True)):
        report = audit(bytes_base, damaged, TEXTS, changed_share=share)
        assert any(failure.startswith(check) for failure in report.failures) == fails
        assert "texts without new characters have other ids than before" in report.notes[0]
    with pytest.raises(ValueError, match="changed_share=2"):
        audit(bytes_base, damaged, TEXTS, changed_share=2)


def test_the_command(bytes_base, bytes_extension, tmp_path, capsys):
    (tmp_path / "en.txt").write_text("\n".join(ENGLISH), encoding="utf-8")
    options = ["--base", str(bytes_base), "--text", f"en={tmp_path / 'en.txt'}", "--folder"]
    main([*options, str(bytes_extension.folder)])
    assert capsys.readouterr().out.endswith("passed\n")
    copy = shutil.copytree(bytes_extension.folder, tmp_path / "copy")
    with pytest.raises(SystemExit, match="fails its audit"):
        main([*options, str(bytes_damaged(bytes_extension, tmp_path, english_merges))])
    (copy / "tokenizer.json").write_text("{}")
    with pytest.raises(SystemExit, match="a file was changed"):
        main([*options, str(copy)])


def damaged(extension, tmp_path, change_model=None, change_json=None, **manifest_changes):
    """A copy with changes and a manifest that fits them, as a faulty extension would write it."""
    contents = {path.name: path.read_bytes() for path in extension.folder.iterdir()}
    manifest = json.loads(contents.pop("extension.json")) | manifest_changes
    model = files.read_model(extension.folder / "tokenizer.model")
    if change_model:
        change_model(model)
        contents["tokenizer.model"] = model.SerializeToString()
    written = files.tokenizer_json(model)
    if change_json:
        change_json(written)
    contents["tokenizer.json"] = json.dumps(written).encode()
    if "last" in manifest:
        manifest["pieces"][-1] = manifest.pop("last")
    template = manifest.pop("template", CHATML_TEMPLATE)
    contents["chat_template.jinja"] = template.encode()
    config = json.loads(contents["tokenizer_config.json"]) | {"chat_template": template}
    contents["tokenizer_config.json"] = json.dumps(config).encode()
    manifest["fingerprint"] = files.fingerprint(contents)
    contents["extension.json"] = json.dumps(manifest).encode()
    files.write(tmp_path / "damaged", contents)
    return tmp_path / "damaged"


def unreachable(model):
    model.pieces[-1].piece = "▁حقوقذ"  # no two pieces make it


def loses_a_blank(model):
    model.normalizer_spec.remove_extra_whitespaces = False
    model.normalizer_spec.add_dummy_prefix = False


def swap_old(model):
    model.pieces[300].piece, model.pieces[301].piece = model.pieces[301].piece, model.pieces[300].piece


def no_blank_in_front(written):
    written["pre_tokenizer"] = None


def blanks_left_over(written):
    written["decoder"]["decoders"].pop(0)


def special_in_pieces(written):
    written["added_tokens"] = [token for token in written["added_tokens"] if token["content"] != "<|im_end|>"]


def merges_reversed(written):
    merges = written["model"]["merges"]
    written["model"]["merges"] = merges[:-200] + merges[-200:][::-1]


DAMAGES = [
    (
        {"change_model": unreachable, "last": "▁حقوقذ"},
        "every new piece is reachable: SentencePiece cuts '▁حقوقذ'",
    ),
    ({"change_model": loses_a_blank}, "old text keeps its ids: en text 0"),
    ({"change_model": swap_old}, "old pieces keep their ids: id 300 was"),
    ({"change_model": swap_old}, "old text keeps its ids: en text"),
    ({"change_json": no_blank_in_front}, "SentencePiece and tokenizer.json agree: ar text 0"),
    ({"change_json": merges_reversed}, "SentencePiece and tokenizer.json agree"),
    ({"change_json": blanks_left_over}, "no ▁ or Ġ is left over: ar text 0"),
    ({"change_json": blanks_left_over}, "round trip of tokenizer.json: ar text 0"),
    ({"special_tokens": {"<|im_start|>": 601}}, "special tokens are never split: <|im_start|> has id 601"),
    ({"template": "{% for m in messages %}{{ m['role'] }}{% endfor %}"}, "the chat template renders: "),
    ({"change_json": special_in_pieces}, "AutoTokenizer opens it unchanged: "),
    ({"pieces": ["x"]}, "the model holds 707 pieces, the manifest 608"),
]


@pytest.mark.parametrize(("damage", "message"), DAMAGES)
def test_damage_is_found(base, extension, tmp_path, damage, message):
    report = audit(base, damaged(extension, tmp_path, **damage), TEXTS)
    with pytest.raises(ValueError) as error:
        report.raise_if_failed()
    assert message in str(error.value)
