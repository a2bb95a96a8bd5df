"""Rows, tokens and pictures a second and core, from files to batches: ours beside the Hugging Face way.

    python benchmarks/data.py [--rows 3000] [--pictures 240] [--rounds 3] [--workers 1 2] [--json FILE]

Ours: records -> tokenised -> planned -> packed rows on the host. Theirs: the conversation through the tokenizer's
`apply_chat_template` with its own mask of what the assistant says, pictures through transformers' image processor of
Qwen2-VL (with Pillow) and one placeholder for each of its features, then a collator that pads a batch to its longest
row and sets labels. Both read the same files with the same tokenizer, in one process and one thread, in turn;
processor time is counted, which stays true beside other work. The files are drawn here from the sample's handbook,
always the same.

Ours is counted in three ways: the first epoch alone, with everything from the records on (tokenised, planned, laid); a
later epoch, laid from the tokenised columns, as every restart has it too; and a run of three epochs, a first and two
later ones. Theirs renders and tokenises in every epoch, as a collator does it that is given conversations; who maps a
set to ids beforehand pays for it once as well. Most of either first epoch is the same call of the same tokenizer, so
that little can be gained there. Before it, once for all runs, ours turns the files into records and opens every
picture; the seconds of that are told below the table.

Pictures are then laid by worker processes (Loader.workers), in seconds on the clock from the first batch to the last:
true only where the machine has that many cores to spare.

How many steps that feeds: FLOPs of a step = 6 x parameters x tokens of the step (forward and backward of the matrix
products; attention and the image encoder are left out, which makes a device seem quicker than it is); a device takes
FLOPs / (peak x utilisation) seconds. Peaks are those of `ain_jax/train/peaks.py`, dense and in bfloat16.
"""

import argparse
import json
import math
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

os.environ["TOKENIZERS_PARALLELISM"] = "false"  # one thread: what is compared is the work
os.environ["RAYON_NUM_THREADS"] = "1"
os.environ.setdefault("JAX_PLATFORMS", "cpu")

import numpy as np
from PIL import Image
from rich.console import Console
from rich.table import Table

from ain_jax import sample
from ain_jax.data import formats, images, pack_plan, workers
from ain_jax.data.builders.files import Sources, build
from ain_jax.data.builders.records import Records
from ain_jax.data.builders.sample_records import KINDS, SampleParams
from ain_jax.data.examples import tokenise
from ain_jax.data.packing import Packing
from ain_jax.data.rows import Rows, Steps
from ain_jax.tokenizer.chat import load_tokenizer
from ain_jax.tokenizer.extend import extend
from ain_jax.train import peaks

ROW_TOKENS, BATCH, EPOCHS = 4096, 8, 3
PARAMETERS, UTILISATION = 7.6e9, 0.4  # a 7B model; the share of the peak that training reaches
PEAKS = {name: (peaks.peak(name, 1) or (math.nan, ""))[0] for name in ("H200", "TPU v5p")}
SIDES = ((320, 240), (640, 480), (1024, 683), (768, 1024), (1240, 1754), (224, 224))  # pixels, photographs and a page


def tokenizer_folder(folder: Path) -> Path:
    """Mistral's vocabulary with some Arabic pieces, ChatML, and Qwen2-VL's image settings beside it."""
    base = sample.FOLDER / "tokenizer" / "mistral_v1.model"
    texts = [record.text for record in handbook() if record.language == "ar"]
    made = extend(base, texts, out_dir=folder / "tokenizer", pieces=400).folder
    settings = images.preprocessor_config(images.ImageSettings())
    (folder / "processor").mkdir(exist_ok=True)
    (folder / "processor" / "preprocessor_config.json").write_text(json.dumps(settings))
    return made


def handbook() -> list[formats.Record]:
    make, _ = KINDS["documents"]
    return list(make(SampleParams(), "train"))


def write_text(path: Path, count: int) -> None:
    """Conversations of one to four turns, Arabic and English, a fifth of them long."""
    rng, texts = np.random.default_rng(0), [record.text for record in handbook()]
    with path.open("w", encoding="utf-8") as file:
        for number in range(count):
            turns = []
            for _ in range(int(rng.integers(1, 5))):
                question, answer = (texts[i] for i in rng.integers(0, len(texts), 2))
                longer = int(rng.choice([120, 400, 1200], p=[0.5, 0.3, 0.2]))
                turns += [{"role": "user", "content": question[: int(rng.integers(20, 160))].strip() or "?"},
                          {"role": "assistant", "content": answer[:longer].strip() or "."}]  # fmt: skip
            file.write(json.dumps({"id": f"t{number}", "messages": turns}, ensure_ascii=False) + "\n")


def write_pictures(path: Path, count: int) -> None:
    """Conversations with one or two JPEG pictures of varied sizes."""
    rng, texts = np.random.default_rng(1), [record.text for record in handbook()]
    with path.open("w", encoding="utf-8") as file:
        for number in range(count):
            names = []
            for k in range(1 + int(rng.random() < 0.25)):
                width, height = SIDES[int(rng.integers(len(SIDES)))]
                small = rng.integers(0, 256, (max(height // 24, 2), max(width // 24, 2), 3), np.uint8)
                picture = Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC)
                names.append(f"p{number}-{k}.jpg")
                picture.save(path.parent / names[-1], "JPEG", quality=88)
            answer = texts[int(rng.integers(len(texts)))][: int(rng.integers(30, 500))].strip() or "."
            messages = [{"role": "user", "content": "<image>" * len(names) + " What is shown?"},
                        {"role": "assistant", "content": answer}]  # fmt: skip
            row = {"id": f"p{number}", "messages": messages, "images": names}
            file.write(json.dumps(row, ensure_ascii=False) + "\n")


class Ours:
    """Files -> packed batches on the host."""

    def __init__(self, path: Path, tokenizer: Any, pictures: bool):
        self.tokenizer, self.folder = tokenizer, path.parent
        start = time.perf_counter()
        sources = Sources({path.stem: str(path)}, workers=1)
        self.records = Records(build(path.stem, sources, path.parent / "records", progress=False), "train")
        self.seconds = time.perf_counter() - start
        self.images = images.ImageSettings() if pictures else None
        self.image_token = tokenizer.convert_tokens_to_ids("<|image_pad|>")
        self.packing = Packing(ROW_TOKENS, row_patches=3 * ROW_TOKENS if pictures else 0)
        self.rows: Rows | None = None

    def whole(self) -> Iterator[dict[str, np.ndarray]]:
        folder = Path(tempfile.mkdtemp(dir=self.folder))
        made = tokenise(self.records, "b", self.tokenizer, self.images, ROW_TOKENS, "", folder, self.packing)
        plan = pack_plan.plan({"b": made}, None, self.packing, None, 0, folder / "plan")
        self.rows = Rows(plan, [made], self.packing, self.image_token, self.images)
        yield from self.laid()

    def laid(self) -> Iterator[dict[str, np.ndarray]]:
        return (self.steps[step] for step in range(len(self.steps)))

    @property
    def steps(self) -> Steps:
        assert self.rows is not None, "whole() makes the rows"
        return Steps(self.rows, BATCH, tuple(range(BATCH)))

    def by_workers(self, count: int) -> float:
        """Batches a second on the clock, once the workers are there; 0: this process alone."""
        made = workers.in_order(self.steps, range(len(self.steps)), count) if count else self.laid()
        next(made)
        start, batches = time.perf_counter(), sum(1 for _ in made)
        return batches / (time.perf_counter() - start)

    @staticmethod
    def useful(batch: dict[str, np.ndarray]) -> tuple[int, int]:
        used_BL = batch["segments_BL"] > 0  # the last batch of a short file has rows without anything
        return int(used_BL.sum()), int(used_BL.any(axis=1).sum()) * ROW_TOKENS


class Theirs:
    """The same files the Hugging Face way."""

    def __init__(self, path: Path, folder: Path):
        from transformers import AutoImageProcessor, AutoTokenizer, __version__

        pillow: dict[str, Any] = {"use_fast": False} if __version__.startswith("4.") else {"backend": "pil"}
        self.path = path
        self.tokenizer = AutoTokenizer.from_pretrained(folder / "tokenizer")
        self.processor = AutoImageProcessor.from_pretrained(folder / "processor", **pillow)
        self.pad = self.tokenizer.convert_tokens_to_ids("<|image_pad|>")

    def whole(self) -> Iterator[dict[str, np.ndarray]]:
        rows = [json.loads(line) for line in self.path.read_text("utf-8").splitlines()]
        for start in range(0, len(rows), BATCH):
            yield self.collated([self.row(row) for row in rows[start : start + BATCH]])

    def row(self, row: dict[str, Any]) -> dict[str, Any]:
        parts = [{"role": m["role"], "content": _parts(m["content"])} for m in row["messages"]]
        names, made = row.get("images", []), {}
        if names:
            pictures = [Image.open(self.path.parent / name) for name in names]
            made = dict(self.processor(pictures, return_tensors="np"))
        encoded = self.tokenizer.apply_chat_template(
            parts, tokenize=True, return_dict=True, return_assistant_tokens_mask=True
        )
        ids, mask = encoded["input_ids"], encoded["assistant_masks"]
        if names:  # as Qwen2VLProcessor: one placeholder for each merged feature
            counts = iter((made["image_grid_thw"].prod(axis=1) // 4).tolist())
            repeats = [next(counts) if token == self.pad else 1 for token in ids]
            ids, mask = np.repeat(ids, repeats), np.repeat(mask, repeats)
        return {"ids": np.asarray(ids), "mask": np.asarray(mask), **made}

    def collated(self, rows: list[dict[str, Any]]) -> dict[str, np.ndarray]:
        longest = max(len(row["ids"]) for row in rows)
        ids_BL = np.zeros((len(rows), longest), np.int64)
        labels_BL, attend_BL = np.full_like(ids_BL, -100), np.zeros_like(ids_BL)
        for b, row in enumerate(rows):
            length = len(row["ids"])
            ids_BL[b, :length], attend_BL[b, :length] = row["ids"], 1
            labels_BL[b, :length] = np.where(row["mask"] == 1, row["ids"], -100)
        batch = {"input_ids": ids_BL, "labels": labels_BL, "attention_mask": attend_BL}
        for name in ("pixel_values", "image_grid_thw"):
            found = [row[name] for row in rows if name in row]
            batch |= {name: np.concatenate(found)} if found else {}
        return batch

    @staticmethod
    def useful(batch: dict[str, np.ndarray]) -> tuple[int, int]:
        return int(batch["attention_mask"].sum()), batch["attention_mask"].size


def _parts(content: str) -> list[dict[str, str]]:
    texts = content.split("<image>")
    parts = [{"type": "image"} for _ in texts[1:]]
    return [*parts, {"type": "text", "text": texts[-1]}]


def counted(run: Callable[[], Iterator[dict[str, np.ndarray]]], useful: Callable) -> tuple[float, int, int, int]:
    """(seconds of processor time, batches, tokens, places) of one pass; a batch is looked at and let go."""
    spent, batches, tokens, places = 0.0, 0, 0, 0
    stream = run()
    while True:
        start = time.process_time()
        batch = next(stream, None)
        spent += time.process_time() - start
        if batch is None:
            return spent, batches, tokens, places
        filled, size = useful(batch)
        batches, tokens, places = batches + 1, tokens + filled, places + size


def measure(
    name: str, path: Path, folder: Path, tokenizer: Any, rounds: int, pictures: int, tried: list[int]
) -> list[dict[str, Any]]:
    """The ways on one file, in turn, and workers of each number that is to be tried."""
    count = len(path.read_bytes().splitlines())
    ours, theirs = Ours(path, tokenizer, bool(pictures)), Theirs(path, folder)
    ways = {
        "Hugging Face": (theirs.whole, theirs.useful),
        "ours, first epoch": (ours.whole, ours.useful),
        "ours, later epoch": (ours.laid, ours.useful),
    }
    whole = f"ours, {EPOCHS} epochs of a run"
    found: dict[str, list[tuple[float, int, int, int]]] = {way: [] for way in ways}
    for _ in range(rounds):
        for way, (run, useful) in ways.items():
            found[way].append(counted(run, useful))
    lines = []
    middle = {way: statistics.median(s for s, *_ in passes) for way, passes in found.items()}
    first, later = middle["ours, first epoch"], middle["ours, later epoch"]
    middle[whole], found[whole] = (first + (EPOCHS - 1) * later) / EPOCHS, found["ours, later epoch"]
    speeds = {count: ours.by_workers(count) for count in (0, *tried)} if pictures and tried else {}
    for way, passes in found.items():
        spent = middle[way]
        _, batches, tokens, places = passes[-1]
        in_a_batch = tokens / batches if way == "Hugging Face" else tokens / places * ROW_TOKENS * BATCH
        line = {"data": name, "way": way, "conversion_seconds": ours.seconds, "batches_per_second_by_workers": speeds,
                "rows_per_second": count / spent, "tokens_per_second": tokens / spent,
                "pictures_per_second": pictures / spent, "times_theirs": middle["Hugging Face"] / spent,
                "useful_per_batch": in_a_batch, "useful_share": tokens / places}  # fmt: skip
        for device, flops in PEAKS.items():
            step_tokens = ROW_TOKENS * BATCH
            seconds = 6 * PARAMETERS * step_tokens / (flops * UTILISATION)
            line[f"{device}_steps_per_second"] = line["tokens_per_second"] / step_tokens
            line[f"{device}_devices_fed"] = line["tokens_per_second"] / step_tokens * seconds
        lines.append(line)
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=3000, help="text conversations")
    parser.add_argument("--pictures", type=int, default=240, help="conversations with pictures")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--workers", type=int, nargs="*", default=[], help="numbers of workers to try on pictures")
    parser.add_argument("--json", type=Path)
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        tokenizer = load_tokenizer(tokenizer_folder(folder))
        text, seen = folder / "text.jsonl", folder / "pictures.jsonl"
        write_text(text, asked.rows)
        write_pictures(seen, asked.pictures)
        pictures = sum(len(json.loads(line)["images"]) for line in seen.read_text("utf-8").splitlines())
        lines = measure("text", text, folder, tokenizer, asked.rounds, 0, [])
        lines += measure("pictures", seen, folder, tokenizer, asked.rounds, pictures, asked.workers)
    title = (
        f"a second of one core (processor time), mean of the epochs, medians of {asked.rounds}; "
        f"a batch is {BATCH} rows, ours of {ROW_TOKENS:,} tokens"
    )
    table = Table("data", "way", title=title)
    for column in ("rows/s", "tokens/s", "pictures/s", "times theirs", "useful tokens a batch", "useful share",
                   "H200 fed", "TPU v5p fed"):  # fmt: skip
        table.add_column(column, justify="right")
    for line in lines:
        table.add_row(line["data"], line["way"], f"{line['rows_per_second']:,.0f}", f"{line['tokens_per_second']:,.0f}",
                      f"{line['pictures_per_second']:,.1f}", f"{line['times_theirs']:.2f}",
                      f"{line['useful_per_batch']:,.0f}", f"{line['useful_share']:.1%}",
                      f"{line['H200_devices_fed']:,.1f}", f"{line['TPU v5p_devices_fed']:,.1f}")  # fmt: skip
    Console(width=150).print(table)
    step = ROW_TOKENS * BATCH
    print(f"A step: {step:,} tokens of a {PARAMETERS / 1e9:g}B model, 6 x parameters x tokens = "
          f"{6 * PARAMETERS * step:.3g} FLOPs; at {UTILISATION:.0%} of the peak an H200 makes "
          f"{PEAKS['H200'] * UTILISATION / (6 * PARAMETERS * step):.2f} and a v5p "
          f"{PEAKS['TPU v5p'] * UTILISATION / (6 * PARAMETERS * step):.2f} steps a second. Fed: devices that one core "
          "keeps busy.")  # fmt: skip
    told = {line["data"]: line["conversion_seconds"] for line in lines}
    print("files to records, once: " + ", ".join(f"{data} {seconds:.1f} s" for data, seconds in told.items()))
    for count, speed in lines[-1]["batches_per_second_by_workers"].items():
        alone = lines[-1]["batches_per_second_by_workers"][0]
        print(
            f"pictures, {count} workers: {speed:.2f} batches a second on the clock, {speed / alone:.2f} times without"
        )
    if asked.json:
        asked.json.write_text(json.dumps(lines, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
