"""Attention on GPUs, exact for packed rows: cuDNN's fused kernel by segment offsets, tokamax's by key ranges.

Both are reached through functions that are not public (`jax._src.cudnn`, `tokamax._src`), and no test machine of ours
has a GPU. So each is tried once per process on a small packed row, forwards and backwards, against `attention_xla`,
and refused where it is missing, raises or differs: then the next backend is taken, or the user is told why.
"""

import concurrent.futures
import dataclasses
import functools
import importlib
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ain_jax.models import attention_xla
from ain_jax.models.attention_rules import Call, Rules, Run, promised

SEGMENTS = 64  # of a row, padding included, that cuDNN is asked to hold; a batch with more goes through XLA
TOLERANCE = 0.03  # of the largest value: bfloat16 has 8 bits, and the sums run in another order
NO_GPU = "no GPU is here"


@dataclasses.dataclass(frozen=True)
class Gpu:
    """A kernel behind the same two functions as every backend: `refusal` and `prepare`."""

    name: str
    attend: Callable[..., Any]  # (call, the arrays and the place that `Run.apply` is given) -> out_BLNH
    limits: Callable[[Call], str | None]

    def refusal(self, call: Call) -> str | None:
        """Why this kernel cannot take the call on this machine, or None."""
        if call.platform not in (None, "gpu", "cuda"):
            return f"{self.name} is a GPU kernel, and the mesh's devices are of platform {call.platform!r}"
        if not call.own_row:
            return f"{self.name} is used for rows that attend to themselves, not for keys of another row"
        if call.N % call.K:
            return f"{call.N} query heads are no multiple of {call.K} key heads"
        limit = self.limits(call)
        if limit is not None:
            return limit
        if jax.default_backend() not in ("gpu", "cuda"):
            return NO_GPU
        small = Rules(call.rules.causal, call.H**-0.5, window=call.rules.window and 40, softcap=call.rules.softcap)
        return _failure(self, Call(small, 2, 256, 256, 4, 4 if call.N == call.K else 2, call.H, call.dtype))

    def prepare(self, call: Call) -> Run:
        return Run((), lambda mesh, positions: (), call.L, functools.partial(_run, self, call))


def _run(gpu: Gpu, call: Call, _, q_BLNH, k_BSKH, v_BSKH, segments_BL, key_segments_BS, first):
    out_BLNH = gpu.attend(call, q_BLNH, k_BSKH, v_BSKH, segments_BL, key_segments_BS, first)
    # Both kernels know a segment by where it begins and ends, so its positions must lie side by side.
    out_BLNH = jnp.where(_apart(key_segments_BS)[:, None, None, None], jnp.nan, out_BLNH)
    longest = call.rules.longest
    return out_BLNH if longest is None else promised(out_BLNH, key_segments_BS, longest)


def runs(segments_BS) -> tuple[Any, Any, Any]:
    """(number_BS, begin_BS, end_BS) of the stretch of equal segments that each position lies in; `end` is exclusive.

    segments 1 1 2 2 2 0 0    number 0 0 1 1 1 2 2    begin 0 0 2 2 2 5 5    end 2 2 5 5 5 7 7
    """
    S = segments_BS.shape[1]
    place_1S = jnp.arange(S, dtype=jnp.int32)[None]
    new_BS = jnp.pad(segments_BS[:, 1:] != segments_BS[:, :-1], ((0, 0), (1, 0)), constant_values=True)
    last_BS = jnp.pad(new_BS[:, 1:], ((0, 0), (0, 1)), constant_values=True)
    number_BS = jnp.cumsum(new_BS, axis=1, dtype=jnp.int32) - 1
    begin_BS = jax.lax.cummax(jnp.where(new_BS, place_1S, 0), axis=1)
    end_BS = jax.lax.cummin(jnp.where(last_BS, place_1S + 1, S), axis=1, reverse=True)
    return number_BS, begin_BS, end_BS


def _apart(segments_BS):
    """(B,) whether a segment may lie in two places: ids that ascend along the row, as ours do, cannot."""
    highest_BS = jax.lax.cummax(segments_BS, axis=1)
    return jnp.any((segments_BS > 0) & (segments_BS < highest_BS), axis=1)


def offsets(segments_BS, most: int) -> tuple[Any, Any]:
    """(length_BM, begin_BM1) of the stretches of equal segments, -1 where there are no more; the first `most` of them.

    segments 1 1 2 2 2 0 0, most 4    length 2 3 2 -1    begin 0 2 5 -1 -1
    """
    number_BS, begin_BS, _ = runs(segments_BS)
    by_run = functools.partial(jax.ops.segment_sum, num_segments=most)
    length_BM = jax.vmap(lambda n: by_run(jnp.ones_like(n), n))(number_BS)
    first = functools.partial(jax.ops.segment_max, num_segments=most)
    begin_BM = jax.vmap(first)(begin_BS, number_BS)
    there_BM = length_BM > 0
    begin_BM1 = jnp.pad(jnp.where(there_BM, begin_BM, -1), ((0, 0), (0, 1)), constant_values=-1)
    return jnp.where(there_BM, length_BM, -1), begin_BM1


def _cudnn_limits(call: Call) -> str | None:
    if call.rules.softcap is not None:
        return "cuDNN's fused kernel has no soft cap"
    if call.dtype not in (jnp.bfloat16, jnp.float16):
        return f"values are {jnp.dtype(call.dtype).name}; cuDNN takes bfloat16 and float16: set Model.dtype"
    if call.H > 256 or call.H % 8:
        return f"heads are {call.H} wide; cuDNN takes multiples of 8 up to 256"
    if call.parts > 1:
        return "a row's queries are spread over devices, and cuDNN counts queries from the row's begin"
    return None


def _cudnn(call: Call, q_BLNH, k_BSKH, v_BSKH, segments_BL, key_segments_BS, first):
    rules, most = call.rules, min(SEGMENTS, call.L)
    packed = functools.partial(cudnn_packed, rules, most)
    if most == call.L:
        return packed(q_BLNH, k_BSKH, v_BSKH, key_segments_BS)
    whole = attention_xla.prepare(dataclasses.replace(call, rules=dataclasses.replace(rules, longest=None))).apply
    too_many = jnp.max(runs(key_segments_BS)[0]) >= most
    return jax.lax.cond(
        too_many,
        lambda q, k, v: whole((), q, k, v, segments_BL, key_segments_BS, first),
        lambda q, k, v: packed(q, k, v, key_segments_BS),
        *(q_BLNH, k_BSKH, v_BSKH),
    )


def cudnn_packed(rules: Rules, most: int, q_BLNH, k_BSKH, v_BSKH, segments_BS):
    """cuDNN's kernel on rows of at most `most` stretches of equal segments, padding among them."""
    cudnn = importlib.import_module("jax._src.cudnn.fused_attention_stablehlo")
    # jax turns offsets into places in memory by the number of query heads, of keys and values as well: fewer key
    # heads would be read from the wrong place.
    copies = q_BLNH.shape[2] // k_BSKH.shape[2]
    k_BSNH, v_BSNH = (jnp.repeat(x, copies, axis=2) if copies > 1 else x for x in (k_BSKH, v_BSKH))
    length_BM, begin_BM1 = offsets(segments_BS, most)
    return cudnn.dot_product_attention(
        q_BLNH,
        k_BSNH,
        v_BSNH,
        q_seqlen=length_BM,
        kv_seqlen=length_BM,
        q_offsets=begin_BM1,
        kv_offsets=begin_BM1,
        scale=rules.scale,
        mask_type=cudnn.MaskType.CAUSAL if rules.causal else cudnn.MaskType.NO_MASK,
        sliding_window_length=rules.window,
    )


def _tokamax_limits(call: Call) -> str | None:
    if call.rules.softcap is not None:
        return "tokamax has no gradient of a soft cap on GPUs"
    if call.dtype not in (jnp.bfloat16, jnp.float16):
        return f"values are {jnp.dtype(call.dtype).name}; tokamax is used with bfloat16 and float16: set Model.dtype"
    try:
        _tokamax_module("api")
    except ImportError as error:
        return f"tokamax cannot be imported ({error}): install ain_jax[cuda]"
    return None


def _tokamax_module(name: str) -> Any:
    """A module of tokamax. Its settings are absl's flags, which it would look for in our own command line."""
    module, flags = (importlib.import_module(n) for n in (f"tokamax._src.ops.attention.{name}", "absl.flags"))
    if not flags.FLAGS.is_parsed():
        flags.FLAGS.mark_as_parsed()
    return module


def tokamax_mask(rules: Rules, L: int, parts: int, key_segments_BS, first) -> Any:
    """The keys that each query sees, as the range that tokamax' kernels skip blocks by."""
    base = _tokamax_module("base")
    _, begin_BS, end_BS = runs(key_segments_BS)
    mine = lambda x_BS: jax.lax.dynamic_slice_in_dim(x_BS, first, L, axis=1) if parts > 1 else x_BS
    begin_BL, end_BL = mine(begin_BS), mine(end_BS)
    place_1L = first + jnp.arange(L, dtype=jnp.int32)[None]
    if rules.window is not None:
        begin_BL = jnp.maximum(begin_BL, place_1L - (rules.window - 1))
    if rules.causal and parts > 1:  # is_causal counts the queries at hand from 0
        end_BL = jnp.minimum(end_BL, place_1L + 1)
    return base.Mask(k_start=begin_BL[:, None], k_end=end_BL[:, None], is_causal=rules.causal and parts == 1)


def _tokamax(call: Call, q_BLNH, k_BSKH, v_BSKH, segments_BL, key_segments_BS, first, kernel: str | None = None):
    api = _tokamax_module("api")
    mask = tokamax_mask(call.rules, q_BLNH.shape[1], call.parts, key_segments_BS, first)
    hopper = "mosaic_gpu" if "mosaic_gpu" in api.IMPLEMENTATIONS and _capability() >= 9 else "triton"
    attend = api.IMPLEMENTATIONS[kernel or hopper]
    return attend(q_BLNH, k_BSKH, v_BSKH, mask=mask, logits_scale=call.rules.scale)


def _capability() -> float:
    return float(getattr(jax.local_devices()[0], "compute_capability", 0) or 0)


CUDNN = Gpu("cudnn", _cudnn, _cudnn_limits)
TOKAMAX = Gpu("tokamax", _tokamax, _tokamax_limits)


@functools.cache
def _failure(gpu: Gpu, call: Call) -> str | None:
    """What goes wrong with this call on this machine's GPU, or None."""
    # In a thread of its own: this one may be in the middle of tracing, under a mesh.
    with concurrent.futures.ThreadPoolExecutor(1) as thread:
        try:
            error = thread.submit(difference, gpu, call).result()
        except Exception as fault:  # whatever a private function raises is a reason to leave it
            return f"a trial of {gpu.name} on this GPU failed: {type(fault).__name__}: {str(fault).splitlines()[:1]}"
    if not error <= TOLERANCE:
        return f"a trial of {gpu.name} on this GPU differs from the reference by {error:.2g} of the largest value"
    return None


def difference(gpu: Any, call: Call) -> float:
    """The largest difference of outputs and gradients from the XLA reference, as a share of the largest value."""
    random = np.random.default_rng(0)
    draw = lambda length, heads: jnp.asarray(random.standard_normal((call.B, length, heads, call.H)), call.dtype)
    q_BLNH, k_BSKH, v_BSKH, out_BLNH = (draw(call.L, heads) for heads in (call.N, call.K, call.K, call.N))
    cuts = np.sort(random.choice(call.L - 8, (call.B, 4), replace=False), axis=1)  # 4 segments and padding behind
    segments_BL = 1 + (np.arange(call.L)[None] >= cuts[:, :, None]).sum(axis=1)
    segments_BL = jnp.asarray(np.where(segments_BL == 5, 0, segments_BL), jnp.int32)
    real_BL11 = (segments_BL > 0)[:, :, None, None]

    def results(backend, *arrays):
        apply = backend.prepare(call).apply

        def loss(q, k, v):
            out = jnp.where(real_BL11, apply((), q, k, v, segments_BL, segments_BL, 0), 0)
            return jnp.sum(out.astype(jnp.float32) * out_BLNH.astype(jnp.float32)), out

        (_, out), gradients = jax.jit(jax.value_and_grad(loss, (0, 1, 2), has_aux=True))(*arrays)
        return [np.asarray(x, np.float32) for x in (out, *gradients)]

    arrays = (q_BLNH, k_BSKH, v_BSKH)
    with jax.default_matmul_precision("highest"):
        expected = results(attention_xla, *(x.astype(jnp.float32) for x in arrays))
    found = results(gpu, *arrays)
    apart = [np.abs(a - b).max() / np.abs(b).max() for a, b in zip(found, expected, strict=True)]
    return float(np.max(apart))  # NaN stays NaN, and is not within the tolerance
