"""Small pipelines of every kind, and what a cached run of any has to give."""

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import builders
import numpy as np
import seam
import torch
from builders import (
    DDIM,
    SHALLOW,
    TEXT,
    adapter,
    bert,
    cascade_decoder,
    cascade_prior,
    controlnet,
    deepfloyd_upscaler,
    image,
    mel_vae,
    motion_adapter,
    picture_encoder,
    picture_extractor,
    pipeline,
    text_encoder,
    unconditional,
    unet,
    unet_xl,
    vae,
    vocoder,
    vq,
)
from diffusers import (
    AnimateDiffPipeline,
    AudioLDM2Pipeline,
    AudioLDMPipeline,
    AutoencoderKLTemporalDecoder,
    CMStochasticIterativeScheduler,
    ConsistencyModelPipeline,
    ControlNetXSAdapter,
    DDIMPipeline,
    DDPMPipeline,
    DDPMScheduler,
    DDPMWuerstchenScheduler,
    EulerDiscreteScheduler,
    HunyuanDiTPipeline,
    I2VGenXLPipeline,
    IFPipeline,
    IFSuperResolutionPipeline,
    Kandinsky3Pipeline,
    KandinskyV22ControlnetPipeline,
    KandinskyV22Pipeline,
    LatentConsistencyModelPipeline,
    LCMScheduler,
    LDMSuperResolutionPipeline,
    LDMTextToImagePipeline,
    MarigoldDepthPipeline,
    MarigoldNormalsPipeline,
    MusicLDMPipeline,
    PriorTransformer,
    SemanticStableDiffusionPipeline,
    StableCascadeDecoderPipeline,
    StableCascadePriorPipeline,
    StableDiffusionAdapterPipeline,
    StableDiffusionControlNetPipeline,
    StableDiffusionControlNetXSPipeline,
    StableDiffusionDepth2ImgPipeline,
    StableDiffusionGLIGENPipeline,
    StableDiffusionImageVariationPipeline,
    StableDiffusionImg2ImgPipeline,
    StableDiffusionInpaintPipeline,
    StableDiffusionInstructPix2PixPipeline,
    StableDiffusionLatentUpscalePipeline,
    StableDiffusionPAGPipeline,
    StableDiffusionPanoramaPipeline,
    StableDiffusionPipeline,
    StableDiffusionPipelineSafe,
    StableDiffusionUpscalePipeline,
    StableDiffusionXLAdapterPipeline,
    StableDiffusionXLControlNetPipeline,
    StableDiffusionXLImg2ImgPipeline,
    StableDiffusionXLInpaintPipeline,
    StableDiffusionXLPAGPipeline,
    StableDiffusionXLPipeline,
    StableVideoDiffusionPipeline,
    TextToVideoSDPipeline,
    UnCLIPPipeline,
    UnCLIPScheduler,
    UNet2DConditionModel,
)
from diffusers.pipelines.deprecated.unclip.text_proj import UnCLIPTextProjModel
from PIL import Image
from torch import Tensor, nn
from transformers import (
    ClapTextConfig,
    ClapTextModelWithProjection,
    GPT2Config,
    GPT2LMHeadModel,
    T5Config,
    T5EncoderModel,
)

from dcompile.api import Handle
from dcompile.passes import find_skip_connections
from dcompile.report.explain import DepthReport


def every_third(*steps: int) -> list[bool]:
    """Which steps refresh in runs of these lengths."""
    return [step % 3 == 0 for count in steps for step in range(count)]


def outermost(handle: Handle) -> DepthReport:
    """The cut at depth 0, with the shape of what is concatenated in the place of what is cached.

    Where less than that is cached, it is computed from it.
    """
    network = seam.networks_of(handle.module)[0]
    deep = find_skip_connections(network.graph_module, network.samples)[0].deep
    shape = tuple(deep.meta["val"].shape)
    return replace(handle.explain().depths[0], boundary_shapes=(shape,))


@contextmanager
def stale_features(
    network: nn.Module, cut: DepthReport, refreshed: Sequence[bool], lanes: int = 1
) -> Iterator[list[int]]:
    """The cached network without any graph: a hook feeds old features to where they are read.

    Args:
        network: not compiled.
        cut: where the outermost skip connection is read, and the shape of what is cached.
        refreshed: for each step whether it computes all features.
        lanes: calls of the network at each step.

    Yields:
        Numbers of the calls so far.
    """
    calls: list[int] = []
    kept: dict[int, Tensor] = {}

    def count(*_: Any) -> None:
        calls.append(len(calls))

    def replace(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        deep = next(value for value in (*args, *kwargs.values()) if isinstance(value, Tensor))
        for dim, size in enumerate(cut.boundary_shapes[0]):
            deep = deep.narrow(dim, 0, size)  # the skip's channels follow
        step, lane = divmod(calls[-1], lanes)
        if refreshed[step]:
            kept[lane] = deep.clone()
        else:
            deep.copy_(kept[lane])  # in the concatenation, which nobody else holds

    reader = network.get_submodule(cut.module_path)
    hooks = [
        network.register_forward_pre_hook(count),
        reader.register_forward_pre_hook(replace, with_kwargs=True),
    ]
    try:
        yield calls
    finally:
        for hook in hooks:
            hook.remove()


STEPS = 5


@dataclass(frozen=True)
class Case:
    """A pipeline, and one run of it.

    Attributes:
        build: a new pipeline; the weights are the same every time.
        arguments: of the run, beside those that all pipelines take.
        steps: how many it takes; all are one run's.
        refreshed: the steps that compute all features at interval 3.
        lanes: calls of the network at each step.
        deepcache: whether the paper's code can run it.
        network: the component that is made faster.
        several: the pipeline has several such, and it is given itself.
        note: for the table of what works.
    """

    build: Callable[[], Any]
    arguments: Callable[[], dict[str, Any]] = dict
    steps: int = STEPS
    refreshed: tuple[int, ...] = (0, 3)
    lanes: int = 1
    deepcache: bool = False
    network: str = "unet"
    several: bool = False
    note: str = ""

    def pipeline(self) -> Any:
        torch.manual_seed(0)
        pipe = self.build()
        pipe.set_progress_bar_config(disable=True)
        return pipe

    def run(self, pipe: Any) -> Tensor:
        """What it draws: latents where it hands them out."""
        torch.manual_seed(1)
        given = {
            "prompt": "a cat",
            "num_inference_steps": STEPS,
            "generator": torch.Generator().manual_seed(0),
            "output_type": "latent",
            "return_dict": False,
        }
        if "prompt_embeds" in (more := self.arguments()):
            del given["prompt"]
        taken = inspect.signature(pipe.__call__).parameters
        given = {name: value for name, value in given.items() if name in taken}
        return as_tensor(pipe(**given | more)[0])


def as_tensor(result: Any) -> Tensor:
    if isinstance(result, list):
        return torch.stack([as_tensor(item) for item in result])
    return torch.as_tensor(np.asarray(result)) if not isinstance(result, Tensor) else result


def controlled(kind: Any, make: Callable[..., Any] = unet, count: int = 1) -> Any:
    network = make()
    controls = [controlnet(network) for _ in range(count)]
    return pipeline(kind, unet=network, controlnet=controls if count > 1 else controls[0])


def with_image_prompt(pipe: Any) -> Any:
    """An IP-Adapter for image embeddings of 8 numbers."""
    torch.manual_seed(4)
    network = pipe.unet
    attention = {}
    for number, name in enumerate(n for n in network.attn_processors if "attn2" in n):
        width = network.get_submodule(name.removesuffix(".processor")).inner_dim
        for part in ("to_k_ip", "to_v_ip"):
            attention[f"{2 * number + 1}.{part}.weight"] = torch.randn(width, TEXT)
    projection = {
        "proj.weight": torch.randn(4 * TEXT, 8),
        "proj.bias": torch.randn(4 * TEXT),
        "norm.weight": torch.randn(TEXT),
        "norm.bias": torch.randn(TEXT),
    }
    network._load_ip_adapter_weights([{"image_proj": projection, "ip_adapter": attention}])
    return pipe


def image_prompt() -> dict[str, Any]:
    return {"ip_adapter_image_embeds": [torch.randn(2, 1, 8)]}


def stable_video() -> Any:
    return pipeline(
        StableVideoDiffusionPipeline,
        vae=AutoencoderKLTemporalDecoder(
            block_out_channels=(32, 32), down_block_types=("DownEncoderBlock2D",) * 2
        ),
        image_encoder=picture_encoder(224),
        feature_extractor=picture_extractor(224),
        unet=builders.stable_video(),
        scheduler=EulerDiscreteScheduler(),
    )


def photo() -> Image.Image:
    return Image.fromarray((255 * image()[0].permute(1, 2, 0).numpy()).astype(np.uint8))


def picture() -> dict[str, Any]:
    return {"image": image()}


def picture_and_mask() -> dict[str, Any]:
    mask = image(1)[:, :1].round()
    return {"image": image(), "mask_image": mask, "strength": 1.0, "height": 16, "width": 16}


def depth_arguments() -> dict[str, Any]:
    return {"image": image(), "processing_resolution": 0, "output_type": "np"}


def embeddings(width: int = TEXT, tokens: int = 5) -> dict[str, Tensor]:
    """Of a prompt and of no prompt, for pipelines whose text encoders are not needed then."""
    return {
        "prompt_embeds": torch.randn(1, tokens, width),
        "negative_prompt_embeds": torch.randn(1, tokens, width),
    }


def audioldm2() -> Any:
    t5 = T5Config(vocab_size=8, d_model=8, d_ff=8, d_kv=4, num_layers=1, num_heads=2)
    gpt2 = GPT2Config(vocab_size=8, n_embd=8, n_layer=1, n_head=2)
    return pipeline(
        AudioLDM2Pipeline,
        text_encoder_2=T5EncoderModel(t5),
        language_model=GPT2LMHeadModel(gpt2),
        unet=builders.audioldm2(),
        vocoder=vocoder(),
    )


def with_sound(kind: Any) -> Any:
    clap = ClapTextConfig(
        vocab_size=8,
        hidden_size=8,
        intermediate_size=8,
        num_hidden_layers=1,
        num_attention_heads=2,
        projection_dim=TEXT,
    )
    return pipeline(
        kind,
        vae=mel_vae(),
        text_encoder=ClapTextModelWithProjection(clap),
        unet=builders.audioldm(),
        vocoder=vocoder(),
    )


def audioldm2_prompt() -> dict[str, Any]:
    mask = torch.ones(1, 5, dtype=torch.long)
    return {
        "prompt_embeds": torch.randn(1, 5, 24),
        "negative_prompt_embeds": torch.randn(1, 5, 24),
        "generated_prompt_embeds": torch.randn(1, 5, TEXT),
        "negative_generated_prompt_embeds": torch.randn(1, 5, TEXT),
        "attention_mask": mask,
        "negative_attention_mask": mask,
    }


def audio_prompt() -> dict[str, Any]:
    return {
        "prompt_embeds": torch.randn(1, TEXT),
        "negative_prompt_embeds": torch.randn(1, TEXT),
        "output_type": "np",
    }


def hunyuan_prompt() -> dict[str, Any]:
    mask = torch.ones(1, 5, dtype=torch.long)
    return {
        **embeddings(),
        "prompt_embeds_2": torch.randn(1, 5, TEXT),
        "negative_prompt_embeds_2": torch.randn(1, 5, TEXT),
        "prompt_attention_mask": mask,
        "negative_prompt_attention_mask": mask,
        "prompt_attention_mask_2": mask,
        "negative_prompt_attention_mask_2": mask,
        "use_resolution_binning": False,
        "height": 16,
        "width": 16,
    }


def cascade_prompt() -> dict[str, Any]:
    return {
        **embeddings(),
        "prompt_embeds_pooled": torch.randn(1, 1, TEXT),
        "negative_prompt_embeds_pooled": torch.randn(1, 1, TEXT),
    }


def latent_upscaler() -> Any:
    network = builders.latent_upscaler(
        out_channels=5,
        time_cond_proj_dim=128 + TEXT,
        down_block_types=("KDownBlock2D", *["KCrossAttnDownBlock2D"] * 2),
        up_block_types=(*["KCrossAttnUpBlock2D"] * 2, "KUpBlock2D"),
        block_out_channels=(32, 64, 64),
        layers_per_block=2,
        attention_head_dim=8,
        upcast_attention=False,
    )
    return pipeline(
        StableDiffusionLatentUpscalePipeline, unet=network, scheduler=EulerDiscreteScheduler()
    )


def unclip() -> Any:
    torch.manual_seed(0)
    prior = PriorTransformer(
        num_attention_heads=2,
        attention_head_dim=4,
        num_layers=1,
        embedding_dim=TEXT,
        num_embeddings=16,
    )
    decoder = UNet2DConditionModel.from_config(
        builders.kandinsky22().config,
        in_channels=3,
        out_channels=6,
        encoder_hid_dim=None,
        encoder_hid_dim_type=None,
        addition_embed_type=None,
        class_embed_type="identity",
    )
    upscalers = [unconditional(in_channels=6, sample_size=16) for _ in range(2)]
    projection = UnCLIPTextProjModel(
        clip_embeddings_dim=TEXT, time_embed_dim=64, cross_attention_dim=TEXT
    )
    return pipeline(
        UnCLIPPipeline,
        prior=prior,
        decoder=decoder,
        text_encoder=text_encoder(projected=True),
        text_proj=projection,
        super_res_first=upscalers[0],
        super_res_last=upscalers[1],
        prior_scheduler=UnCLIPScheduler(prediction_type="sample"),
        decoder_scheduler=UnCLIPScheduler(variance_type="learned_range"),
        super_res_scheduler=UnCLIPScheduler(),
    )


def grounded() -> Any:
    return pipeline(StableDiffusionGLIGENPipeline, unet=builders.gligen(**SHALLOW))


def controlnet_xs() -> Any:
    network = unet(layers_per_block=2)  # an adapter has two, whatever the network has
    control = ControlNetXSAdapter.from_unet(
        network,
        size_ratio=0.5,
        conditioning_embedding_out_channels=(4, 8),
        num_attention_heads=2,
    )
    return pipeline(StableDiffusionControlNetXSPipeline, unet=network, controlnet=control)


CASES = {
    "StableDiffusionPipeline": Case(lambda: pipeline(StableDiffusionPipeline), deepcache=True),
    "StableDiffusionImg2ImgPipeline": Case(
        lambda: pipeline(StableDiffusionImg2ImgPipeline),
        lambda: {"image": image(), "strength": 0.81},
        steps=4,
        deepcache=True,
    ),
    "StableDiffusionInpaintPipeline": Case(
        lambda: pipeline(StableDiffusionInpaintPipeline, unet=unet(in_channels=9)),
        picture_and_mask,
        deepcache=True,
    ),
    "StableDiffusionXLPipeline": Case(
        lambda: pipeline(StableDiffusionXLPipeline, unet=unet_xl()), deepcache=True
    ),
    "StableDiffusionXLImg2ImgPipeline": Case(
        lambda: pipeline(StableDiffusionXLImg2ImgPipeline, unet=unet_xl()),
        lambda: {"image": image(), "strength": 0.81},
        steps=4,
        deepcache=True,
    ),
    "StableDiffusionXLInpaintPipeline": Case(
        lambda: pipeline(StableDiffusionXLInpaintPipeline, unet=unet_xl(in_channels=9)),
        picture_and_mask,
        deepcache=True,
    ),
    "StableDiffusionControlNetPipeline": Case(
        lambda: controlled(StableDiffusionControlNetPipeline), picture, deepcache=True
    ),
    "StableDiffusionControlNetPipeline, two ControlNets": Case(
        lambda: controlled(StableDiffusionControlNetPipeline, count=2),
        lambda: {"image": [image(), image(1)]},
        deepcache=True,
    ),
    "StableDiffusionXLControlNetPipeline": Case(
        lambda: controlled(StableDiffusionXLControlNetPipeline, unet_xl), picture, deepcache=True
    ),
    "StableDiffusionAdapterPipeline": Case(
        lambda: pipeline(StableDiffusionAdapterPipeline, adapter=adapter()), picture, deepcache=True
    ),
    "StableDiffusionXLAdapterPipeline": Case(
        lambda: pipeline(StableDiffusionXLAdapterPipeline, adapter=adapter(), unet=unet_xl()),
        picture,
        deepcache=True,
    ),
    "StableDiffusionPipeline, IP-Adapter": Case(
        lambda: with_image_prompt(pipeline(StableDiffusionPipeline)), image_prompt, deepcache=True
    ),
    "StableVideoDiffusionPipeline": Case(
        stable_video,
        lambda: {"image": photo(), "num_frames": 2, "height": 16, "width": 16},
        deepcache=True,
    ),
    "AnimateDiffPipeline": Case(
        lambda: pipeline(AnimateDiffPipeline, motion_adapter=motion_adapter()),
        lambda: {"num_frames": 2},
    ),
    "TextToVideoSDPipeline": Case(
        lambda: pipeline(TextToVideoSDPipeline, unet=builders.unet_3d()), lambda: {"num_frames": 2}
    ),
    "I2VGenXLPipeline": Case(
        lambda: pipeline(
            I2VGenXLPipeline,
            unet=builders.i2vgen_xl(),
            image_encoder=picture_encoder(8),
            feature_extractor=picture_extractor(8),
        ),
        lambda: {
            "image": photo(),
            "num_frames": 2,
            "height": 16,
            "width": 16,
            "clip_skip": None,
        },
    ),
    "AudioLDM2Pipeline": Case(audioldm2, audioldm2_prompt),
    "AudioLDMPipeline": Case(lambda: with_sound(AudioLDMPipeline), audio_prompt),
    "MusicLDMPipeline": Case(lambda: with_sound(MusicLDMPipeline), audio_prompt),
    "KandinskyV22Pipeline": Case(
        lambda: pipeline(KandinskyV22Pipeline, unet=builders.kandinsky22(), movq=vq()),
        lambda: {
            "image_embeds": torch.randn(1, 24),
            "negative_image_embeds": torch.randn(1, 24),
            "height": 16,
            "width": 16,
        },
    ),
    "Kandinsky3Pipeline": Case(
        lambda: pipeline(Kandinsky3Pipeline, unet=builders.kandinsky3(), movq=vq()),
        lambda: {
            **embeddings(24),
            "attention_mask": torch.ones(1, 5),
            "negative_attention_mask": torch.ones(1, 5),
            "height": 16,
            "width": 16,
        },
    ),
    "IFPipeline": Case(
        lambda: pipeline(IFPipeline, unet=builders.deepfloyd_if(), scheduler=DDPMScheduler()),
        lambda: {**embeddings(24), "height": 8, "width": 8, "output_type": "pt"},
    ),
    "IFSuperResolutionPipeline": Case(
        lambda: pipeline(
            IFSuperResolutionPipeline,
            unet=deepfloyd_upscaler(),
            scheduler=DDPMScheduler(),
            image_noising_scheduler=DDPMScheduler(),
        ),
        lambda: {
            **embeddings(24),
            "image": image(),
            "height": 16,
            "width": 16,
            "output_type": "pt",
        },
    ),
    "StableCascadePriorPipeline": Case(
        lambda: pipeline(
            StableCascadePriorPipeline, prior=cascade_prior(), scheduler=DDPMWuerstchenScheduler()
        ),
        lambda: {**cascade_prompt(), "height": 256, "width": 256},
        network="prior",
    ),
    "StableCascadeDecoderPipeline": Case(
        lambda: pipeline(
            StableCascadeDecoderPipeline,
            decoder=cascade_decoder(),
            scheduler=DDPMWuerstchenScheduler(),
            latent_dim_scale=4,
        ),
        lambda: {
            **cascade_prompt(),
            "image_embeddings": torch.randn(1, 4, 2, 2),
            "guidance_scale": 2.0,
        },
        network="decoder",
    ),
    "LDMTextToImagePipeline": Case(
        lambda: pipeline(LDMTextToImagePipeline, vqvae=vae(), bert=bert()),
        lambda: {"height": 64, "width": 64, "guidance_scale": 2.0, "output_type": "np"},
        deepcache=True,
    ),
    "LDMSuperResolutionPipeline": Case(
        lambda: pipeline(
            LDMSuperResolutionPipeline,
            vqvae=vq(latent_channels=3),
            unet=unconditional(in_channels=6),
        ),
        lambda: {"image": image(), "output_type": "np"},
        deepcache=True,
    ),
    "StableDiffusionUpscalePipeline": Case(
        lambda: pipeline(
            StableDiffusionUpscalePipeline,
            unet=unet(in_channels=7, num_class_embeds=1000),
            low_res_scheduler=DDPMScheduler(),
        ),
        picture,
        deepcache=True,
    ),
    "StableDiffusionLatentUpscalePipeline": Case(
        latent_upscaler,
        lambda: {"image": torch.randn(1, 4, 8, 8), "num_inference_steps": 8},
        steps=8,
        refreshed=(0, 3, 6),
    ),
    "StableDiffusionInstructPix2PixPipeline": Case(
        lambda: pipeline(StableDiffusionInstructPix2PixPipeline, unet=unet(in_channels=8)),
        picture,
        deepcache=True,
    ),
    "DDPMPipeline": Case(
        lambda: pipeline(DDPMPipeline, unet=unconditional(), scheduler=DDPMScheduler()),
        lambda: {"output_type": "np"},
        deepcache=True,
    ),
    "DDIMPipeline": Case(
        lambda: pipeline(DDIMPipeline, unet=unconditional()),
        lambda: {"output_type": "np"},
        deepcache=True,
    ),
    "MarigoldDepthPipeline": Case(
        lambda: pipeline(MarigoldDepthPipeline, unet=unet(in_channels=8)), depth_arguments
    ),
    "MarigoldNormalsPipeline": Case(
        lambda: pipeline(MarigoldNormalsPipeline, unet=unet(in_channels=8)), depth_arguments
    ),
    "MarigoldNormalsPipeline, ensemble": Case(
        lambda: pipeline(MarigoldNormalsPipeline, unet=unet(in_channels=8)),
        lambda: {**depth_arguments(), "ensemble_size": 2, "batch_size": 1},
        steps=2 * STEPS,  # two runs after each other
        refreshed=(0, 3, STEPS, STEPS + 3),
    ),
    "StableDiffusionPAGPipeline": Case(
        lambda: pipeline(StableDiffusionPAGPipeline), deepcache=True
    ),
    "StableDiffusionXLPAGPipeline": Case(
        lambda: pipeline(StableDiffusionXLPAGPipeline, unet=unet_xl()), deepcache=True
    ),
    "LatentConsistencyModelPipeline": Case(
        lambda: pipeline(
            LatentConsistencyModelPipeline,
            unet=unet(time_cond_proj_dim=12),
            scheduler=LCMScheduler.from_config(DDIM.config),
        ),
        deepcache=True,
    ),
    "ConsistencyModelPipeline": Case(
        lambda: pipeline(
            ConsistencyModelPipeline,
            unet=unconditional(),
            scheduler=CMStochasticIterativeScheduler(),
        ),
        lambda: {"output_type": "np"},
    ),
    "StableDiffusionGLIGENPipeline": Case(
        grounded,
        lambda: {
            "gligen_phrases": ["a hat"],
            "gligen_boxes": [[0.1, 0.2, 0.6, 0.7]],
            "gligen_scheduled_sampling_beta": 0.6,  # of 5 steps: switched off at step 3, a refresh
        },
        note="boxes are switched off at the first refresh after their share of the steps",
    ),
    "SemanticStableDiffusionPipeline": Case(
        lambda: pipeline(SemanticStableDiffusionPipeline),
        lambda: {"editing_prompt": ["a hat"], "edit_warmup_steps": 1},
        deepcache=True,
    ),
    "StableDiffusionPipelineSafe": Case(
        lambda: pipeline(StableDiffusionPipelineSafe), deepcache=True
    ),
    "HunyuanDiTPipeline": Case(
        lambda: pipeline(
            HunyuanDiTPipeline, transformer=builders.hunyuan_dit(), scheduler=DDPMScheduler()
        ),
        hunyuan_prompt,
        network="transformer",
    ),
    "StableDiffusionControlNetXSPipeline": Case(controlnet_xs, picture),
    "UnCLIPPipeline": Case(
        unclip,
        lambda: {
            "prior_num_inference_steps": 2,
            "decoder_num_inference_steps": STEPS,
            "super_res_num_inference_steps": 2,
            "output_type": "np",
        },
        network="decoder",
        several=True,
        note="cache_compile(pipe.decoder)",
    ),
    "StableDiffusionDepth2ImgPipeline": Case(
        lambda: pipeline(StableDiffusionDepth2ImgPipeline, unet=unet(in_channels=5)),
        lambda: {"image": image(), "depth_map": torch.rand(1, 16, 16), "strength": 1.0},
        deepcache=True,
    ),
    "StableDiffusionImageVariationPipeline": Case(
        lambda: pipeline(
            StableDiffusionImageVariationPipeline,
            image_encoder=picture_encoder(8),
            feature_extractor=picture_extractor(8),
        ),
        lambda: {"image": photo()},
        deepcache=True,
    ),
    "KandinskyV22ControlnetPipeline": Case(
        lambda: pipeline(
            KandinskyV22ControlnetPipeline,
            unet=UNet2DConditionModel.from_config(
                builders.kandinsky22().config, in_channels=8, addition_embed_type="image_hint"
            ),
            movq=vq(),
        ),
        lambda: {
            "image_embeds": torch.randn(1, 24),
            "negative_image_embeds": torch.randn(1, 24),
            "hint": image().repeat(1, 1, 4, 4),
            "height": 16,
            "width": 16,
            "output_type": "np",
        },
    ),
    "StableDiffusionPanoramaPipeline": Case(
        lambda: pipeline(
            StableDiffusionPanoramaPipeline,
            unet=unet(
                down_block_types=("DownBlock2D",) * 2,
                up_block_types=("UpBlock2D",) * 2,
                mid_block_type="UNetMidBlock2D",
            ),
        ),
        lambda: {"height": 512, "width": 576},
        refreshed=tuple(range(STEPS)),
        lanes=2,
        note="every step refreshes: nothing tells one part of the panorama from another",
    ),
}
