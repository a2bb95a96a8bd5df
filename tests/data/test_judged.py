"""Judged answers: what is laid beside each, and how they come to a batch."""

import dataclasses

import jax
import numpy as np
import pytest
import worked

from ain_jax.data import judged as module
from ain_jax.data import loader, pack_plan
from ain_jax.data.encoding import Item
from ain_jax.data.examples import tokenise
from ain_jax.data.formats import Message, Record, validate
from ain_jax.data.packing import Packing
from ain_jax.tokenizer.chat import Chat


def single(name, question, answer, images=()):
    """A judged answer of these ids."""
    tokens = np.array([*question, *answer], np.int32)
    record = Record(name, "made", "ar", "unpaired", desirable=True, images=images)
    return record, int(name[1:]), Item([(tokens, np.arange(len(tokens)) >= len(question))], [])


def beside(judgements, last=False):
    """name -> ids of the second sequence."""
    made = judgements.rest() if last else judgements.group()
    found = {}
    for record, number, item in made:
        assert record.id == f"r{number}" and len(item.sequences) == 2
        tokens, learn = item.sequences[1]
        assert not learn[0] and learn.sum() > 0
        found[record.id] = tokens.tolist()
    return found


def test_answers_move_on_by_one():
    judgements = module.Judgements()
    for made in (single("r0", [1, 2], [7]), single("r1", [3], [8, 9]), single("r2", [4, 5], [6])):
        judgements.add(*made)
    assert beside(judgements) == {"r0": [1, 2, 6], "r1": [3, 7], "r2": [4, 5, 8, 9]}
    assert beside(judgements) == beside(judgements, last=True) == {}


def test_no_answer_meets_its_own_question_where_that_can_be():
    judgements = module.Judgements()
    for number in range(6):  # as rows made from pairs: each question twice
        judgements.add(*single(f"r{number}", [1, 1 + number // 2], [10 + number]))
    found = beside(judgements)
    assert all((tokens[-1] - 10) // 2 != int(name[1:]) // 2 for name, tokens in found.items())
    assert sorted(tokens[-1] for tokens in found.values()) == list(range(10, 16))  # each answer once
    for number, picture in enumerate((b"a", b"b")):  # the same words about two pictures are two questions
        judgements.add(*single(f"r{number}", [1], [10 + number], (picture,)))
    assert beside(judgements) == {"r0": [1, 11], "r1": [1, 10]}


def test_those_left_over_take_from_the_last_group():
    judgements = module.Judgements()
    for made in (single("r0", [1], [7]), single("r1", [2], [8])):
        judgements.add(*made)
    assert beside(judgements) == {"r0": [1, 8], "r1": [2, 7]}
    judgements.add(*single("r2", [2], [9]))  # the question of r1
    assert beside(judgements) == {}
    assert beside(judgements, last=True) == {"r2": [2, 7]}
    alone = module.Judgements()
    for number in range(2):
        alone.add(*single(f"r{number}", [1], [7 + number]))
    assert beside(alone) == {}
    with pytest.raises(ValueError, match="record r0: the source has verdicts on 2 answers to one question alone"):
        beside(alone, last=True)


def records(verdicts):
    """Two turns each, so that the first answer is no part of what is judged."""
    return [
        Record(
            f"r{n}", "made", "ar", "unpaired", desirable=verdict,
            messages=tuple(
                Message(role, f"{said} {n}")
                for role, said in (("user", "a"), ("assistant", "first"), ("user", "b"), ("assistant", "last"))
            ),
        )
        for n, verdict in enumerate(verdicts)
    ]  # fmt: skip


def test_a_batch_carries_verdicts_beside_its_rows(tokenizer, tmp_path):
    verdicts = (True, False, False, True, True)
    packing = Packing(row_tokens=256)
    source = tokenise(records(verdicts), "made", tokenizer, None, 256, "m", tmp_path, packing)
    plan = pack_plan.plan({"made": source}, None, packing, None, 0, tmp_path / "plan")
    rows = loader.Rows(plan, [source], packing, None, None, answers="judged")
    ((batch, _),) = loader.batches(rows, plan.rows + 1, None)
    batch = jax.tree.map(np.asarray, batch)
    assert batch.reference_BN2 is None
    for r in range(plan.rows):
        units = [int(e) for _, e in plan.row(r)]
        kinds = [int(verdicts[source.record_S[source.first_E[e]]]) for e in units]
        empty = plan.max_units - len(units)
        assert batch.desirable_BN[r].tolist() == kinds + [0] * empty
        assert batch.pair_groups_BN[r].tolist() == [0] * len(units) + [-1] * empty
        for place, e in enumerate(units):
            for which, made in enumerate(source.segments(e, None, None)):
                here = batch.rows.segments_BL[r] == 2 * place + which + 1
                np.testing.assert_array_equal(batch.rows.tokens_BL[r][here], made.tokens_L)
                said = tokenizer.decode(made.tokens_L[made.learn_L])
                assert "last" in said and "first" not in said  # the last turn alone
                own = int(source.record_S[source.first_E[e]])
                assert said.split("<")[0].split()[-1] == str(own if which == 0 else (own - 1) % 5)
    assert (batch.pair_groups_BN[-1] == -1).all() and not batch.desirable_BN[-1].any()
    refused = "record r0 has a verdict on its answer, and this stage"
    with pytest.raises(ValueError, match=f"{refused} would learn from bad answers too: take its source out"):
        dataclasses.replace(rows, answers="one")
    with pytest.raises(ValueError, match=f"{refused} compares pairs"):
        dataclasses.replace(rows, answers="pair")


def test_what_is_learnt_of_judged_answers_does_not_depend_on_chat(tokenizer, tmp_path):
    made = [
        tokenise(records((True, False)), "made", tokenizer, None, 256, "m", tmp_path, chat=settings)
        for settings in (Chat(turns="last"), Chat(turns="all"), Chat(also_learn=("<|im_start|>", "\n")))
    ]
    for other in made[1:]:
        np.testing.assert_array_equal(other.tokens_T, made[0].tokens_T)
        np.testing.assert_array_equal(other.learn_T, made[0].learn_T)


def test_one_that_is_too_long_with_its_second_answer_is_left_out(tokenizer, tmp_path):
    words = "word " * 40
    long = dataclasses.replace(records((True,))[0], id="long")
    long = dataclasses.replace(long, messages=(*long.messages[:2], Message("user", words), Message("assistant", "yes")))
    packing = Packing(row_tokens=112, too_long="drop")
    source = tokenise([*records((False, True)), long], "made", tokenizer, None, 112, "m", tmp_path, packing)
    assert source.dropped == 1 and source.desirable_E.tolist() == [0, 1]
    assert source.rejects is not None
    (line,) = source.rejects.read_text("utf-8").splitlines()
    assert '"record": "long", "done": "dropped", "reason": "record long: ' in line and "a row holds 112" in line


def test_a_picture_in_a_judged_answer_is_refused():
    bad = dataclasses.replace(
        records((True,))[0], messages=(Message("user", "a"), Message("assistant", "<image>")), images=(worked.png(0),)
    )
    with pytest.raises(ValueError, match='the judged answer holds "<image>"; an answer cannot hold a picture'):
        validate(bad)
