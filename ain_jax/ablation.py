"""An ablation: an experiment, some settings of it varied, each variant with several seeds; what differs, how surely.

    grid = Grid("experiments/my.gin", cells={"20%": ["Mixture.shares={'en': 0.2}"], "40%": [...]})
    found = run(grid, Path("runs/my_ablation"))       what is finished there is read and not run again
    for difference in differences(found, "documents/en", to="20%"):
        print(difference)

A cell and a seed are one run in a folder of its own, the very run that `launch/` starts with the same bindings
(`commands`): so a grid may be run on other machines, and read here. Runs of one process share what they compiled and
the data that they built (`stages.run_settings.Shared`). What is measured are held-out texts, in bits per byte
(`train/watch.py`).

With 3 seeds little can be told, and nothing is told beyond that: an interval is Student's, of a difference it is that
of the seeds' own differences, and of several comparisons all hold at once.
"""

import ast
import contextlib
import dataclasses
import hashlib
import io
import json
import math
import os
import shlex
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from scipy import stats

LEVEL = 0.95
LOG = "log.txt"  # of a run, beside its stages: what it told


@dataclasses.dataclass(frozen=True)
class Grid:
    """An experiment, and what is varied of it."""

    experiment: str  # a name in experiments/, or the path of a .gin file
    cells: Mapping[str, Sequence[str]]  # name of a variant -> its bindings, as `binding` makes them
    seeds: Sequence[int] = (0, 1, 2)
    common: Sequence[str] = ()  # bindings of every cell
    stage: str = "pretrain"  # whose held-out texts are read

    def __post_init__(self):
        folders = [_folder_name(cell) for cell in self.cells]
        if len(set(folders)) < len(folders) or not self.cells:
            raise ValueError(f"cells = {list(self.cells)}: expected one or more, named by other letters or digits each")
        if len(set(self.seeds)) < max(len(self.seeds), 2):
            raise ValueError(f"seeds = {list(self.seeds)}: expected two or more that differ; an interval needs them")

    def folder(self, under: Path, cell: str, seed: int) -> Path:
        """Where one run lies."""
        return under / _folder_name(cell) / f"seed_{seed}"

    def arguments(self, under: Path, cell: str, seed: int) -> list[str]:
        """What a launcher is told of one run."""
        bindings = [*self.common, *self.cells[cell], f"Experiment.seed={seed}"]
        chosen = [part for binding in bindings for part in ("--set", binding)]
        where = ["--run_dir", str(self.folder(under, cell, seed)), "--data_dir", str(under / "data")]
        return ["--exp", self.experiment, *where, *chosen]


def binding(name: str, value: Any) -> str:
    """A setting and its value as --set takes them, in double quotes where they can be: a shell reads these easily."""
    plain = json.dumps(value, ensure_ascii=False)
    try:
        same = ast.literal_eval(plain) == (list(value) if isinstance(value, tuple) else value)
    except ValueError:  # true, null
        same = False
    return f"{name}={plain if same else repr(value)}"


def _folder_name(cell: str) -> str:
    words = "".join(letter if letter.isalnum() or letter in ".-" else " " for letter in cell.replace("%", " percent"))
    return "_".join(words.split()) or "cell"


def at_root() -> Path:
    """Go to the folder that holds experiments/, from a notebook's own folder as well; that folder."""
    for folder in (here := Path.cwd(), *here.parents):
        if (folder / "experiments" / "base.gin").is_file():
            os.chdir(folder)
            return folder
    raise ValueError(f"{here} lies in no copy of ain_jax: there is no experiments/base.gin there or above")


def commands(grid: Grid, under: Path, launcher: str = "launch/tpu_pod.py") -> list[str]:
    """The command of each run; behind them `run` finds all finished, and reads them."""
    every = [(cell, seed) for seed in grid.seeds for cell in grid.cells]
    return [shlex.join(["python", launcher, *grid.arguments(under, cell, seed)]) for cell, seed in every]


@dataclasses.dataclass(frozen=True)
class Found:
    """What a grid came to: a number for each measure, cell and seed. Measures are bits per byte of held-out texts."""

    cells: tuple[str, ...]
    seeds: tuple[int, ...]
    measures: Mapping[str, np.ndarray]  # name -> (cells, seeds)
    before: Mapping[str, np.ndarray]  # the same before the first step

    def of(self, measure: str, cell: str) -> np.ndarray:
        """One number for each seed."""
        return self.measures[measure][self.cells.index(cell)]

    def with_mean(self, name: str, measures: Sequence[str]) -> "Found":
        """The same, and beside it the plain mean of some measures, as one more."""
        mean = lambda of: {**of, name: np.mean([of[m] for m in measures], axis=0)}
        return dataclasses.replace(self, measures=mean(self.measures), before=mean(self.before))

    def table(self, measures: Sequence[str]) -> str:
        """Means and intervals as text, a line for each cell."""
        lines = [("", *measures), ("before", *(f"{self.before[m].mean():.3f}" for m in measures))]
        lines += [(cell, *(str(interval(self.of(m, cell))) for m in measures)) for cell in self.cells]
        widths = [max(len(line[column]) for line in lines) for column in range(len(lines[0]))]
        return "\n".join("  ".join(c.ljust(w) for c, w in zip(line, widths, strict=True)).rstrip() for line in lines)


def run(grid: Grid, under: Path, say: Callable[[str], object] = print) -> Found:
    """Run every cell with every seed, one after another in this process, and read what they came to.

    What is finished stays as it is, what was interrupted goes on. RuntimeError: a run failed; its last words are told.
    """
    programs: dict[tuple[Any, ...], Any] = {}  # compiled once for all of them
    every = [(cell, seed) for seed in grid.seeds for cell in grid.cells]
    began = time.monotonic()
    for cell, seed in every:
        _quietly(grid.arguments(under, cell, seed), grid.folder(under, cell, seed), programs)
    say(f"{len(every)} runs ({len(grid.cells)} cells x {len(grid.seeds)} seeds) in {time.monotonic() - began:.0f} s")
    return read(grid, under)


def start(experiment: str, folder: Path) -> None:
    """Run an experiment whose export the runs of a grid begin with; where it is finished nothing happens."""
    _quietly(["--exp", experiment, "--run_dir", str(folder)], folder, {})


def _quietly(arguments: list[str], folder: Path, programs: dict[tuple[Any, ...], Any]) -> None:
    """One run, what it tells written beside it."""
    folder.mkdir(parents=True, exist_ok=True)
    aside = contextlib.ExitStack()
    with (folder / LOG).open("a", encoding="utf-8") as log, aside:
        aside.enter_context(contextlib.redirect_stderr(log))
        aside.enter_context(contextlib.redirect_stdout(log))
        from ain_jax import run as runs  # what it imports has something to say about notebooks

        status = runs.main(arguments, programs=programs)
    if status == 130:
        raise KeyboardInterrupt
    if status:
        told = (folder / LOG).read_text("utf-8").strip().splitlines()[-12:]
        raise RuntimeError("\n".join([f"{folder} ended with {status}:", *told]))


def read(grid: Grid, under: Path) -> Found:
    """What finished runs came to. ValueError: some are not there, or nothing was watched in them."""
    cells, seeds = tuple(grid.cells), tuple(grid.seeds)
    last: dict[str, np.ndarray] = {}
    first: dict[str, np.ndarray] = {}
    for c, cell in enumerate(cells):
        for s, seed in enumerate(seeds):
            path = grid.folder(under, cell, seed) / grid.stage / "result.json"
            if not path.is_file():
                raise ValueError(f"{path} is not there: the run of {cell!r} with seed {seed} is not finished")
            watched = json.loads(path.read_text("utf-8"))["numbers"].get("watched")
            if not watched:
                raise ValueError(f"{path}: nothing was watched: bind {grid.stage}/Watch.texts")
            for name, (before, after) in watched.items():
                for table, value in ((first, before), (last, after)):
                    table.setdefault(name, np.full((len(cells), len(seeds)), np.nan))[c, s] = value
    if short := [name for name, table in last.items() if not np.isfinite(table).all()]:
        raise ValueError(f"{', '.join(short)}: not watched in every cell; bind Watch.texts in Grid.common")
    for name, table in last.items():
        same = [cell for cell, values in zip(cells, table, strict=True) if np.ptp(values) == 0]
        if same:
            raise ValueError(f"{name}: all seeds came to the same number in {', '.join(same)}: they vary nothing there")
    return Found(cells, seeds, last, first)


@dataclasses.dataclass(frozen=True)
class Interval:
    """A mean, and the ends of the interval that holds the true one, at a level of confidence."""

    mean: float
    low: float
    high: float

    @property
    def excludes_zero(self) -> bool:
        """Whether the sign is told."""
        return self.low > 0 or self.high < 0

    def __str__(self) -> str:
        return f"{self.mean:.3f} ± {(self.high - self.low) / 2:.3f}"


def interval(values: Iterable[float], level: float = LEVEL) -> Interval:
    """Student's interval of the mean of a few numbers, drawn alike: mean ± t · s / √n (Student 1908, Biometrika 6, 1).

    1, 2, 3: mean 2, s = 1, and t = 4.303 with 2 degrees of freedom: 2 ± 4.303 / √3 = 2 ± 2.484.
    """
    numbers = np.asarray(list(values), float)
    if len(numbers) < 2 or not np.isfinite(numbers).all():
        raise ValueError(f"values = {numbers.tolist()}: expected two finite numbers or more")
    if not 0 < level < 1:
        raise ValueError(f"level = {level}: expected above 0 and below 1")
    half = float(stats.t.ppf((1 + level) / 2, len(numbers) - 1)) * numbers.std(ddof=1) / math.sqrt(len(numbers))
    mean = float(numbers.mean())
    return Interval(mean, mean - half, mean + half)


@dataclasses.dataclass(frozen=True)
class Difference:
    """How much one cell's measure lies above another's; its sentence says no more than the interval does."""

    measure: str
    cell: str
    to: str
    interval: Interval
    seeds: int
    level: float  # at which all comparisons made with it hold at once
    unit: str = "bits per byte"

    @property
    def told(self) -> bool:
        """Whether it lies outside the interval."""
        return self.interval.excludes_zero

    def __str__(self) -> str:
        what = f"{self.measure}, {self.cell} against {self.to}"
        between = f"{self.interval.low:+.3f} to {self.interval.high:+.3f}"
        if not self.told:
            return f"{what}: no difference that {self.seeds} seeds can tell ({between})"
        word = "above" if self.interval.mean > 0 else "below"
        return f"{what}: {abs(self.interval.mean):.3f} {self.unit} {word}, outside the interval ({between})"


def differences(found: Found, measure: str, to: str, level: float = LEVEL, among: int = 0) -> list[Difference]:
    """Each other cell against one, seed by seed.

    The runs of one seed share what the seed draws, so their differences are compared and not their means: the paired
    interval. As many are looked at as there are cells, so each is made at 1 - (1 - level) / comparisons, and all hold
    at once with `level` (Bonferroni; Dunn 1961, Journal of the American Statistical Association 56, 52). `among` says
    how many comparisons are told in all, where these are some of them.
    """
    if to not in found.cells:
        raise ValueError(f"to = {to!r}: expected one of {', '.join(found.cells)}")
    others = [cell for cell in found.cells if cell != to]
    each = 1 - (1 - level) / max(len(others), among)
    made = []
    for cell in others:
        own = interval(found.of(measure, cell) - found.of(measure, to), each)
        made.append(Difference(measure, cell, to, own, len(found.seeds), level))
    return made


def tell(made: Sequence[Difference]) -> str:
    """The sentences, and what all of them stand on."""
    if not made:
        return "nothing was compared"
    one = made[0]
    foot = (
        f"({len(made)} paired comparisons over {one.seeds} seeds; the intervals hold all at once with {one.level:.0%}; "
        f"{sum(d.told for d in made)} of them leave out 0. Fewer bits per byte are better.)"
    )
    return "\n".join([*map(str, made), foot])


@dataclasses.dataclass(frozen=True)
class Correlation:
    """Whether two things rise together, over some points and several seeds."""

    name: str
    interval: Interval
    seeds: int

    def __str__(self) -> str:
        between = f"{self.interval.low:+.2f} to {self.interval.high:+.2f}"
        if not self.interval.excludes_zero:
            return f"{self.name}: no connection that {self.seeds} seeds can tell (rank correlation {between})"
        word = "rise together" if self.interval.mean > 0 else "one falls as the other rises"
        return f"{self.name}: {word}, rank correlation {self.interval.mean:+.2f}, outside the interval ({between})"


def rank_correlation(name: str, x: np.ndarray, y: np.ndarray, level: float = LEVEL) -> Correlation:
    """Spearman's correlation of `x` and `y` (seeds, points), seed by seed, and the interval of its mean over the seeds.

    Ranks, because a curve that only rises need not be straight (Spearman 1904, American Journal of Psychology 15, 72).
    The interval says what other seeds would give on these same points, and nothing of other languages. Its ends are
    held to -1 and 1.
    """
    if x.shape != y.shape or x.ndim != 2 or x.shape[1] < 3:
        raise ValueError(f"x {x.shape} and y {y.shape}: expected the same (seeds, points), three points or more")
    each = [float(np.corrcoef(stats.rankdata(a), stats.rankdata(b))[0, 1]) for a, b in zip(x, y, strict=True)]
    made = interval(each, level)
    return Correlation(name, Interval(made.mean, max(made.low, -1.0), min(made.high, 1.0)), len(each))


class Picture(Figure):
    """A figure that a notebook shows, whatever its settings of matplotlib are."""

    def _repr_png_(self) -> bytes:
        made = io.BytesIO()
        self.savefig(made, format="png")
        return made.getvalue()


def curves(found: Found, measures: Sequence[str], at: Sequence[float], axis: str, title: str = "") -> Picture:
    """A figure: each measure over the cells, `at` their places on the axis; means, intervals, and each seed a point."""
    figure = Picture(figsize=(6.4, 3.4), dpi=90, layout="constrained")
    axes = figure.add_subplot()
    for measure in measures:
        each = [interval(found.of(measure, cell)) for cell in found.cells]
        means = [one.mean for one in each]
        (line,) = axes.plot(at, means, marker="o", markersize=4, label=measure)
        axes.fill_between(at, [o.low for o in each], [o.high for o in each], color=line.get_color(), alpha=0.15, lw=0)
        points = found.measures[measure]
        axes.plot(np.repeat(at, points.shape[1]), points.ravel(), ".", color=line.get_color(), alpha=0.5, markersize=4)
    axes.set(xlabel=axis, ylabel="bits per byte, held out", title=title)
    axes.set_xticks(list(at), [str(cell) for cell in found.cells], fontsize=8)
    axes.legend(frameon=False, fontsize=8)
    axes.spines[["top", "right"]].set_visible(False)
    return figure


def scatter(x: np.ndarray, y: np.ndarray, names: Sequence[str], axis: str, up: str) -> Picture:
    """A figure: a point for each name, its mean over the seeds (seeds, points), and the seeds as small ones."""
    figure = Picture(figsize=(6.4, 3.4), dpi=90, layout="constrained")
    axes = figure.add_subplot()
    axes.plot(x.ravel(), y.ravel(), ".", color="0.7", markersize=3)
    axes.plot(x.mean(axis=0), y.mean(axis=0), "o", markersize=4)
    for name, a, b in zip(names, x.mean(axis=0), y.mean(axis=0), strict=True):
        axes.annotate(name, (a, b), xytext=(3, 2), textcoords="offset points", fontsize=7)
    axes.set(xlabel=axis, ylabel=up, xscale="log")
    axes.spines[["top", "right"]].set_visible(False)
    return figure


def digest(sources: Iterable[str]) -> str:
    """Twelve hex digits of the code of cells, the empty ones left out."""
    cells = [source.strip() for source in sources]
    return hashlib.sha256("\0".join(cell for cell in cells if cell).encode()).hexdigest()[:12]


def colophon() -> None:
    """Print what made a notebook's output: a digest of the code cells that ran, and the versions.

    tests/test_notebooks.py compares it with the cells that are saved.
    """
    import jax
    from IPython.core.getipython import get_ipython  # pyright: ignore[reportMissingImports]

    import ain_jax

    shell = get_ipython()
    assert shell is not None, "a colophon is for notebooks"
    ran = digest(shell.user_ns["In"])
    print(f"made by these cells ({ran}), ain_jax {ain_jax.__version__}, jax {jax.__version__}, on {_machine()}")


def _machine() -> str:
    import jax

    return f"{os.cpu_count()} CPU cores" if jax.default_backend() == "cpu" else str(jax.devices()[0].device_kind)


def ready(folder: Path = Path("twins")) -> None:
    """Write what the tiny experiments begin with, as `python -m ain_jax.twins`, where it is not there yet."""
    from ain_jax import twins

    if not (folder / "data" / "held_out").is_dir():  # the last that is written
        with contextlib.redirect_stderr(io.StringIO()):  # what is imported has something to say about notebooks
            twins.write(folder)
