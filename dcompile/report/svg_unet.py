"""The network of a drawing: a U of boxes, its cuts, and the stores of cached tensors."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import accumulate, pairwise

from dcompile.report import svg_elements as svg
from dcompile.report.explain import DepthReport, Explanation

MARGIN = 40

# The down path on the left, the up path on the right, both indented by one step per resolution.
DOWN_WIDTH, UP_WIDTH, BOX_HEIGHT = 96, 170, 27
U_LEFT, U_RIGHT = MARGIN, 648
INDENT = 88  # of the innermost level
ROW, LEVEL_GAP = 40, 13
STORE_TOP = 22  # from the top of a gap to the store in it


@dataclass(frozen=True)
class Gap:
    """The space below a row where a cut is drawn, in user units."""

    top: float
    height: float


@dataclass(frozen=True)
class Layout:
    """Where the rows of the U are. ``tops`` and ``levels`` have an entry for each depth.

    Attributes:
        tops: upper edge of each row, in user units.
        levels: number of changes of resolution above each row.
        gaps: depth of a cut -> the space below its row.
        bottom: upper edge of the middle block.
    """

    tops: tuple[float, ...]
    levels: tuple[int, ...]
    gaps: dict[int, Gap]
    bottom: float

    @classmethod
    def of(cls, depths: tuple[DepthReport, ...], chosen: tuple[int, ...], top: float) -> Layout:
        """The layout of a network with these cuts whose first row is at ``top``."""
        resolutions = [resolution(row) for row in depths]
        steps = [int(a != b) for a, b in pairwise(resolutions)]
        levels = tuple(accumulate(steps, initial=0))
        tops: list[float] = []
        gaps: dict[int, Gap] = {}
        y = top
        for depth, level in enumerate(levels):
            if depth and level != levels[depth - 1]:
                y += LEVEL_GAP
            tops.append(y)
            y += ROW
            if depth in chosen:
                gap = gaps[depth] = Gap(y - ROW + BOX_HEIGHT, store_height(depths[depth]) + 50)
                y = gap.top + gap.height
        return cls(tuple(tops), levels, gaps, y + (0 if chosen[-1] + 1 == len(tops) else 6))

    def indent(self, depth: int) -> float:
        return INDENT * self.levels[depth] / max(self.levels[-1], 1)

    def down(self, depth: int) -> float:
        """Left edge of the down path's box."""
        return U_LEFT + self.indent(depth)

    def up(self, depth: int) -> float:
        """Left edge of the up path's box."""
        return U_RIGHT - UP_WIDTH - self.indent(depth)

    def ground(self, depth: int) -> str:
        """Colour behind a row: every other level has a light band."""
        return "#f8fafc" if self.levels[depth] % 2 == 0 else "#ffffff"

    def middle(self, depth: int) -> float:
        """Vertical centre of a row."""
        return self.tops[depth] + BOX_HEIGHT / 2


@dataclass(frozen=True)
class Paint:
    """Style classes and colours of a row, by the steps that run it.

    Attributes:
        box, label: style classes of a box and of the text in it.
        wire: style class of the lines to the row.
        pill, edge, number: fill, stroke and text style of its depth.
        text: style class of the text next to it.
        bar, outer: colours of its part of the bar, and of the part of outer cuts.
    """

    box: str
    label: str
    wire: str
    pill: str
    edge: str
    number: str
    text: str
    bar: str
    outer: str


# Run in every step; in steps that refresh the next cut further out; in full refreshes only.
EVERY_STEP = Paint("run", "on", "wire", "#1d4ed8", "#1d4ed8", "on", "", "#1d4ed8", "#9db8f5")
PARTIAL_STEPS = Paint(
    "partial", "", "wire-partial", "#bfd0f7", "#7da2f0", "", "", "#7da2f0", "#c9d8fa"
)
REFRESH_STEPS = Paint(
    "skipped", "off", "wire-off", "#ffffff", "#b6bfca", "off", "off", "#94a3b8", "#cbd5e1"
)


def paint_of(depth: int, chosen: tuple[int, ...]) -> Paint:
    """How a row is drawn with cuts at these depths, ascending."""
    if depth <= chosen[0]:
        return EVERY_STEP
    return PARTIAL_STEPS if depth <= chosen[-1] else REFRESH_STEPS


def draw_unet(layout: Layout, explanation: Explanation) -> list[str]:
    """The U, from the noisy sample down to the middle block and up to the prediction."""
    depths, chosen = explanation.depths, explanation.chosen
    lines: list[str] = []
    x_in, x_out = layout.down(0) + DOWN_WIDTH / 2, layout.up(0) + UP_WIDTH / 2
    top = layout.tops[0]
    lines += [
        svg.path(f"M{x_in:g} {top - 22:g} V{top - 2:g}", "wire"),
        svg.path(f"M{x_out:g} {top - 1:g} V{top - 22:g}", "wire"),
        svg.text(x_in, top - 30, "noisy sample", "bold", "middle"),
        svg.text(x_out, top - 30, "prediction", "bold", "middle"),
    ]
    for row in depths:
        lines += _rung(row, depths, chosen, layout)
        if row.depth + 1 < len(depths):
            lines += _verticals(row.depth, chosen, layout)
    last = len(depths) - 1
    x_down = layout.down(last) + DOWN_WIDTH / 2
    x_up = layout.up(last) + UP_WIDTH / 2
    y = layout.bottom
    if last in chosen:
        from_middle = layout.gaps[last].top + STORE_TOP + store_height(depths[last]) + 6
    else:
        from_middle = layout.tops[last] + BOX_HEIGHT
    share = 1 - depths[-1].ratio
    lines += [
        svg.path(f"M{x_down:g} {layout.tops[last] + BOX_HEIGHT:g} V{y - 2:g}", "wire-off"),
        svg.path(f"M{x_up:g} {y:g} V{from_middle + 2:g}", "wire-off"),
        svg.rect(x_down - 30, y, x_up - x_down + 60, BOX_HEIGHT, 6, css="skipped"),
        svg.text(
            (x_down + x_up) / 2, y + 18, f"middle · {svg.percent_text(share)}", "off", "middle"
        ),
    ]
    return lines


def _rung(
    row: DepthReport, depths: tuple[DepthReport, ...], chosen: tuple[int, ...], layout: Layout
) -> list[str]:
    """One depth: its part of the down path, its skip connection, and its part of the up path."""
    depth, paint = row.depth, paint_of(row.depth, chosen)
    x_down, x_up, y = layout.down(depth), layout.up(depth), layout.tops[depth]
    centre = layout.middle(depth)
    share = f"{svg.percent_text(_share(depths, depth))}{' of FLOPs' if depth == 0 else ''}"
    pill = (x_down + DOWN_WIDTH + x_up) / 2 - 24
    path = row.module_path
    return [
        svg.path(f"M{x_down + DOWN_WIDTH:g} {centre:g} H{x_up - 2:g}", paint.wire),
        svg.rect(x_down, y, DOWN_WIDTH, BOX_HEIGHT, 6, css=paint.box),
        svg.text(x_down + DOWN_WIDTH / 2, y + 18, resolution(row), paint.label, "middle"),
        svg.rect(x_up, y, UP_WIDTH, BOX_HEIGHT, 6, css=paint.box, title=path),
        svg.text(
            x_up + UP_WIDTH / 2, y + 18, svg.tail_of(path, 23), f"{paint.label} small", "middle"
        ),
        svg.rect(
            pill - 14, centre - 10, 30 + svg.width_of(share), 20, 10, fill=layout.ground(depth)
        ),
        f'<circle cx="{pill:g}" cy="{centre:g}" r="10" fill="{paint.pill}" stroke="{paint.edge}"/>',
        svg.text(pill, centre + 4, str(depth), f"{paint.number} bold small", "middle"),
        svg.text(pill + 16, centre + 4, share, paint.text),
    ]


def _verticals(depth: int, chosen: tuple[int, ...], layout: Layout) -> list[str]:
    """From this row to the next one on the down path, and back on the up path."""
    css = paint_of(depth + 1, chosen).wire
    y_0, y_1 = layout.tops[depth] + BOX_HEIGHT, layout.tops[depth + 1]
    down = (layout.down(depth) + DOWN_WIDTH / 2, layout.down(depth + 1) + DOWN_WIDTH / 2)
    up = (layout.up(depth) + UP_WIDTH / 2, layout.up(depth + 1) + UP_WIDTH / 2)
    lines = [svg.curve(down[0], y_0, down[1], y_1 - 2, css)]
    if depth in chosen:
        return lines  # the store is drawn in between
    return [*lines, svg.curve(up[1], y_1, up[0], y_0 + 2, css)]


def draw_cut(layout: Layout, row: DepthReport, chosen: tuple[int, ...]) -> list[str]:
    """The dashed line across the U at one of the cuts, and its store of cached tensors."""
    depth, gap = row.depth, layout.gaps[row.depth]
    width, height, lid = 184, store_height(row), 6
    x = layout.up(depth) + UP_WIDTH / 2
    left = x - width / 2
    y = gap.top + STORE_TOP
    line_y = gap.top + gap.height / 2
    bottom = y + height
    readers = "reuse steps read" if depth == chosen[0] else "partial steps read"
    lines = [
        f'<line class="cut" x1="{MARGIN - 20}" y1="{line_y:g}" x2="{left:g}" y2="{line_y:g}"/>',
        svg.path(f"M{x:g} {y - lid:g} V{gap.top + 2:g}", "wire-store"),
        svg.text(x + 12, y - lid - 3, readers, "amber small"),
    ]
    last = depth + 1 == len(layout.tops)
    if not last:
        x_from = layout.up(depth + 1) + UP_WIDTH / 2
        wire = paint_of(depth + 1, chosen).wire
        lines.append(svg.curve(x_from, layout.tops[depth + 1], x, bottom + lid + 2, wire))
    writers = "refresh steps store" if depth == chosen[-1] else "partial and refresh steps store"
    lines += [
        f'<path class="store" d="M{left:g} {y:g} V{bottom:g} A{width / 2:g} {lid} 0 0 0 '
        f'{left + width:g} {bottom:g} V{y:g} Z"/>',
        f'<ellipse class="lid" cx="{x:g}" cy="{y:g}" rx="{width / 2:g}" ry="{lid}"/>',
        *(
            svg.text(x, y + 23 + 16 * i, line, f"amber {'bold' if i == 0 else ''}", "middle")
            for i, line in enumerate(store_lines(row))
        ),
        svg.text(x + 12, bottom + 18, writers, "off small"),
    ]
    label = f"cut at depth {depth}"
    inside = not last and layout.levels[depth] == layout.levels[depth + 1]
    ground = layout.ground(depth) if inside else "#ffffff"
    return [
        *lines,
        svg.rect(MARGIN + 168, line_y - 10, svg.width_of(label) + 16, 20, 4, fill=ground),
        svg.text(MARGIN + 176, line_y + 4, label, "cut-text"),
    ]


def store_lines(row: DepthReport) -> list[str]:
    """What is written on the store of a cut."""
    shapes = [svg.shape_text(shape) for shape in row.boundary_shapes]
    if len(shapes) > 3:
        shapes = [*shapes[:2], f"and {len(shapes) - 2} more"]
    return [f"cache · {svg.bytes_text(row.cache_bytes)}", *shapes]


def store_height(row: DepthReport) -> float:
    """Height of the store of a cut at this depth."""
    return 18 + 16 * len(store_lines(row))


def _share(depths: tuple[DepthReport, ...], depth: int) -> float:
    """FLOPs between this depth and the next one further out, as a share of a full call."""
    return max(0.0, depths[depth].ratio - (depths[depth - 1].ratio if depth else 0.0))


def resolution(row: DepthReport) -> str:
    """``64×64`` of a feature map; tokens and channels of a sequence."""
    shape = max(row.boundary_shapes, key=len, default=())
    return svg.shape_text(shape[2:] if len(shape) > 3 else shape[1:])
