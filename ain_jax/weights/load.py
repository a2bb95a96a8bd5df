"""A Hugging Face folder -> config and parameters, with every name accounted for.

Weights go tensor by tensor from the file to the devices: each process reads the slices that its devices hold, they are
turned as they are copied there, and cast and stacked there. The host holds one published tensor at a time, at most.
"""

import ctypes
import dataclasses
import gc
from collections import defaultdict
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from jax.sharding import NamedSharding, PartitionSpec

from ain_jax import sharding
from ain_jax.data.images import ImageSettings, image_settings
from ain_jax.data.tiles import TileSettings, tile_settings
from ain_jax.models.config import ClipConfig, ModelConfig, from_hf
from ain_jax.models.multimodal import abstract_params, axis_names
from ain_jax.weights.shards import DTYPES, Stored, read_json, stored
from ain_jax.weights.table import Place, canonical, groups, our_shape, published, rearrange, sizes, their_shape

COMPUTED = (".inv_freq", ".position_ids")  # buffers that older folders hold beside their weights; we compute them
HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"


def load_config(folder: str | Path) -> ModelConfig:
    """The config in the folder's `config.json`; ids that end an answer are those of `generation_config.json` too,
    where there is one: transformers decodes by that file."""
    folder = Path(folder)
    config, file = from_hf(read_json(folder / "config.json")), folder / "generation_config.json"
    ends = read_json(file).get("eos_token_id") if file.is_file() else None
    found = ends if isinstance(ends, list) else [] if ends is None else [ends]
    if not all(type(end) is int and 0 <= end < config.text.vocabulary for end in found):
        raise ValueError(f"{file}: eos_token_id={ends!r}; expected an id of the model's vocabulary, or a list of such")
    more = [end for end in found if end not in config.stop_ids]
    return dataclasses.replace(config, eos_token_id=(*config.stop_ids, *more)) if more else config


def load_image_settings(folder: str | Path, config: ModelConfig) -> ImageSettings | TileSettings:
    """How the folder's processor cuts pictures, from its `preprocessor_config.json`."""
    attributes = read_json(Path(folder) / "preprocessor_config.json")
    if isinstance(config.vision, ClipConfig):
        return tile_settings(attributes, config.vision.patch_size)
    return image_settings(attributes)


def load_folder(
    folder: str | Path, dtype: Any = None, mesh: jax.sharding.Mesh | None = None
) -> tuple[dict[str, Any], ModelConfig]:
    """(params, config) of a folder; see `load_params`."""
    config = load_config(folder)
    return load_params(folder, config, dtype, mesh), config


def load_params(
    folder: str | Path,
    config: ModelConfig,
    dtype: Any = None,
    mesh: jax.sharding.Mesh | None = None,
    part: str = "",
    beside: tuple[str, ...] = (),
) -> dict[str, Any]:
    """The parameters of a folder whose config is known, in our tree, laid over the mesh as `sharding.RULES` says.

    Cast to `dtype`, or as stored where none is given; on one device where no mesh is. Every process of the mesh calls
    this. With `part` they are those under that path alone, of a folder that holds no others of this model; tensors
    whose names begin with one of `beside` are not read. Raises one ValueError that lists every tensor that has no
    place, every place named twice or left empty, and every wrong shape.
    """
    folder, letters = Path(folder), sizes(config)
    places = {canonical(place.name): place for place in published(config) if place.path.startswith(part)}
    tensors = [t for t in stored(folder) if not t.name.startswith(beside) and not t.name.endswith(COMPUTED)]
    faults = _faults(tensors, places, letters, config.text.tied, cast=dtype is not None)
    if faults:
        raise ValueError(f"{folder}: {len(faults)} faults:\n  " + "\n  ".join(faults))
    if not part:
        _check_tied_copy(tensors, config.text.tied)

    mesh = mesh or sharding.one_device()
    layout = sharding.layout(axis_names(config), abstract_params(config), mesh)
    leaves: dict[str, Any] = dict(flatten_dict(layout, sep="/"))
    params: dict[str, Any] = {}
    for tensor in tensors:
        place = places.get(canonical(tensor.name))
        if place is None:  # the copy of a tied head
            continue
        where, kept = leaves[place.path].sharding, jnp.dtype(dtype or tensor.dtype)
        if place.layer is None:
            piece = _on_devices(tensor, place.layout, letters, where)
            params[place.path] = piece if piece.dtype == kept else _cast(piece, kept)
        else:
            piece = _on_devices(tensor, place.layout, letters, NamedSharding(mesh, PartitionSpec(*where.spec[1:])))
            if place.path not in params:
                params[place.path] = _empty(leaves[place.path].shape, kept, where)
            params[place.path] = _put(params[place.path], piece, jnp.int32(place.layer))
        # Else the host would read on and pile up what the devices have not taken yet.
        jax.block_until_ready(params[place.path])
        del piece
        _give_back()
    return unflatten_dict(params, sep="/")


def _give_back() -> None:
    """Hand what is no longer used to the system, so that the host holds a tensor and not the sum of many.

    The buffers that a device has copied, or shares and has let go of, are freed when Python next collects, and by
    itself it may do that after many tensors. Where the devices are a CPU, the C library keeps the pieces that were
    turned and stacked there.
    """
    gc.collect(0)
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc has it
    if trim is not None:
        trim(0)


def _on_devices(tensor: Stored, layout: str, letters: dict[str, int], where: NamedSharding) -> jax.Array:
    """The tensor in our layout; a slice that several devices of this process hold is read once."""
    slices: dict[str, np.ndarray] = {}

    def read(index):
        if str(index) not in slices:
            slices[str(index)] = read_slice(tensor, layout, letters, index)
        return slices[str(index)]

    return jax.make_array_from_callback(our_shape(layout, letters), where, read)


def read_slice(tensor: Stored, layout: str, letters: Mapping[str, int], index: tuple[slice, ...]) -> np.ndarray:
    """A slice of ours, a view of the bytes read: turning it is left to the copy to the device, which does it quicker.

    Joined axes are read as the axes that they join: of "(N H) D -> D N H" any heads and any part of each.
    """
    theirs, ours = groups(layout)
    kept = {letter: slice(0, letters[letter]) for axis in theirs for letter in axis}
    cut = [(axis[0], part) for axis, part in zip(ours, index, strict=True) if len(axis) == 1]
    kept |= {letter: slice(*part.indices(letters[letter])) for letter, part in cut}
    apart = dataclasses.replace(tensor, shape=tuple(letters[letter] for letter in kept))
    sizes = {letter: part.stop - part.start for letter, part in kept.items()}
    return rearrange(apart.read(tuple(kept.values())), layout, sizes)


@partial(jax.jit, static_argnums=1)
def _cast(piece, dtype):
    return piece.astype(dtype)


@partial(jax.jit, static_argnums=(0, 1, 2))
def _empty(shape, dtype, where):
    return jax.lax.with_sharding_constraint(jnp.zeros(shape, dtype), where)


@partial(jax.jit, donate_argnums=0)
def _put(stack, piece, layer):
    """The stack with one layer more."""
    update = partial(jax.lax.dynamic_update_index_in_dim, index=layer, axis=0)
    if stack.dtype == piece.dtype == jnp.bfloat16:
        # As bits: a CPU's compiler takes bfloat16 through float32, all layers of the stack.
        bits = partial(jax.lax.bitcast_convert_type, new_dtype=jnp.uint16)
        return jax.lax.bitcast_convert_type(update(bits(stack), bits(piece)), jnp.bfloat16)
    return update(stack, piece.astype(stack.dtype))


def _faults(
    tensors: Sequence[Stored], places: Mapping[str, Place], letters: dict[str, int], tied: bool, cast: bool
) -> list[str]:
    faults, filled, kinds = [], defaultdict(list), {}
    for tensor in tensors:
        place, here = canonical(tensor.name), f"{tensor.path.name}: {tensor.name}"
        if tensor.kind not in DTYPES:
            faults.append(f"{here} has dtype {tensor.kind}, expected {', '.join(DTYPES)}: not quantised")
        if place not in places:
            if not (tied and place == HEAD):
                faults.append(f"{here} {tensor.shape} has no place in this model")
            continue
        filled[place].append(here)
        first = kinds.setdefault(places[place].path, tensor.kind)
        if tensor.kind != first and not cast:
            faults.append(f"{here} has dtype {tensor.kind}, expected {first} as other layers: load it with a dtype")
        expected = their_shape(places[place].layout, letters)
        if tensor.shape != expected:
            faults.append(f"{here} has shape {tensor.shape}, expected {expected}")
    faults += [f"{place} is given twice: {', '.join(names)}" for place, names in filled.items() if len(names) > 1]
    missing = {name: place for name, place in places.items() if name not in filled}
    faults += [f"{name} is missing, expected {their_shape(p.layout, letters)}" for name, p in missing.items()]
    return faults


def _check_tied_copy(tensors: Sequence[Stored], tied: bool) -> None:
    """Some tied checkpoints store the head as well: it must be the embedding, else it is not tied."""
    found = {canonical(tensor.name): tensor for tensor in tensors}
    if not tied or HEAD not in found:
        return
    head, table = found[HEAD], found[EMBEDDING]
    if head.shape != table.shape or any(
        not np.array_equal(a.astype(b.dtype), b) for a, b in zip(table.blocks(), head.blocks(), strict=True)
    ):
        raise ValueError(
            f"{head.path}: {head.name} differs from the embedding, but config.json says tie_word_embeddings"
        )
