"""Draws docs/architecture.svg and docs/choosing.svg: ``python docs/tools/draw.py``."""

from __future__ import annotations

from html import escape
from pathlib import Path

DOCS = Path(__file__).parents[1]
BLUE, GREEN, SAND, GREY = "#dbe7ff", "#d9f2e0", "#fdf0d5", "#eceff1"


class Drawing:
    """Boxes and arrows on a white sheet."""

    def __init__(self, width: int, height: int, title: str, left: int = 0) -> None:
        self.parts = [
            '<svg xmlns="http://www.w3.org/2000/svg" role="img" '
            f'viewBox="{left} 0 {width - left} {height}" '
            f'width="{width - left}" height="{height}" font-family="sans-serif" font-size="13">',
            f"<title>{escape(title)}</title>",
            '<defs><marker id="tip" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="8" '
            'markerHeight="8" orient="auto"><path d="M0 0L8 4L0 8z" fill="#455a64"/></marker>'
            "</defs>",
            f'<rect width="{width}" height="{height}" fill="#fff"/>',
        ]

    def box(self, x: int, y: int, w: int, h: int, color: str, name: str, *lines: str) -> None:
        """A rounded box: a name in bold, and lines of text below it."""
        self.parts.append(
            f'<rect x="{x}" y="{y}" width="{w}" height="{h}" rx="7" fill="{color}" '
            'stroke="#607d8b"/>'
        )
        top = y + (h - 17 * len(lines)) / 2 + 5
        self.text(x + w / 2, top, name, bold=True)
        for number, line in enumerate(lines, 1):
            self.text(x + w / 2, top + 17 * number, line, size=11.5)

    def text(self, x: float, y: float, words: str, *, bold: bool = False, size: float = 13) -> None:
        """A line of text, centred."""
        weight = ' font-weight="bold"' if bold else ""
        self.parts.append(
            f'<text x="{x:g}" y="{y:g}" text-anchor="middle" font-size="{size:g}"{weight} '
            f'fill="#1c2b33">{escape(words)}</text>'
        )

    def arrow(
        self, *points: tuple[int, int], label: str = "", at: tuple[int, int] = (0, 0)
    ) -> None:
        """A line through the points, with a tip at the end."""
        way = "L".join(f"{x} {y}" for x, y in points)
        self.parts.append(
            f'<path d="M{way}" fill="none" stroke="#455a64" stroke-width="1.4" '
            'marker-end="url(#tip)"/>'
        )
        if label:
            self.text(*at, label, size=11.5)

    def save(self, file: Path) -> None:
        """Write the drawing."""
        file.write_text("\n".join([*self.parts, "</svg>\n"]), encoding="utf-8")


def architecture() -> Drawing:
    """The packages; arrows point at what is imported."""
    d = Drawing(860, 736, "Packages of dcompile and what imports what")
    d.box(60, 20, 210, 56, SAND, "cli/", "the dcompile command")
    d.box(590, 20, 230, 56, SAND, "integrations/serve, bulk", "Ray Serve, Ray Data")
    d.box(60, 116, 210, 56, SAND, "serving/", "jobs, engine, HTTP, fleets")
    d.box(330, 116, 200, 56, SAND, "tuning/", "tune, calibrate, profile")
    d.box(590, 116, 230, 56, SAND, "integrations/torch_compile", "backend entry point")
    d.arrow((270, 38), (588, 38))
    d.arrow((270, 58), (430, 58), (430, 114))
    d.arrow((130, 76), (130, 114))
    d.arrow((640, 76), (640, 96), (200, 96), (200, 114))
    d.arrow((165, 172), (165, 192), (360, 192), (360, 210))
    d.box(330, 212, 200, 56, BLUE, "api.py", "cache_compile, load, handle")
    d.box(330, 308, 200, 56, BLUE, "handles.py", "steer, report, save, export")
    d.box(590, 308, 230, 56, BLUE, "integrations/pipelines", "what a diffusers pipeline is made of")
    d.box(60, 404, 210, 66, GREEN, "report/", "explain, SVG, plots")
    d.box(330, 404, 200, 66, GREEN, "runtime/", "runs one step:", "dispatcher, tracking, lanes")
    d.box(590, 404, 230, 66, GREEN, "storage/", "saved programs, ONNX")
    d.box(
        330, 510, 200, 66, GREEN, "compiler/", "module + call -> program:", "capture, cut, compile"
    )
    d.box(60, 616, 170, 66, GREY, "policy/", "decides: schedules,", "plans, forecasts")
    d.box(250, 616, 170, 66, GREY, "backends/", "eager, Inductor,", "TensorRT, torch's")
    d.box(440, 616, 170, 66, GREY, "passes/", "pure torch.fx:", "find cuts, split, cost")
    d.box(630, 616, 190, 66, GREY, "compat/", "private parts of torch", "and diffusers")
    d.arrow((430, 172), (430, 210))
    d.arrow((700, 172), (700, 192), (500, 192), (500, 210))
    d.arrow((430, 268), (430, 306))
    d.arrow((530, 240), (705, 240), (705, 306))
    d.arrow((430, 364), (430, 402))
    d.arrow((380, 364), (380, 384), (165, 384), (165, 402))
    d.arrow((480, 364), (480, 384), (705, 384), (705, 402))
    d.arrow((430, 470), (430, 508))
    d.arrow((165, 470), (165, 543), (328, 543))
    d.arrow((705, 470), (705, 543), (532, 543))
    d.arrow((360, 576), (360, 596), (145, 596), (145, 614))
    d.arrow((385, 576), (385, 596), (335, 596), (335, 614))
    d.arrow((475, 576), (475, 596), (525, 596), (525, 614))
    d.arrow((500, 576), (500, 596), (725, 596), (725, 614))
    d.text(
        430, 714, "Ground floor, imported by all but passes/: errors, notices, progress", size=12
    )
    return d


def choosing() -> Drawing:
    """Which schedule to use."""
    d = Drawing(860, 560, "Which schedule to choose", left=290)
    d.box(320, 15, 220, 50, SAND, "Few steps, 1 to 8?", "LCM, Turbo, Lightning")
    d.box(610, 15, 230, 50, GREY, "Not measured yet", "try interval=2 and compare pictures")
    d.arrow((540, 40), (608, 40), label="yes", at=(573, 33))
    d.arrow((430, 65), (430, 108), label="no", at=(448, 90))
    d.box(320, 110, 220, 50, SAND, "Must equal DeepCache?", "papers, comparisons")
    d.box(610, 110, 230, 50, GREEN, "interval=N, depth=b")
    d.arrow((540, 135), (608, 135), label="yes", at=(573, 128))
    d.arrow((430, 160), (430, 203), label="no", at=(448, 185))
    d.box(305, 205, 250, 50, SAND, "Can you spend minutes, once,", "on measuring your model?")
    d.box(610, 205, 230, 50, GREEN, "dcompile.tune(...)", "Tuned: best in every measurement")
    d.arrow((555, 230), (608, 230), label="yes", at=(581, 223))
    d.arrow((430, 255), (430, 298), label="no", at=(448, 280))
    d.box(305, 300, 250, 50, SAND, "Does the sampler add noise", "at every step? (DDPM, ancestral)")
    d.box(610, 300, 230, 50, GREEN, "interval=3", "plain reuse")
    d.arrow((555, 325), (608, 325), label="yes", at=(581, 318))
    d.arrow((430, 350), (430, 393), label="no", at=(448, 375))
    d.box(305, 395, 250, 50, SAND, "At least about 36 steps?", "12 refreshes or more")
    d.box(610, 395, 230, 50, GREEN, "interval=3, or MultiLevel", "plain reuse")
    d.arrow((555, 420), (608, 420), label="no", at=(581, 413))
    d.arrow((430, 445), (430, 488), label="yes", at=(450, 470))
    d.box(305, 490, 250, 50, GREEN, "speedup=2.5", "cuts and steps found by watching a run")
    return d


if __name__ == "__main__":
    architecture().save(DOCS / "architecture.svg")
    choosing().save(DOCS / "choosing.svg")
