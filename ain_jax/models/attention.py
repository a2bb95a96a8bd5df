"""One attention for every tower: exact on packed rows, grouped heads, no L x S array for long rows.

The rules are those of `attention`; a backend is a way to the same numbers. None is taken that cannot honour the rules.
"""

import functools
import logging
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from ain_jax import sharding
from ain_jax.models import attention_gpu, attention_tpu, attention_xla
from ain_jax.models.attention_rules import Call, Rules, Run

Array = jax.Array

QUERY_CHUNK = 1024  # rows up to this length are taken at once

# Each has refusal(call) and prepare(call).
BACKENDS: dict[str, Any] = {
    "xla": attention_xla,
    "splash": attention_tpu,
    "cudnn": attention_gpu.CUDNN,
    "tokamax": attention_gpu.TOKAMAX,
}
GPU = ("cudnn", "tokamax", "xla")
AUTO = {"tpu": ("splash", "xla"), "gpu": GPU, "cuda": GPU}


def resolve(platform: str, name: str = "auto") -> tuple[str, ...]:
    """The backends to try in turn on devices of `platform` ("cpu", "gpu", "tpu"), for `attention(backend=...)`.

    "auto" is the quickest first and XLA last; any other name is itself alone, so that it is taken or refused.
    ValueError: no such backend, or one that is made for other devices.
    """
    here = AUTO.get(platform, ("xla",))
    if name == "auto":
        return here
    if name not in BACKENDS:
        raise ValueError(f"attention = {name!r}: expected auto, {', '.join(BACKENDS)}")
    if name not in here:
        choices = ", ".join(("auto", *here))
        raise ValueError(f"attention = {name!r} is not for devices of platform {platform!r}: expected {choices}")
    return (name,)


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
    backend: str | Sequence[str] = "xla",
    rows: str = "rows",
) -> Array:
    """out_BLNH: each query's mean of the values of its own segment, weighted by softmax(scale q k) in float32.

    Positions of one segment see each other and nothing else; with `causal`, none that comes later in the row, and with
    `window` besides no more than the last `window` ones, their own included. `scale` is 1 / sqrt(H) where none is
    given; `softcap` bends scores to softcap tanh(score / softcap). Without `key_segments_BS` queries and keys are the
    same positions, and the positions of a segment lie side by side.

    segments 1 1 2 2 0     causal    1 . . . .
                                     1 1 . . .
                                     . . 1 . .
                                     . . 1 1 .
                                     . . . . 1    padding (0) sees padding alone: finite, and read by nobody

    `longest` promises that no segment has more positions, which makes it quicker. A promise that is broken gives NaN
    where it was relied on, never a picture cut in two.

    `backend` is one name, which is taken or refused (ValueError, with the reason), or several, of which the first
    that can honour the call is taken; what was passed over is said once in the log. Where a mesh is set, rows, heads
    and queries are spread over it as `sharding.RULES` says; keys are gathered along the row. `rows` is what the rules
    call the first axis: "tiles" are spread over the devices that share a row too, and are whole themselves.
    """
    B, L, N, H = q_BLNH.shape
    if window is not None and not (causal and key_segments_BS is None):
        raise ValueError("a window counts back from a query in its own row; with keys of another row mask them there")
    if key_segments_BS is not None and (causal or longest is not None):
        raise ValueError("causal and longest speak of one row; with keys of another row give neither")
    rules = Rules(causal, H**-0.5 if scale is None else scale, window, softcap, longest, chunk)
    own_row = key_segments_BS is None
    places = {rows: B, "heads": N} | ({"positions": L} if rows == "rows" else {})
    axes = sharding.spread(**places) if own_row else {}
    axes = {"rows" if axis == rows else axis: over for axis, over in axes.items()}
    parts = math.prod(axes.get("positions", {}).values())
    call = Call(rules, B, L, k_BSKH.shape[1], N, k_BSKH.shape[2], H, q_BLNH.dtype, own_row, parts, *_device())
    run = BACKENDS[choose(backend, call)].prepare(call)
    more = run.length - L
    q_BLNH, segments_BL = _padded(q_BLNH, more), _padded(segments_BL, more, -1)
    if own_row:
        k_BSKH, v_BSKH, key_segments_BS = _padded(k_BSKH, more), _padded(v_BSKH, more), segments_BL
    arrays = (q_BLNH, k_BSKH, v_BSKH, segments_BL, key_segments_BS)
    out_BLNH = _on_mesh(run, axes, arrays) if any(axes.values()) else run.apply(run.extra, *arrays, 0)
    return out_BLNH[:, :L] if more else out_BLNH


def choose(backend: str | Sequence[str], call: Call) -> str:
    """The first backend of those named that can honour the call. ValueError: none can, and why not."""
    names = (backend,) if isinstance(backend, str) else tuple(backend)
    refused = {}
    for name in names:
        if name not in BACKENDS:
            raise ValueError(f"attention backend {name!r}: expected one of {', '.join(BACKENDS)}")
        reason = BACKENDS[name].refusal(call)
        if reason is None:
            for passed_over, why in refused.items():
                _say_once(f"attention: {name} instead of {passed_over}, because {why}")
            return name
        refused[name] = reason
    reasons = "; ".join(f"{name}: {why}" for name, why in refused.items())
    able = [name for name, module in BACKENDS.items() if name not in refused and module.refusal(call) is None]
    raise ValueError(f"attention cannot be exact here with {reasons}. Choose {' or '.join([*able, 'auto'])}")


@functools.cache
def _say_once(message: str) -> None:
    logging.getLogger("ain_jax").warning(message)


def _device() -> tuple[str | None, str | None]:
    """(platform, device_kind) of the mesh that is set; which may be described, and not here."""
    device: Any = getattr(jax.sharding.get_abstract_mesh(), "abstract_device", None)
    return getattr(device, "platform", None), getattr(device, "device_kind", None)


def _on_mesh(run: Run, axes: dict[str, dict[str, int]], arrays):
    """The same, each device with its rows, its heads and its queries."""
    q_BLNH, k_BSKH, v_BSKH, segments_BL, key_segments_BS = arrays
    rows, positions, heads = (tuple(axes.get(axis, ())) or None for axis in ("rows", "positions", "heads"))
    # Key heads that do not divide are repeated until they do, and stay beside the query heads that share them.
    K = k_BSKH.shape[2]
    copies = math.lcm(K, math.prod(axes["heads"].values())) // K
    if q_BLNH.shape[2] % (K * copies):
        heads, copies = None, 1
    k_BSKH, v_BSKH = (jnp.repeat(x, copies, axis=2) if copies > 1 else x for x in (k_BSKH, v_BSKH))

    def one_device(extra, *arrays):
        first = jax.lax.axis_index(positions) * arrays[0].shape[1] if positions else 0
        return run.apply(extra, *arrays, first)

    spread = jax.shard_map(
        one_device,
        in_specs=(
            run.specs(jax.sharding.get_abstract_mesh(), positions),
            PartitionSpec(rows, positions, heads),
            PartitionSpec(rows, None, heads),
            PartitionSpec(rows, None, heads),
            PartitionSpec(rows, positions),
            PartitionSpec(rows),
        ),
        out_specs=PartitionSpec(rows, positions, heads),
        check_vma=False,  # a kernel does not say over which axes its results vary
    )
    return spread(run.extra, q_BLNH, k_BSKH, v_BSKH, segments_BL, key_segments_BS)


def _padded(x, count: int, value: int = 0):
    return jnp.pad(x, ((0, 0), (0, count)) + ((0, 0),) * (x.ndim - 2), constant_values=value) if count else x
