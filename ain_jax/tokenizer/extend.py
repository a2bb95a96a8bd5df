"""A vocabulary grown by the pieces of another script, with every old id left where it was.

The base's own BPE training is continued (`learn`), its tokenizer.json grows behind its last id (`grow`), and the
folder is written in one piece (`extend`). Text that holds none of the new characters is cut exactly as before.

    base      ▁ ا ل ح ر ي ة  ->  ▁ال ح ر ي ة          (ids 19078 29100 28947 28972 29141)
    learnt    ر+ي, ة+..., ▁ال+ح, ...                    (ids behind the base and the special tokens)
    extended  ▁الحرية                                   (one id)

    python -m ain_jax.tokenizer.extend --base FOLDER --text FILE ... --pieces 16000 --out FOLDER
"""

import argparse
import json
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from itertools import chain
from pathlib import Path
from typing import Any

import sentencepiece
import tokenizers

from ain_jax.tokenizer import folder
from ain_jax.tokenizer.base import Base, open_base
from ain_jax.tokenizer.chat import CHATML_TEMPLATE
from ain_jax.tokenizer.corpus import ARABIC, Chunks, Script, count_chunks, read_texts
from ain_jax.tokenizer.folder import CONTROL, UNUSED, USER_DEFINED, Extension, append
from ain_jax.tokenizer.grow import grow, grown_data
from ain_jax.tokenizer.learn import Learnt, Rules, learn

__all__ = [
    "ARABIC", "SPECIAL_TOKENS", "Base", "Chunks", "Extension", "Learnt", "Script",
    "count_chunks", "extend", "grow", "learn", "open_base", "padded_vocab", "read_texts", "remake",
]  # fmt: skip
SPECIAL_TOKENS = (
    "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>",
    "<|image_pad|>", "<|video_pad|>", "<|pad|>",
)  # fmt: skip


def padded_vocab(size: int, multiple: int = 64) -> int:
    """The number of embedding rows: `size` rounded up to a multiple (32,007 -> 32,064)."""
    return -(-size // multiple) * multiple


def extend(
    base_path: str | Path,
    texts: Iterable[str],
    *,
    out_dir: str | Path,
    pieces: int = 2000,
    special_tokens: Sequence[str] | None = None,
    chat_template: str | None = None,
    eos_token: str | None = None,
    pad_token: str | None = None,
    script: Script = ARABIC,
    marks: str = "keep",
    tatweel: str = "strip",
    digits: str = "separate",
    min_count: int = 2,
    longest: int = 16,
    cap: int = 4_000_000,
    odd_share: float = 0.001,
    progress: bool | None = None,
) -> Extension:
    """The extended tokenizer, written to `out_dir` in one piece; the same arguments give the same bytes.

    pieces          new ids for the script, single characters that the base lacks included
    special_tokens  new ones, right behind the base. A base with a chat template keeps it, its special tokens, its end
                    and its padding; one without gets ChatML and what that needs (SPECIAL_TOKENS), unless they are given
    marks, tatweel, digits, min_count, longest       see `learn`
    cap, odd_share, progress                         see `count_chunks`

    `base_path` is what `open_base` takes. The texts are read once and not kept.
    """
    out_dir = Path(out_dir)
    _refuse_full(out_dir)
    extension, files = _make(
        base_path, texts, out_dir, pieces, special_tokens, chat_template, eos_token, pad_token,
        Rules(script, marks, tatweel, digits, min_count, longest), cap, odd_share, progress,
    )  # fmt: skip
    folder.write(out_dir, files)
    return extension


def _make(
    base_path: str | Path, texts: Iterable[str], out_dir: Path, pieces: int,
    special_tokens: Sequence[str] | None, chat_template: str | None, eos_token: str | None, pad_token: str | None,
    rules: Rules, cap: int, odd_share: float, progress: bool | None,
) -> tuple[Extension, dict[str, bytes]]:  # fmt: skip
    """The extension and the files of its folder, the manifest among them; nothing is written."""
    if pieces < 1:  # told before a long corpus is read
        raise ValueError(f"pieces={pieces}, expected at least 1")
    base = open_base(base_path)
    template, special, eos_token, pad_token = _conversation(base, special_tokens, chat_template, eos_token, pad_token)

    chunks = count_chunks(texts, script=rules.script, cap=cap, odd_share=odd_share, progress=progress)
    learnt = learn(base, chunks, pieces, **vars(rules), progress=progress)
    merges = list(chain.from_iterable(learnt.merges))
    files = folder.contents(
        grown_data(base, special, learnt.pieces, merges),
        base.config,
        template,
        named(base, eos_token, pad_token),
        special,
        grown_model(base, special, learnt.pieces),
    )
    extension = Extension(
        folder=out_dir,
        base_sha256=base.sha256,
        base_size=base.size,
        special_tokens={token: base.size + index for index, token in enumerate(special)},
        first_piece=base.size + len(special),
        pieces=learnt.pieces,
        replaces=learnt.replaces,
        merges=tuple(merges),
        fingerprint=folder.fingerprint(files),
    )
    manifest = {key: value for key, value in vars(extension).items() if key != "folder"} | {
        "format": 2,
        "kind": base.kind,
        "files": sorted(files),
        "size": extension.size,
        "number_of_pieces": len(learnt.pieces),
        "spelt": [base.text(piece) for piece in learnt.pieces],
        "counts": learnt.counts,
        "corpus": {key: value for key, value in vars(chunks).items() if key != "counts"}
        | {"different_chunks": len(chunks.counts)},
        "settings": {"pieces": pieces, **asdict(rules), "cap": cap, "odd_share": odd_share}
        | {"special_tokens": special, "eos_token": eos_token, "pad_token": pad_token},
        "made_with": {"tokenizers": tokenizers.__version__, "sentencepiece": sentencepiece.__version__},
    }
    return extension, files | {"extension.json": (json.dumps(manifest, ensure_ascii=False) + "\n").encode()}


def remake(made: str | Path, base_path: str | Path, texts: Iterable[str], *, out_dir: str | Path) -> Extension:
    """The extension in `made` once more, from its manifest's settings, the same base and the same texts.

    ValueError if the base or the texts are others, or if other versions of the libraries give other files.
    """
    made, out_dir = Path(made), Path(out_dir)
    before = folder.read_extension(made)
    manifest = json.loads((made / "extension.json").read_text(encoding="utf-8"))
    settings = dict(manifest["settings"])
    base = open_base(base_path)
    if base.sha256 != before.base_sha256:
        raise ValueError(f"{base_path} has SHA-256 {base.sha256[:12]}, {made} was made from {before.base_sha256[:12]}")
    _refuse_full(out_dir)
    rules = Rules(Script(**settings["script"]), *(settings[name] for name in list(asdict(Rules()))[1:]))
    template = (made / "chat_template.jinja").read_text(encoding="utf-8")
    after, files = _make(
        base_path, texts, out_dir, settings["pieces"],
        settings["special_tokens"], template, settings["eos_token"], settings["pad_token"],
        rules, settings["cap"], settings["odd_share"], None,
    )  # fmt: skip
    corpus = json.loads(files["extension.json"])["corpus"]["sha256"]
    if corpus != manifest["corpus"]["sha256"]:
        raise ValueError(f"the texts have SHA-256 {corpus[:12]}, those of {made} {manifest['corpus']['sha256'][:12]}")
    if after.fingerprint != before.fingerprint:
        raise ValueError(
            f"{made} has fingerprint {before.fingerprint[:12]}, made again it has {after.fingerprint[:12]}; "
            f"it was made with {manifest['made_with']}"
        )
    folder.write(out_dir, files)
    return after


def _refuse_full(out_dir: Path) -> None:
    if out_dir.exists() and (not out_dir.is_dir() or any(out_dir.iterdir())):
        raise ValueError(f"{out_dir} already exists and is not overwritten; remove it or give another out_dir")


def _conversation(
    base: Base, special_tokens: Sequence[str] | None, chat_template: str | None, eos: str | None, pad: str | None
) -> tuple[str, tuple[str, ...], str, str | None]:
    """The chat template, the special tokens to add, the end and the padding token: as given, else as the base's.

    A base without a template gets ChatML.
    """
    own = base.chat_template
    if special_tokens is None:
        special_tokens = () if own else [token for token in SPECIAL_TOKENS if token not in base.ids]
    twice = [token for token, count in Counter(special_tokens).items() if count > 1]
    wrong = twice + [token for token in special_tokens if token in base.ids]
    if wrong:
        raise ValueError(f"special tokens {wrong} are already in the base or given twice; leave them out")
    eos = eos or (base.named.get("eos_token") if own else "<|im_end|>")
    pad = pad or (base.named.get("pad_token") if own else "<|pad|>")
    known = [*special_tokens, *sorted(base.special)]
    for what, token in (("eos_token", eos), ("pad_token", pad)):
        if token not in known and (what, token) != ("pad_token", None):
            raise ValueError(f"{what} is {token!r}, expected one of {known[:20]}{' ...' if len(known) > 20 else ''}")
    assert eos is not None
    return chat_template or own or CHATML_TEMPLATE, tuple(special_tokens), eos, pad


def named(base: Base, eos: str, pad: str | None) -> dict[str, str]:
    """The special tokens that have a role; a base may have no padding token."""
    return {"eos_token": eos} | ({"pad_token": pad} if pad else {}) | {
        name: token for name, token in base.named.items() if name in ("bos_token", "unk_token")
    }  # fmt: skip


def grown_model(base: Base, special_tokens: Sequence[str], pieces: Sequence[str]) -> Any | None:
    """The SentencePiece model with the same new ids, where the base has one."""
    if base.model is None:
        return None
    grown = base.model
    # ids that only tokenizer.json has (Gemma-3's picture token) must be filled, since a model's ids have no holes
    for index, piece in enumerate(base.pieces()[len(base.model.pieces) :], len(base.model.pieces)):
        kind = CONTROL if piece in base.special else USER_DEFINED if piece else UNUSED
        grown = append(grown, [piece or f"<unused id {index}>"], kind)
    return append(append(grown, special_tokens, CONTROL), pieces)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m ain_jax.tokenizer.extend", description=extend.__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--base", required=True, help="tokenizer.model, tokenizer.json, or a folder that holds them")
    parser.add_argument("--text", required=True, nargs="+", help=".txt or .jsonl files, .gz too")
    parser.add_argument("--key", default="text", help="where a .jsonl record holds its text")
    parser.add_argument("--pieces", type=int, required=True)
    parser.add_argument("--out", required=True, help="the folder to write; it must not exist")
    parser.add_argument("--special-tokens", nargs="*", help="new ones; by default what the chat template needs")
    parser.add_argument("--eos-token")
    parser.add_argument("--pad-token")
    parser.add_argument("--marks", choices=("keep", "strip"), default="keep")
    parser.add_argument("--tatweel", choices=("keep", "strip"), default="strip")
    parser.add_argument("--digits", choices=("separate", "join"), default="separate")
    for name, default in (("min-count", 2), ("longest", 16), ("cap", 4_000_000)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--odd-share", type=float, default=0.001)
    options = vars(parser.parse_args(arguments))
    base, text, key, out = (options.pop(name) for name in ("base", "text", "key", "out"))
    try:
        extension = extend(base, read_texts(*text, key=key), out_dir=out, **options)
    except ValueError as error:
        raise SystemExit(f"error: {error}") from error
    print(
        f"{len(extension.pieces)} pieces behind {extension.base_size} ids and {len(extension.special_tokens)} new "
        f"special tokens: {extension.size} ids in {extension.folder} (fingerprint {extension.fingerprint[:12]})"
    )


if __name__ == "__main__":
    main()
