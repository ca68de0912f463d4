"""What self-tuning found, kept for other processes: a file for each network and size.

The folder is ``$DCOMPILE_CACHE_DIR``, else ``dcompile`` in the user's cache folder; an empty
``DCOMPILE_CACHE_DIR`` keeps nothing. A file's name is a digest of all that the result depends on:
the network's structure and code, its weights (a sample of each), the call's shapes and dtypes, the
speed-up, and dcompile's version. It is replaced in one step, so whoever reads finds the old result
or the new one.
"""

from __future__ import annotations

import hashlib
import json
import os
import uuid
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_leaves

from dcompile.compiler.fingerprint import portable
from dcompile.compiler.structure import Structure
from dcompile.errors import ScheduleError
from dcompile.notices import logger, warn
from dcompile.policy import codec
from dcompile.policy.self_tuned import SelfTuned
from dcompile.version import __version__

_VARIABLE = "DCOMPILE_CACHE_DIR"
# Elements of each weight that its digest is made of, evenly spaced.
_SAMPLED = 64


class TunedCache:
    """The results for one network, called in one way.

    Args:
        module: the network.
        structure: its structure.
        args, kwargs: of a call; their shapes and dtypes count.
        speedup: that was asked for.
    """

    def __init__(
        self,
        module: nn.Module,
        structure: Structure,
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any],
        speedup: float,
    ) -> None:
        self._file: Path | None = None
        folder = _folder()
        if folder is None:
            return
        try:
            weights = _digest_of_weights(module)
        except (RuntimeError, TypeError, NotImplementedError) as error:  # no plain tensors
            logger.debug("dcompile: autotune: nothing is kept on disk: %s", error)
            return
        call = [_described(leaf) for leaf in tree_leaves((args, dict(kwargs)))]
        depends_on = [__version__, portable(structure), weights, call, speedup]
        digest = hashlib.sha256(json.dumps(depends_on, sort_keys=True).encode()).hexdigest()
        self._file = folder / f"{digest[:40]}.json"

    def read(self, depths: Collection[int]) -> SelfTuned | None:
        """What is known; None for nothing.

        Args:
            depths: at which the network can be cut.
        """
        if self._file is None:
            return None
        try:
            found = codec.from_json(json.loads(self._file.read_bytes()))
            if not isinstance(found, SelfTuned) or not set(found.cuts) <= set(depths):
                raise ValueError("it is of another network")
        except (FileNotFoundError, NotADirectoryError):
            return None
        except (ValueError, TypeError, ScheduleError, RecursionError) as error:
            warn(f"autotune: {self._file} is not used: {_reason(error)}")
            return None  # and replaced later
        except OSError as error:
            warn(f"autotune: {self._file} is not used: {_reason(error)}")
            self._file = None
            return None
        return found if found.known else None

    def write(self, schedule: SelfTuned) -> None:
        """Keep what is known now, instead of what was kept; where that fails, one warning."""
        if self._file is None:
            return
        temporary = self._file.with_name(f"{self._file.stem}.{uuid.uuid4().hex[:8]}.tmp")
        try:
            self._file.parent.mkdir(parents=True, exist_ok=True)
            temporary.write_text(json.dumps(codec.to_json(schedule)))
            os.replace(temporary, self._file)
        except OSError as error:
            warn(f"autotune: what was found is not kept on disk: {_reason(error)}")
            self._file = None


def _folder() -> Path | None:
    asked = os.environ.get(_VARIABLE)
    if asked is not None:
        return Path(asked).expanduser() if asked.strip() else None
    base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(base).expanduser() / "dcompile"


def _digest_of_weights(module: nn.Module) -> str:
    """Of a sample of each parameter and buffer."""
    digest = hashlib.sha256()
    sampled: dict[torch.device, list[torch.Tensor]] = {}
    for name, tensor in [*module.named_parameters(), *module.named_buffers()]:
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        flat = tensor.detach().reshape(-1)
        values = flat[:: max(1, flat.numel() // _SAMPLED)]
        values = torch.view_as_real(values).reshape(-1) if values.is_complex() else values
        sampled.setdefault(tensor.device, []).append(values.float())
    for values in map(torch.cat, sampled.values()):
        digest.update(values.cpu().numpy().tobytes())
    return digest.hexdigest()


def _described(leaf: Any) -> Any:
    if isinstance(leaf, torch.Tensor):
        return [*leaf.shape, str(leaf.dtype), leaf.device.type]
    return type(leaf).__name__


def _reason(error: BaseException) -> str:
    return f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else 'no message'}"


__all__ = ["TunedCache"]
