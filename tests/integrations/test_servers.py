"""A server around one compiled network: threads and coroutines, each with its own pipeline."""

import asyncio
import copy
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import pytest
import torch
from diffusers import EulerDiscreteScheduler, StableDiffusionPipeline
from small_pipelines import DDIM, run, stable_diffusion

import dcompile

Compatible = Callable[..., dict[str, Any]]
LONG = 60  # seconds: what has not happened by then never will


def cached(pipe: Any, **settings: Any) -> Any:
    """At interval 3, if nothing else is said."""
    return dcompile.cache_compile(pipe, **{"backend": "eager", "verbose": False, **settings})


def beside(pipe: Any, number: int = 0) -> Any:
    """A pipeline of its own, with a scheduler of its own, around the same network.

    And with its own tokenizer: those of transformers mix up prompts of several threads.
    """
    kind = EulerDiscreteScheduler if number % 2 else type(DDIM)
    parts = {
        **pipe.components,
        "scheduler": kind.from_config(DDIM.config),
        "tokenizer": copy.deepcopy(pipe.tokenizer),
    }
    other = StableDiffusionPipeline(**parts, requires_safety_checker=False)
    other.set_progress_bar_config(disable=True)
    return other


class Request(NamedTuple):
    """What a client asks for."""

    number: int

    @property
    def arguments(self) -> dict[str, Any]:
        return {
            "seed": self.number,
            "prompt": "abcdefgh"[self.number],
            "num_inference_steps": 5 + self.number,
            "height": (16, 24)[self.number // 4],
            "width": 16,
        }


REQUESTS = [Request(number) for number in range(8)]
ONE_OF_EACH_KIND = [REQUESTS[number] for number in (0, 1, 4, 5)]  # two sizes, two samplers


def drawn(pipe: Any, request: Request) -> torch.Tensor:
    return run(beside(pipe, request.number), **request.arguments)


@pytest.fixture(scope="module")
def warm() -> Any:
    """Compiled, and every call signature of the requests captured."""
    pipe = cached(stable_diffusion())
    for request in ONE_OF_EACH_KIND:
        drawn(pipe, request)
    return pipe


@pytest.fixture(scope="module")
def alone(warm: Any) -> list[torch.Tensor]:
    """What each request gets when it is the only one."""
    return [drawn(warm, request) for request in REQUESTS]


def at_once(works: Sequence[Callable[[], Any]]) -> list[Any]:
    """The results of functions that begin together, each in a thread of its own."""
    barrier = threading.Barrier(len(works))

    def begin(work: Callable[[], Any]) -> Any:
        barrier.wait(LONG)
        return work()

    with ThreadPoolExecutor(len(works)) as pool:
        return [done.result(LONG) for done in [pool.submit(begin, work) for work in works]]


# Threads ------------------------------------------------------------------------------------------


def test_caching_changes_the_pictures_so_these_tests_can_fail(
    warm: Any, alone: list[torch.Tensor]
) -> None:
    dcompile.handle(warm).disable()
    uncached = [drawn(warm, request) for request in REQUESTS]
    dcompile.handle(warm).enable()
    assert not any(map(torch.equal, uncached, alone))


def test_threads_of_a_server(warm: Any, alone: list[torch.Tensor], compatible: Compatible) -> None:
    compatible("add-on", "Threads around one network")
    cached(warm)
    found = at_once([lambda request=request: drawn(warm, request) for request in REQUESTS])
    assert all(map(torch.equal, found, alone))
    stats = dcompile.handle(warm).stats
    steps = [request.arguments["num_inference_steps"] for request in REQUESTS]
    assert stats.refresh_steps == sum(-(-count // 3) for count in steps)
    assert stats.refresh_steps + stats.reuse_steps == sum(steps)
    assert (stats.runs, stats.captures, stats.uncached_calls) == (8, 0, 0)


@pytest.mark.full
def test_threads_whose_first_calls_fall_together(
    alone: list[torch.Tensor], compatible: Compatible
) -> None:
    compatible("add-on", "Threads around one network")
    pipe = cached(stable_diffusion())
    found = at_once([lambda request=request: drawn(pipe, request) for request in REQUESTS])
    assert all(map(torch.equal, found, alone))
    assert dcompile.handle(pipe).stats.captures == len(ONE_OF_EACH_KIND)


@pytest.mark.parametrize("change", ["reset", "cache_compile", "disable"])
def test_threads_and_changed_settings(
    warm: Any, alone: list[torch.Tensor], change: str, compatible: Compatible
) -> None:
    """Where a setting changes while others run, they refresh more often, and at most so."""
    compatible("add-on", "Threads around one network")
    cached(warm)
    handle = dcompile.handle(warm)
    over = threading.Event()

    def steer() -> int:
        count = 0
        while not over.wait(0.002):
            if change == "reset":
                handle.reset()
            elif change == "cache_compile":
                cached(warm, interval=1 + count % 3)
            else:
                (handle.enable if count % 2 else handle.disable)()
            count += 1
        return count

    def work(request: Request) -> torch.Tensor:
        return drawn(warm, request)

    with ThreadPoolExecutor(9) as pool:
        steering = pool.submit(steer)
        try:
            pictures = [pool.submit(work, request) for request in REQUESTS]
            for picture in pictures:
                assert picture.result(LONG).isfinite().all()
        finally:
            over.set()
        assert steering.result(LONG) > 1
    handle.enable()
    cached(warm)
    for request, expected in zip(REQUESTS, alone, strict=True):
        assert torch.equal(drawn(warm, request), expected)


def test_resets_that_make_every_step_refresh_give_the_uncached_pictures(warm: Any) -> None:
    """A reset before each step of one thread: no other thread's features are taken instead."""
    cached(warm)
    handle = dcompile.handle(warm)

    def reset(pipe: Any, step: int, t: Any, given: dict[str, Any]) -> dict[str, Any]:
        handle.reset()
        return given

    def work(request: Request) -> torch.Tensor:
        return run(beside(warm, request.number), **request.arguments, callback_on_step_end=reset)

    alone = [work(request) for request in REQUESTS[:4]]
    handle.disable()
    uncached = [work(request) for request in REQUESTS[:4]]
    handle.enable()
    assert all(map(torch.equal, alone, uncached))
    cached(warm)


class Blocking:
    """A backend whose graphs wait, in the thread that is told to, until they may go on."""

    def __init__(self) -> None:
        self.inside = threading.Event()
        self.go_on = threading.Event()
        self.waits: int | None = None

    def __call__(self, graph: Any, example: Any) -> Any:
        def compute(*inputs: Any) -> Any:
            if threading.get_ident() == self.waits:
                self.inside.set()
                assert self.go_on.wait(LONG)
            return graph(*inputs)

        return compute


@pytest.mark.full
def test_no_lock_is_held_while_a_step_computes(
    alone: list[torch.Tensor], compatible: Compatible
) -> None:
    compatible("add-on", "Threads around one network")
    backend = Blocking()
    pipe = cached(stable_diffusion(), backend=backend)
    for request in ONE_OF_EACH_KIND:
        drawn(pipe, request)

    def stuck() -> torch.Tensor:
        backend.waits = threading.get_ident()
        return drawn(pipe, REQUESTS[1])

    with ThreadPoolExecutor(2) as pool:
        waiting = pool.submit(stuck)
        try:
            assert backend.inside.wait(LONG)
            for number in (2, 5):  # another request of the same size, and one of another
                picture = pool.submit(drawn, pipe, REQUESTS[number]).result(LONG)
                assert torch.equal(picture, alone[number])
            assert not waiting.done()
        finally:
            backend.go_on.set()
        assert torch.equal(waiting.result(LONG), alone[1])


# Coroutines ---------------------------------------------------------------------------------------


@torch.no_grad()
def denoised(pipe: Any, prompt: str, seed: int, steps: int) -> Iterator[torch.Tensor]:
    """A request's latents after each step."""
    embeds = torch.cat(pipe.encode_prompt(prompt, "cpu", 1, True)[::-1])
    pipe.scheduler.set_timesteps(steps)
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(1, 4, 8, 8, generator=generator) * pipe.scheduler.init_noise_sigma
    for t in pipe.scheduler.timesteps:
        given = pipe.scheduler.scale_model_input(torch.cat([x] * 2), t)
        noise = pipe.unet(given, t, encoder_hidden_states=embeds).sample
        without, with_prompt = noise.chunk(2)
        noise = without + 5.0 * (with_prompt - without)
        x = pipe.scheduler.step(noise, t, x).prev_sample
        yield x


def loop(pipe: Any, number: int) -> Iterator[torch.Tensor]:
    return denoised(beside(pipe, number), "abcdefgh"[number], number, 5 + number)


async def serve(pipe: Any, number: int) -> torch.Tensor:
    for x in loop(pipe, number):  # noqa: B007
        await asyncio.sleep(0)
    return x


def by_itself(pipe: Any, number: int) -> torch.Tensor:
    return list(loop(pipe, number))[-1]


def test_two_pipelines_in_turns(warm: Any, compatible: Compatible) -> None:
    compatible("add-on", "Several pipelines around one network")
    expected = [by_itself(warm, number) for number in (0, 1)]
    assert all(torch.equal(by_itself(warm, n), expected[n]) for n in (1, 0, 0, 1))
    one, two = loop(warm, 0), loop(warm, 1)
    last_two = next(two)  # a step ahead
    for last_one, last_two in zip(one, two, strict=True):  # noqa: B007
        pass
    assert torch.equal(last_one, expected[0])
    assert torch.equal(last_two, expected[1])


def test_coroutines(warm: Any, compatible: Compatible) -> None:
    compatible("add-on", "asyncio, step by step")
    cached(warm)
    expected = [by_itself(warm, number) for number in range(8)]
    dcompile.handle(warm).disable()
    assert not torch.equal(by_itself(warm, 0), expected[0])
    dcompile.handle(warm).enable()

    async def together() -> list[torch.Tensor]:
        return await asyncio.gather(*(serve(warm, number) for number in range(8)))

    assert all(map(torch.equal, asyncio.run(together()), expected))


def test_cancelled_coroutines(warm: Any, compatible: Compatible) -> None:
    compatible("add-on", "asyncio, step by step")
    cached(warm)
    expected = [by_itself(warm, number) for number in range(8)]

    async def some_cancelled() -> list[Any]:
        tasks = [asyncio.create_task(serve(warm, number)) for number in range(8)]
        for task in tasks[1::2]:
            for _ in range(2):
                await asyncio.sleep(0)
            task.cancel()
        late = [asyncio.create_task(serve(warm, number)) for number in range(1, 8, 2)]
        ended = await asyncio.gather(*tasks, return_exceptions=True)
        return [*ended, *await asyncio.gather(*late)]

    found = asyncio.run(some_cancelled())
    for number in range(8):
        if number % 2:
            assert isinstance(found[number], asyncio.CancelledError)
        else:
            assert torch.equal(found[number], expected[number])
    assert all(map(torch.equal, found[8:], expected[1::2]))


class At:
    """Refreshes at these steps, as far as a run goes."""

    def __init__(self, *steps: int) -> None:
        self.steps = steps

    def refresh(self, step: int, steps: int | None) -> bool:
        return step in self.steps


def test_coroutines_and_a_reset(warm: Any, compatible: Compatible) -> None:
    """Each refreshes at its next step and goes on: as if its schedule had said so."""
    compatible("add-on", "asyncio, step by step")
    cached(warm, schedule=At(0, 3, 4, 6))
    expected = [by_itself(warm, number) for number in range(4)]
    cached(warm, interval=3)

    async def and_reset() -> list[torch.Tensor]:
        tasks = [asyncio.create_task(serve(warm, number)) for number in range(4)]
        for _ in range(4):
            await asyncio.sleep(0)
        dcompile.handle(warm).reset()
        return await asyncio.gather(*tasks)

    assert all(map(torch.equal, asyncio.run(and_reset()), expected))


def test_coroutines_and_other_settings(warm: Any, compatible: Compatible) -> None:
    """Runs that are under way begin again with them, at a refresh."""
    compatible("add-on", "asyncio, step by step")
    cached(warm, schedule=At(0, 3, 4, 6))
    expected = [by_itself(warm, number) for number in range(4)]
    cached(warm, interval=3)

    async def and_settings() -> list[torch.Tensor]:
        tasks = [asyncio.create_task(serve(warm, number)) for number in range(4)]
        for _ in range(4):
            await asyncio.sleep(0)
        cached(warm, interval=2)
        return await asyncio.gather(*tasks)

    assert all(map(torch.equal, asyncio.run(and_settings()), expected))
    cached(warm)
