"""Options that several commands have."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from dcompile import models

MODEL_HELP = (
    f"{', '.join(sorted({models.DEFAULT, 'ddpm'}))} (bundled), the folder of a diffusers pipeline, "
    "or its id on the Hugging Face hub."
)

Model = Annotated[str, typer.Argument(help=MODEL_HELP, show_default=False)]
ModelOrNetwork = Annotated[
    str, typer.Argument(help=f"{MODEL_HELP} Or a bare network's folder.", show_default=False)
]
Prompts = Annotated[
    list[str] | None,
    typer.Option(help="What to draw; repeat for several. Requires a text-to-image model."),
]
PromptsFile = Annotated[
    Path | None, typer.Option(help="A file with more prompts, one on each line.")
]
Steps = Annotated[int, typer.Option(min=2, help="Denoising steps.")]
Count = Annotated[int, typer.Option(min=1, help="Pictures, in one batch.")]
CountForPrompts = Annotated[
    int | None,
    typer.Option(min=1, help="Pictures, in one batch. Default: one for each prompt."),
]
Size = Annotated[int | None, typer.Option(min=1, help="Pixels per side. Default: the model's own.")]
SizeOfAny = Annotated[
    int | None,
    typer.Option(
        min=1, help="Height and width: of the picture in pixels; of the sample for a bare network."
    ),
]
Guidance = Annotated[
    float | None, typer.Option(help="Guidance scale. Default: what suits the model.")
]
Seed = Annotated[int, typer.Option(help="Seed of the first picture; each further one adds 1.")]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda, ...")]
Intervals = Annotated[
    list[int] | None,
    typer.Option(help="Refresh every Nth step; repeat for several. Default: 2, 3 and 5."),
]
Backends = Annotated[
    list[str] | None,
    typer.Option(
        help="eager, inductor, ...; repeat for several. Default: inductor on CUDA, else eager."
    ),
]
Peers = Annotated[
    list[str] | None,
    typer.Option(
        help="Measure the uncached network under torch.compile, too: torch.compile, "
        "torch.compile:reduce-overhead, ..."
    ),
]
Budget = Annotated[
    float | None,
    typer.Option(min=0, help="Begin no further run after this many seconds. Default: no limit."),
]
Numbers = Annotated[
    Path | None,
    typer.Option("--json", help="Write the numbers to this file, too.", show_default=False),
]
