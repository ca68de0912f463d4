"""What the training scripts share: one loop that can be killed at any point and goes on later."""

from __future__ import annotations

import copy
import math
import os
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn


def replace_file(path: Path, write: Callable[[Path], None]) -> None:
    """Write to a neighbour, then rename: a kill leaves the old file or the new one."""
    partial = path.with_suffix(".partial")
    write(partial)
    os.replace(partial, path)


def read_checkpoint(path: Path, settings: Mapping[str, Any], device: torch.device) -> Any:
    """A checkpoint's content.

    Raises:
        SystemExit: it is damaged, or was made with other settings; says which and what to do.
    """
    try:
        state = torch.load(path, map_location=device, weights_only=True)
        made_with = state["settings"]
    except Exception as error:
        reason = ": ".join([type(error).__name__, *str(error).splitlines()[:1]])
        raise SystemExit(
            f"{path} is damaged ({reason}); delete it to begin this stage again"
        ) from error
    if made_with != dict(settings):
        raise SystemExit(
            f"{path} was made with {made_with}, asked for {dict(settings)}: "
            "delete it or choose another --work folder"
        )
    return state


def learning_rate(step: int, steps: int, peak: float) -> float:
    """Warm up over 200 steps, stay, and go down to zero over the last 40 %."""
    return peak * min(1.0, (step + 1) / 200, (steps - step) / (0.4 * steps))


def save_sheet(pictures: torch.Tensor, path: Path, zoom: int = 1) -> None:
    """Save pictures, shape (n, 3, size, size) in -1..1, as one PNG, about as wide as high."""
    n, _, size, _ = pictures.shape
    columns = math.ceil(math.sqrt(n))
    rows = math.ceil(n / columns)
    sheet = torch.ones(rows * columns, 3, size, size)
    sheet[:n] = pictures.detach().float().cpu().clamp(-1, 1)
    pixels = ((sheet + 1) * 127.5).round().to(torch.uint8)
    pixels = pixels.view(rows, columns, 3, size, size).permute(0, 3, 1, 4, 2)
    image = Image.fromarray(pixels.reshape(rows * size, columns * size, 3).contiguous().numpy())
    image.resize((image.width * zoom, image.height * zoom), Image.Resampling.NEAREST).save(path)


@dataclass
class Stage:
    """One training run.

    Attributes:
        name: its checkpoint, log and sheets are called so.
        models: what is trained; its weights are also averaged (EMA).
        loss: the loss of one step, a scalar; draws its own batch.
        steps: training steps altogether.
        peak: peak learning rate.
        settings: what a checkpoint must have been made with to go on from it.
        sheet: draws pictures with the averaged models, or None.
        average: EMA decay once warmed up.
    """

    name: str
    models: torch.nn.ModuleDict
    loss: Callable[[], torch.Tensor]
    steps: int
    peak: float
    settings: Mapping[str, Any]
    sheet: Callable[[torch.nn.ModuleDict], torch.Tensor] | None = None
    average: float = 0.999

    def run(
        self,
        work: Path,
        *,
        every: int = 200,
        sheet_every: int = 1000,
        deadline: float = math.inf,
    ) -> torch.nn.ModuleDict | None:
        """Train, from the checkpoint in ``work`` if there is one.

        Args:
            work: folder for checkpoints, log and sample sheets.
            every: steps between checkpoints.
            sheet_every: steps between sample sheets.
            deadline: ``time.monotonic()`` after which to write a checkpoint and stop.

        Returns:
            The averaged models, or None where the deadline came first.

        Raises:
            SystemExit: the checkpoint is damaged or was made with other settings.
        """
        work.mkdir(parents=True, exist_ok=True)
        device = next(self.models.parameters()).device
        averaged = copy.deepcopy(self.models).requires_grad_(False).eval()
        optimizer = torch.optim.AdamW(
            self.models.parameters(), lr=self.peak, weight_decay=1e-4, fused=True
        )
        checkpoint = work / f"{self.name}.pt"
        done = 0
        if checkpoint.is_file():
            state = read_checkpoint(checkpoint, self.settings, device)
            self.models.load_state_dict(state["models"])
            averaged.load_state_dict(state["averaged"])
            optimizer.load_state_dict(state["optimizer"])
            done = state["step"]
        torch.manual_seed(done)
        parameters = [list(module.parameters()) for module in (averaged, self.models)]

        progress = Progress(
            TextColumn(f"{self.name}  loss {{task.fields[loss]:.4f}}"),
            BarColumn(),
            TextColumn("{task.completed}/{task.total}"),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            speed_estimate_period=300,
        )
        shown = math.nan
        started = time.monotonic()
        with progress:
            bar = progress.add_task(self.name, total=self.steps, completed=done, loss=math.nan)
            for step in range(done, self.steps):
                for group in optimizer.param_groups:
                    group["lr"] = learning_rate(step, self.steps, self.peak)
                loss = self.loss()
                optimizer.zero_grad()
                loss.backward()
                torch.nn.utils.clip_grad_norm_(self.models.parameters(), 1.0)
                optimizer.step()
                decay = min(self.average, (step + 1) / (step + 10))
                with torch.no_grad():
                    torch._foreach_lerp_(parameters[0], parameters[1], 1 - decay)
                late = time.monotonic() > deadline
                last = step + 1 == self.steps
                if (step + 1) % 10 == 0 or late or last:  # reading a loss waits for the GPU
                    value = float(loss.detach())
                    shown = value if math.isnan(shown) else 0.9 * shown + 0.1 * value
                    progress.update(bar, completed=step + 1, loss=shown)
                if (step + 1) % every == 0 or late or last:
                    state = {
                        "settings": dict(self.settings),
                        "step": step + 1,
                        "models": self.models.state_dict(),
                        "averaged": averaged.state_dict(),
                        "optimizer": optimizer.state_dict(),
                    }
                    replace_file(checkpoint, lambda path, state=state: torch.save(state, path))
                    with (work / f"{self.name}.csv").open("a") as log:
                        log.write(f"{step + 1},{shown:.5f},{time.monotonic() - started:.0f}\n")
                if self.sheet is not None and ((step + 1) % sheet_every == 0 or last):
                    with torch.no_grad():
                        pictures = self.sheet(averaged)
                    save_sheet(pictures, work / f"{self.name}-{step + 1:06d}.png")
                if late and not last:
                    return None
        return averaged
