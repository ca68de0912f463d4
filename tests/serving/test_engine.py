"""An engine: pictures depend on their jobs alone, and say how they came about."""

import io
import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import PIL.Image
import pytest
import torch
from PIL.Image import Image

from dcompile import ArtifactError, ModelError
from dcompile.errors import DcompileError, JobError
from dcompile.serving.engine import Engine, RunCancelled
from dcompile.serving.jobs import Caching, Job
from dcompile.serving.pictures import digest, encoded, psnr
from dcompile.serving.samplers import samplers_for_programs
from dcompile.serving.settings import EngineSettings

STEPS = 6


@pytest.fixture(scope="module")
def engine() -> Engine:
    found = Engine.of(
        EngineSettings("emoji-sd", speedup=2.0, backend="eager", steps=STEPS, device="cpu")
    )
    found.generate([found.default_job()])
    found.freeze()
    return found


@pytest.fixture
def job(engine: Engine) -> Job:
    return engine.default_job("dog", seed=3)


def one(engine: Engine, job: Job) -> str:
    return digest(engine.generate([job])[0].image)


def alone(engine: Engine, job: Job) -> str:
    """The pipeline itself, uncached."""
    engine.handle.disable()
    try:
        image = engine.pipeline(
            job.prompt,
            num_inference_steps=job.steps,
            guidance_scale=job.guidance,
            width=job.width,
            height=job.height,
            generator=torch.Generator().manual_seed(job.seed),
        ).images[0]
    finally:
        engine.handle.enable()
    return digest(image)


def test_uncached_it_is_the_pipeline_s_own_picture(engine: Engine, job: Job) -> None:
    (picture,) = engine.generate([replace(job, caching=Caching("off"))])
    assert digest(picture.image) == alone(engine, job)
    assert picture.trace.levels == ("uncached",) * STEPS
    assert picture.trace.flops_speedup == 1.0


def test_a_picture_depends_on_its_job_alone(engine: Engine, job: Job) -> None:
    first = one(engine, job)
    assert one(engine, job.with_seed(4)) != first
    assert one(engine, replace(job, prompt="rocket")) != first
    for caching in (Caching("interval", 3), Caching("off"), Caching("speedup", 3.0)):
        assert one(engine, replace(job, caching=caching)) != first
        assert one(engine, job) == first
    assert one(engine, replace(job, sampler="EulerDiscreteScheduler")) != first
    assert one(engine, job) == first


def test_a_batch(engine: Engine, job: Job) -> None:
    jobs = [job, replace(job.with_seed(9), prompt="cactus", negative_prompt="green")]
    pictures = engine.generate(jobs)
    assert [picture.seed for picture in pictures] == [3, 9]
    for picture, own in zip(pictures, jobs, strict=True):
        (single,) = engine.generate([own])
        assert psnr(picture.image, single.image) > 40
        assert picture.trace.batch == 2
    with pytest.raises(ValueError, match="jobs of one kind"):
        engine.generate([job, replace(job, steps=3)])


def test_the_trace(engine: Engine, job: Job) -> None:
    (picture,) = engine.generate([job])
    trace = picture.trace
    assert len(trace.levels) == STEPS
    assert trace.levels[0] == "refresh"
    assert set(trace.levels) <= {"refresh", "partial", "reuse"}
    assert trace.flops_speedup > 1.5
    assert trace.forced == trace.programs == 0
    assert not trace.uncached_reasons
    assert trace.seconds.keys() == {"encode", "denoise", "decode"}
    assert all(seconds > 0 for seconds in trace.seconds.values())
    assert trace.as_dict()["steps"] == list(trace.levels)
    (deepcache,) = engine.generate([replace(job, caching=Caching("interval", 3))])
    assert deepcache.trace.levels == ("refresh", "reuse", "reuse") * 2


class Watcher:
    """Notes what it is told, and ends the run after so many steps."""

    def __init__(self, ends_after: int = 1000, previews: Sequence[int] = ()) -> None:
        self.ends_after, self.previews = ends_after, previews
        self.done: list[int] = []
        self.images: list[Image] = []

    def step(self, done: int, steps: int) -> None:
        self.done.append(done)
        if done >= self.ends_after:
            raise RunCancelled

    def wants_preview(self, done: int, steps: int) -> bool:
        return done in self.previews

    def preview(self, images: Sequence[Image]) -> None:
        self.images += images


def test_progress_and_previews(engine: Engine, job: Job) -> None:
    watcher = Watcher(previews=(2, 5))
    (picture,) = engine.generate([job], watcher)
    assert watcher.done == list(range(1, STEPS + 1))
    assert [image.size for image in watcher.images] == [(64, 64)] * 2
    assert digest(picture.image) == one(engine, job), "previews change the picture"
    assert psnr(watcher.images[1], picture.image) > psnr(watcher.images[0], picture.image)


@pytest.mark.parametrize("after", [1, 3])
def test_a_cancelled_run_leaves_nothing_behind(engine: Engine, job: Job, after: int) -> None:
    expected = one(engine, job)
    with pytest.raises(RunCancelled) as kept:  # with its traceback, and so the pipeline's variables
        engine.generate([job.with_seed(77)], Watcher(ends_after=after))
    assert engine.handle.stats.cache_bytes == 0
    del kept
    assert one(engine, job) == expected


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"width": 60}, "width"),
        ({"height": 100}, "height"),
        ({"sampler": "FlowMatchEulerDiscreteScheduler"}, "sampler"),
        ({"sampler": "../x"}, "sampler"),
        ({"lora": "red"}, "lora"),
    ],
)
def test_refused(engine: Engine, job: Job, change: dict[str, Any], field: str) -> None:
    with pytest.raises(JobError) as raised:
        engine.check(replace(job, **change))
    assert raised.value.field == field
    engine.check(job)


@pytest.mark.parametrize(
    ("sampler", "steps"), [("PNDMScheduler", 3), ("DDIMScheduler", 1001), ("", 1001)]
)
def test_steps_that_a_sampler_cannot_do_are_refused(
    engine: Engine, job: Job, sampler: str, steps: int
) -> None:
    with pytest.raises(JobError, match=f"Scheduler cannot do {steps}: ValueError: ") as raised:
        engine.check(replace(job, sampler=sampler, steps=steps))
    assert raised.value.field == "steps"
    engine.check(replace(job, sampler=sampler, steps=4))


def test_a_speedup_beyond_the_network_is_the_job_s_fault(engine: Engine, job: Job) -> None:
    expected = one(engine, job)
    with pytest.raises(JobError, match="caching: a speed-up of 100 is beyond this network"):
        engine.generate([replace(job, caching=Caching("speedup", 100.0))])
    assert one(engine, job) == expected


def test_what_it_says_of_itself(engine: Engine) -> None:
    about = engine.describe()
    assert (about["model"], about["steps"], about["width"], about["height"]) == (
        "emoji-sd",
        STEPS,
        64,
        64,
    )
    assert about["sampler"] == "DDIMScheduler"
    assert "EulerDiscreteScheduler" in about["samplers"]
    assert "found by watching a run" in about["schedule"][0]


def test_a_long_prompt_is_noted(engine: Engine, job: Job) -> None:
    longest = engine.pipeline.tokenizer.model_max_length
    (picture,) = engine.generate([replace(job, prompt="dog " * longest, steps=1)])
    assert f"of which the text encoder reads {longest}" in picture.notes[0]


def test_text_encoder_and_decoder_compiled(engine: Engine, job: Job) -> None:
    found = Engine.of(replace(engine.settings, backend="aot_eager", components="compile"))
    own = [found.pipeline.text_encoder, found.pipeline.vae.decoder]
    job = replace(job, caching=Caching("off"))
    (picture,) = found.generate([job])
    assert all("forward" in vars(one) for one in own)
    assert psnr(picture.image, engine.generate([job])[0].image) > 50
    with pytest.raises(DcompileError, match='components: expected "compile" or False'):
        EngineSettings(components=True)  # type: ignore[arg-type]


def test_an_unconditional_model() -> None:
    engine = Engine.of(EngineSettings("ddpm-emoji", interval=2, backend="eager", device="cpu"))
    job = replace(engine.default_job(seed=1), steps=4)
    (picture,) = engine.generate([job])
    assert picture.trace.levels == ("refresh", "reuse") * 2
    assert one(engine, job) == digest(picture.image)
    two = engine.generate([job, job.with_seed(2)])
    assert psnr(two[0].image, picture.image) > 40
    with pytest.raises(JobError, match="prompt: ddpm-emoji takes none"):
        engine.check(replace(job, prompt="dog"))
    with pytest.raises(JobError, match="makes pictures of"):
        engine.check(replace(job, width=job.width * 2))
    # The pipeline gives a sampler what only its own one takes.
    assert engine.describe()["samplers"] == ["DDIMScheduler"]
    assert samplers_for_programs(engine.pipeline) == [""]


# LoRA ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def adapters(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Two sets that change the picture."""
    from diffusers import StableDiffusionPipeline
    from peft import LoraConfig
    from peft.utils import get_peft_model_state_dict

    from dcompile.models.loading import load_pipeline

    found = {}
    for number, name in enumerate(("red", "round")):
        pipeline = load_pipeline("emoji-sd")
        config = LoraConfig(r=2, init_lora_weights=False, target_modules=["to_q", "to_v"])
        torch.manual_seed(number)
        pipeline.unet.add_adapter(config)
        folder = tmp_path_factory.mktemp(name)
        StableDiffusionPipeline.save_lora_weights(
            folder, unet_lora_layers=get_peft_model_state_dict(pipeline.unet)
        )
        found[name] = str(folder)
    return found


def test_sets_of_lora_weights(adapters: dict[str, str]) -> None:
    engine = Engine.of(
        EngineSettings("emoji-sd", interval=2, backend="eager", loras=adapters, device="cpu")
    )
    plain = Engine.of(EngineSettings("emoji-sd", interval=2, backend="eager", device="cpu"))
    job = replace(engine.default_job("dog", seed=3), steps=4)
    expected = {name: one(engine, replace(job, lora=name)) for name in ("", "red", "round")}
    assert len(set(expected.values())) == 3
    assert expected[""] == one(plain, job)
    captures = engine.handle.stats.captures
    for name in ("round", "red", "", "red", "round", ""):
        assert one(engine, replace(job, lora=name)) == expected[name]
    assert engine.handle.stats.captures == captures == 1


def test_saved_programs_fit_a_pipeline_with_sets(adapters: dict[str, str], tmp_path: Path) -> None:
    plain = Engine.of(EngineSettings("emoji-sd", interval=2, backend="eager", device="cpu"))
    job = replace(plain.default_job("dog", seed=3), steps=4)
    expected = one(plain, job)
    folder = plain.handle.save(tmp_path / "programs")
    settings = replace(plain.settings, loras=adapters, programs=str(folder), new_calls="uncached")
    engine = Engine.of(settings)
    assert one(engine, job) == expected
    (picture,) = engine.generate([replace(job, lora="red")])
    assert picture.trace.levels == ("refresh", "reuse") * 2
    assert not picture.trace.uncached_reasons
    assert digest(picture.image) != expected


def test_restored_programs_are_the_only_ones(tmp_path: Path) -> None:
    engine = Engine.of(EngineSettings("emoji-sd", interval=2, backend="eager", device="cpu"))
    job = replace(engine.default_job("dog"), steps=4)
    expected = one(engine, job)
    engine.handle.save(tmp_path / "programs")
    engine.generate([replace(job, width=72)])
    engine.restore(tmp_path / "programs")
    assert one(engine, job) == expected
    assert set(engine.generate([replace(job, width=72)])[0].trace.levels) == {"uncached"}
    with pytest.raises(ArtifactError):
        engine.restore(tmp_path / "none")
    assert set(engine.generate([job])[0].trace.levels) == {"uncached"}


def test_lora_weights_that_are_none(tmp_path: Path) -> None:
    settings = EngineSettings("emoji-sd", backend="eager", loras={"x": str(tmp_path)})
    with pytest.raises(ModelError, match="cannot load LoRA weights 'x'"):
        Engine.of(settings)
    settings = EngineSettings("ddpm-emoji", backend="eager", loras={"x": str(tmp_path)})
    with pytest.raises(ModelError, match="takes no LoRA weights"):
        Engine.of(settings)


# Pictures -----------------------------------------------------------------------------------------


def test_psnr() -> None:
    black, grey = (PIL.Image.new("RGB", (4, 4), (level,) * 3) for level in (0, 51))
    assert psnr(black, black) == math.inf
    assert psnr(black, grey) == pytest.approx(20 * math.log10(5))
    with pytest.raises(ValueError, match="expected a picture of size"):
        psnr(black, PIL.Image.new("RGB", (8, 4)))


@pytest.mark.parametrize(
    ("form", "quality", "exact"),
    [("png", 1, True), ("webp", 100, True), ("webp", 50, False), ("jpeg", 95, False)],
)
def test_files(engine: Engine, job: Job, form: str, quality: int, exact: bool) -> None:
    (picture,) = engine.generate([replace(job, steps=2)])
    found = PIL.Image.open(io.BytesIO(encoded(picture.image, form, quality)))
    assert found.format == form.upper()
    assert (digest(found.convert("RGB")) == digest(picture.image)) is exact
