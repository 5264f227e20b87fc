"""Pages: one palette, templates that are filled in, and one file that carries plotly.js and all its data.

The templates lie in ``assets/``. `base.html` is what all pages share, `parts.html` holds what they are made of. Figures
are plain Plotly dictionaries, drawn by the plotly.js in the page. Their colours are CSS variables, such as
``var(--decode)``, that ``page.css`` defines for light and dark.
"""

from __future__ import annotations

import base64
import gzip
import json
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from chairlift.sim.atomic import replacing
from chairlift.sim.results.catalogue import FIELDS, LATENCIES, STATISTICS, fields, has_latency, shown, text
from chairlift.sim.results.writer import made_by

Figure = dict[str, Any]

ASSETS = Path(__file__).resolve().parent / "assets"
HUES = 8  # var(--v0) … var(--v7), told apart by the colour-blind too; dashes beyond
DASHES = ("solid", "dash", "dot", "dashdot")
INK, MUTED = "var(--ink)", "var(--muted)"
ROOM = 16  # labels that an axis has room for


def hue(i: int) -> str:
    """The colour of the i-th system."""
    return f"var(--v{i % HUES})"


def dash(i: int) -> str:
    """The dashes of the line of the i-th system: after `HUES` systems colours come again."""
    return DASHES[i // HUES % len(DASHES)]


def swatch(i: int) -> str:
    """The i-th system's mark in a legend, as a CSS background: its colour, in stripes where its line has dashes."""
    colour = hue(i)
    stripes = {"dash": "{0} 0 4px, transparent 4px 7px", "dot": "{0} 0 2px, transparent 2px 4px"}
    stripes["dashdot"] = "{0} 0 5px, transparent 5px 7px, {0} 7px 9px, transparent 9px 11px"
    if (drawn := dash(i)) == "solid":
        return colour
    return f"repeating-linear-gradient(90deg, {stripes[drawn].format(colour)})"


def curve(i: int, name: str, x: Sequence[Any], y: Sequence[float | None], **more: Any) -> Figure:
    """The i-th system's points, joined by lines: a trace; ``more`` are further properties of it."""
    return {
        **{"type": "scatter", "mode": "lines+markers", "name": name, "x": list(x), "y": list(y)},
        **{"line": {"color": hue(i), "dash": dash(i), "width": 2}, "marker": {"color": hue(i), "size": 6}},
        **more,
    }


def error_bars(above: Sequence[float | None], below: Sequence[float | None] | None = None) -> Figure:
    """Error bars that reach ``above`` and ``below`` the points; the same to both sides without ``below``."""
    bars: Figure = {"type": "data", "array": list(above), "thickness": 1, "width": 3}
    return bars if below is None else bars | {"symmetric": False, "arrayminus": list(below)}


def apart(values: Sequence[float]) -> list[float]:
    """Where an axis of rising ``values`` that were tried has its ticks: at those values, where labels have room.

    Example: of 10, 10.5, 25 and 50 the ticks are 10, 25 and 50.
    """
    ticks = [values[0]]
    for value in values[1:]:
        if value - ticks[-1] >= (values[-1] - values[0]) / ROOM:
            ticks.append(value)
    return ticks


def ticks(values: Sequence[float]) -> Figure:
    """What an axis of rising ``values`` that were tried has as ticks (`apart`), and how it says them.

    Example: of 4, 5.65685425 and 8 the labels are 4, 5.657 and 8. Values that four digits do not tell apart keep all.
    """
    said = [f"{value:,}" if isinstance(value, int) else f"{float(f'{value:.4g}'):,.10g}" for value in values]
    if len(set(said)) < len(set(values)):
        said = [f"{value:,}" for value in values]
    by_value = dict(zip(values, said, strict=True))
    places = apart(values)
    return {"tickvals": places, "ticktext": [by_value[place] for place in places]}


def level(y: float) -> Figure:
    """A dotted line across a figure at ``y``: a shape."""
    line = {"color": INK, "width": 1, "dash": "dot"}
    return {"type": "line", "xref": "paper", "x0": 0, "x1": 1, "y0": y, "y1": y, "line": line}


def note(words: str, x: float, y: float, xref: str = "x", yref: str = "paper", anchor: str = "left") -> Figure:
    """Small words that stand on the point (x, y): an annotation."""
    return {
        **{"text": words, "x": x, "y": y, "xref": xref, "yref": yref, "xanchor": anchor, "yanchor": "bottom"},
        **{"showarrow": False, "font": {"size": 11, "color": MUTED}},
    }


class Page:
    """A page in the making: figures get their names as the template places them."""

    def __init__(self, scripts: tuple[str, ...] = ("page.js",)) -> None:
        self.figures: dict[str, Figure] = {}
        self.slots: dict[str, list[dict[str, Any]]] = {}  # by run: the slot diagrams of its replicas
        self._scripts = scripts

    def place(self, figure: Figure) -> str:
        """The name of a figure, under which the page finds it."""
        name = f"f{len(self.figures)}"
        self.figures[name] = figure
        return name

    def plotly(self) -> str:
        """plotly.js, packed."""
        return _plotly()

    def data(self) -> str:
        """All figures that have been placed, and all slot diagrams, packed."""
        found = {"figures": self.figures, "slots": self.slots}
        return _packed(json.dumps(found, separators=(",", ":"), allow_nan=False))

    def script(self) -> str:
        """The page's own code."""
        return "\n".join(map(_asset, self._scripts))

    def write(self, path: Path, template: str, **values: Any) -> int:
        """Fill in ``template`` and write it to ``path``; the size in bytes. Raises OSError."""
        content = _templates().get_template(template).render(page=self, **values).encode()
        with replacing(path) as partial:
            partial.write_bytes(content)
        return len(content)


def _packed(content: str) -> str:
    """Compressed, in base64: page.js unpacks it."""
    return base64.b64encode(gzip.compress(content.encode(), 6, mtime=0)).decode()


@cache
def _plotly() -> str:
    from plotly.offline import get_plotlyjs  # here: only pages need it

    return _packed(get_plotlyjs())  # 5 MB: that takes longer than the rest of a page


def _asset(name: str) -> str:
    return (ASSETS / name).read_text(encoding="utf-8")


@cache
def _templates() -> Environment:
    made = Environment(
        loader=FileSystemLoader(ASSETS, encoding="utf-8"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    made.globals.update(FIELDS=FIELDS, LATENCIES=LATENCIES, STATISTICS=STATISTICS)
    made.globals.update(fields=fields, has_latency=has_latency, shown=shown, made_by=made_by)
    made.globals.update(asset=_asset, hue=hue, swatch_of=swatch, text=text)
    made.filters["exact"] = lambda value: "" if value is None else repr(value)
    return made
