"""Attention on TPUs by the splash kernel that comes with jax: exact for packed rows; masked blocks are skipped.

The mask proper is static (causal, or a band around the diagonal) and tells which blocks of keys a block of queries
needs at all; segments are compared inside the kernel. Where `longest` is promised, a tower without causal order gets
a band too, so that windows of 64 patches in a row of 16,384 cost what they are and not the square of the row.
"""

import functools
import importlib
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from ain_jax.models.attention_rules import Call, Run, promised

LANES = 128  # the kernel's blocks are multiples of it
# Positions of a block of queries and of keys, by jax's device_kind: 512 is what MaxText takes by default; v6e has twice
# the scoped vector memory of v5e (32 and 16 MiB), and twice the products to hide a fetch behind.
BLOCK = {"TPU v5 lite": 512, "TPU v5": 512, "TPU v6 lite": 1024}
WIDEST = 256  # head width up to which these blocks were compiled


def refusal(call: Call) -> str | None:
    """Why splash cannot take this call, or None."""
    if call.platform not in (None, "tpu"):
        return f"splash is a TPU kernel, and the mesh's devices are of platform {call.platform!r}"
    if not call.own_row:
        return "splash is used for rows that attend to themselves, not for keys of another row"
    if call.H > WIDEST:
        return f"heads are {call.H} wide, and splash was compiled for at most {WIDEST}"
    if call.dtype not in (jnp.bfloat16, jnp.float32):
        return f"values are {jnp.dtype(call.dtype).name}; splash takes bfloat16 and float32"
    if call.N % call.K:
        return f"{call.N} query heads are no multiple of {call.K} key heads"
    return None


def block_size(length: int, device_kind: str | None) -> int:
    """Positions of a block for rows (or parts of rows) of `length`: the largest that pads them by a sixteenth at most.

    4096 -> 512   1536 -> 512   1200 -> 256 (of 1280)   100 -> 128
    """
    lanes = -(-length // LANES)
    for blocks in range(BLOCK.get(device_kind or "", 512) // LANES, 1, -1):
        padded = -(-lanes // blocks) * blocks
        if blocks <= lanes and (padded - lanes) * 16 <= lanes:
            return blocks * LANES
    return LANES


@functools.cache
def _splash() -> Any:
    """The module; importing Pallas takes a second, which runs on other devices need not wait for."""
    return importlib.import_module("jax.experimental.pallas.ops.tpu.splash_attention")


def prepare(call: Call, interpret: bool = False) -> Run:
    """The kernel for this call; its block table is split over the devices that share a row's queries."""
    splash, part = _splash(), -(-call.L // call.parts)
    block = block_size(part, call.device_kind)
    length = -(-part // block) * block * call.parts
    sizes = splash.BlockSizes(
        block_q=block,
        block_kv=block,
        block_kv_compute=block,
        block_q_dkv=block,
        block_kv_dkv=block,
        block_kv_dkv_compute=block,
        block_q_dq=block,
        block_kv_dq=block,
    )
    band, causal = call.band, call.rules.causal
    whole = not causal and (band is None or band >= length)
    if whole:  # no query's place matters; jax fails to split such a table (an empty list is concatenated)
        mask = splash.FullMask((length // call.parts, length))
    elif band is not None and band < length:
        mask = splash.LocalMask((length, length), (band - 1, 0 if causal else band - 1), offset=0)
    else:
        mask = splash.CausalMask((length, length))
    kernel = splash.make_splash_mha(
        splash.MultiHeadMask([mask]),
        block_sizes=sizes,
        head_shards=1,  # one table serves all heads, whichever device they are on
        q_seq_shards=1 if whole else call.parts,
        attn_logits_soft_cap=call.rules.softcap,
        interpret=interpret,
    )
    return Run(kernel, functools.partial(_specs, kernel, whole), length, functools.partial(_run, call))


def _specs(kernel: Any, whole: bool, mesh: Any, positions: tuple[str, ...] | None) -> Any:
    """`whole`: the same table on every device."""
    where = PartitionSpec(None, None if whole else positions)
    return kernel.manual_sharding_spec(jax.sharding.NamedSharding(mesh, where))


def _run(call: Call, kernel, q_BLNH, k_BSKH, v_BSKH, segments_BL, key_segments_BS, first):
    del first  # the kernel's own table knows where its queries lie
    heads_first = lambda x: jnp.swapaxes(x, 1, 2)
    q_BNLH, k_BKSH, v_BKSH = heads_first(q_BLNH * call.rules.scale), heads_first(k_BSKH), heads_first(v_BSKH)
    row = lambda q, k, v, s, t: kernel(q, k, v, _splash().SegmentIds(q=s, kv=t))
    out_BLNH = heads_first(jax.vmap(row)(q_BNLH, k_BKSH, v_BKSH, segments_BL, key_segments_BS))
    longest = call.rules.longest
    return out_BLNH if longest is None else promised(out_BLNH, key_segments_BS, longest)
