"""TPU chips, what each can do, and the topologies behind the names of slices: pure tables."""

import dataclasses
import math
import re
from collections.abc import Mapping


@dataclasses.dataclass(frozen=True)
class Chip:
    """One TPU chip at its peak. Bandwidths are bytes per second, in one direction."""

    name: str
    bf16_flops: float  # per second, dense
    hbm_bytes: int  # what a program may use
    hbm_bandwidth: float
    ici_bandwidth: float  # of all its links to its neighbours together
    dcn_bandwidth: float  # between slices, the chip's share of its host's network
    cores_in_name: int  # v5p-128 counts two cores a chip, v5e-128 counts chips
    source: str


GIB = 2**30

# The usable HBM of a v5e is the limit that libtpu 0.0.42 names when a program is larger; of v5p and v6e it is an
# assumption beside the 95 and 32 GB as sold: a program that is too large is told with the compiler's own limit.
# Links: "Interchip Interconnect BW", 1600, 4800 and 3200 Gbps. DCN: 2 x 100 Gbps for 8 chips, 50 Gbps a chip,
# 4 x 200 Gbps for 8 chips.
CHIPS: Mapping[str, Chip] = {
    chip.name: chip
    for chip in (
        Chip("v5e", 197e12, int(15.75 * GIB), 819e9, 200e9, 3.125e9, 1, "cloud.google.com/tpu/docs/v5e"),
        Chip("v5p", 459e12, int(95.74 * GIB), 2765e9, 600e9, 6.25e9, 2, "cloud.google.com/tpu/docs/v5p"),
        Chip("v6e", 918e12, int(31.25 * GIB), 1600e9, 400e9, 12.5e9, 1, "cloud.google.com/tpu/docs/v6e"),
    )
}

_FLAT = ((1, 1), (2, 2), (2, 4), (4, 4), (4, 8), (8, 8), (8, 16), (16, 16))
# The slices that Cloud TPU offers, by chips along each axis.
SHAPES: Mapping[str, tuple[tuple[int, ...], ...]] = {
    "v5e": _FLAT,
    "v6e": _FLAT,
    "v5p": (
        *((2, 2, 1), (2, 2, 2), (2, 2, 4), (2, 4, 4), (4, 4, 4), (4, 4, 8), (4, 4, 12), (4, 8, 8), (4, 4, 20)),
        *((4, 8, 12), (4, 4, 28), (8, 8, 8), (4, 12, 12), (4, 8, 20), (4, 4, 44), (8, 8, 12), (4, 4, 52)),
        *((4, 8, 28), (4, 12, 20), (8, 8, 16), (8, 12, 12), (8, 8, 20), (8, 12, 16), (12, 12, 12), (8, 16, 16)),
        *((8, 12, 20), (12, 12, 16), (8, 16, 20), (12, 16, 16), (16, 16, 16), (16, 16, 20), (16, 16, 24)),
    ),
}


@dataclasses.dataclass(frozen=True)
class Slices:
    """One slice of a TPU, or several that the network of the data centre joins."""

    chip: Chip
    shape: tuple[int, ...]  # chips along each axis of one slice
    count: int = 1

    @property
    def chips(self) -> int:
        """Chips of all slices."""
        return self.count * math.prod(self.shape)

    @property
    def name(self) -> str:
        """As Cloud TPU writes it: "v5p-128", and "2xv5p-128" of two."""
        one = f"{self.chip.name}-{math.prod(self.shape) * self.chip.cores_in_name}"
        return one if self.count == 1 else f"{self.count}x{one}"

    @property
    def topology(self) -> str:
        """As the compiler writes it: "v5p:4x4x4"."""
        return f"{self.chip.name}:{'x'.join(map(str, self.shape))}"


def read(text: str, slices: int = 0) -> Slices:
    """The slices of a name: "v5p-128", "2xv5p-128", or with `slices` 2 "v5p-128"; also "v5p:4x4x4".

    Raises ValueError with the names that there are.
    """
    match = re.fullmatch(r"(?:(\d+)x)?(v\d+[a-z]*|v5litepod)(?:-(\d+)|:(\d+(?:x\d+){1,2}))", text.strip().lower())
    if not match:
        raise ValueError(f"{text!r}: expected a slice such as v5p-128, v5e-64, v6e-256 or 2xv5p-128")
    count, kind, size, shape_text = match.groups()
    kind = "v5e" if kind == "v5litepod" else kind
    if kind not in CHIPS:
        raise ValueError(f"{text!r}: no figures for {kind}; expected one of {', '.join(CHIPS)}")
    if count and slices and int(count) != slices:
        raise ValueError(f"{text!r} beside --slices {slices}: give one of the two")
    chip, number = CHIPS[kind], int(count or slices or 1)
    if number < 1:
        raise ValueError(f"{text!r}: expected 1 slice or more")
    by_name = {math.prod(shape) * chip.cores_in_name: shape for shape in SHAPES[kind]}
    shape = tuple(map(int, shape_text.split("x"))) if shape_text else by_name.get(int(size))
    if shape not in SHAPES[kind]:
        known = ", ".join(f"{kind}-{size}" for size in by_name)
        raise ValueError(f"{text!r} is no slice that Cloud TPU offers; expected one of {known}")
    return Slices(chip, shape, number)
