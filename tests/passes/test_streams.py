"""Every small transformer is cut along its stream, and each depth computes what it computes."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from cut_case import CutCase
from transformers_small import TRANSFORMERS, small_transformer

from dcompile.passes import ResidualCut, find_cuts, find_skip_connections

# name -> number of cuts, the first skipped block at depth 0, and what each depth caches
EXPECTED = {
    "dit": (3, "transformer_blocks.1", [1, 1, 1]),
    "pixart": (3, "transformer_blocks.1", [1, 1, 1]),
    "sd3": (3, "transformer_blocks.1", [1, 1, 1]),  # its last block drops the text
    "sd35": (3, "transformer_blocks.1", [1, 1, 1]),
    "sd3_controlnet": (3, "transformer_blocks.1", [1, 1, 1]),
    "flux": (5, "transformer_blocks.1", [3, 1, 1, 1, 1]),  # image and text, then both
    "flux_controlnet": (5, "transformer_blocks.1", [3, 1, 1, 1, 1]),
    "flux2": (4, "transformer_blocks.1", [3, 1, 1, 1]),
    "chroma": (4, "transformer_blocks.1", [3, 1, 1, 1]),
    "bria": (5, "transformer_blocks.1", [3, 1, 1, 1, 1]),
    "wan": (3, "blocks.1", [1, 1, 1]),
    "wan_image": (2, "blocks.1", [1, 1]),
    "wan_vace": (2, "blocks.1", [1, 1]),  # up to where it reads the next control
    "skyreels": (3, "blocks.1", [1, 1, 1]),
    "ltx": (3, "transformer_blocks.1", [1, 1, 1]),
    "sana": (3, "transformer_blocks.1", [1, 1, 1]),
    "aura_flow": (4, "joint_transformer_blocks.1", [3, 1, 1, 1]),
    "hunyuan_video": (4, "transformer_blocks.1", [3, 1, 1, 1]),
    "hunyuan_video_image": (3, "transformer_blocks.1", [3, 1, 1]),
    "hunyuan_image": (4, "transformer_blocks.1", [3, 1, 1, 1]),
    "qwen_image": (3, "transformer_blocks.1", [1, 1, 1]),
    "cogvideox": (3, "transformer_blocks.1", [1, 1, 1]),
    "cogview4": (3, "transformer_blocks.1", [1, 1, 1]),
    "mochi": (3, "transformer_blocks.1", [1, 1, 1]),
    "allegro": (3, "transformer_blocks.1", [1, 1, 1]),
    "latte": (5, "temporal_transformer_blocks.0", [1, 1, 1, 1, 1]),  # in space, in time, ...
    "cosmos": (3, "transformer_blocks.1", [1, 1, 1]),
    "stable_audio": (3, "transformer_blocks.1", [1, 1, 1]),
    "z_image": (3, "layers.0", [1, 1, 1]),  # behind its refiner of one block
    "kandinsky5": (3, "visual_transformer_blocks.1", [1, 1, 1]),
    "prx": (3, "blocks.1", [1, 1, 1]),
    "lumina_next": (3, "layers.1", [1, 1, 1]),
    "prior": (3, "transformer_blocks.1", [1, 1, 1]),
}

# Long skips tear the stream of these.
SKIPS = {"hunyuan_dit": 2}

# torch.export cannot follow these: values of tensors decide.
NOT_CAPTURED = {
    # A set of the lengths of the texts.
    "lumina2": "unhashable type: non-nested SymInt|Could not guard on data-dependent",
    "omnigen": "Could not guard on data-dependent expression",  # the largest position
}


def case_of(name: str) -> tuple[CutCase, str]:
    module, kwargs = small_transformer(name)
    case = CutCase(module, **kwargs)
    return case, next(key for key in case.values if key.startswith(("kwargs_hidden", "kwargs_x")))


def test_every_transformer_is_expected_somewhere() -> None:
    assert set(TRANSFORMERS) <= {*EXPECTED, *SKIPS, *NOT_CAPTURED}


@pytest.mark.one_in(5)
@pytest.mark.parametrize("name", [name for name in TRANSFORMERS if name in EXPECTED])
def test_every_depth_of_a_transformer(name: str) -> None:
    torch.manual_seed(0)
    case, sample = case_of(name)
    cuts = find_cuts(case.graph_module, sample)
    assert all(isinstance(cut, ResidualCut) for cut in cuts)
    number, first, cached = EXPECTED[name]
    assert cuts[0].module_path.removeprefix("network.") == first
    assert [len(cut.boundary) for cut in cuts] == cached
    assert len(cuts) == number
    assert all(outer.ratio < inner.ratio < 1 for outer, inner in pairwise(cuts))
    assert all(len(cut.entering) == 1 for cut in cuts)
    case.check(cuts)


@pytest.mark.parametrize("name", [name for name in TRANSFORMERS if name in SKIPS])
def test_transformers_with_long_skips_are_cut_there(name: str) -> None:
    case, sample = case_of(name)
    cuts = find_cuts(case.graph_module, sample)
    assert cuts == find_skip_connections(case.graph_module, sample)
    assert len(cuts) == SKIPS[name]


@pytest.mark.parametrize("name", [name for name in TRANSFORMERS if name in NOT_CAPTURED])
def test_transformers_that_cannot_be_captured(name: str) -> None:
    with pytest.raises(Exception, match=NOT_CAPTURED[name]):
        case_of(name)
