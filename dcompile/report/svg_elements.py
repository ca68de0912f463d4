"""The elements of an SVG drawing, and numbers as a person reads them."""

from __future__ import annotations

from xml.sax.saxutils import escape


def shape_text(shape: tuple[int, ...]) -> str:
    """``1×320×64×64``."""
    return "×".join(map(str, shape))


def bytes_text(count: int) -> str:
    """A number of bytes in KiB, MiB or GiB."""
    for unit, size in (("GiB", 2**30), ("MiB", 2**20)):
        if count >= size:
            return f"{count / size:,.{0 if count >= 100 * size else 1}f} {unit}"
    return f"{count / 1024:,.0f} KiB"


def macs_text(flops: int) -> str:
    """FLOPs as multiply-accumulate operations, each of which is two FLOPs."""
    giga = flops / 2e9
    return f"{giga:,.{2 if giga < 10 else 1 if giga < 100 else 0}f} GMACs"


def percent_text(share: float) -> str:
    """A share of 1 in percent, with a decimal if it is small."""
    return f"{100 * share:.{1 if share < 0.0995 else 0}f} %"


def tail_of(path: str, most: int) -> str:
    """The path, without its beginning if it has more than ``most`` characters."""
    return path if len(path) <= most else "…" + path[-(most - 1) :]


def width_of(content: str) -> float:
    """Upper estimate of the width of a text of 12 px, without a font to measure it with."""
    return 6.5 * len(content) + 8


def text(
    x: float, y: float, content: str, css: str = "", anchor: str = "start", title: str = ""
) -> str:
    """A line of text, with ``title`` as its tooltip."""
    hint = f"<title>{escape(title)}</title>" if title else ""
    return (
        f'<text x="{x:g}" y="{y:g}" class="{css.strip()}" text-anchor="{anchor}">'
        f"{escape(content)}{hint}</text>"
    )


def rect(
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
    """A rounded rectangle, painted by a style class or with a colour."""
    paint = f'class="{css}"' if css else f'fill="{fill}"'
    hint = f"<title>{escape(title)}</title>" if title else ""
    return (
        f'<rect x="{x:g}" y="{y:g}" width="{max(width, 0):g}" height="{height:g}" '
        f'rx="{radius:g}" {paint}>{hint}</rect>'
    )


def path(commands: str, css: str) -> str:
    """A line, with an arrow head if its style class has one."""
    return f'<path class="{css}" d="{commands}"/>'


def curve(x_0: float, y_0: float, x_1: float, y_1: float, css: str) -> str:
    """A vertical S from one point to another, straight if it can be."""
    if x_0 == x_1:
        return path(f"M{x_0:g} {y_0:g} V{y_1:g}", css)
    bend = (y_0 + y_1) / 2
    return path(f"M{x_0:g} {y_0:g} C{x_0:g} {bend:g} {x_1:g} {bend:g} {x_1:g} {y_1:g}", css)
