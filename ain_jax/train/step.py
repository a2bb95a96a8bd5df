"""One update: gradients, accumulation, clipping, metrics."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from ain_jax.train import optimizer as optimizer_module
from ain_jax.train.losses import Loss, Sums
from ain_jax.train.state import TrainState

Update = Callable[[TrainState, Any, Any, Any], tuple[TrainState, Sums, jax.Array]]


def make_update(loss: Loss, optimizer: optax.GradientTransformation, rates: Any, accumulate: int = 1) -> Update:
    """`update(state, frozen, batch, key)` -> the new state, the sums of the loss, the gradient's norm.

    The rows of the batch are cut into `accumulate` parts, whose gradients are summed before the one division by the
    count of all: 8 rows in one part and 1 row in 8 parts give the same update.
    """

    def gradient(params, frozen, batch, key):
        def scalar(trained):
            sums = loss(optimizer_module.freeze(trained, rates), frozen, batch, key)
            return sums.loss, sums

        return jax.grad(scalar, has_aux=True)(params)

    def update(state: TrainState, frozen: Any, batch: Any, key: jax.Array):
        key = jax.random.fold_in(key, state.step)
        if accumulate == 1:
            gradients, sums = gradient(state.params, frozen, batch, key)
        else:
            # Every so manieth row, not a block of them: each part then lies spread over the devices as the whole does.
            part = lambda x: x.reshape(x.shape[0] // accumulate, accumulate, *x.shape[1:]).swapaxes(0, 1)
            parts = jax.tree.map(part, batch)
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
        updates, opt_state = optimizer.update(gradients, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        return TrainState(state.step + 1, params, opt_state), sums, norm

    return jax.jit(update, donate_argnums=(0,))
