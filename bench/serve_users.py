"""locust's users for bench/serve.py: they draw, look on, or go away too early."""

from __future__ import annotations

import base64
import json
import os
import random
from pathlib import Path
from typing import Any

from locust import HttpUser, constant, task

JOBS: list[dict[str, Any]] = json.loads(Path(os.environ["SOAK_JOBS"]).read_text())
LOG = Path(os.environ["SOAK_LOG"])


def note(**answer: Any) -> None:
    with LOG.open("a") as file:
        file.write(json.dumps(answer) + "\n")


def made(job: int, digest: str, trace: dict[str, Any], content: bytes) -> None:
    """Each picture is kept once, to be compared."""
    file = LOG.parent / f"{job}-{digest}.png"
    if not file.exists():
        file.write_bytes(content)
    note(job=job, status=200, digest=digest, batch=trace["batch"], ran=trace["steps"])


class Painter(HttpUser):
    """One person; the next request follows the answer at once."""

    wait_time = constant(0)

    def draw(self, number: int, **options: Any) -> Any:
        return self.client.post("/generate", json={**JOBS[number], **options}, timeout=120)

    @task(8)
    def picture(self) -> None:
        number = random.randrange(len(JOBS))
        answer = self.draw(number)
        if answer.status_code == 0:
            note(job=number, status="lost", error=str(answer.error))
        elif answer.status_code != 200:
            note(job=number, status=answer.status_code, error=answer.text[:200])
        else:
            trace = json.loads(answer.headers["x-trace"])
            made(number, answer.headers["x-digest"], trace, answer.content)

    @task(1)
    def stream(self) -> None:
        number = random.randrange(len(JOBS))
        answer = self.draw(number, stream=True, previews=1)
        events = [line for line in answer.text.splitlines() if line.startswith("event: ")]
        if answer.status_code == 200 and events and events[-1] == "event: picture":
            data = json.loads(answer.text.strip().rpartition("data: ")[2])
            content = base64.b64decode(data["b64_json"])
            made(number, data["digest"], data["trace"], content)
        elif answer.status_code == 0 or (
            answer.status_code == 200 and "event: error" not in events
        ):
            note(job=number, status="lost", error=answer.text[-200:])
        else:
            note(job=number, status=answer.status_code or "error")

    @task(2)
    def goes_away(self) -> None:
        """Closes the connection before the picture is there."""
        number = random.randrange(len(JOBS))
        with self.client.post(
            "/generate",
            json={**JOBS[number], "steps": 150},
            timeout=random.uniform(0.1, 1.5),
            catch_response=True,
            name="/generate, gone",
        ) as answer:
            answer.success()
        note(job=number, status="gone")
