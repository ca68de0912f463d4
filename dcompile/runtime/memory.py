"""How much memory is free, as far as the system says."""

from __future__ import annotations

import sys
from pathlib import Path

import torch

_MEMINFO = Path("/proc/meminfo")


def available_bytes(device: torch.device) -> int:
    """Bytes that can still be allocated on a device; very many where that is not known."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return free + cached
    if device.type == "cpu":
        try:
            for line in _MEMINFO.read_text().splitlines():
                if line.startswith("MemAvailable:"):
                    return int(line.split()[1]) * 1024
        except (OSError, ValueError, IndexError):  # another system
            pass
    return sys.maxsize
