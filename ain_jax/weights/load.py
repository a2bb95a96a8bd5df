"""A Hugging Face folder -> config and parameters, with every name accounted for."""

import json
from collections import defaultdict
from pathlib import Path
from typing import Any

import ml_dtypes  # noqa: F401  (lets numpy, and so safetensors, read bfloat16)
import numpy as np
from safetensors import SafetensorError, safe_open

from ain_jax.models.config import ModelConfig, from_hf
from ain_jax.weights.table import canonical, published, rearrange, sizes, their_shape


def load_config(folder: str | Path) -> ModelConfig:
    """The config in the folder's `config.json`."""
    return from_hf(read_json(Path(folder) / "config.json"))


def load_folder(folder: str | Path, dtype: Any = None) -> tuple[dict[str, Any], ModelConfig]:
    """(params, config): numpy arrays in our tree, cast to `dtype`, or as stored where none is given.

    Raises one ValueError that lists every tensor that has no place, every place named twice or left empty, and every
    wrong shape.
    """
    folder = Path(folder)
    config = load_config(folder)
    return load_params(folder, config, dtype), config


def load_params(folder: str | Path, config: ModelConfig, dtype: Any = None) -> dict[str, Any]:
    """The parameters of a folder whose config is known."""
    folder, letters = Path(folder), sizes(config)
    places = {canonical(place.name): place for place in published(config)}
    stored = _stored(folder)
    faults = _faults(stored, places, letters, config.text.tied)
    if faults:
        raise ValueError(f"{folder}: {len(faults)} faults:\n  " + "\n  ".join(faults))

    params: dict[str, Any] = {}
    for path, tensors in _by_file(stored).items():
        with _open(path) as file:
            for name in tensors:
                if canonical(name) not in places:  # the copy of a tied head
                    _check_tied_copy(file.get_tensor(name), path, params)
                    continue
                place = places[canonical(name)]
                array = rearrange(file.get_tensor(name), place.layout, letters)
                _put(params, place.path, array.astype(dtype or array.dtype, copy=False), place.layer, place.layers)
    return params


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError(f"{path} is missing; expected a folder as transformers saves it") from None
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is no JSON: {error}") from error


def _stored(folder: Path) -> list[tuple[str, Path, tuple[int, ...]]]:
    """(name, file, shape) of every tensor of the folder."""
    index = folder / "model.safetensors.index.json"
    if index.exists():
        names = sorted(set(read_json(index)["weight_map"].values()))
        missing = [name for name in names if not (folder / name).exists()]
        if missing:
            raise ValueError(f"{folder}: {index.name} names {', '.join(missing)}, not found; download the folder again")
    else:
        names = sorted(path.name for path in folder.glob("*.safetensors"))
        if not names:
            raise ValueError(f"{folder} holds no *.safetensors; expected a folder as transformers saves it")
    stored = []
    for path in (folder / name for name in names):
        with _open(path) as file:
            names_here = file.keys()  # the file itself cannot be iterated
            stored += [(name, path, tuple(file.get_slice(name).get_shape())) for name in names_here]
    return stored


def _open(path: Path):
    try:
        return safe_open(path, framework="numpy")
    except SafetensorError as error:
        raise ValueError(f"{path} is truncated or damaged: {error}; download it again") from error


def _by_file(stored: list[tuple[str, Path, tuple[int, ...]]]) -> dict[Path, list[str]]:
    files = defaultdict(list)
    for name, path, _ in stored:
        files[path].append(name)
    # A tied head's copy is compared with the embedding, so it comes last.
    order = sorted(files, key=lambda path: any(canonical(name) == "lm_head.weight" for name in files[path]))
    return {path: sorted(files[path], key=lambda name: canonical(name) == "lm_head.weight") for path in order}


def _faults(stored, places, letters, tied: bool) -> list[str]:
    faults, filled = [], defaultdict(list)
    for name, path, shape in stored:
        place = canonical(name)
        if place not in places:
            if not (tied and place == "lm_head.weight"):
                faults.append(f"{path.name}: {name} {shape} has no place in this model")
            continue
        filled[place].append(f"{path.name}: {name}")
        expected = their_shape(places[place].layout, letters)
        if shape != expected:
            faults.append(f"{path.name}: {name} has shape {shape}, expected {expected}")
    faults += [f"{place} is given twice: {', '.join(names)}" for place, names in filled.items() if len(names) > 1]
    faults += [f"{place} is missing" for place in places if place not in filled]
    return faults


def _check_tied_copy(head_VD: np.ndarray, path: Path, params: dict[str, Any]) -> None:
    """Some tied checkpoints store the head as well: it must be the embedding, else it is not tied."""
    if not np.array_equal(head_VD, params["model"]["embed_tokens"]["weight"].astype(head_VD.dtype)):
        raise ValueError(f"{path}: lm_head.weight differs from the embedding, but config.json says tie_word_embeddings")


def _put(params: dict[str, Any], path: str, array: np.ndarray, layer: int | None, layers: int | None) -> None:
    *folders, leaf = path.split("/")
    for name in folders:
        params = params.setdefault(name, {})
    if layers is None:
        params[leaf] = np.ascontiguousarray(array)
        return
    if leaf not in params:
        params[leaf] = np.empty((layers, *array.shape), array.dtype)
    params[leaf][layer] = array
