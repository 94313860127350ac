"""Results as a picture: horizontal bars in one self-contained SVG, every number also as text.

Pure. Its colours follow the viewer's light or dark scheme, where the viewer tells; else light.
"""

import html
import math
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from edge_agent.measuring.results import EngineResult
from edge_agent.measuring.table import (
    Row,
    Section,
    distinct_machines,
    headings,
    how_measured,
    machine_text,
    number_text,
    sections,
)

WIDTH: Final = 760
MARGIN: Final = 24
BAR_LEFT: Final = 240
BAR_RIGHT: Final = WIDTH - MARGIN - 64
"""The longest bar ends before this: its number stands to the right of it."""
_BAR: Final = 14
_BAR_GAP: Final = 3
_GROUP_GAP: Final = 11
_LINE: Final = 18
_TITLE: Final = "edge-agent bench"
_COLOURS: Final = ("#0072b2", "#d9820f", "#009e73", "#b5628f", "#8c6bb1", "#56a5d8")
_MAX_TICKS: Final = 5
_CHARACTER: Final = 6.4
"""How wide a character of the small text is, on average, in any of the fonts."""
_STYLE: Final = """
text { font-family: system-ui, "Segoe UI", "DejaVu Sans", Helvetica, Arial, sans-serif;
  font-size: 12px; fill: #1f2328; stroke: #ffffff; stroke-width: 3px; paint-order: stroke; }
.page { fill: #ffffff; }
.title { font-size: 18px; font-weight: 600; }
.head { font-size: 13px; font-weight: 600; }
.soft { fill: #59636e; font-size: 11px; }
.grid { stroke: #d9dee3; }
.axis { stroke: #59636e; }
@media (prefers-color-scheme: dark) {
  text { fill: #e6edf3; stroke: #0d1117; }
  .page { fill: #0d1117; }
  .soft { fill: #9198a1; }
  .grid { stroke: #30363d; }
  .axis { stroke: #9198a1; }
}
"""


@dataclass(frozen=True, slots=True)
class Scale:
    """From values to places: 0 is at BAR_LEFT, `top` at BAR_RIGHT."""

    top: float
    step: float

    @property
    def ticks(self) -> tuple[float, ...]:
        """Where the axis has a number."""
        return tuple(index * self.step for index in range(round(self.top / self.step) + 1))

    def length(self, value: float) -> float:
        """Of a bar."""
        return (BAR_RIGHT - BAR_LEFT) * value / self.top


def scale_for(values: Sequence[float]) -> Scale:
    """Round numbers on the axis, the largest value near its end."""
    largest = max(values, default=0.0)
    if largest <= 0:
        return Scale(1.0, 1.0)
    rough = largest / _MAX_TICKS
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(power * factor for factor in (1, 2, 5, 10) if power * factor >= rough * (1 - 1e-9))
    return Scale(step * math.ceil(largest / step * (1 - 1e-9)), step)


def draw(results: Sequence[EngineResult]) -> str:
    """The SVG. A section of which nothing is known is left out."""
    drawing = _Drawing()
    drawing.text(MARGIN, 28, _TITLE, "title")
    drawing.y = 48
    for machine in distinct_machines(results):
        for line in _wrapped(machine_text(machine)):
            drawing.line(line, "soft")
    for line in _wrapped(how_measured(results)):
        drawing.line(line, "soft")
    drawing.legend(_labels(results))
    for section in sections(results):
        rows = section.known_rows(results)
        if rows:
            drawing.panel(section, rows, results)
    return drawing.document()


class _Drawing:
    """Elements from top to bottom; `y` is where the next one begins."""

    def __init__(self) -> None:
        self._elements: list[str] = []
        self.y = 0

    def text(self, x: float, y: float, text: str, kind: str = "", anchor: str = "start") -> None:
        """Some words, on the line `y`."""
        self._elements.append(
            f'<text x="{x:g}" y="{y:g}" class="{kind}" text-anchor="{anchor}">{_safe(text)}</text>'
        )

    def line(self, text: str, kind: str) -> None:
        """A line of its own."""
        self.text(MARGIN, self.y, text, kind)
        self.y += _LINE - 2

    def legend(self, labels: Sequence[str]) -> None:
        """Which colour is which result."""
        self.y += 4
        for index, label in enumerate(labels):
            self._bar(MARGIN, self.y, _BAR, index)
            self.text(MARGIN + _BAR + 8, self.y + 11, label)
            self.y += _LINE + 2

    def panel(self, section: Section, rows: Sequence[Row], results: Sequence[EngineResult]) -> None:
        """One section: its axis, and a group of bars for each row."""
        values = [[row.value(result) for result in results] for row in rows]
        scale = scale_for([value for group in values for value in group if value is not None])
        self.y += 26
        self.text(MARGIN, self.y, section.title, "head")
        self.y += 10
        group = len(results) * (_BAR + _BAR_GAP) - _BAR_GAP
        bottom = self.y + len(rows) * (group + _GROUP_GAP) + _GROUP_GAP // 2
        self._axis(scale, bottom)
        for row, known in zip(rows, values, strict=True):
            self.y += _GROUP_GAP
            self.text(BAR_LEFT - 10, self.y + group / 2 + 4, row.label, anchor="end")
            for index, value in enumerate(known):
                if value is not None:
                    self._bar(BAR_LEFT, self.y, scale.length(value), index)
                text = number_text(value, row.decimals)
                end = BAR_LEFT + (0.0 if value is None else max(scale.length(value), 0.0))
                self.text(end + 6, self.y + 11, text)
                self.y += _BAR + _BAR_GAP
            self.y -= _BAR_GAP
        self.y = bottom + 14

    def document(self) -> str:
        """All of it."""
        height = self.y + MARGIN
        size = f'width="{WIDTH}" height="{height}" role="img"'
        return "\n".join(
            [
                f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" {size}>',
                f"<title>{_TITLE}</title>",
                f"<style>{_STYLE}</style>",
                f'<rect class="page" width="{WIDTH}" height="{height}"/>',
                *self._elements,
                "</svg>\n",
            ]
        )

    def _axis(self, scale: Scale, bottom: int) -> None:
        for tick in scale.ticks:
            x = BAR_LEFT + scale.length(tick)
            kind = "grid" if tick else "axis"
            self._elements.append(
                f'<line class="{kind}" x1="{x:.1f}" x2="{x:.1f}" y1="{self.y}" y2="{bottom}"/>'
            )
            self.text(round(x, 1), bottom + 13, f"{tick:g}", "soft", "middle")

    def _bar(self, x: float, y: float, length: float, index: int) -> None:
        colour = _COLOURS[index % len(_COLOURS)]
        self._elements.append(
            f'<rect class="bar" x="{x:g}" y="{y:g}" width="{max(length, 0.0):.3f}" '
            f'height="{_BAR}" fill="{colour}"/>'
        )


def _labels(results: Sequence[EngineResult]) -> list[str]:
    """One result each: its engine, and what tells it from the others."""
    lines = headings(results)
    return [
        ", ".join(
            cells[index] if name == "engine" else f"{name} {cells[index]}" for name, cells in lines
        )
        for index in range(len(results))
    ]


def _wrapped(text: str) -> list[str]:
    """Lines that fit the picture."""
    return textwrap.wrap(text, int((WIDTH - 2 * MARGIN) / _CHARACTER))


def _safe(text: str) -> str:
    """What XML may hold."""
    return html.escape("".join(c if c.isprintable() else " " for c in text))
