"""One update: gradients, accumulation, clipping, rounding, metrics."""

from typing import Any

import jax
import jax.numpy as jnp
import optax

from ain_jax import sharding
from ain_jax.train import optimizer as optimizer_module
from ain_jax.train.losses import Loss
from ain_jax.train.state import TrainState, float32

Update = jax.stages.Wrapped  # (state, frozen, batch, key) -> (state, sums, norm); may be lowered for other devices

ROUNDING = 0x5EED  # folded into the key of a step, for the bits that rounding draws


def make_update(
    loss: Loss,
    optimizer: optax.GradientTransformation,
    rates: Any,
    accumulate: int = 1,
    layout: TrainState | None = None,
    skip_bad: bool = False,
) -> Update:
    """`update(state, frozen, batch, key)` -> the new state, the sums of the loss, the gradient's norm.

    The rows of the batch are cut into `accumulate` parts, whose gradients are summed before the one division by the
    count of all: 8 rows in one part and 1 row in 8 parts give the same update.

    Sums of gradients, the optimiser's state and its arithmetic are float32 whatever the dtype of the parameters; those
    in bfloat16 are rounded up or down by chance (`rounded`), the chance following from key and step. With a `layout`
    (`state.layout`) gradients and the new state lie as it says.

    With `skip_bad` a step whose loss or gradients are not finite is counted and changes nothing else; the norm tells
    the loop. It is asked for because it is another program, which a CPU rounds otherwise in the last digit.
    """
    # On one device there is nothing to say, and saying it would part what the compiler otherwise fuses.
    alone = layout is None or len(layout.step.sharding.device_set) == 1
    places = None if alone else jax.tree.map(lambda leaf: leaf.sharding, layout)

    def gradient(params, frozen, batch, key):
        def scalar(trained):
            sums = loss(optimizer_module.freeze(trained, rates), frozen, batch, key)
            return sums.loss, sums

        gradients, sums = jax.grad(scalar, has_aux=True)(params)
        gradients = float32(gradients)
        if places is not None:
            gradients = jax.lax.with_sharding_constraint(gradients, places.params)
        return gradients, sums

    def update(state: TrainState, frozen: Any, batch: Any, key: jax.Array):
        key = jax.random.fold_in(key, state.step)
        if accumulate == 1:
            gradients, sums = gradient(state.params, frozen, batch, key)
        else:
            parts = jax.tree.map(lambda x: _parts(x, accumulate), batch)
            keys = jax.random.split(key, accumulate)
            shapes = jax.eval_shape(gradient, state.params, frozen, jax.tree.map(lambda x: x[0], parts), keys[0])
            zero = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)

            def add(total, part_and_key):
                part, part_key = part_and_key
                return jax.tree.map(jnp.add, total, gradient(state.params, frozen, part, part_key)), None

            (gradients, sums), _ = jax.lax.scan(add, zero, (parts, keys))
        # A batch without a learnt token is refused on the host; the guard keeps a resumed padding row finite.
        gradients = jax.tree.map(lambda g: g / jnp.maximum(sums.count, 1.0).astype(g.dtype), gradients)
        norm = optax.global_norm(gradients)
        params = float32(state.params)
        updates, opt_state = optimizer.update(gradients, state.opt_state, params)
        params = rounded_like(optax.apply_updates(params, updates), state.params, jax.random.fold_in(key, ROUNDING))
        if skip_bad:
            good = jnp.isfinite(norm) & jnp.isfinite(sums.loss)
            after, before = (params, opt_state), (state.params, state.opt_state)
            params, opt_state = jax.tree.map(lambda new, old: jnp.where(good, new, old), after, before)
        return TrainState(state.step + 1, params, opt_state), sums, norm

    return jax.jit(update, donate_argnums=(0,), out_shardings=None if places is None else (places, None, None))


def _parts(x: jax.Array, accumulate: int) -> jax.Array:
    """The rows of an array in parts. Every so manieth row, not a block of them: each part then lies spread over the
    devices as the whole does. ValueError: a part has fewer rows than there are devices to spread them over.
    """
    rows, shared = x.shape[0] // accumulate, sharding.row_parts()
    if rows % shared:
        raise ValueError(
            f"Trainer.rows = {x.shape[0]} in Trainer.accumulate = {accumulate} parts makes {rows} rows a part, which "
            f"{shared} devices cannot share equally: change rows, accumulate or Mesh"
        )
    parts = x.reshape(rows, accumulate, *x.shape[1:]).swapaxes(0, 1)
    return sharding.constrain(parts, (None, "rows", *[None] * (x.ndim - 1)))


def rounded_like(values: Any, like: Any, key: jax.Array) -> Any:
    """The tree `values`, float32, in the dtypes of `like`; see `rounded`. Each leaf draws bits of its own."""
    leaves, tree = jax.tree.flatten(values)
    dtypes = [leaf.dtype for leaf in jax.tree.leaves(like)]
    return tree.unflatten(
        [
            leaf if dtype == leaf.dtype else rounded(leaf, dtype, jax.random.fold_in(key, i))
            for i, (leaf, dtype) in enumerate(zip(leaves, dtypes, strict=True))
        ]
    )


def rounded(x: jax.Array, dtype: Any, key: jax.Array) -> jax.Array:
    """`x`, float32, as bfloat16: one of its two neighbours, each the more likely the nearer it is; the mean is `x`.

    1.0 + 0.001 lies between 1 and 1.0078125: the upper one 128 times in 1000, where rounding to the nearest would never
    move. So updates that are far smaller than a step of bfloat16 (2^-8 of the value) add up all the same (stochastic
    rounding: arXiv 1502.02551, section 3.1; for language models 2010.06192). What bfloat16 can say stays as it is.
    """
    if jnp.dtype(dtype) != jnp.bfloat16 or x.dtype != jnp.float32:
        raise ValueError(f"parameters of {jnp.dtype(dtype)}, updates of {x.dtype}: expected bfloat16 and float32")
    # bfloat16 is the upper half of a float32: what is added to the lower half carries over by that chance.
    drawn = jax.random.bits(key, x.shape, jnp.uint16).astype(jnp.uint32)
    bits = (jax.lax.bitcast_convert_type(x, jnp.uint32) + drawn) >> 16
    up_or_down = jax.lax.bitcast_convert_type(bits.astype(jnp.uint16), jnp.bfloat16)
    return jnp.where(jnp.isfinite(x), up_or_down, x.astype(jnp.bfloat16))
