"""Attention in plain XLA: what every backend must equal, on any device. No L x S array is held for long rows."""

import functools
import itertools
from typing import Any

import jax
import jax.numpy as jnp

from ain_jax.models.attention_rules import Call, Run, promised

Array = jax.Array
PARTS, SHORTEST_PART = 4, 128  # of a row whose queries see no later key


def refusal(call: Call) -> None:
    """Nothing is refused."""
    del call


def prepare(call: Call) -> Run:
    """Three ways to the same numbers:

    - rows up to `chunk` long are taken at once, or where no query sees a later key in four parts, each with the keys up
      to its end: less than two thirds of the products;
    - `longest` promises that no segment has more positions, so that each block of `longest` queries needs its own and
      the neighbouring keys only; a window is as good;
    - else queries are taken `chunk` at a time and computed again in the backward pass: chunk x S scores are held, not
      L x S.
    """
    return Run((), lambda mesh, positions: (), call.L, functools.partial(_run, call))


def _run(call: Call, _, q_BLNH, k_BSKH, v_BSKH, segments_BL, key_segments_BS, first):
    rules, L = call.rules, q_BLNH.shape[1]
    attend = functools.partial(_attend, scale=rules.scale, softcap=rules.softcap)
    band = call.band
    if call.own_row and call.parts == 1 and band is not None and 2 * band < L and band <= rules.chunk:
        out_BLNH = _banded(attend, q_BLNH, k_BSKH, v_BSKH, segments_BL, rules.causal, band, rules.window)
        return out_BLNH if rules.longest is None else promised(out_BLNH, key_segments_BS, rules.longest)
    if rules.chunk < L:
        return _chunked(attend, q_BLNH, k_BSKH, v_BSKH, segments_BL, key_segments_BS, rules, first)
    several = call.own_row and call.parts == 1 and rules.causal
    cuts = [part * L // PARTS for part in range(PARTS + 1)] if several and L >= PARTS * SHORTEST_PART else [0, L]
    parts = []
    for begin, end in itertools.pairwise(cuts):
        keys = slice(end if several else None)
        seen_BLS = seen(segments_BL[:, begin:end], key_segments_BS[:, keys], rules.causal, rules.window, first + begin)
        parts.append(attend(q_BLNH[:, begin:end], k_BSKH[:, keys], v_BSKH[:, keys], seen_BLS))
    return parts[0] if len(parts) == 1 else jnp.concatenate(parts, axis=1)


@jax.custom_jvp
def _softmax(x):
    """Over the last axis. `jax.nn.softmax` is derived through its exponentials, with twice the passes backwards."""
    weights = jnp.exp(x - jnp.max(x, axis=-1, keepdims=True))
    return weights / jnp.sum(weights, axis=-1, keepdims=True)


@_softmax.defjvp
def _(given, by_given):
    weights, (by_x,) = _softmax(*given), by_given
    return weights, weights * (by_x - jnp.sum(weights * by_x, axis=-1, keepdims=True))


def _attend(q_BLNH, k_BSKH, v_BSKH, seen_BLS, scale: float, softcap: float | None):
    """The attention itself, on whatever block of queries and keys."""
    B, L, N, H = q_BLNH.shape
    K = k_BSKH.shape[2]
    # Heads before positions: the products below are then plain batched matrix products, twice as fast on a CPU.
    q_BKgH = jnp.swapaxes(q_BLNH * scale, 1, 2).reshape(B, K, N // K * L, H)  # g: the G queries of a key head, L each
    k_BKSH, v_BKSH = jnp.swapaxes(k_BSKH, 1, 2), jnp.swapaxes(v_BSKH, 1, 2)
    scores_BKgS = jnp.einsum("BKgH,BKSH->BKgS", q_BKgH, k_BKSH, preferred_element_type=jnp.float32)
    if softcap is not None:
        scores_BKgS = softcap * jnp.tanh(scores_BKgS / softcap)
    scores_BKGLS = jnp.where(seen_BLS[:, None, None], scores_BKgS.reshape(B, K, N // K, L, -1), -1e30)
    weights_BKgS = _softmax(scores_BKGLS).astype(v_BSKH.dtype).reshape(scores_BKgS.shape)
    out_BKgH = jnp.einsum("BKgS,BKSH->BKgH", weights_BKgS, v_BKSH)
    return jnp.swapaxes(out_BKgH.reshape(B, N, L, H), 1, 2)


def seen(segments_BL, key_segments_BS, causal: bool, window: int | None = None, shift: Any = 0) -> Array:
    """Whether a query sees a key; query i lies at position i + shift of the keys' row."""
    seen_BLS = segments_BL[:, :, None] == key_segments_BS[:, None, :]
    if causal:
        query_L, key_S = (jnp.arange(x.shape[1], dtype=jnp.int32) for x in (segments_BL, key_segments_BS))
        back_LS = (query_L + shift)[:, None] - key_S[None, :]
        seen_BLS &= ((back_LS >= 0) & (back_LS < (window or 2**30)))[None]
    return seen_BLS


def _chunked(attend, q_BLNH, k_BSKH, v_BSKH, segments_BL, key_segments_BS, rules, first):
    (B, L, N, H), chunk = q_BLNH.shape, rules.chunk
    q_BLNH, segments_BL = _padded(q_BLNH, -L % chunk), _padded(segments_BL, -L % chunk)
    chunks = q_BLNH.shape[1] // chunk

    @functools.partial(jax.checkpoint, prevent_cse=False)
    def one(shift, q_BcNH, segments_Bc):
        seen_BcS = seen(segments_Bc, key_segments_BS, rules.causal, rules.window, shift)
        return attend(q_BcNH, k_BSKH, v_BSKH, seen_BcS)

    q_xBcNH = jnp.moveaxis(q_BLNH.reshape(B, chunks, chunk, N, H), 1, 0)
    segments_xBc = jnp.moveaxis(segments_BL.reshape(B, chunks, chunk), 1, 0)
    first_x = first + jnp.arange(chunks, dtype=jnp.int32) * chunk
    out_xBcNH = jax.lax.map(lambda xs: one(*xs), (first_x, q_xBcNH, segments_xBc))
    return jnp.moveaxis(out_xBcNH, 0, 1).reshape(B, chunks * chunk, N, H)[:, :L]


def _banded(attend, q_BLNH, k_BSKH, v_BSKH, segments_BL, causal: bool, band: int, window):
    """Blocks of `band` queries against the blocks before, of and (unless causal) after them."""
    B, L, N, H = q_BLNH.shape
    q, k, v = (_padded(x, -L % band) for x in (q_BLNH, k_BSKH, v_BSKH))
    segments = _padded(segments_BL, -L % band)

    def blocks(x):
        return x.reshape(B, -1, band, *x.shape[2:])

    def near(x):
        x = blocks(x)
        empty = jnp.zeros_like(x[:, :1])
        sides = [jnp.concatenate([empty, x[:, :-1]], axis=1), x]
        return jnp.concatenate(sides if causal else [*sides, jnp.concatenate([x[:, 1:], empty], axis=1)], axis=2)

    def rows(x):
        return x.reshape(-1, *x.shape[2:])

    seen_BLS = seen(rows(blocks(segments)), rows(near(segments)), causal, window, shift=band)
    return attend(rows(blocks(q)), rows(near(k)), rows(near(v)), seen_BLS).reshape(B, -1, N, H)[:, :L]


def _padded(x, count: int):
    return jnp.pad(x, ((0, 0), (0, count)) + ((0, 0),) * (x.ndim - 2))
