"""The sizes of a model, as frozen dataclasses, and their Hugging Face spelling.

A `ModelConfig` says what the parameters are; how they are computed with (dtype, rematerialisation) is an argument of
the model, so that one checkpoint can be opened either way.
"""

import dataclasses
from dataclasses import dataclass
from typing import Any

from ain_jax.models import hf_config


@dataclass(frozen=True)
class TextConfig:
    """Sizes and settings of the decoder. Llama, Qwen2 and Gemma are settings of it."""

    vocabulary: int  # V, rows of the embedding, padding rows included
    width: int  # D
    mlp_width: int  # F
    layers: int
    heads: int  # N, query heads
    kv_heads: int  # K, key/value heads; G = N / K query heads share one
    head_width: int  # H
    rope_theta: float = 1_000_000.0
    mrope_section: tuple[int, ...] | None = None  # frequencies turned by (time, height, width); None: plain positions
    norm_eps: float = 1e-6
    qkv_bias: bool = True
    tied: bool = False  # the head is the embedding
    max_positions: int = 32768

    def __post_init__(self):
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
        _stop("TextConfig", faults)


@dataclass(frozen=True)
class VisionConfig:
    """Sizes of the image encoder of Qwen2-VL; its output has the decoder's width."""

    width: int  # E
    layers: int
    heads: int
    mlp_width: int
    patch_size: int = 14  # pixels
    temporal_patch_size: int = 2  # frames; a still picture is repeated
    merge_size: int = 2  # merge_size x merge_size patches make one feature
    channels: int = 3
    norm_eps: float = 1e-6

    @property
    def patch_values(self) -> int:
        """Values of one flattened patch, C = channels x frames x height x width."""
        return self.channels * self.temporal_patch_size * self.patch_size**2

    @property
    def head_width(self) -> int:
        return self.width // self.heads

    def __post_init__(self):
        faults = []
        if self.width % self.heads or self.head_width % 4:
            faults.append(
                f"width={self.width} over heads={self.heads} must give a head width divisible by 4 "
                "(half of it turns with the height, half with the width, in pairs)"
            )
        _stop("VisionConfig", faults)


@dataclass(frozen=True)
class ModelConfig:
    """A decoder, perhaps with an image encoder, and the ids that join the two."""

    text: TextConfig
    vision: VisionConfig | None = None
    image_token_id: int = 151655
    video_token_id: int = 151656
    vision_start_token_id: int = 151652
    vision_end_token_id: int = 151653
    bos_token_id: int | None = None
    eos_token_id: int | None = None
    pad_token_id: int | None = None

    def __post_init__(self):
        faults = [
            f"{name}={value} lies outside the vocabulary of {self.text.vocabulary} rows"
            for name, value in self.token_ids().items()
            if value is not None and not 0 <= value < self.text.vocabulary
        ]
        _stop(
            "ModelConfig",
            faults
            if self.vision
            else [fault for fault in faults if "vision" not in fault and "image" not in fault and "video" not in fault],
        )

    def token_ids(self) -> dict[str, int | None]:
        """Every special id by its name."""
        names = [field.name for field in dataclasses.fields(self) if field.name.endswith("_token_id")]
        return {name: getattr(self, name) for name in names}


def qwen2_vl_7b() -> ModelConfig:
    """Qwen2-VL-7B, AIN's base: 8,291,375,616 parameters."""
    return ModelConfig(
        text=TextConfig(
            vocabulary=152064,
            width=3584,
            mlp_width=18944,
            layers=28,
            heads=28,
            kv_heads=4,
            head_width=128,
            mrope_section=(16, 24, 24),
        ),
        vision=VisionConfig(width=1280, layers=32, heads=16, mlp_width=5120),
        bos_token_id=151643,
        eos_token_id=151645,
    )


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
    text, vision, ids = hf_config.read(attributes)
    return ModelConfig(text=TextConfig(**text), vision=VisionConfig(**vision), **ids)


def to_hf(config: ModelConfig, dtype: str = "float32") -> dict[str, Any]:
    """The `config.json` in the flat published layout, which transformers 4.51 and 5 both open to the same model."""
    return hf_config.write(config, dtype)


def _stop(what: str, faults: list[str]) -> None:
    if faults:
        raise ValueError(f"{what}: " + "; ".join(faults))
