"""FLOPs, time and cost of a training step: arithmetic on sizes, nothing is compiled here.

Two conventions of model FLOPs, neither of which counts what rematerialisation computes again:

- "all": 6 per parameter of every matrix and token (the head at every position), and attention over all L x L pairs of
  a row, masked ones among them; every part trained. What PaLM's appendix B (arXiv 2204.02311) divides by the peak.
- "needed": attention over the pairs that see each other, the head at learnt positions alone, 2 more for each parameter
  that learns and 2 more for what a gradient has to pass through; what a frozen part does not need is not counted.

A multiplication and an addition are two FLOPs. Norms, rotations and softmax are not counted.
"""

import dataclasses
import math
from collections.abc import Mapping

from ain_jax.models.config import ClipConfig, ModelConfig, VisionConfig
from ain_jax.plan.chips import Slices


@dataclasses.dataclass(frozen=True)
class Budget:
    """What a stage is expected to see in all, where its data decide how many steps it takes: for plans alone."""

    tokens: float = 0.0  # places of rows, padding among them; 0: unknown until the data are packed

    def __post_init__(self):
        if self.tokens < 0:
            raise ValueError(f"tokens = {self.tokens}: expected 0 or more")


@dataclasses.dataclass(frozen=True)
class Part:
    """The matrix products of one part of a model, forwards."""

    flops: float
    path: str  # where its parameters lie; "" where it has none


def pairs(length: int, window: int = 0) -> int:
    """How many (query, key) pairs a causal row has: of 4 positions 10, with a window of 2 only 7."""
    reach = min(window or length, length)
    return reach * (reach + 1) // 2 + (length - reach) * reach


def forward(
    config: ModelConfig, rows: int, tokens: int, targets: int, patches: int, picture: int, needed: bool
) -> dict[str, Part]:
    """The parts of one forward pass over `rows` rows of so many tokens, learnt tokens and patches.

    `picture` is the number of patches that one picture has at most: what a patch sees where pairs are counted as
    needed. A row counts as one conversation: several in a row see fewer pairs.
    """
    c = config.text
    matrices = c.width * (c.heads + 2 * c.kv_heads) * c.head_width + c.heads * c.head_width * c.width
    matrices += 3 * c.width * c.mlp_width
    seen = [
        pairs(tokens, window) if needed else tokens**2
        for _, turn, count in c.stacks()
        for window in turn * (count // len(turn))
    ]
    parts = {
        "decoder": Part(2.0 * matrices * c.layers * tokens, "model/layers"),
        "attention": Part(4.0 * c.heads * c.head_width * sum(seen), ""),
        "head": Part(
            2.0 * c.vocabulary * c.width * (targets if needed else tokens),
            "model/embed_tokens" if c.tied else "lm_head",
        ),
    }
    v = config.vision
    if patches and isinstance(v, VisionConfig):
        block = 4 * v.width**2 + (3 if v.gated else 2) * v.width * v.mlp_width
        joined = v.merge_size**2 * v.width
        side = v.window // v.merge_size // v.patch_size * v.merge_size
        reach = [min(side**2, picture) if windowed else picture for windowed in v.windowed]
        reach *= v.layers // len(reach)
        parts |= {
            "vision": Part(2.0 * patches * (v.patch_values * v.width + v.layers * block), "visual/blocks"),
            "vision attention": Part(4.0 * v.width * patches * (sum(reach) if needed else v.layers * patches), ""),
            "merger": Part(2.0 * patches / v.merge_size**2 * (joined**2 + joined * c.width), "visual/merger"),
        }
    elif patches and isinstance(v, ClipConfig):
        layers = sum(count for _, count, run in v.stacks() if run)
        block = 4 * v.width**2 + 2 * v.width * v.mlp_width
        parts |= {
            "vision": Part(2.0 * patches * (v.patch_values * v.width + layers * block), "visual/vision_tower"),
            "vision attention": Part(4.0 * v.width * patches * layers * (v.tile_patches if needed else patches), ""),
            "merger": Part(2.0 * patches * (v.width * c.width + c.width**2), "visual/multi_modal_projector"),
        }
    return {name: dataclasses.replace(part, flops=part.flops * rows) for name, part in parts.items()}


def training(parts: Mapping[str, Part], learns: Mapping[str, str], embeddings_learn: bool) -> dict[str, float]:
    """FLOPs of a forward and a backward pass by part; `learns` says what of a part does: "all", "adapters" or "".

    Forwards 1, the gradient of what comes in 1 (where anything that learns lies before, or inside), the gradient of
    the parameters 1 (where they learn). Attention has no parameters, and two products of its own for its gradients.
    """
    eyes = bool(learns.get("vision"))
    to_decoder = embeddings_learn or eyes or bool(learns.get("merger"))
    to_head = to_decoder or bool(learns["decoder"])
    passes = {"vision": eyes, "vision attention": eyes, "merger": eyes, "decoder": to_head, "attention": to_head}
    passes["head"] = to_head
    result = {}
    for name, part in parts.items():
        learning = passes[name] if not part.path else learns.get(name) == "all"
        backward = int(passes[name]) + int(learning)
        result[name] = (1 + backward) * part.flops
    return result


@dataclasses.dataclass(frozen=True)
class Roofline:
    """Seconds of one step if each resource worked at its peak, alone."""

    compute: float
    memory: float
    ici: float
    dcn: float

    @property
    def fastest(self) -> float:
        """Everything overlaps: the slowest resource decides."""
        return max(dataclasses.astuple(self))

    @property
    def slowest(self) -> float:
        """Nothing overlaps with the network."""
        return max(self.compute, self.memory) + self.ici + self.dcn

    @property
    def bound(self) -> str:
        """The resource that decides."""
        return max(dataclasses.asdict(self).items(), key=lambda item: item[1])[0]


def roofline(slices: Slices, flops: float, hbm_bytes: float, ici_bytes: float, dcn_bytes: float) -> Roofline:
    """Of FLOPs and bytes per chip. Of the ICI all links of a chip are counted, one direction of each."""
    chip = slices.chip
    return Roofline(
        flops / chip.bf16_flops,
        hbm_bytes / chip.hbm_bandwidth,
        ici_bytes / chip.ici_bandwidth,
        dcn_bytes / chip.dcn_bandwidth,
    )


def mfu(slices: Slices, model_flops: float, seconds: float) -> float:
    """The share of the chips' peak that model FLOPs of a step take in so many seconds."""
    return model_flops / (slices.chips * slices.chip.bf16_flops * seconds)


@dataclasses.dataclass(frozen=True)
class Cost:
    """What a stage takes in all."""

    steps: int
    tokens: float
    hours: float
    chip_hours: float
    dollars: float | None  # None without a price


def cost(slices: Slices, steps: int, tokens_per_step: int, seconds: float, price: float | None) -> Cost:
    """Of `steps` steps of so many seconds, at a price for a chip and an hour."""
    hours = steps * seconds / 3600
    chip_hours = hours * slices.chips
    return Cost(steps, float(steps) * tokens_per_step, hours, chip_hours, None if price is None else price * chip_hours)


def steps_for(tokens: float, tokens_per_step: int) -> int:
    """How many steps see so many tokens: 10 tokens in steps of 4 are 3."""
    return math.ceil(tokens / tokens_per_step)
