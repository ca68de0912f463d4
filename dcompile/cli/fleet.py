"""``dcompile build`` and ``dcompile serve``: programs for a fleet, and servers."""

from __future__ import annotations

import importlib.util
import json
import signal
import tempfile
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from dcompile.cli import options
from dcompile.cli.console import errors_in_one_line, note, quiet_libraries
from dcompile.errors import DcompileError

if TYPE_CHECKING:
    from dcompile.serving.settings import EngineSettings, ServeSettings

Models = Annotated[
    list[str],
    typer.Argument(help=f"{options.MODEL_HELP} Several: the first is the default."),
]
Speedup = Annotated[float | None, typer.Option(help="Fewer FLOPs, so many times. Default: 2.5.")]
Interval = Annotated[
    int | None, typer.Option(help="Instead: refresh every Nth step, as DeepCache does.")
]
Backend = Annotated[str, typer.Option(help="inductor, eager, ...")]
Programs = Annotated[
    str | None,
    typer.Option(help="A folder of dcompile build's, or its address (s3://...)."),
]


def build(
    model: options.Model,
    out: Annotated[str, typer.Option(help="The folder to write, or its address (s3://...).")],
    sizes: Annotated[
        str, typer.Option(help="Sizes in pixels: 512,768x512. Default: the model's own.")
    ] = "",
    batch: Annotated[str, typer.Option(help="Pictures in a batch: 1,4.")] = "1",
    steps: Annotated[
        str, typer.Option(help="Denoising steps; runs of each are watched: 20,30.")
    ] = "20",
    speedup: Speedup = None,
    interval: Interval = None,
    backend: Backend = "inductor",
    device: options.Device = "auto",
    processes: Annotated[
        int, typer.Option(min=0, help="That compile at a time. Default: one per 4 processors.")
    ] = 0,
) -> None:
    """Compile a model's programs ahead, for replicas that start in seconds."""
    with errors_in_one_line(), quiet_libraries():
        _require_packages()
        from dcompile.serving.build import Plan
        from dcompile.serving.build import build as build_all
        from dcompile.serving.fleet import is_address, upload
        from dcompile.serving.settings import EngineSettings

        numbers = _numbers("steps", steps)
        settings = EngineSettings(
            model=model,
            speedup=speedup,
            interval=interval,
            backend=backend,
            device=device,
            steps=numbers[0],
        )
        plan = Plan(settings, _sizes(sizes), _numbers("batch", batch), numbers)
        if is_address(out):
            with tempfile.TemporaryDirectory(prefix="dcompile-") as folder:
                built = build_all(plan, Path(folder), processes=processes, told=note)
                upload(Path(folder), out)
        else:
            built = build_all(plan, Path(out), processes=processes, told=note)
        note(f"wrote {out}")
        if built.failed:
            raise typer.Exit(1)


def serve(
    model: Models,
    programs: Programs = None,
    replicas: Annotated[int, typer.Option(min=1, help="Processes that generate.")] = 1,
    autoscale: Annotated[
        str | None, typer.Option(help="Instead: the least and the most of them, 1:8.")
    ] = None,
    speedup: Speedup = None,
    interval: Interval = None,
    backend: Backend = "inductor",
    device: options.Device = "auto",
    steps: Annotated[int, typer.Option(min=1, help="For requests that do not say.")] = 20,
    lora: Annotated[
        list[str] | None, typer.Option(help="A set of LoRA weights: name=folder; repeat.")
    ] = None,
    compile_components: Annotated[
        bool,
        typer.Option("--compile-components", help="Text encoders and the VAE's decoder, too."),
    ] = False,
    host: Annotated[str, typer.Option(help="Where to answer.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=1, max=65535, help="Where to answer.")] = 8000,
    page: Annotated[bool, typer.Option("--page", help="A page for people, at /page.")] = False,
    choose: Annotated[
        bool, typer.Option("--choose", help="Let requests say how they are cached.")
    ] = False,
    max_pixels: Annotated[int, typer.Option(min=1, help="Of one picture.")] = 1024 * 1024,
    max_steps: Annotated[int, typer.Option(min=1, help="Of one picture.")] = 150,
    max_prompt: Annotated[int, typer.Option(min=1, help="Characters of a prompt.")] = 2000,
    max_images: Annotated[int, typer.Option(min=1, help="Pictures of one request.")] = 4,
    max_queue: Annotated[int, typer.Option(min=1, help="Pictures that wait or are made.")] = 64,
    batch_pixels: Annotated[
        int | None, typer.Option(min=1, help="Most pixels of one batch. Default: no limit.")
    ] = None,
    threads: Annotated[int, typer.Option(min=0, help="Of torch, in each process.")] = 0,
    write_config: Annotated[
        Path | None,
        typer.Option(help="Write a file for ray's serve deploy, and start nothing."),
    ] = None,
) -> None:
    """Serve models over HTTP on Ray: OpenAI's images API, health and metrics."""
    with errors_in_one_line(), quiet_libraries():
        _require_packages(page)
        from dcompile.models.loading import resolve_device
        from dcompile.serving.settings import EngineSettings, Limits, ServeSettings

        if programs is not None and len(model) > 1:
            raise DcompileError("programs are of one model: serve one, or build none ahead")
        loras = dict(_pair(one) for one in lora or ())
        engines = tuple(
            EngineSettings(
                model=name,
                speedup=speedup,
                interval=interval,
                backend=backend,
                device=device,
                steps=steps,
                programs=programs,
                loras=loras,
                components="compile" if compile_components else False,
            )
            for name in model
        )
        settings = ServeSettings(
            engines=engines,
            limits=Limits(max_pixels, max_steps, max_prompt, max_images, max_queue),
            replicas=replicas,
            autoscale=_range(autoscale) if autoscale is not None else None,
            batch_pixels=batch_pixels,
            gpus=1.0 if resolve_device(device).type == "cuda" else 0.0,
            threads=threads,
            chooses_caching=choose,
            page=page,
        )
        _require_models(engines)
        if write_config is not None:
            write_config.write_text(_config(settings.as_dict(), host, port), encoding="utf-8")
            note(f"wrote {write_config}; start it: serve deploy {write_config}")
            return
        _serve(settings, host, port)


def _serve(settings: ServeSettings, host: str, port: int) -> None:
    """Serve until the process is told to end."""
    from dcompile.integrations.serve import start, stop

    names = ", ".join(one.name for one in settings.engines)
    note(f"starting {names} ...")
    start(settings, host, port)
    note(f"ready: http://{host}:{port}{'/page' if settings.page else '/docs'}")
    ended = threading.Event()
    for name in (signal.SIGINT, signal.SIGTERM):  # Ray sets handlers of its own when it starts
        signal.signal(name, lambda *_: ended.set())
    ended.wait()
    note("stopping: what is being made is finished first")
    stop()


def _require_packages(page: bool = False) -> None:
    wanted = {"ray": "serve", "fastapi": "serve", "prometheus_client": "serve"}
    if page:
        wanted["gradio"] = "page"
    for package, extra in wanted.items():
        if importlib.util.find_spec(package) is None:
            raise DcompileError(f'this needs {package}: pip install "dcompile[{extra}]"')


def _require_models(engines: Sequence[EngineSettings]) -> None:
    """Refuse what no replica could load, before a cluster is started."""
    from dcompile.models.loading import locate

    for engine in engines:
        locate(engine.model)


def _sizes(text: str) -> tuple[tuple[int, int], ...]:
    found = []
    for part in filter(None, (one.strip() for one in text.split(","))):
        width, cross, height = part.lower().partition("x")
        sides = (width, height) if cross else (width, width)
        if not all(side.isdecimal() and int(side) > 0 for side in sides):
            raise DcompileError(f"sizes: expected 512 or 768x512 in pixels, got {part!r}")
        found.append((int(sides[0]), int(sides[1])))
    return tuple(dict.fromkeys(found))


def _numbers(name: str, text: str) -> tuple[int, ...]:
    parts = [one.strip() for one in text.split(",")]
    if not all(part.isdecimal() and int(part) > 0 for part in parts):
        raise DcompileError(f"{name}: expected positive numbers with commas, got {text!r}")
    return tuple(dict.fromkeys(int(part) for part in parts))


def _pair(text: str) -> tuple[str, str]:
    name, equals, value = text.partition("=")
    if not (name and equals and value):
        raise DcompileError(f"lora: expected name=folder, got {text!r}")
    return name, value


def _range(text: str) -> tuple[int, int]:
    least, colon, most = text.partition(":")
    if not (least.isdecimal() and colon and most.isdecimal()):
        raise DcompileError(f"autoscale: expected the least and the most, 1:8, got {text!r}")
    return int(least), int(most)


def _config(settings: dict[str, object], host: str, port: int) -> str:
    """For ``serve deploy``: YAML, of which JSON is a part."""
    content = {
        "http_options": {"host": host, "port": port},
        "applications": [
            {
                "name": "dcompile",
                "route_prefix": "/",
                "import_path": "dcompile.integrations.serve:application",
                "args": {"settings": settings},
            }
        ],
    }
    return json.dumps(content, indent=2) + "\n"
