"""The sizes of a model, as frozen dataclasses, and their Hugging Face spelling.

A `ModelConfig` says what the parameters are; how they are computed with (dtype, rematerialisation) is an argument of
the model, so that one checkpoint can be opened either way.
"""

import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from ain_jax.experiment import nearest
from ain_jax.models import hf_config, hf_families


@dataclass(frozen=True)
class RopeScaling:
    """How rotary positions are stretched for longer texts than pretraining had; see `layers.scaled_frequencies`."""

    kind: Literal["linear", "dynamic", "llama3", "yarn"]
    factor: float
    original_positions: int = 0  # length of pretraining; linear asks for none
    low: float = (
        1.0  # turns within that length below which a pair is stretched (llama3: low_freq_factor, yarn: beta_slow)
    )
    high: float = 4.0  # and above which it stays as it is (high_freq_factor, beta_fast)
    attention_factor: float | None = None  # yarn: of cosine and sine; None: as the paper has it, from `factor`
    mscale: float | None = None  # yarn: with mscale_all_dim, another way to that factor
    mscale_all_dim: float | None = None
    truncate: bool = True  # yarn: the ramp begins and ends at whole pairs

    def __post_init__(self):
        faults = []
        if self.kind not in ("linear", "dynamic", "llama3", "yarn"):
            faults.append(f"kind={self.kind!r}; expected linear, dynamic, llama3 or yarn")
        if not self.factor > 0:
            faults.append(f"factor={self.factor}; expected a number above 0")
        if self.kind != "linear" and self.original_positions < 1:
            faults.append(f"original_positions={self.original_positions}; expected the length of pretraining")
        if self.kind in ("llama3", "yarn") and not self.low < self.high:
            faults.append(f"low={self.low}, high={self.high}; expected low below high")
        _stop("RopeScaling", faults)

    def cosine_factor(self) -> float:
        """What yarn multiplies cosine and sine by, so that scores grow with the length (arXiv 2309.00071, eq. 22)."""
        if self.attention_factor is not None:
            return self.attention_factor

        def warmth(mscale: float) -> float:
            return 1.0 if self.factor <= 1 else 0.1 * mscale * math.log(self.factor) + 1.0

        if self.mscale and self.mscale_all_dim:
            return warmth(self.mscale) / warmth(self.mscale_all_dim)
        return warmth(1.0)


@dataclass(frozen=True)
class TextConfig:
    """Sizes and settings of the decoder. Llama, Mistral, Qwen2 and Gemma are settings of it."""

    vocabulary: int  # V, rows of the embedding, padding rows included
    width: int  # D
    mlp_width: int  # F
    layers: int
    heads: int  # N, query heads
    kv_heads: int  # K, key/value heads; G = N / K query heads share one
    head_width: int  # H
    rope_theta: float = 1_000_000.0
    rope_scaling: RopeScaling | None = None
    mrope_section: tuple[int, ...] | None = None  # frequencies turned by (time, height, width); None: plain positions
    norm_eps: float = 1e-6
    qkv_bias: bool = True
    o_bias: bool = False
    mlp_bias: bool = False
    tied: bool = False  # the head is the embedding
    max_positions: int = 32768
    activation: Literal["silu", "gelu", "gelu_tanh"] = "silu"
    # By layer, in turns: how many positions a query sees, its own included; 0 is all. (512, 512, 0) are two windowed
    # layers and a full one, again and again.
    windows: tuple[int, ...] = (0,)
    window_theta: float | None = None  # rotary base of windowed layers, which are then not scaled; None: as the others
    norm_plus_one: bool = False  # norm weights are stored as their difference from 1
    qk_norm: bool = False  # queries and keys are normed, head by head
    sandwich_norms: bool = False  # what attention and MLP add is normed once more
    scale_embedding: bool = False  # token embeddings are multiplied by sqrt(width)
    query_scale: int | None = None  # scores are divided by its square root; None: by that of the head width
    attention_softcap: float | None = None  # scores are bent to cap tanh(score / cap)
    logit_softcap: float | None = None

    def __post_init__(self):
        object.__setattr__(
            self, "windows", pattern(tuple(self.windows[i % len(self.windows)] for i in range(self.layers)))
        )
        if self.query_scale == self.head_width:
            object.__setattr__(self, "query_scale", None)
        faults = []
        if self.heads % self.kv_heads:
            faults.append(
                f"heads={self.heads} is no multiple of kv_heads={self.kv_heads}; each group shares one key head"
            )
        if self.head_width % 2:
            faults.append(f"head_width={self.head_width} is odd; rotary positions turn pairs, so make it even")
        if self.mrope_section is not None:
            object.__setattr__(self, "mrope_section", tuple(self.mrope_section))
            if len(self.mrope_section) != 3 or sum(self.mrope_section) * 2 != self.head_width:
                faults.append(
                    f"mrope_section={self.mrope_section} must be three counts that add up to half of "
                    f"head_width={self.head_width}, that is {self.head_width // 2}"
                )
        if self.window_theta and not any(self.windows):
            faults.append(f"window_theta={self.window_theta}, but no layer has a window")
        if min(self.windows) < 0:
            faults.append(f"windows={self.windows}; expected 1 or more positions, or 0 for all")
        _stop("TextConfig", faults)

    def stacks(self) -> list[tuple[str, tuple[int, ...], int]]:
        """(name in the parameters, the windows of one turn, layers) of each stack of layers.

        26 layers in turns of (512, 512, 512, 512, 512, 0): "layers" has the 24 of four turns, "last_layers" two more.
        """
        size = len(self.windows)
        rest = self.layers % size
        stacks = [("layers", self.windows, self.layers - rest), ("last_layers", self.windows[:rest], rest)]
        return [stack for stack in stacks if stack[2]]


def pattern(kinds: tuple[Any, ...]) -> tuple[Any, ...]:
    """The shortest beginning whose repetition gives `kinds`; the last repetition may be cut short.

    pattern((w, w, f, w, w, f, w)) is (w, w, f)
    """
    for size in range(1, len(kinds)):
        if all(kinds[i] == kinds[i % size] for i in range(len(kinds))):
            return kinds[:size]
    return kinds


@dataclass(frozen=True)
class VisionConfig:
    """Sizes and settings of the image encoder of Qwen2-VL and Qwen2.5-VL; its output has the decoder's width."""

    width: int  # E
    layers: int
    heads: int
    mlp_width: int
    patch_size: int = 14  # pixels
    temporal_patch_size: int = 2  # frames; a still picture is repeated
    merge_size: int = 2  # merge_size x merge_size patches make one feature
    channels: int = 3
    norm_eps: float = 1e-6
    gated: bool = False  # Qwen2.5-VL: root-mean-square norms and a gated MLP
    window: int = 0  # pixels on a side of the squares that a patch sees in most layers; 0: its whole picture in all
    full_layers: tuple[int, ...] = ()  # with a window, the layers that see whole pictures
    tokens_per_second: float | None = None  # Qwen2.5-VL: temporal positions of a video count time, not frames

    @property
    def patch_values(self) -> int:
        """Values of one flattened patch, K = channels x frames x height x width."""
        return self.channels * self.temporal_patch_size * self.patch_size**2

    @property
    def head_width(self) -> int:
        return self.width // self.heads

    @property
    def windowed(self) -> tuple[bool, ...]:
        """Whether each layer sees windows, as the shortest pattern that repeats."""
        return pattern(tuple(bool(self.window) and i not in self.full_layers for i in range(self.layers)))

    def __post_init__(self):
        object.__setattr__(self, "full_layers", tuple(self.full_layers))
        faults = []
        if self.width % self.heads or self.head_width % 4:
            faults.append(
                f"width={self.width} over heads={self.heads} must give a head width divisible by 4 "
                "(half of it turns with the height, half with the width, in pairs)"
            )
        if self.window and self.window < self.patch_size * self.merge_size:
            faults.append(f"window={self.window} pixels is less than one merged patch")
        if self.layers % len(self.windowed):
            faults.append(
                f"full_layers={self.full_layers} make no whole turns of {len(self.windowed)} in {self.layers} layers"
            )
        _stop("VisionConfig", faults)


@dataclass(frozen=True)
class ClipConfig:
    """Sizes of CLIP's image encoder as LLaVA-NeXT uses it: square tiles, one feature for each patch."""

    width: int = 1024  # E
    layers: int = 24
    heads: int = 16
    mlp_width: int = 4096
    tile: int = 336  # pixels on a side
    patch_size: int = 14
    channels: int = 3
    norm_eps: float = 1e-5
    activation: Literal["quick_gelu", "gelu", "gelu_tanh"] = "quick_gelu"
    feature_layer: int = -2  # whose output is taken; 0 is the embedding, -1 the last layer
    pinpoints: tuple[tuple[int, int], ...] = hf_families.PINPOINTS

    @property
    def patch_values(self) -> int:
        """Values of one flattened patch, K = channels x height x width."""
        return self.channels * self.patch_size**2

    @property
    def tile_patches(self) -> int:
        """Patches of one tile."""
        return (self.tile // self.patch_size) ** 2

    @property
    def head_width(self) -> int:
        return self.width // self.heads

    def stacks(self) -> list[tuple[str, int, bool]]:
        """(name in the parameters, layers, whether they are run) of each stack of layers."""
        used = self.feature_layer if self.feature_layer >= 0 else self.layers + 1 + self.feature_layer
        stacks = [("layers", used, True), ("last_layers", self.layers - used, False)]
        return [stack for stack in stacks if stack[1]]

    def __post_init__(self):
        object.__setattr__(self, "pinpoints", tuple(tuple(p) for p in self.pinpoints))
        faults = []
        if self.width % self.heads:
            faults.append(f"width={self.width} is no multiple of heads={self.heads}")
        if self.tile % self.patch_size:
            faults.append(f"tile={self.tile} is no multiple of patch_size={self.patch_size}")
        if not -self.layers <= self.feature_layer + 1 <= self.layers + 1:
            faults.append(f"feature_layer={self.feature_layer} lies outside {self.layers} layers")
        if bad := [p for p in self.pinpoints if p[0] % self.tile or p[1] % self.tile]:
            faults.append(f"pinpoints {bad} are no multiples of the tile of {self.tile} pixels")
        _stop("ClipConfig", faults)


@dataclass(frozen=True)
class ModelConfig:
    """A decoder, perhaps with an image encoder, and the ids that join the two."""

    text: TextConfig
    vision: VisionConfig | ClipConfig | None = None
    family: str = "qwen2_vl"  # the published architecture, a name in `hf_families.FAMILIES`
    text_family: str = ""  # LLaVA-NeXT: the architecture of its decoder
    image_token_id: int | None = None
    video_token_id: int | None = None
    vision_start_token_id: int | None = None
    vision_end_token_id: int | None = None
    bos_token_id: int | None = None
    eos_token_id: int | tuple[int, ...] | None = None
    pad_token_id: int | None = None

    def __post_init__(self):
        if isinstance(self.eos_token_id, list):
            object.__setattr__(self, "eos_token_id", tuple(self.eos_token_id))
        faults = []
        for name, value in self.token_ids().items():
            for one in value if isinstance(value, tuple) else (value,):
                if one is not None and not 0 <= one < self.text.vocabulary:
                    faults.append(f"{name}={one} lies outside the vocabulary of {self.text.vocabulary} rows")
        if self.vision and self.image_token_id is None:
            faults.append("image_token_id is missing; a model with an image encoder needs the id of its placeholder")
        _stop("ModelConfig", faults)

    @property
    def stop_ids(self) -> tuple[int, ...]:
        """The ids that end an answer."""
        ids = self.eos_token_id
        return ids if isinstance(ids, tuple) else () if ids is None else (ids,)

    def token_ids(self) -> dict[str, Any]:
        """Every special id by its name."""
        names = [field.name for field in dataclasses.fields(self) if field.name.endswith("_token_id")]
        return {name: getattr(self, name) for name in names}


def llama_2(size: str = "7b", vocabulary: int = 32000) -> ModelConfig:
    """Llama 2, the base of ALLaM: 6,738,415,616 (7b), 13,015,864,320 (13b) or 68,976,648,192 (70b) parameters."""
    sizes = {
        "7b": (4096, 11008, 32, 32, 32),
        "13b": (5120, 13824, 40, 40, 40),
        "70b": (8192, 28672, 80, 64, 8),
    }
    width, mlp_width, layers, heads, kv_heads = _size("Llama 2", size, sizes)
    text = TextConfig(
        vocabulary,
        width,
        mlp_width,
        layers,
        heads,
        kv_heads,
        128,
        10_000.0,
        norm_eps=1e-5,
        qkv_bias=False,
        max_positions=4096,
    )
    return ModelConfig(text, family="llama", bos_token_id=1, eos_token_id=2)


def allam_7b() -> ModelConfig:
    """ALLaM-7B-Instruct-preview: a Llama of 64,000 pieces, 7,000,559,616 parameters."""
    base = llama_2("7b", vocabulary=64000)
    return dataclasses.replace(base, text=dataclasses.replace(base.text, rope_theta=1_000_000.0))


def llama_3_8b() -> ModelConfig:
    """Llama-3-8B, the base of LlamAr: 8,030,261,248 parameters."""
    text = TextConfig(128256, 4096, 14336, 32, 32, 8, 128, 500_000.0, norm_eps=1e-5, qkv_bias=False, max_positions=8192)
    return ModelConfig(text, family="llama", bos_token_id=128000, eos_token_id=128009)


def gemma_7b() -> ModelConfig:
    """Gemma-7B, the base of GemmAr: 8,537,680,896 parameters, heads wider than width / heads."""
    text = TextConfig(
        *(256000, 3072, 24576, 28, 16, 16, 256, 10_000.0),
        qkv_bias=False,
        tied=True,
        max_positions=8192,
        activation="gelu_tanh",
        norm_plus_one=True,
        scale_embedding=True,
    )
    return ModelConfig(text, family="gemma", bos_token_id=2, eos_token_id=1, pad_token_id=0)


def qwen2_7b() -> ModelConfig:
    """Qwen2-7B, the decoder of Pangea: 7,615,616,512 parameters."""
    text = TextConfig(152064, 3584, 18944, 28, 28, 4, 128)
    return ModelConfig(text, family="qwen2", bos_token_id=151643, eos_token_id=151645)


def qwen2_vl_7b() -> ModelConfig:
    """Qwen2-VL-7B, the base of AIN: 8,291,375,616 parameters."""
    return ModelConfig(
        text=TextConfig(152064, 3584, 18944, 28, 28, 4, 128, mrope_section=(16, 24, 24)),
        vision=VisionConfig(width=1280, layers=32, heads=16, mlp_width=5120),
        **hf_families.QWEN2_IDS,
    )


def pangea_7b() -> ModelConfig:
    """Pangea-7B: CLIP ViT-L/14-336 and Qwen2-7B-Instruct, joined as LLaVA-NeXT (arXiv 2410.16153, section 4).

    Its tokenizer has no placeholder for pictures; here it takes the first row that the base leaves free.
    """
    text = qwen2_7b().text
    ids = {"bos_token_id": 151643, "eos_token_id": 151645, "image_token_id": 151646}
    return ModelConfig(text, ClipConfig(), "llava_next", "qwen2", **ids)


PUBLISHED: Mapping[str, Callable[[], ModelConfig]] = {
    "llama_2_7b": lambda: llama_2("7b"),
    "llama_2_13b": lambda: llama_2("13b"),
    "llama_2_70b": lambda: llama_2("70b"),
    "allam_7b": allam_7b,
    "llama_3_8b": llama_3_8b,
    "gemma_7b": gemma_7b,
    "qwen2_7b": qwen2_7b,
    "qwen2_vl_7b": qwen2_vl_7b,
    "pangea_7b": pangea_7b,
}


def _twin(config: ModelConfig, vocabulary: int, heads: int = 4, kv_heads: int = 2, head_width: int = 16) -> ModelConfig:
    """A published model in small, every setting but its sizes and its ids as it is."""
    sizes = {"width": 64, "mlp_width": 128, "layers": 2, "heads": heads, "kv_heads": kv_heads, "head_width": head_width}
    turned = {"mrope_section": (2, 3, 3)} if config.text.mrope_section else {}
    text = dataclasses.replace(config.text, vocabulary=vocabulary, **sizes, **turned)
    tower: dict[str, Any] = {"width": 32, "layers": 3, "heads": 2, "mlp_width": 128}
    if isinstance(config.vision, ClipConfig):
        grids = tuple((28 * rows // 336, 28 * columns // 336) for rows, columns in config.vision.pinpoints)
        tower |= {"tile": 28, "pinpoints": grids}
    vision = dataclasses.replace(config.vision, **tower) if config.vision else None
    # The id of a placeholder is its tokenizer's, as all ids are: any that is there will do.
    ids = {name: 0 for name, value in config.token_ids().items() if value is not None}
    return dataclasses.replace(config, text=text, vision=vision, **ids)


# Published models in small, for the twins of experiments; `python -m ain_jax.twins` writes folders of them.
TWINS: Mapping[str, Callable[[], ModelConfig]] = {
    "llama_2_twin": lambda: _twin(llama_2("7b"), 32000, kv_heads=4),
    "allam_twin": lambda: _twin(allam_7b(), 32000, kv_heads=4),
    "llama_3_twin": lambda: _twin(llama_3_8b(), 2048),
    "gemma_twin": lambda: _twin(gemma_7b(), 2048, kv_heads=4, head_width=32),
    "qwen2_twin": lambda: _twin(qwen2_7b(), 2048),
    "qwen2_vl_twin": lambda: _twin(qwen2_vl_7b(), 2048),
    "pangea_twin": lambda: _twin(pangea_7b(), 2048),
}


def published(name: str) -> ModelConfig:
    """The published sizes of a name, "qwen2_vl_7b", or those of a twin; ValueError with the names that there are."""
    known = {**PUBLISHED, **TWINS}
    if name not in known:
        raise ValueError(f"no published sizes {name!r}: {nearest(name, list(known))}")
    return known[name]()


def _size(family: str, size: str, sizes: dict[str, tuple[int, ...]]) -> tuple[int, ...]:
    if size not in sizes:
        raise ValueError(f"no {family} of size {size!r}; expected one of {', '.join(sizes)}")
    return sizes[size]


def tiny(
    vocabulary: int = 192, tied: bool = True, vision: bool = True, width: int = 32, layers: int = 2, **text: Any
) -> ModelConfig:
    """A Qwen2-VL of some thousand parameters, for tests: grouped heads, biases, patches of 4 pixels."""
    settings: dict[str, Any] = {
        "vocabulary": vocabulary,
        "width": width,
        "mlp_width": 3 * width,
        "layers": layers,
        "heads": 4,
        "kv_heads": 2,
        "head_width": width // 4,
        "mrope_section": (width // 8 - 2 * (width // 24), width // 24, width // 24),
        "rope_theta": 10_000.0,
        "tied": tied,
        "max_positions": 512,
    }
    return ModelConfig(
        text=TextConfig(**(settings | text)),
        vision=VisionConfig(width=24, layers=2, heads=2, mlp_width=96, patch_size=4) if vision else None,
        image_token_id=vocabulary - 3,
        video_token_id=vocabulary - 2,
        vision_start_token_id=vocabulary - 5,
        vision_end_token_id=vocabulary - 4,
        eos_token_id=vocabulary - 6,
        pad_token_id=vocabulary - 1,
    )


def from_hf(attributes: dict[str, Any]) -> ModelConfig:
    """The config that a `config.json` describes; what we neither handle nor find at its default is refused by name."""
    found = hf_config.read(attributes)
    text, vision = found.pop("text"), found.pop("vision")
    tower = ClipConfig if found["family"] == "llava_next" else VisionConfig
    try:
        if text["rope_scaling"] is not None:
            text["rope_scaling"] = RopeScaling(**text["rope_scaling"])
        return ModelConfig(TextConfig(**text), tower(**vision) if vision else None, **found)
    except ValueError as error:
        raise ValueError(f"config.json: {error}") from error


def to_hf(config: ModelConfig, dtype: str = "float32") -> dict[str, Any]:
    """The `config.json` in the flat published layout, which transformers 4.51 and 5 both open to the same model.

    What the family cannot say is refused: the file, read again, must give the same config.
    """
    written = hf_config.write(config, dtype)
    was, now = (dict(_fields(c)) for c in (config, from_hf(written)))
    lost = [
        f"{name}={was.get(name)!r} becomes {now.get(name)!r}" for name in was | now if was.get(name) != now.get(name)
    ]
    if lost:
        raise ValueError(f"these settings have no place in the config.json of a {config.family}: " + "; ".join(lost))
    return written


def _fields(config: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """(name, value) of every setting, those of inner configs too: ("vision.norm_eps", 1e-6)."""
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if dataclasses.is_dataclass(value):
            yield from _fields(value, f"{prefix}{field.name}.")
        else:
            yield prefix + field.name, value


def _stop(what: str, faults: list[str]) -> None:
    if faults:
        raise ValueError(f"{what}: " + "; ".join(faults))
