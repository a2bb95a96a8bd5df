"""Token distillation (arXiv 2505.20133): rows of new pieces that the model reads as it reads their old spelling.

    teacher   the k i t a b i s      ->  hidden states behind "the", "kitab", "is"
    student   the kitab is           ->  hidden states behind "the", "kitab", "is", drawn to the teacher's

Both are the same frozen model, and only the new rows learn, so an optimiser keeps state for them alone. The loss is the
mean squared distance at the tokens that end the same words, as a share of the teacher's mean square. It is taken behind
the model's last norm, since single components of the states before it are thousands of times larger than the others.

That trains what is read. Where the head is tied the same rows are scored with, and where it is not the head's new rows
get no gradient: `next_token` adds the student's own cross-entropy, which teaches both to score.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import tokenizers

from ain_jax.models.config import ModelConfig
from ain_jax.models.multimodal import MultimodalModel
from ain_jax.tokenizer.align import Aligned, align
from ain_jax.train.rows import put, take
from ain_jax.weights.states import hidden_states

jax.tree_util.register_dataclass(Aligned)  # so that a compiled function takes it as it is


@dataclass(frozen=True)
class Distil:
    """How long, on what and how fast the new rows learn."""

    steps: int = 400
    rows: int = 8  # texts of a step
    tokens: int = 128  # of a text at most, as the old tokenizer cuts it
    layer: int = 0  # whose states are matched, counted from 1; 0 is the last
    rate: float = 0.03  # of the first step, in root mean squares of the old rows; it falls as a cosine
    final_share: float = 0.1  # of the rate, at the last step
    next_token: float = 0.0  # weight of the cross-entropy (nats per token) beside the distance
    seed: int = 0

    def __post_init__(self):
        if min(self.steps, self.rows) < 1 or self.tokens < 2 or self.layer < 0 or not self.rate > 0:
            raise ValueError(
                f"steps = {self.steps}, rows = {self.rows}, tokens = {self.tokens}, layer = {self.layer}, rate = "
                f"{self.rate}: expected 1, 1, 2, 0 and above 0 or more"
            )
        if not 0 <= self.final_share <= 1 or self.next_token < 0:
            raise ValueError(
                f"final_share = {self.final_share}, next_token = {self.next_token}: expected a share, and 0 or more"
            )


def distil(
    params: Mapping[str, Any],
    config: ModelConfig,
    first: int,
    count: int,
    old: tokenizers.Tokenizer,
    new: tokenizers.Tokenizer,
    texts: Sequence[str],
    first_token: int,
    settings: Distil,
    on_step: Callable[[int, float], object] | None = None,
) -> dict[str, Any]:
    """`params` with the rows of the `count` new pieces from id `first` on distilled; all else stays bit for bit.

    `old` and `new` cut the texts for teacher and student. Texts that hold pieces not seen yet come first. A piece that
    no text holds keeps its row. `on_step` is told each step's number, from 1, and its loss.
    """
    if settings.layer > config.text.layers:
        raise ValueError(f"layer = {settings.layer}, and the model has {config.text.layers}; 0 is the last")
    pairs = align(old, new, texts, first_token, settings.tokens)
    fresh_NM = pairs.new_tokens_NM >= first
    useful = np.flatnonzero(fresh_NM.any(axis=1) & (pairs.words_N > 0))
    if not len(useful):
        raise ValueError(f"{len(texts)} texts hold none of the {count} new pieces; give text in their language")
    order = useful[_order(pairs.new_tokens_NM[useful], fresh_NM[useful], settings.seed)]
    places = np.resize(order, (settings.steps, settings.rows))  # over again where the texts run out

    frozen, shorter = lowest_layers(params, config, settings.layer or config.text.layers)
    if settings.next_token and shorter.text.layers != config.text.layers:
        raise ValueError(
            f"next_token = {settings.next_token} needs the head, and layer = {settings.layer} ends before it"
        )
    frozen = jax.tree.map(jnp.asarray, frozen)  # else every step would take it to the device again
    begin, update = _functions(shorter, settings, first)
    rows, state, sizes = begin(take(params, first, count), params)
    for step, chosen in enumerate(places, 1):
        rows, state, loss = update(rows, state, sizes, frozen, pairs[chosen])
        if on_step is not None:
            on_step(step, float(loss))
    return put(params, rows, first)


def lowest_layers(params: Mapping[str, Any], config: ModelConfig, layers: int) -> tuple[dict[str, Any], ModelConfig]:
    """The model's first `layers` layers, with its embedding, its last norm and its head, and their config."""
    if layers == config.text.layers:
        return dict(params), config
    kept = replace(config, text=replace(config.text, layers=layers))
    names = [name for name, _, _ in config.text.stacks()]
    decoder: dict[str, Any] = {name: part for name, part in params["model"].items() if name not in names}
    stacks = [params["model"][name] for name in names]
    whole = jax.tree.map(lambda *parts: jnp.concatenate(parts), *stacks)
    start = 0
    for name, _, number in kept.text.stacks():
        decoder[name] = jax.tree.map(lambda leaf, a=start, b=start + number: leaf[a:b], whole)
        start += number
    return {**params, "model": decoder}, kept


def _order(tokens_KM: np.ndarray, fresh_KM: np.ndarray, seed: int) -> np.ndarray:
    """The texts in random order, round by round: each round takes the texts that hold a piece new to the round."""
    left = np.random.default_rng(seed).permutation(len(tokens_KM)).tolist()
    pieces = [np.unique(tokens[fresh]) for tokens, fresh in zip(tokens_KM, fresh_KM, strict=True)]
    order: list[int] = []
    while left:
        seen, later = np.zeros(int(tokens_KM.max()) + 1, bool), []
        for index in left:
            (later if seen[pieces[index]].all() else order).append(index)
            seen[pieces[index]] = True
        left = later
    return np.array(order)


@lru_cache(maxsize=8)
def _functions(config: ModelConfig, settings: Distil, first: int) -> tuple[Any, Any]:
    """(begin, update), compiled once for each config and shape."""
    model = MultimodalModel(config)
    decay = settings.steps - 1
    rate = optax.cosine_decay_schedule(settings.rate, max(1, decay), settings.final_share)
    # A row is seen in few of the steps: at optax's 0.999 its second moment would lag behind its first, and its first
    # steps be three times too long.
    optimizer = optax.adam(rate, b1=0.9, b2=0.95)

    def begin(rows, params):
        root_mean_square = lambda table_VD: jnp.sqrt(jnp.mean(jnp.square(table_VD.astype(jnp.float32))))
        sizes = jax.tree.map(root_mean_square, take(params, 0, first))
        rows = jax.tree.map(lambda row: row.astype(jnp.float32), rows)
        return rows, optimizer.init(rows), sizes

    def loss(rows, params, batch: Aligned):
        student = put(params, rows, first)
        student_BMD = hidden_states(model, student, batch.new_tokens_NM, batch.new_lengths_N)
        teacher_BLD = hidden_states(model, params, batch.old_tokens_NL, batch.old_lengths_N)
        at = lambda hidden, ends_NC: jnp.take_along_axis(hidden, ends_NC[:, :, None], axis=1).astype(jnp.float32)
        teacher_BCD = jax.lax.stop_gradient(at(teacher_BLD, batch.old_ends_NC))
        apart_BC = jnp.square(at(student_BMD, batch.new_ends_NC) - teacher_BCD).sum(axis=-1)
        used_BC = jnp.arange(apart_BC.shape[1])[None, :] < batch.words_N[:, None]
        share = (apart_BC * used_BC).sum() / (jnp.square(teacher_BCD).sum(axis=-1) * used_BC).sum()
        if not settings.next_token:
            return share
        return share + settings.next_token * cross_entropy(model, student, student_BMD, batch)

    def update(rows, state, sizes, params, batch):
        value, gradients = jax.value_and_grad(loss)(rows, params, batch)
        updates, state = optimizer.update(gradients, state, rows)
        rows = jax.tree.map(lambda row, update, size: row + size * update, rows, updates, sizes)
        return rows, state, value

    return jax.jit(begin), jax.jit(update, donate_argnums=(0, 1))


def cross_entropy(model: MultimodalModel, params: Mapping[str, Any], hidden_BMD: Any, batch: Aligned) -> jax.Array:
    """Nats per token of the new cut."""
    logits_BMV: Any = model.apply({"params": params}, hidden_BMD[:, :-1], method="logits")
    targets_BM = batch.new_tokens_NM[:, 1:]
    nats_BM = optax.softmax_cross_entropy_with_integer_labels(logits_BMV, targets_BM)
    used_BM = jnp.arange(1, hidden_BMD.shape[1])[None, :] < batch.new_lengths_N[:, None]
    return (nats_BM * used_BM).sum() / jnp.maximum(used_BM.sum(), 1)
