"""The model pairs of the benchmarks: the packaged one, and random weights of the real classes at larger sizes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor, nn

from vlmteacher.decoders.taehv import SurrogateDecoder
from vlmteacher.microworld.example import packaged_example
from vlmteacher.microworld.tokenizer import build_tokenizer
from vlmteacher.pipeline import TeacherPipeline
from vlmteacher.queries import ANSWER_INSTRUCTION, QuerySet
from vlmteacher.reasoners.base import Reasoner
from vlmteacher.reasoners.condition import Condition, Noise
from vlmteacher.reasoners.sampling import SamplerSettings as Sampling
from vlmteacher.reasoners.wan.reasoner import WanReasoner
from vlmteacher.settings import Settings
from vlmteacher.teachers.preprocessing import VisionSettings
from vlmteacher.teachers.qwen_vl import QwenVLTeacher

NEVER = 1e-9  # a threshold below every loss, so that a benchmark takes all of its steps
QUERIES = QuerySet(
    "Is the red ball on the green square at the end?",
    (
        "Does the ball keep its colour and its size in every frame?",
        "Is there exactly one ball in every frame?",
        "Does the ball stay outside of the blocked cells all the way?",
    ),
)


@dataclass(frozen=True)
class Instance:
    """One instance ready for its first step: the arguments of `Optimization`. seed: of the LoRA's initial weights."""

    reasoner: Reasoner
    decoder: SurrogateDecoder
    teacher: QwenVLTeacher
    condition: Condition
    noise: Noise
    queries: QuerySet
    settings: Settings
    seed: int = 0


@dataclass(frozen=True)
class Size:
    """The sizes of a pair with random weights.

    reasoner: layers, heads, channels of a head, hidden channels of the feed-forward. text: length and channels of the
    prompt's embeddings. latents: C, T, h, w. decoder: widths, patch. vision: layers, width, MLP width, heads.
    deepstack: the visual layers whose features the language model takes too. language: layers, width, MLP width, heads,
    key heads, channels of a head.
    """

    reasoner: tuple[int, int, int, int]
    text: tuple[int, int]
    latents: tuple[int, int, int, int]
    decoder: tuple[tuple[int, int, int, int], int]
    vision: tuple[int, int, int, int]
    deepstack: tuple[int, ...]
    language: tuple[int, int, int, int, int, int]
    vision_patch: int
    teacher_frames: int
    dtype: torch.dtype = torch.bfloat16

    def at(self, latent_frames: int) -> Size:
        """The same with another number of latent frames."""
        channels, _, height, width = self.latents
        return Size(**self.__dict__ | {"latents": (channels, latent_frames, height, width)})


MID = Size(
    reasoner=(8, 8, 64, 2048),
    text=(512, 4096),
    latents=(48, 9, 24, 24),
    decoder=((256, 128, 64, 64), 2),  # taew2_2
    vision=(12, 384, 1536, 6),
    deepstack=(3, 6, 9),
    language=(8, 512, 1536, 8, 4, 64),
    vision_patch=16,
    teacher_frames=24,
)
SMOKE = Size(
    reasoner=(2, 2, 16, 64),
    text=(12, 32),
    latents=(8, 3, 4, 6),
    decoder=((32, 16, 16, 8), 2),
    vision=(2, 32, 64, 2),
    deepstack=(0,),
    language=(2, 48, 64, 2, 1, 24),
    vision_patch=8,
    teacher_frames=5,  # odd: the last frame fills a pair
    dtype=torch.float32,
)
SIZES = {"smoke": SMOKE, "smoke-long": SMOKE.at(5), "mid": MID, "mid-long": MID.at(17)}
SHORTER = {"smoke-long": "smoke", "mid-long": "mid"}  # the same with fewer frames
PRESETS = ("tiny", *SIZES)


def build(preset: str, dtype: torch.dtype | None = None, device: str = "cpu") -> Instance:
    """Build the instance of a preset, the same at every call. dtype: None is the preset's own."""
    if preset == "tiny":
        return packaged(dtype or torch.float32, device)
    size = SIZES[preset]
    return random_weights(size, dtype or size.dtype, device)


def packaged(dtype: torch.dtype, device: str) -> Instance:
    """Build the instance of the packaged pair's example, with the questions that its Teacher writes."""
    pipe = TeacherPipeline.from_pretrained(dtype=dtype, device_map=device)
    prompt, image, seed, _ = packaged_example()
    size = {name: getattr(pipe.reasoner, name) for name in ("num_frames", "height", "width")}
    condition = pipe.reasoner.encode(prompt, image, **size)
    noise = pipe.reasoner.noise(condition, torch.Generator().manual_seed(seed))
    assert isinstance(pipe.teacher, QwenVLTeacher)
    return Instance(
        pipe.reasoner,
        pipe.decoder,
        pipe.teacher,
        condition,
        noise,
        pipe.teacher.write_queries(prompt, image),
        Settings(**pipe.defaults.to_dict() | {"threshold": NEVER, "max_steps": 10**6}),
        seed,
    )


def random_weights(size: Size, dtype: torch.dtype, device: str) -> Instance:
    """Build an instance of the real classes with random weights, scaled so that the losses depend on the frames."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    channels, _, height, width = size.latents
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        decoder = random_decoder(size)
        reasoner = random_reasoner(size, decoder, dtype)
        teacher = random_teacher(size, dtype)
    reasoner.to(device), teacher.to(device)
    latent_frames = size.latents[1]
    condition = Condition(
        draw(1, *size.text).to(device, dtype),
        draw(1, channels, 1, height, width).to(device),
        decoder.temporal_stride * (latent_frames - 1) + 1,
        decoder.spatial_stride * height,
        decoder.spatial_stride * width,
    )
    # Five updates must change the loss by more than bfloat16 rounds, or comparing losses proves nothing.
    settings = Settings(threshold=NEVER, max_steps=10**6, teacher_frames=size.teacher_frames, learning_rate=3e-3)
    noise = reasoner.noise(condition, generator)
    decoder = decoder.to(device, dtype).eval().requires_grad_(False)
    return Instance(reasoner, decoder, teacher, condition, noise, QUERIES, settings)


def random_decoder(size: Size) -> SurrogateDecoder:
    """A surrogate decoder with random weights, whose frames are grey on average."""
    widths, patch = size.decoder
    decoder = SurrogateDecoder(size.latents[0], widths, patch=patch)
    convolutions = [layer for layer in decoder.modules() if isinstance(layer, nn.Conv2d)]
    for layer in convolutions:
        nn.init.normal_(layer.weight, std=layer.weight[0].numel() ** -0.5)
    with torch.no_grad():
        last = convolutions[-1]
        assert last.bias is not None
        last.bias.fill_(0.5)  # mid grey: away from the clamp, where gradients are lost
    return decoder


def random_reasoner(size: Size, decoder: SurrogateDecoder, dtype: torch.dtype) -> WanReasoner:
    """A Wan TI2V. Its VAE and text encoder, which no step calls, are as small as possible."""
    from diffusers import AutoencoderKLWan, WanTransformer3DModel
    from transformers import UMT5Config, UMT5EncoderModel

    layers, heads, head_dim, ffn = size.reasoner
    channels = size.latents[0]
    transformer = WanTransformer3DModel(
        num_layers=layers,
        num_attention_heads=heads,
        attention_head_dim=head_dim,
        ffn_dim=ffn,
        in_channels=channels,
        out_channels=channels,
        text_dim=size.text[1],
        freq_dim=min(256, 2 * head_dim),
    )
    vae = AutoencoderKLWan(
        base_dim=8,
        z_dim=channels,
        dim_mult=[1, 1, 1],
        num_res_blocks=1,
        temperal_downsample=[True, True],
        latents_mean=[0.0] * channels,
        latents_std=[1.0] * channels,
        scale_factor_temporal=decoder.temporal_stride,
        scale_factor_spatial=decoder.spatial_stride,
    )
    text_encoder = UMT5EncoderModel(UMT5Config(vocab_size=8, d_model=8, d_kv=8, d_ff=8, num_layers=1, num_heads=1))
    with TemporaryDirectory() as directory:  # `from_pretrained` keeps some modules in float32
        transformer.save_pretrained(directory)
        transformer = WanTransformer3DModel.from_pretrained(directory, torch_dtype=dtype)
    return WanReasoner(transformer, vae, text_encoder, None, True, Sampling(fps=8.0))


def qwen3_vl(
    vision: Sequence[int], language: Sequence[int], deepstack: Sequence[int], patch: int, vocabulary: int | None = None
) -> tuple[Any, Any]:
    """Return configuration and tokenizer of a Qwen3-VL whose vocabulary covers `QUERIES`.

    vision: depth, width, MLP width, heads; language: depth, width, MLP width, query heads, key heads, head width.
    """
    from transformers import Qwen3VLConfig

    tokenizer = build_tokenizer(
        [*QUERIES.questions, ANSWER_INSTRUCTION, "<0.123456789 seconds> user assistant Yes No"] * 2, vocab_size=600
    )
    ids = tokenizer.convert_tokens_to_ids
    depth, width, mlp, heads = vision
    layers, hidden, inner, q_heads, kv_heads, head_dim = language
    third = head_dim // 6
    config = Qwen3VLConfig(
        text_config={
            "vocab_size": vocabulary or len(tokenizer),
            "hidden_size": hidden,
            "intermediate_size": inner,
            "num_hidden_layers": layers,
            "num_attention_heads": q_heads,
            "num_key_value_heads": kv_heads,
            "head_dim": head_dim,
            "max_position_embeddings": 262144,
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 5e6,
                "mrope_section": [head_dim // 2 - 2 * third, third, third],
                "mrope_interleaved": True,
            },
            "pad_token_id": tokenizer.pad_token_id,
        },
        vision_config={
            "depth": depth,
            "hidden_size": width,
            "intermediate_size": mlp,
            "num_heads": heads,
            "patch_size": patch,
            "temporal_patch_size": 2,
            "spatial_merge_size": 2,
            "out_hidden_size": hidden,
            "num_position_embeddings": 2304,
            "deepstack_visual_indexes": list(deepstack),
        },
        image_token_id=ids("<|image_pad|>"),
        video_token_id=ids("<|video_pad|>"),
        vision_start_token_id=ids("<|vision_start|>"),
        vision_end_token_id=ids("<|vision_end|>"),
        tie_word_embeddings=True,
    )
    return config, tokenizer


def random_teacher(size: Size, dtype: torch.dtype) -> QwenVLTeacher:
    """A Qwen3-VL with random weights and a tokenizer for `QUERIES`."""
    from transformers import Qwen3VLForConditionalGeneration

    config, tokenizer = qwen3_vl(size.vision, size.language, size.deepstack, size.vision_patch)
    model = Qwen3VLForConditionalGeneration(config)
    # The stock initialisation (0.02) is nearly constant at these sizes: losses and gradients would be meaningless.
    for weight in model.parameters():
        if weight.dim() > 1:
            nn.init.normal_(weight, std=math.prod(weight.shape[1:]) ** -0.5)
    video = VisionSettings(patch_size=size.vision_patch, min_pixels=1024)
    return QwenVLTeacher(model.to(dtype), tokenizer, video)
