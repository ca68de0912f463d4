"""The network of a drawing, cut along its residual stream: a column of blocks, and the way past."""

from __future__ import annotations

from dcompile.report import svg_elements as svg
from dcompile.report.explain import DepthReport, Explanation
from dcompile.report.svg_unet import (
    BOX_HEIGHT,
    MARGIN,
    STORE_TOP,
    Layout,
    Paint,
    paint_of,
    store_height,
    store_lines,
)

COLUMN, BLOCK_WIDTH = 210, 250  # left edge and width of the blocks
STORE_X, STORE_WIDTH = 556, 184  # centre and width of the stores
CENTRE = COLUMN + BLOCK_WIDTH / 2
BYPASS = 78  # from the centre of a store to the way past the skipped blocks


def draw_stream(layout: Layout, explanation: Explanation) -> list[str]:
    """From the noisy sample down through the blocks to the prediction."""
    depths, chosen = explanation.depths, explanation.chosen
    top = layout.tops[0]
    lines = [
        svg.path(f"M{CENTRE:g} {top - 22:g} V{top - 2:g}", "wire"),
        svg.text(CENTRE, top - 30, "noisy sample", "bold", "middle"),
    ]
    for row in depths:
        name = depths[row.depth - 1].module_path if row.depth else "first block"
        share = row.ratio - (depths[row.depth - 1].ratio if row.depth else 0.0)
        lines += _block(layout.tops[row.depth], name, share, paint_of(row.depth, chosen))
        following = layout.tops[row.depth + 1] if row.depth + 1 < len(depths) else layout.bottom
        wire = paint_of(row.depth + 1, chosen).wire
        lines.append(
            svg.path(
                f"M{CENTRE:g} {layout.tops[row.depth] + BOX_HEIGHT:g} V{following - 2:g}", wire
            )
        )
    lines += _block(
        layout.bottom, depths[-1].module_path, 1 - depths[-1].ratio, paint_of(len(depths), chosen)
    )
    y = layout.bottom + BOX_HEIGHT + 24
    return [
        *lines,
        svg.path(f"M{CENTRE:g} {layout.bottom + BOX_HEIGHT:g} V{y - 11:g}", "wire-off"),
        f'<circle cx="{CENTRE:g}" cy="{y:g}" r="10" fill="#ffffff" stroke="#1d4ed8"/>',
        svg.text(CENTRE, y + 5, "+", "bold", "middle"),
        svg.path(f"M{CENTRE - 10:g} {y:g} H{MARGIN + 84:g}", "wire"),
        svg.text(MARGIN + 78, y + 4, "prediction", "bold", "end"),
    ]


def _block(y: float, path: str, share: float, paint: Paint) -> list[str]:
    label = paint.label
    return [
        svg.rect(COLUMN, y, BLOCK_WIDTH, BOX_HEIGHT, 6, css=paint.box, title=path),
        svg.text(COLUMN + 10, y + 18, svg.tail_of(path, 32), f"{label} small"),
        svg.text(COLUMN + BLOCK_WIDTH - 10, y + 18, svg.percent_text(max(share, 0)), label, "end"),
    ]


def draw_stream_cut(layout: Layout, row: DepthReport, chosen: tuple[int, ...]) -> list[str]:
    """The dashed line below the last block that runs, the store, and the way past the others."""
    gap = layout.gaps[row.depth]
    y, height, lid = gap.top + STORE_TOP, store_height(row), 6
    line_y, bottom = gap.top + gap.height / 2, y + height
    left, end = STORE_X - STORE_WIDTH / 2, layout.bottom + BOX_HEIGHT + 24
    readers = "reuse steps add" if row.depth == chosen[0] else "partial steps add"
    past = STORE_X + BYPASS - 10 * chosen.index(row.depth)
    label = f"cut at depth {row.depth}"
    return [
        f'<line class="cut" x1="{MARGIN - 20}" y1="{line_y:g}" x2="{left:g}" y2="{line_y:g}"/>',
        svg.rect(MARGIN - 4, line_y - 10, svg.width_of(label) + 16, 20, 4, fill="#ffffff"),
        svg.text(MARGIN + 4, line_y + 4, label, "cut-text"),
        svg.path(f"M{past:g} {bottom:g} V{end:g} H{CENTRE + 12:g}", "wire-store"),
        svg.text(STORE_X, y - lid - 3, readers, "amber small", "middle"),
        f'<path class="store" d="M{left:g} {y:g} V{bottom:g} A{STORE_WIDTH / 2:g} {lid} 0 0 0 '
        f'{left + STORE_WIDTH:g} {bottom:g} V{y:g} Z"/>',
        f'<ellipse class="lid" cx="{STORE_X:g}" cy="{y:g}" rx="{STORE_WIDTH / 2:g}" ry="{lid}"/>',
        *(
            svg.text(STORE_X, y + 23 + 16 * i, text, f"amber {'' if i else 'bold'}", "middle")
            for i, text in enumerate(store_lines(row))
        ),
    ]
