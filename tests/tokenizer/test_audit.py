"""The audit passes a good folder, and each kind of damage fails the check that is meant for it."""

import json
from pathlib import Path

import pytest
import sentencepiece

from ain_jax.tokenizer import audit as auditing
from ain_jax.tokenizer import folder as files
from ain_jax.tokenizer.audit import audit
from ain_jax.tokenizer.chat import CHATML_TEMPLATE
from ain_jax.tokenizer.extend import extend

SAMPLE = Path(auditing.__file__).parents[1] / "sample"
BASE = SAMPLE / "tokenizer" / "mistral_v1.model"
LINES = [json.loads(line) for line in (SAMPLE / "udhr.jsonl").read_text(encoding="utf-8").splitlines()]
TEXTS = {
    "ar": [line["ar"] for line in LINES],
    "en": [line["en"] for line in LINES],
    "odd": ["", "  a  b", "\tx\n", " كتاب", "▁x", "</s>كتاب<|im_end|>", "é 🙂"],
}


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A small base, so that many damaged copies are audited quickly."""
    folder = tmp_path_factory.mktemp("base")
    (folder / "text.txt").write_text("\n".join(TEXTS["en"] + TEXTS["ar"][:3]), encoding="utf-8")
    sentencepiece.SentencePieceTrainer.Train(
        input=str(folder / "text.txt"),
        model_prefix=str(folder / "base"),
        model_type="bpe",
        vocab_size=600,
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        minloglevel=2,
    )
    return folder / "base.model"


@pytest.fixture(scope="module")
def extension(base, tmp_path_factory):
    return extend(base, TEXTS["ar"], out_dir=tmp_path_factory.mktemp("audit") / "t", pieces=100)


def test_a_good_folder_passes(tmp_path):
    extension = extend(BASE, TEXTS["ar"], out_dir=tmp_path / "t", pieces=100)
    report = audit(BASE, extension.folder, TEXTS)
    report.raise_if_failed()
    assert report.failures == [] and report.notes == []
    assert report.checked["every new piece is reachable"] == 100
    assert report.checked["old text keeps its ids"] >= len(LINES)
    assert report.checked["round trip"] == 2 * len(LINES) + 6  # all but the text with ▁ in it


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
    ({"change_json": blanks_left_over}, "no ▁ is left over: ar text 0"),
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
