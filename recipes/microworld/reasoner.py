"""Stages ``latents`` and ``reasoner``: a tiny Wan (TI2V) with its UMT5 text encoder, trained together.

Half of the noise levels in training are those of the four sampling steps, the others are uniform: the result is a
many-step model to distil that is already a fair few-step one.

The training videos have deliberate, documented flaws (`world.training_track`; their scheme is the setting `flaws`):
where the task has some colours it goes wrong, in every family in the same way (``move``: to another box; ``maze``:
straight through the blocks). The Reasoner therefore has systematic errors, which resampling does not mend, besides the
sampling noise of a small model.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKLWan, FlowMatchEulerDiscreteScheduler, WanImageToVideoPipeline, WanTransformer3DModel
from transformers import PreTrainedTokenizerFast, UMT5Config, UMT5EncoderModel

from recipes.microworld.attention import fast_attention
from recipes.microworld.clips import to_video
from recipes.microworld.training import Run, adopt, in_bfloat16, train
from vlmteacher.checkpoints.pretrained import load_network, load_tokenizer
from vlmteacher.distillation import distill
from vlmteacher.distillation.trainer import STATE
from vlmteacher.files import make_folder, replacing
from vlmteacher.microworld import world
from vlmteacher.microworld.export import export
from vlmteacher.microworld.tokenizer import kept_tokenizer
from vlmteacher.ops.backends import has_avx512_bf16

SIGMAS = (1.0, 0.75, 0.5, 0.25)
TEXT_TOKENS = 24


def prompts() -> list[str]:
    """Prompts of all families, for the tokenizer."""
    rng = np.random.default_rng(0)
    scenes = [world.sample_scene(rng, family) for family in world.FAMILIES for _ in range(300)]
    return [world.write_prompt(scene, rng) for scene in scenes]


def build(vocab_size: int, config: dict) -> tuple[WanTransformer3DModel, UMT5EncoderModel]:
    """The untrained transformer and text encoder."""
    transformer = WanTransformer3DModel(
        patch_size=(1, 2, 2),
        num_attention_heads=config["heads"],
        attention_head_dim=64,
        in_channels=24,
        out_channels=24,
        text_dim=128,
        freq_dim=128,
        ffn_dim=config["ffn_dim"],
        num_layers=config["layers"],
        rope_max_seq_len=32,
    )
    encoder = UMT5EncoderModel(
        UMT5Config(
            vocab_size=vocab_size,
            d_model=128,
            d_kv=32,
            d_ff=256,
            num_layers=2,
            num_heads=4,
            dropout_rate=0.0,
            pad_token_id=0,
            eos_token_id=0,
        )
    )
    return transformer, encoder


def encode_latents(run: Run) -> None:
    """Stage ``latents``: shards of normalised latents (the mode of the posterior) with their prompts."""
    config = run.config
    make_folder(run.out)
    vae = load_network(AutoencoderKLWan, run.path("vae/vae"), dtype=torch.float32).eval()
    mean = torch.tensor(vae.config.latents_mean).view(1, -1, 1, 1, 1)
    std = torch.tensor(vae.config.latents_std).view(1, -1, 1, 1, 1)
    for shard in range(config["shards"]):
        path = run.out / f"{shard:04d}.pt"
        if path.exists():
            continue
        rng = np.random.default_rng([config["seed"], shard])
        latents, texts = [], []
        with torch.no_grad():
            for _ in range(config["videos"] // 8):
                scenes = [world.sample_scene(rng, str(rng.choice(world.FAMILIES))) for _ in range(8)]
                texts += [world.write_prompt(s, rng) for s in scenes]
                x = to_video(np.stack([world.draw(world.training_track(s, config["flaws"])) for s in scenes]))
                with in_bfloat16():
                    z = vae.encode(x).latent_dist.mode()
                latents.append(((z.float() - mean) / std).half())
        with replacing(path) as temporary, temporary.open("wb") as file:
            torch.save({"latents": torch.cat(latents), "prompts": texts}, file)
        print(path, flush=True)


def train_reasoner(run: Run) -> None:
    """Stage ``reasoner``, from scratch or from the weights of the diffusers directory ``run.start``.

    The transformer is that of ``many_step/`` beside it, where a pair has one: the few-step one is distilled from it.
    """
    config, latents = run.config, run.path("latents")
    torch.manual_seed(config["seed"])
    tokenizer = kept_tokenizer((run.continues or run.out) / "tokenizer", prompts, 600)
    transformer, encoder = build(len(tokenizer), config)
    if run.start:
        many_step = run.start.with_name("many_step")
        source = many_step if many_step.exists() else run.start / "transformer"
        adopt(transformer, load_network(WanTransformer3DModel, source, dtype=torch.float32))
        known = load_network(UMT5EncoderModel, run.start / "text_encoder", dtype=torch.float32)
        adopt(encoder, known, tokenizer, load_tokenizer(run.start / "tokenizer"))
    table: dict[str, torch.Tensor] = {}
    shards: list[Path] = []
    bank = torch.empty(0)
    texts: list[str] = []

    def tokens(batch: list[str]) -> tuple[torch.Tensor, torch.Tensor]:
        for text in batch:
            if text not in table:
                row = tokenizer(text, padding="max_length", max_length=TEXT_TOKENS, truncation=True)
                table[text] = torch.tensor([row.input_ids, row.attention_mask])
        both = torch.stack([table[text] for text in batch])
        return both[:, 0], both[:, 1]

    def step(index: int, rng: np.random.Generator) -> tuple[torch.Tensor, dict[str, float]]:
        nonlocal bank, texts, shards
        if index % 200 == 0 or not shards:
            files = sorted(latents.glob("*.pt"))
            if files != shards:
                loaded = [torch.load(p, weights_only=True) for p in files]
                shards = files
                bank = torch.cat([d["latents"] for d in loaded])
                texts = [t for d in loaded for t in d["prompts"]]
        rows = rng.integers(len(bank), size=config["batch"])
        x0 = bank[rows].float()
        ids, mask = tokens([texts[i] for i in rows])
        sigma = torch.from_numpy(rng.choice(SIGMAS, size=len(rows), p=config["sigma_weights"])).float()
        anywhere = torch.from_numpy(rng.random(len(rows)) < config["uniform_share"])
        sigma = torch.where(anywhere, torch.from_numpy(rng.random(len(rows))).float(), sigma)
        torch.manual_seed(int(rng.integers(2**31)))
        noise = torch.randn_like(x0)
        s = sigma.view(-1, 1, 1, 1, 1)
        x = (1 - s) * x0 + s * noise
        x[:, :, 0] = x0[:, :, 0]
        per_frame = (x.shape[3] // 2) * (x.shape[4] // 2)
        timestep = (sigma * 1000)[:, None].repeat(1, x.shape[2] * per_frame)
        timestep[:, :per_frame] = 0
        with in_bfloat16(config["bf16"]), fast_attention():
            embeds = encoder(ids, attention_mask=mask).last_hidden_state * mask[..., None]
            v = transformer(x, timestep, embeds, return_dict=False)[0]
        error = (v.float() - (noise - x0))[:, :, 1:] ** 2
        errors = error.mean((1, 2, 3, 4))
        one_step = errors[sigma == 1.0].mean()
        return errors.mean(), {"one_step": float(one_step.detach()) if (sigma == 1.0).any() else 0.0}

    train(
        {"transformer": transformer, "encoder": encoder},
        step,
        run,
        warmup=300,
        save_every=500,
        log_every=100,
        ema=0.998,
    )
    vae = load_network(AutoencoderKLWan, run.path("vae/vae"), dtype=torch.float32)
    save_pipeline(run.out / "reasoner", transformer, encoder, tokenizer, vae)


def distil(run: Run) -> None:
    """Stage ``distil``: the four-step student of the many-step Reasoner, by DMD2 on instances with the flaws."""
    config = dict(run.config)
    videos, flaws, out = config.pop("videos"), config.pop("flaws"), run.path("videos")
    if config["dtype"] == "bfloat16" and not has_avx512_bf16():
        config["dtype"] = "float32"
    export(out, videos["count"], videos["seed"], flaws=flaws, chosen=world.FAMILIES)
    paths = {"reasoner": str(run.path("reasoner/reasoner")), "data": str(out), "out": str(run.out)}
    with fast_attention():
        distill.run(distill.DistillSettings.from_dict(config | paths), resume=(run.out / STATE).exists())


def save_pipeline(
    path: Path,
    transformer: WanTransformer3DModel,
    encoder: UMT5EncoderModel,
    tokenizer: PreTrainedTokenizerFast,
    vae: AutoencoderKLWan,
) -> None:
    """Write a diffusers directory, with the few-step settings in its ``reasoner.json``."""
    WanImageToVideoPipeline(
        tokenizer=tokenizer,
        text_encoder=encoder,
        vae=vae,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=1.0),
        transformer=transformer,
        image_processor=None,
        image_encoder=None,
        expand_timesteps=True,
    ).save_pretrained(path)
    settings = {
        "timesteps": [int(1000 * s) for s in SIGMAS],
        "shift": 1.0,
        "num_frames": world.NUM_FRAMES,
        "height": world.SIZE,
        "width": world.SIZE,
        "fps": world.FPS,
        "max_sequence_length": TEXT_TOKENS,
    }
    (path / "reasoner.json").write_text(json.dumps(settings, indent=2) + "\n")
