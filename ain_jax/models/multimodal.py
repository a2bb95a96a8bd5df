"""The whole forward: token embeddings, image features in their places, the decoder, the head.

    model = MultimodalModel(config)
    hidden_BLD = model.apply({"params": params}, tokens_BL, segments_BL, positions_3BL, ...)
    logits_TV = model.apply({"params": params}, hidden_TD, method="logits")

The parameters are one plain nested dict: `model/embed_tokens`, `model/layers` (stacked on axis 0), `model/norm`,
`visual/patch_embed`, `visual/blocks` (stacked), `visual/merger` and, where the head is not tied, `lm_head`. A path is
the published name without the number of the layer. Where windowed and full layers take turns and the last turn is cut
short, its layers are stacked in `model/last_layers`.
"""

import math
from functools import lru_cache, partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from ain_jax.models.attention import attention
from ain_jax.models.clip import TileFeatures
from ain_jax.models.config import ClipConfig, ModelConfig
from ain_jax.models.layers import Declared, Embedding
from ain_jax.models.text import Attend, Decoder
from ain_jax.models.vision import VisionTower
from ain_jax.sharding import constrain


class MultimodalModel(nn.Module):
    """Hidden states of packed rows (`hidden`, or calling it) and their logits (`logits`)."""

    config: ModelConfig
    dtype: Any = jnp.float32  # of activations and matrix products; sums and softmax stay in float32
    remat: str = "none"  # a name in layers.REMAT
    longest_image: int | None = None  # no picture has more patches than this: quicker attention; NaN where it is broken
    attention: str | tuple[str, ...] = "xla"  # backends to try in turn, see `attention.resolve`

    def setup(self):
        c = self.config
        self.model = Decoder(c.text, self.dtype, self.remat)
        if isinstance(c.vision, ClipConfig):
            self.visual = TileFeatures(c.vision, c.text.width, self.dtype, self.remat, self.attention)
        elif c.vision:
            self.visual = VisionTower(
                c.vision, c.text.width, self.dtype, self.remat, self.longest_image, self.attention
            )
        if not c.text.tied:
            self.lm_head = Embedding(
                c.text.vocabulary, c.text.width, stddev=c.text.width**-0.5, dtype=self.dtype, head=True
            )

    def __call__(self, *batch, **fields):
        return self.hidden(*batch, **fields)

    def hidden(
        self,
        tokens_BL,
        segments_BL,
        positions_3BL,
        feature_index_BL=None,
        patches_BPK=None,
        patch_positions_BP2=None,
        patch_segments_BP=None,
    ):
        """hidden_BLD after the last norm; conversations packed into one row do not see each other."""
        x_BLD = self.embed(tokens_BL, feature_index_BL, patches_BPK, patch_positions_BP2, patch_segments_BP)
        return self.decode(x_BLD, positions_3BL, packed(segments_BL, self.attention))[0]

    def embed(
        self,
        tokens_BL,
        feature_index_BL=None,
        patches_BPK=None,
        patch_positions_BP2=None,
        patch_segments_BP=None,
    ):
        """x_BLD: each token's row of the embedding, or the image feature that `feature_index_BL` (>= 0) names."""
        x_BLD = self.model.embed(tokens_BL)
        if patches_BPK is None:
            return x_BLD
        assert feature_index_BL is not None, "patches without the places of their features"
        if not self.config.vision:
            raise ValueError("patches were given to a model without an image encoder; use a config with vision")
        tower: Any = self.visual
        places = () if isinstance(self.config.vision, ClipConfig) else (patch_positions_BP2, patch_segments_BP)
        features_BMD = tower(patches_BPK, *places)
        # A token may stand for any feature of its row: they lie whole on each device that has some of its positions.
        features_BMD = constrain(features_BMD, ("rows", None, None))
        feature_index_BL = constrain(feature_index_BL, ("rows", "positions"))
        chosen_BLD = jnp.take_along_axis(features_BMD, jnp.maximum(feature_index_BL, 0)[:, :, None], axis=1)
        chosen_BLD = constrain(chosen_BLD, ("rows", "positions", None))
        return jnp.where(feature_index_BL[:, :, None] >= 0, chosen_BLD, x_BLD)

    def decode(self, x_BLD, positions_3BL, attend: Attend, memory=None):
        """(hidden_BLD, memory) with what `attend` keeps of every layer; see `generate.py`."""
        return self.model(x_BLD, positions_3BL, attend, memory)

    def logits(self, hidden):
        """Logits in float32, of any leading axes: give the hidden states of learnt positions alone to save work."""
        logits, cap = self._head().scores(hidden), self.config.text.logit_softcap
        return logits if cap is None else cap * jnp.tanh(logits / cap)

    def head(self, hidden):
        """(pairs, cap): logits are cap(sum of y @ w.T over the pairs (y, w)), for losses that never hold them all."""
        return self._head().factors(hidden), self.config.text.logit_softcap

    def _head(self) -> Embedding:
        return self.model.embed_tokens if self.config.text.tied else self.lm_head

    def declare(self, *batch):
        """Touches every parameter once; for `init`."""
        return self.logits(self.hidden(*batch))


def packed(segments_BL, backend: str | tuple[str, ...] = "xla") -> Attend:
    """What training attends with: the row itself, causally, each segment alone, nothing remembered."""
    attend = partial(attention, segments_BL=segments_BL, causal=True, backend=backend)
    return lambda q_BLNH, k_BLKH, v_BLKH, memory, **rules: (attend(q_BLNH, k_BLKH, v_BLKH, **rules), memory)


def init_params(config: ModelConfig, key, layout: Any = None, part: str = "") -> dict[str, Any]:
    """Fresh parameters as one plain nested dict: float32 on one device, or as a layout says, the tree of
    ShapeDtypeStructs with dtype and sharding that `sharding.layout` makes. With `part` those under that name alone.

    Each is drawn by its declared initializer on the host, from the key and its own place in the tree: the same on any
    number of devices and any version of jax, and nothing is compiled (XLA takes half a second for each shape). The host
    holds one of them at a time, and no device more than its part.
    """
    declared = _declarations(config)
    declared = {part: declared[part]} if part else declared
    boxes, tree = jax.tree.flatten(declared, is_leaf=lambda x: isinstance(x, Declared))
    layout = {part: layout[part]} if part and layout is not None else layout
    places = [None] * len(boxes) if layout is None else tree.flatten_up_to(layout)
    seed = np.asarray(jax.random.key_data(key)).tolist()

    def made(i: int) -> jax.Array:
        drawn, place = boxes[i].initializer.draw(np.random.default_rng([*seed, i]), boxes[i].value.shape), places[i]
        if place is None:
            return jnp.asarray(drawn)
        drawn = drawn.astype(place.dtype)
        return jax.block_until_ready(jax.make_array_from_callback(drawn.shape, place.sharding, lambda at: drawn[at]))

    return tree.unflatten([made(i) for i in range(len(boxes))])


def abstract_params(config: ModelConfig, dtype: Any = jnp.float32) -> dict[str, Any]:
    """Shapes of the parameters, stored as `dtype`, as the same tree of `jax.ShapeDtypeStruct`."""
    return jax.tree.map(lambda s: jax.ShapeDtypeStruct(s.shape, dtype), nn.meta.unbox(_declarations(config)))


def axis_names(config: ModelConfig) -> dict[str, Any]:
    """Names of the axes of every parameter, as the same tree of tuples: ("layers", "embed", "heads", "head") ..."""
    return jax.tree.map(lambda box: box.names, _declarations(config), is_leaf=lambda x: isinstance(x, Declared))


def parameter_count(config: ModelConfig) -> int:
    """How many numbers the declared shapes hold; a tied head counts once."""
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(abstract_params(config)))


@lru_cache
def _declarations(config: ModelConfig) -> dict[str, Any]:
    """The tree of `Declared`, its values shapes only: the modules run on one token and one merged patch, abstractly."""
    one_BL = jnp.zeros((1, 1), jnp.int32)
    batch: list[Any] = [one_BL, one_BL, jnp.zeros((3, 1, 1), jnp.int32)]
    if config.vision:
        P = config.vision.tile_patches if isinstance(config.vision, ClipConfig) else config.vision.merge_size**2
        patches = jnp.zeros((1, P, config.vision.patch_values), jnp.float32)
        batch += [one_BL, patches, jnp.zeros((1, P, 2), jnp.int32), jnp.zeros((1, P), jnp.int32)]
    model = MultimodalModel(config)
    return jax.eval_shape(lambda key: model.init(key, *batch, method="declare"), jax.random.key(0))["params"]
