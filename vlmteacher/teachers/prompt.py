"""The prompts of a Teacher: a video and its questions as token ids, positions and the places of the answers.

`VideoPrompts.chats` gives the chat of every question by itself, as one stock pass reads it. `VideoPrompts.layout` packs
the chats into one sequence, [shared prefix | question 0 | question 1 | ...], which `shared_prefix` reads in one pass.
"""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import cycle
from typing import Any, NamedTuple

import torch
from torch import Tensor

from vlmteacher.chat_templates import Messages, render_all
from vlmteacher.errors import InputError
from vlmteacher.ops.attention import Spans
from vlmteacher.prompts import CUT, encode, quote
from vlmteacher.queries import ANSWER_INSTRUCTION, QuerySet
from vlmteacher.torch_modes import keepable

ANSWER = "Yes"
LAYOUTS_KEPT = 4
GOAL_NOTE = "The picture before the video shows the goal: how the video should end. "
# Tags that open a thought, and those that close one: <think>, [THINK], <|thought|>, \u25c1think\u25b7 and the like.
THOUGHT = re.compile(
    r"[<\[\u25c1]\|?(?P<closes>/|end_of_)?(?:begin_of_|start_of_|\w+:)?(?:think|thinking|thought|reasoning)\|?[>\]\u25b7]",
    re.IGNORECASE,
)


@dataclass(frozen=True)
class Picture:
    """The place of a picture in the prompt.

    text: stands for it, one of `visual_pads` for every visual token. grid: its `image_grid_thw`, where the family has
    positions in space.
    """

    text: str
    grid: tuple[int, ...] = ()


@dataclass(frozen=True)
class Clip:
    """The properties of a video that its place in the prompt depends on.

    indices: the places of the K frames in a video of `fps` frames per second. size: (H, W) after resizing. goal: the
    picture of the goal that stands before the video, if there is one.
    """

    indices: tuple[int, ...]
    fps: float
    size: tuple[int, int]
    goal: Picture | None = None

    @property
    def num_frames(self) -> int:
        return len(self.indices)

    def seconds(self, frames_per_patch: int) -> list[tuple[float, float]]:
        """The times of the first and the last frame of every temporal patch; the last frame is repeated to fill one."""
        indices = list(self.indices) + [self.indices[-1]] * (-len(self.indices) % frames_per_patch)
        starts = range(0, len(indices), frames_per_patch)
        return [(indices[i] / self.fps, indices[i + frames_per_patch - 1] / self.fps) for i in starts]


class Chat(NamedTuple):
    """Token ids of a prompt, and of the answer that follows it."""

    prompt: list[int]
    answer: list[int]


@dataclass(frozen=True)
class Packed:
    """Rows of token ids in one sequence of N: the `prefix` tokens that all share, then each row's own tokens.

    starts: the place of each row's first own token.
    """

    ids: list[int]
    prefix: int
    starts: tuple[int, ...]

    def spans(self) -> Tensor:
        """The table of `Spans`, (N, 3) int32.

        The prefix is causal; every own token attends to the prefix and to its row's own tokens up to itself.
        """
        places = torch.arange(len(self.ids))
        bounds = torch.tensor([0, *self.starts])
        own = bounds[torch.bucketize(places, bounds, right=True) - 1].clamp(min=self.prefix)
        return torch.stack([(places + 1).clamp(max=self.prefix), own, places + 1], 1).int()


def pack(rows: Sequence[Sequence[int]], prefix: int, room: int | None = None) -> Packed:
    """Pack rows of token ids whose first `prefix` tokens are equal.

    room: the number of tokens that every row's own part is padded to (with zeros); None: no padding.
    """
    ids, starts = list(rows[0][:prefix]), []
    for row in rows:
        starts.append(len(ids))
        ids += row[prefix:]
        ids += [0] * ((room or 0) + starts[-1] - len(ids))
    return Packed(ids, prefix, tuple(starts))


def shared_length(rows: Sequence[list[int]]) -> int:
    """The number of tokens that all rows begin with."""
    first = min(rows)
    last = max(rows)  # lexicographic extremes differ wherever any two rows do
    return next((i for i, (a, b) in enumerate(zip(first, last, strict=False)) if a != b), min(len(first), len(last)))


@dataclass(frozen=True)
class Layout:
    """The chats of 1+M questions about one video, packed into N tokens; all tensors are on the model's device.

    ids (N,): token ids. prefix: the number of tokens that all chats share, the video among them. starts: the place of
    each question's first own token. positions (..., N): position ids of the language model, and cos, sin (N, 1, d / 2):
    their rotary angles, float32. video: places of the visual tokens, those of a picture of the goal first.
    answers (A,): the places whose next token belongs to an answer; targets (A,): that token; owners (A,): its question.
    sees, answers_see: the attention spans of the N tokens, and of the A places.
    """

    ids: Tensor
    prefix: int
    starts: tuple[int, ...]
    positions: Tensor
    cos: Tensor
    sin: Tensor
    video: Tensor
    answers: Tensor
    targets: Tensor
    owners: Tensor
    sees: Spans
    answers_see: Spans

    @property
    def questions(self) -> int:
        return len(self.starts)

    @property
    def tokens(self) -> int:
        """N."""
        return len(self.ids)


def lay_out(
    chats: Sequence[tuple[Sequence[int], Sequence[int]]],
    visual_tokens: Sequence[int],
    positions: Callable[[Tensor], Tensor],
    rotary: Callable[[Tensor], tuple[Tensor, Tensor]],
    device: torch.device,
) -> Layout:
    """Pack the chats of 1+M questions; every prompt contains the video, whose tokens are among `visual_tokens`.

    positions: from a whole chat (1, n) to its position ids (..., n). rotary: from position ids on `device` to the
    rotary (cos, sin), each (n, d), float32.
    """
    rows = [[*prompt, *answer[:-1]] for prompt, answer in chats]  # the last token of an answer is only a target
    # The position before an answer belongs to its question, also where two chats are the same.
    prefix = len(rows[0]) if len(rows) == 1 else min(shared_length(rows), *(len(prompt) - 1 for prompt, _ in chats))
    packed = pack(rows, prefix)
    answers: list[int] = []
    targets: list[int] = []
    owners: list[int] = []
    for question, (start, (prompt, answer)) in enumerate(zip(packed.starts, chats, strict=True)):
        first = len(prompt) - 1 + start - prefix
        answers += range(first, first + len(answer))
        targets += answer
        owners += [question] * len(answer)
    pieces = [positions(torch.tensor([row]))[..., prefix if i else 0 :] for i, row in enumerate(rows)]
    at = torch.cat(pieces, -1).to(device)
    cos, sin = rotary(at)
    half = cos.shape[-1] // 2
    ids, places = torch.tensor(packed.ids), torch.tensor(answers).to(device)
    sees = Spans(packed.spans().to(device), len(ids), causal=prefix)
    return Layout(
        ids.to(device),
        prefix,
        packed.starts,
        at,
        cos[:, None, :half],
        sin[:, None, :half],
        torch.isin(ids, torch.tensor(visual_tokens)).nonzero().flatten().to(device),
        places,
        torch.tensor(targets).to(device),
        torch.tensor(owners).to(device),
        sees,
        sees.at(places),
    )


def question_text(question: str, goal: bool = False) -> str:
    """The text behind the video in the prompt of one question. goal: whether a picture of the goal is before it."""
    return GOAL_NOTE * goal + question.strip() + ANSWER_INSTRUCTION


def open_thought(text: str) -> str | None:
    """The tag, such as <think>, of a thought that `text` opens last and does not close; None if there is none."""
    tags = list(THOUGHT.finditer(text))
    return tags[-1][0] if tags and not tags[-1]["closes"] else None


class VideoPrompts(ABC):
    """Writes the prompts of a VLM: chats in its own template, with the tokens that stand for a video or an image.

    A family sets the class attributes and defines the abstract methods.

    Attributes:
        tokenizer: of transformers, with a chat template.
        video_mark, image_mark: what the chat template writes for a video, and for an image.
        visual_pads: the tokens that visual features replace; the last one is that of videos.
        opening: what the model writes before every answer, where its template does not: an empty thought.
        before_answer: what it writes before Yes or No, beside that: a space, the mark of a short answer.
        goal_place: the picture of the goal that stands before every video, if there is one.
    """

    tokenizer: Any
    video_mark: str
    image_mark: str
    visual_pads: tuple[str, ...]
    opening: str = ""
    before_answer: str = ""
    goal_place: Picture | None = None

    def __init__(self) -> None:
        self._layouts: dict[tuple[Any, ...], Layout] = {}

    @abstractmethod
    def resized(self, num_frames: int, height: int, width: int) -> tuple[int, int]:
        """The size (H, W) that K frames are resized to. Raises InputError when they have no such size."""

    @abstractmethod
    def video_text(self, clip: Clip) -> str:
        """The text that replaces `video_mark` in the prompt, timestamps included."""

    @abstractmethod
    def positions(self, ids: Tensor, clip: Clip) -> Tensor:
        """Position ids (..., 1, n) of a chat (1, n) for the language model's `rotary_emb`."""

    @property
    @abstractmethod
    def language(self) -> Any:
        """The language model: `rotary_emb`, `config`."""

    @property
    @abstractmethod
    def device(self) -> torch.device: ...

    def clip(self, frame_indices: Sequence[int], fps: float, height: int, width: int) -> Clip:
        """The `Clip` of K frames of height x width pixels. Raises InputError where `resized` does."""
        indices = tuple(int(i) for i in frame_indices)
        return Clip(indices, float(fps), self.resized(len(indices), height, width), self.goal_place)

    def chats(self, clip: Clip, questions: Sequence[str], answer: str = ANSWER) -> list[Chat]:
        """The chat of each question about a video, by itself.

        Raises InputError when a chat does not fit into the language model's context.
        """
        placeholder, goal = self.video_text(clip), clip.goal.text if clip.goal else None
        visions = self._visions("video", [placeholder], goal)
        asked = [question_text(question, goal is not None) for question in questions]
        self._render([self._messages(text, visions) for text in asked])  # in one process, for `_question_chat`
        chats = [self._question_chat(question, placeholder, answer, goal) for question in questions]
        context = self.language.config.max_position_embeddings
        for question, chat in zip(questions, chats, strict=True):
            if (tokens := len(chat.prompt) + len(chat.answer)) > context:
                raise InputError(
                    f"the question {question[:60]!r} and the video take {tokens} tokens, the teacher's context "
                    f"holds {context}: shorten it, or give fewer or smaller frames"
                )
        return chats

    @keepable()
    def layout(self, clip: Clip, queries: QuerySet) -> Layout:
        """The packed chats of `queries.questions` about a video. The last `LAYOUTS_KEPT` layouts are kept.

        Raises InputError when a chat does not fit into the language model's context.
        """
        key = (clip, queries, self.device)
        if key not in self._layouts:
            layout = self.pack(clip, self.chats(clip, queries.questions))
            while len(self._layouts) >= LAYOUTS_KEPT:
                self._layouts.pop(next(iter(self._layouts)))
            self._layouts[key] = layout
        return self._layouts[key]

    def pack(self, clip: Clip, chats: Sequence[Chat]) -> Layout:
        """The layout of chats about a video."""
        visual = self.tokenizer.convert_tokens_to_ids(list(self.visual_pads))
        return lay_out(chats, visual, lambda ids: self.positions(ids, clip), self.rotary, self.device)

    def rotary(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """The rotary (cos, sin) of position ids (..., 1, n), (n, d) each, whose halves are equal."""
        cos, sin = self.language.rotary_emb(torch.empty(0, device=self.device), positions)
        return cos[0], sin[0]

    def chat_ids(
        self, text: str, modality: str, placeholder: str | Sequence[str] | None, later: Sequence[str] = ()
    ) -> list[int]:
        """Token ids of a chat that asks for the next answer: one user turn and the `later` ones.

        modality: "video" or "image", of the vision that comes before the text. placeholder: the text that stands for
        it, one of `visual_pads` for every visual token; a list: of several images in their order; None or an empty
        list: no vision. Raises InputError when the template has no place for the vision, or opens a thought before the
        answer.
        """
        placeholders = [placeholder] if isinstance(placeholder, str) else list(placeholder or ())
        return self._encode(self._chat(text, modality, placeholders, later), "".join(placeholders))

    def prepare(self, texts: Sequence[str], modality: str, placeholder: str) -> None:
        """Render the chats of several texts at once, in one process, for `chat_ids` of each."""
        visions = self._visions(modality, [placeholder])
        self._render([self._messages(text, visions) for text in texts])

    def _chat(
        self,
        text: str,
        modality: str,
        placeholder: str | Sequence[str],
        later: Sequence[str] = (),
        goal: str | None = None,
    ) -> str:
        """The text of `chat_ids`, in which control tokens of the caller are marked (see `prompts.quote`).

        goal: the text that stands for a picture before the other vision.
        """
        placeholders = [placeholder] if isinstance(placeholder, str) else placeholder
        visions = self._visions(modality, placeholders, goal)
        messages = self._messages(text, visions, later)
        (chat,) = self._render([messages])
        for said in (text, *later):
            if said.strip() not in chat.replace(CUT, ""):
                raise InputError(
                    f"the teacher's chat template leaves out or changes what it is asked ({said.strip()[:40]!r}): take"
                    " the template of an instruction-tuned checkpoint"
                )
        if thought := open_thought(chat.rpartition(messages[-1]["content"][-1]["text"].strip())[2]):
            raise InputError(
                f"the teacher's chat template opens a thought ({thought}) where its answer is read: take the instruct "
                "checkpoint, as Qwen3-VL-4B-Instruct is of Qwen3-VL-4B-Thinking"
            )
        whole, rest = "", chat
        for kind, mark, vision in visions:
            start, found, rest = rest.partition(mark)
            if not found:
                raise InputError(
                    f"the teacher's chat template has no place for a {kind} ({mark}): take one that sees videos"
                )
            whole += start + vision
        return whole + rest + self.opening

    def _visions(
        self, modality: str, placeholders: Sequence[str], goal: str | None = None
    ) -> list[tuple[str, str, str]]:
        """(kind, the template's mark, the text that stands for it) of each vision before a text."""
        mark = self.video_mark if modality == "video" else self.image_mark
        visions = [(modality, mark, each) for each in placeholders]
        return visions if goal is None else [("image", self.image_mark, goal), *visions]

    def _messages(
        self, text: str, visions: Sequence[tuple[str, str, str]], later: Sequence[str] = ()
    ) -> list[dict[str, Any]]:
        """The messages of `_chat`, with `_visions` before the text."""
        content = [{"type": kind} for kind, *_ in visions] + [{"type": "text", "text": quote(self.tokenizer, text)}]
        messages: list[dict[str, Any]] = [{"role": "user", "content": content}]
        for turn, role in zip(later, cycle(("assistant", "user")), strict=False):
            messages.append({"role": role, "content": [{"type": "text", "text": quote(self.tokenizer, turn)}]})
        return messages

    def _render(self, chats: Sequence[Messages]) -> list[str]:
        return render_all(self.tokenizer, chats, "the teacher's chat template")

    def _encode(self, text: str, placeholder: str) -> list[int]:
        ids = encode(self.tokenizer, text)
        for pad in self.visual_pads:
            if ids.count(self.tokenizer.convert_tokens_to_ids(pad)) != placeholder.count(pad):
                raise InputError(f"the teacher's chat template writes {pad} elsewhere than in the place of the vision")
        return ids

    def _question_chat(self, question: str, placeholder: str, answer: str = ANSWER, goal: str | None = None) -> Chat:
        """The chat of one question; the tokenizer decides which tokens the answer is made of."""
        prompt = self._chat(question_text(question, goal is not None), "video", placeholder, goal=goal)
        prompt, visions = prompt + self.before_answer, (goal or "") + placeholder
        before, ids = self._encode(prompt, visions), self._encode(prompt + answer, visions)
        shared = next((i for i, pair in enumerate(zip(before, ids, strict=False)) if pair[0] != pair[1]), len(before))
        return Chat(ids[:shared], ids[shared:])
