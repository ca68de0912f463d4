"""What a person should know after a run, in a few lines."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

# What to do about a reason, found by how it begins.
_ADVICE = {
    "its timestep is a number or a tensor": "pass views of one tensor, as iterating over "
    "scheduler.timesteps gives them",
    "its conditioning is no tensor": "pass the same tensors at every step instead of new ones",
    "another pass over the same timesteps": "give each run timesteps of its own, such as "
    "scheduler.set_timesteps makes",
}


def summary(name: str, stats: Any, schedule: Sequence[str] = ()) -> str:
    """A few lines of text about the counts of a network.

    Args:
        name: of the network.
        stats: a ``Stats``.
        schedule: what decided, a line for each kind of run.
    """
    cached = stats.refresh_steps + stats.partial_steps + stats.reuse_steps
    lines = [f"{name}: {stats.calls} calls in {_counted(stats.runs, 'run')}"]
    if not stats.calls:
        return f"{name}: not called yet"
    asked = stats.refresh_steps + stats.partial_steps - stats.forced_steps
    text = f"  {stats.refresh_steps} of {cached} steps refreshed"
    if stats.partial_steps:
        text += f", {stats.partial_steps} in part"
    if stats.forced_steps:
        text += f" although the schedule asked for {asked}"
    lines.append(f"{text}; {stats.flops_speedup:.2f}x fewer FLOPs than uncached")
    lines += _reasons(stats.forced_reasons)
    lines += [f"    {line}" for line in schedule]
    if stats.uncached_calls:
        lines.append(f"  {_counted(stats.uncached_calls, 'call')} ran uncached")
        lines += _reasons(stats.uncached_reasons)
    if stats.captures:
        lines.append(
            f"  {_counted(stats.captures, 'capture')}, {stats.compile_seconds:.1f} s with "
            f"compiling; the latest because of this: {stats.last_capture}"
        )
    lines.append(f"  {stats.cache_bytes / 2**20:.1f} MiB cached now")
    return "\n".join(lines)


def _reasons(reasons: Mapping[str, int]) -> list[str]:
    lines = []
    for reason, count in sorted(reasons.items(), key=lambda item: -item[1]):
        lines.append(f"    {'once' if count == 1 else f'{count} times'}: {reason}")
        advice = next((text for start, text in _ADVICE.items() if reason.startswith(start)), None)
        if advice is not None:
            lines.append(f"      {advice}")
    return lines


def _counted(count: int, what: str) -> str:
    return f"{count} {what}" if count == 1 else f"{count} {what}s"
