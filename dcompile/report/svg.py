"""The cut network as a picture: ``draw_svg(handle(unet).explain())``."""

from __future__ import annotations

from xml.sax.saxutils import escape, quoteattr

from dcompile.errors import DepthError, NoCutError
from dcompile.report import svg_elements as svg
from dcompile.report.explain import DepthReport, Explanation
from dcompile.report.svg_stream import draw_stream, draw_stream_cut
from dcompile.report.svg_unet import BOX_HEIGHT, MARGIN, Layout, draw_cut, draw_unet, paint_of

WIDTH = 1200

# The table next to the U: right edges of the numbers, left edges of the rest.
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
.partial { fill: #bfd0f7; stroke: #7da2f0; }
.skipped { fill: url(#hatched); stroke: #cbd2db; }
.store { fill: #fef3c7; stroke: #d97706; stroke-width: 1.5; }
.lid { fill: #fde68a; stroke: #d97706; stroke-width: 1.5; }
.amber { fill: #92400e; }
.wire { fill: none; stroke: #1d4ed8; stroke-width: 2.5; marker-end: url(#tip-run); }
.wire-partial { fill: none; stroke: #7da2f0; stroke-width: 2; marker-end: url(#tip-partial); }
.wire-off { fill: none; stroke: #b6bfca; stroke-width: 1.5; marker-end: url(#tip-off); }
.wire-store { fill: none; stroke: #d97706; stroke-width: 2.5; marker-end: url(#tip-store); }
.cut { stroke: #be123c; stroke-width: 1.5; stroke-dasharray: 7 5; }
.cut-text { fill: #be123c; font-weight: 650; }
"""

DEFS = (
    '<pattern id="hatched" width="7" height="7" patternUnits="userSpaceOnUse" '
    'patternTransform="rotate(45)"><rect width="7" height="7" fill="#f6f7f9"/>'
    '<line x1="0" y1="0" x2="0" y2="7" stroke="#e3e7ec" stroke-width="3"/></pattern>'
) + "".join(
    f'<marker id="tip-{name}" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="{size}" '
    f'markerHeight="{size}" orient="auto" markerUnits="userSpaceOnUse">'
    f'<path d="M0 0.5 L8 4 L0 7.5 Z" fill="{colour}"/></marker>'
    for name, colour, size in (
        ("run", "#1d4ed8", 10),
        ("partial", "#7da2f0", 9),
        ("off", "#b6bfca", 8),
        ("store", "#d97706", 10),
    )
)


def draw_svg(explanation: Explanation) -> str:
    """Draw a network, cut at the chosen depths, with what each depth would save.

    A network with skip connections is drawn as a U, one with a residual stream as a column of
    blocks and the way past those that reuse steps skip.

    What every step runs is blue, what only refresh steps run is hatched, and what is between two
    cuts, which runs in steps that refresh the outer one, is light blue. The cached tensors of each
    cut are an amber store that feeds the up path.

    Args:
        explanation: from ``handle(module).explain()``; other depths are drawn with
            ``dataclasses.replace(explanation, chosen=(depth,))``.

    Returns:
        An SVG document, 1200 units wide.

    Raises:
        NoCutError: the network has none.
        DepthError: the chosen depths are not ascending depths of the network.
    """
    depths, chosen = explanation.depths, explanation.chosen
    if not depths:
        raise NoCutError(f"{explanation.network} has no cut: nothing to draw")
    for depth in chosen:
        if not 0 <= depth < len(depths):
            raise DepthError(
                f"depth {depth} is out of range: {explanation.network} has depths 0 to "
                f"{len(depths) - 1}"
            )
    if not chosen or list(chosen) != sorted(set(chosen)):
        raise DepthError(f"chosen: expected ascending depths, got {list(chosen)}")
    header, top = _header(explanation)
    layout = Layout.of(depths, chosen, top + 74)
    drawn_cut = draw_stream_cut if explanation.stream else draw_cut
    draw_network = draw_stream if explanation.stream else draw_unet
    body = [
        *_table_head(top + 26),
        *_row_bands(layout),
        *(line for depth in chosen for line in drawn_cut(layout, depths[depth], chosen)),
        *draw_network(layout, explanation),
        *(line for row in depths for line in _table_row(row, depths, chosen, layout)),
    ]
    below = 84 if explanation.stream else 50
    legend, height = _legend(
        layout.bottom + below, several=len(chosen) > 1, stream=explanation.stream
    )
    summary = (
        f"{explanation.network} cut at {_named(chosen)}: a reuse step runs "
        f"{svg.percent_text(depths[chosen[0]].ratio)} of the FLOPs"
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


def _named(chosen: tuple[int, ...]) -> str:
    """``depth 0``, ``depths 0 and 2`` or ``depths 0, 2 and 5``."""
    *others, last = chosen
    if not others:
        return f"depth {last}"
    return f"depths {', '.join(map(str, others))} and {last}"


def _lead(explanation: Explanation) -> list[str]:
    outermost, *deeper = [explanation.depths[depth] for depth in explanation.chosen]
    tensors = "one tensor" if len(outermost.boundary_shapes) == 1 else "tensors"
    size = svg.bytes_text(outermost.cache_bytes)
    path = svg.tail_of(outermost.module_path, 42)
    where = f"{path} reads its skip connection."
    if explanation.stream:
        where = f"before {path}."
    joint = "" if explanation.stream else "where "
    lines = [
        f"Cut at {_named(explanation.chosen)}, {joint}{where}",
        f"A reuse step runs {svg.percent_text(outermost.ratio)} of the "
        f"{svg.macs_text(explanation.flops)} of a call (r = {outermost.ratio:.3f})",
        f"and reads {tensors} of {size} from the cache.",
    ]
    if deeper:
        shares = [svg.percent_text(row.ratio) for row in deeper]
        named = ", ".join(shares[:-1]) + " or " * (len(shares) > 1) + shares[-1]
        joint = ", the outermost" if explanation.stream else ". At the outermost,"
        lines[0] = f"Cut at {_named(explanation.chosen)}{joint} {where}"
        lines[2] = f"{lines[2][:-1]}; a partial step runs {named}."
    return lines


def _header(explanation: Explanation) -> tuple[list[str], float]:
    chosen = explanation.depths[explanation.chosen[0]]
    lines = [svg.text(MARGIN, 58, explanation.network, "title")]
    lines += [
        svg.text(MARGIN, 86 + 21 * i, line, "lead") for i, line in enumerate(_lead(explanation))
    ]
    gap, width = 10, 88
    chips = list(chosen.speed_limits.items())
    left = WIDTH - MARGIN - len(chips) * (width + gap) + gap
    for i, (interval, limit) in enumerate(chips):
        x = left + i * (width + gap)
        lines += [
            svg.rect(x, 36, width, 58, 10, fill="#eff4ff"),
            svg.text(x + width / 2, 57, f"N = {interval}", "chip-n", "middle"),
            svg.text(x + width / 2, 82, f"{limit:.2f}×", "chip", "middle"),
        ]
    cut = f" with the cut at depth {chosen.depth} alone" if len(explanation.chosen) > 1 else ""
    limit_of = f"highest possible speed-up{cut}, refreshing every Nth step,"
    lines += [
        svg.text(WIDTH - MARGIN, 112, limit_of, "head", "end"),
        svg.text(WIDTH - MARGIN, 128, "N / (1 + (N − 1) r)", "head", "end"),
    ]
    return lines, 138


def _table_head(y: float) -> list[str]:
    return [
        svg.text(SHAPE_X, y, "cached if cut here", "head"),
        svg.text(BAR_X, y, "r: FLOPs of a reuse step", "head"),
        *(svg.text(x, y, f"N = {interval}", "head", "end") for interval, x in LIMIT_X.items()),
    ]


def _row_bands(layout: Layout) -> list[str]:
    """Very light bands tie the rows of the U to the rows of the table, one band per level."""
    bands = []
    for level in range(layout.levels[-1] + 1):
        own = [top for top, other in zip(layout.tops, layout.levels, strict=True) if other == level]
        if level % 2 == 0:
            y, height = own[0] - 7, own[-1] - own[0] + BOX_HEIGHT + 14
            bands.append(svg.rect(16, y, WIDTH - 32, height, 10, fill="#f8fafc"))
    return bands


def _table_row(
    row: DepthReport, depths: tuple[DepthReport, ...], chosen: tuple[int, ...], layout: Layout
) -> list[str]:
    css = "chosen" if row.depth in chosen else "" if row.depth < chosen[-1] else "muted"
    y = layout.middle(row.depth) + 4
    before = depths[row.depth - 1].ratio if row.depth else 0.0
    paint = paint_of(row.depth, chosen)
    shapes = [svg.shape_text(shape) for shape in row.boundary_shapes]
    more = f" +{len(shapes) - 1}" if len(shapes) > 1 else ""
    first = svg.tail_of((shapes or ["?"])[0], 20) + more
    return [
        svg.text(SHAPE_X, y, first, css, title=", ".join(shapes)),
        svg.text(BYTES_X, y, svg.bytes_text(row.cache_bytes), css, "end"),
        svg.rect(BAR_X, y - 10, BAR_WIDTH, 12, 3, fill="#e8ecf1"),
        svg.rect(BAR_X, y - 10, BAR_WIDTH * row.ratio, 12, 3, fill=paint.bar),
        svg.rect(BAR_X, y - 10, BAR_WIDTH * before, 12, 3, fill=paint.outer),
        svg.text(RATIO_X, y, f"{row.ratio:.3f}", css, "end"),
        *(
            svg.text(x, y, f"{row.speed_limits[interval]:.2f}×", css, "end")
            for interval, x in LIMIT_X.items()
            if interval in row.speed_limits
        ),
    ]


def _legend(y: float, *, several: bool, stream: bool) -> tuple[list[str], float]:
    """The key, and the height of the whole picture."""
    lines = [f'<line x1="{MARGIN}" y1="{y:g}" x2="{WIDTH - MARGIN}" y2="{y:g}" stroke="#e2e8f0"/>']
    y += 28
    x = float(MARGIN)
    if several:
        key = [
            ("run", "runs in every step"),
            ("partial", "runs in steps that refresh the cut above it"),
            ("skipped", "runs in refresh steps only"),
            ("store", "cached: a step stores every cut it refreshes"),
        ]
    else:
        key = [
            ("run", "runs in every step"),
            ("skipped", "runs in refresh steps only, skipped in reuse steps"),
            ("store", "cached: stored by a refresh step, read by reuse steps"),
        ]
    for css, label in key:
        lines += [svg.rect(x, y - 11, 22, 14, 4, css=css), svg.text(x + 30, y, label)]
        x += svg.width_of(label) + 62
    y += 26
    x = MARGIN + 11
    if stream:
        explained = "Percentages are shares of the FLOPs of one call. What is cached is what the "
        explained += "skipped blocks added to the stream at the latest refresh."
        return [*lines, svg.text(MARGIN, y, explained, "muted")], y + 28
    lines += [
        f'<circle cx="{x:g}" cy="{y - 4:g}" r="10" fill="#ffffff" stroke="#94a3b8"/>',
        svg.text(x, y, "d", "muted bold small", "middle"),
        svg.text(
            x + 19,
            y,
            "skip connection at depth d, with its share of the FLOPs of one call: of its parts of "
            "the down path and the up path together",
            "muted",
        ),
    ]
    return lines, y + 28
