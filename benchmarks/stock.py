"""The baseline: test-time optimisation written with diffusers, peft and transformers as their documentation teaches.

It uses none of this library's operators: PEFT LoRA with float32 adapters, eager modules, TAEHV in plain torch decoding
every frame, pixels by plain torch, one pass of the VLM per question, `AdamW`. Two optimisations are included, so that
no ratio rests on them: the VLM's Conv3d patch embedding, very slow on CPUs, is replaced by the equal linear layer, and
its head computes the answer's positions only (`logits_to_keep`).
"""

from __future__ import annotations

import copy
import time
import warnings
from collections.abc import Callable
from typing import Any, Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.presets import PRESETS, Instance, build
from benchmarks.timing import argument_parser, parsed
from vlmteacher.lora.adapter import remove_lora, target_modules
from vlmteacher.ops.linear import FrozenLinear
from vlmteacher.optimization.objective import GRADIENT_CLIP
from vlmteacher.teachers.prompt import Clip
from vlmteacher.teachers.visual_checkpoint import LinearPatchEmbed

Variant = Literal["checkpointed", "plain", "compiled"]
VARIANTS: tuple[Variant, ...] = get_args(Variant)
PARTS = (
    "reasoner_forward",
    "decode_forward",
    "teacher_forward",
    "teacher_backward",
    "decode_backward",
    "reasoner_backward",
    "update",
)


class Watch:
    """Records when each part of a step ends. A part of the backward ends when the gradient of a tensor is known.

    on_mark: called with the name of every part that has ended.
    """

    def __init__(self, device: str = "cpu", on_mark: Callable[[str], object] = lambda part: None) -> None:
        self.device, self.on_mark = device, on_mark
        self.ends: dict[str, float] = {}
        self.start = self._now()

    def _now(self) -> float:
        if self.device.startswith("cuda"):
            torch.cuda.synchronize()
        return time.perf_counter()

    def mark(self, part: str) -> None:
        """Record that `part` ends now."""
        self.ends[part] = self._now()
        self.on_mark(part)

    def at_gradient(self, tensor: Tensor, part: str) -> None:
        """Record the end of `part` when the backward has computed the gradient of `tensor`."""
        if tensor.requires_grad:
            tensor.register_hook(lambda grad: self.mark(part))

    def seconds(self) -> dict[str, float]:
        """Seconds of each of `PARTS`. Raises RuntimeError when a part has not ended, or not in this order."""
        ends = [self.start, *(self.ends.get(part, float("nan")) for part in PARTS)]
        seconds = {part: end - begin for part, begin, end in zip(PARTS, ends, ends[1:], strict=False)}
        if not all(value >= 0 for value in seconds.values()):
            raise RuntimeError(f"the parts of the step did not end one after another: {seconds}")
        return seconds


class StockLoop:
    """Test-time optimisation of one instance, on copies of its models, or on the models themselves (`copies`).

    `close()` leaves its models as they were.

    variant: "checkpointed", with gradient checkpointing of transformer and VLM (the decoder's code offers none);
    "plain", without; "compiled", without and under `torch.compile`, block by block as diffusers advises
    (`compile_repeated_blocks`): the whole Qwen3-VL breaks into dozens of graphs where it reads token values. The
    decoder stays eager: torch 2.13's inductor gives a wrong gradient of it on the CPU (docs/results/performance.md).
    """

    def __init__(self, instance: Instance, variant: Variant = "checkpointed", copies: bool = True) -> None:
        from diffusers.training_utils import cast_training_params
        from peft import LoraConfig

        self.instance, self.variant = instance, variant
        settings = instance.settings
        models: Any = instance.reasoner.transformer, instance.decoder, instance.teacher.model
        self.transformer, self.decoder, self.vlm = copy.deepcopy(models) if copies else models
        visual = self.vlm.model.visual
        self._patch_embed = visual.patch_embed
        if not isinstance(visual.patch_embed, LinearPatchEmbed):
            visual.patch_embed = LinearPatchEmbed(visual.patch_embed)
        self.modules: tuple[nn.Module, ...] = (self.transformer, self.decoder, self.vlm)
        self._linears = [layer for model in self.modules for layer in model.modules() if type(layer) is FrozenLinear]
        for layer in self._linears:
            layer.__class__ = nn.Linear
        for model in self.modules:
            model.requires_grad_(False)

        targets = target_modules(self.transformer)
        remove_lora(self.transformer)
        self.transformer.add_adapter(
            LoraConfig(r=settings.rank, lora_alpha=settings.rank, target_modules=targets), adapter_name="default"
        )
        cast_training_params(self.transformer, torch.float32)
        self.parameters = [parameter for parameter in self.transformer.parameters() if parameter.requires_grad]
        self.optimizer = torch.optim.AdamW(self.parameters, lr=settings.learning_rate, weight_decay=0.0)
        if variant == "checkpointed":
            self.transformer.enable_gradient_checkpointing()
            self.vlm.train()  # transformers checkpoints in training mode only; Qwen3-VL has no dropout
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", FutureWarning)
                self.vlm.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        elif variant == "compiled":
            self.transformer.compile_repeated_blocks()
            for block in (*visual.blocks, *self.vlm.model.language_model.layers):
                block.compile()

        self.indices = torch.linspace(0, instance.condition.num_frames - 1, settings.teacher_frames).round().tolist()
        self.indices = [int(index) for index in self.indices]
        self.questions: list[dict[str, Any]] | None = None

    def close(self) -> None:
        """Take the LoRA and the checkpoints off the models."""
        remove_lora(self.transformer)
        for layer in self._linears:
            layer.__class__ = FrozenLinear
        self.transformer.disable_gradient_checkpointing()
        self.vlm.model.visual.patch_embed = self._patch_embed
        self.vlm.gradient_checkpointing_disable()
        self.vlm.eval()

    def loss(self, watch: Watch | None = None) -> Tensor:
        """The Teacher's loss on the one-step prediction."""
        watch = watch or Watch()
        latents = self.predict_clean()
        watch.at_gradient(latents, "decode_backward")
        watch.mark("reasoner_forward")

        frames = self.decoder.decode_batch(latents)[0][self.indices]
        watch.at_gradient(frames, "teacher_backward")
        watch.mark("decode_forward")

        losses = torch.stack(self.losses(*self.pixels(frames)))
        watch.mark("teacher_forward")

        goal, process = losses[0], losses[1:]
        mix = self.instance.settings.goal_weight
        return mix * goal + (1 - mix) * process.mean() if len(process) else goal

    def step(self, watch: Watch | None = None) -> float:
        """Make one update and return the loss before it."""
        watch = watch or Watch()
        loss = self.loss(watch)
        self.optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.parameters, GRADIENT_CLIP)
        watch.mark("reasoner_backward")
        self.optimizer.step()
        value = loss.item()
        watch.mark("update")
        return value

    def predict_clean(self) -> Tensor:
        """Predict z0 = z1 - v as `WanImageToVideoPipeline` (expand_timesteps) or `WanPipeline` does at t = 1000.

        Returns latents (1, C, T, h, w), differentiable.
        """
        condition, latents = self.instance.condition, self.instance.noise.z1
        timestep = torch.full((1,), 1000.0, device=latents.device)
        mask = torch.ones_like(latents[:, :1])
        first = latents
        if condition.first_frame is not None:
            mask[:, :, 0] = 0
            first = condition.first_frame
            timestep = (mask[0][0][:, ::2, ::2] * 1000).flatten()[None]
        velocity = self.transformer(
            hidden_states=((1 - mask) * first + mask * latents).to(self.transformer.dtype),
            timestep=timestep,
            encoder_hidden_states=condition.prompt_embeds,
            return_dict=False,
        )[0]
        return (1 - mask) * first + mask * (latents - velocity.float())

    def pixels(self, frames: Tensor) -> tuple[Tensor, Tensor]:
        """`Qwen3VLVideoProcessor` in differentiable torch: frames (K, 3, H, W) -> patch rows (N, D) and grid (1, 3)."""
        from transformers.models.qwen3_vl.video_processing_qwen3_vl import smart_resize

        video = self.instance.teacher.video
        pair, patch, merge = video.temporal_patch_size, video.patch_size, video.merge_size
        limits = {"min_pixels": video.min_pixels, "max_pixels": video.max_pixels}
        size = smart_resize(
            max(len(frames), pair), *frames.shape[-2:], temporal_factor=pair, factor=patch * merge, **limits
        )
        frames = frames.float()
        if tuple(frames.shape[-2:]) != tuple(size):
            frames = F.interpolate(frames, size=size, mode="bicubic", align_corners=False, antialias=True)
        mean, std = (frames.new_tensor(values)[:, None, None] for values in (video.image_mean, video.image_std))
        frames = (frames - mean) / std
        frames = torch.cat([frames, frames[-1:].expand(-len(frames) % pair, -1, -1, -1)])
        t, h, w = len(frames) // pair, size[0] // patch, size[1] // patch
        patches = frames.view(t, pair, 3, h // merge, merge, patch, w // merge, merge, patch)
        rows = patches.permute(0, 3, 6, 4, 7, 2, 1, 5, 8).reshape(t * h * w, -1)
        return rows, torch.tensor([[t, h, w]], device=frames.device)

    def losses(self, pixels: Tensor, grid: Tensor) -> list[Tensor]:
        """-log P("Yes") of each question, by one pass over video and question for every question."""
        if self.questions is None:
            self.questions = self._tokenized(grid)
        losses = []
        for question in self.questions:
            answer = question["answer"]
            logits = self.vlm(
                input_ids=question["input_ids"],
                mm_token_type_ids=question["mm_token_type_ids"],
                pixel_values_videos=pixels,
                video_grid_thw=grid,
                use_cache=False,
                logits_to_keep=len(answer) + 1,
            ).logits
            losses.append(F.cross_entropy(logits[0, :-1].float(), answer, reduction="sum"))
        return losses

    def _tokenized(self, grid: Tensor) -> list[dict[str, Any]]:
        """The prompts, answer included: the same tokens as ours, which are the processor's."""
        teacher, device = self.instance.teacher, grid.device
        height, width = (int(patches) * teacher.video.patch_size for patches in grid[0, 1:])
        clip = Clip(tuple(self.indices), self.instance.reasoner.fps, (height, width))
        questions = []
        for prompt, answer in teacher.chats(clip, self.instance.queries.questions):
            ids = torch.tensor([prompt + answer], device=device)
            types = 2 * (ids == self.vlm.config.video_token_id).int()
            target = torch.tensor(answer, device=device)
            questions.append({"input_ids": ids, "mm_token_type_ids": types, "answer": target})
        return questions


def main() -> None:
    parser = argument_parser(__doc__ or "")
    parser.add_argument("--preset", default="tiny", choices=PRESETS)
    parser.add_argument("--variant", default="checkpointed", choices=VARIANTS)
    parser.set_defaults(dtype=None, pairs=5)
    settings = parsed(parser)
    dtype = getattr(torch, settings.dtype) if settings.dtype else None
    loop = StockLoop(build(settings.preset, dtype, settings.device), settings.variant)
    for step in range(settings.pairs):
        watch = Watch(settings.device)
        loss = loop.step(watch)
        parts = watch.seconds()
        print(f"step {step}: loss {loss:.6f}, {sum(parts.values()):.2f} s: ", end="")
        print(", ".join(f"{part} {seconds:.2f}" for part, seconds in parts.items()), flush=True)


if __name__ == "__main__":
    main()
