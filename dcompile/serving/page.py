"""A page in the browser that compares uncached and cached pictures. Needs gradio.

It asks the server as requests over HTTP do, with the same limits; it may only choose caching.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncGenerator
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import gradio as gr
from fastapi import FastAPI
from fastapi.exceptions import RequestValidationError
from pydantic import ValidationError

from dcompile.serving import comparison
from dcompile.serving.answers import answer_to
from dcompile.serving.comparison import Comparison
from dcompile.serving.messages import CachingField, PlainRequest
from dcompile.serving.worker import Made, Request, Step

if TYPE_CHECKING:
    from dcompile.serving.http import Server

CSS = Path(__file__).with_name("page.css")
DEEPCACHE, SPEEDUP, TUNED = "deepcache", "speedup", "tuned"
_PRESETS = [
    ("DeepCache, N = 3", DEEPCACHE),
    ("Speed-up: choose below", SPEEDUP),
    ("Tuned: this server's own schedule", TUNED),
]
_INTERVAL = 3
_INTRODUCTION = """
<h1>Uncached or cached: can you tell?</h1>
<p>Draws one picture twice from the same seed: as the model runs by itself, and with most steps
reusing features of earlier ones, which is faster. The first picture of a new setting takes longer,
because it compiles; it is then drawn once more, so that the times are without compiling.</p>
"""
_SIDES = '<div class="dc-sides"><span>◀ Uncached</span><span>Cached ▶</span></div>'
_SYSTEM_FONTS = ("system-ui", "sans-serif")
_LIFETIME = 3600  # seconds that pictures stay on disk

Updates = AsyncGenerator[dict[Any, Any], None]


class Asked(NamedTuple):
    """What the controls say, as gradio passes it: not yet checked."""

    model: Any
    prompt: Any
    negative_prompt: Any
    seed: Any
    steps: Any
    width: Any
    height: Any
    guidance: Any
    sampler: Any
    preset: Any
    speedup: Any

    def message(self, about: dict[str, Any], *, off: bool) -> PlainRequest:
        """The request for one of the two pictures.

        Args:
            about: see ``Engine.describe``: what a model does not take is left out.
            off: the uncached one.

        Raises:
            ValidationError: pydantic's, it is no request at all.
        """
        given: dict[str, Any] = {"seed": _whole(self.seed), "steps": _whole(self.steps)}
        given |= {field: getattr(self, field) or "" for field in ("sampler",)}
        for field in ("prompt", "negative_prompt"):
            given[field] = (getattr(self, field) or "") if about[field] else ""
        if about["takes_guidance"]:
            given["guidance"] = self.guidance
        if about["resizes"]:
            given |= {"width": _whole(self.width), "height": _whole(self.height)}
        caching: dict[str, Any] | None = {"off": True}
        if not off:
            choices = {
                DEEPCACHE: {"interval": _INTERVAL},
                SPEEDUP: {"speedup": self.speedup},
            }
            caching = choices.get(self.preset)
        return PlainRequest(
            **given, caching=None if caching is None else CachingField.model_validate(caching)
        )


def _whole(value: Any) -> Any:
    """An int, where JavaScript made a float of one."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


class Controls:
    """The left column.

    Args:
        models: names; with one there is nothing to choose.
        steps: at most so many.
    """

    def __init__(self, models: list[str], steps: int) -> None:
        several = len(models) > 1
        self.model = gr.Dropdown(models, value=models[0], label="Model", visible=several)
        self.prompt = gr.Textbox(label="Prompt", lines=2, max_lines=6, elem_id="dc-prompt")
        self.preset = gr.Radio(_PRESETS, value=SPEEDUP, label="How to cache", elem_id="dc-preset")
        self.speedup = gr.Slider(
            1.5, 5, value=2.5, step=0.1, label="Speed-up: times less computing"
        )
        self.steps = gr.Slider(1, steps, value=min(20, steps), step=1, label="Steps")
        with gr.Row(elem_classes="dc-seed"):
            self.seed = gr.Number(0, label="Seed", precision=0, minimum=0, min_width=120)
            self.dice = gr.Button("🎲 New seed", min_width=120)
        with gr.Accordion("Advanced", open=False):
            self.negative_prompt = gr.Textbox(label="Negative prompt: what not to show")
            self.guidance = gr.Slider(0, 20, value=5, step=0.1, label="Guidance")
            self.sampler = gr.Dropdown([], label="Sampler")
            self.width = gr.Slider(8, 1024, value=512, step=8, label="Width, pixels")
            self.height = gr.Slider(8, 1024, value=512, step=8, label="Height, pixels")
        self.start = gr.Button("Compare", variant="primary", elem_id="dc-start")
        self.stop = gr.Button("Stop", variant="stop", visible=False)
        self.preset.change(
            lambda preset: gr.update(visible=preset == SPEEDUP),
            self.preset,
            self.speedup,
            api_visibility="private",
        )
        # In the browser: nothing needs the server.
        dice = "() => Math.floor(Math.random() * 2 ** 31)"
        self.dice.click(None, None, self.seed, js=dice, api_visibility="private")

    def inputs(self) -> list[Any]:
        """In the order of ``Asked``."""
        return [getattr(self, field) for field in Asked._fields]

    def fitting(self, about: dict[str, Any], pixels: int) -> dict[Any, Any]:
        """Updates for what a model can do.

        Args:
            about: see ``Engine.describe``.
            pixels: at most so many.
        """
        found = {
            self.prompt: gr.update(visible=about["prompt"]),
            self.negative_prompt: gr.update(visible=about["negative_prompt"]),
            self.guidance: gr.update(visible=about["takes_guidance"], value=about["guidance"] or 0),
            self.sampler: gr.update(choices=about["samplers"], value=about["sampler"]),
            self.steps: gr.update(value=about["steps"]),
        }
        multiple = about["multiple"]
        for slider, own in ((self.width, about["width"]), (self.height, about["height"])):
            longest = min(2 * own, pixels // multiple) // multiple * multiple
            found[slider] = gr.update(
                minimum=multiple,
                maximum=max(own, longest),
                step=multiple,
                value=own,
                visible=about["resizes"],
            )
        return found


class Results:
    """The right column."""

    def __init__(self) -> None:
        self.status = gr.HTML(
            '<p class="dc-hint">Type a prompt, and press Compare.</p>', elem_id="dc-status"
        )
        self.first = gr.Image(
            label="Uncached; the cached one is on its way",
            format="png",
            visible=False,
            interactive=False,
            buttons=[],
        )
        with gr.Column(visible=False, elem_id="dc-results") as self.box:
            self.numbers = gr.HTML(elem_id="dc-numbers")
            gr.HTML(_SIDES)
            self.pictures = gr.ImageSlider(
                label="Drag the divider",
                format="png",
                interactive=False,
                buttons=["fullscreen"],
                elem_id="dc-pictures",
            )
            self.strips = gr.HTML(elem_id="dc-strips")
            self.difference = gr.Image(
                label="The difference",
                format="png",
                interactive=False,
                buttons=["fullscreen"],
                alt_text="What differs between the two pictures",
                elem_id="dc-difference",
            )

    def outputs(self) -> list[Any]:
        """All that a comparison updates."""
        return [
            self.status,
            self.first,
            self.box,
            self.numbers,
            self.pictures,
            self.strips,
            self.difference,
        ]

    def begun(self) -> dict[Any, Any]:
        """Updates when nothing is there yet."""
        return {self.first: gr.update(visible=False), self.box: gr.update(visible=False)}

    def shown(self, found: Comparison) -> dict[Any, Any]:
        """Updates when all is there. Takes a while for large pictures."""
        one, other = found.images()
        picture, gain = comparison.difference(one, other)
        label = f"The difference, {gain} times as bright as it is" if gain > 1 else "The difference"
        return {
            self.status: '<p class="dc-hint" role="status">Done.</p>',
            self.first: gr.update(visible=False),
            self.box: gr.update(visible=True),
            self.numbers: comparison.summary(found),
            self.pictures: (comparison.enlarged(one), comparison.enlarged(other)),
            self.strips: comparison.strips(found),
            self.difference: gr.update(value=comparison.enlarged(picture), label=label),
        }


class Page:
    """Answers what is pressed.

    Args:
        server: who generates.
        controls, results: the columns.
    """

    def __init__(self, server: Server, controls: Controls, results: Results) -> None:
        self._server = server
        self._controls = controls
        self._results = results

    async def fit(self, model: Any) -> dict[Any, Any]:
        """Let the controls offer what the model can do."""
        try:
            about = await self._server.about(self._server.name_of(model))
        except Exception as error:
            return {self._results.status: comparison.refusal(_said(error)[1])}
        return self._controls.fitting(about, self._server.limits.pixels)

    async def compare(self, *values: Any) -> Updates:
        """Both pictures and what is known about them; a refusal is a message."""
        began, status = time.perf_counter(), 200
        stop = self._controls.stop
        try:
            async with contextlib.aclosing(self._compared(Asked(*values))) as updates:
                async for update in updates:
                    yield {**update, stop: gr.update(visible=True)}
        except Exception as error:
            status, text = _said(error)
            gr.Warning(escape(text), title="No comparison")
            yield {**self._results.begun(), self._results.status: comparison.refusal(text)}
        yield {stop: gr.update(visible=False)}
        self._server.metrics.answered("/page", status, time.perf_counter() - began)

    async def _compared(self, asked: Asked) -> Updates:
        server, results = self._server, self._results
        name = server.name_of(asked.model)
        about = await server.about(name)

        async def request(asked: Asked, *, off: bool) -> Request:
            message = asked.message(about, off=off)
            (one,) = await server.requests(name, message, chooses_caching=True)
            return one

        # Both are checked before either takes time.
        uncached = await request(asked, off=True)
        cached = await request(asked._replace(seed=uncached.job.seed), off=False)
        yield results.begun()
        made: dict[str, Made] = {}
        runs = [("Uncached", uncached), ("Cached", cached)]
        compiled = False
        while runs:
            title, one = runs.pop(0)
            again = ", once more without compiling" if title in made else ""
            async with contextlib.aclosing(self._run(name, one, title + again)) as events:
                async for event in events:
                    if isinstance(event, Made):
                        made[title] = event
                    else:
                        yield {results.status: event}
            if len(made) == 1:
                picture = comparison.enlarged(comparison.decoded(made[title].content))
                yield {results.first: gr.update(value=picture, visible=True)}
            elif made["Cached"].trace["compile_seconds"] > 0 and not compiled:
                # The uncached one too: what is called for the first time warms up.
                compiled, runs = True, [("Uncached", uncached), ("Cached", cached)]
        caching = cached.job.caching
        aim = caching.value if caching.mode == "speedup" else None
        found = Comparison(made["Uncached"], made["Cached"], aim)
        yield await asyncio.to_thread(results.shown, found)

    async def _run(
        self, name: str, request: Request, title: str
    ) -> AsyncGenerator[str | Made, None]:
        """Progress as HTML, the picture last."""
        yield comparison.progress(title, 0, request.job.steps)
        async with contextlib.aclosing(self._server.events(name, request)) as events:
            async for event in events:
                if isinstance(event, Step):
                    yield comparison.progress(title, event.done, event.steps)
                elif isinstance(event, Made):
                    yield event


def _said(error: Exception) -> tuple[int, str]:
    """Status and message of an error, for people."""
    if isinstance(error, ValidationError):
        error = RequestValidationError(error.errors())
    status, body = answer_to(error)
    return status, str(body["error"]["message"])


def page_of(server: Server) -> gr.Blocks:
    """The page, to be mounted in an application.

    Args:
        server: who generates; its limits hold here, too.
    """
    with gr.Blocks(
        title="dcompile: uncached or cached",
        analytics_enabled=False,
        delete_cache=(_LIFETIME, _LIFETIME),
    ) as blocks:
        gr.HTML(_INTRODUCTION, elem_id="dc-introduction")
        with gr.Row():
            with gr.Column(scale=2, min_width=280):
                controls = Controls(list(server.clients), server.limits.steps)
            with gr.Column(scale=3, min_width=280):
                results = Results()
        page = Page(server, controls, results)
        hidden = {"show_progress": "hidden", "api_visibility": "private"}
        fits = [*controls.inputs(), results.status]
        blocks.load(page.fit, controls.model, fits, **hidden)
        controls.model.change(page.fit, controls.model, fits, **hidden)
        outputs = [*results.outputs(), controls.stop]
        # The server's own queue says how many may wait: gradio's lets all of them through.
        run = controls.start.click(
            page.compare, controls.inputs(), outputs, concurrency_limit=None, **hidden
        )
        controls.stop.click(
            lambda: ('<p class="dc-hint" role="status">Stopped.</p>', gr.update(visible=False)),
            None,
            [results.status, controls.stop],
            cancels=[run],
            **hidden,
        )
    blocks.queue(api_open=False)
    return blocks


def mount(app: FastAPI, server: Server, path: str) -> None:
    """Serve the page.

    Args:
        app: where.
        server: who generates.
        path: such as "/page".
    """
    gr.mount_gradio_app(
        app,
        page_of(server),
        path,
        footer_links=[],
        run_history=False,
        show_error=False,
        ssr_mode=False,
        mcp_server=False,
        enable_monitoring=False,
        theme=gr.themes.Default(font=_SYSTEM_FONTS, font_mono=("ui-monospace", "monospace")),
        css=CSS.read_text(),
    )
