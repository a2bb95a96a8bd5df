"""An inspection as a plot (PNG) and as one HTML page that holds it: no script, no address outside the page."""

import base64
import importlib.resources
import io

import jinja2
import matplotlib
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter

from ain_jax import report_page
from ain_jax.tokenizer import verdict
from ain_jax.tokenizer.inspect import ALL
from ain_jax.tokenizer.inspect_run import Inspection

SAVED, COST, GRID = "#1f66c1", "#c25300", "#d9dde2"  # the report page's first two colours, and its lines


def plot(found: Inspection) -> bytes | None:
    """Tokens a word over the number of new pieces, the base's and the covered line with them; None without a curve."""
    if not found.points or not found.before:
        return None
    sizes_S = [0, *(point.size for point in found.points)]
    words_S = [found.before.tokens_per_word, *(point.tokens_per_word for point in found.points)]
    with matplotlib.rc_context({"font.size": 10, "font.family": "sans-serif"}):
        figure = Figure(figsize=(7.2, 4.0), dpi=150, layout="constrained")
        axes = figure.subplots()
        axes.plot(sizes_S, words_S, color=SAVED, marker="o", markersize=4, label=f"tokens a word, {found.language}")
        axes.axhline(verdict.COVERED, color=SAVED, linewidth=0.8, linestyle=":", label="a base below this covers it")
        axes.set_ylim(bottom=0)
        axes.set_xlabel("new pieces")
        axes.set_ylabel("tokens a word, held-out text")
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
        axes.grid(axis="y", color=GRID, linewidth=0.6)
        axes.spines[["top", "right"]].set_visible(False)
        cost = axes.twinx()
        compute_S = [100.0, *(100 * point.compute for point in found.points)]
        cost.plot(sizes_S, compute_S, color=COST, marker="s", markersize=3, linestyle="--", label="compute, % of base")
        cost.set_ylim(0, max(110.0, *compute_S))
        cost.set_ylabel("compute of the planned training, % of base", color=COST)
        cost.spines[["top", "left"]].set_visible(False)
        if found.verdict and found.verdict.size:
            axes.axvline(found.verdict.size, color="#5b636d", linewidth=0.8)
        lines = [*axes.get_lines()[:2], *cost.get_lines()]
        axes.legend(lines, [str(line.get_label()) for line in lines], frameon=False, loc="center right")
        file = io.BytesIO()
        figure.savefig(file, format="png", metadata={"Software": None})
    return file.getvalue()


def render(found: Inspection, picture: bytes | None) -> str:
    """The whole page as text; `picture` is what `plot` gave."""
    template = (importlib.resources.files("ain_jax") / "inspect.html.jinja").read_text("utf-8")
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters |= {
        "direction": report_page.direction,
        "lang": report_page.lang,
        "visible": report_page.visible,
    }
    later = found.after or [None] * len(found.rows)
    return environment.from_string(template).render(
        found=found,
        rows=list(zip(found.rows, later, strict=True)),
        all=ALL,
        rules=verdict,
        short=verdict.short,
        picture=base64.b64encode(picture).decode() if picture else "",
        size=(found.verdict and found.verdict.size) or (found.points[-1].size if found.points else 0),
    )
