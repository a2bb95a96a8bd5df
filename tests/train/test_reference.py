"""The frozen policy's log-probabilities: right, computed once, and anew when weights or data change."""

import copy
import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import worked

from ain_jax.data import loader, pack_plan
from ain_jax.data.examples import tokenise
from ain_jax.data.formats import Message, Record
from ain_jax.data.packing import Packing
from ain_jax.tokenizer.chat import Chat
from ain_jax.train import reference
from ain_jax.train.preferences import Preference, preference

PLAIN = Chat()
PACKING = Packing(row_tokens=48, row_patches=32, row_targets=48)


@pytest.fixture
def rows(tmp_path):
    source = worked.examples([worked.example(i, 2 + i, pair=True, group=("a", "b")[i % 2]) for i in range(7)], "pairs")
    plan = pack_plan.plan({"pairs": source}, None, PACKING, None, 0, tmp_path / "plan.npz")
    return loader.Rows(plan, [source], PACKING, worked.PICTURE, worked.IMAGES, answers="pair")


def batches(rows):
    return loader.batches(rows, 2, None)


def test_filled_in_it_is_what_the_policy_says_and_the_loss_begins_at_log_2(rows, tmp_path):
    params = worked.table()
    filled = reference.with_reference(rows, worked.Bigram(), params, batches, tmp_path / "reference")
    assert filled.reference_RN2.shape == (rows.plan.rows, rows.plan.max_units, 2)
    logs = worked.log_table(params)
    for r in range(rows.plan.rows):
        for n, (_, e) in enumerate(rows.plan.row(r)):
            for which, made in enumerate(worked.segments(rows.sources[0], e)):
                steps = zip(made.tokens_L, made.tokens_L[1:], made.learn_L[1:], strict=False)
                expected = sum(logs[a, b] for a, b, learnt in steps if learnt)
                assert filled.reference_RN2[r, n, which] == pytest.approx(expected, abs=1e-4)
    loss = preference(worked.Bigram(), 2, Preference(beta=0.1))
    score = jax.jit(lambda batch: loss(params, {}, batch, None))
    sums = [score(batch) for batch, _ in batches(filled)]
    assert sum(float(s.count) for s in sums) == 7  # the last batch is filled up with rows that count nothing
    assert sum(float(s.loss) for s in sums) / 7 == pytest.approx(math.log(2), abs=1e-5)


def test_it_is_computed_once_for_the_same_weights_and_data(rows, tmp_path):
    folder, params, other = tmp_path / "data" / "reference", worked.table(), worked.table(seed=1)
    model, again = worked.Bigram(), lambda _: pytest.fail("computed again")
    first = reference.with_reference(rows, model, params, batches, folder)
    found = reference.with_reference(rows, model, params, again, folder)
    np.testing.assert_array_equal(found.reference_RN2, first.reference_RN2)
    changed = reference.with_reference(rows, model, other, batches, folder)
    assert not np.allclose(changed.reference_RN2, first.reference_RN2)
    replanned = dataclasses.replace(rows, plan=dataclasses.replace(rows.plan, fingerprint="other"))
    asked = []
    count = lambda rows: asked.append(rows) or batches(rows)
    reference.with_reference(replanned, model, other, count, folder)
    reference.with_reference(rows, model, params, count, folder, also="bfloat16")
    assert len(asked) == 2 and asked[0] is replanned
    assert sorted(p.suffix for p in folder.iterdir()) == [".npz"] * 4 and not list(folder.glob("*.tmp*"))
    reference.with_reference(rows, model, params, again, folder)  # what was made since has not displaced it


def test_what_it_depends_on_makes_it_anew(tokenizer, tmp_path, monkeypatch):
    """Data, tokenizer, chat template and image settings: each by the plan's fingerprint, as a stage makes it."""
    monkeypatch.setattr(
        reference, "pair_log_probs", lambda model, params, batch: (jnp.zeros((*batch.pair_groups_BN.shape, 2)), None)
    )
    packing = Packing(row_tokens=160, row_patches=64)
    asked, params, images = [], {"w": np.ones(3, np.float32)}, worked.IMAGES
    pad = tokenizer.convert_tokens_to_ids("<|image_pad|>")

    def computed(tokenizer=tokenizer, said="yes", images=images, chat=PLAIN) -> bool:
        records = [
            Record(
                f"r{n}", "made", "ar", "kind", rejected="no", images=(worked.png(n),),
                messages=(Message("user", f"<image> {n}?"), Message("assistant", said)),
            )
            for n in range(3)
        ]  # fmt: skip
        source = tokenise(records, "made", tokenizer, images, 160, said, tmp_path / "tokenised", packing, chat)
        plan = pack_plan.plan({"made": source}, None, packing, None, 0, tmp_path / "plan")
        rows = loader.Rows(plan, [source], packing, pad, images, answers="pair")
        before = len(asked)
        reference.with_reference(rows, None, params, lambda r: asked.append(r) or batches(r), tmp_path / "reference")
        return len(asked) > before

    assert computed() and not computed()
    other = copy.deepcopy(tokenizer)
    other.add_tokens(["yes"])
    templated = copy.deepcopy(tokenizer)
    templated.chat_template = templated.chat_template.replace("\n", " ")
    assert templated.chat_template != tokenizer.chat_template
    assert computed(tokenizer=other)
    assert computed(tokenizer=templated)
    assert computed(chat=Chat(template="chatml"))
    assert computed(said="no, not so")
    assert computed(images=dataclasses.replace(images, max_pixels=512))
    params["w"] = params["w"] + 1
    assert computed()
    params["w"] = params["w"] - 1
    assert not computed() and not computed(said="no, not so")


def test_the_fingerprint_is_of_every_bit_of_the_weights():
    one = {"a": np.zeros(3, np.float32), "b": np.ones(2, np.float32)}
    other = {"a": np.zeros(3, np.float32), "b": np.array([1, np.nextafter(np.float32(1), np.float32(2))])}
    assert reference.params_fingerprint(one) == reference.params_fingerprint(one)
    assert reference.params_fingerprint(one) != reference.params_fingerprint(other)
