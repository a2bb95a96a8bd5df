"""The settings of a stage's model, and the sizes that they come to."""

import dataclasses
from pathlib import Path
from typing import Any, Literal

import jax

from ain_jax.data.images import ImageSettings
from ain_jax.models.config import ModelConfig, TextConfig, VisionConfig, published
from ain_jax.models.multimodal import abstract_params
from ain_jax.tokenizer.extend import padded_vocab
from ain_jax.train.optimizer import path_name


@dataclasses.dataclass(frozen=True)
class Model:
    """The model: a published folder, whose sizes, weights, tokenizer and image settings are taken, or sizes.

    Of sizes a Qwen2-VL is made; ids and the number of rows come from the extended tokenizer. With the stage
    extend_tokenizer a published model's rows grow by its new pieces: into its spare rows first, then by a multiple.

    `size` names the published sizes that `folder` is expected to hold ("qwen2_vl_7b", see `config.PUBLISHED`): a folder
    of another model is refused, and a plan needs no folder. Without a folder such a model begins at random weights.

    With `vision_folder`, a published CLIP, `folder` is a language model, and the two are joined as a LLaVA-NeXT, whose
    projector begins at random.
    """

    folder: str = ""  # as transformers saves it
    origin: str = ""  # where to get it from, told where it is not there: "Qwen/Qwen2-VL-7B-Instruct on ..."
    vision_folder: str = ""
    vision_origin: str = ""
    size: str = ""
    width: int = 0
    layers: int = 0
    heads: int = 0
    kv_heads: int = 0
    mlp_width: int = 0
    vision_width: int = 0
    vision_layers: int = 0
    vision_heads: int = 0
    tied: bool = True
    rope_theta: float = 10_000.0
    mrope_section: tuple[int, int, int] | None = None  # None: half the frequencies for time, a quarter for each side
    max_positions: int = 4096
    vocabulary_multiple: int = 64  # rows of the embedding are padded to a multiple
    # What is kept for the backward pass, see layers.REMAT
    remat: Literal["none", "full", "offload", "attention", "minimal", "offload_minimal", "dots"] = "none"
    dtype: Literal["float32", "bfloat16"] = "float32"  # of activations and matrix products; sums stay in float32
    param_dtype: Literal["float32", "bfloat16"] = "float32"  # of stored parameters; an optimiser's state is float32
    attention: Literal["auto", "xla", "splash", "cudnn", "tokamax"] = "auto"  # "auto": by the mesh's devices

    def __post_init__(self):
        how = ("folder", "origin", "vision_folder", "vision_origin", "size", "remat", "dtype", "param_dtype")
        sizes = [f for f in dataclasses.fields(self) if f.name not in (*how, "attention", "vocabulary_multiple")]
        if self.size:
            published(self.size)
        if self.vision_folder and not self.folder:
            raise ValueError(
                f"vision_folder = {self.vision_folder!r} without folder: give the language model that it is joined with"
            )
        if self.folder or self.size:
            given = [f.name for f in sizes if getattr(self, f.name) != f.default]
            what = f"folder = {self.folder!r}" if self.folder else f"size = {self.size!r}"
            if given:
                raise ValueError(f"{what} has sizes of its own: leave {', '.join(given)} out")
            return
        missing = [f.name for f in sizes if f.default == 0 and getattr(self, f.name) < 1]
        if missing:
            raise ValueError(f"{', '.join(missing)}: expected 1 or more each, or folder, a published model")
        if self.width % self.heads:
            raise ValueError(f"width = {self.width} is no multiple of heads = {self.heads}")


@dataclasses.dataclass(frozen=True)
class Start:
    """The weights that a stage begins with: those of an earlier stage's last step, or ("") the model's own.

    The model's own are those of `Model.folder`, or random ones.
    """

    stage: str = ""


def drawn(size: str, tokenizer: Any, multiple: int) -> ModelConfig:
    """Published sizes for weights that begin at random, with the ids of a tokenizer and rows for them."""
    config = published(size)
    if config.vision is not None:
        raise ValueError(
            f"Model.size = {size!r} without folder: a model that sees begins at random by sizes of its own "
            "(width, layers ...); give the folder where its weights lie, or will lie"
        )
    rows = padded_vocab(len(tokenizer), multiple)
    ids = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "pad")}
    return dataclasses.replace(config, text=dataclasses.replace(config.text, vocabulary=rows), **ids)


def sized(m: Model, images: ImageSettings, ids: int, **token_ids: Any) -> ModelConfig:
    """A Qwen2-VL of these sizes, with rows for so many ids."""
    half = m.width // m.heads // 2
    text = TextConfig(
        vocabulary=padded_vocab(ids, m.vocabulary_multiple),
        width=m.width,
        mlp_width=m.mlp_width,
        layers=m.layers,
        heads=m.heads,
        kv_heads=m.kv_heads,
        head_width=m.width // m.heads,
        rope_theta=m.rope_theta,
        tied=m.tied,
        max_positions=m.max_positions,
        mrope_section=m.mrope_section or (half - 2 * (half // 4), half // 4, half // 4),
    )
    vision = VisionConfig(
        width=m.vision_width,
        layers=m.vision_layers,
        heads=m.vision_heads,
        mlp_width=4 * m.vision_width,
        patch_size=images.patch_size,
        merge_size=images.merge_size,
        temporal_patch_size=images.temporal_patch_size,
    )
    return ModelConfig(text, vision, **token_ids)


def refuse_another(config: ModelConfig, size: str, folder: Path) -> None:
    """ValueError where the parameters of a folder are not those of a published size."""
    theirs, ours = (
        {path_name(path): leaf.shape for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}
        for tree in (abstract_params(config), abstract_params(published(size)))
    )
    names = theirs | ours
    other = [f"{name} {theirs.get(name)} not {ours.get(name)}" for name in names if theirs.get(name) != ours.get(name)]
    if other:
        raise ValueError(
            f"Model.folder = {str(folder)!r} is no {size}, which Model.size names: {'; '.join(other[:3])}"
            + (f" and {len(other) - 3} more" if len(other) > 3 else "")
        )


def absent(setting: str, path: str, origin: str, wanted: str = "the folder of a published model") -> str:
    """That a setting names a path where nothing lies, and what to get from where."""
    to_do = f"{origin}, into {path}" if origin else f"no such file or folder; give {wanted}"
    return f"{setting} = {path!r} is not there: {to_do}"
