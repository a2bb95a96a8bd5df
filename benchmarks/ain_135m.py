"""Held-out figures of ain_135m, beside their baselines.

    python benchmarks/ain_135m.py --kit data/ain_135m --model runs/ain_135m/export --out figures
        [--beside models/SmolLM2-135M-Instruct --beside models/gemma-3-270m]

tokens     per word of the held-out handbook's Arabic, by each model's tokenizer
bytes      bits per byte of the held-out texts: modern prose, classical with and without marks, English
reading    error rate (CER) of lines in fonts never trained on, beside Tesseract's on the same lines
naming     exact names in Arabic and English: emoji of an unseen style, flags, stamps, maps seen otherwise and unseen
facts      the same four-choice items in Arabic and English by the likelihood of each answer, and the gap between them
translate  chrF both ways (sacrebleu), against every reference that there is

Each part is written to OUT as soon as it is there, one JSON file a part and model, and is taken from there by a further
run: nothing is lost with the machine. Models without an image encoder, or without a template, are asked what they can
be. Nothing of what is asked was trained on (see `ain_jax/kits`).
"""

import argparse
import dataclasses
import functools
import json
import math
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ain_jax.ask import Answering
from ain_jax.data import drawn
from ain_jax.data.encoding import encode_documents, windows
from ain_jax.evaluate import scores
from ain_jax.generate import Prompt, rows_of
from ain_jax.kits.misread import in_folder, plain
from ain_jax.models.multimodal import MultimodalModel
from ain_jax.tokenizer import chat

Json = dict[str, Any]
WINDOW = 1024  # tokens of a text that are read together
PARTS = ("tokens", "bytes", "reading", "naming", "facts", "translate")
PICTURES = ("emoji", "flags", "stamps", "maps", "maps_again")


@dataclasses.dataclass
class Model:
    """A folder and what is asked of it."""

    folder: Path
    rows: int
    dtype: Any

    @functools.cached_property
    def asked(self) -> Answering:
        return Answering.load(self.folder, self.dtype)

    @functools.cached_property
    def tokenizer(self) -> Any:
        return chat.load_tokenizer(self.folder)  # of a folder with a tokenizer alone, too

    @property
    def sees(self) -> bool:
        return self.asked.config.vision is not None

    @functools.cached_property
    def _score(self) -> Callable[..., Any]:
        model = MultimodalModel(self.asked.config, dtype=self.dtype)

        def nats(params, arrays, targets_BL, counted_BL):
            hidden_BLD = model.apply({"params": params}, **arrays)
            logits_BLV = jnp.asarray(model.apply({"params": params}, hidden_BLD, method="logits"), jnp.float32)
            chosen_BL = jnp.take_along_axis(logits_BLV, targets_BL[..., None], axis=-1)[..., 0]
            nats_BL = jax.nn.logsumexp(logits_BLV, axis=-1) - chosen_BL
            return (nats_BL * counted_BL).sum(axis=1)

        return jax.jit(nats)

    def nats(self, sequences: Sequence[tuple[np.ndarray, int]]) -> list[float]:
        """Of each (ids, first): the nats of the ids from `first` on, those before them given."""
        params, config = self.asked.params, self.asked.config
        order = sorted(range(len(sequences)), key=lambda i: -len(sequences[i][0]))  # neighbours of one length
        found = [0.0] * len(sequences)
        for start in range(0, len(order), self.rows):
            these = order[start : start + self.rows]
            length = -(-len(sequences[these[0]][0]) // 64) * 64
            arrays = rows_of([Prompt(sequences[i][0]) for i in these], config, self.rows, length, 0)
            for name in ("length_B", "next_position_B"):
                arrays.pop(name)
            targets_BL, counted_BL = np.zeros((self.rows, length), np.int32), np.zeros((self.rows, length), np.float32)
            for row, i in enumerate(these):
                ids, first = sequences[i]
                targets_BL[row, : len(ids) - 1] = ids[1:]
                counted_BL[row, first - 1 : len(ids) - 1] = 1
            values = np.asarray(self._score(params, arrays, targets_BL, counted_BL))
            for row, i in enumerate(these):
                found[i] = float(values[row])
        return found

    def answers(self, rows: Sequence[Json], kit: Path, tokens: int) -> list[str]:
        """What it says to each row's question, greedily."""
        asked = dataclasses.replace(self.asked, max_new_tokens=tokens)
        prompts = []
        for row in rows:
            pictures = [drawn.encode(drawn.drawing(in_folder(told, kit))) for told in row.get("images", ())]
            prompts.append(asked.prompt(row["messages"][:-1] if "messages" in row else row["question"], pictures))
        return [answer.strip() for answer in asked.answers(prompts, self.rows)]


def rows(kit: Path, name: str, share: float = 1.0) -> list[Json]:
    """The rows of a held-out file, or an even share of them; none where the kit has no such file."""
    path = kit / f"held/{name}.jsonl"
    found = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.is_file() else []
    return found[:: round(1 / share)]


def tokens(model: Model, kit: Path, share: float) -> Json:
    result = {}
    for name in ("handbook_ar", "tafsir_ar", "hadith_ar", "hadith_marked_ar", "handbook_en"):
        texts = [row["text"] for row in rows(kit, f"text/{name}", share)]
        ids = chat.encode_texts(model.tokenizer, texts)
        words = sum(len(text.split()) for text in texts)
        result[name] = round(sum(map(len, ids)) / words, 4) if words else None
    return result


def bits(model: Model, kit: Path, share: float) -> Json:
    result = {}
    for path in sorted((kit / "held/text").glob("*.jsonl")):
        texts = [row["text"] for row in rows(kit, f"text/{path.stem}", share)]
        pieces = [(piece, 1) for ids in encode_documents(model.tokenizer, texts) for piece in windows(ids, WINDOW)]
        size = sum(len(text.encode()) for text in texts)
        result[path.stem] = round(sum(model.nats(pieces)) / math.log(2) / size, 5)
    return result


def reading(model: Model, kit: Path, share: float) -> Json:
    if not model.sees:
        return {}
    asked, groups = rows(kit, "read", share), defaultdict(list)
    for row, answer in zip(asked, model.answers(asked, kit, 96), strict=True):
        groups[f"{row['font']}/{row['kind']}"].append((plain(row["messages"][-1]["content"]), plain(answer)))
    return {name: _read(pairs) for name, pairs in sorted(groups.items())}


def _read(pairs: Sequence[tuple[str, str]]) -> Json:
    right, said = ([pair[i] for pair in pairs] for i in (0, 1))
    return {"cer": round(scores.error_rate(right, said), 5), "exact": round(scores.accuracy(right, said), 5),
            "lines": len(pairs)}  # fmt: skip


def naming(model: Model, kit: Path, share: float) -> Json:
    if not model.sees:
        return {}
    groups = defaultdict(list)
    for name in PICTURES:
        asked = rows(kit, name, share)
        for row, answer in zip(asked, model.answers(asked, kit, 32), strict=True):
            kind = f"/{row['kind']}" if "kind" in row else ""
            groups[f"{name}{kind}/{row['language']}"].append(
                scores.plain(row["messages"][-1]["content"]) == scores.plain(answer)
            )
    return {name: {"exact": round(sum(found) / len(found), 5), "asked": len(found)} for name, found in groups.items()}


def facts(model: Model, kit: Path, share: float) -> Json:
    """An answer's likelihood is that of its bytes on the average, so that long names are no worse than short ones."""
    asked, right = rows(kit, "facts"), defaultdict(list)
    kept = set(list(dict.fromkeys(row["item"] for row in asked))[:: round(1 / share)])  # in both languages
    asked = [row for row in asked if row["item"] in kept]
    sequences = [pair for row in asked for pair in _choices(model, row)]
    values = iter(model.nats(sequences))
    for row in asked:
        each = [next(values) / len(choice.encode()) for choice in row["choices"]]
        right[row["language"]].append(int(np.argmin(each)) == row["right"])
    shares = {language: round(sum(found) / len(found), 5) for language, found in right.items()}
    return shares | ({"gap": round(shares["en"] - shares["ar"], 5), "items": len(right["ar"])} if shares else {})


def _choices(model: Model, row: Json) -> Iterator[tuple[np.ndarray, int]]:
    for choice in row["choices"]:
        if model.tokenizer.chat_template:
            asked = chat.encode_prompt(model.tokenizer, [{"role": "user", "content": row["question"]}])
            answer = choice
        else:
            (asked,), answer = encode_documents(model.tokenizer, [row["question"]]), f" {choice}"
        (ids,) = chat.encode_texts(model.tokenizer, [answer])
        yield np.concatenate([asked, ids]).astype(np.int32), len(asked)


def translate(model: Model, kit: Path, share: float) -> Json:
    try:
        from sacrebleu.metrics.chrf import CHRF  # pyright: ignore[reportMissingImports]
    except ImportError:
        return {"left out": "chrF is sacrebleu's: pip install sacrebleu"}
    if not model.tokenizer.chat_template:
        return {}
    asked, groups = rows(kit, "translate", share), defaultdict(list)
    for row, answer in zip(asked, model.answers(asked, kit, 160), strict=True):
        groups[f"{row['source']}/{row['from']}-{row['into']}"].append((answer, row["references"]))
    result = {}
    for name, pairs in sorted(groups.items()):
        most = max(len(references) for _, references in pairs)  # a row with fewer says its first again
        streams = [[(told + told[:1] * most)[i] for _, told in pairs] for i in range(most)]
        result[name] = {"chrf": round(CHRF().corpus_score([answer for answer, _ in pairs], streams).score, 3),
                        "asked": len(pairs), "references": most}  # fmt: skip
    return result


MAKE = {"tokens": tokens, "bytes": bits, "reading": reading, "naming": naming, "facts": facts, "translate": translate}


def lines(found: dict[str, dict[str, Json]], tesseract: Json) -> Iterator[str]:
    """The table: a row for each figure, a column for each model."""
    models = list(found)
    yield f"{'':44}" + "".join(f"{name[:22]:>24}" for name in (*models, "Tesseract"))
    for part in PARTS:
        keys = list(dict.fromkeys(key for told in found.values() for key in told.get(part, {})))
        for key in keys:
            cells = [_cell(found[name].get(part, {}).get(key)) for name in models]
            cells.append(_cell(tesseract.get("rates", {}).get(key)) if part == "reading" else "")
            yield f"{f'{part} {key}':44}" + "".join(f"{cell:>24}" for cell in cells)


def _cell(value: Any) -> str:
    if isinstance(value, dict):
        value = next((value[name] for name in ("cer", "exact", "chrf") if name in value), None)
    return "" if value is None else f"{value:,.4f}" if isinstance(value, float) else str(value)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kit", type=Path, required=True, help="what python -m ain_jax.kits.ain_135m wrote")
    parser.add_argument("--model", type=Path, required=True, help="the folder that was trained")
    parser.add_argument("--beside", type=Path, action="append", default=[], help="a folder to compare with; repeatable")
    parser.add_argument("--parts", nargs="+", default=PARTS, choices=PARTS)
    parser.add_argument("--out", type=Path, required=True, help="a folder for the figures")
    parser.add_argument("--rows", type=int, default=64, help="texts and questions at a time")
    parser.add_argument("--share", type=float, default=1.0, help="of what is held out, for a quick look")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    given = parser.parse_args()
    found: dict[str, dict[str, Json]] = {}
    for folder in (given.model, *given.beside):
        model, found[folder.name] = Model(folder, given.rows, jnp.dtype(given.dtype)), {}
        for part in given.parts:
            path = given.out / f"{folder.name}-{part}-{given.share:g}.json"
            if not path.is_file():
                begin = time.perf_counter()
                figures = MAKE[part](model, given.kit, given.share)
                told = {"figures": figures, "seconds": round(time.perf_counter() - begin, 1)}
                path.parent.mkdir(parents=True, exist_ok=True)
                beside = path.with_name(f"{path.name}.tmp")  # a machine that is taken away leaves no half of a figure
                beside.write_text(json.dumps(told, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")
                beside.replace(path)
                print(f"{folder.name} {part}: {told['seconds']} s", flush=True)
            found[folder.name][part] = json.loads(path.read_text(encoding="utf-8"))["figures"]
    tesseract = given.kit / "held/tesseract.json"
    rates = json.loads(tesseract.read_text(encoding="utf-8")) if tesseract.is_file() else {}
    print("\n".join(lines(found, rates)))


if __name__ == "__main__":
    main()
