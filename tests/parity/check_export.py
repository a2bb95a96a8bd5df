"""Whether transformers opens an exported folder to the model that ain_jax holds. Exit status 0 means yes.

    python tests/parity/check_export.py FOLDER REFERENCE.npz

REFERENCE is written by `write_reference.py`. This program runs with transformers 4.51.3 or 5 and torch, and imports no
ain_jax: ids, pixels and logits of a picture-and-text conversation must come out as ain_jax has them.
"""

import json
import sys

import numpy as np
import torch
import transformers
from PIL import Image
from transformers import AutoImageProcessor, AutoProcessor, AutoTokenizer, Qwen2VLForConditionalGeneration

LOGITS = 1e-4
PIXELS = 1e-6


def check(folder: str, reference: str) -> list[str]:
    """What differs, in words; empty if nothing does."""
    with np.load(reference) as arrays:
        saved = dict(arrays)
    messages = json.loads(str(saved["messages"]))
    images = [Image.fromarray(saved[f"image_{i}"]) for i in range(len(saved["grids"]))]
    faults: list[str] = []

    def compare(what: str, ours, theirs, tolerance: float) -> None:
        ours, theirs = np.asarray(ours), np.asarray(theirs)
        if ours.shape != theirs.shape:
            faults.append(f"{what}: shape {theirs.shape} in transformers, {ours.shape} in ain_jax")
            return
        worst = float(np.abs(ours.astype(np.float64) - theirs).max(initial=0))
        print(f"{what:32} max difference {worst:.2e}  (allowed {tolerance:.0e})")
        if not worst <= tolerance:
            faults.append(f"{what} differ by {worst:.2e}, more than {tolerance:.0e}")

    print(f"transformers {transformers.__version__}, torch {torch.__version__}")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    image_processor = AutoImageProcessor.from_pretrained(folder)
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    pixels = image_processor(images, return_tensors="np")
    merged = [int(np.prod(grid)) // image_processor.merge_size**2 for grid in pixels["image_grid_thw"]]
    parts = text.split("<|image_pad|>")
    expanded = parts[0] + "".join("<|image_pad|>" * n + part for n, part in zip(merged, parts[1:]))  # noqa: B905
    compare("ids (AutoTokenizer)", saved["input_ids"], tokenizer(expanded, add_special_tokens=False)["input_ids"], 0)
    compare("grids", saved["grids"], pixels["image_grid_thw"], 0)
    compare("pixels (AutoImageProcessor)", saved["pixel_values"], pixels["pixel_values"], PIXELS)

    if transformers.__version__.startswith("4."):  # in version 5 it asks for torchvision
        processor = AutoProcessor.from_pretrained(folder)
        both = processor(text=[text], images=images, return_tensors="np")
        compare("ids (AutoProcessor)", saved["input_ids"], both["input_ids"][0], 0)
        compare("pixels (AutoProcessor)", saved["pixel_values"], both["pixel_values"], PIXELS)

    model = Qwen2VLForConditionalGeneration.from_pretrained(folder).eval()
    ids = torch.tensor(saved["input_ids"][None].astype(np.int64))
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if images:
        inputs["pixel_values"] = torch.tensor(saved["pixel_values"])
        inputs["image_grid_thw"] = torch.tensor(saved["grids"].astype(np.int64))
        if not transformers.__version__.startswith("4."):
            inputs["mm_token_type_ids"] = (ids == model.config.image_token_id).int()
    with torch.no_grad():
        logits = model(**inputs).logits[0].float().numpy()
    compare("logits", saved["logits"], logits, LOGITS)
    print(f"standard deviation of the logits {logits.std():.2f}")
    return faults


def main() -> None:
    if len(sys.argv) != 3:
        sys.exit("usage: python check_export.py FOLDER REFERENCE.npz")
    faults = check(*sys.argv[1:])
    for fault in faults:
        print("FAULT", fault)
    sys.exit(bool(faults))


if __name__ == "__main__":
    main()
