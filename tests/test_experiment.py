"""Experiment files: what takes effect, what is refused and in which words, and the same settings written out again."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Literal

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ain_jax import experiment
from ain_jax.experiment import Experiment, ExperimentError, find_experiment, parse_override, read_bindings, resolve
from ain_jax.stages.registry import SETTINGS

EXPERIMENTS = Path(__file__).resolve().parents[1] / "experiments"


@dataclasses.dataclass(frozen=True)
class Trainer:
    steps: int
    rate: float = 1.0
    name: str = "x"
    schedule: Literal["cosine", "linear"] = "cosine"
    on: bool = True
    sizes: tuple[int, ...] = ()
    section: tuple[int, int] | None = None
    weights: Mapping[str, float] = dataclasses.field(default_factory=dict)

    def __post_init__(self):
        if self.steps < 1:
            raise ValueError(f"steps = {self.steps}: expected 1 or more")


@dataclasses.dataclass(frozen=True)
class Model:
    width: int = 8


STAGES = {"pretrain": (Trainer, Model), "instruct": (Trainer,), "export": (Model,)}
HEAD = 'Experiment.name = "test"\nExperiment.stages = ("pretrain", "instruct")\n'


def resolved(path, text, *overrides):
    path = path / "test.gin"
    path.write_text(HEAD + text, "utf-8")
    return resolve(read_bindings(path), STAGES, [parse_override(o) for o in overrides])


def refused(path, text, *overrides):
    with pytest.raises(ExperimentError) as error:
        resolved(path, text, *overrides)
    return str(error.value)


# What takes effect


def test_a_scope_wins_over_none_and_the_later_line_over_the_earlier(tmp_path):
    found = resolved(tmp_path, "pretrain/Trainer.steps = 3\nTrainer.steps = 4\nTrainer.steps = 5\nTrainer.rate = 2\n")
    assert found.stage("pretrain")["Trainer"] == Trainer(3, rate=2.0)
    assert found.stage("instruct")["Trainer"] == Trainer(5, rate=2.0)
    assert found.stage("pretrain")["Model"] == Model()
    assert "Model" not in found.stage("instruct")
    assert found.origin["pretrain/Trainer.steps"] == f"{tmp_path / 'test.gin'}:3"
    assert found.origin["instruct/Trainer.steps"] == f"{tmp_path / 'test.gin'}:5"


def test_includes_are_relative_to_the_file_that_names_them(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "shared" / "deep").mkdir(parents=True)
    (tmp_path / "shared" / "base.gin").write_text('Trainer.steps = 1\ninclude "deep/more.gin"\nTrainer.rate = 0.5\n')
    (tmp_path / "shared" / "deep" / "more.gin").write_text("Trainer.steps = 2\nTrainer.rate = 0.1\n")
    (tmp_path / "own").mkdir()
    found = resolved(tmp_path / "own", 'include "../shared/base.gin"\nModel.width = 16\n')
    assert found.stage("pretrain") == {"Trainer": Trainer(2, rate=0.5), "Model": Model(16)}
    assert found.origin["pretrain/Trainer.steps"] == "shared/deep/more.gin:1"  # from the folder we stand in


def test_macros_are_read_after_the_last_line(tmp_path):
    text = (
        "Trainer.steps = %steps\nTrainer.sizes = [%steps, 3, %more]\nTrainer.weights = {%name: %steps}\n"
        'more = %steps\nname = "a"\nsteps = 4\nsteps = 5\n'
    )
    trainer = resolved(tmp_path, text).stage("pretrain")["Trainer"]
    assert trainer == Trainer(5, sizes=(5, 3, 5), weights={"a": 5.0})
    assert resolved(tmp_path, text, "steps=7").stage("instruct")["Trainer"].sizes == (7, 3, 7)


def test_overrides_win(tmp_path):
    text = "pretrain/Trainer.steps = 3\nTrainer.steps = 4\n"
    found = resolved(tmp_path, text, "pretrain/Trainer.steps=20", "Trainer.name='b c'", "Trainer.steps = 6")
    assert found.stage("pretrain")["Trainer"] == Trainer(20, name="b c")
    assert found.stage("instruct")["Trainer"] == Trainer(6, name="b c")
    twice = resolved(tmp_path, text, "pretrain/Trainer.steps=1", "pretrain/Trainer.steps=2")
    assert twice.stage("pretrain")["Trainer"].steps == 2


@pytest.mark.parametrize(
    "line, value",
    [
        ("Trainer.rate = 2", ("rate", 2.0)),
        ("Trainer.rate = -1e-3", ("rate", -1e-3)),
        ("Trainer.sizes = [1, 2]", ("sizes", (1, 2))),
        ("Trainer.sizes = (1,)", ("sizes", (1,))),
        ("Trainer.section = (1, 2)", ("section", (1, 2))),
        ("Trainer.section = None", ("section", None)),
        ("Trainer.on = False", ("on", False)),
        ('Trainer.name = "a # b"  # a remark', ("name", "a # b")),
        ('Trainer.schedule = "linear"', ("schedule", "linear")),
        ('Trainer.weights = {\n    "a": 1,  # one\n    "b": 2.5,\n}', ("weights", {"a": 1.0, "b": 2.5})),
    ],
)
def test_values_take_the_declared_type(tmp_path, line, value):
    found = getattr(resolved(tmp_path, f"Trainer.steps = 1\n{line}\n").stage("pretrain")["Trainer"], value[0])
    assert found == value[1] and type(found) is type(value[1])


# What is refused


@pytest.mark.parametrize(
    "text, told",
    [
        ("Trainer.stepz = 1", "test.gin:3: Trainer has no setting 'stepz': did you mean 'steps'?"),
        ("Trainr.steps = 1", "test.gin:3: no settings class 'Trainr' in 'Trainr.steps': did you mean 'Trainer'?"),
        ("trainer.steps = 1", "did you mean 'Trainer'?"),
        ("pretran/Trainer.steps = 1", "no stage 'pretran' in 'pretran/Trainer.steps': did you mean 'pretrain'?"),
        ("a/pretrain/Trainer.steps = 1", "no stage 'a/pretrain'"),
        ("instruct/Model.width = 1", "stage 'instruct' does not read Model (read by: pretrain, export)"),
        ("pretrain/Experiment.seed = 1", "does not read Experiment (read by: no stage; write it without a scope)"),
        ('Trainer.steps = "many"', "Trainer.steps = 'many': expected int, found str"),
        ("Trainer.steps = 1.0", "Trainer.steps = 1.0: expected int, found float"),
        ("Trainer.steps = True", "Trainer.steps = True: expected int, found bool"),
        ("Trainer.rate = True", "Trainer.rate = True: expected float, found bool"),
        ("Trainer.on = 1", "Trainer.on = 1: expected bool, found int"),
        ("Trainer.name = None", "Trainer.name = None: expected str, found NoneType"),
        ("Trainer.sizes = 3", "Trainer.sizes = 3: expected tuple[int, ...], found int"),
        ('Trainer.sizes = (1, "b")', "Trainer.sizes[1] = 'b': expected int, found str"),
        ("Trainer.section = (1, 2, 3)", "Trainer.section = (1, 2, 3): expected tuple[int, int] | None, found tuple"),
        ('Trainer.weights = {"a": "b"}', "Trainer.weights['a'] = 'b': expected float, found str"),
        ("Trainer.weights = [1]", "Trainer.weights = [1]: expected Mapping[str, float], found list"),
        ('Trainer.schedule = "cosin"', "Trainer.schedule = 'cosin': did you mean 'cosine'?"),
        ('Trainer.schedule = "step"', "Trainer.schedule = 'step': known: cosine, linear"),
        ("Trainer.steps = 0", "pretrain/Trainer: steps = 0: expected 1 or more"),
        (
            "Trainer.steps = %stepz\nsteps = 1\nTrainer.rate = %steps",
            "test.gin:3: no macro %stepz: did you mean 'steps'?",
        ),
        ("Trainer.steps = %a\na = %b\nb = %a", "the macro %a refers to itself"),
        ("Trainer.steps = 1\nexport/Model.width = %typo", "test.gin:4: no macro %typo: none is set"),  # not even run
        ("Trainer.steps = 1\nunused = 3", "test.gin:4: nothing refers to the macro 'unused'"),
        ("pretrain/steps = 3", "test.gin:3: the macro 'pretrain/steps' has a scope; a macro has none"),
        ("Trainer.steps = @Trainer", "test.gin: @Trainer: references to functions are not used here"),
        ("import os", "test.gin:3: import statements are not used here"),
        ("Trainer.steps = many", "test.gin:3: not a gin statement"),
        ("Trainer.steps == 3", "test.gin:3: not a gin statement"),
        ("Trainer.sizes = (1, 2", "not a gin statement"),
        ('include "bas.gin"', "test.gin:3: include 'bas.gin': no such file beside test.gin"),
    ],
)
def test_each_fault_is_told_with_its_line_and_the_nearest_name(tmp_path, text, told):
    assert told in refused(tmp_path, text + "\n")


def test_all_faults_are_told_at_once(tmp_path):
    message = refused(tmp_path, "Trainer.stepz = 1\nModel.width = 'a'\npretran/Model.width = 1\n")
    lines = message.splitlines()
    assert len(lines) == 5 == len(set(lines))
    assert "pretrain/Trainer.steps is not bound, and it has no default: add the line to the file" in lines
    assert "instruct/Trainer.steps is not bound, and it has no default: add the line to the file" in lines


def test_a_missing_include_names_the_nearest_file(tmp_path):
    (tmp_path / "base.gin").write_text("")
    assert "did you mean 'base.gin'?" in refused(tmp_path, 'include "bse.gin"\n')


def test_files_that_include_one_another_are_refused(tmp_path):
    (tmp_path / "other.gin").write_text('include "test.gin"\n')
    assert "the files include one another: test.gin -> other.gin -> test.gin" in refused(
        tmp_path, 'include "other.gin"\n'
    )
    (tmp_path / "twice.gin").write_text("Trainer.steps = 1\n")
    assert resolved(tmp_path, 'include "twice.gin"\ninclude "twice.gin"\n')  # is no circle


@pytest.mark.parametrize(
    "override, told",
    [
        ("Trainer.steps", "expected [stage/]Class.name=value, for example pretrain/Trainer.steps=20"),
        ("Trainer.name=abc", "'abc' is not a gin value; text is written in quotes: Trainer.name=\"abc\""),
        ("Trainer.steps=", "'' is not a gin value"),
        ("Trainer.steps=1\nTrainer.rate=2", "expected one binding"),
        ("Trainer.stepz=1", "--set 'Trainer.stepz=1': Trainer has no setting 'stepz': did you mean 'steps'?"),
        (
            "Trainer.steps=9",
            "changes nothing: bound by stage as instruct/Trainer.steps, pretrain/Trainer.steps; name the stage",
        ),
        ("export/Model.width=9", "changes nothing: no stage of test reads it"),
        ("unused=9", "nothing refers to the macro 'unused'"),
    ],
)
def test_overrides_that_cannot_be_or_change_nothing_are_refused(tmp_path, override, told):
    assert told in refused(tmp_path, "pretrain/Trainer.steps = 1\ninstruct/Trainer.steps = 2\n", override)


def test_what_an_experiment_is_called_and_does_is_checked():
    for settings_, told in (
        ({"name": "", "stages": ("a",)}, "name = '': expected the name of a folder"),
        ({"name": "../x", "stages": ("a",)}, "name = '../x'"),
        ({"name": "x", "stages": ()}, "stages = \\(\\): expected one stage or more"),
    ):
        with pytest.raises(ValueError, match=told):
            Experiment(**settings_)


@pytest.mark.parametrize(
    "stages, told",
    [
        ('("pretrain", "instrct")', "Experiment.stages: no stage 'instrct': did you mean 'instruct'?"),
        ('("pretrain", "pretrain")', "Experiment.stages names 'pretrain' more than once"),
        ('("pretrain")', "Experiment.stages = 'pretrain': expected tuple[str, ...], found str"),
    ],
)
def test_stages_are_checked(tmp_path, stages, told):
    (tmp_path / "test.gin").write_text(f'Experiment.name = "test"\nExperiment.stages = {stages}\nTrainer.steps = 1\n')
    with pytest.raises(ExperimentError) as error:
        resolve(read_bindings(tmp_path / "test.gin"), STAGES)
    assert told in str(error.value)


def test_files_that_cannot_be_read(tmp_path):
    (tmp_path / "latin.gin").write_bytes('Trainer.name = "é"'.encode("latin-1"))
    with pytest.raises(ExperimentError, match="latin.gin: not UTF-8 text"):
        read_bindings(tmp_path / "latin.gin")
    with pytest.raises(ExperimentError, match="none.gin: cannot be read .No such file"):
        read_bindings(tmp_path / "none.gin")


def test_experiments_are_found_by_name_or_path(tmp_path):
    for name in ("base", "small", "large"):
        (tmp_path / f"{name}.gin").write_text("")
    assert find_experiment("small", tmp_path) == tmp_path / "small.gin"
    assert find_experiment(str(tmp_path / "large.gin"), Path("elsewhere")) == tmp_path / "large.gin"
    for name, told in (
        ("smal", "no experiment 'smal' in .*: did you mean 'small'"),
        ("zzz", "known: large, small$"),
        (str(tmp_path / "smll.gin"), "no experiment file .*smll.gin: did you mean 'small.gin'"),
        ("nowhere/small.gin", "give the path of a .gin file or a name in"),
    ):
        with pytest.raises(ExperimentError, match=told):
            find_experiment(name, tmp_path)
    with pytest.raises(ExperimentError, match="holds no .gin file"):
        find_experiment("small", tmp_path / "none")


# Written out again

names = st.text(st.characters(exclude_categories=["Cs", "Cc"]), max_size=8)
trainers = st.builds(
    Trainer,
    steps=st.integers(1, 10**12),
    rate=st.floats(allow_nan=False, allow_infinity=False),
    name=names,
    schedule=st.sampled_from(["cosine", "linear"]),
    on=st.booleans(),
    sizes=st.lists(st.integers(), max_size=3).map(tuple),
    section=st.none() | st.tuples(st.integers(), st.integers()),
    weights=st.dictionaries(names, st.floats(allow_nan=False, allow_infinity=False), max_size=3),
)


@settings(max_examples=60, deadline=None)
@given(trainers, names.filter(lambda n: n == Path(n).name not in ("", "..")), names)
def test_the_operative_text_resolves_to_the_same_settings(tmp_path_factory, trainer, name, description):
    whole = Experiment(name=name, stages=("pretrain",), description=description)
    origin = {"pretrain/Trainer.steps": 'a.gin:3 "# \\'}
    before = experiment.Resolved(whole, {"pretrain": {"Trainer": trainer, "Model": Model(3)}}, origin)
    path = tmp_path_factory.mktemp("text") / "config.gin"
    for origins in (True, False):
        path.write_text(before.text(origins), "utf-8")
        after = resolve(read_bindings(path), STAGES)
        assert after.experiment == whole and after.settings == before.settings
        assert after.text(origins=False) == before.text(origins=False)
    assert ("# a.gin:3" in before.text()) and ("# a.gin:3" not in before.text(origins=False))


@pytest.mark.parametrize("path", [p for p in EXPERIMENTS.glob("*.gin") if p.stem != "base"], ids=lambda p: p.stem)
def test_the_experiments_that_come_with_it_resolve(path, tmp_path):
    found = resolve(read_bindings(path), SETTINGS)
    assert found.experiment.name == path.stem
    (tmp_path / "config.gin").write_text(found.text(), "utf-8")
    again = resolve(read_bindings(tmp_path / "config.gin"), SETTINGS)
    assert again.settings == found.settings and again.experiment == found.experiment


# A stage under a further name

KINDS = 'Experiment.name = "test"\nExperiment.stages = ("rows", "pretrain")\nExperiment.kinds = {"rows": "pretrain"}\n'


def resolved_kinds(path, text, *overrides):
    path = path / "test.gin"
    path.write_text(text, "utf-8")
    return resolve(read_bindings(path), STAGES, [parse_override(o) for o in overrides])


def test_a_stage_of_a_kind_reads_the_bindings_of_its_kind_and_its_own_before_them(tmp_path):
    text = KINDS + "Trainer.steps = 1\npretrain/Trainer.steps = 2\nrows/Trainer.rate = 3\npretrain/Trainer.rate = 4\n"
    found = resolved_kinds(tmp_path, text, "rows/Model.width=5")
    rows, pretrain = found.stage("rows"), found.stage("pretrain")
    assert (rows["Trainer"].steps, rows["Trainer"].rate, rows["Model"].width) == (2, 3.0, 5)
    assert (pretrain["Trainer"].steps, pretrain["Trainer"].rate, pretrain["Model"].width) == (2, 4.0, 8)
    assert found.experiment.kind("rows") == "pretrain" and found.experiment.kind("pretrain") == "pretrain"
    (tmp_path / "again").mkdir()
    again = resolved_kinds(tmp_path / "again", found.text())
    assert again.settings == found.settings and again.experiment == found.experiment


@pytest.mark.parametrize(
    ("kinds", "words"),
    [
        ('{"rows": "pretrian"}', ["no stage 'pretrian'", "did you mean 'pretrain'?"]),
        ('{"export": "pretrain"}', ["'export' is a stage of its own"]),
        ('{"rows": "pretrain", "other": "pretrain"}', ["'other'", "stages does not hold"]),
        ('{"rows": 3}', ["expected str", "found int"]),
        ('{"../rows": "pretrain"}', ["'../rows' cannot name a folder"]),
    ],
)
def test_wrong_kinds_are_refused(tmp_path, kinds, words):
    text = KINDS.rpartition("Experiment.kinds")[0] + f"Experiment.kinds = {kinds}\nTrainer.steps = 1\n"
    with pytest.raises(ExperimentError) as error:
        resolved_kinds(tmp_path, text)
    assert all(word in str(error.value) for word in words), str(error.value)


# A setting that is a class


@dataclasses.dataclass(frozen=True)
class Part:
    size: int = 1
    deep: Model = Model()


@dataclasses.dataclass(frozen=True)
class Whole:
    rate: float = 1.0
    part: Part = Part()


def test_a_part_is_bound_by_its_own_name_and_written_out_by_it(tmp_path):
    head = 'Experiment.name = "test"\nExperiment.stages = ("pretrain", "export")\n'
    stages = {"pretrain": (Whole,), "export": (Part,)}

    def read(text, *overrides):
        (tmp_path / "test.gin").write_text(text, "utf-8")
        return resolve(read_bindings(tmp_path / "test.gin"), stages, [parse_override(o) for o in overrides])

    found = read(head + "Part.size = 2\npretrain/Part.size = 3\nModel.width = 4\n", "pretrain/Whole.rate=5")
    assert found.stage("pretrain")["Whole"] == Whole(5.0, Part(3, Model(4)))
    assert found.stage("export")["Part"] == Part(2, Model(4))
    assert read(found.text()).settings == found.settings
    with pytest.raises(ExperimentError, match=r"Whole.part is a part with settings of its own: bind Part.NAME"):
        read(head + "Whole.part = 3\n")
    with pytest.raises(ExperimentError, match="did you mean 'size'"):
        read(head + "Part.sise = 3\n")
