"""The files of a tokenizer folder, as transformers opens them, and the SentencePiece model they may stand beside.

tokenizer.json           the ids, for the `tokenizers` library
tokenizer.model          the same as a SentencePiece model, where the base has one; special tokens are CONTROL pieces
tokenizer_config.json    special tokens and the class; a missing class lets transformers 5 rebuild another tokenizer
special_tokens_map.json, chat_template.jinja
extension.json           how it was made, and which base ids each new piece replaces
"""

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import sentencepiece
from sentencepiece import sentencepiece_model_pb2

SPACE = "▁"  # how SentencePiece writes a blank
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6  # SentencePiece's piece types
NAMES = (
    "tokenizer.model",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
)
ROLES = ("bos_token", "eos_token", "pad_token", "unk_token")
# What a tokenizer_config.json says to the class that once read it. Added tokens stand in tokenizer.json.
OF_A_CLASS = (
    "added_tokens_decoder", "auto_map", "backend", "is_local", "legacy", "name_or_path", "sp_model_kwargs",
    "special_tokens_map_file", "tokenizer_file", "use_default_system_prompt", "vocab_file",
)  # fmt: skip
WRITTEN_BY_HAND = -1e8  # pieces scored below this (Llama's runs of blanks, -1e9) were no merges of the base's training


@dataclass(frozen=True)
class Extension:
    """An extended tokenizer on disk: `pieces[i]` has id `first_piece + i` and replaces `replaces[i]`."""

    folder: Path
    base_sha256: str
    base_size: int
    special_tokens: Mapping[str, int]
    first_piece: int
    pieces: tuple[str, ...]
    replaces: tuple[tuple[int, ...], ...]
    merges: tuple[tuple[str, str], ...]  # in the order learnt; single characters have none
    fingerprint: str

    @property
    def size(self) -> int:
        """Number of ids: base, special tokens and new pieces."""
        return self.first_piece + len(self.pieces)


def read_model(path: str | Path) -> Any:
    """The parsed SentencePiece model, if it is a BPE that can grow without changing how old text is cut."""
    try:
        data = Path(path).read_bytes()
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror}; give a SentencePiece tokenizer.model") from error
    model = sentencepiece_model_pb2.ModelProto()  # pyright: ignore[reportAttributeAccessIssue]
    try:
        model.ParseFromString(data)
    except Exception as error:  # protobuf's DecodeError; its module differs between protobuf's back ends
        raise ValueError(f"{path} is not a SentencePiece model; a tokenizer.json cannot be extended here") from error
    spec, rules = model.trainer_spec, model.normalizer_spec
    faults = []
    if not model.pieces:
        raise ValueError(f"{path} holds no pieces, so it is not a SentencePiece model")
    if spec.model_type != spec.BPE:
        faults.append(f"its type is {spec.ModelType.Name(spec.model_type)}, expected BPE")
    if not spec.byte_fallback:
        faults.append("it has no byte fallback, so characters it lacks would be lost")
    if rules.precompiled_charsmap or rules.remove_extra_whitespaces or not rules.escape_whitespaces:
        faults.append(f"it rewrites text (normaliser {rules.name!r}), expected identity")
    if spec.treat_whitespace_as_suffix:
        faults.append("it writes blanks as suffixes, expected prefixes")
    if faults:
        raise ValueError(f"{path} cannot be extended: {'; '.join(faults)}")
    return model


def processor(model: Any, prefix: bool = True) -> sentencepiece.SentencePieceProcessor:
    """A SentencePiece encoder for the parsed model; without prefix, no blank is put before the text."""
    if not prefix:
        copy = type(model)()
        copy.CopyFrom(model)
        copy.normalizer_spec.add_dummy_prefix = False
        model = copy
    return sentencepiece.SentencePieceProcessor(model_proto=model.SerializeToString())


def append(model: Any, pieces: Iterable[str], kind: int = NORMAL) -> Any:
    """A copy of the model with these pieces behind its own; normal ones score below all merges it learnt."""
    grown = type(model)()
    grown.CopyFrom(model)
    ranked = [piece.score for piece in model.pieces if piece.type in (NORMAL, UNUSED) and piece.score > WRITTEN_BY_HAND]
    score = int(min(ranked, default=0.0)) - 1
    for text in pieces:
        grown.pieces.add(piece=text, score=score if kind == NORMAL else 0.0, type=kind)
        score -= kind == NORMAL
    grown.trainer_spec.vocab_size = len(grown.pieces)
    return grown


def derived_merges(model: Any) -> list[list[str]]:
    """Every pair of pieces whose concatenation is a piece, best score first, as `tokenizers` needs them.

    SentencePiece joins any such pair, so each way to cut a piece in two is a merge of its rank. Among the
    ways to cut one piece the order is that of transformers' own conversion: left id, then right id.
    """
    joinable = (NORMAL, USER_DEFINED, UNUSED)
    found = {p.piece: (i, -p.score) for i, p in enumerate(model.pieces) if p.type in joinable}
    merges = []
    for piece, (index, rank) in found.items():
        for cut in range(1, len(piece)):
            left, right = piece[:cut], piece[cut:]
            if left in found and right in found:
                merges.append((rank, index, found[left][0], found[right][0], left, right))
    merges.sort()
    return [[left, right] for *_, left, right in merges]


def tokenizer_json(model: Any) -> dict[str, Any]:
    """The SentencePiece BPE model as a `tokenizers` file with identical ids.

    A blank is put before the text itself, once, even if the text starts with a blank or a special token
    follows later, as SentencePiece does. `Metaspace` leaves it out before a blank; so blanks become ▁ first,
    then a Metaspace that puts a real blank in front, then one that turns this blank into ▁.
    """
    special = [(i, p) for i, p in enumerate(model.pieces) if p.type in (CONTROL, UNKNOWN, USER_DEFINED)]
    prefix = model.normalizer_spec.add_dummy_prefix
    metaspace = {"type": "Metaspace", "split": False}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [
            {
                "id": i,
                "content": p.piece,
                "single_word": False,
                "lstrip": False,
                "rstrip": False,
                "normalized": False,
            }
            | {"special": p.type != USER_DEFINED}
            for i, p in special
        ],
        "normalizer": {"type": "Replace", "pattern": {"String": " "}, "content": SPACE},
        "pre_tokenizer": {
            "type": "Sequence",
            "pretokenizers": [
                {**metaspace, "replacement": " ", "prepend_scheme": "first"},
                {**metaspace, "replacement": SPACE, "prepend_scheme": "never"},
            ],
        }
        if prefix
        else None,
        "post_processor": None,
        "decoder": {
            "type": "Sequence",
            "decoders": [
                {"type": "Replace", "pattern": {"String": SPACE}, "content": " "},
                {"type": "ByteFallback"},
                {"type": "Fuse"},
                *([{"type": "Strip", "content": " ", "start": 1, "stop": 0}] if prefix else []),
            ],
        },
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": next((p.piece for p in model.pieces if p.type == UNKNOWN), None),
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": True,
            "byte_fallback": True,
            "ignore_merges": False,
            "vocab": {p.piece: i for i, p in enumerate(model.pieces)},
            "merges": derived_merges(model),
        },
    }


def contents(
    data: Mapping[str, Any],
    config: Mapping[str, Any],
    chat_template: str,
    named: Mapping[str, str],
    special_tokens: Iterable[str],
    model: Any | None = None,
) -> dict[str, bytes]:
    """File name -> bytes of a tokenizer folder, the manifest left out.

    `data` is the tokenizer.json, `config` the base's own tokenizer_config.json, `named` the special tokens that have
    a role (eos_token, ...), `special_tokens` the new ones.
    """
    listed = config.get("additional_special_tokens") or []
    known = [token["content"] if isinstance(token, Mapping) else token for token in listed]
    others = [token for token in dict.fromkeys((*known, *special_tokens)) if token not in named.values()]
    defaults: dict[str, Any] = (
        {} if config or data.get("post_processor") else {"add_bos_token": False, "add_eos_token": False}
    )
    split = data.get("pre_tokenizer") or {}
    if "add_prefix_space" in split:  # transformers writes its own default over a pre-tokenizer that stands alone
        defaults["add_prefix_space"] = split["add_prefix_space"]
    written = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        **defaults,
        "clean_up_tokenization_spaces": False,  # or decoding would not give the text back
        "model_max_length": int(1e30),  # transformers' way to say that there is no limit
        **{key: value for key, value in config.items() if key not in (*OF_A_CLASS, *ROLES)},
        **named,
        "additional_special_tokens": others,
        "chat_template": chat_template,
    }
    written |= {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
    files = {
        "tokenizer.json": _json(data, indent=None),  # an indented one takes Python a second
        "tokenizer_config.json": _json(written),
        "special_tokens_map.json": _json({**named, "additional_special_tokens": others}),
        "chat_template.jinja": chat_template.encode(),
    }
    if model is not None:
        files["tokenizer.model"] = model.SerializeToString()
    return files


def fingerprint(files: Mapping[str, bytes]) -> str:
    """SHA-256 over the names and bytes of the files, as hexadecimal digits."""
    digest = hashlib.sha256()
    for name in sorted(files):
        digest.update(f"{name}\0{len(files[name])}\0".encode() + files[name])
    return digest.hexdigest()


def write(out_dir: Path, files: Mapping[str, bytes]) -> None:
    """All files or none: they are written beside `out_dir`, which then takes the finished folder's place."""
    out_dir.parent.mkdir(parents=True, exist_ok=True)
    beside = Path(tempfile.mkdtemp(prefix=f".{out_dir.name}.", dir=out_dir.parent))
    try:
        for name, data in files.items():
            with open(beside / name, "wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
        beside.chmod(0o755)  # mkdtemp gives 0700
        beside.rename(out_dir)  # an empty folder gives way, a full one raises
    except BaseException:
        shutil.rmtree(beside, ignore_errors=True)
        raise


def read_extension(out_dir: str | Path) -> Extension:
    """What `extend` returned for this folder, once its files are found unchanged since."""
    out_dir = Path(out_dir)
    try:
        manifest = json.loads((out_dir / "extension.json").read_text(encoding="utf-8"))
        files = {name: (out_dir / name).read_bytes() for name in manifest.get("files", NAMES)}
    except OSError as error:
        raise ValueError(f"{error.filename} is missing; {out_dir} is no folder that `extend` wrote") from error
    found = fingerprint(files)
    if found != manifest["fingerprint"]:
        raise ValueError(
            f"{out_dir} has fingerprint {found[:12]}, its manifest {manifest['fingerprint'][:12]}: "
            "a file was changed after the extension; make the folder anew"
        )
    return Extension(
        folder=out_dir,
        pieces=tuple(manifest["pieces"]),
        replaces=tuple(map(tuple, manifest["replaces"])),
        merges=tuple(map(tuple, manifest["merges"])),
        **{k: manifest[k] for k in ("base_sha256", "base_size", "special_tokens", "first_piece", "fingerprint")},
    )


def _json(value: Any, indent: int | None = 1) -> bytes:
    return (json.dumps(value, ensure_ascii=False, indent=indent) + "\n").encode()
