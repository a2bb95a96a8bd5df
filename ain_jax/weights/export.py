"""Parameters -> a folder that transformers 4.51 and 5 open with no code of ours."""

import itertools
import json
import math
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict

from ain_jax.data import tiles
from ain_jax.data.images import ImageSettings, preprocessor_config
from ain_jax.data.tiles import TileSettings
from ain_jax.models.config import ClipConfig, ModelConfig, VisionConfig, to_hf
from ain_jax.tokenizer.chat import load_tokenizer
from ain_jax.weights.shards import DTYPES, INDEX, write
from ain_jax.weights.table import Place, our_shape, published, rearrange, sizes, their_shape

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
    dtype: str = "",
) -> Path:
    """The folder, complete: written beside its place first and then renamed, so that a failure leaves nothing behind.

    Weights are cast to `dtype` or keep their own, and get the published names; a tied head is not written twice.
    Refused where transformers would open the tokenizer as another one.
    """
    out_dir, tokenizer_dir = Path(out_dir), Path(tokenizer_dir)
    _check(config, image_settings, tokenizer_dir, out_dir)
    beside = out_dir.with_name(out_dir.name + ".partial")
    shutil.rmtree(beside, ignore_errors=True)
    beside.mkdir(parents=True)
    try:
        kept = write_weights(params, config, beside, shard_bytes, dtype)
        write_json(beside / "config.json", to_hf(config, kept))
        write_json(beside / "generation_config.json", generation_config(config))
        if isinstance(config.vision, ClipConfig) and isinstance(image_settings, TileSettings):
            write_json(beside / "preprocessor_config.json", tiles.preprocessor_config(image_settings))
            write_json(beside / "processor_config.json", llava_processor(config.vision))
        elif config.vision and isinstance(image_settings, ImageSettings):
            write_json(beside / "preprocessor_config.json", preprocessor_config(image_settings))
        for name in TOKENIZER_FILES:
            if (tokenizer_dir / name).exists():
                shutil.copyfile(tokenizer_dir / name, beside / name)
        # Beside this config.json transformers may take another class than the folder names: refused there.
        ids, rows = len(load_tokenizer(beside)), config.text.vocabulary
        if ids > rows:
            raise ValueError(f"export: {tokenizer_dir} has {ids} ids, and the model {rows} rows: it is another model's")
        text = model_card or card("A model trained with ain_jax", pictures=config.vision is not None)
        (beside / "README.md").write_text(text + _usage(config), encoding="utf-8")
    except BaseException:
        shutil.rmtree(beside, ignore_errors=True)
        raise
    replace_folder(beside, out_dir)
    return out_dir


def write_weights(
    params: dict[str, Any], config: ModelConfig, folder: Path, shard_bytes: int = SHARD_BYTES, dtype: str = ""
) -> str:
    """Writes the safetensors shards, and their index if there are several; the dtype of the weights.

    They are cast to `dtype`, or kept as they are. Parameters are taken one by one, so that those which are read when
    they are asked for (`checkpoint.Leaf`) are never in memory together.
    """
    places = list(placed(params, config))
    dtypes = {dtype} if dtype else {np.dtype(leaf.dtype).name for _, leaf in places}
    if len(dtypes) != 1:
        raise ValueError(f"weights of several dtypes, {', '.join(sorted(dtypes))}; cast the parameters to one")
    kept = jnp.dtype(dtypes.pop())
    if kept not in DTYPES.values():
        known = ", ".join(sorted(known.name for known in DTYPES.values()))
        raise ValueError(f"weights of dtype {kept.name}, expected one of {known}")
    letters, shards, filled, total = sizes(config), [{}], 0, 0
    for place, _ in places:
        shape = their_shape(place.layout, letters)
        size = math.prod(shape) * kept.itemsize
        if filled and filled + size > shard_bytes:
            shards.append({})
            filled = 0
        shards[-1][place.name] = (kept, shape)
        filled, total = filled + size, total + size
    names = [f"model-{i + 1:05}-of-{len(shards):05}.safetensors" for i in range(len(shards))]
    if len(shards) == 1:
        names = ["model.safetensors"]
    arrays = _arrays(places, letters, kept)
    for file, shard in zip(names, shards, strict=True):
        write(folder / file, shard, itertools.islice(arrays, len(shard)))
    if len(shards) > 1:
        files = {name: file for file, shard in zip(names, shards, strict=True) for name in shard}
        write_json(folder / INDEX, {"metadata": {"total_size": total}, "weight_map": files})
    return kept.name


def read_weights(params: dict[str, Any], config: ModelConfig) -> None:
    """Read each parameter as `write_weights` does and write none: what the other processes of a run do meanwhile."""
    for _ in _arrays(list(placed(params, config)), sizes(config), None):
        pass


def placed(params: dict[str, Any], config: ModelConfig) -> Iterator[tuple[Place, Any]]:
    """Each published tensor's place and the parameter there, in the order of the table.

    Parameters of another model are refused.
    """
    letters = sizes(config)
    left: dict[str, Any] = dict(flatten_dict(params, sep="/"))
    wanted = {place.path: _whole_shape(place, letters) for place in published(config)}
    faults = [f"{path} has no published name" for path in sorted(left.keys() - wanted.keys())]
    faults += [f"{path} is missing, expected {wanted[path]}" for path in sorted(wanted.keys() - left.keys())]
    faults += [
        f"{path} has shape {left[path].shape}, expected {shape}"
        for path, shape in wanted.items()
        if path in left and left[path].shape != shape
    ]
    if faults:
        raise ValueError("the parameters are not those of this config: " + "; ".join(faults))
    for place in published(config):
        yield place, left[place.path]


def _arrays(places: Iterable[tuple[Place, Any]], letters: dict[str, int], dtype: Any) -> Iterator[np.ndarray]:
    """The published tensors; a stack of layers is fetched once."""
    held, array = "", np.zeros(0)
    for place, leaf in places:
        if place.path != held:
            array = np.zeros(0)  # gone before the next one comes
            held, array = place.path, np.asarray(leaf)
        if dtype is None:
            continue
        ours = array if place.layer is None else array[place.layer]
        yield np.ascontiguousarray(rearrange(ours, place.layout, letters, reverse=True)).astype(dtype, copy=False)


def _whole_shape(place: Place, letters: dict[str, int]) -> tuple[int, ...]:
    """Shape of the array of ours that the tensor is part of, its stacked layers included."""
    shape = our_shape(place.layout, letters)
    return shape if place.layers is None else (place.layers, *shape)


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
    """Puts a complete folder in its place; an older one goes only when the new one is there.

    Where that fails, the older one is back in its place and the new one is gone.
    """
    old = place.with_name(place.name + ".old")
    try:
        if place.exists():
            shutil.rmtree(old, ignore_errors=True)
            place.rename(old)
        complete.rename(place)
    except BaseException:
        if old.exists() and not place.exists():
            old.rename(place)
        shutil.rmtree(complete, ignore_errors=True)
        raise
    shutil.rmtree(old, ignore_errors=True)


SHARED = {  # what a tower and its image settings must agree on
    VisionConfig: (ImageSettings, ("patch_size", "merge_size", "temporal_patch_size")),
    ClipConfig: (TileSettings, ("tile", "patch_size", "pinpoints")),
}


def _check(
    config: ModelConfig, settings: ImageSettings | TileSettings | None, tokenizer_dir: Path, out_dir: Path
) -> None:
    faults = [f"{out_dir} is a file, expected a folder or nothing"] if out_dir.is_file() else []
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
