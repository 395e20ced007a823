"""The Teacher's share of a step: preprocessing, visual encoder, language model; ours and stock."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from vlmteacher.planning.costs import META, Cost, measure, per_layer, stack
from vlmteacher.planning.tracing import tracing
from vlmteacher.queries import QuerySet
from vlmteacher.teachers.prompt import Clip
from vlmteacher.teachers.shared_prefix import Keep, answer_losses
from vlmteacher.teachers.vlm import VLMTeacher

GOAL = "Is the yellow ball inside the purple box at the end?"
PROCESS = "Does the yellow ball stay clear of the dark blocks?"


@dataclass(frozen=True)
class Video:
    """The frames that the Teacher reads: K of height x width pixels, at `indices` of a video of `fps`."""

    indices: tuple[int, ...]
    fps: float
    height: int
    width: int

    def clip(self, teacher: VLMTeacher) -> Clip:
        return teacher.clip(self.indices, self.fps, self.height, self.width)

    def frames(self, dtype: torch.dtype) -> Tensor:
        return torch.empty(len(self.indices), 3, self.height, self.width, dtype=dtype, device=META, requires_grad=True)


def query_set(count: int) -> QuerySet:
    """A goal question and `count - 1` process questions."""
    return QuerySet(GOAL, (PROCESS,) * (count - 1))


def preprocessing_cost(teacher: VLMTeacher, video: Video) -> Cost:
    """The cost of making patch rows of the frames: no products, only bytes."""
    frames, clip = video.frames(teacher.model.dtype), video.clip(teacher)
    return measure(lambda: [next(iter(teacher.stock_inputs(frames, clip).values()))], [], [frames])


def vision_costs(teacher: VLMTeacher, video: Video, steps: Sequence[int]) -> dict[int, Cost]:
    """The cost of the visual encoder for each number of frames in `steps` that may be encoded at a time.

    Where all frames are encoded at once their graph is kept. Else chunks are alike and one is traced; the backward
    keeps all features and their gradients alive beside it.
    """
    frames, size = video.frames(teacher.model.dtype), video.clip(teacher).size
    whole = measure(lambda: list(teacher.encode(frames, size)), [teacher.model], [frames])
    features = sum(t.nbytes for t in visual_features(teacher, video, goal=False))
    costs = {}
    for step in steps:
        if step >= len(video.indices):
            costs[step] = whole
            continue
        piece = frames[:step].detach().requires_grad_()
        chunk = measure(functools.partial(teacher.encode, piece, size), [teacher.model], [piece])
        with torch.no_grad(), tracing() as trace:
            trace.weights(teacher.model)
            trace.inputs(piece)
            teacher.encode(piece, size)
        # a chunk's graph beside the gradient of the frames, or that gradient beside its chunks
        backward = 2 * features + frames.nbytes + max(chunk.backward_bytes, frames.nbytes)
        # the chunks' features, then their concatenation
        forward = max(2 * features, features + trace.peak[""])
        costs[step] = Cost(whole.forward, whole.backward + whole.forward, whole.forward, features, forward, backward)
    return costs


def visual_features(teacher: VLMTeacher, video: Video, goal: bool = True) -> list[Tensor]:
    """Leaves in the shapes of the visual encoder's outputs. goal: with those of a picture of the goal before them."""
    with torch.no_grad():
        outputs = teacher.encode(video.frames(teacher.model.dtype), video.clip(teacher).size)
    place = teacher.goal_place if goal else None
    more = sum(place.text.count(pad) for pad in teacher.visual_pads) if place else 0
    return [output.new_empty(more + len(output), *output.shape[1:]).requires_grad_() for output in outputs]


@contextmanager
def cut(language: Any, layers: Sequence[nn.Module]) -> Iterator[None]:
    """Replace the layers of a language model inside the context."""
    own, config = language.layers, language.config
    language.layers, config.num_hidden_layers = nn.ModuleList(layers), len(layers)
    try:
        yield
    finally:
        language.layers, config.num_hidden_layers = own, len(own)


def per_kind(language: Any, depth: int, run: Callable[[], Cost]) -> list[tuple[Cost, Cost]]:
    """The costs (base, layer) of every layer of a language model, the last one first, as `stack` takes them.

    Layers with weights of equal shapes are alike; each kind is traced in stacks of `depth` and `depth + 1`.
    run: traces the language model as it is cut.
    """

    def at(layer: nn.Module, depth: int) -> Cost:
        with cut(language, [layer] * depth):
            return run()

    costs: dict[Any, tuple[Cost, Cost]] = {}
    parts = []
    for layer in reversed(language.layers):
        kind = tuple((name, weight.shape) for name, weight in layer.named_parameters())
        if kind not in costs:
            costs[kind] = per_layer(functools.partial(at, layer), depth)
        parts.append(costs[kind])
    return parts


def language_costs(teacher: VLMTeacher, video: Video, count: int) -> dict[Keep, Cost]:
    """The cost of the language model on `count` questions behind one prefix, by what its layers keep."""
    layout = teacher.layout(video.clip(teacher), query_set(count))
    features = visual_features(teacher, video)
    language, head = teacher.language, teacher.model.get_output_embeddings()

    def run(keep: Keep) -> Cost:
        def losses() -> list[Tensor]:
            return [answer_losses(language, head, layout, features[0], features[1:], keep, decoder=teacher.decoder)]

        return measure(losses, [teacher.model], features)

    # the layers that are alike: behind those that DeepStack adds to, before the last, which computes the answers only
    depth = min(len(features) + 1, len(language.layers) - 1)
    parts = {keep: per_kind(language, depth, functools.partial(run, keep)) for keep in Keep}
    return {keep: stack(part, parts[Keep.ALL]) for keep, part in parts.items()}


def stock_reader(teacher: VLMTeacher, clip: Clip, question: str) -> Callable[[Sequence[Tensor]], Tensor]:
    """The language model in transformers' own modules: from visual features to the logits (A, vocabulary) of an answer.

    It runs on the Teacher's device, which may be the meta device, and is for costs only: the DeepStack features are
    added before the layers and not between them, which costs the same and needs no mask.
    """
    ((prompt, answer),) = teacher.chats(clip, [question])
    ids = torch.tensor([prompt + answer])
    visual = torch.tensor(teacher.tokenizer.convert_tokens_to_ids(list(teacher.visual_pads)))
    places = torch.isin(ids[0], visual).nonzero().flatten().to(teacher.device)
    positions = teacher.positions(ids, clip).to(teacher.device)
    # From position ids (1, n) transformers would make a mask by their values; without one attention is causal.
    mask: Any = None
    if positions.dim() == 2:
        kinds = getattr(teacher.language.config, "layer_types", None)
        mask = dict.fromkeys(kinds) if kinds else torch.ones_like(positions[..., None] * positions).bool().tril()[None]

    def read(features: Sequence[Tensor]) -> Tensor:
        embeds = teacher.language.embed_tokens(ids.to(teacher.device))[0].index_copy(0, places, features[0])
        for feature in features[1:]:
            embeds = embeds.index_add(0, places, feature)
        inputs = {"inputs_embeds": embeds[None], "position_ids": positions, "attention_mask": mask}
        hidden = teacher.language(**inputs, use_cache=False).last_hidden_state
        head = teacher.model.get_output_embeddings()
        return head(hidden[0, -len(answer) - 1 : -1]).float()

    return read


def stock_teacher_cost(teacher: VLMTeacher, video: Video) -> tuple[Cost, Cost]:
    """(vision, language): the costs of one question in transformers' own classes, without checkpoints."""
    frames, clip = video.frames(torch.float32), video.clip(teacher)
    features = visual_features(teacher, video)
    encode, read = teacher.stock_encoder(clip), stock_reader(teacher, clip, GOAL)

    parts = per_kind(teacher.language, 1, lambda: measure(lambda: [read(features)], [teacher.model], features))
    return measure(lambda: encode(frames), [teacher.model], [frames]), stack(parts, parts)
