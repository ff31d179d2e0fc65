"""Groups of bars as an SVG picture, without a plotting library.

A panel is a title, a group of bars for each label and a colour for each series; every bar carries
its value. For `hitrate.py`; browsers and notebooks show the file as it is.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from xml.sax.saxutils import escape

_COLOURS = ("#3b6ea8", "#d9822b", "#5a9a5a", "#8a5aa8")
_PANEL_WIDTH, _PANEL_HEIGHT = 460, 300
_LEFT, _TOP, _PLOT_WIDTH, _PLOT_HEIGHT = 46, 58, 400, 180
_FONT = 'font-family="sans-serif"'


@dataclasses.dataclass(frozen=True)
class Panel:
    """One chart.

    Attributes:
        title: above it.
        labels: below the groups; a second line after "\\n".
        series: name -> a value of every label, 0..1; NaN is drawn as "-".
    """

    title: str
    labels: Sequence[str]
    series: Mapping[str, Sequence[float]]


def svg(title: str, panels: Sequence[Panel]) -> str:
    """The picture: panels side by side under a title.

    Args:
        title: of the whole.
        panels: at least one, each with at least one label.
    """
    width, height = _PANEL_WIDTH * len(panels), _PANEL_HEIGHT + 30
    body = [
        f'<rect width="{width}" height="{height}" fill="white"/>',
        f'<text x="{_LEFT}" y="24" {_FONT} font-size="16" fill="#222">{escape(title)}</text>',
    ]
    for number, panel in enumerate(panels):
        body.append(f'<g transform="translate({number * _PANEL_WIDTH},24)">')
        body += [*_axis(panel), *_bars(panel), "</g>"]
    head = (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" '
        f'viewBox="0 0 {width} {height}">'
    )
    return "\n".join([head, *body, "</svg>"]) + "\n"


def _ceiling(panel: Panel) -> float:
    """End of the value axis: a round number above every bar."""
    largest = max((v for values in panel.series.values() for v in values if v == v), default=0.0)
    return next(end for end in (0.05, 0.1, 0.2, 0.5, 1.0) if end >= min(largest, 1.0))


def _axis(panel: Panel) -> list[str]:
    end, base = _ceiling(panel), _TOP + _PLOT_HEIGHT
    parts = [f'<text x="{_LEFT}" y="28" {_FONT} font-size="13">{escape(panel.title)}</text>']
    for number in range(6):
        y = base - _PLOT_HEIGHT * number / 5
        parts.append(
            f'<line x1="{_LEFT}" x2="{_LEFT + _PLOT_WIDTH}" y1="{y:.1f}" y2="{y:.1f}" '
            'stroke="#ddd"/>'
            f'<text x="{_LEFT - 5}" y="{y + 4:.1f}" {_FONT} font-size="10" text-anchor="end" '
            f'fill="#555">{end * number / 5:.2f}</text>'
        )
    for number, name in enumerate(panel.series):
        x = _LEFT + 130 * number
        parts.append(
            f'<rect x="{x}" y="36" width="10" height="10" fill="{_COLOURS[number % 4]}"/>'
            f'<text x="{x + 14}" y="45" {_FONT} font-size="11">{escape(name)}</text>'
        )
    return parts


def _bars(panel: Panel) -> list[str]:
    end, base = _ceiling(panel), _TOP + _PLOT_HEIGHT
    group = _PLOT_WIDTH / len(panel.labels)
    bar = 0.8 * group / len(panel.series)
    parts = []
    for place, label in enumerate(panel.labels):
        left = _LEFT + group * place
        for number, values in enumerate(panel.series.values()):
            value, x = values[place], left + 0.1 * group + bar * number
            height = _PLOT_HEIGHT * min(value / end, 1.0) if value == value else 0.0
            shown = f"{value:.3f}".removeprefix("0") if value == value else "-"
            parts.append(
                f'<rect x="{x:.1f}" y="{base - height:.1f}" width="{bar * 0.94:.1f}" '
                f'height="{height:.1f}" fill="{_COLOURS[number % 4]}"/>'
                f'<text x="{x + bar / 2:.1f}" y="{base - height - 3:.1f}" {_FONT} '
                f'font-size="{9 if bar > 20 else 7}" text-anchor="middle">{shown}</text>'
            )
        for line, text in enumerate(label.split("\n")):
            parts.append(
                f'<text x="{left + group / 2:.1f}" y="{base + 16 + 13 * line}" {_FONT} '
                f'font-size="10" text-anchor="middle" fill="#333">{escape(text)}</text>'
            )
    return parts
