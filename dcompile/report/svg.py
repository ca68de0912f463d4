"""The cut network as a picture: ``draw_svg(handle(unet).explain())``."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import accumulate, pairwise
from xml.sax.saxutils import escape, quoteattr

from dcompile.errors import DepthError, NoSkipConnectionError
from dcompile.report.explain import DepthReport, Explanation

WIDTH = 1200
MARGIN = 40

# The U: down path on the left, up path on the right, both indented by one step per resolution.
DOWN_WIDTH, UP_WIDTH, BOX_HEIGHT = 96, 170, 27
U_LEFT, U_RIGHT = MARGIN, 648
INDENT = 88  # of the innermost level
ROW, LEVEL_GAP = 40, 13

# The table next to it: right edges of the numbers, left edges of the rest.
SHAPE_X, BYTES_X, BAR_X, BAR_WIDTH, RATIO_X = 672, 880, 900, 108, 1054
LIMIT_X = {3: 1107, 5: WIDTH - MARGIN}

STYLE = """
text { font-family: system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial,
  sans-serif; font-size: 12px; fill: #1f2937; }
.title { font-size: 25px; font-weight: 650; fill: #0f172a; }
.lead { font-size: 14px; fill: #475569; }
.muted { fill: #64748b; }
.head { font-size: 11.5px; fill: #64748b; }
.chip-n { font-size: 12px; fill: #1d4ed8; }
.chip { font-size: 19px; font-weight: 650; fill: #1d4ed8; }
.bold { font-weight: 650; }
.chosen { font-weight: 650; fill: #1d4ed8; }
.on { fill: #ffffff; }
.off { fill: #7c8797; }
.small { font-size: 11px; }
.run { fill: #1d4ed8; }
.skipped { fill: url(#left-out); stroke: #cbd2db; }
.store { fill: #fef3c7; stroke: #d97706; stroke-width: 1.5; }
.lid { fill: #fde68a; stroke: #d97706; stroke-width: 1.5; }
.amber { fill: #92400e; }
.wire { fill: none; stroke: #1d4ed8; stroke-width: 2.5; marker-end: url(#tip-run); }
.wire-off { fill: none; stroke: #b6bfca; stroke-width: 1.5; marker-end: url(#tip-off); }
.wire-store { fill: none; stroke: #d97706; stroke-width: 2.5; marker-end: url(#tip-store); }
.cut { stroke: #be123c; stroke-width: 1.5; stroke-dasharray: 7 5; }
.cut-text { fill: #be123c; font-weight: 650; }
"""

DEFS = (
    '<pattern id="left-out" width="7" height="7" patternUnits="userSpaceOnUse" '
    'patternTransform="rotate(45)"><rect width="7" height="7" fill="#f6f7f9"/>'
    '<line x1="0" y1="0" x2="0" y2="7" stroke="#e3e7ec" stroke-width="3"/></pattern>'
) + "".join(
    f'<marker id="tip-{name}" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="{size}" '
    f'markerHeight="{size}" orient="auto" markerUnits="userSpaceOnUse">'
    f'<path d="M0 0.5 L8 4 L0 7.5 Z" fill="{colour}"/></marker>'
    for name, colour, size in (
        ("run", "#1d4ed8", 10),
        ("off", "#b6bfca", 8),
        ("store", "#d97706", 10),
    )
)


def draw_svg(explanation: Explanation) -> str:
    """Draw a network as a U, cut at the chosen depth, with what each depth would save.

    What a reuse step runs is blue, what it leaves out is hatched, the cached tensors are the
    amber store that feeds the up path.

    Args:
        explanation: from ``handle(module).explain()``; another depth is drawn with
            ``dataclasses.replace(explanation, chosen=depth)``.

    Returns:
        An SVG document, 1200 units wide.

    Raises:
        NoSkipConnectionError: the network has none.
        DepthError: the chosen depth is not one of the network's.
    """
    depths = explanation.depths
    if not depths:
        raise NoSkipConnectionError(
            f"{explanation.network} has no skip connection: nothing to draw"
        )
    if not 0 <= explanation.chosen < len(depths):
        raise DepthError(
            f"depth {explanation.chosen} is out of range: {explanation.network} has depths 0 to "
            f"{len(depths) - 1}"
        )
    chosen = depths[explanation.chosen]
    header, top = _header(explanation, chosen)
    layout = _Layout.of(depths, explanation.chosen, top + 74)
    body = [
        *_table_head(top + 26),
        *_row_bands(layout),
        *_cut(layout, chosen),
        *_u(layout, explanation),
        *(line for row in depths for line in _table_row(row, depths, explanation.chosen, layout)),
    ]
    legend, height = _legend(layout.bottom + 50)
    summary = (
        f"{explanation.network} cut at depth {chosen.depth}: a reuse step runs "
        f"{_percent(chosen.ratio)} of the FLOPs"
    )
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH}" height="{height:g}" '
            f'viewBox="0 0 {WIDTH} {height:g}" role="img" aria-label={quoteattr(summary)}>',
            f"<title>{escape(summary)}</title>",
            f"<defs><style>{STYLE}</style>{DEFS}</defs>",
            f'<rect width="{WIDTH}" height="{height:g}" rx="14" fill="#ffffff"/>',
            *header,
            *body,
            *legend,
            "</svg>\n",
        ]
    )


@dataclass(frozen=True)
class _Layout:
    """Where the rows of the U are. ``tops`` and ``levels`` go by depth; all in user units."""

    tops: tuple[float, ...]
    levels: tuple[int, ...]
    gap_top: float  # the gap below the chosen row, where the cut is drawn
    gap_height: float
    bottom: float  # top of the middle block

    @classmethod
    def of(cls, depths: tuple[DepthReport, ...], chosen: int, top: float) -> _Layout:
        resolutions = [_resolution(row) for row in depths]
        steps = [int(a != b) for a, b in pairwise(resolutions)]
        levels = tuple(accumulate(steps, initial=0))
        gap_height = _store_height(depths[chosen]) + 50
        tops: list[float] = []
        y, gap_top = top, 0.0
        for depth, level in enumerate(levels):
            if depth and level != levels[depth - 1]:
                y += LEVEL_GAP
            tops.append(y)
            y += ROW
            if depth == chosen:
                gap_top = y - ROW + BOX_HEIGHT
                y = gap_top + gap_height
        return cls(
            tuple(tops), levels, gap_top, gap_height, y + (0 if chosen + 1 == len(tops) else 6)
        )

    def indent(self, depth: int) -> float:
        return INDENT * self.levels[depth] / max(self.levels[-1], 1)

    def down(self, depth: int) -> float:
        """Left edge of the down path's box."""
        return U_LEFT + self.indent(depth)

    def up(self, depth: int) -> float:
        """Left edge of the up path's box."""
        return U_RIGHT - UP_WIDTH - self.indent(depth)

    def ground(self, depth: int) -> str:
        """Colour behind a row: every other level stands on a light band."""
        return "#f8fafc" if self.levels[depth] % 2 == 0 else "#ffffff"

    def middle(self, depth: int) -> float:
        """Vertical centre of a row."""
        return self.tops[depth] + BOX_HEIGHT / 2


def _header(explanation: Explanation, chosen: DepthReport) -> tuple[list[str], float]:
    tensors = "one tensor" if len(chosen.boundary_shapes) == 1 else "tensors"
    lead = [
        f"Cut at depth {chosen.depth}, where {_tail(chosen.module_path, 42)} reads its skip "
        "connection.",
        f"A reuse step runs {_percent(chosen.ratio)} of the {_macs(explanation.flops)} of a call "
        f"(r = {chosen.ratio:.3f})",
        f"and reads {tensors} of {_bytes(chosen.cache_bytes)} from the cache.",
    ]
    lines = [_text(MARGIN, 58, explanation.network, "title")]
    lines += [_text(MARGIN, 86 + 21 * i, line, "lead") for i, line in enumerate(lead)]
    gap, width = 10, 88
    chips = list(chosen.speed_limits.items())
    left = WIDTH - MARGIN - len(chips) * (width + gap) + gap
    for i, (interval, limit) in enumerate(chips):
        x = left + i * (width + gap)
        lines += [
            _rect(x, 36, width, 58, 10, fill="#eff4ff"),
            _text(x + width / 2, 57, f"N = {interval}", "chip-n", "middle"),
            _text(x + width / 2, 82, f"{limit:.2f}×", "chip", "middle"),
        ]
    lines += [
        _text(
            WIDTH - MARGIN,
            112,
            "highest possible speed-up, refreshing every Nth step,",
            "head",
            "end",
        ),
        _text(WIDTH - MARGIN, 128, "N / (1 + (N − 1) r)", "head", "end"),
    ]
    return lines, 138


def _table_head(y: float) -> list[str]:
    return [
        _text(SHAPE_X, y, "cached if cut here", "head"),
        _text(BAR_X, y, "r: FLOPs of a reuse step", "head"),
        *(_text(x, y, f"N = {interval}", "head", "end") for interval, x in LIMIT_X.items()),
    ]


def _row_bands(layout: _Layout) -> list[str]:
    """Very light bands tie the rows of the U to the rows of the table, one band per level."""
    bands = []
    for level in range(layout.levels[-1] + 1):
        own = [top for top, other in zip(layout.tops, layout.levels, strict=True) if other == level]
        if level % 2 == 0:
            y, height = own[0] - 7, own[-1] - own[0] + BOX_HEIGHT + 14
            bands.append(_rect(16, y, WIDTH - 32, height, 10, fill="#f8fafc"))
    return bands


def _u(layout: _Layout, explanation: Explanation) -> list[str]:
    depths, chosen = explanation.depths, explanation.chosen
    lines: list[str] = []
    x_in, x_out = layout.down(0) + DOWN_WIDTH / 2, layout.up(0) + UP_WIDTH / 2
    top = layout.tops[0]
    lines += [
        _path(f"M{x_in:g} {top - 22:g} V{top - 2:g}", "wire"),
        _path(f"M{x_out:g} {top - 1:g} V{top - 22:g}", "wire"),
        _text(x_in, top - 30, "noisy sample", "bold", "middle"),
        _text(x_out, top - 30, "prediction", "bold", "middle"),
    ]
    for row in depths:
        lines += _rung(row, depths, chosen, layout)
        if row.depth + 1 < len(depths):
            lines += _verticals(row.depth, chosen, layout)
    last = len(depths) - 1
    x_down = layout.down(last) + DOWN_WIDTH / 2
    x_up = layout.up(last) + UP_WIDTH / 2
    y = layout.bottom
    from_middle = (
        _store_bottom(layout, depths[chosen]) if chosen == last else layout.tops[last] + BOX_HEIGHT
    )
    share = 1 - depths[-1].ratio
    lines += [
        _path(f"M{x_down:g} {layout.tops[last] + BOX_HEIGHT:g} V{y - 2:g}", "wire-off"),
        _path(f"M{x_up:g} {y:g} V{from_middle + 2:g}", "wire-off"),
        _rect(x_down - 30, y, x_up - x_down + 60, BOX_HEIGHT, 6, css="skipped"),
        _text((x_down + x_up) / 2, y + 18, f"middle · {_percent(share)}", "off", "middle"),
    ]
    return lines


def _rung(
    row: DepthReport, depths: tuple[DepthReport, ...], chosen: int, layout: _Layout
) -> list[str]:
    """One depth: its stretch of the down path, its skip connection, its stretch of the up path."""
    depth, runs = row.depth, row.depth <= chosen
    x_down, x_up, y = layout.down(depth), layout.up(depth), layout.tops[depth]
    box, label = ("run", "on") if runs else ("skipped", "off")
    centre = layout.middle(depth)
    share = f"{_percent(_share(depths, depth))}{' of FLOPs' if depth == 0 else ''}"
    pill = (x_down + DOWN_WIDTH + x_up) / 2 - 24
    fill, stroke, text = ("#1d4ed8", "#1d4ed8", "on") if runs else ("#ffffff", "#b6bfca", "off")
    return [
        _path(f"M{x_down + DOWN_WIDTH:g} {centre:g} H{x_up - 2:g}", "wire" if runs else "wire-off"),
        _rect(x_down, y, DOWN_WIDTH, BOX_HEIGHT, 6, css=box),
        _text(x_down + DOWN_WIDTH / 2, y + 18, _resolution(row), label, "middle"),
        _rect(x_up, y, UP_WIDTH, BOX_HEIGHT, 6, css=box, title=row.module_path),
        _text(x_up + UP_WIDTH / 2, y + 18, _tail(row.module_path, 23), f"{label} small", "middle"),
        _rect(pill - 14, centre - 10, 30 + _wide(share), 20, 10, fill=layout.ground(depth)),
        f'<circle cx="{pill:g}" cy="{centre:g}" r="10" fill="{fill}" stroke="{stroke}"/>',
        _text(pill, centre + 4, str(depth), f"{text} bold small", "middle"),
        _text(pill + 16, centre + 4, share, "" if runs else "off"),
    ]


def _verticals(depth: int, chosen: int, layout: _Layout) -> list[str]:
    """From this row to the next one on the down path, and back on the up path."""
    runs = depth < chosen
    css = "wire" if runs else "wire-off"
    y_0, y_1 = layout.tops[depth] + BOX_HEIGHT, layout.tops[depth + 1]
    down = (layout.down(depth) + DOWN_WIDTH / 2, layout.down(depth + 1) + DOWN_WIDTH / 2)
    up = (layout.up(depth) + UP_WIDTH / 2, layout.up(depth + 1) + UP_WIDTH / 2)
    lines = [_curve(down[0], y_0, down[1], y_1 - 2, css)]
    if depth == chosen:
        return lines  # the store is drawn in between
    return [*lines, _curve(up[1], y_1, up[0], y_0 + 2, css)]


def _cut(layout: _Layout, chosen: DepthReport) -> list[str]:
    """The dashed line across the U, and the store of cached tensors on the up path."""
    depth = chosen.depth
    width, height, lid = 184, _store_height(chosen), 6
    x = layout.up(depth) + UP_WIDTH / 2
    left = x - width / 2
    y = layout.gap_top + 22
    line_y = layout.gap_top + layout.gap_height / 2
    bottom = y + height
    lines = [
        f'<line class="cut" x1="{MARGIN - 20}" y1="{line_y:g}" x2="{left:g}" y2="{line_y:g}"/>',
        _path(f"M{x:g} {y - lid:g} V{layout.gap_top + 2:g}", "wire-store"),
        _text(x + 12, y - lid - 3, "reuse steps read", "amber small"),
    ]
    last = depth + 1 == len(layout.tops)
    x_from = x if last else layout.up(depth + 1) + UP_WIDTH / 2
    y_from = layout.gap_top + layout.gap_height
    if not last:
        lines.append(_curve(x_from, y_from, x, bottom + lid + 2, "wire-off"))
    lines += [
        f'<path class="store" d="M{left:g} {y:g} V{bottom:g} A{width / 2:g} {lid} 0 0 0 '
        f'{left + width:g} {bottom:g} V{y:g} Z"/>',
        f'<ellipse class="lid" cx="{x:g}" cy="{y:g}" rx="{width / 2:g}" ry="{lid}"/>',
        *(
            _text(x, y + 23 + 16 * i, line, f"amber {'bold' if i == 0 else ''}", "middle")
            for i, line in enumerate(_store_lines(chosen))
        ),
        _text(x + 12, bottom + 18, "refresh steps store", "off small"),
    ]
    label = f"cut at depth {depth}"
    inside = not last and layout.levels[depth] == layout.levels[depth + 1]
    ground = layout.ground(depth) if inside else "#ffffff"
    return [
        *lines,
        _rect(MARGIN + 168, line_y - 10, _wide(label) + 16, 20, 4, fill=ground),
        _text(MARGIN + 176, line_y + 4, label, "cut-text"),
    ]


def _table_row(
    row: DepthReport, depths: tuple[DepthReport, ...], chosen: int, layout: _Layout
) -> list[str]:
    css = "chosen" if row.depth == chosen else "" if row.depth < chosen else "muted"
    y = layout.middle(row.depth) + 4
    before = depths[row.depth - 1].ratio if row.depth else 0.0
    strong, soft = ("#1d4ed8", "#9db8f5") if row.depth <= chosen else ("#94a3b8", "#cbd5e1")
    shapes = [_shape(shape) for shape in row.boundary_shapes]
    more = f" +{len(shapes) - 1}" if len(shapes) > 1 else ""
    return [
        _text(SHAPE_X, y, _tail((shapes or ["?"])[0], 20) + more, css, title=", ".join(shapes)),
        _text(BYTES_X, y, _bytes(row.cache_bytes), css, "end"),
        _rect(BAR_X, y - 10, BAR_WIDTH, 12, 3, fill="#e8ecf1"),
        _rect(BAR_X, y - 10, BAR_WIDTH * row.ratio, 12, 3, fill=strong),
        _rect(BAR_X, y - 10, BAR_WIDTH * before, 12, 3, fill=soft),
        _text(RATIO_X, y, f"{row.ratio:.3f}", css, "end"),
        *(
            _text(x, y, f"{row.speed_limits[interval]:.2f}×", css, "end")
            for interval, x in LIMIT_X.items()
            if interval in row.speed_limits
        ),
    ]


def _legend(y: float) -> tuple[list[str], float]:
    """The key, and the height of the whole picture."""
    lines = [f'<line x1="{MARGIN}" y1="{y:g}" x2="{WIDTH - MARGIN}" y2="{y:g}" stroke="#e2e8f0"/>']
    y += 28
    x = float(MARGIN)
    for css, label in (
        ("run", "runs in every step"),
        ("skipped", "runs in refresh steps only, left out of reuse steps"),
        ("store", "cached: stored by a refresh step, read by reuse steps"),
    ):
        lines += [_rect(x, y - 11, 22, 14, 4, css=css), _text(x + 30, y, label)]
        x += _wide(label) + 62
    y += 26
    x = MARGIN + 11
    lines += [
        f'<circle cx="{x:g}" cy="{y - 4:g}" r="10" fill="#ffffff" stroke="#94a3b8"/>',
        _text(x, y, "d", "muted bold small", "middle"),
        _text(
            x + 19,
            y,
            "skip connection at depth d, with its share of the FLOPs of one call: its stretch of "
            "the down path and of the up path together",
            "muted",
        ),
    ]
    return lines, y + 28


def _store_lines(row: DepthReport) -> list[str]:
    shapes = [_shape(shape) for shape in row.boundary_shapes]
    if len(shapes) > 3:
        shapes = [*shapes[:2], f"and {len(shapes) - 2} more"]
    return [f"cache · {_bytes(row.cache_bytes)}", *shapes]


def _store_height(row: DepthReport) -> float:
    return 18 + 16 * len(_store_lines(row))


def _store_bottom(layout: _Layout, row: DepthReport) -> float:
    return layout.gap_top + 22 + _store_height(row) + 6


def _share(depths: tuple[DepthReport, ...], depth: int) -> float:
    """What a cut at this depth runs more than a cut one further out, as a share of a full call."""
    return max(0.0, depths[depth].ratio - (depths[depth - 1].ratio if depth else 0.0))


def _resolution(row: DepthReport) -> str:
    """``64×64`` of a feature map; what a sequence has in place of it (tokens and channels)."""
    shape = max(row.boundary_shapes, key=len, default=())
    return _shape(shape[2:] if len(shape) > 3 else shape[1:])


def _shape(shape: tuple[int, ...]) -> str:
    return "×".join(map(str, shape))


def _bytes(count: int) -> str:
    for unit, size in (("GiB", 2**30), ("MiB", 2**20)):
        if count >= size:
            return f"{count / size:,.{0 if count >= 100 * size else 1}f} {unit}"
    return f"{count / 1024:,.0f} KiB"


def _macs(flops: int) -> str:
    giga = flops / 2e9
    return f"{giga:,.{2 if giga < 10 else 1 if giga < 100 else 0}f} GMACs"


def _percent(share: float) -> str:
    return f"{100 * share:.{1 if share < 0.0995 else 0}f} %"


def _tail(path: str, most: int) -> str:
    """The end of a module path says where it is; its beginning is dropped if it is too long."""
    return path if len(path) <= most else "…" + path[-(most - 1) :]


def _wide(text: str) -> float:
    """Upper estimate of a 12 px text's width: no font is at hand to measure with."""
    return 6.5 * len(text) + 8


def _text(
    x: float, y: float, content: str, css: str = "", anchor: str = "start", title: str = ""
) -> str:
    hint = f"<title>{escape(title)}</title>" if title else ""
    return (
        f'<text x="{x:g}" y="{y:g}" class="{css.strip()}" text-anchor="{anchor}">'
        f"{escape(content)}{hint}</text>"
    )


def _rect(
    x: float,
    y: float,
    width: float,
    height: float,
    radius: float,
    *,
    css: str = "",
    fill: str = "",
    title: str = "",
) -> str:
    paint = f'class="{css}"' if css else f'fill="{fill}"'
    hint = f"<title>{escape(title)}</title>" if title else ""
    return (
        f'<rect x="{x:g}" y="{y:g}" width="{max(width, 0):g}" height="{height:g}" '
        f'rx="{radius:g}" {paint}>{hint}</rect>'
    )


def _path(commands: str, css: str) -> str:
    return f'<path class="{css}" d="{commands}"/>'


def _curve(x_0: float, y_0: float, x_1: float, y_1: float, css: str) -> str:
    """A vertical S from one point to another."""
    if x_0 == x_1:
        return _path(f"M{x_0:g} {y_0:g} V{y_1:g}", css)
    bend = (y_0 + y_1) / 2
    return _path(f"M{x_0:g} {y_0:g} C{x_0:g} {bend:g} {x_1:g} {bend:g} {x_1:g} {y_1:g}", css)
