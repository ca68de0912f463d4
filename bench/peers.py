"""Other projects' ways to cache and compile a transformer, as their documentation says."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch


def cache_dit_masked(network: Any, mask: Sequence[int], **settings: Any) -> None:
    """cache-dit at given steps: one front block, no back block, no threshold.

    Args:
        network: a pipeline or a transformer.
        mask: for each step 1 where everything is computed, 0 where blocks are skipped.
        settings: more of ``DBCacheConfig``.
    """
    import cache_dit

    cache_dit.enable_cache(
        network,
        cache_config=cache_dit.DBCacheConfig(
            Fn_compute_blocks=1,
            Bn_compute_blocks=0,
            max_warmup_steps=0,
            residual_diff_threshold=1e9,
            num_inference_steps=len(mask),
            steps_computation_mask=list(mask),
            steps_computation_policy="static",
            **settings,
        ),
    )


def compile_blocks(network: torch.nn.Module, **options: Any) -> None:
    """As diffusers recommends; where it does not know a network's blocks, all in its lists."""
    if getattr(network, "_repeated_blocks", None):
        network.compile_repeated_blocks(**options)
        return
    for blocks in network.children():
        if isinstance(blocks, torch.nn.ModuleList):
            for block in blocks:
                block.compile(**options)
