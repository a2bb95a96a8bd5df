"""What a grid of runs is told by: intervals worked by hand, and sentences that say no more than these do."""

import dataclasses
import json
import shlex

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ain_jax import ablation
from ain_jax.ablation import Difference, Found, Grid, Interval, differences, interval, rank_correlation
from ain_jax.experiment import parse_override

NUMBERS = st.lists(st.floats(-100, 100), min_size=2, max_size=6)
# Of 1, 2 and 3 the standard deviation is 1. t, from a printed table: 4.303 at 0.975 and 6.205 at 0.9875 with 2 degrees
# of freedom.
ROOT = 3**0.5


def found(**cells):
    """Numbers of one measure by cell, one for each seed."""
    table = np.array(list(cells.values()), float)
    return Found(tuple(cells), tuple(range(table.shape[1])), {"m": table}, {"m": np.full(table.shape, 9.0)})


def test_an_interval_by_hand():
    one = interval([1, 2, 3])
    assert one.mean == 2
    assert [one.high - 2, 2 - one.low] == pytest.approx([4.303 / ROOT] * 2, rel=1e-3)
    assert interval([1, 2, 3], 0.975).high == pytest.approx(2 + 6.205 / ROOT, rel=1e-3)
    assert not one.excludes_zero and interval([3, 3.1, 3.2]).excludes_zero and interval([-3, -3.1, -3.2]).excludes_zero


@given(NUMBERS, st.floats(-50, 50), st.floats(0.01, 20))
def test_an_interval_moves_and_scales_with_its_numbers(numbers, shift, scale):
    one, other = interval(numbers), interval([scale * n + shift for n in numbers])
    assert one.low <= one.mean <= one.high and other.mean == pytest.approx(scale * one.mean + shift, abs=1e-6)
    assert other.high - other.low == pytest.approx(scale * (one.high - one.low), rel=1e-6, abs=1e-6)
    assert interval(numbers, 0.99).high >= one.high


def test_it_holds_what_it_promises_as_often_as_it_promises():
    draws = np.random.default_rng(0).normal(5, 2, (4000, 3))
    for level in (0.5, 0.95):
        held = np.mean([(i := interval(row, level)).low <= 5 <= i.high for row in draws])
        assert held == pytest.approx(level, abs=3 * (level * (1 - level) / len(draws)) ** 0.5)


@pytest.mark.parametrize(
    ("call", "told"),
    [
        (lambda: interval([1.0]), r"values = \[1.0\]: expected two finite numbers or more"),
        (lambda: interval([1.0, float("nan")]), "expected two finite numbers"),
        (lambda: interval([1.0, 2.0], 1.0), "level = 1.0: expected above 0 and below 1"),
        (lambda: differences(found(a=[1, 2], b=[2, 3]), "m", to="c"), "to = 'c': expected one of a, b"),
        (lambda: rank_correlation("", np.ones((2, 2)), np.ones((2, 2))), "three points or more"),
        (lambda: Grid("x", {"a b": [], "a  b": []}), "named by other letters or digits each"),
        (lambda: Grid("x", {"a": []}, seeds=(1,)), r"seeds = \[1\]: expected two or more that differ"),
        (lambda: Grid("x", {"a": []}, seeds=(1, 1)), "expected two or more that differ"),
    ],
)
def test_what_cannot_be_told_is_refused(call, told):
    with pytest.raises(ValueError, match=told):
        call()


def test_differences_are_the_seeds_own():
    """The seeds lie far apart, and each is 1, 2 and 3 lower: by pairs that is told, by means it would not be."""
    table = found(a=[10, 20, 30], b=[9, 18, 27], c=[11, 18, 31])
    b, c = differences(table, "m", to="a")
    assert (b.cell, b.interval.mean) == ("b", -2)
    # Two comparisons: each at 1 - 0.05 / 2, so t = 6.205.
    assert b.interval.high == pytest.approx(-2 + 6.205 / ROOT, rel=1e-3)
    assert not b.told and not c.told
    (alone,) = differences(found(a=[10, 20, 30], b=[8.9, 18.8, 28.7]), "m", to="a")
    assert alone.told and str(alone) == (
        "m, b against a: 1.200 bits per byte below, outside the interval (-1.448 to -0.952)"
    )
    (among,) = differences(found(a=[10, 20, 30], b=[8.9, 18.8, 28.7]), "m", to="a", among=100)
    assert among.interval.low < alone.interval.low and not among.told
    assert str(among).startswith("m, b against a: no difference that 3 seeds can tell (")


@given(st.lists(st.tuples(st.floats(-9, 9), st.floats(-9, 9)), min_size=3, max_size=5))
def test_a_difference_the_other_way_round_is_its_negative(pairs):
    a, b = zip(*pairs, strict=True)
    (one,), (other,) = (differences(found(a=a, b=b), "m", to=to) for to in "ab")
    assert one.interval.low == pytest.approx(-other.interval.high, abs=1e-9) and one.told == other.told


@given(st.floats(-5, 5), st.floats(0, 5))
def test_a_sentence_says_no_more_than_its_interval(mean, half):
    said = str(Difference("m", "b", "a", Interval(mean, mean - half, mean + half), 3, 0.95))
    assert ("outside the interval" in said) == (abs(mean) > half) == ("no difference" not in said)
    if abs(mean) > half:
        assert (" above," in said) == (mean > 0)


def test_a_correlation_by_hand():
    """Ranks 1 2 3 against 1 3 2: 1 - 6 · (0 + 1 + 1) / (3 · 8) = 0.5."""
    x = np.array([[1.0, 5.0, 9.0]] * 3)
    steady = rank_correlation("x and y", x, np.array([[1.0, 2.0, 50.0], [0.1, 0.2, 0.3], [3.0, 4.0, 4.5]]))
    assert steady.interval == Interval(1.0, 1.0, 1.0)
    assert str(steady) == "x and y: rise together, rank correlation +1.00, outside the interval (+1.00 to +1.00)"
    mixed = rank_correlation("x and y", x, np.array([[1, 3, 2], [1, 2, 3], [3, 2, 1]], float))
    assert mixed.interval == Interval(pytest.approx((0.5 + 1 - 1) / 3), -1, 1)
    assert "no connection that 3 seeds can tell" in str(mixed)


def test_a_mean_of_measures_and_a_table():
    one = found(a=[1, 2, 3], b=[2, 3, 5])
    higher, lower = {"n": one.measures["m"] + 2}, {"n": one.before["m"] - 8}
    two = dataclasses.replace(one, measures={**one.measures, **higher}, before={**one.before, **lower})
    both = two.with_mean("both", ["m", "n"])
    assert both.of("both", "a").tolist() == [2, 3, 4] and both.of("m", "b").tolist() == [2, 3, 5]
    assert both.before["both"].mean() == 5
    assert both.table(["both"]).splitlines()[2].split() == ["a", "3.000", "±", "2.484"]


GRID = Grid("experiments/x.gin", {"20%": ["A.b={'en': 0.2}"], "40%": ["A.b={'en': 0.4}"]}, (0, 1), ["C.d=1"])


def test_each_run_has_its_command(tmp_path):
    made = ablation.commands(GRID, tmp_path)
    assert len(made) == 4
    words = shlex.split(made[3])
    assert words[:4] == ["python", "launch/tpu_pod.py", "--exp", "experiments/x.gin"]
    assert words[4:8] == ["--run_dir", str(tmp_path / "40_percent" / "seed_1"), "--data_dir", str(tmp_path / "data")]
    assert words[8:] == ["--set", "C.d=1", "--set", "A.b={'en': 0.4}", "--set", "Experiment.seed=1"]


@pytest.mark.parametrize(
    ("value", "text"),
    [
        ({"a/b": 0.5}, 'X.y={"a/b": 0.5}'),
        (("a", "b"), 'X.y=["a", "b"]'),
        ("أ", 'X.y="أ"'),
        (0, "X.y=0"),
        ((True, None), "X.y=(True, None)"),
    ],
)
def test_a_binding_is_what_the_command_line_takes(value, text):
    assert ablation.binding("X.y", value) == text
    assert parse_override(text).value == (list(value) if "[" in text else value)


def finished(under, cell, seed, **watched):
    path = GRID.folder(under, cell, seed) / "pretrain" / "result.json"
    path.parent.mkdir(parents=True)
    path.write_text(json.dumps({"numbers": {"watched": watched} if watched else {}}))


def test_what_runs_came_to_is_read_wherever_they_ran(tmp_path):
    for number, (cell, seed) in enumerate((cell, seed) for cell in GRID.cells for seed in GRID.seeds):
        with pytest.raises(ValueError, match=f"the run of {cell!r} with seed {seed} is not finished"):
            ablation.read(GRID, tmp_path)
        finished(tmp_path, cell, seed, en=[8.0, 1.0 + number])
    read = ablation.read(GRID, tmp_path)
    assert read.measures["en"].tolist() == [[1, 2], [3, 4]] and read.before["en"].tolist() == [[8, 8], [8, 8]]


@pytest.mark.parametrize(
    ("watched", "told"),
    [
        ({}, "nothing was watched: bind pretrain/Watch.texts"),
        ({"en": [1.0, 2.0]}, "en: all seeds came to the same number in 20%"),
        ({"ar": [1.0, 2.0]}, "en, ar: not watched in every cell"),
    ],
)
def test_runs_that_tell_nothing_are_refused(tmp_path, watched, told):
    finished(tmp_path, "20%", 0, en=[1.0, 2.0])
    finished(tmp_path, "20%", 1, **watched)
    for seed in GRID.seeds:
        finished(tmp_path, "40%", seed, en=[1.0, 2.0 + seed])
    with pytest.raises(ValueError, match=told):
        ablation.read(GRID, tmp_path)


def test_a_run_that_fails_is_told_with_its_last_words(tmp_path):
    grid = dataclasses.replace(GRID, experiment=str(tmp_path / "missing.gin"))
    with pytest.raises(RuntimeError, match=r"(?s)seed_0 ended with 1:.*no experiment file .*missing.gin"):
        ablation.run(grid, tmp_path / "runs")
