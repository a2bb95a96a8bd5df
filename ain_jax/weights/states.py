"""Plain texts through a model: the hidden states that its head reads, and what the head makes of them."""

from collections.abc import Iterator, Mapping
from functools import lru_cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ain_jax.models.config import ModelConfig
from ain_jax.models.multimodal import MultimodalModel

ROWS = 8  # texts of one call


def hidden_states(model: Any, params: Mapping[str, Any], tokens_BL: Any, lengths_B: Any) -> jax.Array:
    """hidden_BLD behind the last norm; each row is one text of so many tokens, and what follows it is padding."""
    at_L = jnp.arange(tokens_BL.shape[1], dtype=jnp.int32)
    segments_BL = (at_L[None, :] < lengths_B[:, None]).astype(jnp.int32)
    positions_3BL = jnp.broadcast_to(at_L, (3, *tokens_BL.shape))
    return model.apply({"params": params}, tokens_BL, segments_BL, positions_3BL, method="hidden")


def text_states(
    config: ModelConfig, params: Mapping[str, Any], tokens_NL: np.ndarray, lengths_N: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """(hidden_TD, targets_T) of every token but the first of each text: the state before it, and its id."""
    params = jax.tree.map(jnp.asarray, params)  # on the device, once for all calls
    states, targets = [np.zeros((0, config.text.width), np.float32)], [np.zeros(0, np.int32)]
    for tokens_BL, lengths_B in _batches(tokens_NL, lengths_N):
        hidden_BLD = np.asarray(_hidden(config)(params, tokens_BL, lengths_B), np.float32)
        known_BL = np.arange(1, tokens_BL.shape[1])[None, :] < lengths_B[:, None]
        states.append(hidden_BLD[:, :-1][known_BL])
        targets.append(tokens_BL[:, 1:][known_BL])
    return np.concatenate(states), np.concatenate(targets)


def text_nats(
    config: ModelConfig, params: Mapping[str, Any], tokens_NL: np.ndarray, lengths_N: np.ndarray
) -> tuple[float, int]:
    """(nats, tokens): the summed negative log-probability of all tokens but each text's first, and their number."""
    params = jax.tree.map(jnp.asarray, params)
    total, count = 0.0, 0
    for tokens_BL, lengths_B in _batches(tokens_NL, lengths_N):
        total += float(_nats(config)(params, tokens_BL, lengths_B))
        count += int(np.maximum(lengths_B - 1, 0).sum())
    return total, count


def _batches(tokens_NL: np.ndarray, lengths_N: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Rows in groups of one size, the last filled with empty texts: one shape is compiled."""
    for start in range(0, len(tokens_NL), ROWS):
        tokens_BL, lengths_B = tokens_NL[start : start + ROWS], lengths_N[start : start + ROWS]
        missing = ROWS - len(tokens_BL)
        yield np.pad(tokens_BL, ((0, missing), (0, 0))), np.pad(lengths_B, (0, missing))


@lru_cache(maxsize=8)
def _hidden(config: ModelConfig) -> Any:
    model = MultimodalModel(config)
    return jax.jit(lambda params, tokens_BL, lengths_B: hidden_states(model, params, tokens_BL, lengths_B))


@lru_cache(maxsize=8)
def _nats(config: ModelConfig) -> Any:
    model: Any = MultimodalModel(config)

    def nats(params, tokens_BL, lengths_B):
        hidden_BLD = hidden_states(model, params, tokens_BL, lengths_B)

        def of_row(row):  # one row's logits at a time: a large vocabulary times all rows would fill the memory
            hidden_LD, tokens_L, length = row
            logits_LV = model.apply({"params": params}, hidden_LD[:-1], method="logits")
            chosen_L = jnp.take_along_axis(logits_LV, tokens_L[1:, None], axis=-1)[:, 0]
            known_L = jnp.arange(1, tokens_L.shape[0]) < length
            return jnp.where(known_L, jax.nn.logsumexp(logits_LV, axis=-1) - chosen_L, 0.0).sum()

        return jax.lax.map(of_row, (hidden_BLD, tokens_BL, lengths_B)).sum()

    return jax.jit(nats)
