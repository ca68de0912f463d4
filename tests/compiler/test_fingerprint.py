"""What counts as a change of the module's structure, and what does not."""

import json
import os
import subprocess
import sys
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from heard import noticed
from plain import Plain, picture, plain, timesteps
from torch import nn

import dcompile
from dcompile.compiler.fingerprint import changed_by_running, difference, portable
from dcompile.compiler.structure import code_of, structure_of


def set_attribute(module: Plain) -> None:
    module.up.scale = 0.5  # type: ignore[assignment]


def set_nested(module: Plain) -> None:
    module.up.scaling = {"default": 1.0}  # type: ignore[assignment]
    module.up.scaling["default"] = 2.0


def set_object(module: Plain) -> None:
    module.up.processor = SimpleNamespace(heads=4)  # type: ignore[assignment]


def replace_layer(module: Plain) -> None:
    module.up = nn.Sequential(module.up)  # type: ignore[assignment]


def add_hook(module: Plain) -> None:
    module.up.register_forward_hook(lambda *_: None)


def patch_forward(module: Plain) -> None:
    own = module.up.forward
    module.up.forward = lambda x: own(x)  # type: ignore[method-assign]


def change_tensor(module: Plain) -> None:
    module.up.table = SimpleNamespace(values=torch.ones(3))  # type: ignore[assignment]


def patched(scale: float) -> object:
    return lambda x: x * scale


def test_what_a_patched_forward_holds_counts() -> None:
    module = plain()
    structures = []
    for make in (patched, lambda scale: partial(torch.mul, other=scale)):
        for scale in (1.0, 5.0, 1.0):
            module.up.forward = make(scale)  # type: ignore[method-assign, assignment]
            structures.append(structure_of(module))
    assert structures[0] == structures[2] != structures[1]
    assert structures[3] == structures[5] != structures[4]


def test_untying_weights_counts() -> None:
    module = plain()
    module.up.bias = module.enter.bias
    before = structure_of(module)
    module.up.bias = nn.Parameter(module.enter.bias.detach().clone())
    assert structure_of(module) != before


@pytest.mark.parametrize(
    "change",
    [set_attribute, set_nested, set_object, replace_layer, add_hook, patch_forward, change_tensor],
)
def test_changes_that_count(change: object) -> None:
    module = plain()
    before = structure_of(module)
    assert structure_of(module) == before
    change(module)  # type: ignore[operator]
    after = structure_of(module)
    assert after != before
    assert "up" in difference(before, after)


def test_weights_do_not_count_but_their_shapes_do() -> None:
    module = plain()
    before = structure_of(module)
    with torch.no_grad():
        module.up.weight.mul_(2)
    module.up.bias = nn.Parameter(torch.zeros(8))
    assert structure_of(module) == before
    module.up.bias = None
    assert structure_of(module) != before


def test_what_forward_itself_writes_is_no_change() -> None:
    class Counting(Plain):
        calls = 0

        def forward(self, sample: torch.Tensor, timestep: torch.Tensor) -> object:  # type: ignore[override]
            self.calls = self.calls + 1
            return super().forward(sample, timestep)

    network = dcompile.cache_compile(Counting().eval(), backend="eager", verbose=False)
    with torch.no_grad():
        for _ in range(3):
            network(picture(), timesteps()[0])
    assert dcompile.handle(network).stats.captures == 1
    before = structure_of(network)
    network.calls = 7
    written = changed_by_running(before, structure_of(network))
    assert written == {":calls:"}
    assert structure_of(network, written) != before
    assert "calls" not in structure_of(network, written)[""]


class Processor:
    def __init__(self, scale: float) -> None:
        self.scale = scale
        self.calls = 0
        self.seen = 0

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        self.seen = self.seen + x.shape[0]
        return x * self.scale


class LouderProcessor(Processor): ...


class Processed(Plain):
    processor = Processor(1.0)

    def forward(self, sample: torch.Tensor, timestep: torch.Tensor) -> object:  # type: ignore[override]
        return super().forward(self.processor(sample), timestep)


@pytest.mark.parametrize("other", [Processor(3.0), LouderProcessor(1.0)])
def test_a_counter_hides_nothing_else_of_its_object(other: Processor) -> None:
    network, reference = Processed().eval(), Processed().eval()
    network.load_state_dict(reference.state_dict())
    network.processor = Processor(1.0)
    dcompile.cache_compile(network, backend="eager", verbose=False)
    handle = dcompile.handle(network)
    with torch.no_grad():
        for _ in range(3):
            network(picture(), timesteps()[0])
        assert handle.stats.captures == 1
        network.processor = reference.processor = other
        x, t = picture(), timesteps()[0]
        assert torch.equal(network(x, t)[0], reference(x, t)[0])  # type: ignore[index]
    assert handle.stats.captures == 2


def test_sets_are_described_by_what_is_in_them() -> None:
    module = plain()

    def described(*members: object) -> tuple[object, object]:
        module.up.members = set(members)  # type: ignore[assignment]
        structure = structure_of(module)
        return structure, portable(structure)

    one, other = described(Processor(1.0)), described(Processor(1.0))
    assert one == other
    assert "0x" not in str(one[1])
    assert described(Processor(2.0))[0] != one[0]
    assert described("a", "b")[1] == described("b", "a")[1] != described("a")[1]


def test_an_attribute_that_becomes_a_submodule_is_named() -> None:
    module = plain()
    module.up.extra = None  # type: ignore[assignment]
    before = structure_of(module)
    del module.up.extra
    module.up.extra = nn.Conv2d(1, 1, 1)
    assert "up" in difference(before, structure_of(module))


def test_hooks_around_the_whole_network_do_not_count() -> None:
    module = plain()
    before = structure_of(module)
    module.register_forward_hook(lambda *_: None)
    assert structure_of(module) == before


def test_what_offload_hooks_hold_is_not_read() -> None:
    from accelerate.utils.offload import PrefixedDataset

    module = plain()
    module.up.weights = SimpleNamespace(map=PrefixedDataset({"a.b": 1}, "c."), ops=torch.ops)
    assert structure_of(module) == structure_of(module)


class Switched(Plain):
    """A part of it can be switched off, as GLIGEN's is in the midst of a run."""

    def __init__(self) -> None:
        super().__init__()
        self.deep.doubled = True  # type: ignore[assignment]
        self.deep.register_forward_hook(lambda module, _, y: y * 2 if module.doubled else y)


def test_a_switch_flipped_in_the_midst_of_a_run_is_seen_at_the_next_refresh() -> None:
    torch.manual_seed(0)
    network, reference = Switched().eval(), Switched().eval()
    reference.load_state_dict(network.state_dict())
    dcompile.cache_compile(network, interval=2, backend="eager", verbose=False)
    ts = timesteps(6)
    with torch.no_grad():
        for step, t in enumerate(ts):
            if step == 3:
                network.deep.doubled = reference.deep.doubled = False  # type: ignore[assignment]
            found, expected = network(picture(step), t)[0], reference(picture(step), t)[0]
            assert torch.equal(found, expected) == (step in (0, 2, 4))
    stats = dcompile.handle(network).stats
    assert (stats.refresh_steps, stats.reuse_steps, stats.captures) == (3, 3, 2)


class Leaving(Plain):
    """Leaves what it computed where somebody else will look for it."""

    def __init__(self) -> None:
        super().__init__()
        self.kept = SimpleNamespace(before=torch.zeros(1))

    def forward(self, sample: torch.Tensor, timestep: torch.Tensor) -> tuple[torch.Tensor]:  # type: ignore[override]
        result = super().forward(sample, timestep)[0]  # type: ignore[index]
        self.kept.map, self.kept.before = result * 2, result * 3
        return (result,)


def test_a_tensor_left_for_others_is_refused_and_nothing_of_the_capture_stays() -> None:
    network = Leaving().eval()
    before = network.kept.before
    dcompile.cache_compile(network, backend="eager", verbose=False)
    with torch.no_grad(), noticed(r"every call changes Leaving\.kept\.(map|before)"):
        network(picture(), timesteps()[0])
    assert torch.equal(network.kept.before, network.kept.map * 1.5)  # its own forward has run
    assert type(network.kept.before) is type(before)


def test_training_mode_that_makes_no_difference_is_inference() -> None:
    network = plain().train()
    network.deep[1].p = 0.0
    dcompile.cache_compile(network, interval=3, backend="eager", verbose=False)
    ts = timesteps(6)
    with torch.no_grad():
        for t in ts:
            network(picture(), t)
    stats = dcompile.handle(network).stats
    assert (stats.refresh_steps, stats.reuse_steps, stats.uncached_calls) == (2, 4, 0)
    with noticed("training mode"):
        assert network(picture(), ts[0])[0].requires_grad


# The same in every process -----------------------------------------------------------------------


def test_the_order_of_a_set_in_code_means_nothing() -> None:
    def member(name: str) -> bool:
        return name in {"a", "b"}

    one, other = frozenset((0, 8)), frozenset((8, 0))
    assert list(one) != list(other), "these sets have one order"
    codes = [
        code_of(member.__code__.replace(co_consts=(None, held, (held, 1)))) for held in (one, other)
    ]
    assert codes[0] == codes[1]
    assert codes[0] != code_of(member.__code__.replace(co_consts=(None, frozenset((0, 9)), 1)))


SCRIPT = """
import hashlib, json, sys
sys.path.append(sys.argv[1])
from networks import NETWORKS
from transformers_small import TRANSFORMERS, small_transformer
from dcompile.compiler.fingerprint import portable
from dcompile.compiler.structure import structure_of
modules = [(name, network.module()) for name, network in NETWORKS.items()]
modules += [(name, small_transformer(name)[0]) for name in TRANSFORMERS]
described = {
    name: hashlib.sha256(json.dumps(portable(structure_of(module))).encode()).hexdigest()
    for name, module in modules
}
print(json.dumps(described))
"""


@pytest.mark.full
def test_every_network_is_described_alike_in_every_process() -> None:
    support = str(Path(__file__).parents[1] / "support")
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", SCRIPT, support],
            stdout=subprocess.PIPE,
            env={**environment, "PYTHONHASHSEED": seed},
        )
        for seed in ("1", "2")
    ]
    one, other = (json.loads(process.communicate()[0].splitlines()[-1]) for process in processes)
    assert len(one) > 40
    assert [name for name in one if one[name] != other[name]] == []
