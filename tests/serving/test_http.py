"""The HTTP interface around a client that generates nothing."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import io
import json
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from fake_client import STEPS, FakeClient, about, snapshot
from fastapi.testclient import TestClient
from PIL import Image

from dcompile.errors import DcompileError, JobError, LostError, OverloadedError
from dcompile.runtime.counters import Stats
from dcompile.serving.answers import LARGEST_BODY
from dcompile.serving.http import Server, app_of
from dcompile.serving.jobs import Caching
from dcompile.serving.messages import PlainRequest
from dcompile.serving.metrics import Metrics, Tally
from dcompile.serving.pictures import Trace
from dcompile.serving.settings import Limits
from dcompile.serving.worker import Made

LIMITS = Limits(pixels=128 * 128, steps=10, prompt=50, images=3, queue=3)
PLAIN, OPENAI = "/generate", "/v1/images/generations"
NOWHERE = {"ready": False, "reason": "the model is being loaded"}


def http(client: FakeClient | None = None, **settings: Any) -> TestClient:
    app = app_of({"fake": client or FakeClient()}, settings.pop("limits", LIMITS), **settings)
    return TestClient(app, raise_server_exceptions=False)


def error_of(response: Any, status: int) -> dict[str, Any]:
    assert response.status_code == status, response.text
    body = response.json()
    assert set(body) == {"error"}
    assert set(body["error"]) == {"message", "type", "param", "code"}
    found: dict[str, Any] = body["error"]
    return found


def events_of(text: str) -> list[tuple[str, dict[str, Any]]]:
    found = []
    for block in text.strip().split("\n\n"):
        event, data = block.split("\n")
        found.append((event.removeprefix("event: "), json.loads(data.removeprefix("data: "))))
    return found


def samples(text: str) -> dict[str, float]:
    lines = (line for line in text.splitlines() if line and not line.startswith("#"))
    return {name: float(value) for name, value in (line.rsplit(" ", 1) for line in lines)}


# Pictures -----------------------------------------------------------------------------------------


def test_a_plain_request_returns_a_file_and_how_it_was_made() -> None:
    client = FakeClient()
    response = http(client).post(PLAIN, json={"prompt": "cat", "seed": 7, "format": "webp"})
    assert response.status_code == 200
    assert response.headers["content-type"] == "image/webp"
    assert response.headers["x-seed"] == "7"
    assert len(response.headers["x-digest"]) == hashlib.sha256().digest_size * 2
    assert json.loads(response.headers["x-trace"])["steps"] == list(STEPS)
    assert json.loads(response.headers["x-notes"]) == ["a note"]
    assert Image.open(io.BytesIO(response.content)).size == (64, 64)
    (request,) = client.asked
    job = request.job
    assert (job.prompt, job.steps, job.width, job.guidance) == ("cat", 4, 64, 5.0)


def test_openai_shape() -> None:
    client = FakeClient()
    body = {
        "model": "fake",
        "prompt": "cat",
        "n": 2,
        "size": "64x32",
        "output_format": "jpeg",
        "quality": "high",
        "user": "someone",
        "seed": 5,
    }
    found = http(client).post(OPENAI, json=body).json()
    assert set(found) == {"created", "data", "output_format", "size"}
    assert (found["output_format"], found["size"]) == ("jpeg", "64x32")
    assert [one["seed"] for one in found["data"]] == [5, 6]
    assert [request.job.seed for request in client.asked] == [5, 6]
    assert {request.job.kind for request in client.asked} == {client.asked[0].job.kind}
    picture = Image.open(io.BytesIO(base64.b64decode(found["data"][0]["b64_json"])))
    assert picture.format == "JPEG"


def test_a_url_holds_the_picture_itself() -> None:
    body = {"prompt": "cat", "response_format": "url"}
    (one,) = http().post(OPENAI, json=body).json()["data"]
    kind, _, content = one["url"].partition(";base64,")
    assert kind == "data:image/png"
    assert Image.open(io.BytesIO(base64.b64decode(content))).size == (64, 64)
    assert "b64_json" not in one


def test_seeds_are_drawn_if_none_is_given() -> None:
    client = FakeClient()
    server = http(client)
    for _ in range(3):
        assert server.post(PLAIN, json={"prompt": "cat"}).status_code == 200
    assert len({request.job.seed for request in client.asked}) == 3


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({"off": True}, Caching("off")),
        ({"interval": 3}, Caching("interval", 3.0)),
        ({"speedup": 2.5}, Caching("speedup", 2.5)),
        ({}, Caching("default")),
    ],
)
def test_caching_is_chosen_where_that_is_allowed(given: Any, expected: Caching) -> None:
    client = FakeClient()
    body = {"prompt": "cat", "caching": given}
    assert http(client, chooses_caching=True).post(PLAIN, json=body).status_code == 200
    assert client.asked[0].job.caching == expected
    assert error_of(http(client).post(PLAIN, json=body), 422)["param"] == "caching"


def test_models_are_listed_and_chosen_by_name() -> None:
    one, other = FakeClient(), FakeClient()
    server = TestClient(app_of({"one": one, "other": other}))
    assert [model["id"] for model in server.get("/v1/models").json()["data"]] == ["one", "other"]
    server.post(OPENAI, json={"prompt": "cat", "model": "other"})
    server.post(OPENAI, json={"prompt": "cat"})
    assert (len(one.asked), len(other.asked)) == (1, 1)


# Refusals -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("path", "changes", "field"),
    [
        (PLAIN, {"prompt": ""}, "prompt"),
        (PLAIN, {"prompt": "   "}, "prompt"),
        (PLAIN, {"prompt": "x" * 51}, "prompt"),
        (PLAIN, {"negative_prompt": "x" * 51}, "negative_prompt"),
        (PLAIN, {"steps": 11}, "steps"),
        (PLAIN, {"steps": 0}, "steps"),
        (PLAIN, {"steps": "5"}, "steps"),
        (PLAIN, {"width": 63}, "width"),
        (PLAIN, {"height": 63}, "height"),
        (PLAIN, {"width": 256, "height": 128}, "size"),
        (PLAIN, {"seed": -1}, "seed"),
        (PLAIN, {"seed": 2**63}, "seed"),
        (PLAIN, {"guidance": 101}, "guidance"),
        (PLAIN, {"sampler": "../../etc/passwd"}, "sampler"),
        (PLAIN, {"lora": "nobody's"}, "lora"),
        (PLAIN, {"format": "gif"}, "format"),
        (PLAIN, {"previews": 11}, "previews"),
        (PLAIN, {"n": 1}, "n"),
        (PLAIN, {"caching": {"off": True, "surprise": 1}}, "caching.surprise"),
        (OPENAI, {"n": 4}, "n"),
        (OPENAI, {"n": 0}, "n"),
        (OPENAI, {"size": "64"}, "size"),
        (OPENAI, {"size": "0x64"}, "size"),
        (OPENAI, {"size": "00x64"}, "size"),
        (OPENAI, {"size": "٦٤x٦٤"}, "size"),
        (OPENAI, {"model": "another"}, "model"),
        (OPENAI, {"seed": 2**63 - 1, "n": 2}, "seed"),
        (OPENAI, {"surprise": 1}, "surprise"),
        (OPENAI, {"stream": True, "n": 2}, "n"),
    ],
)
def test_refused_with_the_field_at_fault(path: str, changes: dict[str, Any], field: str) -> None:
    client = FakeClient()
    error = error_of(http(client).post(path, json={"prompt": "cat", **changes}), 422)
    assert (error["type"], error["param"]) == ("invalid_request_error", field)
    assert error["message"].startswith(f"{field}: ")
    assert not client.asked


@pytest.mark.parametrize(
    ("changes", "status"),
    [
        ({"width": 16384, "height": 8, "format": "webp"}, 422),
        ({"width": 8, "height": 16384, "format": "webp"}, 422),
        ({"width": 16376, "height": 8, "format": "webp"}, 200),
        ({"width": 65504, "height": 8, "format": "jpeg"}, 422),
        ({"width": 65504, "height": 8, "previews": 1}, 422),
        ({"width": 65504, "height": 8}, 200),
    ],
)
def test_sides_that_a_format_does_not_have(changes: dict[str, Any], status: int) -> None:
    response = http(limits=Limits(steps=10)).post(PLAIN, json={"prompt": "cat", **changes})
    assert response.status_code == status
    if status == 422:
        assert error_of(response, 422)["param"] == "size"


@pytest.mark.parametrize(
    ("given", "changes", "field"),
    [
        ({"prompt": "cat"}, {"prompt": False}, "prompt"),
        ({"prompt": "cat", "negative_prompt": "dog"}, {"negative_prompt": False}, None),
        ({"prompt": "cat", "guidance": 3}, {"takes_guidance": False, "guidance": None}, "guidance"),
        ({"prompt": "cat", "width": 72}, {"resizes": False}, "width"),
    ],
)
def test_what_a_model_does_not_do_is_refused(
    given: dict[str, Any], changes: dict[str, Any], field: str | None
) -> None:
    client = FakeClient(about=about(**changes))
    field = field or "negative_prompt"
    assert error_of(http(client).post(PLAIN, json=given), 422)["param"] == field


@pytest.mark.parametrize(
    "content",
    [b"", b"{", b"[]", b'"cat"', b"\xff\xfe", b'{"prompt": "\\ud800"}', b'{"\\ud800": 1}'],
)
def test_what_is_no_request_is_refused(content: bytes) -> None:
    headers = {"content-type": "application/json"}
    error_of(http().post(PLAIN, content=content, headers=headers), 422)


@pytest.mark.parametrize("content", [b'{"seed": ' + b"9" * 5000 + b"}", b"[" * 100_000])
def test_what_no_parser_reads_is_refused(content: bytes) -> None:
    headers = {"content-type": "application/json"}
    error_of(http().post(PLAIN, content=content, headers=headers), 400)


@pytest.mark.parametrize("is_announced", [True, False])
def test_long_bodies_are_refused(is_announced: bool) -> None:
    client = FakeClient()
    content: Any = json.dumps({"prompt": "x" * LARGEST_BODY}).encode()
    if not is_announced:
        content = iter([content[:1000], content[1000:]])  # sent in chunks
    assert "bytes" in error_of(http(client).post(PLAIN, content=content), 413)["message"]
    assert not client.asked


@pytest.mark.parametrize("length", ["-1", "²", "1_0", "9" * 5000])
def test_lengths_that_are_none_are_refused(length: str) -> None:
    headers = {"content-length": length.encode("latin-1")}
    error_of(http().post(PLAIN, content=b"{}", headers=headers), 413)


def test_a_full_queue_is_429_and_empties_again() -> None:
    server = http(FakeClient(), limits=Limits(queue=1))
    response = server.post(OPENAI, json={"prompt": "cat", "n": 2})
    error = error_of(response, 429)
    assert error["type"] == "rate_limit_error"
    assert "of at most 1" in error["message"]
    assert response.headers["retry-after"] == "1"
    for stream in (False, True):
        body = {"prompt": "cat", "stream": stream}
        assert server.post(OPENAI, json=body).status_code == 200
    assert samples(server.get("/metrics").text)["dcompile_pending_pictures"] == 0


@pytest.mark.parametrize(
    ("error", "status", "said"),
    [
        (LostError("the replica is gone"), 503, "the replica is gone"),
        (OverloadedError("3 wait"), 429, "3 wait; try again later"),
        (JobError("steps", "too many"), 422, "steps: too many"),
        (RuntimeError("secret"), 500, "the server's log says why"),
    ],
)
def test_errors_of_the_client(error: Exception, status: int, said: str) -> None:
    for path in (PLAIN, OPENAI):
        response = http(FakeClient(error)).post(path, json={"prompt": "cat"})
        assert said in error_of(response, status)["message"]
        assert "secret" not in response.text
        assert ("retry-after" in response.headers) == (status in (429, 503))


def test_nothing_generates_yet() -> None:
    client = FakeClient(about=NOWHERE)
    server = http(client)
    error = error_of(server.post(PLAIN, json={"prompt": "cat"}), 503)
    assert error["message"] == "the model is being loaded"
    client.about = None
    assert server.post(PLAIN, json={"prompt": "cat"}).status_code == 200


def test_unknown_paths_are_errors_of_the_same_shape() -> None:
    assert error_of(http().get("/nowhere"), 404)["message"] == "Not Found"
    error_of(http().get(PLAIN), 405)


# Streams ------------------------------------------------------------------------------------------


def test_a_plain_stream() -> None:
    body = {"prompt": "cat", "seed": 3, "stream": True, "previews": 1}
    response = http().post(PLAIN, json=body)
    assert response.headers["content-type"].startswith("text/event-stream")
    found = events_of(response.text)
    assert [name for name, _ in found] == ["step", "preview", "step", "step", "step", "picture"]
    assert found[0][1] == {"done": 1, "steps": 4}
    assert base64.b64decode(found[1][1]["b64_json"]) == b"half way"
    assert found[-1][1]["seed"] == 3
    assert found[-1][1]["trace"]["steps"] == list(STEPS)


def test_an_openai_stream() -> None:
    body = {"prompt": "cat", "stream": True, "partial_images": 1, "output_format": "webp"}
    found = events_of(http().post(OPENAI, json=body).text)
    names = ["image_generation.partial_image", "image_generation.completed"]
    assert [name for name, _ in found] == names
    assert [data["type"] for _, data in found] == names
    assert found[0][1]["partial_image_index"] == 0
    assert found[1][1]["output_format"] == "webp"
    assert Image.open(io.BytesIO(base64.b64decode(found[1][1]["b64_json"]))).format == "WEBP"


@pytest.mark.parametrize(
    ("error", "status"), [(LostError("gone"), 503), (RuntimeError("secret"), 500)]
)
def test_an_error_in_a_stream_is_an_event(error: Exception, status: int) -> None:
    response = http(FakeClient(error)).post(PLAIN, json={"prompt": "cat", "stream": True})
    assert response.status_code == 200
    found = events_of(response.text)
    assert [name for name, _ in found] == ["step", "error"]
    assert found[-1][1]["status"] == status
    assert "message" in found[-1][1]["error"]
    assert "secret" not in response.text


def test_an_error_before_the_first_event_is_an_ordinary_one() -> None:
    body = {"prompt": "cat", "stream": True}  # the steps are no events of this one
    error_of(http(FakeClient(LostError("gone"))).post(OPENAI, json=body), 503)


# Health, metrics ----------------------------------------------------------------------------------


class Broken(FakeClient):
    async def describe(self) -> dict[str, Any]:
        raise ConnectionError("no route")


def test_health_is_503_until_the_first_model_is_ready() -> None:
    client = FakeClient(about=NOWHERE)
    server = http(client)
    response = server.get("/health")
    assert response.status_code == 503
    assert response.json()["models"]["fake"]["reason"] == NOWHERE["reason"]
    client.about = None
    response = server.get("/health")
    assert response.status_code == 200
    assert response.json()["status"] == "ready"
    response = TestClient(app_of({"broken": Broken()})).get("/health")
    assert response.status_code == 503
    assert response.json()["models"]["broken"] == {"ready": False, "reason": "no route"}


def test_health_does_not_ask_further_models_which_would_load_them() -> None:
    both = TestClient(app_of({"fake": FakeClient(), "broken": Broken()})).get("/health")
    assert both.status_code == 200
    assert both.json()["models"]["broken"] == {"loaded": "when asked for"}


def test_a_trace_too_long_for_a_header_is_shortened() -> None:
    def trace(count: int) -> Any:
        client = FakeClient(steps=("reuse",) * count)
        return json.loads(http(client).post(PLAIN, json={"prompt": "cat"}).headers["x-trace"])

    assert len(trace(20)["steps"]) == 20
    assert trace(1000)["steps"] is None


def test_a_slow_reader_of_a_stream_keeps_no_place_in_the_queue() -> None:
    async def run() -> None:
        client = FakeClient()
        server = Server({"fake": client}, Limits(queue=1))
        (request,) = await server.requests("fake", PlainRequest(prompt="cat"))
        events = server.events("fake", request)
        await anext(events)  # and reads no more for a while
        for _ in range(50):
            await asyncio.sleep(0)
        assert len(await server.generate("fake", [request])) == 1
        assert isinstance([event async for event in events][-1], Made)

    asyncio.run(run())


def test_metrics_count_pictures_and_answers() -> None:
    server = http()
    server.post(PLAIN, json={"prompt": "cat"})
    server.post(PLAIN, json={"prompt": ""})
    server.get("/health")
    found = samples(server.get("/metrics").text)
    assert found['dcompile_requests_total{endpoint="/generate",status="200"}'] == 1
    assert found['dcompile_requests_total{endpoint="/generate",status="422"}'] == 1
    assert found['dcompile_request_seconds_count{endpoint="/generate"}'] == 2
    assert found['dcompile_pictures_total{model="fake"}'] == 1
    assert found['dcompile_steps_total{model="fake",ran="reuse"}'] == 2
    assert found['dcompile_phase_seconds_sum{phase="denoise"}'] == 0.125
    assert not [name for name in found if "/health" in name or "/metrics" in name]


def test_metrics_add_up_processes_and_never_fall() -> None:
    metrics = Metrics()

    def pictures() -> float:
        return samples(metrics.page().decode())['dcompile_pictures_total{model="fake"}']

    metrics.seen(snapshot("one", 3, uncached={"training": 1}))
    metrics.seen(snapshot("other", 4, uncached={"training": 2}))
    assert pictures() == 7
    metrics.seen(snapshot("one", 2))  # overtaken by a later one
    assert pictures() == 7
    metrics.seen(snapshot("third", 1))  # one of them was replaced: its counts stay
    assert pictures() == 8
    found = samples(metrics.page().decode())
    assert found['dcompile_uncached_total{model="fake",reason="training"}'] == 3
    assert found['dcompile_cache_bytes{model="fake",process="other"}'] == 8


def test_a_count_of_failures_does_not_fall() -> None:
    metrics = Metrics()
    metrics.seen(snapshot("one", 3, failed=1))
    metrics.seen(snapshot("one", 3))  # overtaken by a later one
    assert samples(metrics.page().decode())['dcompile_failed_total{model="fake"}'] == 1


def test_reasons_are_few_whatever_is_asked_for() -> None:
    tally = Tally("one", "fake")
    for number in range(1000):
        reasons = {f"no program for a sample of shape (2, 4, {number}, 8)": 2, f"{number}": 1}
        tally.ran(Trace(("uncached",), 0, 1.0, {}, 1, reasons), 1)
    found = tally.snapshot(Stats(0, 0, 0, 0, 0, 0, 0.0, 0, 1.0)).uncached
    assert found["no program for a sample of shape (...)"] == 2000
    assert len(found) < 60
    assert sum(found.values()) == 3000


# Clients that go away -----------------------------------------------------------------------------


async def goes_away(app: Any, path: str, body: dict[str, Any], until: Callable[[], bool]) -> None:
    """A request whose client goes away once ``until`` says so, as an ASGI server passes it."""
    waits = iter([{"type": "http.request", "body": json.dumps(body).encode()}])

    async def receive() -> dict[str, Any]:
        for message in waits:
            return message
        while not until():
            await asyncio.sleep(0.01)
        return {"type": "http.disconnect"}

    async def send(message: dict[str, Any]) -> None:
        pass

    scope = {
        "type": "http",
        "method": "POST",
        "path": path,
        "raw_path": path.encode(),
        "query_string": b"",
        "headers": [(b"content-type", b"application/json")],
        "http_version": "1.1",
        "scheme": "http",
        "server": ("test", 80),
        "client": ("test", 1),
        "asgi": {"version": "3.0", "spec_version": "2.3"},
    }
    await asyncio.wait_for(app(scope, receive, send), timeout=20)


@pytest.mark.parametrize(
    ("path", "body", "count"),
    [
        (PLAIN, {}, 1),
        (PLAIN, {"stream": True}, 1),
        (OPENAI, {"n": 3}, 3),
        (OPENAI, {"stream": True}, 1),
    ],
)
def test_a_client_that_goes_away_cancels_its_pictures(
    path: str, body: dict[str, Any], count: int
) -> None:
    client = FakeClient(takes=60)
    app = app_of({"fake": client}, LIMITS)
    asyncio.run(goes_away(app, path, {"prompt": "cat", **body}, lambda: len(client.asked) == count))
    assert client.cancelled == count
    found = samples(app.state.server.metrics.page().decode())
    assert found["dcompile_pending_pictures"] == 0


def test_one_failure_cancels_the_others_of_its_request() -> None:
    class Mixed(FakeClient):
        async def _wait(self) -> None:
            self.takes = 60 * (len(self.asked) - 1)  # the first fails, the others take long
            await super()._wait()

    client = Mixed(LostError("gone"))
    error_of(http(client).post(OPENAI, json={"prompt": "cat", "n": 3}), 503)
    assert client.cancelled == 2


# The page -----------------------------------------------------------------------------------------


@pytest.fixture
def without_gradio(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    import sys

    monkeypatch.setitem(sys.modules, "gradio", None)
    monkeypatch.delitem(sys.modules, "dcompile.serving.page", raising=False)
    return


@pytest.mark.usefixtures("without_gradio")
def test_the_page_needs_gradio() -> None:
    with pytest.raises(DcompileError, match=r'pip install "dcompile\[page\]"'):
        app_of({"fake": FakeClient()}, page=True)
    assert http().get("/").status_code == 404  # no page, no redirection
