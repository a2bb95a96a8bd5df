"""Our preference losses against TRL's: its own trainers compute them in the test, on the same weights and token ids.

Both sides hold a policy and a reference that differ. Ours reads packed rows, TRL padded ones. Values and the gradients
of all parameters are compared in float32, of a Qwen2-VL, with pictures wherever TRL's trainer takes them.
"""

import copy
import dataclasses
import functools
import itertools
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import worked

from ain_jax.data.batch import PairBatch
from ain_jax.data.encoding import Item
from ain_jax.data.formats import Message, Record
from ain_jax.data.judged import Judgements
from ain_jax.data.packing import Packing, Segment
from ain_jax.data.positions import mrope_positions
from ain_jax.models.multimodal import MultimodalModel
from ain_jax.train.losses import pair_log_probs
from ain_jax.train.metrics import numbers
from ain_jax.train.preferences import Preference, log_odds_ratio, preference
from ain_jax.weights.load import load_folder

torch = pytest.importorskip("torch")
pytest.importorskip("trl", reason="TRL is the reference here: pip install -e '.[test]' brings it")
VALUE, GRADIENT = 1e-5, 3e-5  # of the loss, and of the largest gradient of a parameter
PACKING = Packing(row_tokens=96, row_patches=128, row_targets=64)
SEEN = worked.examples(
    [
        worked.example(11, 5, [(8, 8)], pair=True),
        worked.example(12, 7, pair=True),
        worked.example(13, 3, [(16, 8), (8, 16)], pair=True),
        worked.example(14, 9, [(16, 16)], pair=True),
    ]
)
READ = worked.examples([worked.example(20 + i, words, pair=True) for i, words in enumerate((5, 9, 3, 7))])


@dataclasses.dataclass(frozen=True)
class Two:
    """A policy of transformers and its reference, and the same two as ours."""

    policy: Any
    reference: Any
    params: Any
    reference_params: Any
    folder: Path

    def gradients(self) -> dict[str, np.ndarray]:
        """The policy's gradients in our layout, read as its weights are; none is left there."""
        weights = {name: p.data for name, p in self.policy.named_parameters()}
        for parameter in self.policy.parameters():
            parameter.data = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad.clone()
        self.policy.save_pretrained(self.folder / "gradients")
        for name, parameter in self.policy.named_parameters():
            parameter.data, parameter.grad = weights[name], None
        return load_folder(self.folder / "gradients")[0]


def two(policy, reference, folder: Path) -> Two:
    params = []
    for name, model in (("policy", policy), ("reference", reference)):
        model.save_pretrained(folder / name)
        params.append(load_folder(folder / name)[0])
    return Two(copy.deepcopy(policy), copy.deepcopy(reference), params[0], params[1], folder)


@pytest.fixture(scope="module")
def moved(build_once):
    """A model and one whose weights are a little different: most of what the former says is less likely to it."""
    start = build_once(worked.CONFIG).model
    made, generator = copy.deepcopy(start), torch.Generator().manual_seed(1)
    with torch.no_grad():
        for _, weight in sorted(made.named_parameters()):
            weight.add_(0.1 * weight.std(correction=0) * torch.randn(weight.shape, generator=generator))
    return start, made


@pytest.fixture(scope="module")
def both(moved, tmp_path_factory) -> Two:
    return two(moved[1], moved[0], tmp_path_factory.mktemp("both"))


@pytest.fixture(scope="module")
def trainer(small_tokenizer_folder, tmp_path_factory):
    """`trainer(both, kind, **settings)`: a trainer of TRL over the policy. Inputs are given as ids, not as its data."""
    from datasets import Dataset
    from transformers import PreTrainedTokenizerFast
    from trl import DPOConfig, DPOTrainer, KTOConfig, KTOTrainer
    from trl.experimental.cpo import CPOConfig, CPOTrainer
    from trl.experimental.orpo import ORPOConfig, ORPOTrainer

    kinds = {
        "dpo": (DPOConfig, DPOTrainer),
        "kto": (KTOConfig, KTOTrainer),
        "orpo": (ORPOConfig, ORPOTrainer),
        "cpo": (CPOConfig, CPOTrainer),
    }
    words = PreTrainedTokenizerFast.from_pretrained(
        small_tokenizer_folder, bos_token="w0", eos_token="w1", pad_token="w0"
    )

    def make(both: Two, kind: str, **settings):
        config, trains = kinds[kind]
        folder = tmp_path_factory.mktemp(kind)
        args = config(output_dir=str(folder), use_cpu=True, bf16=False, report_to="none",
                      gradient_checkpointing=False, per_device_train_batch_size=2, **settings)  # fmt: skip
        if kind == "kto":
            rows = {"prompt": ["w2", "w3"], "completion": ["w4", "w5"], "label": [True, False]}
        else:
            rows = {"prompt": ["w2", "w3"], "chosen": ["w4", "w5"], "rejected": ["w6", "w7"]}
        reference = {"ref_model": copy.deepcopy(both.reference)} if kind in ("dpo", "kto") else {}
        return trains(
            model=both.policy, args=args, train_dataset=Dataset.from_dict(rows), processing_class=words, **reference
        )

    return make


def padded(segments: list[Segment], prefix: str = "", labels: bool = False) -> dict[str, Any]:
    """Token ids, attention and what is learnt, as TRL's collators lay them; `labels`: as those of ORPO and CPO do."""
    longest = max(len(s.tokens_L) for s in segments)
    lay = lambda values, empty: torch.tensor(
        np.stack([np.pad(v, (0, longest - len(v)), constant_values=empty) for v in values]).astype(np.int64)
    )
    ids, mask = lay([s.tokens_L for s in segments], 0), lay([np.ones_like(s.tokens_L) for s in segments], 0)
    learn = lay([s.learn_L for s in segments], 0)
    if labels:
        made = {"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(learn == 0, -100)}
    else:
        made = {"input_ids": ids, "attention_mask": mask, "completion_mask": learn}
        made["mm_token_type_ids"] = (ids == worked.PICTURE).long()
    return {f"{prefix}{name}": value for name, value in made.items()}


def pictures(segments: list[Segment], grids: list[Any]) -> dict[str, Any]:
    """The patches of all segments in their order, and their grids."""
    patches = [s.patches_PK for s in segments if s.patches_PK is not None]
    if not patches:
        return {}
    return {
        "pixel_values": torch.tensor(np.concatenate(patches)),
        "image_grid_thw": torch.tensor(np.concatenate([np.reshape(g, (-1, 3)) for g in grids]).astype(np.int64)),
    }


def grids_of(source, example: int) -> np.ndarray:
    first = int(source.first_E[example])
    return source.grids_M3[int(source.grid_starts_S[first]) : int(source.grid_starts_S[first + 1])]


def pairs_of(source) -> list[list[Segment]]:
    return [worked.segments(source, example) for example in range(len(source))]


@functools.cache
def compiled(every: tuple[Preference, ...]):
    """A function of parameters and batch: the gradients of each of these losses, and their sums."""
    model = MultimodalModel(worked.CONFIG)

    def means(params, batch):
        once = worked.Once(model)
        sums = [preference(once, 1, settings)(params, {}, batch, None) for settings in every]
        return jnp.stack([s.loss / s.count for s in sums]), sums

    return jax.jit(jax.jacrev(means, has_aux=True))


@functools.cache
def scored():
    return jax.jit(lambda params, batch: pair_log_probs(MultimodalModel(worked.CONFIG), params, batch)[0])


def ours(both, batch, every: Iterable[Preference]):
    """(loss, gradients, numbers told) of each settings, over these packed rows."""
    batch = dataclasses.replace(batch, reference_BN2=np.asarray(scored()(both.reference_params, batch)))
    gradients_K, sums = compiled(tuple(every))(both.params, batch)
    return [
        (float(s.loss / s.count), jax.tree.map(lambda g, k=k: np.asarray(g[k]), gradients_K), numbers(s, ("all",)))
        for k, s in enumerate(sums)
    ]


def packed(pairs: list[list[Segment]], desirable=None, rows=((1, 0), (3, 2)), targets=64) -> PairBatch:
    packing = dataclasses.replace(PACKING, row_targets=targets)
    laid = worked.batch([[s for e in row for s in pairs[e]] for row in rows], packing)
    good = None if desirable is None else np.array([[desirable[e] for e in row] for row in rows], np.int32)
    return PairBatch(laid, np.zeros((len(rows), 2), np.int32), None, good)


def theirs(both, made, batches: list[dict[str, Any]], total: int, size=lambda batch: len(batch["input_ids"]) // 2):
    """(loss, gradients) of TRL: its mean over a batch, summed over batches by their sizes."""
    value = 0.0
    both.policy.train()
    for batch in batches:
        loss = made.compute_loss(made.model, batch) * size(batch) / total
        loss.backward()
        value += float(loss.detach())
    return value, both.gradients()


def assert_same(found, expected):
    assert found[0] == pytest.approx(expected[0], rel=VALUE)
    flat, their_flat = (jax.tree_util.tree_leaves_with_path(tree) for tree in (found[1], expected[1]))
    largest = max(float(np.abs(leaf).max()) for _, leaf in their_flat)
    assert largest > 1e-3
    for (path, one), (_, other) in zip(flat, their_flat, strict=True):
        scale = float(np.abs(other).max())
        np.testing.assert_allclose(one, other, rtol=0, atol=GRADIENT * max(scale, 1e-3 * largest), err_msg=str(path))


def assert_told(told, made, names: dict[str, tuple[str, float]]):
    """What we report, times a factor, is what TRL's trainer noted: our name -> (its name, the factor)."""
    logged = (made._metrics if hasattr(made, "_metrics") else made._stored_metrics)["train"]
    for ours, (their_name, factor) in names.items():
        assert factor * float(told[ours]) == pytest.approx(np.mean(logged[their_name]), rel=1e-4), ours


DPO = {
    "sigmoid": (Preference(beta=0.3), {"loss_type": ["sigmoid"], "beta": 0.3}),
    "hinge": (Preference("hinge", beta=0.2), {"loss_type": ["hinge"], "beta": 0.2}),
    "ipo": (Preference("ipo", beta=0.4), {"loss_type": ["ipo"], "beta": 0.4}),
    # One pair at a time: what TRL sorts over a batch is then what is smoothed, and its mean over tokens is the pair's.
    "smoothed": (
        Preference(beta=0.3, label_smoothing=0.2),
        {"loss_type": ["aot"], "beta": 0.3, "label_smoothing": 0.2},
    ),
    "sft": (
        Preference("hinge", beta=0.2, sft=0.7),
        {"loss_type": ["hinge", "sft"], "loss_weights": [1.0, 0.7], "beta": 0.2},
    ),
}


@pytest.fixture(scope="module")
def our_dpo(both):
    return dict(zip(DPO, ours(both, packed(pairs_of(SEEN)), (settings for settings, _ in DPO.values())), strict=True))


@pytest.mark.parametrize("name", DPO)
def test_dpo_with_pictures(both, trainer, our_dpo, name):
    pairs, beta = pairs_of(SEEN), DPO[name][0].beta
    together = [[e] for e in range(len(pairs))] if name in ("smoothed", "sft") else [list(range(len(pairs)))]
    batches = []
    for chosen in together:  # better answers first, then worse ones
        ordered = [pairs[e][which] for which in (0, 1) for e in chosen]
        batches.append(padded(ordered) | pictures(ordered, [grids_of(SEEN, e) for e in chosen] * 2))
    made = trainer(both, "dpo", **DPO[name][1])
    assert_same(our_dpo[name], theirs(both, made, batches, len(pairs)))
    names = {"accuracy": ("accuracies", 1), "margin": ("margins", 1), "drift": ("chosen", beta)}
    names |= {"drift_worse": ("rejected", beta)}
    assert_told(our_dpo[name][2], made, {name: (f"rewards/{n}", f) for name, (n, f) in names.items()})


ALONE = {
    "orpo": (Preference("orpo", beta=0.3), "orpo", {"beta": 0.3}),
    "simpo": (
        Preference("simpo", beta=2.0, target_margin=0.8),
        "cpo", {"loss_type": "simpo", "beta": 2.0, "simpo_gamma": 0.8, "cpo_alpha": 0.0},
    ),
    "simpo and sft": (
        Preference("simpo", beta=2.0, target_margin=0.8, sft=0.3),
        "cpo", {"loss_type": "simpo", "beta": 2.0, "simpo_gamma": 0.8, "cpo_alpha": 0.3},
    ),
}  # fmt: skip


# TRL counts the question into the cross-entropy of ORPO, the paper does not: here it is one token, nothing to learn.
OPEN = {
    name: [[dataclasses.replace(s, learn_L=np.arange(len(s.tokens_L)) > 0) for s in pair] for pair in pairs_of(source)]
    for name, source in (("words", READ), ("pictures", SEEN))
}


@pytest.fixture(scope="module")
def our_alone(both):
    every = [settings for settings, *_ in ALONE.values()]
    found = {source: ours(both, packed(pairs, targets=96), every) for source, pairs in OPEN.items()}
    return {source: dict(zip(ALONE, of_source, strict=True)) for source, of_source in found.items()}


def of_two(pair):
    return padded(pair[:1], "chosen_", labels=True) | padded(pair[1:], "rejected_", labels=True)


def shown(both, monkeypatch):
    """TRL's trainers of these losses hand the model words alone: each call is given the pictures of its pair too."""
    forward, pairs = both.policy.forward, itertools.count()

    def seeing(input_ids, **others):
        example = next(pairs)
        seen = pictures(pairs_of(SEEN)[example], [grids_of(SEEN, example)] * 2)
        return forward(input_ids=input_ids, mm_token_type_ids=(input_ids == worked.PICTURE).long(), **seen, **others)

    monkeypatch.setattr(both.policy, "forward", seeing)


@pytest.mark.parametrize("source", OPEN)
@pytest.mark.parametrize("name", ALONE)
def test_losses_without_a_reference(both, trainer, our_alone, name, source, monkeypatch):
    settings, kind, theirs_settings = ALONE[name]
    made = trainer(both, kind, **theirs_settings)
    if source == "pictures":
        shown(both, monkeypatch)
    # TRL's cross-entropy is a mean over the tokens of a batch, ours over those of a pair: so pairs one by one.
    pairs = OPEN[source]
    found = theirs(both, made, [of_two(pair) for pair in pairs], len(pairs), size=lambda batch: 1)
    assert_same(our_alone[source][name], found)
    told = our_alone[source][name][2]
    names = {"accuracy": ("rewards/accuracies", 1), "nll": ("logps/chosen", -1), "nll_worse": ("logps/rejected", -1)}
    names |= {"margin": ("log_odds_chosen" if kind == "orpo" else "rewards/margins", 1)}
    assert_told(told, made, names)
    assert settings.needs_reference is False


def test_the_odds_ratio_of_answers_likely_and_unlikely(both, trainer):
    made = trainer(both, "orpo", beta=1.0)
    mean_N2 = -np.geomspace(1e-4, 12, 16, dtype=np.float32).reshape(2, 8).T.copy()
    given = torch.tensor(mean_N2, requires_grad=True)
    losses_N, *_, log_odds = made.odds_ratio_loss(given[:, 0], given[:, 1])
    (losses_N.sum()).backward()
    assert given.grad is not None
    found_N, gradient_N2 = jax.vmap(jax.value_and_grad(lambda two: jax.nn.log_sigmoid(log_odds_ratio(two))))(mean_N2)
    np.testing.assert_allclose(found_N, losses_N.detach(), rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(gradient_N2, given.grad, rtol=1e-3, atol=1e-6)
    assert float(log_odds_ratio(mean_N2).mean()) == pytest.approx(float(log_odds), rel=1e-5)
    assert np.isfinite(log_odds_ratio(np.zeros((1, 2), np.float32))).all()  # theirs is not


@pytest.mark.parametrize("nearer", [True, False], ids=["a baseline above 0", "a baseline held at 0"])
def test_kto_with_pictures(moved, trainer, tmp_path, nearer):
    """Answers move on by one place on both sides: ours by `Judgements`, TRL's the way its dataset is prepared."""
    both = two(*(moved if nearer else moved[::-1]), tmp_path)
    settings = Preference("kto", beta=0.4, desirable_weight=1.2, undesirable_weight=0.7)
    singles, good = [pair[0] for pair in pairs_of(SEEN)], (True, False, False, True)
    judged = Judgements()
    for e, single in enumerate(singles):
        record = Record(f"r{e}", "made", "ar", "unpaired", messages=(Message("assistant", "x"),), desirable=good[e])
        judged.add(record, e, Item([(single.tokens_L, single.learn_L)], [tuple(g) for g in grids_of(SEEN, e)]))
    pairs, starts = [], [int(np.argmax(single.learn_L)) for single in singles]
    for record, e, item in judged.group():
        tokens_L, learn_L = item.sequences[1]
        before = singles[e - 1]
        assert tokens_L.tolist() == [*singles[e].tokens_L[: starts[e]], *before.tokens_L[starts[e - 1] :]]
        assert record.desirable is good[e] and learn_L.sum() == before.learn_L.sum()
        seen = tokens_L == worked.PICTURE
        positions_3L = mrope_positions(tokens_L, item.grids, worked.PICTURE, 2)
        other = dataclasses.replace(
            singles[e], tokens_L=tokens_L, learn_L=learn_L, positions_3L=positions_3L,
            is_picture_L=seen if singles[e].patches_PK is not None else None,
        )  # fmt: skip
        pairs.append([singles[e], other])
    assert len(pairs) == 4
    (found,) = ours(both, packed(pairs, good), [settings])
    elsewhere = {f"KL_{name}": value for name, value in padded([pair[1] for pair in pairs]).items()}
    batch = padded(singles) | elsewhere | pictures(singles, [grids_of(SEEN, e) for e in range(4)])
    batch["label"] = torch.tensor(good)
    made = trainer(both, "kto", beta=0.4, desirable_weight=1.2, undesirable_weight=0.7)
    assert_same(found, theirs(both, made, [batch], 1, size=lambda batch: 1))
    names = {"baseline": ("kl", 1), "drift": ("rewards/chosen", 0.4), "drift_worse": ("rewards/rejected", 0.4)}
    assert_told(found[2], made, names)
    assert found[2]["baseline"] > 0.1 if nearer else found[2]["baseline"] == 0
