"""Options that several commands have."""

from __future__ import annotations

from typing import Annotated

import typer

from dcompile import models

MODEL_HELP = (
    f"{', '.join(sorted({models.DEFAULT, 'ddpm'}))} (bundled), the folder of a diffusers pipeline, "
    "or its id on the Hugging Face hub."
)

Model = Annotated[str, typer.Argument(help=MODEL_HELP, show_default=False)]
Prompts = Annotated[
    list[str] | None,
    typer.Option(help="What to draw; repeat for several. Requires a text-to-image model."),
]
Steps = Annotated[int, typer.Option(min=2, help="Denoising steps.")]
Count = Annotated[int, typer.Option(min=1, help="Pictures, in one batch.")]
Size = Annotated[int | None, typer.Option(min=1, help="Pixels per side. Default: the model's own.")]
Guidance = Annotated[
    float | None, typer.Option(help="Guidance scale. Default: what suits the model.")
]
Seed = Annotated[int, typer.Option(help="Seed of the first picture; each further one adds 1.")]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda, ...")]
