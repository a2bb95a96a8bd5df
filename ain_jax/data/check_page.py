"""A data check as one HTML page: no script, no address outside it, its pictures inside it."""

import base64
import importlib.resources
from typing import Any

import jinja2
from markupsafe import Markup, escape

from ain_jax import report_page
from ain_jax.data import check_rows
from ain_jax.data.check import Report
from ain_jax.data.check_rows import Piece


def render(report: Report) -> str:
    """The whole page as text."""
    template = (importlib.resources.files("ain_jax") / "check.html.jinja").read_text("utf-8")
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters |= {
        "direction": report_page.direction,
        "lang": report_page.lang,
        "visible": report_page.visible,
        "running": running,
        "thumbnail": _thumbnail,
    }
    return environment.from_string(template).render(
        report=report, quantiles=check_rows.QUANTILES, seen=check_rows.seen, total=report.faults
    )


def running(pieces: tuple[Piece, ...]) -> Markup:
    """Pieces as spans, line by line: a line is set from left or right as its own letters ask.

    The spans carry no direction of their own, or Arabic letters would not join from token to token. Neighbouring
    tokens differ in shade; hovering shows the ids.
    """
    lines, spans, text = [], [], ""
    for number, piece in enumerate(pieces):
        look = "learnt" if piece.learnt else piece.kind
        title = " ".join(map(str, piece.ids[:8])) + (f" and {len(piece.ids) - 8} more" if len(piece.ids) > 8 else "")
        shown = piece.label
        parts = shown.split("\n")
        for i, part in enumerate(parts):
            mark = "⏎" if i < len(parts) - 1 else ""
            if part or mark:
                inside = escape(report_page.visible(part)) + (Markup('<i class="end">⏎</i>') if mark else "")
                shade = f"{piece.kind} {look} {'odd' if number % 2 else 'even'}"
                spans.append(Markup('<span class="{}" title="{}">{}</span>').format(shade, title, inside))
                text += part if piece.kind == "text" else ""
            if mark:
                lines.append(_line(spans, text))
                spans, text = [], ""
    return Markup("").join([*lines, *([_line(spans, text)] if spans else [])])


def _line(spans: list[Markup], text: str) -> Markup:
    language, direction = report_page.lang(text), report_page.direction(text)
    return Markup('<p class="line" lang="{}" dir="{}">{}</p>').format(language, direction, Markup("").join(spans))


def _thumbnail(picture: Any) -> str:
    """A picture as an address that holds it."""
    return "data:image/jpeg;base64," + base64.b64encode(check_rows.thumbnail(picture)).decode()
