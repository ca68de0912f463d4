"""Turn the benchmarks' JSON into one Markdown page next to it: python bench/tables.py"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

WAYS = {
    "test_diffusers_eager": "diffusers, eager",
    "test_torch_compile": "torch.compile",
    "test_deepcache_package": "DeepCache package",
    "test_dcompile[eager]": "dcompile, eager",
    "test_dcompile[inductor]": "dcompile, inductor",
}


def verdict(reached: bool) -> str:
    return "reached" if reached else "**missed**"


def steps_table(found: dict[str, dict[str, Any]]) -> list[str]:
    baseline = found["test_diffusers_eager"]["step_seconds"]
    limit = found["test_dcompile[eager]"]["limit"]
    lines = [
        "| way | mean step, s | first | later | speed-up | of the limit | compiling, s |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for name, label in WAYS.items():
        if name not in found:
            continue
        row = found[name]
        speedup = baseline / row["step_seconds"]
        caches = name not in ("test_diffusers_eager", "test_torch_compile")
        lines.append(
            f"| {label} | {row['step_seconds']:.3f} | {row['first_seconds']:.3f} | "
            f"{row['later_seconds']:.3f} | {speedup:.2f}x | "
            + (f"{speedup / limit:.1%} | " if caches else "– | ")
            + (f"{row['compile_seconds']:.1f} |" if "compile_seconds" in row else "– |")
        )
    return lines


def bars_table(found: dict[str, dict[str, Any]]) -> list[str]:
    eager, ours = found["test_diffusers_eager"], found["test_dcompile[eager]"]
    compiled, package = found["test_dcompile[inductor]"], found["test_deepcache_package"]
    speedup = eager["step_seconds"] / ours["step_seconds"]
    over_eager = ours["step_seconds"] / compiled["step_seconds"]
    over_package = package["step_seconds"] / compiled["step_seconds"]
    dispatch = found["test_dispatch_of_a_reuse_step"]
    forecast = found.get("test_forecasts_on_a_reuse_step", {})  # newer than the others
    capture = found["test_capture_and_passes"]
    compiling = found["test_compiling_both_graphs"]
    memory = found["test_resident_memory"]
    capture_ratio = capture["capture_seconds"] / capture["export_seconds"]
    compile_ratio = 1 + compiling["shallow_seconds"] / compiling["full_seconds"]
    share = memory["extra_bytes"] / memory["weight_bytes"]
    limit = ours["limit"]
    rows = [
        (
            f"eager, N=3, of the limit {limit:.2f}x",
            ">= 0.95",
            f"{speedup / limit:.3f}",
            speedup / limit >= 0.95,
        ),
        (
            "the same, of 2.67x (the limit without attention's FLOPs)",
            ">= 0.95",
            f"{speedup / 2.67:.3f}",
            speedup / 2.67 >= 0.95,
        ),
        (
            "inductor over dcompile eager",
            ">= 1.1x",
            f"{over_eager:.3f}x",
            over_eager >= 1.1,
        ),
        (
            "inductor over the DeepCache package",
            "> 1x",
            f"{over_package:.3f}x",
            over_package > 1,
        ),
        (
            f"dispatch of a reuse call, {dispatch['submodules']:,} submodules",
            "<= 60 us",
            f"{dispatch['dispatch_microseconds']:.0f} us",
            dispatch["dispatch_microseconds"] <= 60,
        ),
        (
            "capture + passes over torch.export",
            "<= 1.3x",
            f"{capture_ratio:.2f}x",
            capture_ratio <= 1.3,
        ),
        (
            "compiling both graphs over the full one",
            "<= 1.25x",
            f"{compile_ratio:.2f}x",
            compile_ratio <= 1.25,
        ),
        ("extra resident memory, of the weights", "<= 5 %", f"{share:.1%}", share <= 0.05),
        *(
            (
                f"a reuse step with a {name} forecast over plain reuse, inductor, small SD"
                f"{', ' + forecast['machine'] if 'machine' in forecast else ''}",
                "<= 1.03x",
                f"{forecast[f'{name}_over_reuse']:.3f}x",
                forecast[f"{name}_over_reuse"] <= 1.03,
            )
            for name in ("linear", "taylor")
            if forecast
        ),
    ]
    return ["| what | bar | measured | |", "| --- | --- | --- | --- |"] + [
        f"| {what} | {bar} | {measured} | {verdict(reached)} |"
        for what, bar, measured, reached in rows
    ]


def artifact_page(results: Path) -> None:
    """bench/results/artifact.md, if that benchmark was run."""
    if not (results / "artifact.json").is_file():
        return
    data = json.loads((results / "artifact.json").read_text())
    found = {
        (entry["params"]["size"], entry["params"]["way"]): entry["extra_info"]
        for entry in data["benchmarks"]
    }
    loaded = found["2 64", "load"]
    megabytes = loaded["bytes"] / 1e6
    lines = [
        "# Saved programs: Stable Diffusion 1.5-shaped, Inductor",
        "",
        f"{data['machine_info']['cpu']['brand_raw']}, {loaded['threads']} threads, torch "
        f"{loaded['torch']}, {loaded['parameters'] / 1e6:.0f} M parameters, float32, "
        f"{data['datetime'][:10]}. Each in a process and with a code cache of its own; from the "
        "call of `cache_compile` or `load` to the end of the first reuse step.",
        "",
        "| sample | compiled afresh, s | loaded, s | of these, load(), s | the two steps, s | "
        "ratio |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    ratios = {}
    for size in ("2 64", "1 16"):
        afresh, loaded = found[size, "compile"], found[size, "load"]
        batch, side = size.split()
        ratios[size] = afresh["seconds"] / loaded["seconds"]
        lines.append(
            f"| {batch}×4×{side}×{side} | {afresh['seconds']:.1f} | {loaded['seconds']:.1f} | "
            f"{loaded['load_seconds']:.1f} | {loaded['seconds'] - loaded['load_seconds']:.1f} | "
            f"{ratios[size]:.1f}x |"
        )
    lines += [
        "",
        "| what | bar | measured | |",
        "| --- | --- | --- | --- |",
        f"| loading over compiling afresh, 64×64, the two steps' own time included | >= 20x | "
        f"{ratios['2 64']:.1f}x | {verdict(ratios['2 64'] >= 20)} |",
        f"| the same, 16×16 | >= 20x | {ratios['1 16']:.1f}x | {verdict(ratios['1 16'] >= 20)} |",
        f"| both graphs on disk, no weights | < 20 MB | {megabytes:.1f} MB | "
        f"{verdict(megabytes < 20)} |",
        "",
    ]
    (results / "artifact.md").write_text("\n".join(lines))


def main(results: Annotated[Path, typer.Argument()] = Path("bench/results")) -> None:
    data = json.loads((results / "unet.json").read_text())
    overhead = json.loads((results / "overhead.json").read_text())
    found = {
        entry["name"]: entry["extra_info"]
        for entry in (*data["benchmarks"], *overhead["benchmarks"])
    }
    machine = data["machine_info"]
    any_row = found["test_diffusers_eager"]
    ours = found["test_dcompile[eager]"]
    lines = [
        "# Stable Diffusion 1.5-shaped UNet, one step in three refreshed",
        "",
        f"{machine['cpu']['brand_raw']}, {any_row['threads']} threads, torch {any_row['torch']}, "
        f"float32, random weights, depth 0, {data['datetime'][:10]}. r = {ours['ratio']:.4f} with "
        f"attention's FLOPs counted, so the limit at N={any_row['interval']} is "
        f"{ours['limit']:.2f}x. Inductor: {found['test_dcompile[inductor]']['options']}.",
        "",
        *steps_table(found),
        "",
        "From dispatch on, measured on "
        f"{overhead['machine_info']['cpu']['brand_raw']}, {overhead['datetime'][:10]}.",
        "",
        *bars_table(found),
        "",
    ]
    (results / "unet.md").write_text("\n".join(lines))
    print("\n".join(lines))
    artifact_page(results)


if __name__ == "__main__":
    typer.run(main)
