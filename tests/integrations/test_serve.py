"""The server on a local Ray cluster: as users see it, and when processes and nodes are lost."""

import base64
import io
import json
import os
import signal
import socket
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import PIL.Image
import psutil
import pytest

from dcompile.serving.build import Plan, build
from dcompile.serving.pictures import psnr
from dcompile.serving.settings import EngineSettings, Limits, ServeSettings

# In one process of xdist's: all share one server.
pytestmark = [pytest.mark.full, pytest.mark.xdist_group("serve")]
with socket.socket() as found:
    found.bind(("127.0.0.1", 0))
    PORT = found.getsockname()[1]
URL = f"http://127.0.0.1:{PORT}"
STEPS = 4
JOB = {"prompt": "dog", "seed": 3, "steps": STEPS}


@pytest.fixture(scope="module")
def programs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("served") / "programs"
    settings = EngineSettings("emoji-sd", interval=2, backend="eager", steps=STEPS, device="cpu")
    build(Plan(settings, ((64, 64),), (1, 2), (STEPS,)), folder)
    return folder


@pytest.fixture(scope="module")
def cluster() -> Iterator[Any]:
    import ray
    from ray.cluster_utils import Cluster

    found = Cluster(
        initialize_head=True, head_node_args={"num_cpus": 2, "include_dashboard": False}
    )
    ray.init(address=found.address, namespace="dcompile", log_to_driver=False)
    yield found
    ray.shutdown()
    found.shutdown()


@pytest.fixture(scope="module")
def settings(programs: Path) -> ServeSettings:
    engine = EngineSettings("emoji-sd", steps=STEPS, programs=str(programs), device="cpu")
    return ServeSettings(
        engines=(engine, replace(engine, model="ddpm-emoji", programs=None, backend="eager")),
        limits=Limits(queue=8, steps=400),
        cpus=0.5,
        threads=1,
    )


@pytest.fixture(scope="module")
def server(cluster: Any, settings: ServeSettings) -> Iterator[httpx.Client]:
    from ray import serve

    from dcompile.integrations.serve import start

    start(settings, "127.0.0.1", PORT)
    with httpx.Client(base_url=URL, timeout=120) as client:
        yield client
    serve.shutdown()


def replicas() -> list[psutil.Process]:
    return [
        process
        for process in psutil.process_iter(["cmdline"])
        if "ServeReplica:dcompile:Generator" in " ".join(process.info["cmdline"] or ())
    ]


def metric(server: httpx.Client, name: str) -> float:
    lines = server.get("/metrics").text.splitlines()
    return sum(float(line.rpartition(" ")[2]) for line in lines if line.startswith(name))


def picture(answer: httpx.Response) -> PIL.Image.Image:
    return PIL.Image.open(io.BytesIO(answer.content))


def test_pictures(server: httpx.Client) -> None:
    health = server.get("/health")
    assert health.status_code == 200
    assert health.json()["models"]["emoji-sd"]["check"].startswith("bit for bit")
    first, second = (server.post("/generate", json=JOB) for _ in range(2))
    assert first.status_code == 200
    assert first.content == second.content
    trace = json.loads(first.headers["x-trace"])
    assert trace["steps"] == ["refresh", "reuse"] * (STEPS // 2)
    answer = server.post("/v1/images/generations", json={"prompt": "dog", "n": 2, "seed": 3})
    assert [one["seed"] for one in answer.json()["data"]] == [3, 4]
    one = answer.json()["data"][0]
    if one["trace"]["batch"] == 1:
        assert one["digest"] == first.headers["x-digest"]
    else:  # sums of a batch round differently
        made = PIL.Image.open(io.BytesIO(base64.b64decode(one["b64_json"])))
        assert psnr(made, picture(first)) > 60
    assert metric(server, "dcompile_captures_total") == 0


def test_refusals(server: httpx.Client) -> None:
    for change in ({"steps": 401}, {"sampler": "x"}, {"prompt": ""}, {"width": 63}):
        answer = server.post("/generate", json={**JOB, **change})
        assert answer.status_code == 422
        assert next(iter(change)) in answer.json()["error"]["message"]


def test_several_at_once(server: httpx.Client) -> None:
    """Batches come together, the queue is limited, and every picture is right."""
    alone = {seed: server.post("/generate", json={**JOB, "seed": seed}) for seed in range(4)}

    def draw(number: int) -> httpx.Response:
        return httpx.post(f"{URL}/generate", json={**JOB, "seed": number % 4}, timeout=120)

    with ThreadPoolExecutor(24) as pool:
        answers = list(pool.map(draw, range(24)))
    made = [answer for answer in answers if answer.status_code == 200]
    assert len(made) >= 8
    assert {answer.status_code for answer in answers} <= {200, 429}
    for answer in made:
        own = alone[int(answer.headers["x-seed"])]
        if json.loads(answer.headers["x-trace"])["batch"] == 1:
            assert answer.content == own.content
        else:  # torch adds in another order
            assert psnr(picture(answer), picture(own)) > 60
    assert {json.loads(answer.headers["x-trace"])["batch"] for answer in made} >= {2}


def test_who_goes_away(server: httpx.Client) -> None:
    before = metric(server, "dcompile_cancelled_total")
    with pytest.raises(httpx.TimeoutException):
        httpx.post(f"{URL}/generate", json={**JOB, "steps": 400}, timeout=0.5)
    began = time.perf_counter()
    expected = server.post("/generate", json=JOB)
    assert expected.status_code == 200
    assert time.perf_counter() - began < 5, "it waits for the one that nobody waits for"
    assert metric(server, "dcompile_cancelled_total") == before + 1
    assert metric(server, "dcompile_pending_pictures") == 0
    assert metric(server, "dcompile_cache_bytes") == 0


def test_streams(server: httpx.Client) -> None:
    with server.stream("POST", "/generate", json={**JOB, "stream": True}) as answer:
        names = [line for line in answer.iter_lines() if line.startswith("event")]
    assert names == ["event: step"] * STEPS + ["event: picture"]


def test_another_model(server: httpx.Client) -> None:
    answer = server.post(
        "/v1/images/generations", json={"model": "ddpm-emoji", "steps": 2, "seed": 1}
    )
    assert answer.status_code == 200, answer.text
    assert server.post("/v1/images/generations", json={"model": "none"}).status_code == 422


def test_a_replica_is_killed(server: httpx.Client) -> None:
    job = {**JOB, "steps": 200}
    expected = server.post("/generate", json=job).headers["x-digest"]
    before = metric(server, "dcompile_pictures_total")
    with ThreadPoolExecutor(1) as pool:
        answer = pool.submit(httpx.post, f"{URL}/generate", json=job, timeout=120)
        time.sleep(0.5)
        for process in replicas():
            os.kill(process.pid, signal.SIGKILL)
        assert answer.result().status_code == 200
    assert answer.result().headers["x-digest"] == expected
    assert metric(server, "dcompile_retries_total") >= 1
    assert metric(server, "dcompile_pictures_total") == before + 1


def test_a_node_leaves(server: httpx.Client, cluster: Any, settings: ServeSettings) -> None:
    """Replicas that it had are started elsewhere; requests go on."""
    from ray import serve

    from dcompile.integrations.serve import NAME, application

    node = cluster.add_node(num_cpus=1, resources={"second": 1})
    cluster.wait_for_nodes()
    serve.run(application({"settings": replace(settings, replicas=4).as_dict()}), name=NAME)
    expected = server.post("/generate", json=JOB).headers["x-digest"]
    cluster.remove_node(node, allow_graceful=False)
    # Until Ray notices, requests that the lost node's process answers fail; none is answered wrong.
    right, deadline = 0, time.time() + 120
    while right < 10 and time.time() < deadline:
        try:
            answer = httpx.post(f"{URL}/generate", json=JOB, timeout=120)
        except httpx.TransportError:
            right = 0
            continue
        assert answer.status_code in (200, 500, 503), answer.text
        right = right + 1 if answer.status_code == 200 else 0
        if answer.status_code == 200:
            assert answer.headers["x-digest"] == expected
    assert right == 10
