"""Log-probabilities of targets without their logits: the vocabulary is read block by block, forwards and backwards.

A block's logits are made, added to a running logsumexp and forgotten; the backward pass makes them again. What is held
is positions x block, whatever the size of the vocabulary, and the gradient of the table is written once, block by
block. On a mesh each device has its positions and its part of the vocabulary; a table that is cut along its width is
gathered block by block too, and its gradient is summed and cut block by block.
"""

import dataclasses
import functools
import math
import operator
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from ain_jax import sharding

LANES = 128  # blocks are multiples of it


@dataclasses.dataclass(frozen=True)
class Layout:
    """How the call lies on the mesh (names of mesh axes), and how much of it is done at once."""

    cap: float | None  # soft cap of the logits
    block: int  # rows of a device's vocabulary that are taken at once
    rows: tuple[str, ...] = ()
    positions: tuple[str, ...] = ()
    vocabulary: tuple[str, ...] = ()
    width: tuple[str, ...] = ()  # along which the first table is cut

    @property
    def summed(self) -> tuple[str, ...]:
        return self.rows + self.positions

    def specs(self, pairs: int) -> tuple[Any, Any, Any]:
        """Of the y, of the tables, and of arrays of one number a position."""
        place = PartitionSpec(self.rows or None, self.positions or None)
        table = PartitionSpec(self.vocabulary or None, self.width or None)
        return (place,) * pairs, (table, *[PartitionSpec(self.vocabulary or None)] * (pairs - 1)), place


def log_probs(pairs: Any, targets_BC: Any, cap: float | None, held: int) -> tuple[Any, Any, Any]:
    """Three (B, C) arrays: log-probability in nats of each target, whether no other is likelier, and the mean
    log-probability of the whole vocabulary.

    Logits are cap(sum of y_BCD @ w_VD.T over `pairs`), the products summed in float32. At most about `held` of them
    are held at once on a device.
    """
    ys, ws = tuple(y for y, _ in pairs), tuple(w for _, w in pairs)
    (B, C), (V, D) = targets_BC.shape, ws[0].shape
    over = sharding.spread(rows=B, positions=C, vocab=V, embed=D)
    width = tuple(over["embed"]) if set(over["embed"]) <= {*over["rows"], *over["positions"]} else ()
    here = lambda size, axis: size // math.prod(over[axis].values())
    block = held // (here(B, "rows") * here(C, "positions")) // LANES * LANES
    block = min(max(block, LANES), here(V, "vocab"))
    layout = Layout(cap, block, tuple(over["rows"]), tuple(over["positions"]), tuple(over["vocab"]), width)
    results: Any = _scores(layout, ys, ws, targets_BC)
    chosen_BC, norm_BC, largest_BC, total_BC = results
    return chosen_BC - norm_BC, chosen_BC >= largest_BC, total_BC / V - norm_BC


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _scores(layout: Layout, ys, ws, targets_BC):
    """Of each position: the target's logit, the logsumexp, the largest logit and their sum."""
    return _forward(layout, ys, ws, targets_BC)[0]


def _forward(layout: Layout, ys, ws, targets_BC):
    def one_device(ys, ws, targets_BC):
        first, last = _places(layout, ws)

        def add(kept, i):
            largest_BC, exp_BC, chosen_BC, total_BC = kept
            start, ids_V, new_V = _block(layout, i, first, last)
            logits_BCV, _ = _logits(layout, ys, _tables(layout, ys, ws, start))
            seen_BCV = jnp.where(new_V[None, None], logits_BCV, -jnp.inf)
            next_BC = jnp.maximum(largest_BC, seen_BCV.max(axis=-1))
            exp_BC = exp_BC * jnp.exp(largest_BC - next_BC) + jnp.exp(seen_BCV - next_BC[..., None]).sum(axis=-1)
            hit_BCV = (ids_V[None, None] == targets_BC[..., None]) & new_V[None, None]
            chosen_BC = chosen_BC + jnp.where(hit_BCV, logits_BCV, 0.0).sum(axis=-1)
            total_BC = total_BC + jnp.where(new_V[None, None], logits_BCV, 0.0).sum(axis=-1)
            return (next_BC, exp_BC, chosen_BC, total_BC), None

        zero_BC = jnp.zeros(targets_BC.shape, jnp.float32)
        begin = (zero_BC - jnp.inf, zero_BC, zero_BC, zero_BC)
        (largest_BC, exp_BC, chosen_BC, total_BC), _ = jax.lax.scan(add, begin, _blocks(layout, ws))
        if layout.vocabulary:
            most_BC = jax.lax.pmax(largest_BC, layout.vocabulary)
            exp_BC, largest_BC = exp_BC * jnp.exp(largest_BC - most_BC), most_BC
            exp_BC, chosen_BC, total_BC = (jax.lax.psum(x, layout.vocabulary) for x in (exp_BC, chosen_BC, total_BC))
        return chosen_BC, largest_BC + jnp.log(exp_BC), largest_BC, total_BC

    of_ys, of_ws, place = layout.specs(len(ys))
    results = _on_devices(layout, one_device, (of_ys, of_ws, place), (place,) * 4)(ys, ws, targets_BC)
    return results, (ys, ws, targets_BC, results[1])


def _backward(layout: Layout, kept, gradients):
    ys, ws, targets_BC, norm_BC = kept
    chosen_BC, by_norm_BC, _, total_BC = gradients  # the largest logit is compared with alone

    def one_device(ys, ws, targets_BC, norm_BC, chosen_BC, by_norm_BC, total_BC):
        first, last = _places(layout, ws)

        def add(kept, i):
            by_ys, by_ws = kept
            start, ids_V, new_V = _block(layout, i, first, last)
            tables = _tables(layout, ys, ws, start)
            logits_BCV, slope_BCV = _logits(layout, ys, tables)
            by_BCV = by_norm_BC[..., None] * jnp.exp(logits_BCV - norm_BC[..., None]) + total_BC[..., None]
            by_BCV = by_BCV + jnp.where(ids_V[None, None] == targets_BC[..., None], chosen_BC[..., None], 0.0)
            by_BCV = jnp.where(new_V[None, None], by_BCV, 0.0)
            by_BCV = (by_BCV if slope_BCV is None else by_BCV * slope_BCV).astype(ys[0].dtype)
            product = functools.partial(jnp.einsum, preferred_element_type=jnp.float32)
            by_ys = tuple(by + product("BCV,VD->BCD", by_BCV, w) for by, w in zip(by_ys, tables, strict=True))
            by_block = [_summed(layout, n, product("BCV,BCD->VD", by_BCV, y)) for n, y in enumerate(ys)]
            return (by_ys, tuple(map(functools.partial(_written, start), by_ws, by_block))), None

        begin = (tuple(jnp.zeros(y.shape, jnp.float32) for y in ys), tuple(map(jnp.zeros_like, ws)))
        (by_ys, by_ws), _ = jax.lax.scan(add, begin, _blocks(layout, ws))
        if layout.vocabulary:
            by_ys = tuple(jax.lax.psum(by, layout.vocabulary) for by in by_ys)
        return tuple(by.astype(y.dtype) for by, y in zip(by_ys, ys, strict=True)), by_ws

    of_ys, of_ws, place = layout.specs(len(ys))
    spread = _on_devices(layout, one_device, (of_ys, of_ws, *[place] * 5), (of_ys, of_ws))
    by_ys, by_ws = spread(ys, ws, targets_BC, norm_BC, chosen_BC, by_norm_BC, total_BC)
    return by_ys, by_ws, None


_scores.defvjp(_forward, _backward)


def _on_devices(layout: Layout, one_device, in_specs, out_specs):
    if not (layout.summed or layout.vocabulary):
        return one_device
    return jax.shard_map(one_device, in_specs=in_specs, out_specs=out_specs, check_vma=False)


def _places(layout: Layout, ws) -> tuple[Any, int]:
    """The id of this device's first row of the table, and the place where its last block begins."""
    rows = ws[0].shape[0]
    first = jax.lax.axis_index(layout.vocabulary) * rows if layout.vocabulary else 0
    return first, rows - layout.block


def _blocks(layout: Layout, ws):
    return jnp.arange(-(-ws[0].shape[0] // layout.block), dtype=jnp.int32)


def _block(layout: Layout, i, first, last: int):
    """Where block i begins in this device's table, the ids of its rows, and whether they are new.

    The last block begins earlier where the rows are no multiple of blocks, and what it repeats is not new.
    """
    start = jnp.minimum(i * layout.block, last)
    place_V = start + jnp.arange(layout.block, dtype=jnp.int32)
    return start, first + place_V, place_V >= i * layout.block


def _tables(layout: Layout, ys, ws, start):
    """The rows of one block, in the dtype that is computed with, whole along their width."""
    cut = lambda w: jax.lax.dynamic_slice_in_dim(w, start, layout.block).astype(ys[0].dtype)
    first, *rest = map(cut, ws)
    if layout.width:
        first = jax.lax.all_gather(first, layout.width, axis=1, tiled=True)
    return (first, *rest)


def _logits(layout: Layout, ys, tables):
    """The logits of a block, and how they grow with what is capped (None without a cap)."""
    product = functools.partial(jnp.einsum, "BCD,VD->BCV", preferred_element_type=jnp.float32)
    logits_BCV = functools.reduce(operator.add, map(product, ys, tables))
    if layout.cap is None:
        return logits_BCV, None
    bent_BCV = jnp.tanh(logits_BCV / layout.cap)
    return layout.cap * bent_BCV, 1 - bent_BCV**2


def _summed(layout: Layout, which: int, by_VD):
    """The gradient of a block over the positions of all devices, cut as its table is."""
    cut = layout.width if which == 0 else ()
    whole = tuple(name for name in layout.summed if name not in cut)
    if cut:
        by_VD = jax.lax.psum_scatter(by_VD, cut, scatter_dimension=1, tiled=True)
    return jax.lax.psum(by_VD, whole) if whole else by_VD


def _written(start, table_VD, block_VD):
    """What the last block repeats is 0 there, and is added to what stands."""
    before = jax.lax.dynamic_slice_in_dim(table_VD, start, block_VD.shape[0])
    return jax.lax.dynamic_update_slice_in_dim(table_VD, before + block_VD.astype(table_VD.dtype), start, 0)
