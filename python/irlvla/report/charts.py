"""Small charts as SVG: they take their colours from the page, and stay legible in grey."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from markupsafe import Markup, escape

Points = Sequence[tuple[float, float]]

WIDTH, HEIGHT = 320, 200
LEFT, RIGHT, TOP, BOTTOM = 40, 8, 10, 22
COLOURS = ("#3b7dd8", "#d9822b", "#2f9e6e", "#b04a9c", "#8a8f98")  # of middle lightness: for light pages and dark ones
DASHES = ("", "6 3", "2 3", "8 3 2 3", "1 4")
MOST = 240  # points of a line; of more, every so many are drawn


def line_chart(
    lines: Mapping[str, Points], bounds: tuple[float, float, float, float] | None = None, dots: bool = False, square: bool = False
) -> Markup:
    """Lines by name, with their legend. Values are told by ticks at the ends and the middle of both axes.

    Args:
        bounds: least x, greatest x, least y, greatest y; by default those of the points.
        dots: mark every point.
        square: as high as wide, for two axes of the same kind.
    """
    points = [point for line in lines.values() for point in line]
    height = WIDTH if square else HEIGHT
    frame = _Frame(bounds or _bounds(points), height)
    parts = [f'<svg viewBox="0 0 {WIDTH} {height}" role="img" aria-label="{escape(", ".join(lines))}">', *frame.axes()]
    legend = []
    for i, (name, line) in enumerate(lines.items()):
        colour, dash = COLOURS[i % len(COLOURS)], DASHES[i % len(DASHES)]
        shown = line[:: max(1, len(line) // MOST)]
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in map(frame.pixel, shown))
        style = f'fill="none" stroke="{colour}" stroke-width="2" stroke-dasharray="{dash}"'
        parts.append(f'<polyline points="{path}" {style}/>')
        if dots:
            parts += [f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3" fill="{colour}"/>' for x, y in map(frame.pixel, shown)]
        key = f'<svg width="24" height="8"><line x1="0" y1="4" x2="24" y2="4" {style}/></svg>'
        legend.append(f'<span class="key">{key} {escape(name)}</span>')
    return Markup("".join([*parts, "</svg>", '<div class="legend">', *legend, "</div>"]))


def _bounds(points: Points) -> tuple[float, float, float, float]:
    xs, ys = zip(*points, strict=True)
    room = 0.05 * (max(ys) - min(ys)) or 0.5
    return min(xs), max(max(xs), min(xs) + 1e-9), min(ys) - room, max(ys) + room


class _Frame:
    """Where values lie in the picture."""

    def __init__(self, bounds: tuple[float, float, float, float], height: int) -> None:
        self.bounds, self.height = bounds, height

    def pixel(self, point: tuple[float, float]) -> tuple[float, float]:
        x0, x1, y0, y1 = self.bounds
        across, up = (point[0] - x0) / (x1 - x0), (point[1] - y0) / (y1 - y0)
        return LEFT + across * (WIDTH - LEFT - RIGHT), self.height - BOTTOM - up * (self.height - TOP - BOTTOM)

    def axes(self) -> Iterator[str]:
        """Grid lines with their values."""
        x0, x1, y0, y1 = self.bounds
        for share in (0.0, 0.5, 1.0):
            x, y = x0 + share * (x1 - x0), y0 + share * (y1 - y0)
            across, up = self.pixel((x, y))
            yield f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{up:.1f}" y2="{up:.1f}"/>'
            yield f'<text x="{LEFT - 5}" y="{up + 4:.1f}" text-anchor="end">{_short(y)}</text>'
            anchor = {0.0: "start", 0.5: "middle", 1.0: "end"}[share]
            yield f'<text x="{across:.1f}" y="{self.height - 6}" text-anchor="{anchor}">{_short(x)}</text>'


def _short(value: float) -> str:
    """In six characters, which is what there is room for."""
    if abs(value) >= 1e4:
        return f"{value:.0f}"
    return f"{value:.{2 if abs(value) < 0.1 else 3}g}"
