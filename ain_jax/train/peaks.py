"""What the devices of a run can do at best: the figure that its MFU is a share of."""

from collections.abc import Sequence

from ain_jax.plan.chips import CHIPS

# How jax calls a device -> its bf16 FLOP/s without sparsity, and whose figure that is. The first that fits is taken.
_GPU = "NVIDIA's data sheet"
PEAKS: Sequence[tuple[str, float, str]] = (
    ("TPU v6", CHIPS["v6e"].bf16_flops, CHIPS["v6e"].source),
    ("TPU v5 lite", CHIPS["v5e"].bf16_flops, CHIPS["v5e"].source),
    ("TPU v5e", CHIPS["v5e"].bf16_flops, CHIPS["v5e"].source),
    ("TPU v5", CHIPS["v5p"].bf16_flops, CHIPS["v5p"].source),
    ("B200", 2250e12, _GPU),
    ("H200", 989.4e12, _GPU),
    ("H100 PCIe", 756e12, _GPU),
    ("H100", 989.4e12, _GPU),
    ("A100", 312e12, _GPU),
    ("L40S", 362e12, _GPU),
)


def peak(kind: str, devices: int, tflops: float = 0.0) -> tuple[float, str] | None:
    """FLOP/s of so many devices of a kind together, and what to call them; `tflops` of one where that is given.

    None where the table has no such device, a CPU among them: no MFU is told of it.
    """
    if tflops:
        return tflops * 1e12 * devices, f"{devices} x {tflops:g} TFLOP/s as Trainer.peak_tflops says"
    for name, flops, source in PEAKS:
        if name.lower() in kind.lower():
            return flops * devices, f"{devices} x {kind} at {flops / 1e12:g} TFLOP/s in bf16 ({source})"
    return None
