"""What Python does besides computing: found wherever it goes, refused by name, never doubled."""

from __future__ import annotations

import collections
import functools
import gc
import os
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from heard import noticed, silent
from plain import Plain, compiled, picture, plain, sampled, timesteps
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor

import dcompile
from dcompile.compiler.side_effects import Snapshot
from dcompile.errors import CaptureError

STEPS = 7
BANK: list[Any] = []
LATEST: Any = None


@pytest.fixture(autouse=True)
def clean() -> None:
    global LATEST
    BANK.clear()
    LATEST = None
    return


def compiled_like(network: Plain, **settings: Any) -> Plain:
    options: dict[str, Any] = {"interval": 3, "backend": "eager", "verbose": False, **settings}
    return dcompile.cache_compile(network, **options)


# --- side effects, wherever they go -------------------------------------------------------------


class Store:
    """What attention controllers look like: counts and collects."""

    def __init__(self) -> None:
        self.steps = {"deep": [], "up": []}
        self.calls = 0

    def take(self, name: str, value: torch.Tensor) -> None:
        self.steps[name].append(value)
        self.calls += 1


class Slotted:
    __slots__ = ("latest",)

    def __init__(self) -> None:
        self.latest: Any = None


class Shared:
    collected: list[Any] = []  # noqa: RUF012


def into_closure(network: Plain) -> Callable[[], int]:
    feats: list[Any] = []
    network.deep.register_forward_hook(lambda m, i, o: feats.append(o))
    return lambda: len(feats)


def into_dict_two_objects_away(network: Plain) -> Callable[[], int]:
    store = Store()

    class Holder:
        controller = store

    holder = Holder()
    network.deep.holder = holder
    network.deep.register_forward_hook(lambda m, i, o: m.holder.controller.take("deep", o))
    return lambda: len(store.steps["deep"])


def into_global(network: Plain) -> Callable[[], int]:
    network.deep.register_forward_hook(lambda m, i, o: BANK.append(o))
    return lambda: len(BANK)


def into_rebound_global(network: Plain) -> Callable[[], int]:
    count = [0]

    def hook(module: nn.Module, inputs: Any, output: Any) -> None:
        global LATEST
        LATEST = output
        count[0] += 1

    network.deep.register_forward_hook(hook)
    return lambda: count[0]


def into_default(network: Plain) -> Callable[[], int]:
    def hook(m: Any, i: Any, o: Any, kept: list[Any] = []) -> None:  # noqa: B006
        kept.append(o)

    network.deep.register_forward_hook(hook)
    return lambda: len(hook.__defaults__[0])  # type: ignore[index]


def into_own_list(network: Plain) -> Callable[[], int]:
    network.seen = []  # type: ignore[assignment]
    forward = network.deep.forward

    def collecting(x: torch.Tensor) -> torch.Tensor:
        network.seen.append(x.shape)  # type: ignore[operator, union-attr]
        return forward(x)

    network.deep.forward = collecting  # type: ignore[method-assign]
    return lambda: len(network.seen)  # type: ignore[arg-type]


def into_deque_of_partial(network: Plain) -> Callable[[], int]:
    kept: collections.deque[Any] = collections.deque(maxlen=100)

    def keep(where: Any, m: Any, i: Any, o: Any) -> None:
        where.append(o)

    network.deep.register_forward_hook(functools.partial(keep, kept))
    return lambda: len(kept)


def into_class_attribute(network: Plain) -> Callable[[], int]:
    Shared.collected = []
    network.deep.shared = Shared()
    network.deep.register_forward_hook(lambda m, i, o: m.shared.collected.append(o))
    return lambda: len(Shared.collected)


def into_slots(network: Plain) -> Callable[[], int]:
    slotted, count = Slotted(), [0]

    def hook(m: Any, i: Any, o: Any) -> None:
        slotted.latest = o
        count[0] += 1

    network.deep.register_forward_hook(hook)
    return lambda: count[0]


def into_tensor(network: Plain) -> Callable[[], int]:
    total = torch.zeros(())
    network.deep.register_forward_hook(lambda m, i, o: (total.add_(1), None)[1])
    return lambda: int(total)


def into_bound_method(network: Plain) -> Callable[[], int]:
    store = Store()

    class Hook:
        def __call__(self, m: Any, i: Any, o: Any) -> None:
            store.take("up", o)

    network.up.register_forward_pre_hook(lambda m, i: store.take("up", i[0]))
    network.up.register_forward_hook(Hook().__call__)
    return lambda: len(store.steps["up"]) // 2


def into_list_outside_of_traces(network: Plain) -> Callable[[], int]:
    feats: list[Any] = []

    def hook(m: Any, i: Any, o: Any) -> None:
        if not torch.compiler.is_compiling():
            feats.append(o)

    network.deep.register_forward_hook(hook)
    return lambda: len(feats)


COLLECTORS = [
    into_closure,
    into_dict_two_objects_away,
    into_global,
    into_rebound_global,
    into_default,
    into_own_list,
    into_deque_of_partial,
    into_class_attribute,
    into_slots,
    into_tensor,
    into_bound_method,
    into_list_outside_of_traces,
]


@pytest.mark.parametrize("collector", COLLECTORS, ids=lambda f: f.__name__)
def test_a_network_that_collects_runs_uncached_and_collects_once(
    collector: Callable[[Plain], Callable[[], int]],
) -> None:
    expected = sampled(plain(), picture(), timesteps(STEPS))
    network = plain()
    collected = collector(network)
    compiled_like(network)
    assert torch.equal(sampled(network, picture(), timesteps(STEPS)), expected)
    assert collected() == STEPS
    stats = dcompile.handle(network).stats
    assert stats.uncached_calls == STEPS
    (reason,) = stats.uncached_reasons
    assert "every call changes" in reason
    sampled(network, picture(), timesteps(STEPS))
    assert collected() == 2 * STEPS  # and it is not called once more for each run
    assert dcompile.handle(network).stats.captures <= 1


def test_it_is_said_once_and_by_name() -> None:
    network = plain()
    feats: list[Any] = []
    network.deep.register_forward_hook(lambda m, i, o: feats.append(o))
    compiled_like(network)
    with noticed("every call changes 'feats', which .*lambda") as seen:
        sampled(network, picture(), timesteps(STEPS))
        sampled(network, picture(), timesteps(STEPS))
    assert len(seen) == 1


def test_or_raised() -> None:
    network = plain()
    network.deep.register_forward_hook(lambda m, i, o: BANK.append(o))
    compiled_like(network, on_error="raise")
    for _ in range(2):
        with pytest.raises(CaptureError, match="the global 'BANK'"):
            sampled(network, picture(), timesteps(STEPS))


def test_cached_again_when_the_hook_is_gone() -> None:
    network = plain()
    hook = network.deep.register_forward_hook(lambda m, i, o: BANK.append(o))
    compiled_like(network)
    sampled(network, picture(), timesteps(STEPS))
    hook.remove()
    result = sampled(network, picture(), timesteps(STEPS))
    assert torch.equal(result, sampled(compiled(), picture(), timesteps(STEPS)))
    assert len(BANK) == STEPS
    assert dcompile.handle(network).stats.uncached_calls == STEPS


def test_hooks_on_the_whole_network_keep_working() -> None:
    network = compiled_like(plain())
    network.register_forward_hook(lambda m, i, o: BANK.append(o[0]))
    result = sampled(network, picture(), timesteps(STEPS))
    assert len(BANK) == STEPS
    assert torch.equal(result, sampled(compiled(), picture(), timesteps(STEPS)))
    assert dcompile.handle(network).stats.uncached_calls == 0


class Banked(Plain):
    """One call fills a bank, the next one reads it: reference-only attention."""

    def __init__(self) -> None:
        super().__init__()
        self.bank: list[torch.Tensor] = []
        self.write = True

    def forward(self, sample: Any, timestep: Any, condition: Any = None) -> Any:
        if self.write:
            self.bank.append(sample.mean())
            return super().forward(sample, timestep, condition)
        return super().forward(sample + self.bank.pop(), timestep, condition)


def test_a_bank_that_one_call_fills_and_the_next_one_reads() -> None:
    def run(network: Banked) -> torch.Tensor:
        x = picture()
        with torch.no_grad():
            for t in timesteps(STEPS):
                network.write = True
                network(x * 0.5, t)
                network.write = False
                x = x - 0.2 * network(x, t)[0]
        return x

    def made() -> Banked:
        torch.manual_seed(0)
        return Banked().eval()

    expected = run(made())
    network = compiled_like(made())
    assert torch.equal(run(network), expected)
    assert network.bank == []
    assert dcompile.handle(network).stats.uncached_calls == 2 * STEPS


# --- what is no side effect ---------------------------------------------------------------------


def test_what_is_made_once_is_kept_and_cached() -> None:
    class Lazy(Plain):
        tables: dict[int, torch.Tensor] | None = None

        def forward(self, sample: Any, timestep: Any, condition: Any = None) -> Any:
            if self.tables is None:
                self.tables = {}
            size = sample.shape[-1]
            if size not in self.tables:
                self.tables[size] = torch.linspace(0, 0.1, size)
            return super().forward(sample + self.tables[size], timestep, condition)

    torch.manual_seed(0)
    network = compiled_like(Lazy().eval())
    torch.manual_seed(0)
    reference = Lazy().eval()
    for size in ((8, 8), (16, 8)):
        x = picture(size=size)
        got, t = None, timesteps(STEPS)[0]
        with torch.no_grad():
            got = network(x, t)[0]
            assert torch.equal(got, reference(x, t)[0])
    assert type(network.tables[8]) is torch.Tensor  # type: ignore[index]
    assert dcompile.handle(network).stats.uncached_calls == 0


def test_a_counter_is_left_alone() -> None:
    class Counting(Plain):
        calls = 0

        def forward(self, *args: Any, **kwargs: Any) -> Any:
            self.calls += 1
            return super().forward(*args, **kwargs)

        forward.__signature__ = __import__("inspect").signature(Plain.forward)  # type: ignore[attr-defined]

    network = compiled_like(Counting().eval())
    sampled(network, picture(), timesteps(STEPS))
    assert dcompile.handle(network).stats.uncached_calls == 0


# --- capture leaves no trace --------------------------------------------------------------------


@functools.cache
def table(size: int) -> torch.Tensor:
    return torch.linspace(0, 0.1, size)


@functools.lru_cache(maxsize=4)
def bounded_table(size: int) -> torch.Tensor:
    return torch.linspace(0, 0.1, size)


class Tables:
    """A helper object with tables of its own."""

    def __init__(self) -> None:
        self.made: dict[int, torch.Tensor] = {}

    def __call__(self, size: int) -> torch.Tensor:
        if size not in self.made:
            self.made[size] = torch.linspace(0, 0.1, size)
        return self.made[size]


class WithTable(Plain):
    def __init__(self, make: Callable[[int], torch.Tensor]) -> None:
        super().__init__()
        self.make = make

    def forward(self, sample: Any, timestep: Any, condition: Any = None) -> Any:
        return super().forward(sample + self.make(sample.shape[-1]), timestep, condition)


class StaticTables:
    """A cache in a class that nothing but its name leads to."""

    @staticmethod
    @functools.cache
    def table(size: int) -> torch.Tensor:
        return torch.linspace(0, 0.1, size)


def by_name(size: int) -> torch.Tensor:
    found: torch.Tensor = globals()["StaticTables"].table(size)
    return found


def in_a_closure() -> Callable[[int], torch.Tensor]:
    cached = functools.cache(lambda size: torch.linspace(0, 0.1, size))
    return lambda size: cached(size)


@pytest.mark.parametrize("dynamic", [False, True], ids=["fixed", "dynamic"])
@pytest.mark.parametrize(
    "make",
    [table, bounded_table, Tables(), by_name, in_a_closure()],
    ids=["cache", "lru", "object", "by name", "closure"],
)
def test_tables_that_functions_remember_stay_real(make: Any, dynamic: bool) -> None:
    if hasattr(make, "cache_clear"):
        make.cache_clear()
    torch.manual_seed(0)
    network = compiled_like(WithTable(make).eval(), dynamic=dynamic)
    t = timesteps(STEPS)[0]
    for size in ((8, 8), (8, 12), (8, 16)):
        with torch.no_grad():
            network(picture(size=size), t)
        assert type(make(size[-1])) is torch.Tensor
        torch.manual_seed(0)
        never_compiled = WithTable(make).eval()
        with torch.no_grad():
            out = never_compiled(picture(size=size), t)[0]
            assert type(out) is torch.Tensor
            assert torch.equal(network(picture(size=size), t)[0], out)


def test_nothing_is_left_when_a_capture_fails() -> None:
    class Failing(WithTable):
        def forward(self, sample: Any, timestep: Any, condition: Any = None) -> Any:
            result = super().forward(sample, timestep, condition)
            return result if float(result[0].mean()) < 1e9 else None

    table.cache_clear()
    torch.manual_seed(0)
    network = compiled_like(Failing(table).eval())
    sampled(network, picture(), timesteps(STEPS))
    assert type(table(8)) is torch.Tensor
    assert dcompile.handle(network).stats.uncached_calls == STEPS


def noise_of_torch(like: torch.Tensor) -> torch.Tensor:
    return torch.randn_like(like)


def noise_of_python(like: torch.Tensor) -> torch.Tensor:
    return torch.full_like(like, random.random())


def noise_of_numpy(like: torch.Tensor) -> torch.Tensor:
    return torch.full_like(like, float(np.random.random()))


class Noisy(Plain):
    def __init__(self, noise: Callable[[torch.Tensor], torch.Tensor]) -> None:
        torch.manual_seed(0)
        super().__init__()
        self.noise = noise

    def forward(self, sample: Any, timestep: Any, condition: Any = None) -> Any:
        return super().forward(sample + 0.1 * self.noise(sample), timestep, condition)


@pytest.mark.parametrize(
    ("noise", "reason"),
    [
        (noise_of_torch, None),
        (noise_of_python, "Noisy draws Python's random numbers, which would be constants"),
        (noise_of_numpy, "Noisy draws NumPy's random numbers, which would be constants"),
    ],
)
def test_random_numbers_are_drawn_as_ever(noise: Any, reason: str | None) -> None:
    def drawn(network: Any) -> tuple[Any, ...]:
        for seed in (torch.manual_seed, random.seed, np.random.seed):
            seed(5)
        result = sampled(network, picture(), timesteps(STEPS))
        return result, torch.rand(3), random.random(), np.random.random()

    network = compiled_like(Noisy(noise).eval(), interval=1)
    with noticed(reason) if reason else silent():
        found, *following = drawn(network)
    expected, *then_following = drawn(Noisy(noise).eval())
    assert torch.equal(found, expected)
    assert all(np.array_equal(*pair) for pair in zip(following, then_following, strict=True))
    assert dcompile.handle(network).stats.uncached_calls == (STEPS if reason else 0)


@pytest.mark.parametrize("make", [table, bounded_table, Tables()], ids=["cache", "lru", "object"])
def test_no_fake_tensor_is_reachable_afterwards(make: Any) -> None:
    network = compiled_like(WithTable(make).eval())
    sampled(network, picture(), timesteps(STEPS))
    gc.collect()
    mine = [x for x in gc.get_objects() if isinstance(x, FakeTensor)]
    graphs = Snapshot([(network, "network"), (WithTable, "its class")])
    reachable = {id(x) for x in graphs._seen.values()}
    assert len(reachable) > 100
    assert not [x for x in mine if id(x) in reachable]


def test_a_list_that_was_put_out_of_sight_is_restored() -> None:
    class Holder:
        items: Any = None

    holder, items = Holder(), [1]
    holder.items = items
    before = Snapshot([(holder, "holder")])
    holder.items = [1]  # an equal copy, as torch.export leaves it
    items.append(2)
    before.restore(before.changes(before.again()))
    assert holder.items is items
    assert items == [1]


# --- failures belong to their signature ---------------------------------------------------------


def test_a_failure_belongs_to_its_signature() -> None:
    def backend(graph_module: Any, inputs: list[Any]) -> Any:
        if any(isinstance(x, torch.Tensor) and x.shape[:1] == (5,) for x in inputs):
            raise torch.OutOfMemoryError("no memory for five")
        return graph_module

    network = compiled_like(plain(), backend=backend)
    five = torch.cat([picture()] * 3)[:5]
    five = five if five.shape[0] == 5 else picture().repeat(5, 1, 1, 1)[:5]
    expected = sampled(plain(), five, timesteps(STEPS))
    for _ in range(2):
        assert torch.equal(sampled(network, five, timesteps(STEPS)), expected)
    result = sampled(network, picture(), timesteps(STEPS))
    assert torch.equal(result, sampled(compiled(), picture(), timesteps(STEPS)))
    stats = dcompile.handle(network).stats
    assert stats.uncached_calls == 2 * STEPS
    assert list(stats.uncached_reasons) == [
        "backend 'backend' failed on the full graph: OutOfMemoryError: no memory for five"
    ]
    assert stats.reuse_steps == 4


def test_out_of_memory_in_the_first_run_of_a_graph() -> None:
    def backend(graph_module: Any, inputs: list[Any]) -> Any:
        def run(*args: Any) -> Any:
            raise torch.OutOfMemoryError("no memory")

        return run

    network = compiled_like(plain(), backend=backend)
    expected = sampled(plain(), picture(), timesteps(STEPS))
    assert torch.equal(sampled(network, picture(), timesteps(STEPS)), expected)
    assert dcompile.handle(network).stats.uncached_calls == STEPS


def test_a_failure_is_tried_again_after_a_reset() -> None:
    failing = [True]

    def backend(graph_module: Any, inputs: list[Any]) -> Any:
        if failing[0]:
            raise RuntimeError("busy")
        return graph_module

    network = compiled_like(plain(), backend=backend)
    sampled(network, picture(), timesteps(STEPS))
    failing[0] = False
    sampled(network, picture(), timesteps(STEPS))
    assert dcompile.handle(network).stats.reuse_steps == 0
    dcompile.handle(network).reset()
    sampled(network, picture(), timesteps(STEPS))
    assert dcompile.handle(network).stats.reuse_steps == 4


class Printing(Plain):
    """Says what it does, as people have it do while they look for a fault."""

    def __init__(self, file: Any) -> None:
        super().__init__()
        self.file = file

    def forward(self, sample: Any, timestep: Any, condition: Any = None) -> Any:
        print("called", file=self.file, flush=True)
        return super().forward(sample, timestep, condition)


def test_the_process_s_output_is_nobody_s(tmp_path: Path) -> None:
    """Of a server it is a file, which threads and other processes write to at any time."""
    kept = os.dup(2)
    with (tmp_path / "log").open("w") as log:
        os.dup2(log.fileno(), 2)
        try:
            with open(2, "w", closefd=False) as stderr:
                network = compiled(Printing(stderr).eval())
                sampled(network, picture(), timesteps())
        finally:
            os.dup2(kept, 2)
            os.close(kept)
    stats = dcompile.handle(network).stats
    assert stats.uncached_calls == 0
    assert stats.reuse_steps > 0
    assert "called" in (tmp_path / "log").read_text()


def test_a_file_that_a_network_writes_to(tmp_path: Path) -> None:
    with (tmp_path / "results").open("w") as file:
        network = compiled(Printing(file).eval())
        with noticed("does more than compute: every call changes"):
            sampled(network, picture(), timesteps())
        assert dcompile.handle(network).stats.reuse_steps == 0
    assert (tmp_path / "results").read_text().count("called") == len(timesteps())
