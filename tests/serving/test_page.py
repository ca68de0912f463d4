"""The page: its parts, its answers with a client that generates nothing, and in a browser."""

from __future__ import annotations

import asyncio
import contextlib
import re
import shutil
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fake_client import FakeClient, about, made
from fastapi.testclient import TestClient
from PIL import Image

from dcompile.errors import LostError
from dcompile.serving import comparison
from dcompile.serving.comparison import Comparison
from dcompile.serving.http import Server, app_of
from dcompile.serving.jobs import Caching
from dcompile.serving.settings import Limits

GREY = Image.new("RGB", (8, 4), (100, 100, 100))
LONG = 120_000  # milliseconds: what has not happened by then never will
STEPS_IN_BROWSER = 5


# Pictures and numbers -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("brighter", "gain"), [(0, 1), (1, 32), (7, 32), (8, 16), (31, 8), (127, 2), (128, 1), (155, 1)]
)
def test_difference_is_as_bright_as_can_be(brighter: int, gain: int) -> None:
    other = Image.new("RGB", GREY.size, (100 + brighter, 100, 100))
    picture, found = comparison.difference(GREY, other)
    assert found == gain
    assert np.unique(np.asarray(picture)[..., 0]).tolist() == [brighter * gain]
    assert comparison.difference(other, GREY)[0].tobytes() == picture.tobytes()


def test_one_pixel_alone_is_seen() -> None:
    other = Image.new("RGB", (64, 64))
    other.putpixel((0, 0), (3, 0, 0))
    picture, gain = comparison.difference(Image.new("RGB", (64, 64)), other)
    assert (picture.getpixel((0, 0)), gain) == ((96, 0, 0), 32)


@pytest.mark.parametrize(
    ("size", "shown"), [((64, 64), (512, 512)), ((100, 50), (500, 250)), ((300, 40), (300, 40))]
)
def test_small_pictures_are_enlarged_by_whole_factors(
    size: tuple[int, int], shown: tuple[int, int]
) -> None:
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (*size[::-1], 3), np.uint8))
    larger = comparison.enlarged(image)
    assert larger.size == shown
    factor = shown[0] // size[0]
    assert np.array_equal(np.asarray(larger)[::factor, ::factor], np.asarray(image))


# HTML ---------------------------------------------------------------------------------------------


def compared(cached: dict[str, Any] | None = None, image: Image.Image | None = None) -> Comparison:
    before = {"steps": ["uncached"] * 4, "flops_speedup": 1.0}
    seconds = {"encode": 0.1, "denoise": 2.0, "decode": 0.3}
    return Comparison(
        made(1, GREY, **before, seconds=seconds),
        made(1, image or GREY, **(cached or {})),
    )


def test_summary() -> None:
    html = comparison.summary(compared())
    tiles = dict(re.findall(r'data-name="(\w+)"><b>([^<]*)</b>', html))
    assert tiles == {"speedup": "9.60×", "psnr": "identical", "flops": "1.60×"}
    assert "<td>2.00 s</td><td>125 ms</td><td>16.00×</td>" in html
    assert "<td>2.40 s</td><td>250 ms</td><td>9.60×</td>" in html
    brighter = Image.new("RGB", GREY.size, (110, 110, 110))
    assert "<b>28.1 dB</b>" in comparison.summary(compared(image=brighter))


def test_summary_says_what_to_know_about_the_numbers() -> None:
    odd = {"compile_seconds": 1.5, "forced": 2, "uncached_reasons": {"<b>training</b>": 3}}
    html = comparison.summary(compared(odd))
    assert "includes 1.50 s of compiling" in html
    assert "2 full steps were not in the schedule" in html
    assert "3 calls of the cached run ran uncached: &lt;b&gt;training&lt;/b&gt;." in html
    assert html.count("a note") == 1  # both pictures have it


@pytest.mark.parametrize(("aim", "is_said"), [(None, False), (1.65, False), (5.0, True)])
def test_summary_says_that_a_speedup_was_not_reached(aim: float | None, is_said: bool) -> None:
    found = compared()
    html = comparison.summary(Comparison(found.uncached, found.cached, aim))
    assert ("5× less computing was asked for, 1.60×" in html) == is_said


def test_strip_has_a_cell_with_a_text_for_each_step() -> None:
    html = comparison.strip("Cached", ["refresh", "partial", "reuse", "uncached"])
    assert html.count("<li ") == 4
    assert re.findall(r'aria-hidden="true">(.)<', html) == list("FPRU")
    assert 'class="dc-hidden">Step 2: partial<' in html
    assert "4 steps: 1 refresh, 1 partial, 1 reuse, 1 uncached" in html
    assert "no steps" in comparison.strip("Cached", [])
    assert "1 step: 1 reuse" in comparison.strip("Cached", ["reuse"])


@pytest.mark.parametrize("evil", ["<script>alert(1)</script>", '"><img src=x onerror=alert(1)>'])
def test_html_of_others_is_escaped(evil: str) -> None:
    pieces = (
        comparison.strip(evil, [evil]),
        comparison.refusal(evil),
        comparison.progress(evil, 1, 2),
        comparison.summary(compared({"uncached_reasons": {evil: 1}})),
    )
    for html in pieces:
        assert evil not in html
        assert "<script" not in html
        assert "<img" not in html


def test_legend_shows_what_occurs() -> None:
    html = comparison.strips(compared())
    assert "refresh: " in html
    assert "partial: " not in html


# Answers ------------------------------------------------------------------------------------------


def page_around(client: FakeClient, limits: Limits | None = None) -> tuple[Any, Server]:
    """The page's object, and the server that it asks."""
    import gradio as gr

    from dcompile.serving.page import Controls, Page, Results

    server = Server({"fake": client}, limits or Limits())
    with gr.Blocks(analytics_enabled=False):
        page = Page(server, Controls(["fake"], server.limits.steps), Results())
    return page, server


def pressed(page: Any, **changes: Any) -> list[dict[Any, Any]]:
    """All updates after Compare was pressed."""
    from dcompile.serving.page import DEEPCACHE, Asked

    asked = Asked(
        model="fake",
        prompt="cat",
        negative_prompt="",
        seed=3,
        steps=4.0,  # as JavaScript may send it
        width=64,
        height=64,
        guidance=5,
        sampler="DDIMScheduler",
        preset=DEEPCACHE,
        speedup=2.5,
    )

    async def collect() -> list[dict[Any, Any]]:
        return [update async for update in page.compare(*asked._replace(**changes))]

    return asyncio.run(collect())


def refusal_of(updates: list[dict[Any, Any]]) -> str:
    texts = [value for update in updates for value in update.values() if isinstance(value, str)]
    return next(text for text in texts if "dc-refusal" in text)


@pytest.mark.parametrize(
    ("preset", "caching"),
    [
        ("deepcache", Caching("interval", 3)),
        ("speedup", Caching("speedup", 2.5)),
        ("tuned", Caching("default")),
    ],
)
def test_both_pictures_are_of_one_seed(preset: str, caching: Caching) -> None:
    client = FakeClient()
    page, server = page_around(client)
    updates = pressed(page, preset=preset, seed=None)
    first, second = (request.job for request in client.asked)
    assert (first.caching, second.caching) == (Caching("off"), caching)
    assert first.seed == second.seed
    assert any("9.60" in str(value) or "identical" in str(value) for value in updates[-2].values())
    text = server.metrics.page().decode()
    assert 'dcompile_requests_total{endpoint="/page",status="200"} 1.0' in text
    assert 'dcompile_phase_seconds_count{phase="denoise"} 2.0' in text


def test_what_compiled_is_measured_again() -> None:
    class Compiles(FakeClient):
        async def stream(self, request: Any) -> Any:
            self.asked.append(request)
            took = {1: 3.0}.get(len(self.asked) - 1, 0.0)  # the second picture, the first cached
            yield made(request.job.seed, compile_seconds=took)

    client = Compiles()
    pressed(page_around(client)[0])
    modes = [request.job.caching.mode for request in client.asked]
    assert modes == ["off", "interval", "off", "interval"]


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"prompt": "x" * 2001}, "prompt: expected at most 2000 characters, got 2001"),
        ({"prompt": ""}, "prompt: expected some text"),
        ({"steps": 151}, "steps: expected at most 150"),
        ({"steps": 2.5}, "steps: Input should be a valid integer"),
        ({"seed": -1}, "seed: "),
        ({"speedup": 1e9, "preset": "speedup"}, "speedup: "),
        ({"sampler": "<img src=x>"}, "sampler: expected one of"),
        ({"model": "another"}, "model: expected one of"),
        ({"width": 63}, "width: expected a multiple of 8"),
    ],
)
@pytest.mark.filterwarnings("ignore")  # gradio has no browser to warn
def test_refusals_are_messages(changes: dict[str, Any], said: str) -> None:
    client = FakeClient()
    page, _ = page_around(client)
    html = refusal_of(pressed(page, **changes))
    assert said in html
    assert "<img" not in html
    assert not client.asked


@pytest.mark.filterwarnings("ignore")
def test_failures_are_messages() -> None:
    assert "the replica is gone" in refusal_of(
        pressed(page_around(FakeClient(LostError("the replica is gone")))[0])
    )
    html = refusal_of(pressed(page_around(FakeClient(RuntimeError("secret")))[0]))
    assert "the server's log says why" in html.replace("&#x27;", "'")
    assert "secret" not in html
    page, server = page_around(FakeClient(), Limits(queue=1))
    server._pending = 1
    assert "try again later" in refusal_of(pressed(page))


def test_the_page_asks_only_for_what_the_model_takes() -> None:
    client = FakeClient(
        about=about(prompt=False, negative_prompt=False, takes_guidance=False, resizes=False)
    )
    pressed(page_around(client)[0], negative_prompt="dog", width=8)
    job = client.asked[0].job
    assert (job.prompt, job.negative_prompt, job.width) == ("", "", 64)


def test_requests_over_http_choose_no_caching_because_of_the_page() -> None:
    app = app_of({"fake": FakeClient()}, page=True)
    with TestClient(app) as http:
        response = http.post("/generate", json={"prompt": "cat", "caching": {"off": True}})
        assert response.status_code == 422
        assert http.get("/", follow_redirects=False).headers["location"] == "./page/"
        html = http.get("/").text
    assert "dcompile: uncached or cached" in html
    assert not re.findall(r'(?:src|href)="https?://(?!testserver)', html)


# In a browser -------------------------------------------------------------------------------------


def chromium() -> str | None:
    """Where a Chromium is, Playwright's own last."""
    for name in ("chromium", "chromium-browser", "google-chrome"):
        if found := shutil.which(name):
            return found
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        own = playwright.chromium.executable_path
    return own if Path(own).exists() else None


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    """A server of emoji-sd in this process."""
    import uvicorn

    from dcompile.serving.client import LocalClient
    from dcompile.serving.engine import Engine
    from dcompile.serving.settings import EngineSettings

    engine = Engine.of(
        EngineSettings("emoji-sd", backend="eager", interval=3, steps=STEPS_IN_BROWSER)
    )
    app = app_of({"emoji-sd": LocalClient.of(engine)}, page=True)
    listening = socket.create_server(("127.0.0.1", 0))
    server = uvicorn.Server(uvicorn.Config(app, log_level="warning", timeout_graceful_shutdown=1))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]}, daemon=True)
    thread.start()
    while not server.started:
        assert thread.is_alive()
        time.sleep(0.05)
    yield f"http://127.0.0.1:{listening.getsockname()[1]}/"
    server.should_exit = True
    thread.join(30)


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    playwright = pytest.importorskip("playwright.sync_api", reason="needs playwright")
    path = chromium()
    if path is None:
        pytest.skip("needs Chromium: none is installed")
    with playwright.sync_playwright() as one:
        found = one.chromium.launch(executable_path=path, args=["--no-sandbox"])
        yield found
        found.close()


@contextlib.contextmanager
def opened(browser: Any, address: str, width: int, height: int) -> Iterator[Any]:
    """The page, in a window of this size; it must log no error and ask no other machine."""
    context = browser.new_context(viewport={"width": width, "height": height})
    page = context.new_page()
    errors, elsewhere = [], []
    page.on("console", lambda one: one.type == "error" and errors.append(one.text))
    page.on("pageerror", lambda one: errors.append(str(one)))
    page.on("request", lambda one: one.url.startswith("http") and elsewhere.append(one.url))
    page.goto(address)
    page.wait_for_selector("#dc-prompt textarea", timeout=LONG)
    page.wait_for_function("document.querySelector('[aria-label*=\"Steps\"]')?.value == 5")
    yield page
    context.close()
    assert not errors
    assert not [url for url in elsewhere if not url.startswith(address)]


def compare(page: Any) -> None:
    page.fill("#dc-prompt textarea", "red apple <b>&")
    page.click("#dc-start")
    page.wait_for_selector("#dc-numbers .dc-tile", timeout=LONG)
    page.wait_for_selector("#dc-difference img", timeout=LONG)


def fits(page: Any) -> bool:
    sides = page.evaluate("[document.documentElement.scrollWidth, window.innerWidth]")
    return bool(sides[0] <= sides[1])


@pytest.mark.full
@pytest.mark.xdist_group("page")
def test_two_pictures_are_compared_in_a_browser(browser: Any, address: str) -> None:
    with opened(browser, address, 1280, 900) as page:
        compare(page)
        assert re.fullmatch(
            r"\d+\.\d dB|identical", page.inner_text('#dc-numbers [data-name="psnr"] b')
        )
        cells = page.locator(".dc-times td:not(:empty)").all_inner_texts()
        assert len(cells) == 6
        assert all(re.fullmatch(r"\d+ ms|\d+\.\d\d s|\d+\.\d\d×", cell) for cell in cells)
        assert "compiling" not in page.inner_text("#dc-numbers")
        counts = [strip.locator("li").count() for strip in page.locator(".dc-strip").all()]
        assert counts == [STEPS_IN_BROWSER] * 2
        assert "The difference" in page.inner_text("#dc-difference")
        handle = page.locator("#dc-pictures .handle-wrap, #dc-pictures .outer").first
        before = handle.bounding_box()
        page.mouse.move(before["x"] + before["width"] / 2, before["y"] + before["height"] / 2)
        page.mouse.down()
        page.mouse.move(before["x"] + 100, before["y"] + before["height"] / 2, steps=5)
        page.mouse.up()
        assert handle.bounding_box()["x"] > before["x"] + 50
        assert fits(page)


@pytest.mark.full
@pytest.mark.xdist_group("page")
def test_a_refusal_is_shown_in_a_browser(browser: Any, address: str) -> None:
    with opened(browser, address, 1280, 900) as page:
        page.fill("#dc-prompt textarea", "x" * 2001)
        page.click("#dc-start")
        alert = page.wait_for_selector("#dc-status [role=alert]", timeout=LONG)
        assert alert.inner_text() == "prompt: expected at most 2000 characters, got 2001"
        assert "Traceback" not in page.content()


@pytest.mark.full
@pytest.mark.parametrize("width", [320, 375])
def test_the_page_fits_on_a_phone(browser: Any, address: str, width: int) -> None:
    with opened(browser, address, width, 812) as page:
        assert fits(page)
        page.get_by_text("Advanced").click()
        page.wait_for_timeout(300)
        assert fits(page)
        compare(page)
        assert fits(page)
        box = page.locator("#dc-pictures img").first.bounding_box()
        assert box["x"] >= 0
        assert box["x"] + box["width"] <= width
