"""`VLMTeacher`: the base of the families, which reads all questions about a video in one pass and writes queries."""

from __future__ import annotations

import contextlib
import copy
import math
import warnings
from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Self

import torch
from PIL import Image
from torch import Tensor

from vlmteacher import arguments
from vlmteacher.checkpoints.pretrained import load_tokenizer
from vlmteacher.checkpoints.quantized import use_exact_products
from vlmteacher.errors import InputError, Notice
from vlmteacher.media import ImageInput, read_image, shrink
from vlmteacher.ops.linear import frozen
from vlmteacher.ops.patchify import PatchLayout, PatchRows
from vlmteacher.placement import allocator
from vlmteacher.prompts import CUT, check_prompt, whole_sentences
from vlmteacher.queries import QuerySet, QueryStyle, ask_for_queries, goal_note, query_prompt
from vlmteacher.ranks import split_rows
from vlmteacher.teachers.base import (
    ANSWER_TOKENS,
    Teacher,
    check_frames,
    check_free_text,
    check_range,
    read_style,
)
from vlmteacher.teachers.preprocessing import VisionSettings, processor_settings, resized_rows, settings_by_configs
from vlmteacher.teachers.prompt import Clip, Layout, Picture, VideoPrompts
from vlmteacher.teachers.quantization import Quantize, check_stays, is_quantized, load_model
from vlmteacher.teachers.shared_prefix import LLAMA, Decoder, Keep, answer_losses, keep_level, kept_bytes
from vlmteacher.teachers.visual_checkpoint import stream
from vlmteacher.teachers.writer import Writer
from vlmteacher.torch_modes import keepable

MAX_NEW_TOKENS = 256
IMAGE_PIXELS = 1280 * 720  # at most, of an image that queries are written from; frames of video models have fewer
ACTIVATION_BYTES = 4 * 2**30  # kept for the backward, where no allocator tells its room
STATIC_CACHE = {"cache_implementation": "static", "disable_compile": True}  # compiling takes longer than it saves
CHUNK_PATCHES = {"cpu": 1024, "cuda": 16384}  # of the visual encoder: fits the caches of a CPU, fills a GPU
LEAST_YES_OR_NO = 0.5  # probability of Yes and No together on a plain question


@dataclass
class GoalPicture:
    """A picture of the goal. inputs: of the stock model. features: what they are encoded to, when they are needed."""

    image: Image.Image
    inputs: dict[str, Tensor]
    features: tuple[Tensor, ...] | None = None


class VLMTeacher(VideoPrompts, Teacher):
    """A frozen VLM of transformers. A family is a subclass that defines the abstract methods and class attributes.

    Args:
        model: of the class `architecture`; it is frozen and set to evaluation mode.
        tokenizer: its tokenizer, with a chat template.
        video, image: the preprocessing of videos, and of images (None: that of videos).

    Attributes:
        style: the instructions for writing queries.
        writer: the LoRA that is applied while it writes queries, if there is one.
        architecture: the class of transformers.
        token_ids: the entries of the model's config that are ids of tokens, and the tokens.
        frames_per_patch: frames of one temporal patch.
        decoder: runs the layers of the language model.
        goal: the picture of the goal, if there is one.

    Raises InputError when the tokenizer has no chat template, or the chat template no place for a video.
    """

    architecture: ClassVar[str]
    token_ids: ClassVar[dict[str, str]]
    frames_per_patch: int
    decoder: ClassVar[Decoder] = LLAMA
    goal: GoalPicture | None = None

    def __init__(self, model: Any, tokenizer: Any, video: VisionSettings, image: VisionSettings | None = None) -> None:
        if not getattr(tokenizer, "chat_template", None):
            raise InputError("the teacher's tokenizer has no chat template: take an instruction-tuned checkpoint")
        super().__init__()
        self.model = frozen(model)
        self.quantized = is_quantized(model)
        if self.quantized:
            use_exact_products(model)
        self.tokenizer = tokenizer
        self.video, self.image = video, image or video
        self.style = QueryStyle()
        self.writer: Writer | None = None
        self.decoder.check(self.language, model.config.model_type)
        self.chat_ids("Is it?", "video", "")  # raises where the template has no place for a video

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
        """Give a notice unless the model answers a plain question mostly by Yes or No.

        name: of the checkpoint. Raises InputError when the losses are NaN.
        """
        side = 4 * self.video.patch_size
        clip = self.clip(range(self.frames_per_patch), 8.0, side, side)
        frames = torch.full((self.frames_per_patch, 3, *clip.size), 0.5, device=self.device)
        chats = [chat for answer in ("Yes", "No") for chat in self.chats(clip, ["Is the picture grey?"], answer)]
        p = self.packed_losses(frames, self.pack(clip, chats), clip.size).neg().exp().sum().item()
        if math.isnan(p):
            dtype = str(self.model.dtype).removeprefix("torch.")
            raise InputError(f"teacher {name!r} answers NaN: its weights are damaged, or {dtype} is too small for them")
        if p < LEAST_YES_OR_NO:
            warnings.warn(
                f"teacher {name!r} answers a plain question by Yes or No with a probability of {p:.2g} only: its"
                " losses mean little; take an instruction-tuned checkpoint that answers without a thought before it",
                Notice,
                stacklevel=2,
            )

    @classmethod
    def from_parts(cls, path_or_id: str, model: Any, tokenizer: Any, local_files_only: bool) -> VLMTeacher:
        """The Teacher of a loaded model; reads the checkpoint's processor settings."""
        defaults = cls.processor_defaults(model.config)
        return cls(model, tokenizer, *processor_settings(path_or_id, defaults, local_files_only))

    @classmethod
    def adopt(cls, model: Any, processor: Any, name: str) -> VLMTeacher:
        """The Teacher of a loaded model and its processor, which stay where they are; the model is frozen.

        name: of the model, for messages. Raises InputError for a processor without a tokenizer, and as the class does.
        """
        tokenizer = getattr(processor, "tokenizer", None)
        if tokenizer is None:
            raise InputError(f"processor must be that of {name}, with its tokenizer, not {arguments.show(processor)}")
        if not getattr(tokenizer, "chat_template", None):
            tokenizer = copy.copy(tokenizer)
            tokenizer.chat_template = processor.chat_template
        defaults, where = cls.processor_defaults(model.config), f"teacher {name}: the"
        video, images = (_config(getattr(processor, f"{kind}_processor", None)) for kind in ("video", "image"))
        settings = settings_by_configs(video, images, defaults, where)
        teacher = cls(model, tokenizer, *settings)
        teacher.check_answers(name)
        return teacher

    @staticmethod
    @abstractmethod
    def processor_defaults(config: Any) -> VisionSettings:
        """The preprocessing where a checkpoint's processor files are silent; patch sizes are those of the `config`."""

    @classmethod
    def with_vision_tokens(cls, tokenizer: Any) -> Any:
        """A tokenizer of Qwen-VL's chat format, which the packaged Teacher has, with this family's tokens and template.

        For plans, in which only numbers of tokens matter.
        """
        return tokenizer

    def patches_per_frame(self, size: tuple[int, int]) -> int:
        """The number of patches in one temporal patch of frames of `size` (H, W)."""
        return size[0] * size[1] // self.video.patch_size**2

    @property
    @abstractmethod
    def visual(self) -> Any:
        """The vision tower."""

    @abstractmethod
    def encode_rows(self, rows: Tensor, size: tuple[int, int]) -> tuple[Tensor, ...]:
        """Encode whole temporal patches, given as patch rows (n, values) of the tower's dtype; differentiable.

        size: (H, W) of their frames. Returns the embeddings (visual tokens, C), then the DeepStack features of the same
        shape, if the family has any.
        """

    @abstractmethod
    def stock_inputs(self, frames: Tensor, clip: Clip) -> dict[str, Tensor]:
        """The video inputs of the stock model for frames (K, 3, H, W), RGB in [0, 1]: pixels, float32, come first."""

    @abstractmethod
    def stock_encoder(self, clip: Clip) -> Callable[[Tensor], list[Tensor]]:
        """Return the visual encoder in transformers' own modules: from frames (K, 3, H, W) to features, in one pass.

        Plans and benchmarks compare with it. It also runs on the meta device.
        """

    def encode(self, frames: Tensor, size: tuple[int, int]) -> tuple[Tensor, ...]:
        """Encode frames (k, 3, H, W), RGB in [0, 1], resized to `size`; differentiable. See `encode_rows`."""
        return self.encode_rows(resized_rows(frames, size, self.video, self.visual.dtype), size)

    @abstractmethod
    def image_inputs(self, pixels: Tensor) -> tuple[str, dict[str, Tensor]]:
        """The text that stands for an image (3, H, W), RGB in [0, 1], in the prompt, and the model's image inputs."""

    @property
    def language(self) -> Any:
        """The language model."""
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
        for name, value in frequencies.items():  # stay in float32: in bfloat16 late positions would coincide
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
        clip = self.clip(frame_indices, fps, height, width)
        if isinstance(frames, PatchRows) and frames.layout != (ours := self.patch_layout(len(frames), height, width)):
            raise InputError(f"patch rows of {frames.layout}: this teacher takes {ours or 'frames, which it resizes'}")
        if check:
            low, high = (frames if isinstance(frames, PatchRows) else frames.detach()).aminmax()
            check_range(*torch.stack([low, high]).tolist())
        return self.packed_losses(frames.to(self.device), self.layout(clip, queries), clip.size)

    def packed_losses(self, frames: Tensor | PatchRows, layout: Layout, size: tuple[int, int]) -> Tensor:
        """Compute `losses` without checks, (questions,) float32.

        frames: (K, 3, H, W), or their patch rows, on the model's device. layout: of the questions about them. size:
        (H, W) that the frames are resized to.
        """
        budget = self.chunk_patches or CHUNK_PATCHES.get(self.device.type, CHUNK_PATCHES["cuda"])
        patches = self.patches_per_frame(size)
        at_a_time = max(1, budget // patches)
        offload: Any = contextlib.nullcontext()
        if self.offload and self.device.type == "cuda":
            offload = torch.autograd.graph.save_on_cpu(pin_memory=True)
        with offload:
            if isinstance(frames, PatchRows):
                rows, unit, encode = frames.rows, patches, self.encode_rows
            else:
                rows, unit, encode = frames, self.frames_per_patch, self.encode  # type: ignore[assignment]
            video, *deepstack = split_rows(
                lambda own: stream(lambda chunk: encode(chunk, size), own, at_a_time * unit), rows, unit, self.ranks
            )
            if self.goal:
                pairs = zip(self.goal_features(self.goal), (video, *deepstack), strict=True)
                video, *deepstack = (torch.cat([picture, ours]) for picture, ours in pairs)
            head = self.model.get_output_embeddings()
            keep = self._keep(len(layout.ids))
            backend, decoder = self.attention_backend, self.decoder
            return answer_losses(self.language, head, layout, video, deepstack, keep, backend, decoder)

    def with_goal(self, image: ImageInput | None) -> Self:
        """See `Teacher.with_goal`. The picture is encoded once, by the stock modules, when it is first needed."""
        if image is not None and not self.takes_goal_image:
            return super().with_goal(image)  # raises
        if image is None and self.goal is None:
            return self
        other = copy.copy(self)
        other.goal, other.goal_place = None, None
        if image is not None:
            rgb = shrink(read_image(image, "goal_image"), IMAGE_PIXELS)
            text, inputs = self.image_inputs(pixels_of(rgb))
            grid = inputs.get("image_grid_thw")
            other.goal = GoalPicture(rgb, inputs)
            other.goal_place = Picture(text, () if grid is None else tuple(grid[0].tolist()))
        return other

    @keepable()
    @torch.no_grad()
    def goal_features(self, goal: GoalPicture) -> tuple[Tensor, ...]:
        """The embeddings (visual tokens, C) of a picture of the goal, then its DeepStack features, if there are any."""
        if goal.features is None:
            inputs = {name: value.to(self.device) for name, value in goal.inputs.items()}
            output = self.model.model.get_image_features(**inputs, return_dict=True)
            deepstack = getattr(output, "deepstack_features", None) or ()
            goal.features = tuple(torch.cat(list(each)) for each in (output.pooler_output, *deepstack))
        return tuple(each.to(self.device) for each in goal.features)

    def _keep(self, tokens: int) -> Keep:
        """What the language model keeps of so many tokens, by the room that there is now (`activation_bytes`)."""
        layers, budget = self.language.layers, self.activation_bytes
        if budget is None:
            room = self.room or allocator(self.device)
            budget = room.available() // 2 if room else ACTIVATION_BYTES
        level = keep_level(layers, tokens, budget, self.decoder)
        self.kept_bytes = kept_bytes(layers, tokens, self.decoder)[level]
        return level

    def write_queries(self, prompt: str, image: ImageInput | None = None) -> QuerySet:
        """See `Teacher.write_queries`. The first try is greedy, the second is sampled with a fixed seed."""
        check_prompt(prompt)
        with self.writer.on(self.model) if self.writer else contextlib.nullcontext():
            return ask_for_queries(
                self.style, lambda later, sample: self._generate(self._query_inputs(prompt, image, later), sample)
            )

    def answer(self, text: str, images: Sequence[ImageInput] = (), max_tokens: int = ANSWER_TOKENS) -> str:
        """See `Teacher.answer`. The frozen weights answer, without the LoRA for writing queries."""
        check_free_text(self.style, "this teacher")
        if not arguments.text("text", text).strip():
            raise InputError("the text is empty: say what the teacher must answer")
        if not isinstance(images, (list, tuple)):
            raise InputError(f"images must be a list of images, not {arguments.show(images)}")
        arguments.whole("max_tokens", max_tokens)
        inputs = self._inputs(text, images)
        tokens, context = inputs["input_ids"].shape[1], self.language.config.max_position_embeddings
        if tokens + max_tokens > context:
            raise InputError(
                f"the text {text[:60]!r} and {len(images)} images take {tokens} tokens, an answer {max_tokens}, the "
                f"teacher's context holds {context}: give a shorter text, or fewer or smaller images"
            )
        ids = self._generate_ids(inputs, False, max_tokens)
        text_ids = ids[:-1] if int(ids[-1]) in self.end_ids else ids
        # The mark and NUL are refused in texts, which this one may be put into.
        answer = self.tokenizer.decode(text_ids, skip_special_tokens=True).translate({ord(CUT): None, 0: None}).strip()
        is_cut = len(ids) == max_tokens and int(ids[-1]) not in self.end_ids
        return whole_sentences(answer) if is_cut else answer

    def _query_inputs(self, prompt: str, image: ImageInput | None, later: Sequence[str] = ()) -> dict[str, Tensor]:
        """The inputs of `generate` for the queries of a task; later: see `_inputs`."""
        text = query_prompt(prompt, self.style.query_instruction)
        images = [] if image is None else [image]
        if self.goal and not self.style.own_wording:  # such a Teacher was trained to write from the first frame alone
            text += goal_note(image is not None)
            images.append(self.goal.image)
        return self._inputs(text, images, later)

    def _inputs(self, text: str, images: Sequence[ImageInput], later: Sequence[str] = ()) -> dict[str, Tensor]:
        """The inputs of `generate` for a request.

        later: the turns after the first, which ask for a correction.
        """
        placeholders: list[str] = []
        visions: list[dict[str, Tensor]] = []
        for image in images:
            placeholder, vision = self.image_inputs(pixels_of(shrink(read_image(image), IMAGE_PIXELS)))
            placeholders.append(placeholder)
            visions.append(vision)
        vision = {name: torch.cat([each[name] for each in visions]) for name in (visions[0] if visions else ())}
        ids = torch.tensor([self.chat_ids(text, "image", placeholders, later)])
        inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)} | vision | self.token_inputs(ids)
        return {name: value.to(self.device) for name, value in inputs.items()}

    def token_inputs(self, ids: Tensor) -> dict[str, Tensor]:
        """The inputs of the stock model that follow from token ids (B, N) alone."""
        return {}

    def _generate(self, inputs: dict[str, Tensor], sample: bool) -> str:
        ids = self._generate_ids(inputs, sample, MAX_NEW_TOKENS)
        return self.tokenizer.decode(ids, skip_special_tokens=True)

    @torch.no_grad()
    def _generate_ids(self, inputs: dict[str, Tensor], sample: bool, max_tokens: int) -> Tensor:
        """The new token ids (n,), the end of the answer among them where it has one."""
        sampling: dict[str, Any] = (
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
                **sampling,
                max_new_tokens=max_tokens,
                eos_token_id=self.end_ids,
                pad_token_id=self._pad_token_id,
                **(STATIC_CACHE if self.static_cache() else {}),
            )
        return output[0, inputs["input_ids"].shape[1] :]

    def static_cache(self) -> bool:
        """Whether to write with a cache of fixed size: on a GPU, which a growing one makes copy it at every token."""
        return self.device.type == "cuda" and getattr(self.model, "_can_compile_fullgraph", False)

    @property
    def end_ids(self) -> list[int]:
        """The ids of the tokens that end an answer."""
        return [self.tokenizer.eos_token_id]

    @property
    def _pad_token_id(self) -> int:
        pad = self.tokenizer.pad_token_id
        return self.tokenizer.eos_token_id if pad is None else pad


def pixels_of(image: Image.Image) -> Tensor:
    """The pixels (3, H, W) of an RGB image, in [0, 1]."""
    pixels = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8).view(image.height, image.width, 3)
    return pixels.permute(2, 0, 1) / 255


def _config(processor: Any) -> dict[str, Any]:
    """The config of a processor of transformers, of plain values; empty where there is none."""
    config = {} if processor is None else processor.to_dict()
    plain = {key: dict(value) if isinstance(value, Mapping) else value for key, value in config.items()}
    return {key: list(value) if isinstance(value, tuple) else value for key, value in plain.items()}
