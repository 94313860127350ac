"""The scheduler benchmark as a picture: a panel for each figure, a bar for each policy. Pure."""

import html
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from edge_agent.measuring.chart import BAR_LEFT, BAR_RIGHT, MARGIN, WIDTH, scale_for

_COLOURS = ("#0072b2", "#d9820f", "#009e73", "#b5628f", "#6e7781")
_BAR = 12
_GAP = 10
_STYLE = """
text { font-family: system-ui, "DejaVu Sans", Helvetica, Arial, sans-serif; font-size: 12px;
  fill: #1f2328; }
.page { fill: #ffffff; } .title { font-size: 18px; font-weight: 600; }
.head { font-size: 13px; font-weight: 600; } .soft { fill: #59636e; font-size: 11px; }
@media (prefers-color-scheme: dark) { text { fill: #e6edf3; } .page { fill: #0d1117; }
  .soft { fill: #9198a1; } }
"""


@dataclass(frozen=True, slots=True)
class Panel:
    """One figure: for each row (a class, a workload) a value of each policy; None: not known."""

    title: str
    rows: Mapping[str, Mapping[str, float | None]]


def draw(title: str, notes: Sequence[str], policies: Sequence[str], panels: Sequence[Panel]) -> str:
    """The SVG."""
    elements = [_text(MARGIN, 28, title, "title")]
    y = 48
    for note in notes:
        elements.append(_text(MARGIN, y, note, "soft"))
        y += 16
    for index, policy in enumerate(policies):
        elements += [_bar(MARGIN, y, _BAR, index), _text(MARGIN + 20, y + 10, policy)]
        y += 18
    for panel in panels:
        y = _panel(elements, panel, policies, y + 26)
    height = y + MARGIN
    size = f'viewBox="0 0 {WIDTH} {height}" width="{WIDTH}" height="{height}"'
    page = f'<rect class="page" width="{WIDTH}" height="{height}"/>'
    head = f'<svg xmlns="http://www.w3.org/2000/svg" {size} role="img">'
    return "\n".join([head, f"<style>{_STYLE}</style>", page, *elements, "</svg>\n"])


def _panel(elements: list[str], panel: Panel, policies: Sequence[str], y: int) -> int:
    """Append a panel; returns where the next may begin."""
    known = [value for row in panel.rows.values() for value in row.values() if value is not None]
    scale = scale_for(known)
    elements.append(_text(MARGIN, y, panel.title, "head"))
    y += 8
    for label, row in panel.rows.items():
        present = [policy for policy in policies if policy in row]
        elements.append(_text(BAR_LEFT - 10, y + len(present) * _BAR / 2 + 4, label, "", "end"))
        for policy in present:
            value = row[policy]
            length = 0.0 if value is None else (BAR_RIGHT - BAR_LEFT) * value / scale.top
            elements.append(_bar(BAR_LEFT, y, length, policies.index(policy)))
            text = "-" if value is None else f"{value:,.6g}" if value >= 100 else f"{value:.3g}"
            elements.append(_text(BAR_LEFT + length + 6, y + 10, text, "soft"))
            y += _BAR + 2
        y += _GAP
    return y


def _text(x: float, y: float, text: str, kind: str = "", anchor: str = "start") -> str:
    inside = html.escape(text)
    return f'<text x="{x:.1f}" y="{y:.1f}" class="{kind}" text-anchor="{anchor}">{inside}</text>'


def _bar(x: float, y: float, length: float, index: int) -> str:
    fill = _COLOURS[index % len(_COLOURS)]
    return f'<rect x="{x:.1f}" y="{y:.1f}" width="{length:.1f}" height="{_BAR}" fill="{fill}"/>'
