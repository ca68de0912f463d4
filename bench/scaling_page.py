"""The page of bench/scaling.py."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any


def page(data: dict[str, Any]) -> str:
    lines = ["# Past one machine: what a picture costs beside the denoiser, and fleets", ""]
    lines += _flops(data)
    if data["cpu"]:
        lines += _cpu(data)
    lines += _gpu(data) + _fleets(data) + _kinds(data) + _surges(data)
    return "\n".join(lines)


def _table(head: Iterable[str], rows: Iterable[Iterable[object]]) -> list[str]:
    cells = list(head)
    return [
        f"| {' | '.join(cells)} |",
        f"| {' | '.join('---' for _ in cells)} |",
        *(f"| {' | '.join(map(str, row))} |" for row in rows),
        "",
    ]


def _flops(data: dict[str, Any]) -> list[str]:
    lines = [
        "## FLOPs of a picture",
        "",
        "Counted by `torch.utils.flop_counter` on the meta device, with the configurations of the "
        "published models: text encoders on the prompt and on the negative prompt, denoiser with "
        "both halves of guidance, VAE decoder. N=3 and N=5 at depth 0.",
        "",
    ]
    rows = [
        (
            one["title"],
            f"{one['encode'] / 1e12:.3f}",
            f"{one['step'] / 1e12:.3f}",
            f"{one['decode'] / 1e12:.3f}",
            f"{one['decode'] / one['step']:.2f}",
            f"{data['ratios'][name]:.4f}",
        )
        for name, one in data["flops"].items()
    ]
    lines += _table(
        [
            "model",
            "text encoders, TFLOPs",
            "one step",
            "decode",
            "decode in steps",
            "r",
        ],
        rows,
    )
    rows = [
        (
            data["flops"][name]["title"],
            one["steps"],
            "uncached" if one["interval"] == 1 else f"N={one['interval']}",
            f"{one['total'] / 1e12:.1f}",
            f"{one['encode']:.1%}",
            f"{one['denoise']:.1%}",
            f"{one['decode']:.1%}",
        )
        for name, found in data["shares"].items()
        for one in found
    ]
    return lines + _table(
        ["model", "steps", "caching", "TFLOPs", "text encoders", "denoiser", "decode"], rows
    )


def _cpu(data: dict[str, Any]) -> list[str]:
    cpu = data["cpu"]
    rows = [
        (
            name,
            f"{one['seconds']:.2f}",
            f"{one['processor_seconds']:.2f}",
            f"{one['first_seconds']:.1f}",
        )
        for name, one in cpu["parts"].items()
    ]
    return [
        "## Seconds of SD 1.5's parts on a CPU",
        "",
        f"{cpu['machine']}, torch {cpu['torch']}, float32, random weights, {cpu['date']}. The "
        "least of several calls, in turns with the compiled one; processor seconds are those of "
        f"all threads. Other processes were running (load {cpu['load'][0]} at the beginning, "
        f"{cpu['load'][1]} at the end), so that processor seconds are to be "
        "compared. Compiled: "
        "`torch.compile(dynamic=False)`, Inductor without freezing.",
        "",
        *_table(["part", "seconds", "processor seconds", "first call, s"], rows),
    ]


def _gpu(data: dict[str, Any]) -> list[str]:
    rows = [
        (
            data["flops"][name]["title"],
            way,
            f"{one['encode'] * 1000:.1f}",
            f"{one['step'] * 1000:.2f}",
            f"{one['decode'] * 1000:.1f}",
            f"{one['seconds'] * 1000:.0f}",
            f"{one['decode'] / one['seconds']:.0%}",
        )
        for name, ways in data["ways"].items()
        for way, one in ways.items()
    ]
    return [
        f"## A picture on a GPU, {data['steps']} steps",
        "",
        f"Mean steps were measured ({data['gpu']}). **Encode and decode are derived, not "
        "measured**: their FLOPs at the rate of the uncached step, as diffusers runs it, or "
        "compiled in the rows that say so. The decoder launches fewer and larger kernels than "
        "the denoiser, so eager decoding is probably faster than derived; text encoders launch "
        "many small ones, so they are slower. SDXL's own VAE decodes in float32, several times "
        "slower than both.",
        "",
        *_table(
            [
                "model",
                "way",
                "encode, ms",
                "mean step, ms",
                "decode, ms",
                "picture, ms",
                "decode's share",
            ],
            rows,
        ),
    ]


def _fleets(data: dict[str, Any]) -> list[str]:
    fleets = data["fleets"]
    loads = [
        (
            one["replicas"],
            f"{one['load']:.0%}",
            f"{one['utilisation']:.0%}",
            f"{one['p50']:.2f}",
            f"{one['p95']:.2f}",
        )
        for one in fleets
    ]
    rates = [
        (
            data["flops"][name]["title"],
            way,
            *(f"{one['load'] * one['replicas'] / service['seconds']:,.3g}" for one in fleets),
            " / ".join(f"{service['seconds'] * 1000 / one['load']:.0f}" for one in fleets),
        )
        for name, ways in data["ways"].items()
        for way, service in ways.items()
    ]
    return [
        "## Fleets, simulated",
        "",
        "Replicas behind one queue, requests that arrive independently of each other, no batches. "
        "The highest load, at most 95 %, at which 95 % of the pictures are done within twice the "
        "time that one takes. Latencies in pictures' times. What Ray and HTTP add is not part of "
        "it.",
        "",
        *_table(["replicas", "load", "utilisation", "p50", "p95"], loads),
        "At these loads, with the times above:",
        "",
        *_table(
            [
                "model",
                "way",
                *(f"pictures/s, {one['replicas']:,}" for one in fleets),
                "GPU-seconds per 1000 pictures, likewise",
            ],
            rates,
        ),
    ]


def _kinds(data: dict[str, Any]) -> list[str]:
    rows = [
        (
            f"{one['marginal']:.0%}",
            one["kinds"],
            f"{one['batch']:.2f}",
            f"{one['utilisation']:.0%}",
            f"{one['p50'] * 1000:.0f}",
            f"{one['p95'] * 1000:.0f}",
        )
        for one in data["kinds"]
    ]
    return [
        "## Batches by kind, simulated",
        "",
        "Eight replicas, SD 1.5 cached at N=3, as many requests as keep them busy nine tenths of "
        "the time one by one; programs for 1, 2, 4 and 8 pictures, 5 ms to wait for others. Kinds "
        "are equally frequent. What a further picture of a batch costs is a parameter here, not "
        "measured.",
        "",
        *_table(
            [
                "a further picture costs",
                "kinds",
                "mean batch",
                "utilisation",
                "p50, ms",
                "p95, ms",
            ],
            rows,
        ),
    ]


def _surges(data: dict[str, Any]) -> list[str]:
    rows = [
        (
            f"{one['target']:g}",
            f"{one['start']:.0f}",
            one["queue"] or "none",
            f"{one['p50']:.2f}",
            f"{one['p95']:.2f}",
            f"{one['refused']:.1%}",
            one["most_replicas"],
            f"{one['gpu_seconds'] * 1000:.0f}",
        )
        for one in data["surges"]
    ]
    return [
        "## A surge and the autoscaler, simulated",
        "",
        "SD 1.5 cached at N=3, eight replicas at half load; after two minutes four times as many "
        "requests for ten minutes. Ray Serve's rule: requests in the system, averaged over 30 s, "
        "over `target_ongoing_requests`; up after 10 s, down after 300 s; at least 8 replicas and "
        "at most 64. A replica's start takes 12 s (a guess: process and weights) with shipped "
        "programs, and the time to compile (measured, see GPU) in addition without. No batches.",
        "",
        *_table(
            [
                "target",
                "start, s",
                "queue limit",
                "p50, s",
                "p95, s",
                "refused",
                "most replicas",
                "GPU-seconds per 1000 pictures",
            ],
            rows,
        ),
    ]
