"""Qwen3-VL as the Teacher, on transformers' own `Qwen3VLForConditionalGeneration`."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import cycle
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vlmteacher.errors import InputError
from vlmteacher.queries import ANSWER_INSTRUCTION, QuerySet, QueryStyle, ask_for_queries, query_prompt
from vlmteacher.teachers.base import Teacher, read_style
from vlmteacher.teachers.preprocessing import VisionSettings, preprocess_image, preprocess_video, read_settings
from vlmteacher.teachers.quantization import Quantize, check_stays, is_quantized, load_model

if TYPE_CHECKING:
    from PIL.Image import Image

ANSWER = "Yes"
MAX_NEW_TOKENS = 256
IMAGE_PAD, VIDEO_PAD = "<|image_pad|>", "<|video_pad|>"
VISION_START, VISION_END = "<|vision_start|>", "<|vision_end|>"
TEXT_TOKEN, IMAGE_TOKEN, VIDEO_TOKEN = 0, 1, 2  # transformers' mm_token_type_ids


def question_text(question: str) -> str:
    """What follows the video in the prompt of one question."""
    return question.strip() + ANSWER_INSTRUCTION


def video_placeholder(
    frame_indices: Sequence[int], fps: float, tokens_per_patch: int, temporal_patch_size: int = 2
) -> str:
    """The video's part of the prompt: for each temporal patch (frame pair) its time in seconds and its visual tokens.

    The time is the mean of the first and last frame's; the last frame is repeated to fill a patch.
    tokens_per_patch: merged visual tokens of one temporal patch. Source: transformers, processing_qwen3_vl.py.
    """
    indices = list(frame_indices) + [frame_indices[-1]] * (-len(frame_indices) % temporal_patch_size)
    tokens = VISION_START + VIDEO_PAD * tokens_per_patch + VISION_END
    starts = range(0, len(indices), temporal_patch_size)
    times = ((indices[i] / fps + indices[i + temporal_patch_size - 1] / fps) / 2 for i in starts)
    return "".join(f"<{time:.1f} seconds>{tokens}" for time in times)


class LinearPatchEmbed(nn.Module):
    """The vision tower's patch embedding as the matrix product that it is: its Conv3d's stride equals its kernel.

    Conv3d is slow here, on the CPU above all. Keeps the stock parameter names.
    """

    def __init__(self, stock: nn.Module) -> None:
        super().__init__()
        self.proj: nn.Conv3d = stock.proj

    def forward(self, patches: Tensor) -> Tensor:
        weight = self.proj.weight
        return F.linear(patches.to(weight.dtype), weight.flatten(1), self.proj.bias)


class QwenVLTeacher(Teacher):
    """A frozen Qwen3-VL.

    Args:
        model: `Qwen3VLForConditionalGeneration`; it is frozen, set to evaluation mode and given `LinearPatchEmbed`.
        tokenizer: its tokenizer, with a chat template.
        video, image: settings of the preprocessing.
        style: how it is asked for queries.

    Raises InputError when the tokenizer has no chat template.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        video: VisionSettings,
        image: VisionSettings | None = None,
        style: QueryStyle | None = None,
    ) -> None:
        if not getattr(tokenizer, "chat_template", None):
            raise InputError("the teacher's tokenizer has no chat template: take an instruction-tuned checkpoint")
        self.model = model.requires_grad_(False).eval()
        visual = self.model.model.visual
        if not isinstance(visual.patch_embed, LinearPatchEmbed):
            visual.patch_embed = LinearPatchEmbed(visual.patch_embed)
        self.quantized = is_quantized(model)
        self.tokenizer = tokenizer
        self.video = video
        self.image = image or video
        self.style = style or QueryStyle()

    @classmethod
    def from_pretrained(
        cls,
        path_or_id: str,
        dtype: torch.dtype = torch.float32,
        local_files_only: bool = False,
        quantize: Quantize | None = None,
        device: torch.device | None = None,
    ) -> QwenVLTeacher:
        """Load model, tokenizer and processor settings from a local directory or a hub id."""
        from transformers import AutoTokenizer, Qwen3VLForConditionalGeneration

        try:
            tokenizer = AutoTokenizer.from_pretrained(path_or_id, local_files_only=local_files_only)
            model = load_model(
                Qwen3VLForConditionalGeneration,
                path_or_id,
                dtype,
                quantize,
                device,
                local_files_only=local_files_only,
            )
        except (OSError, ValueError) as error:
            reason = str(error).strip().splitlines()[0]
            raise InputError(f"teacher {path_or_id!r} cannot be loaded: {reason}") from error
        settings = read_settings(path_or_id, model.config.vision_config, local_files_only)
        return cls(model, tokenizer, *settings, read_style(path_or_id, local_files_only))

    @property
    def device(self) -> torch.device:
        return self.model.device

    def to(self, device: str | torch.device | None = None, dtype: torch.dtype | None = None) -> QwenVLTeacher:
        if self.quantized:
            check_stays(self.model, device, dtype)
            return self
        self.model.to(device=device or self.device, dtype=dtype or self.model.dtype)
        return self

    def losses(self, frames: Tensor, frame_indices: Sequence[int], fps: float, queries: QuerySet) -> Tensor:
        """See `Teacher.losses`. The video is encoded once; all questions go through the language model as one batch."""
        if frames.dim() != 4 or frames.shape[1] != 3 or len(frames) == 0:
            raise InputError(f"frames must be (K, 3, H, W) with K >= 1, not {tuple(frames.shape)}")
        if len(frame_indices) != len(frames):
            raise InputError(f"{len(frame_indices)} frame indices for {len(frames)} frames")
        if not fps > 0:
            raise InputError(f"fps must be positive, not {fps}")
        pixels, grid = preprocess_video(frames.to(self.device), self.video)
        tokens_per_patch = int(grid[0, 1] * grid[0, 2]) // self.video.merge_size**2
        placeholder = video_placeholder(frame_indices, fps, tokens_per_patch, self.video.temporal_patch_size)
        prompts, answers = zip(*(self._question_ids(q, placeholder) for q in queries.questions), strict=True)

        # The last answer token is only a target. Padding stands on the right, where causal attention never looks: no
        # attention mask is needed, which keeps the fast causal path.
        rows = [torch.tensor(prompt + answer[:-1]) for prompt, answer in zip(prompts, answers, strict=True)]
        mask = nn.utils.rnn.pad_sequence([torch.ones_like(row) for row in rows], batch_first=True)
        input_ids = nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=self._pad_token_id)
        grids = grid.expand(len(rows), 3)
        positions, _ = self.model.model.get_rope_index(
            input_ids, self._token_types(input_ids), video_grid_thw=grids, attention_mask=mask
        )
        video = self.model.model.get_video_features(pixels, grid.to(self.device), return_dict=True)
        video.pooler_output = video.pooler_output * len(rows)
        video.deepstack_features = [features * len(rows) for features in video.deepstack_features]
        hidden = self.model.model(
            input_ids=input_ids.to(self.device),
            position_ids=positions.to(self.device),
            mm_encoder_outputs={"video": video},
            use_cache=False,
        ).last_hidden_state
        # Only the answer's positions reach the head: position i predicts token i + 1.
        sizes = [len(answer) for answer in answers]
        places = torch.cat([torch.arange(n) + len(p) - 1 for p, n in zip(prompts, sizes, strict=True)])
        owners = torch.arange(len(rows)).repeat_interleave(torch.tensor(sizes))
        targets = torch.tensor([token for answer in answers for token in answer], device=self.device)
        logits = self.model.lm_head(hidden[owners.to(self.device), places.to(self.device)]).float()
        per_token = F.cross_entropy(logits, targets, reduction="none")
        return per_token.new_zeros(len(rows)).index_add(0, owners.to(self.device), per_token)

    def write_queries(self, prompt: str, image: Image | None = None) -> QuerySet:
        """See `Teacher.write_queries`. Greedy first; the one retry is sampled, with a seed of its own."""
        if not prompt.strip():
            raise InputError("the prompt is empty: say what the video must show")
        return ask_for_queries(
            self.style, lambda later, sample: self._generate(self._query_inputs(prompt, image, later), sample)
        )

    def _query_inputs(self, prompt: str, image: Image | None, later: Sequence[str] = ()) -> dict[str, Tensor]:
        """What `generate` takes to write the queries of a task, or to mend them after `later` turns."""
        vision: dict[str, Tensor] = {}
        placeholder = ""
        if image is not None:
            rgb = image.convert("RGB")
            pixels = torch.frombuffer(bytearray(rgb.tobytes()), dtype=torch.uint8).view(rgb.height, rgb.width, 3)
            values, grid = preprocess_image(pixels.permute(2, 0, 1) / 255, self.image)
            placeholder = VISION_START + IMAGE_PAD * (int(grid.prod()) // self.image.merge_size**2) + VISION_END
            vision = {"pixel_values": values, "image_grid_thw": grid}
        text = query_prompt(prompt, self.style.query_instruction)
        ids = torch.tensor([self._encode(self._chat(text, "image", placeholder, later), placeholder)])
        inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "mm_token_type_ids": self._token_types(ids)}
        return {name: value.to(self.device) for name, value in (inputs | vision).items()}

    @torch.no_grad()
    def _generate(self, inputs: dict[str, Tensor], sample: bool) -> str:
        how: dict[str, Any] = (
            {"temperature": 0.7, "top_p": 0.9, "top_k": 0}
            if sample
            else dict.fromkeys(("temperature", "top_p", "top_k"))
        )
        devices = [self.device] if self.device.type == "cuda" else []
        with torch.random.fork_rng(devices=devices):  # generate() draws from the global generators
            torch.manual_seed(0)
            output = self.model.generate(
                **inputs,
                do_sample=sample,
                **how,
                max_new_tokens=MAX_NEW_TOKENS,
                eos_token_id=self.tokenizer.eos_token_id,
                pad_token_id=self._pad_token_id,
            )
        return self.tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)

    def _chat(self, text: str, modality: str, placeholder: str, later: Sequence[str] = ()) -> str:
        """One user turn and `later` ones, in the checkpoint's own template, with its vision token spelled out."""
        content = [{"type": "text", "text": text}]
        if placeholder:
            content.insert(0, {"type": modality})
        messages = [{"role": "user", "content": content}]
        for turn, role in zip(later, cycle(("assistant", "user")), strict=False):
            messages.append({"role": role, "content": [{"type": "text", "text": turn}]})
        chat = self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        pad = {"image": IMAGE_PAD, "video": VIDEO_PAD}[modality]
        return chat.replace(VISION_START + pad + VISION_END, placeholder, 1) if placeholder else chat

    def _encode(self, text: str, placeholder: str) -> list[int]:
        ids = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        for pad in (IMAGE_PAD, VIDEO_PAD):
            if ids.count(self.tokenizer.convert_tokens_to_ids(pad)) != placeholder.count(pad):
                raise InputError(f"the text must not hold the model's own token {pad}")
        return ids

    def _question_ids(self, question: str, placeholder: str) -> tuple[list[int], list[int]]:
        """Token ids of the prompt and of the answer; what tokens the answer is made of, the tokenizer decides."""
        prompt = self._chat(question_text(question), "video", placeholder)
        before, ids = self._encode(prompt, placeholder), self._encode(prompt + ANSWER, placeholder)
        shared = next((i for i, pair in enumerate(zip(before, ids, strict=False)) if pair[0] != pair[1]), len(before))
        return ids[:shared], ids[shared:]

    def _token_types(self, input_ids: Tensor) -> Tensor:
        types = torch.full_like(input_ids, TEXT_TOKEN)
        types[input_ids == self.model.config.image_token_id] = IMAGE_TOKEN
        types[input_ids == self.model.config.video_token_id] = VIDEO_TOKEN
        return types

    @property
    def _pad_token_id(self) -> int:
        pad = self.tokenizer.pad_token_id
        return self.tokenizer.eos_token_id if pad is None else pad
