"""Preference losses: pairs of a better and a worse answer, or single answers judged good or bad, in nats.

First the settings, then each loss as a function of log-probabilities alone, then the losses that the step takes. N is
the places of a row; the last axis of two is (better, worse). A log-ratio is log p(answer) - log p_reference(answer).
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp

from ain_jax.data.batch import PairBatch
from ain_jax.data.examples import Answers
from ain_jax.train.losses import Loss, Sums, group_sums, pair_log_probs

# What each loss reads beside beta; a setting that it would ignore is refused.
READS: Mapping[str, tuple[str, ...]] = {
    "sigmoid": ("sft", "label_smoothing"),
    "hinge": ("sft",),
    "ipo": ("sft",),
    "orpo": (),
    "simpo": ("sft", "target_margin"),
    "kto": ("desirable_weight", "undesirable_weight"),
}
CERTAIN = -1e-6  # nats per token: of a surer answer the odds are taken to be these, 1e6 to 1, for they end at infinity


@dataclasses.dataclass(frozen=True)
class Preference:
    """Settings of the preference loss.

    "sigmoid", "hinge" and "ipo" compare with the frozen model that the stage starts from, and so does "kto", which
    learns from single answers with a verdict; "orpo" and "simpo" need no such reference, and none is computed.
    """

    loss: Literal["sigmoid", "hinge", "ipo", "orpo", "simpo", "kto"] = "sigmoid"
    beta: float = 0.1  # how dear it is to leave the reference, per nat; of orpo the share of the odds ratio's loss
    sft: float = 0.0  # share of the better answer's own cross-entropy (per token) in the loss; orpo's is 1, always
    label_smoothing: float = 0.0  # sigmoid: the share of pairs taken to be labelled the wrong way round
    target_margin: float | None = None  # simpo's gamma, nats: from 0.3 to 1.6 in its paper, with beta from 2 to 2.5
    desirable_weight: float = 1.0  # kto: what the good answers' losses are multiplied by
    undesirable_weight: float = 1.0  # kto: and those of the bad ones

    def __post_init__(self):
        faults = []
        if not self.beta > 0 or self.sft < 0:
            faults.append(f"beta = {self.beta}, sft = {self.sft}: expected above 0, and 0 or more")
        if not 0 <= self.label_smoothing < 0.5:
            faults.append(f"label_smoothing = {self.label_smoothing}: expected 0 or more and below 0.5")
        if not (self.desirable_weight > 0 and self.undesirable_weight > 0):
            weights = f"desirable_weight = {self.desirable_weight}, undesirable_weight = {self.undesirable_weight}"
            faults.append(f"{weights}: expected above 0 each")
        if self.target_margin is not None and self.target_margin < 0:
            faults.append(f"target_margin = {self.target_margin}: expected 0 or more")
        if self.loss == "simpo" and self.target_margin is None:
            faults.append('loss = "simpo" without target_margin: give it, in nats (0.3 to 1.6 with beta from 2 to 2.5)')
        ignored = [
            f"{field.name} = {getattr(self, field.name)}"
            for field in dataclasses.fields(self)
            if field.name not in ("loss", "beta", *READS[self.loss]) and getattr(self, field.name) != field.default
        ]
        if ignored:
            faults.append(f'loss = "{self.loss}" ignores {" and ".join(ignored)}: leave it out')
        if faults:
            raise ValueError("; ".join(faults))

    @property
    def answers(self) -> Answers:
        """What an example of this loss is."""
        return "judged" if self.loss == "kto" else "pair"

    @property
    def needs_reference(self) -> bool:
        """Whether answers are compared with the frozen model's."""
        return self.loss not in ("orpo", "simpo")


def sigmoid(margin: jax.Array, label_smoothing: float = 0.0) -> jax.Array:
    """-log sigmoid(margin): direct preference optimisation (arXiv 2305.18290, equation 7), log 2 at margin 0.

    With label smoothing e, 1 - e of it and e of -log sigmoid(-margin): conservative DPO (Mitchell 2023, A note on DPO
    with noisy preferences and relationship to IPO), whose loss is least at a finite margin, log((1 - e) / e).
    """
    losses = -jax.nn.log_sigmoid(margin)
    if not label_smoothing:
        return losses
    return (1 - label_smoothing) * losses - label_smoothing * jax.nn.log_sigmoid(-margin)


def hinge(margin: jax.Array) -> jax.Array:
    """What the margin lacks to 1 (SLiC, arXiv 2305.10425, on log-ratios as in RSO, 2309.06657); 1 at margin 0."""
    return jax.nn.relu(1 - margin)


def ipo(ratio_2: jax.Array, lengths_2: jax.Array, beta: float) -> jax.Array:
    """Identity preference optimisation (arXiv 2310.12036, equation 17 with tau = beta): 1 / (4 beta^2) at ratios 0.

    The log-ratios are divided by the answers' lengths in tokens, as TRL does and its authors confirmed; summed over
    an answer, the squared distance to 1 / (2 beta) would be a matter of its length.
    """
    mean_2 = ratio_2 / jnp.maximum(lengths_2, 1)
    return (mean_2[..., 0] - mean_2[..., 1] - 1 / (2 * beta)) ** 2


def log_odds_ratio(mean_2: jax.Array) -> jax.Array:
    """By how many nats the better answer's odds are above the worse one's (arXiv 2403.07691, equations 4 and 5).

    odds = p / (1 - p), with p the geometric mean of the answer's token probabilities: exp of its mean log-probability.
    """
    mean_2 = jnp.minimum(mean_2, CERTAIN)
    odds_2 = mean_2 - jax.nn.log1mexp(-mean_2)
    return odds_2[..., 0] - odds_2[..., 1]


def kto(ratio: jax.Array, good: jax.Array, baseline: jax.Array, settings: Preference) -> tuple[jax.Array, jax.Array]:
    """(losses, margins) of judged answers (Kahneman-Tversky optimisation, arXiv 2402.01306, equation 7).

    The margin is beta times the log-ratio's distance from the baseline, counted upwards for good answers and downwards
    for bad ones; the loss is 1 - sigmoid(margin), times the weight of its kind: between 0 and that weight.
    """
    margin = settings.beta * (ratio - baseline) * jnp.where(good, 1.0, -1.0)
    weight = jnp.where(good, settings.desirable_weight, settings.undesirable_weight)
    return weight * jax.nn.sigmoid(-margin), margin


def preference(model: Any, groups: int, settings: Preference) -> Loss:
    """The loss that the settings name, reported by so many kinds of pairs or languages of answers."""
    if settings.loss == "kto":
        return _judged(model, groups, settings)
    return (_against_reference if settings.needs_reference else _alone)(model, groups, settings)


def _against_reference(model: Any, groups: int, settings: Preference) -> Loss:
    """`sigmoid`, `hinge` or `ipo` of each pair.

    `sft` adds that much of the better answer's own cross-entropy, nats per token (arXiv 2404.19733, equation 2): the
    margin then grows less by making both answers unlikely. `parts`: loss (without that term), nll (what is added,
    before `sft`), accuracy (margin above 0), margin (beta times the difference of the log-ratios), drift (the better
    answer's log-ratio: below 0 it has become less likely), drift_worse (the worse one's).
    """
    beta = settings.beta

    def loss(params: Any, others: Mapping[str, Any], batch: PairBatch, key: Any) -> Sums:
        del key
        log_probs_BN2, lengths_BN2 = pair_log_probs(model, params, batch, others)
        ratio_BN2 = log_probs_BN2 - batch.reference_BN2
        nll_BN = -log_probs_BN2[..., 0] / jnp.maximum(lengths_BN2[..., 0], 1)
        margin_BN = beta * (ratio_BN2[..., 0] - ratio_BN2[..., 1])
        weights_BN, by_kind = _kinds(batch, groups)
        if settings.loss == "sigmoid":
            losses_BN = sigmoid(margin_BN, settings.label_smoothing)
        else:
            losses_BN = hinge(margin_BN) if settings.loss == "hinge" else ipo(ratio_BN2, lengths_BN2, beta)
        parts = {
            "loss": by_kind(losses_BN),
            "nll": by_kind(nll_BN),
            "accuracy": by_kind((margin_BN > 0).astype(jnp.float32)),
            "margin": by_kind(margin_BN),
            "drift": by_kind(ratio_BN2[..., 0]),
        }
        worse = ("drift_worse", (("drift", 1.0), ("margin", -1 / beta)))
        total = ((losses_BN + settings.sft * nll_BN) * weights_BN).sum()
        return Sums(total, weights_BN.sum(), parts, (worse,))

    return loss


def _alone(model: Any, groups: int, settings: Preference) -> Loss:
    """ORPO or SimPO of each pair, from mean log-probabilities per token.

    ORPO is the better answer's cross-entropy and beta times -log sigmoid(the log odds ratio) (arXiv 2403.07691,
    equations 6 and 7); TRL counts the question's tokens into the cross-entropy, the paper and we the answer's alone.
    SimPO is -log sigmoid(margin - target_margin), the margin beta times the difference of the means (arXiv 2405.14734,
    equation 6); `sft` adds the cross-entropy. `parts`: loss (without the cross-entropy), accuracy, margin (of ORPO the
    log odds ratio), and, as there is no reference to drift from, nll and nll_worse: nats per token of the two answers.
    """
    orpo = settings.loss == "orpo"

    def loss(params: Any, others: Mapping[str, Any], batch: PairBatch, key: Any) -> Sums:
        del key
        log_probs_BN2, lengths_BN2 = pair_log_probs(model, params, batch, others)
        weights_BN, by_kind = _kinds(batch, groups)
        # An unused place would be certain, and the gradient of its odds none: it says -1 before anything is computed.
        mean_BN2 = jnp.where(weights_BN[..., None] > 0, log_probs_BN2 / jnp.maximum(lengths_BN2, 1), -1.0)
        if orpo:
            margin_BN = log_odds_ratio(mean_BN2)
            losses_BN = settings.beta * sigmoid(margin_BN)
        else:
            assert settings.target_margin is not None, "the settings ask for it"
            margin_BN = settings.beta * (mean_BN2[..., 0] - mean_BN2[..., 1])
            losses_BN = sigmoid(margin_BN - settings.target_margin)
        parts = {
            "loss": by_kind(losses_BN),
            "nll": by_kind(-mean_BN2[..., 0]),
            "nll_worse": by_kind(-mean_BN2[..., 1]),
            "accuracy": by_kind((margin_BN > 0).astype(jnp.float32)),
            "margin": by_kind(margin_BN),
        }
        share = 1.0 if orpo else settings.sft
        return Sums(((losses_BN - share * mean_BN2[..., 0]) * weights_BN).sum(), weights_BN.sum(), parts)

    return loss


def _judged(model: Any, groups: int, settings: Preference) -> Loss:
    """`kto` of each judged answer.

    The baseline, without a gradient, is how far the policy has left the reference: the mean log-ratio of answers to
    other questions, over the whole batch on all devices, and 0 where that is below (arXiv 2402.01306, section 4). It
    stands inside a sigmoid, so a batch in parts is no sum of parts: all would have to be read once for the baseline and
    again for the gradient. The stage refuses to cut one.
    `parts`: loss, accuracy (margin above 0), margin, baseline, drift and drift_worse (log-ratios of the good answers
    and of the bad ones).
    """

    def loss(params: Any, others: Mapping[str, Any], batch: PairBatch, key: Any) -> Sums:
        del key
        log_probs_BN2, _ = pair_log_probs(model, params, batch, others)
        weights_BN, by_kind = _kinds(batch, groups)
        ratio_BN2 = log_probs_BN2 - batch.reference_BN2
        elsewhere_BN = jax.lax.stop_gradient(ratio_BN2[..., 1])
        baseline = jax.nn.relu((elsewhere_BN * weights_BN).sum() / jnp.maximum(weights_BN.sum(), 1))
        good_BN = batch.desirable_BN > 0
        losses_BN, margin_BN = kto(ratio_BN2[..., 0], good_BN, baseline, settings)
        parts = {
            "loss": by_kind(losses_BN),
            "accuracy": by_kind((margin_BN > 0).astype(jnp.float32)),
            "margin": by_kind(margin_BN),
            "baseline": by_kind(jnp.broadcast_to(baseline, weights_BN.shape)),
            "drift": by_kind(ratio_BN2[..., 0], good_BN),
            "drift_worse": by_kind(ratio_BN2[..., 0], ~good_BN),
        }
        return Sums((losses_BN * weights_BN).sum(), weights_BN.sum(), parts)

    return loss


def _kinds(batch: PairBatch, groups: int) -> tuple[jax.Array, Callable[..., tuple[jax.Array, jax.Array]]]:
    """1 where a place is used, and what sums values by kind, over the used places or some of them."""
    weights_BN = (batch.pair_groups_BN >= 0).astype(jnp.float32)
    groups_BN = jnp.maximum(batch.pair_groups_BN, 0)

    def by_kind(values_BN: jax.Array, some_BN: jax.Array | None = None) -> tuple[jax.Array, jax.Array]:
        counted_BN = weights_BN if some_BN is None else weights_BN * some_BN.astype(jnp.float32)
        return group_sums(values_BN, counted_BN, groups_BN, groups)

    return weights_BN, by_kind
