"""What the families share: a chat about a video, its questions in one pass, queries written by the model itself."""

from __future__ import annotations

import contextlib
import math
import re
import warnings
from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import cycle
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from vlmteacher.checkpoints.pretrained import load_tokenizer, refusing
from vlmteacher.errors import InputError, Notice
from vlmteacher.media import ImageInput, read_image, shrink
from vlmteacher.ops.patchify import PatchLayout, PatchRows
from vlmteacher.prompts import check_prompt, encode, quote
from vlmteacher.queries import ANSWER_INSTRUCTION, QuerySet, QueryStyle, ask_for_queries, query_prompt
from vlmteacher.teachers.base import Teacher, check_frames, check_range, read_style
from vlmteacher.teachers.preprocessing import VisionSettings, resized_rows
from vlmteacher.teachers.quantization import Quantize, check_stays, is_quantized, load_model
from vlmteacher.teachers.shared_prefix import Layout, answer_losses, check_language, lay_out
from vlmteacher.teachers.visual_checkpoint import stream
from vlmteacher.teachers.writer import Writer
from vlmteacher.torch_modes import keepable

ANSWER = "Yes"
MAX_NEW_TOKENS = 256
IMAGE_PIXELS = 1280 * 720  # of an image that queries are written from: no known video model's frames have more
CHUNK_PATCHES = {"cpu": 1024, "cuda": 16384}  # of the visual encoder; the caches of a CPU, the occupancy of a GPU
LAYOUTS_KEPT = 4
LEAST_YES_OR_NO = 0.5  # of the probability, on a plain question
# <think>, [THINK], <|thought|>, \u25c1think\u25b7 and the like, and what closes them
THOUGHT = re.compile(
    r"[<\[\u25c1]\|?(?P<closes>/|end_of_)?(?:begin_of_|start_of_|\w+:)?(?:think|thinking|thought|reasoning)\|?[>\]\u25b7]",
    re.IGNORECASE,
)


def question_text(question: str) -> str:
    """What follows the video in the prompt of one question."""
    return question.strip() + ANSWER_INSTRUCTION


@dataclass(frozen=True)
class Clip:
    """What a video's place in the prompt depends on.

    num_frames K, at `indices` of a video of `fps` frames a second; size (H, W) after resizing.
    """

    indices: tuple[int, ...]
    fps: float
    size: tuple[int, int]

    @property
    def num_frames(self) -> int:
        return len(self.indices)

    def seconds(self, frames_per_patch: int) -> list[tuple[float, float]]:
        """The times of the first and the last frame of every temporal patch; the last frame is repeated to fill one."""
        indices = list(self.indices) + [self.indices[-1]] * (-len(self.indices) % frames_per_patch)
        starts = range(0, len(indices), frames_per_patch)
        return [(indices[i] / self.fps, indices[i + frames_per_patch - 1] / self.fps) for i in starts]


class VLMTeacher(Teacher):
    """A frozen VLM of transformers. A family is a subclass that fills in what is abstract here.

    Args:
        model: of the class `architecture`; it is frozen and set to evaluation mode.
        tokenizer: its tokenizer, with a chat template.

    Attributes:
        style: how it is asked for queries.
        writer: what its weights are changed by meanwhile, if anything.

    Raises InputError when the tokenizer has no chat template, or the chat template no place for a video.
    """

    architecture: ClassVar[str]
    video_mark: str  # what the chat template writes for a video, and for an image
    image_mark: str
    video: VisionSettings
    visual_pads: tuple[str, ...]  # tokens that stand for visual features
    frames_per_patch: int

    def __init__(self, model: Any, tokenizer: Any) -> None:
        if not getattr(tokenizer, "chat_template", None):
            raise InputError("the teacher's tokenizer has no chat template: take an instruction-tuned checkpoint")
        self.model = model.requires_grad_(False).eval()
        self.quantized = is_quantized(model)
        self.tokenizer = tokenizer
        self.style = QueryStyle()
        self.writer: Writer | None = None
        self._layouts: dict[tuple[Any, ...], Layout] = {}
        check_language(self.language, model.config.model_type)
        self._chat("Is it?", "video", "")

    @classmethod
    def from_pretrained(
        cls,
        path_or_id: str,
        dtype: torch.dtype = torch.float32,
        local_files_only: bool = False,
        quantize: Quantize | None = None,
        device: torch.device | None = None,
    ) -> VLMTeacher:
        """Load model, tokenizer and processor settings from a local directory or a hub id."""
        import transformers

        tokenizer = load_tokenizer(path_or_id, local_files_only=local_files_only)
        architecture = getattr(transformers, cls.architecture)
        model = load_model(architecture, path_or_id, dtype, quantize, device, local_files_only=local_files_only)
        teacher = cls.from_parts(path_or_id, model, tokenizer, local_files_only)
        teacher.style = read_style(path_or_id, local_files_only)
        if teacher.style.writer:
            teacher.writer = Writer.load(model, path_or_id, teacher.style.writer, local_files_only)
        teacher.check_answers(path_or_id)
        return teacher

    @torch.no_grad()
    def check_answers(self, name: str) -> None:
        """Give a notice unless a plain question is mostly answered by Yes or No.

        name: of the checkpoint. Raises InputError when its answer is NaN.
        """
        side = 4 * self.video.patch_size
        size = self.resized(self.frames_per_patch, side, side)
        frames = torch.full((self.frames_per_patch, 3, *size), 0.5, device=self.device)
        clip = Clip(tuple(range(self.frames_per_patch)), 8.0, size)
        chats = [self._question_ids("Is the picture grey?", self.video_text(clip), answer) for answer in ("Yes", "No")]
        p = self.packed_losses(frames, self._lay_out(chats, clip), size).neg().exp().sum().item()
        if math.isnan(p):
            dtype = str(self.model.dtype).removeprefix("torch.")
            raise InputError(f"teacher {name!r} answers NaN: its weights are damaged, or {dtype} is too small for them")
        if p < LEAST_YES_OR_NO:
            warnings.warn(
                f"teacher {name!r} answers a plain question by Yes or No with a probability of {p:.2g} only: what its"
                " losses say is little; take an instruction-tuned checkpoint that answers without a thought before it",
                Notice,
                stacklevel=2,
            )

    @classmethod
    @abstractmethod
    def from_parts(cls, path_or_id: str, model: Any, tokenizer: Any, local_files_only: bool) -> VLMTeacher:
        """The Teacher of a loaded model; reads the checkpoint's processor settings."""

    @abstractmethod
    def resized(self, num_frames: int, height: int, width: int) -> tuple[int, int]:
        """The size (H, W) that K frames are resized to. Raises InputError when they have no such size."""

    @abstractmethod
    def patches_per_frame(self, size: tuple[int, int]) -> int:
        """Patches of one temporal patch."""

    @abstractmethod
    def video_text(self, clip: Clip) -> str:
        """What stands in the prompt in the place of `video_mark`."""

    @property
    @abstractmethod
    def visual(self) -> Any:
        """The vision tower."""

    @abstractmethod
    def encode_rows(self, rows: Tensor, size: tuple[int, int]) -> tuple[Tensor, ...]:
        """Visual features of whole temporal patches, given as patch rows of the tower's dtype: differentiable.

        size: (H, W) of their frames. Returns the embeddings (visual tokens, C), then the DeepStack features, if there
        are any.
        """

    def encode(self, frames: Tensor, size: tuple[int, int]) -> tuple[Tensor, ...]:
        """`encode_rows` of frames (k, 3, H, W), RGB in [0, 1], resized to `size`: differentiable to the pixels."""
        return self.encode_rows(resized_rows(frames, size, self.video, self.visual.dtype), size)

    @abstractmethod
    def positions(self, ids: Tensor, clip: Clip) -> Tensor:
        """Position ids of a chat (1, n) for the language model's `rotary_emb`."""

    @abstractmethod
    def image_inputs(self, pixels: Tensor) -> tuple[str, dict[str, Tensor]]:
        """What stands for an image (3, H, W), RGB in [0, 1], in the prompt, and the model's further inputs."""

    @property
    def language(self) -> Any:
        return self.model.model.language_model

    @property
    def device(self) -> torch.device:
        return self.model.device

    def to(self, device: str | torch.device | None = None, dtype: torch.dtype | None = None) -> VLMTeacher:
        if self.quantized:
            check_stays(self.model, device, dtype)
            return self
        frequencies = {name: value for name, value in self.model.named_buffers() if name.endswith("inv_freq")}
        self.model.to(device=device or self.device, dtype=dtype or self.model.dtype)
        for name, value in frequencies.items():  # in bfloat16 late positions would fall together
            parent, _, leaf = name.rpartition(".")
            setattr(self.model.get_submodule(parent), leaf, value.to(self.device))
        self._layouts.clear()
        return self

    def patch_layout(self, num_frames: int, height: int, width: int) -> PatchLayout | None:
        if self.resized(num_frames, height, width) != (height, width):
            return None
        return self.video.layout(self.visual.dtype)

    @torch.compiler.disable
    def losses(
        self,
        frames: Tensor | PatchRows,
        frame_indices: Sequence[int],
        fps: float,
        queries: QuerySet,
        check: bool = True,
    ) -> Tensor:
        """See `Teacher.losses`. The video is encoded and read once, whatever the number of questions."""
        check_frames(frames, frame_indices, fps)
        height, width = frames.shape[-2:]
        size = self.resized(len(frames), height, width)
        if isinstance(frames, PatchRows) and frames.layout != (ours := self.patch_layout(len(frames), height, width)):
            raise InputError(f"patch rows of {frames.layout}: this teacher takes {ours or 'frames, which it resizes'}")
        if check:
            low, high = (frames if isinstance(frames, PatchRows) else frames.detach()).aminmax()
            check_range(*torch.stack([low, high]).tolist())
        layout = self._layout(Clip(tuple(int(i) for i in frame_indices), float(fps), size), queries)
        return self.packed_losses(frames.to(self.device), layout, size)

    def packed_losses(self, frames: Tensor | PatchRows, layout: Layout, size: tuple[int, int]) -> Tensor:
        """`losses` without looking at values: frames (K, 3, H, W), or their patch rows, are on the device, `layout` is
        of these questions."""
        budget = self.chunk_patches or CHUNK_PATCHES.get(self.device.type, CHUNK_PATCHES["cuda"])
        patches = self.patches_per_frame(size)
        at_a_time = max(1, budget // patches)
        offload: Any = contextlib.nullcontext()
        if self.offload and self.device.type == "cuda":
            offload = torch.autograd.graph.save_on_cpu(pin_memory=True)
        with offload:
            if isinstance(frames, PatchRows):
                seen = stream(lambda chunk: self.encode_rows(chunk, size), frames.rows, at_a_time * patches)
            else:
                seen = stream(lambda chunk: self.encode(chunk, size), frames, at_a_time * self.frames_per_patch)
            video, *deepstack = seen
            head = self.model.get_output_embeddings()
            return answer_losses(
                self.language, head, layout, video, deepstack, self.activation_bytes, self.attention_backend
            )

    @keepable()
    def _layout(self, clip: Clip, queries: QuerySet) -> Layout:
        """The packed prompts; the same for every step of an optimisation, so it is kept."""
        key = (clip, queries, self.device)
        if key not in self._layouts:
            placeholder = self.video_text(clip)
            chats = [self._question_ids(question, placeholder) for question in queries.questions]
            context = self.language.config.max_position_embeddings
            for question, (prompt, answer) in zip(queries.questions, chats, strict=True):
                if (tokens := len(prompt) + len(answer)) > context:
                    raise InputError(
                        f"the question {question[:60]!r} and the video take {tokens} tokens, the teacher's context "
                        f"holds {context}: shorten it, or give fewer or smaller frames"
                    )
            while len(self._layouts) >= LAYOUTS_KEPT:
                self._layouts.pop(next(iter(self._layouts)))
            self._layouts[key] = self._lay_out(chats, clip)
        return self._layouts[key]

    def _lay_out(self, chats: Sequence[tuple[list[int], list[int]]], clip: Clip) -> Layout:
        visual = self.tokenizer.convert_tokens_to_ids(self.visual_pads[-1])
        return lay_out(chats, visual, lambda ids: self._angles(ids, clip), self.device)

    def _angles(self, ids: Tensor, clip: Clip) -> tuple[Tensor, Tensor]:
        positions = self.positions(ids, clip).to(self.device)
        cos, sin = self.language.rotary_emb(torch.empty(0, device=self.device), positions)
        return cos[0], sin[0]

    def write_queries(self, prompt: str, image: ImageInput | None = None) -> QuerySet:
        """See `Teacher.write_queries`. Greedy first; the one retry is sampled, with a seed of its own."""
        check_prompt(prompt)
        with self.writer.on(self.model) if self.writer else contextlib.nullcontext():
            return ask_for_queries(
                self.style, lambda later, sample: self._generate(self._query_inputs(prompt, image, later), sample)
            )

    def _query_inputs(self, prompt: str, image: ImageInput | None, later: Sequence[str] = ()) -> dict[str, Tensor]:
        """What `generate` takes to write the queries of a task, or to mend them after `later` turns."""
        vision: dict[str, Tensor] = {}
        placeholder = None
        if image is not None:
            rgb = shrink(read_image(image), IMAGE_PIXELS)
            pixels = torch.frombuffer(bytearray(rgb.tobytes()), dtype=torch.uint8).view(rgb.height, rgb.width, 3)
            placeholder, vision = self.image_inputs(pixels.permute(2, 0, 1) / 255)
        text = query_prompt(prompt, self.style.query_instruction)
        ids = torch.tensor([self._encode(self._chat(text, "image", placeholder, later), placeholder or "")])
        inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)} | vision | self.token_inputs(ids)
        return {name: value.to(self.device) for name, value in inputs.items()}

    def token_inputs(self, ids: Tensor) -> dict[str, Tensor]:
        """Further inputs of the model's generation that follow from the token ids."""
        return {}

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

    def _chat(self, text: str, modality: str, placeholder: str | None, later: Sequence[str] = ()) -> str:
        """One user turn and `later` ones, in the checkpoint's own template, with its vision token spelled out.

        placeholder: None is no vision. Control tokens in the texts are marked (see `prompts.quote`). Raises InputError
        when the template has no place for the vision, or opens a thought before the answer.
        """
        content = [{"type": "text", "text": quote(self.tokenizer, text)}]
        if placeholder is not None:
            content.insert(0, {"type": modality})
        messages: list[dict[str, Any]] = [{"role": "user", "content": content}]
        for turn, role in zip(later, cycle(("assistant", "user")), strict=False):
            messages.append({"role": role, "content": [{"type": "text", "text": quote(self.tokenizer, turn)}]})
        # A template that knows this switch closes the thought at once; the others do not look at it.
        with refusing("the teacher's chat template"):
            chat = self.tokenizer.apply_chat_template(
                messages, tokenize=False, add_generation_prompt=True, enable_thinking=False
            )
        if thought := open_thought(chat.rpartition(messages[-1]["content"][-1]["text"].strip())[2]):
            raise InputError(
                f"the teacher's chat template opens a thought ({thought}) where its answer is read: take the instruct "
                "checkpoint, as Qwen3-VL-4B-Instruct is of Qwen3-VL-4B-Thinking"
            )
        if placeholder is None:
            return chat
        mark = self.video_mark if modality == "video" else self.image_mark
        if mark not in chat:
            raise InputError(
                f"the teacher's chat template has no place for a {modality} ({mark}): take one that sees videos"
            )
        return chat.replace(mark, placeholder, 1)

    def _encode(self, text: str, placeholder: str) -> list[int]:
        ids = encode(self.tokenizer, text)
        for pad in self.visual_pads:
            if ids.count(self.tokenizer.convert_tokens_to_ids(pad)) != placeholder.count(pad):
                raise InputError(f"the teacher's chat template writes {pad} elsewhere than in the place of the vision")
        return ids

    def _question_ids(self, question: str, placeholder: str, answer: str = ANSWER) -> tuple[list[int], list[int]]:
        """Token ids of the prompt and of the answer; what tokens the answer is made of, the tokenizer decides."""
        prompt = self._chat(question_text(question), "video", placeholder)
        before, ids = self._encode(prompt, placeholder), self._encode(prompt + answer, placeholder)
        shared = next((i for i, pair in enumerate(zip(before, ids, strict=False)) if pair[0] != pair[1]), len(before))
        return ids[:shared], ids[shared:]

    @property
    def _pad_token_id(self) -> int:
        pad = self.tokenizer.pad_token_id
        return self.tokenizer.eos_token_id if pad is None else pad


def open_thought(text: str) -> str | None:
    """The tag of a thought, <think> for one, that a text opens last and does not close."""
    tags = list(THOUGHT.finditer(text))
    return tags[-1][0] if tags and not tags[-1]["closes"] else None


def freeze_patch_embed(tower: nn.Module, name: str, linear: type[nn.Module]) -> None:
    """Replace a tower's convolution by the equal matrix product, once."""
    if not isinstance(getattr(tower, name), linear):
        setattr(tower, name, linear(getattr(tower, name)))
