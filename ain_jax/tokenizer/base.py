"""A published tokenizer that can be extended, opened from its files, in one form for both kinds that matter.

sentencepiece   BPE over ▁ and characters, bytes as <0xNN> for what it lacks: Llama-2, Gemma, Mistral
byte_level      BPE over bytes, written with GPT-2's alphabet (Ġ is a blank), after a regular expression has cut
                the text: Llama-3, Qwen2, SmolLM2
"""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any, Literal

import sentencepiece
import tokenizers

from ain_jax.tokenizer.folder import NAMES, SPACE, fingerprint, processor, read_model, tokenizer_json

# The two forms of a base must agree on these; on odd blanks and special tokens published ones often do not.
PLAIN = (
    "Hello world",
    "The quick brown fox jumps over the lazy dog, 12 times (or 13).",
    "def f(x): return x + 1",
    "مرحبا بالعالم",
    "é 日本 🙂",
)


@dataclass(frozen=True)
class Base:
    """What `open_base` found. `data` is the tokenizer.json, as made from the model where only that exists."""

    path: Path
    kind: Literal["sentencepiece", "byte_level"]
    backend: tokenizers.Tokenizer
    model: Any | None  # the parsed SentencePiece model, where there is one
    size: int  # highest used id + 1, added and special tokens included
    sha256: str
    config: Mapping[str, Any]  # tokenizer_config.json of the folder, {} without one
    chat_template: str | None
    data: Mapping[str, Any] = field(repr=False)

    @cached_property
    def ids(self) -> dict[str, int]:
        """Piece -> id, added tokens included."""
        return self.backend.get_vocab(with_added_tokens=True)

    @cached_property
    def prefix(self) -> bool:
        """Whether a blank is put before a text."""
        return self.backend.encode("a", add_special_tokens=False).tokens[0].startswith((SPACE, "Ġ"))

    @cached_property
    def special(self) -> dict[str, int]:
        """The special tokens and their ids."""
        return {t["content"]: t["id"] for t in self.data["added_tokens"] if t.get("special")}

    @cached_property
    def named(self) -> dict[str, str]:
        """The special tokens with a role (bos_token, eos_token, pad_token, unk_token), as far as the base has them."""
        names = ("bos_token", "eos_token", "pad_token", "unk_token")
        found = {name: self.config.get(name) for name in names}
        found = {name: token["content"] if isinstance(token, Mapping) else token for name, token in found.items()}
        if not self.config and self.model is not None:
            spec = self.model.trainer_spec
            ids = zip(names, (spec.bos_id, spec.eos_id, spec.pad_id, spec.unk_id), strict=True)
            found = {name: self.model.pieces[index].piece for name, index in ids if index >= 0}
        found["unk_token"] = found.get("unk_token") or self.data["model"].get("unk_token")
        return {name: token for name, token in found.items() if token}

    def pieces(self) -> list[str]:
        """Piece strings by id, in the file's own notation; "" for an id that is not used."""
        pieces = [""] * self.size
        for piece, index in self.ids.items():
            pieces[index] = piece
        return pieces

    def text(self, piece: str) -> str | None:
        """What a piece spells; None where its bytes are no whole characters.

        byte level: "ĠØ§ÙĦ" -> " ال", "Ø" -> None    SentencePiece: "▁ال" -> " ال", "<0xD8>" -> None
        """
        if piece in self.added:
            return piece
        if self.kind == "byte_level":
            try:
                return bytes(map(byte_of().__getitem__, piece)).decode("utf-8")
            except (KeyError, UnicodeDecodeError):
                return None
        if len(piece) == 6 and piece.startswith("<0x") and piece.endswith(">"):
            value = int(piece[3:5], 16)
            return chr(value) if value < 0x80 else None
        return piece.replace(SPACE, " ")

    def piece(self, text: str) -> str:
        """The piece that would spell a text, in the file's notation: " ال" -> "▁ال" or "ĠØ§ÙĦ"."""
        if self.kind == "byte_level":
            return "".join(map(character_of().__getitem__, text.encode("utf-8")))
        return text.replace(" ", SPACE)

    @cached_property
    def added(self) -> frozenset[str]:
        """Added tokens: found in the text before anything else is cut."""
        return frozenset(t["content"] for t in self.data["added_tokens"])

    @cached_property
    def cutter(self) -> tokenizers.Tokenizer:
        """A tokenizer for parts of a text: it puts no blank in front."""
        return cutter(self.data, self.kind)


def cutter(data: Mapping[str, Any], kind: str) -> tokenizers.Tokenizer:
    """A tokenizer of these data that cuts parts of a text: blanks become ▁, and none is put in front."""
    if kind == "sentencepiece":
        normalizer = {"type": "Replace", "pattern": {"String": " "}, "content": SPACE}
        data = {**data, "normalizer": normalizer, "pre_tokenizer": None}
    return tokenizers.Tokenizer.from_str(json.dumps({**data, "post_processor": None}))


@lru_cache(maxsize=1)
def character_of() -> dict[int, str]:
    """GPT-2's alphabet: byte -> the character that stands for it in byte-level files.

    Printable bytes stand for themselves; the others, in order, for U+0100 and what follows (a blank is Ġ, U+0120).
    """
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {b: chr(b) for b in printable} | {b: chr(0x100 + index) for index, b in enumerate(others)}


@lru_cache(maxsize=1)
def byte_of() -> dict[str, int]:
    """The same in the other direction: character -> byte."""
    return {character: byte for byte, character in character_of().items()}


def open_base(path: str | Path) -> Base:
    """The base tokenizer in a tokenizer.model, a tokenizer.json, or a folder that holds either or both.

    A folder's tokenizer_config.json and chat template come along; a file is taken alone. ValueError, with every
    reason, for what cannot be extended without changing how old text is cut, and for a folder whose two forms cut
    plain text differently.
    """
    path = Path(path)
    files = {name: path / name for name in NAMES if (path / name).is_file()} if path.is_dir() else {path.name: path}
    json_path = next((p for p in files.values() if p.suffix == ".json" and p.name not in NAMES[2:4]), None)
    model_path = files.get("tokenizer.model") if path.is_dir() else (path if json_path is None else None)
    if json_path is None and model_path is None:
        raise ValueError(f"{path} holds neither tokenizer.json nor tokenizer.model; give a folder that does")
    model = read_model(model_path) if model_path else None
    if json_path:
        data = _read_json(json_path)
        kind = _kind(json_path, data)
        # a tokenizer that shortens texts hides faults
        data = {**data, "added_tokens": data.get("added_tokens") or [], "truncation": None, "padding": None}
    else:
        data, kind = tokenizer_json(model), "sentencepiece"
    try:
        backend = tokenizers.Tokenizer.from_str(json.dumps(data))
    except Exception as error:  # the library raises plain Exception
        raise ValueError(f"{path} is no tokenizer that the tokenizers library opens: {error}") from error
    config: dict[str, Any] = {}
    if path.is_dir() and (path / "tokenizer_config.json").is_file():
        config = _read_json(path / "tokenizer_config.json")
    digest = (
        fingerprint({name: p.read_bytes() for name, p in files.items()})
        if path.is_dir()
        else hashlib.sha256(path.read_bytes()).hexdigest()
    )
    ids = backend.get_vocab(with_added_tokens=True)
    base = Base(
        path=path,
        kind=kind,
        backend=backend,
        model=model,
        size=max(*ids.values(), (len(model.pieces) if model is not None else 1) - 1) + 1,
        sha256=digest,
        config=config,
        chat_template=_template(path, config),
        data=data,
    )
    _refuse_disagreement(base, config)
    return base


def _read_json(path: Path) -> dict[str, Any]:
    try:
        data = json.loads(path.read_bytes())
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror}; give a tokenizer's file or folder") from error
    except ValueError as error:
        raise ValueError(f"{path} is no JSON: {error}") from error
    if not isinstance(data, dict):
        raise ValueError(f"{path} holds a {type(data).__name__}, expected an object")
    return data


def _parts(part: Mapping[str, Any] | None, inner: str) -> list[Mapping[str, Any]]:
    """The steps of a normaliser or pre-tokenizer; a Sequence is opened."""
    if part is None:
        return []
    if part["type"] == "Sequence":
        return [step for each in part[inner] for step in _parts(each, inner)]
    return [part]


def _kind(path: Path, data: Mapping[str, Any]) -> Literal["sentencepiece", "byte_level"]:
    """Which kind a tokenizer.json is, or a ValueError with every reason why it cannot be extended."""
    model = data.get("model")
    if not isinstance(model, dict) or "vocab" not in model:
        raise ValueError(f"{path} holds no model with a vocabulary, so it is no tokenizer.json")
    kind = model.get("type") or ("BPE" if "merges" in model else "unknown")
    if kind != "BPE":
        raise ValueError(f"{path} cannot be extended: its type is {kind}, expected BPE with bytes for what it lacks")
    before, rules = _parts(data.get("pre_tokenizer"), "pretokenizers"), _parts(data.get("normalizer"), "normalizers")
    faults = [
        f"its {name} is {model[name]!r}, expected none"
        for name in ("dropout", "continuing_subword_prefix", "end_of_word_suffix")
        if model.get(name)
    ]
    if any(step["type"] == "ByteLevel" for step in (*before, *rules)):
        other = [step["type"] for step in rules if step["type"] not in ("NFC", "NFD", "NFKC", "NFKD", "ByteLevel")]
        faults += [f"it rewrites text ({', '.join(other)}), expected Unicode normal forms at most"] if other else []
        missing = sum(character not in model["vocab"] for character in character_of().values())
        faults += [f"it lacks {missing} of 256 bytes"] if missing > 32 else []  # some never occur in UTF-8
        found = "byte_level"
    else:
        if not model.get("byte_fallback"):
            faults.append("it has no byte fallback, so characters it lacks would be lost")
        elif any(f"<0x{byte:02X}>" not in model["vocab"] for byte in range(256)):
            faults.append("it lacks some of the pieces <0x00> to <0xFF>")
        blanks = ({"String": " "}, {"String": SPACE})
        other = [s["type"] for s in rules if s["type"] != "Prepend" and s.get("pattern") not in blanks]
        faults += [f"it rewrites text ({', '.join(other)}), expected identity"] if other else []
        other = [s["type"] for s in before if s["type"] != "Metaspace" and s.get("pattern") not in blanks]
        faults += [f"it cuts text before its merges ({', '.join(other)}), expected at blanks at most"] if other else []
        found = "sentencepiece"
    if faults:
        raise ValueError(f"{path} cannot be extended: {'; '.join(faults)}")
    return found


def _template(path: Path, config: Mapping[str, Any]) -> str | None:
    """The folder's chat template: a file of its own, or in the config (the default one of several)."""
    if path.is_dir() and (path / "chat_template.jinja").is_file():
        return (path / "chat_template.jinja").read_text(encoding="utf-8")
    template = config.get("chat_template")
    if isinstance(template, list):
        template = {each["name"]: each["template"] for each in template}.get("default")
    return template or None


def _refuse_disagreement(base: Base, config: Mapping[str, Any]) -> None:
    """A ValueError if the base's files say different things about its ids."""
    for index, token in config.get("added_tokens_decoder", {}).items():
        if base.ids.get(token["content"]) != int(index):
            raise ValueError(
                f"{base.path}: tokenizer_config.json gives {token['content']!r} the id {index}, tokenizer.json "
                f"{base.ids.get(token['content'])}; save the folder anew with AutoTokenizer's save_pretrained"
            )
    if base.model is None:
        return
    slow: sentencepiece.SentencePieceProcessor = processor(base.model)
    for text in PLAIN:
        ours, theirs = base.backend.encode(text, add_special_tokens=False).ids, slow.encode(text)
        if ours != theirs:
            raise ValueError(
                f"{base.path}: tokenizer.json cuts {text!r} into {ours}, tokenizer.model into {theirs}; "
                "the two forms do not belong together, so give the path of the right one"
            )
