"""draw_svg: well formed, complete, and nothing outside the picture, whatever the network."""

from __future__ import annotations

import re
from xml.etree import ElementTree

import pytest

from dcompile import DepthError, DepthReport, Explanation, NoCutError
from dcompile.report.svg import WIDTH, draw_svg

SVG = "{http://www.w3.org/2000/svg}"


def report(depth: int, of: int, *shapes: tuple[int, ...], path: str | None = None) -> DepthReport:
    ratio = (depth + 0.5) / of
    return DepthReport(
        depth=depth,
        module_path=path or f"up_blocks.{(of - depth - 1) // 3}.resnets.{(of - depth - 1) % 3}",
        boundary_shapes=shapes,
        cache_bytes=4096 * 8 ** (depth + 1),
        ratio=ratio,
        speed_limits={n: n / (1 + (n - 1) * ratio) for n in (2, 3, 5, 10)},
    )


def network(skips: int, *chosen: int) -> Explanation:
    """Three skip connections to a resolution, as a Stable Diffusion UNet has them."""
    rows = [
        report(depth, skips, (2, 320, 64 >> depth // 3, 64 >> depth // 3)) for depth in range(skips)
    ]
    return Explanation("UNet2DModel", chosen or (0,), 10**12, tuple(rows))


def drawn(explanation: Explanation) -> tuple[ElementTree.Element, list[str]]:
    """The parsed drawing and its visible texts; checks that all of it lies within the picture."""
    root = ElementTree.fromstring(draw_svg(explanation))
    height = float(root.attrib["height"])
    for element in root.iter():
        x, y = float(element.get("x", 0)), float(element.get("y", 0))
        assert 0 <= x <= x + float(element.get("width", 0)) <= WIDTH
        assert 0 <= y <= y + float(element.get("height", 0)) <= height
    return root, [element.text or "" for element in root.iter(f"{SVG}text")]


def boxes(root: ElementTree.Element, css: str) -> int:
    return sum(element.get("class") == css for element in root.iter(f"{SVG}rect"))


def test_one_skip_connection() -> None:
    root, texts = drawn(network(1))
    assert "cut at depth 0" in texts
    assert "middle · 50 %" in texts
    assert boxes(root, "run") == 2 + 1  # down, up, legend
    assert boxes(root, "skipped") == 1 + 1  # middle, legend


@pytest.mark.parametrize("chosen", [0, 2, 3, 11])
def test_twelve_skip_connections(chosen: int) -> None:
    root, texts = drawn(network(12, chosen))
    assert f"cut at depth {chosen}" in texts
    for depth in range(12):
        assert str(depth) in texts
    assert [text for text in texts if re.fullmatch(r"up_blocks\.\d\.resnets\.\d", text)] == [
        report(depth, 12).module_path for depth in range(12)
    ]
    assert boxes(root, "run") == 2 * (chosen + 1) + 1
    assert boxes(root, "skipped") == 2 * (11 - chosen) + 2
    for interval in (2, 3, 5, 10):
        assert f"N = {interval}" in texts
        assert f"{report(chosen, 12).speed_limits[interval]:.2f}×" in texts


def test_several_cuts() -> None:
    root, texts = drawn(network(12, 0, 2, 7))
    assert [text for text in texts if text.startswith("cut at depth ")] == [
        "cut at depth 0",
        "cut at depth 2",
        "cut at depth 7",
    ]
    assert "Cut at depths 0, 2 and 7." in next(text for text in texts if text.startswith("Cut"))
    assert any("a partial step runs 21 % or 62 %" in text for text in texts)
    assert boxes(root, "run") == 2 * 1 + 1
    assert boxes(root, "partial") == 2 * 7 + 1
    assert boxes(root, "skipped") == 2 * 4 + 1 + 1
    stores = [path for path in root.iter(f"{SVG}path") if path.get("class") == "store"]
    assert len(stores) == 3
    assert texts.count("reuse steps read") == 1
    assert texts.count("partial steps read") == 2
    assert texts.count("refresh steps store") == 1
    marked = [text.text for text in root.iter(f"{SVG}text") if text.get("class") == "chosen"]
    assert [text for text in marked if text in {"0.042", "0.208", "0.625"}] == [
        "0.042",
        "0.208",
        "0.625",
    ]


def test_the_deepest_of_several_cuts() -> None:
    root, texts = drawn(network(3, 0, 2))
    assert {"cut at depth 0", "cut at depth 2"} <= set(texts)
    assert boxes(root, "skipped") == 1 + 1  # middle, legend


def test_table_marks_all_cuts() -> None:
    table = str(network(4, 0, 2))
    assert re.findall(r"▸(\d)", table) == ["0", "2"]
    assert "refreshes all outer ones" in table
    assert "outer ones" not in str(network(4, 1))


def test_deeper_levels_are_narrower() -> None:
    root, texts = drawn(network(12))
    assert {"64×64", "32×32", "16×16", "8×8"} <= set(texts)
    lefts = [
        float(element.attrib["x"])
        for element in root.iter(f"{SVG}rect")
        if element.get("width") == "96"
    ]
    assert lefts == sorted(lefts)
    assert len(set(lefts)) == 4


@pytest.mark.parametrize("tensors", [2, 3, 9])
def test_boundary_of_several_tensors(tensors: int) -> None:
    shapes = [(1, 128 + i, 256, 256) for i in range(tensors)]
    rows = tuple(report(depth, 2, *shapes) for depth in range(2))
    _, texts = drawn(Explanation("UNet2DModel", (1,), 10**12, rows))
    assert texts.count(f"1×128×256×256 +{tensors - 1}") == 2
    assert "1×129×256×256" in texts
    assert ("1×130×256×256" in texts) == (tensors == 3)
    assert ("and 7 more" in texts) == (tensors == 9)


@pytest.mark.parametrize(
    ("shape", "resolution"),
    [
        ((2, 320, 14, 64, 64), "14×64×64"),  # video
        ((2, 1024, 1408), "1024×1408"),  # tokens
        ((2, 64), "64"),
        ((), ""),
    ],
)
def test_shapes_of_other_networks(shape: tuple[int, ...], resolution: str) -> None:
    _, texts = drawn(Explanation("Net", (0,), 10**12, (report(0, 2, shape), report(1, 2, shape))))
    assert texts.count(resolution) >= 2


def test_names_are_escaped_and_shortened() -> None:
    path = "a.very.long.path.to.some.block<T>&more.resnets.2"
    rows = (report(0, 1, (1, 8, 8, 8), path=path),)
    root, texts = drawn(Explanation('Net<"&">', (0,), 0, rows))
    assert 'Net<"&">' in texts
    assert "…lock<T>&more.resnets.2" in texts
    assert path in [element.text for element in root.iter(f"{SVG}title")]


def test_refuses_what_cannot_be_drawn() -> None:
    with pytest.raises(NoCutError, match="Net has no cut"):
        draw_svg(Explanation("Net", (0,), 0, ()))
    with pytest.raises(DepthError, match="depth 3 is out of range: UNet2DModel has depths 0 to 2"):
        draw_svg(network(3, 3))
    with pytest.raises(DepthError, match=r"chosen: expected ascending depths, got \[2, 1\]"):
        draw_svg(network(3, 2, 1))
