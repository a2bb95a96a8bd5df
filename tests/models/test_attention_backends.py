"""Every backend against the XLA reference on packed rows; kernels are run where they can be, and compiled where not."""

import dataclasses
import functools
import json
import logging
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ain_jax.models import attention as front
from ain_jax.models import attention_gpu, attention_tpu
from ain_jax.models.attention_rules import Call, Rules

attention: Any = front.attention
GPU = jax.default_backend() in ("gpu", "cuda")
needs_gpu = pytest.mark.skipif(not GPU, reason="no GPU is here: the GPU kernels run on one alone")


@dataclasses.dataclass(frozen=True)
class Interpreted:
    """Splash run by Pallas' interpreter, which needs no TPU."""

    def refusal(self, call):
        return attention_tpu.refusal(dataclasses.replace(call, platform=None))

    def prepare(self, call):
        return attention_tpu.prepare(call, interpret=True)


@pytest.fixture
def interpreted(monkeypatch):
    monkeypatch.setitem(front.BACKENDS, "splash", Interpreted())


def packed(B=2, L=300, N=4, K=2, H=16, seed=0, dtype=jnp.float32, longest=140):
    """(q, k, v), segments: three segments and padding behind them."""
    random = np.random.default_rng(seed)
    arrays = tuple(jnp.asarray(random.normal(size=(B, L, heads, H)), dtype) for heads in (N, K, K))
    cuts = [longest // 2, longest + 20, L - 30]
    segments = [1 + np.searchsorted(cuts, np.arange(L) + shift, side="right") for shift in range(B)]
    return arrays, jnp.asarray([np.where(s == 4, 0, s) for s in segments], jnp.int32)


def results(arrays, segments, backend, **rules):
    """Outputs at real positions, and gradients of a loss over them."""
    real_BL11 = (segments > 0)[:, :, None, None]

    def loss(*arrays):
        out = attention(*arrays, segments, backend=backend, **rules)
        return jnp.sum(jnp.where(real_BL11, jnp.sin(out.astype(jnp.float32)), jnp.float32(0))), out

    (_, out), gradients = jax.jit(jax.value_and_grad(loss, (0, 1, 2), has_aux=True))(*arrays)
    assert np.isfinite(np.asarray(out, np.float32)).all()  # padding as well
    return [np.asarray(jnp.where(real_BL11, out, out.dtype.type(0)), np.float32), *map(np.asarray, gradients)]


RULES = {
    "decoder": {"causal": True, "softcap": 2.0},
    "window": {"causal": True, "window": 37, "scale": 0.4},
    "tower": {"causal": False},
    "tower of short segments": {"causal": False, "longest": 140},
}


@pytest.mark.parametrize("name", RULES)
def test_splash_equals_the_reference(name, interpreted):
    arrays, segments = packed(B=1, N=2 if name == "tower" else 4, H=80 if "tower" in name else 16)
    found, expected = (results(arrays, segments, backend, **RULES[name]) for backend in ("splash", "xla"))
    for a, b in zip(found, expected, strict=True):
        np.testing.assert_allclose(a, b, atol=2e-5)


def test_splash_equals_torch(interpreted):
    torch = pytest.importorskip("torch")
    arrays, segments = packed(B=1)
    q, k, v = (torch.tensor(np.asarray(x)).transpose(1, 2).requires_grad_() for x in arrays)
    mask = (segments[0][:, None] == segments[0][None, :]) & np.tri(segments.shape[1], dtype=bool)
    wide = (x.repeat_interleave(2, dim=1) for x in (k, v))
    out = torch.nn.functional.scaled_dot_product_attention(q, *wide, attn_mask=torch.tensor(np.asarray(mask)))
    out = out * torch.tensor(np.asarray(segments > 0))[:, None, :, None]
    torch.sin(out).sum().backward()
    found = results(arrays, segments, "splash", causal=True)
    for a, b in zip(found, (out, q.grad, k.grad, v.grad), strict=True):
        np.testing.assert_allclose(a, b.detach().transpose(1, 2).numpy(), atol=2e-5)


def test_splash_gives_nan_where_a_promise_is_broken(interpreted):
    arrays, segments = packed()
    segments = segments.at[1].set(jnp.arange(300, dtype=jnp.int32) // 60 + 1)
    out = attention(*arrays, segments, causal=False, longest=60, backend="splash")
    assert np.isnan(out).any(axis=(1, 2, 3)).tolist() == [True, False]


@pytest.mark.parametrize(
    ("length", "kind", "block"),
    [
        (4096, "TPU v5 lite", 512),
        (4096, "TPU v6 lite", 1024),
        (1536, "TPU v5", 512),
        (1200, None, 256),
        (100, None, 128),
        (129, None, 256),
        (128 * 37, "TPU v5", 384),  # two blocks of 128 more than 37; 512 takes three
    ],
)
def test_blocks_waste_little(length, kind, block):
    assert attention_tpu.block_size(length, kind) == block
    assert -(-length // block) * block <= -(-length // 128) * 128 * 17 / 16


def test_what_cannot_be_honoured_is_refused_by_name_and_passed_over_in_auto(caplog, interpreted):
    arrays, segments = packed(L=20)
    front._say_once.cache_clear()
    for name, rules, reason in (
        ("cudnn", {"softcap": 3.0}, "no soft cap"),
        ("cudnn", {}, "values are float32; cuDNN takes bfloat16 and float16"),
        ("tokamax", {"softcap": 3.0}, "no gradient of a soft cap"),
    ):
        with pytest.raises(ValueError, match=reason) as caught:
            attention(*arrays, segments, causal=True, backend=name, **rules)
        assert "xla" in str(caught.value).split("Choose")[1]
    with pytest.raises(ValueError, match="not for keys of another row"):
        attention(*arrays, segments, segments, causal=False, backend="splash")
    with pytest.raises(ValueError, match="expected one of xla, splash, cudnn, tokamax"):
        attention(*arrays, segments, causal=True, backend="flash")
    expected = out = attention(*arrays, segments, causal=True, backend="xla")
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            out = attention(*arrays, segments, causal=True, backend=front.GPU)
    np.testing.assert_array_equal(out, expected)
    said = [message for message in caplog.messages if "cudnn" in message]
    assert said == [
        "attention: xla instead of cudnn, because values are float32; cuDNN takes bfloat16 and float16: set Model.dtype"
    ]


@pytest.mark.skipif(GPU, reason="a GPU is here, and the kernels may run")
def test_gpu_kernels_are_not_taken_without_a_gpu():
    arrays, segments = packed(L=20, dtype=jnp.bfloat16)
    with pytest.raises(ValueError, match="no GPU is here"):
        attention(*arrays, segments, causal=True, backend="cudnn")


def test_resolve_by_platform():
    assert front.resolve("tpu") == ("splash", "xla")
    assert front.resolve("gpu") == ("cudnn", "tokamax", "xla")
    assert front.resolve("cpu") == front.resolve("some new device") == ("xla",)
    assert front.resolve("tpu", "splash") == ("splash",)
    with pytest.raises(ValueError, match="'splash' is not for devices of platform 'cpu': expected auto, xla"):
        front.resolve("cpu", "splash")
    with pytest.raises(ValueError, match="expected auto, xla, splash, cudnn, tokamax"):
        front.resolve("cpu", "flash")


def test_offsets_of_segments():
    segments = jnp.asarray([[1, 1, 2, 2, 2, 0, 0], [4, 4, 4, 4, 4, 4, 4]], jnp.int32)
    number, begin, end = attention_gpu.runs(segments)
    assert number.tolist() == [[0, 0, 1, 1, 1, 2, 2], [0] * 7]
    assert begin.tolist() == [[0, 0, 2, 2, 2, 5, 5], [0] * 7]
    assert end.tolist() == [[2, 2, 5, 5, 5, 7, 7], [7] * 7]
    length, begin = attention_gpu.offsets(segments, 4)
    assert length.tolist() == [[2, 3, 2, -1], [7, -1, -1, -1]]
    assert begin.tolist() == [[0, 2, 5, -1, -1], [0, -1, -1, -1, -1]]


def test_segments_in_two_places_give_nan_on_gpus():
    assert attention_gpu._apart(jnp.asarray([[1, 1, 2, 0, 0], [0, 1, 1, 5, 0], [1, 2, 1, 0, 0]])).tolist() == [0, 0, 1]


class ByOffsets:
    """What cuDNN's function does, as its documentation says: attention inside each stretch, a key head for each."""

    class MaskType:
        CAUSAL, NO_MASK = "causal", "none"

    @staticmethod
    def dot_product_attention(
        q, k, v, *, q_seqlen, kv_seqlen, q_offsets, kv_offsets, scale, mask_type, sliding_window_length
    ):
        assert q.shape == k.shape == v.shape and kv_seqlen is q_seqlen and kv_offsets is q_offsets
        q, k, v = map(np.asarray, (q, k, v))
        out = np.full_like(q, np.nan)
        for b, (lengths, begins) in enumerate(zip(q_seqlen.tolist(), q_offsets.tolist(), strict=True)):
            for length, begin in zip(lengths, begins, strict=False):
                if length > 0:
                    part = slice(begin, begin + length)
                    back = np.arange(length)[:, None] - np.arange(length)[None, :]
                    seen = (back < (sliding_window_length or 2**30)) & ((back >= 0) | (mask_type == "none"))
                    scores = np.einsum("LNH,SNH->NLS", q[b, part] * scale, k[b, part])
                    weights = np.exp(np.where(seen, scores, -np.inf))
                    weights /= weights.sum(axis=-1, keepdims=True)
                    out[b, part] = np.einsum("NLS,SNH->LNH", weights, v[b, part])
        return out


@pytest.mark.parametrize("rules", [{"causal": True}, {"causal": True, "window": 5}, {"causal": False}], ids=str)
def test_cudnn_is_asked_for_the_reference(rules, monkeypatch):
    """Its offsets, lengths and repeated heads, on the function that it documents; the kernel itself needs a GPU."""
    (q, k, v), segments = packed(L=40, longest=20)
    monkeypatch.setattr(attention_gpu.importlib, "import_module", lambda name: ByOffsets)
    settings = Rules(rules["causal"], 0.25, rules.get("window"))
    out = attention_gpu.cudnn_packed(settings, 6, q, k, v, segments)
    expected = attention(q, k, v, segments, **rules, scale=0.25)
    real = segments > 0
    np.testing.assert_allclose(out[real], expected[real], atol=2e-6)


@pytest.mark.parametrize("rules", [{"causal": True}, {"causal": True, "window": 5}, {"causal": False}], ids=str)
@pytest.mark.parametrize("parts", [1, 2])
def test_tokamax_is_asked_for_the_reference(rules, parts):
    """Its mask, by its own reference on this machine; the kernels themselves need a GPU."""
    pytest.importorskip("tokamax", reason="tokamax (ain_jax[cuda]) is not installed")
    api = attention_gpu._tokamax_module("api")
    (q, k, v), segments = packed(L=40, longest=20)
    settings = Rules(rules["causal"], 0.25, rules.get("window"))
    outs = []
    for first in range(0, 40, 40 // parts):
        mask = attention_gpu.tokamax_mask(settings, 40 // parts, parts, segments, first)
        mine = q[:, first : first + 40 // parts]
        with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
            outs.append(api.IMPLEMENTATIONS["xla"](mine, k, v, mask=mask, logits_scale=0.25, precision="float32"))
    expected, real = attention(q, k, v, segments, **rules, scale=0.25), segments > 0
    np.testing.assert_allclose(jnp.concatenate(outs, axis=1)[real], expected[real], atol=2e-6)


@needs_gpu
@pytest.mark.parametrize("H", [64, 80, 128])
@pytest.mark.parametrize("rules", [{"causal": True}, {"causal": True, "window": 40}, {"causal": False}], ids=str)
@pytest.mark.parametrize("backend", [attention_gpu.CUDNN, attention_gpu.TOKAMAX], ids=lambda backend: backend.name)
def test_gpu_kernels_equal_the_reference(backend, rules, H):
    call = Call(Rules(rules["causal"], H**-0.5, rules.get("window")), 2, 256, 256, 4, 2, H, jnp.bfloat16)
    limit = backend.limits(call)
    if limit is not None:
        pytest.skip(limit)
    assert attention_gpu.difference(backend, call) <= attention_gpu.TOLERANCE


def test_a_trial_that_fails_or_differs_is_a_refusal():
    call = Call(Rules(True, 0.25), 1, 32, 32, 2, 2, 16, jnp.dtype(jnp.bfloat16))
    reference = functools.partial(lambda call, *arrays: front.attention_xla.prepare(call).apply((), *arrays))
    kernel = lambda name, attend: attention_gpu.Gpu(name, attend, lambda call: None)
    assert attention_gpu._failure(kernel("right", reference), call) is None
    doubled = kernel("doubled", lambda call, *arrays: 2 * reference(call, *arrays))
    assert "differs from the reference by 1" in str(attention_gpu._failure(doubled, call))
    leaking = kernel("leaking", lambda call, q, k, v, s, t, first: reference(call, q, k, v, s * 0, t * 0, first))
    assert "differs from the reference" in str(attention_gpu._failure(leaking, call))

    def missing(*_):
        raise NotImplementedError("packed layout requires Hopper")

    assert "NotImplementedError" in str(attention_gpu._failure(kernel("missing", missing), call))


def processed(script: str, *, devices: int = 1, libtpu: bool = False) -> dict:
    """What a script of this folder prints as its last line, run in a process of its own."""
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={devices}"
    path = Path(__file__).parent / script
    root = str(Path(__file__).parents[2])
    environment = os.environ | {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu", "PYTHONPATH": root}
    environment |= {"TPU_SKIP_MDS_QUERY": "1", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1"} if libtpu else {}
    done = subprocess.run([sys.executable, str(path)], env=environment, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


def test_a_mesh_changes_no_number():
    found = processed("attention_on_a_mesh.py", devices=8)
    assert found.pop("spread") == {"rows": 2, "positions": 2, "heads": 2}
    assert len(found) >= 6
    assert {name: error for name, error in found.items() if not error < 3e-5} == {}


@pytest.mark.skipif(
    subprocess.run([sys.executable, "-c", "import libtpu"], capture_output=True).returncode != 0,
    reason="libtpu is not installed: TPU kernels are compiled where it is (pip install libtpu)",
)
def test_tpu_kernels_compile_for_each_generation():
    found = processed("attention_for_tpus.py", libtpu=True)
    assert {kind.split(",")[0] for kind in found} == {"v5e", "v5p", "v6e"}
    # Forwards, and backwards for the queries and for keys and values: three kernels, in whatever was compiled.
    assert {name: kernels for name, kernels in found.items() if kernels != 3} == {}
