"""Step tracking as a table: which calls may reuse which cache. No network involved."""

import gc
from collections.abc import Iterable

import pytest
import torch

from dcompile.runtime import lanes
from dcompile.runtime.by_value import MAX_VALUE_TRACKS
from dcompile.runtime.lanes import Lane
from dcompile.runtime.tracking import StepTracker

NOTHING: list[torch.Tensor] = []


def call(
    tracker: StepTracker,
    timestep: object,
    label: str = "",
    conditioning: list[torch.Tensor] = NOTHING,
) -> str:
    """Enter a step; return whose cache the call gets ('' if none) and cache ``label``."""
    _, lane, step = tracker.enter(timestep, conditioning)
    found = "".join(lane.cached)
    lane.cached, lane.refreshed = (label,), ((step,),)
    return found


def cached_by(tracker: StepTracker, timesteps: Iterable[object], label: str) -> list[str]:
    return [call(tracker, t, label) for t in timesteps]


def timesteps(count: int = 6) -> torch.Tensor:
    return torch.arange(count * 10, 0, -10)


def test_a_run_finds_its_own_cache_and_counts_from_zero() -> None:
    tracker = StepTracker()
    ts = timesteps(4)
    entered = [tracker.enter(t, NOTHING) for t in ts]
    assert [step for _, _, step in entered] == [0, 1, 2, 3]
    assert len({id(lane) for _, lane, _ in entered}) == 1
    assert entered[0][0].steps == 4
    assert tracker.runs == 1


def test_repeated_values_are_different_steps() -> None:
    ts = torch.tensor([30, 20, 20, 10, 10])  # Heun
    assert [StepTracker().enter(t, NOTHING)[2] for t in ts] == [0] * 5
    tracker = StepTracker()
    assert [tracker.enter(t, NOTHING)[2] for t in ts] == [0, 1, 2, 3, 4]


def test_the_value_of_a_view_is_never_read() -> None:
    ts = torch.empty(4, device="meta")  # reading would raise
    tracker = StepTracker()
    assert [tracker.enter(t, NOTHING)[2] for t in ts] == [0, 1, 2, 3]
    assert tracker.enter(torch.empty(4, device="meta")[2].expand(3), NOTHING)[2] == 0


def test_expanded_timesteps_are_still_views() -> None:
    tracker = StepTracker()
    assert [tracker.enter(t.expand(8), NOTHING)[2] for t in timesteps(3)] == [0, 1, 2]


def test_a_later_start_counts_from_its_own_first_step() -> None:
    tracker = StepTracker()
    ts = timesteps(6)
    assert [tracker.enter(t, NOTHING)[2] for t in ts[2:]] == [0, 1, 2, 3]
    assert tracker.enter(timesteps(6)[4], NOTHING)[0].steps == 2


def test_a_new_run_starts_empty_whatever_the_last_one_left() -> None:
    tracker = StepTracker()
    cached_by(tracker, timesteps(6)[:4], "old")  # interrupted
    assert cached_by(tracker, timesteps(6), "new") == ["", "new", "new", "new", "new", "new"]


def test_the_cache_dies_with_the_timesteps() -> None:
    tracker = StepTracker()
    ts = timesteps()
    cached_by(tracker, ts, "x")
    assert [lane.cached for lane in tracker.lanes()] == [("x",)]
    del ts
    gc.collect()
    assert tracker.lanes() == []


@pytest.mark.parametrize("done", [1, 2, 5, 6])
def test_another_pass_over_the_same_timesteps_never_reuses_the_first(done: int) -> None:
    tracker = StepTracker()
    ts = timesteps(6)
    cached_by(tracker, ts[:done], "first")
    again = cached_by(tracker, ts, "second")
    assert "first" not in again
    assert "second" in again


def test_interleaved_runs_with_their_own_timesteps() -> None:
    tracker = StepTracker()
    one, two = timesteps(), timesteps()
    found = [(call(tracker, a, "a"), call(tracker, b, "b")) for a, b in zip(one, two, strict=True)]
    assert found == [("", "")] + [("a", "b")] * 5


PATTERNS = [
    "abababababab",
    "aabbaabbaabb",
    "aaabbbaaabbb",
    "abbaabbaabba",
    "aababbababab",
    "abbbaaaabbab",
]


@pytest.mark.parametrize("pattern", PATTERNS)
def test_interleaved_runs_over_shared_timesteps_never_mix(pattern: str) -> None:
    tracker = StepTracker()
    ts = timesteps()
    runs = {"a": iter(ts), "b": iter(ts)}
    for who in pattern:
        assert call(tracker, next(runs[who]), who) in ("", who)


@pytest.mark.parametrize("start", [0, 3])
def test_every_interleaving_of_two_shared_runs(start: int) -> None:
    import itertools

    ts = timesteps(4)
    for order in set(itertools.permutations("aaaabbbb"[: 8 - start])):
        tracker = StepTracker()
        runs = {"a": iter(ts), "b": iter(ts)}
        found = [call(tracker, next(runs[who]), who) for who in order]
        assert all(cache in ("", who) for cache, who in zip(found, order, strict=True)), order


@pytest.mark.parametrize("count", [4, 5])
def test_every_interleaving_of_two_runs_identified_by_value(count: int) -> None:
    from itertools import combinations

    values = timesteps(count).tolist()
    for places in combinations(range(2 * count), count):
        order = "".join("a" if place in places else "b" for place in range(2 * count))
        tracker = StepTracker()
        runs = {"a": iter(values), "b": iter(values)}
        found = [call(tracker, next(runs[who]), who) for who in order]
        assert all(cache in ("", who) for cache, who in zip(found, order, strict=True)), order


def test_what_was_held_from_step_to_step_and_is_gone_was_another_run_s() -> None:
    tracker = StepTracker()
    values = timesteps(6).tolist()
    labels = torch.ones(2)
    for value in values[:3]:  # interrupted
        call(tracker, value, "first", [labels])
    del labels
    gc.collect()
    labels = torch.ones(2)
    found = [call(tracker, value, "second", [labels]) for value in values[3:]]
    assert "first" not in found
    assert found[-1] == "second"


def test_conditioning_recreated_at_each_step_proves_nothing() -> None:
    tracker = StepTracker()
    found = [call(tracker, t, "a", [torch.ones(2)]) for t in timesteps(4)]
    assert found == ["", "a", "a", "a"]


def test_unbatched_guidance_gets_two_lanes() -> None:
    tracker = StepTracker()
    uncond, cond = torch.zeros(4), torch.ones(4)
    found = [(call(tracker, t, "u", [uncond]), call(tracker, t, "c", [cond])) for t in timesteps(4)]
    assert found == [("", ""), ("u", "c"), ("u", "c"), ("u", "c")]


def test_calls_that_nothing_distinguishes_never_share_a_cache() -> None:
    tracker = StepTracker()
    for t in timesteps(4):
        assert call(tracker, t, "first") == ""
        assert call(tracker, t, "second") == ""


def test_a_warm_up_call_leaves_nothing() -> None:
    tracker = StepTracker()
    ts = list(timesteps())
    call(tracker, ts[0], "warm-up")
    assert cached_by(tracker, ts, "run") == ["", "", "", "run", "run", "run"]


def test_many_calls_at_one_timestep_are_all_served_while_memory_allows(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    held = [torch.ones(4) for _ in range(100)]

    def kept() -> int:
        tracker = StepTracker()
        for t in timesteps()[:2]:
            for tensor in held:
                _, lane, step = tracker.enter(t, [tensor])
                lane.cached, lane.refreshed = (torch.zeros(16),), ((step,),)
        return len(tracker.lanes())

    assert kept() == 100
    monkeypatch.setattr(lanes, "available_bytes", lambda device: 100)
    assert kept() == 1  # the oldest go: refreshed more often, never wrong


def test_by_value_short_runs_leave_nothing_to_each_other() -> None:
    tracker = StepTracker()
    for label, values in enumerate(([999], [749, 499, 249], [999, 666, 333], [999, 499], [999])):
        for cache in cached_by(tracker, values, str(label)):
            assert cache in ("", str(label))


@pytest.mark.parametrize("order", [("u", "c"), ("c", "u")])
@pytest.mark.parametrize("left", ["u", "c"])
def test_guidance_that_stops_keeps_the_lane_that_goes_on(order: tuple[str, str], left: str) -> None:
    tracker = StepTracker()
    prompts = {"u": torch.zeros(4), "c": torch.ones(4)}
    found = []
    for step, t in enumerate(timesteps(6)):
        for who in order if step < 3 else (left,):
            cache = call(tracker, t, who, [prompts[who]])
            assert cache in ("", who)
            found.append(cache)
    assert found[-3:] == [left] * 3


def test_a_lane_that_pauses_starts_over() -> None:
    tracker = StepTracker()
    uncond, cond = torch.zeros(4), torch.ones(4)
    ts = timesteps(6)
    for t in ts[:2]:
        call(tracker, t, "u", [uncond]), call(tracker, t, "c", [cond])
    for t in ts[2:4]:
        assert call(tracker, t, "c", [cond]) == "c"
    assert call(tracker, ts[4], "u", [uncond]) == ""


def test_parts_of_one_tensor_are_distinguished() -> None:
    tracker = StepTracker()
    both = torch.ones(2, 4)
    found = [
        (call(tracker, t, "u", [both[0]]), call(tracker, t, "c", [both[1]])) for t in timesteps(3)
    ]
    assert found == [("", ""), ("u", "c"), ("u", "c")]


def test_a_lane_knows_what_it_cannot_be() -> None:
    tracker = StepTracker()
    held = torch.ones(4)
    _, lane, _ = tracker.enter(timesteps()[0], [held])
    assert not lane.contradicts([held])
    assert lane.contradicts([torch.ones(4)])
    assert lane.contradicts([])
    assert lane.contradicts([held[1:]])
    assert isinstance(lane, Lane)


@pytest.mark.parametrize("kind", [float, int, torch.tensor, lambda v: torch.full((3,), v)])
def test_timesteps_that_are_no_views_are_identified_by_value(kind: object) -> None:
    tracker = StepTracker()
    values = [kind(v) for v in (999, 949, 899, 849, 799)]  # type: ignore[operator]
    # A second value proves little, so it refreshes once more.
    assert cached_by(tracker, values, "a") == ["", "", "a", "a", "a"]
    again = [kind(v) for v in (999, 949, 899)]  # type: ignore[operator]
    assert "a" not in cached_by(tracker, again, "b")


@pytest.mark.parametrize("start", [600, 999])
def test_by_value_an_interrupted_run_leaves_nothing(start: int) -> None:
    tracker = StepTracker()
    cached_by(tracker, [999, 949, 899, 849, 799], "old")
    assert "old" not in cached_by(tracker, range(start, start - 200, -45), "new")[:1]


def test_by_value_runs_at_different_places_do_not_mix() -> None:
    tracker = StepTracker()
    one, two = iter(range(999, 0, -50)), iter(range(980, 0, -20))
    cached_by(tracker, [next(one) for _ in range(8)], "a")
    for _ in range(10):
        assert call(tracker, next(two), "b") in ("", "b")
    for _ in range(8):
        assert call(tracker, next(one), "a") in ("", "a")
        assert call(tracker, next(two), "b") in ("", "b")


def test_forget_and_reset_drop_everything() -> None:
    tracker = StepTracker()
    ts = timesteps()
    run, _, _ = tracker.enter(ts[0], NOTHING)
    tracker.forget(run)
    assert call(tracker, ts[1], "x") == ""
    call(tracker, 999, "y")
    tracker.reset()
    assert tracker.lanes() == []
    assert call(tracker, ts[2], "x") == ""
    assert call(tracker, 949, "y") == ""


def test_a_pass_from_the_start_knows_that_a_later_one_may_go_on() -> None:
    """Run "a" begins at step 2 (image-to-image), run "b" at step 0 of the same timesteps."""
    tracker = StepTracker()
    ts = timesteps(8)
    cached_by(tracker, ts[2:4], "a")
    assert cached_by(tracker, ts[:4], "b") == ["", "b", "b", "b"]
    assert call(tracker, ts[4], "a") == ""  # either of them may be the one that goes on


def test_a_call_that_may_be_either_lane_s_reuses_neither() -> None:
    """Conditioning that is freed after each step proves nothing of who pauses."""
    tracker = StepTracker()
    ts = timesteps(6)
    pair = torch.zeros(4), torch.ones(4)
    call(tracker, ts[0], "u", [pair[0]]), call(tracker, ts[0], "c", [pair[1]])
    del pair
    gc.collect()
    assert call(tracker, ts[1], "c", [torch.ones(4)]) == ""
    assert call(tracker, ts[2], "c", [torch.ones(4)]) == "c"


def test_no_more_runs_are_kept_by_value_than_may_be_confused() -> None:
    tracker = StepTracker()
    for run in range(40):
        call(tracker, 10.0**run, str(run))
    assert len(tracker.lanes()) == MAX_VALUE_TRACKS
