"""Tiny random models of transformers, and conversations with and without pictures."""

from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from families import QWENS, felt

from ain_jax.models.config import ModelConfig, to_hf
from ain_jax.weights.export import write_json


@pytest.fixture(autouse=True)
def strict():
    with jax.numpy_rank_promotion("raise"), jax.numpy_dtype_promotion("strict"):
        yield


@dataclass(frozen=True)
class Reference:
    """A model of transformers with random weights, and the folder it was saved to."""

    model: Any
    config: ModelConfig
    folder: Path


@pytest.fixture(scope="session", params=QWENS)
def reference(request, tmp_path_factory) -> Reference:
    return make_reference(QWENS[request.param], tmp_path_factory.mktemp("reference"))


@pytest.fixture(scope="session")
def untied(tmp_path_factory) -> Reference:
    return make_reference(QWENS["untied"], tmp_path_factory.mktemp("untied"))


@pytest.fixture(scope="session")
def windowed(build_once) -> Reference:
    return build_once(QWENS["qwen 2.5"])


def make_reference(config: ModelConfig, folder: Path) -> Reference:
    """Weights so large that the logits have a standard deviation of 1 or more, and every bias and norm is felt."""
    torch = pytest.importorskip("torch")
    import transformers

    written = to_hf(config)
    write_json(folder / "config.json", written)
    settings = transformers.AutoConfig.from_pretrained(folder, attn_implementation="eager")
    model = getattr(transformers, written["architectures"][0])(settings).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, weight in sorted(model.named_parameters()):
            normal = torch.randn(weight.shape, generator=generator)
            weight.copy_(felt(name, normal, config.text.norm_plus_one))
    model.save_pretrained(folder)
    return Reference(model, config, folder)


@dataclass(frozen=True)
class Conversation:
    tokens: list[int]
    grids: tuple[tuple[int, int, int], ...]
    patches: np.ndarray | None


def conversations(config: ModelConfig) -> dict[str, Conversation]:
    """Uneven pictures, several, one, none."""
    start, end, image = config.vision_start_token_id, config.vision_end_token_id, config.image_token_id
    rng = np.random.default_rng(0)

    def conversation(parts: list[Any]) -> Conversation:
        tokens: list[int] = []
        for part in parts:
            if isinstance(part, int):
                tokens.append(part)
            else:
                pad = image if part[0] == 1 else config.video_token_id
                tokens += [start, *[pad] * (int(np.prod(part)) // 4), end]
        grids = tuple(part for part in parts if not isinstance(part, int))
        count = sum(int(np.prod(grid)) for grid in grids)
        patches = rng.normal(size=(count, config.vision.patch_values)).astype(np.float32) if count else None
        return Conversation(tokens, grids, patches)

    return {
        "two uneven pictures": conversation([1, 2, 3, (1, 4, 6), 7, 8, (1, 2, 10), 9, 10, 11]),
        "a picture first": conversation([(1, 8, 4), 20, 21, 22, 23]),
        "three pictures in a row": conversation([5, (1, 2, 2), (1, 4, 2), (1, 2, 8), 6]),
        "a video behind a picture": conversation([5, (1, 4, 2), 6, (2, 6, 2), 7, 8]),
        "no picture": conversation([30, 31, 32, 33, 34, 35, 36]),
    }


@pytest.fixture
def talk():
    return conversations


@pytest.fixture(scope="session")
def build_once(tmp_path_factory):
    """`make_reference`, each config once."""
    return lru_cache(lambda config: make_reference(config, tmp_path_factory.mktemp("once")))


@pytest.fixture
def build():
    return make_reference
