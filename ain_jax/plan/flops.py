"""Model FLOPs of a stage's step, from its settings; nothing is compiled here."""

import jax

from ain_jax.data.images import ImageSettings
from ain_jax.data.packing import Packing
from ain_jax.models.lora import Lora, targeted
from ain_jax.plan import estimate
from ain_jax.stages.common import StageRun
from ain_jax.train.loop import Trainer
from ain_jax.train.optimizer import Optimizer, path_name, rate_tree


def of_step(run: StageRun, needed: bool) -> dict[str, float]:
    """Model FLOPs of a step over all chips, by part, in one of the two conventions of `estimate`."""
    packing, rows = run.get(Packing), run.get(Trainer).rows
    images = run.images
    picture = packing.row_patches
    if isinstance(images, ImageSettings):
        picture = min(picture, images.max_pixels // images.patch_size**2)
    targets = packing.row_targets or packing.row_tokens
    parts = estimate.forward(run.config, rows, packing.row_tokens, targets, packing.row_patches, picture, needed)
    if not needed:
        return estimate.training(parts, dict.fromkeys(parts, "all"), True)
    learns = {name: _learns(run, part.path) for name, part in parts.items()}
    return estimate.training(parts, learns, bool(_learns(run, "model/embed_tokens")))


def _learns(run: StageRun, path: str) -> str:
    """What learns of the parameters under a path: "all", "adapters", or "" for nothing."""
    adapted = run.get(Lora)
    if adapted.rank:
        return "adapters" if any(p.startswith(path) for p in targeted(adapted, run.config)) else ""
    if run.get(Optimizer).rows == "new":
        return "adapters" if path in ("model/embed_tokens", "lm_head") else ""
    rates = rate_tree(run.layout(), run.get(Optimizer).rates)
    found = [rate for name, rate in jax.tree_util.tree_leaves_with_path(rates) if path_name(name).startswith(path)]
    return "all" if path and any(found) else ""
