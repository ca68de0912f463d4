"""What a batch consists of, and settings from plain data."""

import json
import pickle
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dcompile import DcompileError
from dcompile.errors import JobError
from dcompile.serving.jobs import Caching, Job, split
from dcompile.serving.settings import EngineSettings, Limits, ServeSettings


@given(st.integers(0, 200), st.lists(st.integers(1, 16), max_size=4))
def test_split(count: int, batches: list[int]) -> None:
    sizes = split(count, tuple(batches))
    assert sum(sizes) == count
    assert set(sizes) <= {1, *batches}
    assert sizes == sorted(sizes, reverse=True)
    if batches:
        assert sizes.count(max(batches)) == count // max(batches)


def test_kinds() -> None:
    job = Job("dog", 1, 20, 64, 64)
    assert job.kind == Job("cat", 2, 20, 64, 64, negative_prompt="blue").kind
    for name, value in (
        ("steps", 21),
        ("width", 72),
        ("height", 72),
        ("guidance", 2.0),
        ("sampler", "EulerDiscreteScheduler"),
        ("caching", Caching("off")),
        ("lora", "red"),
    ):
        assert replace(job, **{name: value}).kind != job.kind  # type: ignore[arg-type]


def test_an_error_travels() -> None:
    error = pickle.loads(pickle.dumps(JobError("steps", "too many")))
    assert (error.field, str(error)) == ("steps", "steps: too many")


def test_settings_are_plain_data() -> None:
    settings = ServeSettings(
        engines=(EngineSettings("emoji-sd", speedup=3.0), EngineSettings("ddpm-emoji")),
        limits=Limits(steps=30),
        autoscale=(1, 4),
    )
    assert ServeSettings.of(json.loads(json.dumps(settings.as_dict()))) == settings
    assert ServeSettings.of({}) == ServeSettings()


@pytest.mark.parametrize(
    ("given_", "message"),
    [
        ({"replica": 2}, "unexpected keyword argument 'replica'"),
        ({"replicas": 0}, "replicas: expected at least 1"),
        ({"autoscale": [3, 1]}, "autoscale: expected least:most"),
        ({"autoscale": 3}, "settings of the server"),
        ({"limits": {"steps": 0}}, "limit on steps: expected a positive int"),
        ({"limits": {"steps": "9"}}, "limit on steps: expected a positive int"),
        ({"engines": [{"interval": 2, "speedup": 2.0}]}, "give one of interval and speedup"),
        ({"engines": [{"interval": 0}]}, "interval"),
        ({"engines": [{"speedup": 0.5}]}, "speedup"),
        ({"engines": [{"steps": 0}]}, "steps: expected a positive int"),
        ({"engines": []}, "models: expected one or more different ones"),
        ({"engines": [{}, {}]}, "models: expected one or more different ones"),
        ({"engines": [{"modle": "sd"}]}, "unexpected keyword argument 'modle'"),
    ],
)
def test_wrong_settings(given_: dict[str, Any], message: str) -> None:
    with pytest.raises(DcompileError, match=message):
        ServeSettings.of(given_)


def test_what_is_cached_by_default() -> None:
    assert EngineSettings().caching_arguments() == {"speedup": 2.5}
    assert EngineSettings(interval=3).caching_arguments() == {"interval": 3}
    assert EngineSettings("models/mine/").name == "mine"
    assert EngineSettings("owner/other").name == "other"
    assert EngineSettings("sd").name == "emoji-sd"
