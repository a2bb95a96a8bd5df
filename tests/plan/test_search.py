"""What a search tries, in which order, and what it bears; nothing is compiled."""

import dataclasses
import os
import time
from types import SimpleNamespace
from typing import Any

import pytest

from ain_jax import sharding
from ain_jax.plan import chips, report, search
from ain_jax.stages.model_settings import Model
from ain_jax.train.loop import Trainer

POD = chips.read("v5p-128")
SETTINGS: dict[type, Any] = {Trainer: Trainer(steps=1, rows=64), Model: SimpleNamespace(remat="full")}
RUN: Any = SimpleNamespace(
    stage="instruct",
    get=SETTINGS.__getitem__,
    mesh=SimpleNamespace(shape=dataclasses.asdict(sharding.Mesh(1, 1, 64, 1, 1))),
    config=SimpleNamespace(text=SimpleNamespace(kv_heads=4)),
)
YOURS = SimpleNamespace(
    fits=True,
    tokens=1000,
    seconds=60.0,
    memory=SimpleNamespace(peak=2**30),
    roofline=lambda slices: SimpleNamespace(slowest=1.0),
)


@pytest.fixture(autouse=True)
def nothing_is_planned(monkeypatch):
    monkeypatch.setattr(search.compiler, "planned", lambda *rest: RUN)
    monkeypatch.setattr(search.compiler, "devices", lambda slices: ())


def found(compiled, tries=12, known: Any = YOURS):
    make = lambda minutes, bindings, overrides, *rest: compiled(overrides)
    resolved: Any = None
    return search.search([], resolved, resolved, "instruct", POD, tries, known, compiled=make)


def test_one_thing_is_changed_at_first_and_each_kind_has_its_turn():
    base = search.base_of(RUN)
    overrides = [choice.overrides("instruct", base) for choice in search.choices(RUN, POD)]
    assert overrides[:3] == [
        ('instruct/Model.remat="minimal"',),
        ("instruct/Mesh.fsdp=32", "instruct/Mesh.sequence=2"),
        ("instruct/Trainer.rows=128",),
    ]
    assert ("instruct/Mesh.fsdp=32", "instruct/Mesh.tensor=2") in overrides
    assert ("instruct/Trainer.rows=32",) not in overrides  # 64 chips cannot share 32 rows
    assert len(set(overrides)) == len(overrides) and () not in overrides


def test_the_best_of_each_kind_are_joined_and_ranked(capsys):
    speeds = {'instruct/Model.remat="minimal"': 1.5, 'instruct/Model.remat="attention"': 1.2}
    speeds |= {"instruct/Trainer.rows=128": 1.3}

    def compiled(overrides):
        times = [speeds.get(text, 0.5) for text in overrides]
        speed = 1000.0
        for one in times:
            speed *= one
        return search.Tried(overrides, speed, 2**31, True)

    tried = found(compiled)
    assert tried[0].overrides == ("instruct/Trainer.rows=128", 'instruct/Model.remat="minimal"')
    assert [one.tokens_per_second for one in tried] == sorted((t.tokens_per_second for t in tried), reverse=True)
    assert len(tried) == 13 and len({one.overrides for one in tried}) == 13
    report.show_search("instruct", tried, POD)
    told = capsys.readouterr()
    assert "--set 'instruct/Trainer.rows=128' --set 'instruct/Model.remat=\"minimal\"'" in told.out
    assert "+95%" in told.out and "at most 12 of" in told.err and "12 minutes" in told.err and "12 of 12:" in told.err


def test_what_fails_or_does_not_fit_is_ranked_behind():
    def compiled(overrides):
        if "rows=128" in overrides[0]:
            return search.Tried(overrides, 9e9, 2**40, False, "needs more memory")
        return search.Tried(overrides, fault="no")

    tried = found(compiled)
    assert tried[0].overrides == () and tried[0].fits  # the settings as they are
    assert tried[1].fault == "needs more memory" and {one.fault for one in tried[2:]} == {"no"}


def test_an_interrupted_search_ranks_what_there_is(capsys):
    seen = []

    def compiled(overrides):
        if seen:
            raise KeyboardInterrupt
        seen.append(overrides)
        return search.Tried(overrides, 2000.0, 2**30, True)

    assert [one.overrides for one in found(compiled)] == [*seen, ()]
    assert "interrupted" in capsys.readouterr().err


def test_a_compiler_that_falls_or_never_ends_stops_no_search():
    fell = search.apart(1.0, [], ("a=1",), of=lambda *rest: os._exit(1))
    assert fell.overrides == ("a=1",) and "fell" in fell.fault
    late = search.apart(0.01, [], ("a=2",), of=lambda *rest: time.sleep(60))
    assert late.overrides == ("a=2",) and "not compiled within 0.01 minutes" in late.fault
    fine = search.apart(1.0, [], ("a=3",), of=lambda bindings, overrides: search.Tried(overrides, 1.0, 1, True))
    assert fine.fits
