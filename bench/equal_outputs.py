"""Whether pipelines return the same, bit for bit, when each step runs the captured graph.

    python bench/equal_outputs.py    # some twenty minutes on two cores

Every kind of pipeline that the tests build (tests/support: diffusers' U-Nets and transformers with
small components) is run in several ways without dcompile, and again after
``cache_compile(pipe, interval=1, backend="eager")``. A way that a pipeline does not take, or that
fails without dcompile, is left out. Writes bench/results/equal_outputs.json.
"""

from __future__ import annotations

import inspect
import json
import logging
import sys
from collections.abc import Callable, Mapping
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tests/support"))
RESULT = ROOT / "bench/results/equal_outputs.json"
STEPS = 5
console = Console(stderr=True)


def edited(pipe: Any, step: int, t: Any, tensors: dict[str, Any]) -> dict[str, Any]:
    """A callback that changes the latents after each step."""
    return {name: value * 1.01 for name, value in tensors.items()}


# Arguments of the pipeline's call, as far as it has them.
WAYS: dict[str, dict[str, Any]] = {
    "as it is": {},
    "another seed": {"generator": 1},
    "seven steps": {"num_inference_steps": 7},
    "two images of a prompt": {"num_images_per_prompt": 2},
    "two prompts": {"prompt": ["a cat", "a dog on a hill"]},
    "without guidance": {"guidance_scale": 1.0},
    "strong guidance": {"guidance_scale": 9.0},
    "a negative prompt": {"negative_prompt": "blurred"},
    "latents edited by a callback": {"callback_on_step_end": edited},
    "noise at each step": {"eta": 0.7},
    "another size": {"height": 80, "width": 48},
}


def subjects() -> dict[str, Callable[[], tuple[Any, dict[str, Any]]]]:
    """Name -> what builds a pipeline, and the arguments of a run."""
    import every_pipeline
    import transformer_pipelines

    def of_case(case: Any) -> tuple[Any, dict[str, Any]]:
        pipe = case.pipeline()
        torch.manual_seed(1)
        more = case.arguments()
        return pipe, {**({} if "prompt_embeds" in more else {"prompt": "a cat"}), **more}

    found: dict[str, Callable[[], tuple[Any, dict[str, Any]]]] = {}
    for name, case in every_pipeline.CASES.items():
        if not case.several:
            found[name] = lambda case=case: of_case(case)
    for name in transformer_pipelines.PIPELINES:
        found[f"{name} (transformer)"] = lambda name=name: transformer_pipelines.pipeline(name)
    return found


def drawn(pipe: Any, arguments: Mapping[str, Any], way: Mapping[str, Any]) -> torch.Tensor:
    """What one run returns."""
    from every_pipeline import as_tensor

    torch.manual_seed(1)
    given = {
        "num_inference_steps": STEPS,
        "output_type": "latent",
        "return_dict": False,
        **arguments,
        **way,
    }
    given["generator"] = torch.Generator().manual_seed(way.get("generator", 0))
    taken = inspect.signature(pipe.__call__).parameters
    result = pipe(**{name: value for name, value in given.items() if name in taken})
    return as_tensor(result[0])


def compared(name: str) -> dict[str, Any]:
    """One pipeline in all ways, in a process of its own."""
    import dcompile

    torch.set_num_threads(1)
    logging.disable(logging.WARNING)
    pipe, arguments = subjects()[name]()
    taken = inspect.signature(pipe.__call__).parameters
    expected: dict[str, torch.Tensor] = {}
    for way, more in WAYS.items():
        if set(more) <= set(taken):
            try:
                expected[way] = drawn(pipe, arguments, more)
            except Exception:  # the pipeline does not do that
                continue
    dcompile.cache_compile(pipe, interval=1, backend="eager", verbose=False)
    row: dict[str, Any] = {"pipeline": name, "equal": [], "different": [], "uncached": {}}
    for way, own in expected.items():
        before = dcompile.handle(pipe).stats
        try:
            is_equal = torch.equal(drawn(pipe, arguments, WAYS[way]), own)
        except Exception as error:
            row["different"].append(f"{way}: {type(error).__name__}: {error}")
            continue
        after = dcompile.handle(pipe).stats
        row["equal" if is_equal else "different"].append(way)
        if after.uncached_calls > before.uncached_calls:
            row["uncached"][way] = after.uncached_calls - before.uncached_calls
    row["reasons"] = dict(dcompile.handle(pipe).stats.uncached_reasons)
    return row


def main(
    only: Annotated[str, typer.Option(help="Names that contain this.")] = "",
    processes: Annotated[int, typer.Option(help="At a time.")] = 2,
) -> None:
    """Compare all pipelines, or go on where an earlier call stopped."""
    rows: list[dict[str, Any]] = json.loads(RESULT.read_text())["rows"] if RESULT.exists() else []
    known = {row["pipeline"] for row in rows}
    names = [name for name in subjects() if only in name and name not in known]
    with ProcessPoolExecutor(processes) as pool:
        for future in as_completed([pool.submit(compared, name) for name in names]):
            row = future.result()
            rows.append(row)
            about = f"{len(row['equal'])} equal"
            about += f", different: {row['different']}" if row["different"] else ""
            console.print(f"{row['pipeline']}: {about}; uncached {row['uncached']}")
            write(rows)


def write(rows: list[dict[str, Any]]) -> None:
    """The result so far."""
    cached = [len(set(row["equal"]) - set(row["uncached"])) for row in rows]
    summary = {
        "pipelines": len(rows),
        "compared": sum(len(row["equal"]) + len(row["different"]) for row in rows),
        "equal": sum(len(row["equal"]) for row in rows),
        "equal_from_graphs": sum(cached),
    }
    rows.sort(key=lambda row: str(row["pipeline"]))
    RESULT.write_text(json.dumps({"summary": summary, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    typer.run(main)
