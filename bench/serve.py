"""Serving under load: what it costs, how it scales, and whether anything is lost, wrong or leaked.

    python bench/serve.py --minutes 30

Builds programs of emoji-sd (eager backend), makes two sets of LoRA weights, and starts a server on
loopback by ``dcompile serve``. Four parts:

1. start: seconds from a new process to its first picture, with shipped programs and without, each
   with an empty Inductor cache.
2. overhead: of a request beside the pipeline's own time, one request at a time.
3. throughput: of two replicas over one, one thread each, four clients.
4. soak: locust's users draw at random from a fixed set of jobs (sizes, steps, guidance, samplers,
   LoRA sets), and some go away before their picture is there. Every minute the youngest replica is
   killed with SIGKILL. Afterwards each picture is compared with that of the same job alone, in one
   thread: bit for bit if it was made alone, to one of 255 levels if it was made in a batch, where
   torch adds in another order. Memory and file descriptors of the oldest replica, and of the
   process that answers HTTP, are compared with what they were after the first fifth of the time.

Writes bench/results/serve.json.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import random
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import httpx
import psutil
import typer

ROOT = Path(__file__).resolve().parent.parent
RESULT = ROOT / "bench" / "results" / "serve.json"
PORT = 8123
URL = f"http://127.0.0.1:{PORT}"
READY = 240.0  # seconds
STEPS = (8, 12)
SIZES = "64,72x64"
WARM_UP = 0.2  # of the soak's time
SAMPLERS = ("", "EulerDiscreteScheduler", "DPMSolverMultistepScheduler")

START = """
import sys, time
began = float(sys.argv[1])
import torch
torch.set_num_threads(2)
from dcompile.serving.replica import Replica
from dcompile.serving.settings import EngineSettings
if __name__ == "__main__":
    programs = sys.argv[2] or None
    replica = Replica(EngineSettings("emoji-sd", steps=8, programs=programs), "here")
    assert programs is None or replica.check, replica.programs
    engine = replica.worker.engine
    engine.generate([engine.default_job("dog", 1)])
    print(time.time() - began)
"""


def build(folder: Path, backend: str, sizes: str = SIZES, batch: str = "1,2") -> None:
    options = ["--sizes", sizes, "--batch", batch, "--steps", ",".join(map(str, STEPS))]
    command = [sys.executable, "-m", "dcompile", "build", "emoji-sd", "--out", str(folder)]
    subprocess.run([*command, "--backend", backend, *options], check=True)


def start_seconds(programs: Path | None) -> float:
    with tempfile.TemporaryDirectory() as cache:
        environment = {
            **os.environ,
            "TORCHINDUCTOR_CACHE_DIR": cache,
            "DCOMPILE_CACHE_DIR": "",
            "PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path]),
        }
        script = Path(cache) / "start.py"  # a file: processes that it spawns import it
        script.write_text(START)
        done = subprocess.run(
            [sys.executable, str(script), str(time.time()), str(programs or "")],
            env=environment,
            check=True,
            capture_output=True,
            text=True,
        )
    return float(done.stdout.split()[-1])


def measure_start(folder: Path) -> dict[str, Any]:
    build(folder / "inductor", "inductor", "64", "1")
    shipped = [start_seconds(folder / "inductor") for _ in range(3)]
    afresh = [start_seconds(None)]
    ratio = statistics.median(afresh) / statistics.median(shipped)
    return {"shipped_seconds": shipped, "afresh_seconds": afresh, "ratio": round(ratio, 2)}


# The server ---------------------------------------------------------------------------------------


@contextlib.contextmanager
def served(programs: Path, replicas: int, loras: dict[str, Path]) -> Iterator[None]:
    """A server of its own; ends with the block."""
    command = [sys.executable, "-m", "dcompile", "serve", "emoji-sd", "--port", str(PORT)]
    command += ["--programs", str(programs), "--replicas", str(replicas), "--threads", "1"]
    command += ["--max-queue", "200", "--steps", str(STEPS[0])]
    for name, folder in loras.items():
        command += ["--lora", f"{name}={folder}"]
    with tempfile.TemporaryFile() as log:
        process = subprocess.Popen(command, stdout=log, stderr=log)
        try:
            deadline = time.time() + READY
            while not is_ready():
                if process.poll() is not None or time.time() > deadline:
                    log.seek(0)
                    raise SystemExit(f"the server did not start:\n{log.read().decode()[-4000:]}")
                time.sleep(0.5)
            time.sleep(3)  # the last of several replicas
            yield
        finally:
            process.send_signal(signal.SIGTERM)
            process.wait(120)


def is_ready() -> bool:
    with contextlib.suppress(httpx.HTTPError):
        return httpx.get(f"{URL}/health", timeout=15).status_code == 200
    return False


def generator_processes() -> list[psutil.Process]:
    """Of replicas that generate, the oldest first."""
    return _processes("Generator")


def http_process() -> psutil.Process:
    return _processes("Http")[0]


def _processes(name: str) -> list[psutil.Process]:
    found = []
    for process in psutil.process_iter(["cmdline", "create_time"]):
        line = " ".join(process.info["cmdline"] or ())
        if f"ServeReplica:dcompile:{name}" in line:
            found.append(process)
    return sorted(found, key=lambda one: one.info["create_time"])


# Overhead and throughput --------------------------------------------------------------------------


def one_picture(client: httpx.Client, seed: int, steps: int) -> tuple[float, float]:
    """Seconds of a request, and of the pipeline within it."""
    began = time.perf_counter()
    answer = client.post(f"{URL}/generate", json={"prompt": "dog", "seed": seed, "steps": steps})
    took = time.perf_counter() - began
    answer.raise_for_status()
    return took, sum(json.loads(answer.headers["x-trace"])["seconds"].values())


def measure_overhead(requests: int) -> dict[str, Any]:
    with httpx.Client(timeout=60) as client:
        for seed in range(10):
            one_picture(client, seed, STEPS[0])
        http = http_process()
        before = sum(http.cpu_times()[:2])
        pairs = [one_picture(client, seed, STEPS[0]) for seed in range(requests)]
        spent = sum(http.cpu_times()[:2]) - before
    extra = sorted(1000 * (whole - own) for whole, own in pairs)
    return {
        "requests": requests,
        "pipeline_ms_p50": round(1000 * statistics.median(own for _, own in pairs), 1),
        "overhead_ms_p50": round(statistics.median(extra), 2),
        "overhead_ms_p95": round(extra[int(0.95 * len(extra))], 2),
        "http_processor_ms": round(1000 * spent / requests, 2),
    }


def pictures_per_second(seconds: float, clients: int) -> float:
    counts = [0] * clients
    end = time.perf_counter() + seconds

    def draw(number: int) -> None:
        with httpx.Client(timeout=60) as client:
            while time.perf_counter() < end:
                one_picture(client, 1000 * number + counts[number], STEPS[1])
                counts[number] += 1

    threads = [threading.Thread(target=draw, args=(number,)) for number in range(clients)]
    began = time.perf_counter()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return sum(counts) / (time.perf_counter() - began)


# Soak ---------------------------------------------------------------------------------------------


def jobs_of_the_soak() -> list[dict[str, Any]]:
    """What users draw from: few enough to be compared one by one afterwards."""
    drawn = random.Random(0)
    prompts = ("red apple", "dog", "rocket", "cactus")
    found = []
    kinds = itertools.product((64, 72), STEPS, SAMPLERS, ("", "one", "two"))
    for number, (width, steps, sampler, lora) in enumerate(kinds):
        found.append(
            {
                "prompt": prompts[number % len(prompts)],
                "seed": drawn.randrange(1000),
                "steps": steps,
                "width": width,
                "height": 64,
                "guidance": drawn.choice((3.0, 5.0)),
                "sampler": sampler,
                "lora": lora,
            }
        )
    return found


class Watch(threading.Thread):
    """Kills the youngest replica every minute; measures the oldest one."""

    def __init__(self, kill_every: float) -> None:
        super().__init__(daemon=True)
        self.kill_every = kill_every
        self.oldest = generator_processes()[0]
        self.http = http_process()
        self.samples: list[dict[str, float]] = []
        self.kills = 0
        self.ended = threading.Event()

    def run(self) -> None:
        began = killed = time.time()
        while not self.ended.wait(5):
            self.samples.append({"at": time.time() - began, **self.measured()})
            alive = generator_processes()
            if time.time() - killed >= self.kill_every and len(alive) > 1:
                killed = time.time()
                alive[-1].kill()
                self.kills += 1

    def measured(self) -> dict[str, float]:
        return {
            "replica_mb": self.oldest.memory_info().rss / 2**20,
            "http_mb": self.http.memory_info().rss / 2**20,
            "replica_files": self.oldest.num_fds(),
            "http_files": self.http.num_fds(),
        }

    def growth(self) -> dict[str, dict[str, float]]:
        """Of the last fifth of the time over that after the warm-up."""
        length = self.samples[-1]["at"]
        early = [s for s in self.samples if WARM_UP <= s["at"] / length < 2 * WARM_UP]
        late = [s for s in self.samples if s["at"] / length >= 1 - WARM_UP]
        found = {}
        for name in ("replica_mb", "http_mb", "replica_files", "http_files"):
            before, after = (statistics.median(s[name] for s in part) for part in (early, late))
            found[name] = {"early": round(before, 1), "late": round(after, 1)}
        return found


def soak(minutes: float, users: int, folder: Path) -> dict[str, Any]:
    log = folder / "answers.jsonl"
    watch = Watch(kill_every=60)
    watch.start()
    (folder / "jobs.json").write_text(json.dumps(jobs_of_the_soak()))
    environment = {**os.environ, "SOAK_LOG": str(log), "SOAK_JOBS": str(folder / "jobs.json")}
    command = [sys.executable, "-m", "locust", "-f", str(ROOT / "bench" / "serve_users.py")]
    command += ["--headless", "-u", str(users), "-r", "4", "-t", f"{int(minutes * 60)}s"]
    command += ["-H", URL, "--only-summary", "--stop-timeout", "60"]
    subprocess.run(command, env=environment, check=False)
    watch.ended.set()
    watch.join()
    time.sleep(2)
    metrics = httpx.get(f"{URL}/metrics").text.splitlines()
    value = {name: float(rest) for name, _, rest in (line.rpartition(" ") for line in metrics)
             if name and not name.startswith("#")}  # fmt: skip
    answers = [json.loads(line) for line in log.read_text().splitlines()]
    return {
        "minutes": minutes,
        "users": users,
        "kills": watch.kills,
        "answers": dict(Counter(str(one["status"]) for one in answers)),
        "lost": [one for one in answers if one["status"] == "lost"][:5],
        "batches": dict(Counter(str(one["batch"]) for one in answers if "batch" in one)),
        "pending_at_the_end": value["dcompile_pending_pictures"],
        "retries": value["dcompile_retries_total"],
        "cancelled": value.get('dcompile_cancelled_total{model="emoji-sd"}', 0.0),
        "growth": watch.growth(),
        "made": [one for one in answers if "digest" in one],
    }


def compare(
    found: dict[str, Any], folder: Path, programs: Path, loras: dict[str, Path]
) -> dict[str, Any]:
    """Each picture with that of the same job alone."""
    import numpy as np
    import torch
    from PIL import Image

    from dcompile.serving.engine import Engine
    from dcompile.serving.fleet import PROGRAMS
    from dcompile.serving.jobs import Job
    from dcompile.serving.pictures import digest
    from dcompile.serving.settings import EngineSettings

    torch.set_num_threads(1)
    engine = Engine.of(
        EngineSettings(
            "emoji-sd",
            backend="eager",
            programs=str(programs / PROGRAMS),
            new_calls="uncached",
            loras={name: str(folder) for name, folder in loras.items()},
        )
    )
    jobs = jobs_of_the_soak()
    counts: dict[str, Any] = {"jobs": len(jobs), "alone": 0, "in_batches": 0, "wrong": 0}
    expected: dict[int, Any] = {}
    differing: dict[tuple[int, str], dict[str, Any]] = {}
    for one in found.pop("made"):
        number, seen, batch = one["job"], one["digest"], one["batch"]
        if number not in expected:
            (expected[number],) = engine.generate([Job(**jobs[number])])
        counts["alone" if batch == 1 else "in_batches"] += 1
        if digest(expected[number].image) == seen:
            continue
        image = Image.open(folder / f"{number}-{seen}.png").convert("RGB")
        levels = int(np.abs(np.int16(image) - np.asarray(expected[number].image)).max())
        counts["wrong"] += batch == 1 or levels > 1
        entry = differing.setdefault(
            (number, seen),
            {"job": jobs[number], "levels": levels, "batch": batch, "ran": one["ran"], "times": 0},
        )
        entry["times"] += 1
        entry["expected"] = expected[number].trace.levels
    counts["differing"] = list(differing.values())
    return counts


def make_loras(folder: Path) -> dict[str, Path]:
    import torch
    from diffusers import StableDiffusionPipeline
    from peft import LoraConfig
    from peft.utils import get_peft_model_state_dict

    from dcompile.models.loading import load_pipeline

    found = {}
    for number, name in enumerate(("one", "two")):
        pipeline = load_pipeline("emoji-sd")
        torch.manual_seed(number)
        config = LoraConfig(r=2, init_lora_weights=False, target_modules=["to_q", "to_v"])
        pipeline.unet.add_adapter(config)
        found[name] = folder / name
        layers = get_peft_model_state_dict(pipeline.unet)
        StableDiffusionPipeline.save_lora_weights(found[name], unet_lora_layers=layers)
    return found


def main(
    minutes: Annotated[float, typer.Option(help="Of the soak; 0 for none.")] = 30.0,
    users: Annotated[int, typer.Option(help="Of the soak.")] = 6,
    requests: Annotated[int, typer.Option(help="Whose overhead is measured; 0 for none.")] = 100,
    seconds: Annotated[float, typer.Option(help="Of each throughput; 0 for none.")] = 40.0,
    start: Annotated[bool, typer.Option(help="Measure starts.")] = True,
) -> None:
    """Measure serving, and write bench/results/serve.json; what is left out stays as it was."""
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    result = json.loads(RESULT.read_text()) if RESULT.exists() else {}
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        if start:
            result["start"] = measure_start(folder)
        loras = make_loras(folder)
        programs = folder / "programs"
        build(programs, "eager")
        if requests or seconds:
            with served(programs, 1, {}):
                if requests:
                    result["overhead"] = measure_overhead(requests)
                one = pictures_per_second(seconds, 4) if seconds else 0.0
        if seconds:
            with served(programs, 2, {}):
                pictures_per_second(10, 4)
                two = pictures_per_second(seconds, 4)
            result["throughput"] = {
                "one_replica": round(one, 3),
                "two_replicas": round(two, 3),
                "ratio": round(two / one, 2),
            }
        if minutes:
            with served(programs, 2, loras):
                found = soak(minutes, users, folder)
            found["compared"] = compare(found, folder, programs, loras)
            result["soak"] = found
    RESULT.write_text(json.dumps(result, indent=2) + "\n")
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    typer.run(main)
