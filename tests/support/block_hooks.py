"""What caching makes of a transformer's pipeline, by hand: hooks on its blocks."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

STEPS = 7
REFRESHES = 3  # of seven steps, every third


@dataclass(frozen=True)
class Segment:
    """Blocks that are skipped: those of a list from ``first`` on.

    Attributes:
        blocks: the list's name.
        first: the first one that is skipped.
        part: which part of what a block returns is the stream, if not all.
        argument: of a block, the stream.
    """

    blocks: str
    first: int = 1
    part: int | None = None
    argument: str = "hidden_states"


@dataclass(frozen=True)
class Reference:
    """What ``depth=0`` skips, by hand.

    Attributes:
        segments: in order.
        calls: of the network at each step; two where guidance takes two.
    """

    segments: tuple[Segment, ...] = field(default=(Segment("transformer_blocks"),))
    calls: int = 1


PLAIN = Reference()
JOINT = Reference((Segment("transformer_blocks", part=1),))  # behind the text
FLUX = Reference(
    (
        Segment("transformer_blocks", part=1),
        Segment("single_transformer_blocks", first=0, part=1),
    )
)
REFERENCES: dict[str, Reference] = {
    "dit": PLAIN,
    "pixart_alpha": PLAIN,
    "pixart_sigma": PLAIN,
    "sd3": JOINT,
    "sd3_img2img": JOINT,
    "flux": FLUX,
    "flux_img2img": FLUX,
    "flux_inpaint": FLUX,
    "flux_kontext": FLUX,
    "flux_true_guidance": Reference(FLUX.segments, calls=2),
    "sana": PLAIN,
    "ltx": PLAIN,
    "wan": Reference((Segment("blocks"),), calls=2),
    "stable_audio": PLAIN,
    "flux2": Reference(
        (Segment("transformer_blocks", part=1), Segment("single_transformer_blocks", first=0))
    ),
    "chroma": Reference(
        (Segment("transformer_blocks", part=1), Segment("single_transformer_blocks", first=0)),
        calls=2,
    ),
    "aura_flow": Reference(
        (
            Segment("joint_transformer_blocks", part=1),
            Segment("single_transformer_blocks", first=0),
        )
    ),
    "qwen_image": Reference(JOINT.segments, calls=2),
    "hunyuan_video": Reference(
        (
            Segment("transformer_blocks", part=0),
            Segment("single_transformer_blocks", first=0, part=0),
        )
    ),
    "cogvideox": Reference((Segment("transformer_blocks", part=0),)),
    "cogview4": Reference((Segment("transformer_blocks", part=0),), calls=2),
    "allegro": PLAIN,
    "cosmos": Reference(calls=2),
    "kandinsky5": Reference(
        (Segment("visual_transformer_blocks", argument="visual_embed"),), calls=2
    ),
    "prx": Reference((Segment("blocks"),)),
    "z_image": Reference((Segment("layers", first=0, argument="x"),)),
}


@contextmanager
def skipping(network: nn.Module, reference: Reference, interval: int) -> Iterator[None]:
    """Blocks that are skipped add what they added at the latest refresh."""
    calls = -1
    kept: dict[tuple[int, int], Tensor] = {}
    entered: dict[int, Tensor] = {}

    def counting(*_: Any) -> None:
        nonlocal calls
        calls += 1

    def entering(number: int, segment: Segment) -> Callable[..., None]:
        def hook(block: nn.Module, args: Any, kwargs: Any) -> None:
            bound = inspect.signature(block.forward).bind(*args, **kwargs)
            entered[number] = bound.arguments[segment.argument]

        return hook

    def leaving(number: int, segment: Segment) -> Callable[..., Any]:
        def hook(_: nn.Module, args: Any, output: Any) -> Any:
            step, lane = divmod(calls, reference.calls)
            after = output if segment.part is None else output[segment.part]
            if step % interval == 0:
                kept[number, lane] = after - entered[number]
                return output
            replaced = entered[number] + kept[number, lane]
            if segment.part is None:
                return replaced
            return tuple(
                replaced if part == segment.part else item for part, item in enumerate(output)
            )

        return hook

    hooks = [network.register_forward_pre_hook(counting)]
    for number, segment in enumerate(reference.segments):
        blocks = getattr(network, segment.blocks)
        hooks += [
            blocks[segment.first].register_forward_pre_hook(
                entering(number, segment), with_kwargs=True
            ),
            blocks[-1].register_forward_hook(leaving(number, segment)),
        ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def run(pipe: Any, kwargs: dict[str, Any]) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    kwargs = {"output_type": "latent", **kwargs, "generator": generator}
    torch.manual_seed(0)  # some encode a picture without the generator
    result: Tensor = pipe(num_inference_steps=STEPS, **kwargs)[0]
    return result
