"""Whether transformers opens an exported folder to the model that ain_jax holds. Exit status 0 means yes.

    python tests/parity/check_export.py FOLDER REFERENCE.npz
    python tests/parity/check_export.py FAMILIES

REFERENCE is written by `write_reference.py`, FAMILIES by `write_families.py`: folders, each with its reference beside.
This program runs with transformers 4.51.3 or 5 and torch, and imports no ain_jax: ids, pixels and logits must come out
as ain_jax has them.
"""

import json
import sys
from pathlib import Path

import numpy as np
import torch
import transformers
from PIL import Image
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoProcessor,
    AutoTokenizer,
    PreTrainedTokenizerFast,
)

LOGITS = 1e-4
PIXELS = 1e-6
OLD = transformers.__version__.startswith("4.")
# Cases of `write_families.py` that version 4.51.3 has no way to compute, and why: skipped there, and told.
NOT_IN_OLD = {
    "llama, yarn of mscales": "it knows no truncate=false: the ramp of yarn begins and ends at whole pairs",
    "qwen2, windows after a layer": "its masks put the window on every layer; flash attention alone tells them apart",
}


class Comparison:
    """What differs, in words (`faults`), and the line that says how much (`lines`)."""

    def __init__(self):
        self.faults: list[str] = []
        self.lines: list[str] = []

    def compare(self, what: str, ours, theirs, tolerance: float) -> None:
        """Notes the largest difference, and a fault where it is above the tolerance."""
        ours, theirs = np.asarray(ours), np.asarray(theirs)
        if ours.shape != theirs.shape:
            self.faults.append(f"{what}: shape {theirs.shape} in transformers, {ours.shape} in ain_jax")
            return
        worst = float(np.abs(ours.astype(np.float64) - theirs).max(initial=0))
        self.lines.append(f"{what:32} max difference {worst:.2e}  (allowed {tolerance:.0e})")
        if not worst <= tolerance:
            self.faults.append(f"{what} differ by {worst:.2e}, more than {tolerance:.0e}")


def check(folder: str, reference: str) -> list[str]:
    """What differs in a folder of which a conversation with pictures is known, in words; empty if nothing does."""
    with np.load(reference) as arrays:
        saved = dict(arrays)
    messages = json.loads(str(saved["messages"]))
    images = pictures(saved)
    found = Comparison()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    image_processor = AutoImageProcessor.from_pretrained(folder)
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    pixels = image_processor(images, return_tensors="np")
    merged = [int(np.prod(grid)) // image_processor.merge_size**2 for grid in pixels["image_grid_thw"]]
    parts = text.split("<|image_pad|>")
    expanded = parts[0] + "".join("<|image_pad|>" * n + part for n, part in zip(merged, parts[1:]))  # noqa: B905
    ids = tokenizer(expanded, add_special_tokens=False)["input_ids"]
    found.compare("ids (AutoTokenizer)", saved["input_ids"], ids, 0)
    found.compare("grids", saved["grids"], pixels["image_grid_thw"], 0)
    found.compare("pixels (AutoImageProcessor)", saved["pixel_values"], pixels["pixel_values"], PIXELS)

    if OLD:  # in version 5 it asks for torchvision
        processor = AutoProcessor.from_pretrained(folder)
        both = processor(text=[text], images=images, return_tensors="np")
        found.compare("ids (AutoProcessor)", saved["input_ids"], both["input_ids"][0], 0)
        found.compare("pixels (AutoProcessor)", saved["pixel_values"], both["pixel_values"], PIXELS)

    model = open_model(folder, seeing=True)
    given = {"pixel_values": saved["pixel_values"], "image_grid_thw": saved["grids"]} if images else {}
    found.compare("logits", saved["logits"], logits(model, saved["input_ids"], given), LOGITS)
    print(*found.lines, f"standard deviation of the logits {saved['logits'].std():.2f}", sep="\n")
    return found.faults


def check_families(place: Path) -> list[str]:
    """What differs in the folders of `write_families.py`, a line printed for each; empty if nothing does."""
    references = sorted(place.glob("*.npz"))
    faults = [] if references else [f"{place} holds no *.npz; expected what write_families.py writes"]
    for reference in references:
        with np.load(reference) as arrays:
            saved = dict(arrays)
        name = str(saved["case"])
        if OLD and name in NOT_IN_OLD:
            print(f"{name:36} SKIPPED: {NOT_IN_OLD[name]}")
            continue
        found = check_family(str(reference.with_suffix("")), saved)
        worst = ", ".join(line.partition("max difference ")[2].partition(" ")[0] for line in found.lines)
        print(f"{name:36} {'FAULT' if found.faults else 'ok':6} {worst}")
        faults += [f"{name}: {fault}" for fault in found.faults]
    return faults


def check_family(folder: str, saved: dict) -> Comparison:
    """Ids, pixels and logits of one of them."""
    found = Comparison()
    # Version 5 makes a Qwen2Tokenizer for every "qwen2", whatever tokenizer_config.json says.
    kind = AutoConfig.from_pretrained(folder).model_type
    opener = PreTrainedTokenizerFast if kind == "qwen2" and not OLD else AutoTokenizer
    ids = opener.from_pretrained(folder)(str(saved["text"]))["input_ids"]
    found.compare("ids", saved["input_ids"], ids, 0)
    given = {}
    if images := pictures(saved):
        given = processed(folder, images)
        theirs = given["pixel_values"] if "image_grid_thw" in given else tile_patches(given["pixel_values"], saved)
        found.compare("pixels", saved["pixel_values"], theirs, PIXELS)
    model = open_model(folder, bool(images))
    found.compare("logits", saved["logits"], logits(model, saved["input_ids"], given), LOGITS)
    return found


def processed(folder: str, images: list[Image.Image]) -> dict:
    """What the image processor that resizes with Pillow makes of the pictures."""
    pillow = {"use_fast": False} if OLD else {"backend": "pil"}
    return dict(AutoImageProcessor.from_pretrained(folder, **pillow)(images, return_tensors="np"))


def tile_patches(tiles, saved: dict) -> np.ndarray:
    """The tiles of each picture, (pictures, tiles, 3, height, width) with empty ones behind, as patches one by one."""
    side = int((saved["pixel_values"].shape[1] // 3) ** 0.5)
    across = tiles.shape[-1] // side
    cut = tiles.reshape(*tiles.shape[:3], across, side, across, side).transpose(0, 1, 3, 5, 2, 4, 6)
    counts = saved["tiles"]
    return np.concatenate([one[:count].reshape(-1, 3 * side**2) for one, count in zip(cut, counts)])  # noqa: B905


def pictures(saved: dict) -> list[Image.Image]:
    """The pictures of a reference."""
    return [Image.fromarray(saved[f"image_{i}"]) for i in range(sum(name.startswith("image_") for name in saved))]


def open_model(folder: str, seeing: bool, dtype=torch.float32):
    """The model that an Auto class opens."""
    auto = AutoModelForImageTextToText if seeing else AutoModelForCausalLM
    # Where nothing is asked for, 4.51.3 takes a kernel that leaves out the capped scores of Gemma 2.
    how = {"attn_implementation": "eager", "torch_dtype": dtype} if OLD else {"dtype": dtype}
    return auto.from_pretrained(folder, **how).eval()


def logits(model, input_ids, given) -> np.ndarray:
    """logits_LV in float32; `given` is what the image processor gave."""
    ids = torch.tensor(np.asarray(input_ids)[None].astype(np.int64))
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    for name, array in given.items():
        array = np.asarray(array)
        inputs[name] = torch.tensor(array if name == "pixel_values" else array.astype(np.int64))
    if "image_grid_thw" in given and not OLD:
        inputs["mm_token_type_ids"] = (ids == model.config.image_token_id).int()
    with torch.no_grad():
        return model(**inputs).logits[0].float().numpy()


def main() -> None:
    if len(sys.argv) not in (2, 3):
        sys.exit("usage: python check_export.py FOLDER REFERENCE.npz, or python check_export.py FAMILIES")
    transformers.utils.logging.disable_progress_bar()
    print(f"transformers {transformers.__version__}, torch {torch.__version__}")
    faults = check(*sys.argv[1:]) if len(sys.argv) == 3 else check_families(Path(sys.argv[1]))
    for fault in faults:
        print("FAULT", fault)
    sys.exit(bool(faults))


if __name__ == "__main__":
    main()
