"""A run's folder -> its report as one HTML page: no script, no address outside it, pictures and plots inside it."""

import ast
import base64
import dataclasses
import importlib.resources
import io
import json
import re
import unicodedata
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2
import matplotlib
from markupsafe import Markup
from matplotlib.figure import Figure

from ain_jax import report_measures
from ain_jax.evaluate import scores
from ain_jax.train import metrics, watch

INK, GRID, SERIES = "#000001", "#000002", "#0000a{}"  # stand for the page's own colours, which differ by light and dark
COLOURS = 8  # of the page, for series
DASHES = ((), (5, 2), (1.5, 1.5), (5, 1.5, 1.5, 1.5), (9, 3))
PLAIN = "\n\t\u200c\u200d\u200e\u200f"  # invisible, and at home in Arabic text and in emoji
LANGUAGES = ("ar", "en", "ar-en")  # these keep their colours from plot to plot


@dataclasses.dataclass(frozen=True)
class Series:
    """One curve: its name, the look it has, and its smoothed ends."""

    name: str
    colour: int
    dash: str  # as SVG writes it
    first: float
    last: float


@dataclasses.dataclass(frozen=True)
class Plot:
    """The losses of one stage."""

    stage: str
    unit: str
    steps: int
    window: int  # steps in each mean
    svg: Markup
    series: Sequence[Series]


def render(summary: Mapping[str, Any], root: Path, config: str) -> str:
    """The whole page as text."""
    stages = list(summary.get("stages") or {})
    rows = report_measures.table(summary)
    template = (importlib.resources.files("ain_jax") / "report.html.jinja").read_text("utf-8")
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters |= {"direction": direction, "lang": lang, "visible": visible}
    return environment.from_string(template).render(
        name=summary.get("experiment", root.name),
        description=_description(config),
        seed=summary.get("seed", ""),
        machine=summary.get("machine") or {},
        versions=summary.get("versions") or {},
        seconds=(summary.get("times") or {}).get("seconds") or {},
        speeds=(summary.get("times") or {}).get("tokens_per_second") or {},
        rows=rows,
        columns=report_measures.columns(summary, rows),
        heading=report_measures.heading,
        language=report_measures.language,
        claims=report_measures.verdicts(summary),
        held=report_measures.held(report_measures.verdicts(summary)),
        plots=[p for stage in stages for p in plots(stage, root / stage)],
        learns={
            stage: json.loads(path.read_text("utf-8"))
            for stage in stages
            if (path := root / stage / "learns.json").is_file()  # by stages/learning.py, which imports far more
        },
        fertility=(summary.get("stages", {}).get("extend_tokenizer") or {}).get("fertility") or {},
        samples=samples(root / "evaluate" / "shown", [report_measures.BEFORE, *stages]),
        config=config,
        duration=report_measures.duration,
    )


def plots(stage: str, folder: Path) -> list[Plot]:
    """The curves of a stage's losses, and of the held-out texts that it watched."""
    found = plot(stage, metrics.read(folder / "metrics.jsonl")), watch_plot(stage, watch.read(folder))
    return [one for one in found if one]


def plot(stage: str, lines: Sequence[Mapping[str, Any]]) -> Plot | None:
    """The curves of every number called `loss` or `loss/...`, smoothed; None where a stage logged none."""
    names = ["loss", *sorted({name for line in lines for name in line if name.startswith("loss/")})]
    points = _points(names, lines)
    if not points:
        return None
    told = {name for line in lines for name in line}
    unit = "nats per pair" if "margin" in told else "nats per token"
    unit = "loss per judged answer" if "baseline" in told else unit
    called = lambda name: name.removeprefix("loss/preference/").removeprefix("loss/") if name != "loss" else "all"
    return _drawn(stage, unit, f"loss, {unit}", points, max(1, int(lines[-1]["step"]) // 25), called)


def watch_plot(stage: str, lines: Sequence[Mapping[str, Any]]) -> Plot | None:
    """The curves of bits per byte, from before the first step on; None where nothing was watched."""
    told = [{f"watch/{name}" if name != "step" else name: value for name, value in line.items()} for line in lines]
    points = _points(sorted({name for line in told for name in line if name != "step"}), told)
    called = lambda name: name.removeprefix("watch/")
    return _drawn(f"{stage}: held-out texts", "bits per byte", "bits per byte", points, 1, called) if points else None


def _points(names: Sequence[str], lines: Sequence[Mapping[str, Any]]) -> dict[str, list[tuple[int, float]]]:
    """(step, value) by name, of the names that occur."""
    points = {name: [(line["step"], line[name]) for line in lines if name in line] for name in names}
    return {name: values for name, values in points.items() if values}


def _drawn(
    stage: str,
    unit: str,
    label: str,
    points: Mapping[str, Sequence[tuple[int, float]]],
    window: int,
    called: Callable[[str], str],
) -> Plot:
    """The curves as means over `window` neighbours, each in its own look."""
    looks = _looks([name for name in points if "/" in name])
    series = []
    settings: Any = {"svg.fonttype": "none", "svg.hashsalt": stage, "font.size": 10, "font.family": "sans-serif"}
    with matplotlib.rc_context(settings):
        figure = Figure(figsize=(5.0, 2.7), layout="constrained")
        axes = figure.subplots()
        for name, values in points.items():
            colour, dash = looks.get(name, (0, ()))
            steps_S, values_S = [s for s, _ in values], _smooth([v for _, v in values], window)
            line = axes.plot(
                steps_S,
                values_S,
                color=SERIES.format(colour),
                linewidth=1.6,
                zorder=3 if dash else 2,
                solid_capstyle="round",
                marker="o" if len(values_S) == 1 else "",
                markersize=3,
            )[0]
            if dash:
                line.set_dashes(dash)
            drawn = " ".join(f"{length * 1.6:g}" for length in dash)
            series.append(Series(called(name), colour, drawn, values_S[0], values_S[-1]))
        axes.set_xlabel("step", color=INK)
        axes.set_ylabel(label, color=INK)
        axes.grid(axis="y", color=GRID, linewidth=0.6)
        axes.tick_params(colors=INK, length=0)
        axes.spines[["top", "right", "left"]].set_visible(False)
        axes.spines["bottom"].set_color(GRID)
        svg = _svg(figure)
    steps = max(values[-1][0] for values in points.values())
    return Plot(stage, unit, int(steps), window, svg, series)


def _looks(names: Sequence[str]) -> dict[str, tuple[int, tuple[float, ...]]]:
    """A colour and a dash for each curve: "loss/read/ar" is coloured by its language and dashed by its source."""
    parts = {name: (name.split("/")[1], name.rpartition("/")[2]) for name in names}
    sources = list(dict.fromkeys(source for source, _ in parts.values()))
    kinds = list(dict.fromkeys((*LANGUAGES, *(kind for _, kind in parts.values()))))
    return {
        name: (1 + kinds.index(kind) % (COLOURS - 1), DASHES[sources.index(source) % len(DASHES)])
        for name, (source, kind) in parts.items()
    }


def _smooth(values: Sequence[float], window: int) -> list[float]:
    """Means over `window` neighbours, fewer at the two ends."""
    half = window // 2
    near = [values[max(0, i - half) : i + half + 1] for i in range(len(values))]
    return [sum(part) / len(part) for part in near]


def _svg(figure: Figure) -> Markup:
    """A figure as an SVG element that takes its colours and its fonts from the page around it."""
    file = io.StringIO()
    figure.savefig(file, format="svg", transparent=True, metadata={"Date": None})
    text = file.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = re.sub(r' xmlns(:xlink)?="[^"]*"| (width|height)="[\d.]+pt"| version="[^"]*"', "", text)
    text = re.sub(r'<g id="[^"]*"', "<g", text)  # the same in every figure
    text = text.replace(INK, "var(--quiet)").replace(GRID, "var(--line)")
    text = re.sub(SERIES.format(r"(\d)"), r"var(--series-\1)", text)
    return Markup(text.replace("<svg", '<svg aria-hidden="true" focusable="false"', 1))


def samples(folder: Path, order: Sequence[str]) -> list[dict[str, Any]]:
    """What was asked, expected and answered, by set of questions; each answer beside those of the other models."""
    sets: dict[str, dict[str, list[dict[str, Any]]]] = {}
    for path in sorted(folder.glob("*-*.json")):
        model, _, name = path.stem.partition("-")
        sets.setdefault(name, {})[model] = json.loads(path.read_text("utf-8"))
    result = []
    for name, by_model in sorted(sets.items(), key=lambda item: (item[0].startswith("naming"), item[0])):
        models = sorted(by_model, key=lambda model: order.index(model) if model in order else len(order))
        answers = {model: {row["id"]: row["answer"] for row in by_model[model]} for model in models}
        rows = [
            {
                "question": row["question"],
                "expected": row["expected"],
                "pictures": [uri for picture in row.get("pictures", ()) if (uri := _uri(folder / Path(picture).name))],
                "answers": [
                    (model, answers[model][row["id"]], _judged(name, row["expected"], answers[model][row["id"]]))
                    for model in models
                    if row["id"] in answers[model]
                ],
            }
            for row in by_model[models[-1]]
        ]
        result.append({"name": name.replace("_", " "), "models": models, "rows": rows})
    return result


def _judged(name: str, expected: str, answer: str) -> str:
    """ "right", or by how much an answer is wrong, scored as the evaluation scores it."""
    reading = name.startswith("reading")
    form = scores.letters if reading else scores.plain
    if form(expected) == form(answer):
        return "right"
    if reading and form(expected):
        return f"CER {scores.error_rate([form(expected)], [form(answer)]):.2f}"
    return "wrong"


def _uri(path: Path) -> str:
    """A picture as an address that holds it; empty where the file is missing."""
    if not path.is_file():
        return ""
    kind = "png" if path.suffix == ".png" else "jpeg"
    return f"data:image/{kind};base64,{base64.b64encode(path.read_bytes()).decode()}"


def direction(text: str) -> str:
    """The `dir` of a text: that of its first letter with a direction of its own, as Unicode's rule P2 has it."""
    for character in text:
        kind = unicodedata.bidirectional(character)
        if kind in ("R", "AL", "L"):
            return "ltr" if kind == "L" else "rtl"
    return "auto"


def lang(text: str) -> str:
    """The `lang` of a text by its script; empty, which HTML reads as unknown, where it is neither."""
    letters = [c for c in text if c.isalpha()]
    if letters and all("ARABIC" in unicodedata.name(c, "") for c in letters):
        return "ar"
    return "en" if letters and all(c.isascii() for c in letters) else ""


def visible(text: str) -> str:
    """A text with U+FFFD for what cannot be seen or would turn what follows: controls, lone surrogates, overrides."""
    return "".join("\ufffd" if unicodedata.category(c) in ("Cc", "Cf", "Cs") and c not in PLAIN else c for c in text)


def _description(config: str) -> str:
    """The experiment's own description, from its operative config."""
    found = re.search(r"^Experiment\.description = (.*)$", config, flags=re.MULTILINE)
    return str(ast.literal_eval(found.group(1))) if found else ""
