"""What self-tuning found, kept for other processes: a file for each network and size.

The folder is ``$DCOMPILE_CACHE_DIR``, else ``dcompile`` in the user's cache folder; an empty
``DCOMPILE_CACHE_DIR`` keeps nothing. A file's name is a digest of all that the result depends on:
the network's structure and code, its weights (a sample of each), the call's shapes and dtypes, the
speed-up, and dcompile's version. It is replaced in one step, so whoever reads finds the old result
or the new one.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import uuid
from collections.abc import Collection, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_leaves

from dcompile.compiler.fingerprint import portable
from dcompile.compiler.structure import Structure
from dcompile.errors import ScheduleError, root_cause
from dcompile.notices import warn
from dcompile.policy import codec
from dcompile.policy.aim import Aim
from dcompile.policy.self_tuned import SelfTuned
from dcompile.storage.cache_folder import cache_folder
from dcompile.storage.folder import sha256_of
from dcompile.version import __version__

# Elements of each weight that its digest is made of, evenly spaced.
_SAMPLED = 64


class TunedCache:
    """The results for one network, called in one way.

    Args:
        module: the network.
        structure: its structure.
        args, kwargs: of a call; their shapes and dtypes count.
        aim: what was asked for.
    """

    def __init__(
        self,
        module: nn.Module,
        structure: Structure,
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any],
        aim: Aim,
    ) -> None:
        self._file: Path | None = None
        self._module, self._aim = module, aim
        self._call = [_described(leaf) for leaf in tree_leaves((args, dict(kwargs)))]
        try:
            folder = cache_folder()
            if folder is not None:
                self._file = folder / self._name(structure)
        except Exception as error:  # no home; weights of other kinds, or without values
            warn(f"autotune: what was found is not kept on disk: {root_cause(error)}")

    def _name(self, structure: Structure) -> str:
        weights = _digest_of_weights(self._module)
        depends_on = [__version__, portable(structure), weights, self._call, list(self._aim)]
        digest = sha256_of(json.dumps(depends_on, sort_keys=True).encode())
        return f"{digest[:40]}.json"

    def read(self, depths: Collection[int]) -> SelfTuned | None:
        """What is known; None for nothing.

        Args:
            depths: at which the network can be cut.
        """
        if self._file is None:
            return None
        try:
            found = _read(self._file)
            if not set(found.cuts) <= set(depths) or found.aim != self._aim:
                raise ValueError("it is of another network")
        except (FileNotFoundError, NotADirectoryError):
            return None
        except (ValueError, TypeError, ScheduleError, RecursionError) as error:
            warn(f"autotune: {self._file} is not used: {root_cause(error)}")
            return None  # and replaced later
        except OSError as error:
            warn(f"autotune: {self._file} is not used: {root_cause(error)}")
            self._file = None
            return None
        return found if found.known else None

    def write(self, schedule: SelfTuned, structure: Structure) -> None:
        """Add what is known now to what is kept; where that fails, one warning.

        Runs that were watched in part only are not kept, nor anything of a network that has changed
        since its file was named.

        Args:
            schedule: what is known.
            structure: of the network as it is now.
        """
        if self._file is None:
            return
        whole = {kind: one for kind, one in schedule.known.items() if one.length == kind.steps}
        if not whole or self._name(structure) != self._file.name:
            return
        with contextlib.suppress(OSError, ValueError, TypeError, ScheduleError, RecursionError):
            kept = _read(self._file)
            if (kept.cuts, kept.forecast) == (schedule.cuts, schedule.forecast):
                whole = {**kept.known, **whole}
        temporary = self._file.with_name(f"{self._file.stem}.{uuid.uuid4().hex[:8]}.tmp")
        try:
            self._file.parent.mkdir(parents=True, exist_ok=True)
            temporary.write_text(json.dumps(codec.to_json(replace(schedule, known=whole))))
            os.replace(temporary, self._file)
        except OSError as error:
            warn(f"autotune: what was found is not kept on disk: {root_cause(error)}")
            self._file = None
            with contextlib.suppress(OSError):
                temporary.unlink(missing_ok=True)


def _read(file: Path) -> SelfTuned:
    found = codec.from_json(json.loads(file.read_bytes()))
    if not isinstance(found, SelfTuned):
        raise ValueError("it is another schedule")
    return found


def _digest_of_weights(module: nn.Module) -> str:
    """Of a sample of each parameter and buffer."""
    digest = hashlib.sha256()
    sampled: dict[torch.device, list[torch.Tensor]] = {}
    for name, tensor in [*module.named_parameters(), *module.named_buffers()]:
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        flat = tensor.detach().reshape(-1)
        values = flat[:: max(1, flat.numel() // _SAMPLED)]
        values = torch.view_as_real(values).reshape(-1) if values.is_complex() else values
        values = values.to(torch.float32, copy=True)  # a view would keep a channels-last copy alive
        sampled.setdefault(tensor.device, []).append(values)
    for values in map(torch.cat, sampled.values()):
        digest.update(values.cpu().numpy().tobytes())
    return digest.hexdigest()


def _described(leaf: Any) -> Any:
    if isinstance(leaf, torch.Tensor):
        return [*leaf.shape, str(leaf.dtype), leaf.device.type]
    return type(leaf).__name__


__all__ = ["TunedCache"]
