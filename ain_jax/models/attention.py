"""One attention for every tower: exact on packed rows, grouped heads, no L x S array for long rows."""

import functools

import jax
import jax.numpy as jnp

Array = jax.Array

QUERY_CHUNK = 1024  # rows up to this length are taken at once


def attention(
    q_BLNH,
    k_BSKH,
    v_BSKH,
    segments_BL,
    key_segments_BS=None,
    *,
    causal: bool,
    longest: int | None = None,
    window: int | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    chunk: int = QUERY_CHUNK,
) -> Array:
    """out_BLNH: each query's mean of the values of its own segment, weighted by softmax(scale q k) in float32.

    Positions of one segment see each other and nothing else; with `causal`, none that comes later in the row, and with
    `window` besides no more than the last `window` ones, their own included. `scale` is 1 / sqrt(H) where none is
    given; `softcap` bends scores to softcap tanh(score / softcap). Without `key_segments_BS` queries and keys are the
    same positions.

    segments 1 1 2 2 0     causal    1 . . . .
                                     1 1 . . .
                                     . . 1 . .
                                     . . 1 1 .
                                     . . . . 1    padding (0) sees padding alone: finite, and read by nobody

    Three ways to the same numbers:
    - rows up to `chunk` long are taken at once;
    - `longest` promises that no segment has more positions, so that each block of `longest` queries needs its own and
      the neighbouring keys only; a window is as good. A promise that is broken gives NaN, never a picture cut in two;
    - else queries are taken `chunk` at a time and computed again in the backward pass: chunk x S scores are held, not
      L x S.
    No backend that ignores segments stands behind this function.
    """
    L, H = q_BLNH.shape[1], q_BLNH.shape[-1]
    attend = functools.partial(_attend, scale=H**-0.5 if scale is None else scale, softcap=softcap)
    if window is not None and not (causal and key_segments_BS is None):
        raise ValueError("a window counts back from a query in its own row; with keys of another row mask them there")
    if key_segments_BS is None:
        band = min(reach for reach in (longest, window, L) if reach is not None)
        if 2 * band < L and band <= chunk:
            out_BLNH = _banded(attend, q_BLNH, k_BSKH, v_BSKH, segments_BL, causal, band, window)
            return out_BLNH if longest is None else _promised(out_BLNH, segments_BL, longest)
        key_segments_BS = segments_BL
    elif causal or longest is not None:
        raise ValueError("causal and longest speak of one row; with keys of another row give neither")
    if chunk < L:
        return _chunked(attend, q_BLNH, k_BSKH, v_BSKH, segments_BL, key_segments_BS, causal, window, chunk)
    return attend(q_BLNH, k_BSKH, v_BSKH, _seen(segments_BL, key_segments_BS, causal, window))


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
    weights_BKgS = jax.nn.softmax(scores_BKGLS, axis=-1).astype(v_BSKH.dtype).reshape(scores_BKgS.shape)
    out_BKgH = jnp.einsum("BKgS,BKSH->BKgH", weights_BKgS, v_BKSH)
    return jnp.swapaxes(out_BKgH.reshape(B, N, L, H), 1, 2)


def _seen(segments_BL, key_segments_BS, causal: bool, window: int | None = None, shift=0):
    """Whether a query sees a key; query i lies at position i + shift of the keys' row."""
    seen_BLS = segments_BL[:, :, None] == key_segments_BS[:, None, :]
    if causal:
        query_L, key_S = (jnp.arange(x.shape[1], dtype=jnp.int32) for x in (segments_BL, key_segments_BS))
        back_LS = (query_L + shift)[:, None] - key_S[None, :]
        seen_BLS &= ((back_LS >= 0) & (back_LS < (window or 2**30)))[None]
    return seen_BLS


def _chunked(attend, q_BLNH, k_BSKH, v_BSKH, segments_BL, key_segments_BS, causal: bool, window, chunk: int):
    B, L, N, H = q_BLNH.shape
    q_BLNH, segments_BL = _padded(q_BLNH, -L % chunk), _padded(segments_BL, -L % chunk)
    chunks = q_BLNH.shape[1] // chunk

    @functools.partial(jax.checkpoint, prevent_cse=False)
    def one(first, q_BcNH, segments_Bc):
        return attend(q_BcNH, k_BSKH, v_BSKH, _seen(segments_Bc, key_segments_BS, causal, window, first))

    q_xBcNH = jnp.moveaxis(q_BLNH.reshape(B, chunks, chunk, N, H), 1, 0)
    segments_xBc = jnp.moveaxis(segments_BL.reshape(B, chunks, chunk), 1, 0)
    first_x = jnp.arange(chunks, dtype=jnp.int32) * chunk
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

    seen = _seen(rows(blocks(segments)), rows(near(segments)), causal, window, shift=band)
    return attend(rows(blocks(q)), rows(near(k)), rows(near(v)), seen).reshape(B, -1, N, H)[:, :L]


def _promised(out_BLNH, segments_BL, longest: int):
    """`out_BLNH`, or NaN in rows where a segment is longer than was promised."""
    too_long_B = jnp.any(
        (segments_BL[:, longest:] == segments_BL[:, :-longest]) & (segments_BL[:, longest:] > 0), axis=1
    )
    return jnp.where(too_long_B[:, None, None, None], jnp.nan, out_BLNH)


def _padded(x, count: int):
    return jnp.pad(x, ((0, 0), (0, count)) + ((0, 0),) * (x.ndim - 2))
