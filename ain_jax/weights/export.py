"""Parameters -> a folder that transformers 4.51 and 5 open with no code of ours."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

from ain_jax.data import tiles
from ain_jax.data.images import ImageSettings, preprocessor_config
from ain_jax.data.tiles import TileSettings
from ain_jax.models.config import ClipConfig, ModelConfig, VisionConfig, to_hf
from ain_jax.weights.table import published, rearrange, sizes

SHARD_BYTES = 5_000_000_000
# Whatever of these a tokenizer folder holds goes along unchanged.
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
    "extension.json",
)


def export_folder(
    params: dict[str, Any],
    config: ModelConfig,
    tokenizer_dir: str | Path,
    image_settings: ImageSettings | TileSettings | None,
    out_dir: str | Path,
    *,
    model_card: str = "",
    shard_bytes: int = SHARD_BYTES,
) -> Path:
    """The folder, complete: written beside its place first and then renamed, so that a failure leaves nothing behind.

    Weights keep their dtype and get the published names; a tied head is not written twice.
    """
    out_dir, tokenizer_dir = Path(out_dir), Path(tokenizer_dir)
    _check(config, image_settings, tokenizer_dir)
    beside = out_dir.with_name(out_dir.name + ".partial")
    shutil.rmtree(beside, ignore_errors=True)
    beside.mkdir(parents=True)
    try:
        dtype = write_weights(params, config, beside, shard_bytes)
        write_json(beside / "config.json", to_hf(config, dtype))
        write_json(beside / "generation_config.json", generation_config(config))
        if isinstance(config.vision, ClipConfig) and isinstance(image_settings, TileSettings):
            write_json(beside / "preprocessor_config.json", tiles.preprocessor_config(image_settings))
            write_json(beside / "processor_config.json", llava_processor(config.vision))
        elif config.vision and isinstance(image_settings, ImageSettings):
            write_json(beside / "preprocessor_config.json", preprocessor_config(image_settings))
        for name in TOKENIZER_FILES:
            if (tokenizer_dir / name).exists():
                shutil.copyfile(tokenizer_dir / name, beside / name)
        text = model_card or card("A model trained with ain_jax", pictures=config.vision is not None)
        (beside / "README.md").write_text(text + _usage(config), encoding="utf-8")
    except BaseException:
        shutil.rmtree(beside, ignore_errors=True)
        raise
    replace_folder(beside, out_dir)
    return out_dir


def write_weights(params: dict[str, Any], config: ModelConfig, folder: Path, shard_bytes: int = SHARD_BYTES) -> str:
    """Writes the safetensors shards, and their index if there are several; the dtype of the weights."""
    shards: list[list[str]] = [[]]
    filled = total = 0
    dtypes = set()
    for name, array in tensors(params, config, check_only=True):
        if filled and filled + array.nbytes > shard_bytes:
            shards.append([])
            filled = 0
        shards[-1].append(name)
        filled += array.nbytes
        total += array.nbytes
        dtypes.add(array.dtype.name)
    if len(dtypes) != 1:
        raise ValueError(f"weights of several dtypes, {', '.join(sorted(dtypes))}; cast the parameters to one")
    names = [f"model-{i + 1:05}-of-{len(shards):05}.safetensors" for i in range(len(shards))]
    if len(shards) == 1:
        names = ["model.safetensors"]
    made = tensors(params, config)
    for file, shard in zip(names, shards, strict=True):
        held = dict(next(made) for _ in shard)
        save_file(held, folder / file, metadata={"format": "pt"})
    if len(shards) > 1:
        places = {name: file for file, shard in zip(names, shards, strict=True) for name in shard}
        write_json(folder / "model.safetensors.index.json", {"metadata": {"total_size": total}, "weight_map": places})
    return dtypes.pop()


def tensors(params: dict[str, Any], config: ModelConfig, check_only: bool = False) -> Iterator[tuple[str, Any]]:
    """(published name, array) of every tensor, in the order of the table; parameters with no row are refused."""
    letters = sizes(config)
    left = dict(_leaves(params))
    wanted = {place.path for place in published(config)}
    if left.keys() != wanted:
        faults = [f"{path} has no published name" for path in sorted(left.keys() - wanted)]
        faults += [f"{path} is missing" for path in sorted(wanted - left.keys())]
        raise ValueError("the parameters are not those of this config: " + "; ".join(faults))
    held, array = "", None
    for place in published(config):
        if check_only:
            whole = left[place.path]
            shape = whole.shape if place.layer is None else whole.shape[1:]
            yield place.name, np.broadcast_to(np.zeros((), whole.dtype), shape)
            continue
        if place.path != held:
            held, array = place.path, np.asarray(left[place.path])
        assert array is not None
        ours = array if place.layer is None else array[place.layer]
        yield place.name, np.ascontiguousarray(rearrange(ours, place.layout, letters, reverse=True))


def generation_config(config: ModelConfig) -> dict[str, Any]:
    """`generation_config.json`: greedy, ending where a turn ends."""
    ids = {name: getattr(config, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    if isinstance(config.eos_token_id, tuple):
        ids["eos_token_id"] = list(config.eos_token_id)
    return {"do_sample": False} | {name: value for name, value in ids.items() if value is not None}


def card(
    title: str, base: str = "", licence: str = "", data: str = "", experiment: str = "", pictures: bool = True
) -> str:
    """A model card: a README.md with the front matter that model hubs read."""
    task = "image-text-to-text" if pictures else "text-generation"
    front = ["---", "library_name: transformers", f"pipeline_tag: {task}", "language: [ar, en]"]
    front += [f"license: {licence}"] if licence else []
    front += [f"base_model: {base}"] if base else []
    lines = [*front, "---", "", f"# {title}", ""]
    lines += [
        f"- {label}: {text}"
        for label, text in (("Base", base), ("Licence", licence), ("Data", data), ("Experiment", experiment))
        if text
    ]
    return "\n".join([*lines, ""])


def _usage(config: ModelConfig) -> str:
    """The lines that open the folder, for the end of a model card."""
    model = to_hf(config)["architectures"][0]
    names = ["AutoTokenizer", model] + (["AutoImageProcessor"] if config.vision else [])
    code = [
        "",
        "```python",
        f"from transformers import {', '.join(sorted(names))}",
        f'model = {model}.from_pretrained("FOLDER")',
        'tokenizer = AutoTokenizer.from_pretrained("FOLDER")',
        *(['image_processor = AutoImageProcessor.from_pretrained("FOLDER")'] if config.vision else []),
        "```",
        "",
    ]
    return "\n".join(code)


def llava_processor(vision: ClipConfig) -> dict[str, Any]:
    """`processor_config.json` of LLaVA-NeXT, from which its processor counts placeholders."""
    return {
        "processor_class": "LlavaNextProcessor",
        "patch_size": vision.patch_size,
        "vision_feature_select_strategy": "default",
        "num_additional_image_tokens": 1,
        "image_token": "<image>",
    }


def write_json(path: Path, value: dict[str, Any]) -> None:
    """Writes an object as indented JSON."""
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def replace_folder(complete: Path, place: Path) -> None:
    """Puts a complete folder in its place; an older one goes only when the new one is there."""
    old = place.with_name(place.name + ".old")
    shutil.rmtree(old, ignore_errors=True)
    if place.exists():
        place.rename(old)
    complete.rename(place)
    shutil.rmtree(old, ignore_errors=True)


SHARED = {  # what a tower and its image settings must agree on
    VisionConfig: (ImageSettings, ("patch_size", "merge_size", "temporal_patch_size")),
    ClipConfig: (TileSettings, ("tile", "patch_size", "pinpoints")),
}


def _check(config: ModelConfig, settings: ImageSettings | TileSettings | None, tokenizer_dir: Path) -> None:
    faults = []
    if config.vision is not None:
        kind, names = SHARED[type(config.vision)]
        if not isinstance(settings, kind):
            faults.append(f"a {config.family} needs {kind.__name__}, and {type(settings).__name__} was given")
            names = ()
        for name in names:
            ours, theirs = getattr(config.vision, name), getattr(settings, name)
            if ours != theirs:
                faults.append(f"{name} is {ours} in the model and {theirs} in the image settings")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        if not (tokenizer_dir / name).exists():
            faults.append(f"{tokenizer_dir / name} is missing; give a tokenizer folder as transformers saves it")
    if faults:
        raise ValueError("export: " + "; ".join(faults))


def _leaves(tree: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in tree.items():
        path = f"{prefix}{name}"
        if isinstance(value, dict):
            yield from _leaves(value, path + "/")
        else:
            yield path, value
