"""The Teacher's share of a step: preprocessing, visual encoder, language model; ours and stock."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from vlmteacher.planning.costs import META, Cost, measure, per_layer, stack
from vlmteacher.planning.tracing import tracing
from vlmteacher.queries import QuerySet
from vlmteacher.teachers import shared_prefix
from vlmteacher.teachers.preprocessing import preprocess_video
from vlmteacher.teachers.prompt import Clip
from vlmteacher.teachers.qwen_vl import QwenVLTeacher
from vlmteacher.teachers.vlm import VLMTeacher

GOAL = "Is the yellow ball inside the purple box at the end?"
PROCESS = "Does the yellow ball stay clear of the dark blocks?"


@dataclass(frozen=True)
class Video:
    """What the Teacher sees: K frames of height x width pixels at `indices` of a video of `fps`."""

    indices: tuple[int, ...]
    fps: float
    height: int
    width: int

    def clip(self, teacher: VLMTeacher) -> Clip:
        return teacher.clip(self.indices, self.fps, self.height, self.width)

    def frames(self, dtype: torch.dtype) -> Tensor:
        return torch.empty(len(self.indices), 3, self.height, self.width, dtype=dtype, device=META, requires_grad=True)


def query_set(count: int) -> QuerySet:
    return QuerySet(GOAL, (PROCESS,) * (count - 1))


def vision_costs(teacher: QwenVLTeacher, video: Video, steps: Sequence[int]) -> dict[int, Cost]:
    """Of the visual encoder, streamed so many frames at a time; all of them at once keep their graph.

    Chunks are alike: one is traced. Its graph stands beside all features, their gradients and the frames'.
    """
    frames = video.frames(teacher.model.dtype)
    size = teacher.resized(len(video.indices), video.height, video.width)
    whole = measure(lambda: list(teacher.encode(frames, size)), [teacher.model], [frames])
    features = sum(t.nbytes for t in visual_features(teacher, video))
    found = {}
    for step in steps:
        if step >= len(video.indices):
            found[step] = whole
            continue
        piece = frames[:step].detach().requires_grad_()
        chunk = measure(functools.partial(teacher.encode, piece, size), [teacher.model], [piece])
        with torch.no_grad(), tracing() as trace:
            trace.weights(teacher.model)
            trace.inputs(piece)
            teacher.encode(piece, size)
        backward = 2 * features + chunk.backward_bytes + frames.nbytes
        # pieces of the features, then the features made of them
        forward = max(2 * features, features + trace.peak[""])
        found[step] = Cost(whole.forward, whole.backward + whole.forward, whole.forward, features, forward, backward)
    return found


def visual_features(teacher: QwenVLTeacher, video: Video) -> list[Tensor]:
    """Leaves in the shape of the visual encoder's outputs."""
    size = teacher.resized(len(video.indices), video.height, video.width)
    merge = teacher.video.merge_size**2
    tokens = -(-len(video.indices) // teacher.frames_per_patch) * teacher.patches_per_frame(size) // merge
    count = 1 + len(teacher.visual.deepstack_visual_indexes)
    width, dtype = teacher.visual.config.out_hidden_size, teacher.model.dtype
    return [torch.empty(tokens, width, dtype=dtype, device=META, requires_grad=True) for _ in range(count)]


@contextmanager
def cut(language: Any, depth: int) -> Iterator[None]:
    """A language model with its first layers only."""
    layers, config = language.layers, language.config
    language.layers, config.num_hidden_layers = layers[:depth], depth
    try:
        yield
    finally:
        language.layers, config.num_hidden_layers = layers, len(layers)


def language_costs(teacher: QwenVLTeacher, video: Video, count: int) -> dict[shared_prefix.Keep, Cost]:
    """Of the language model on `count` questions behind one prefix, by what its layers keep."""
    layout = teacher.layout(video.clip(teacher), query_set(count))
    features = visual_features(teacher, video)
    head = teacher.model.get_output_embeddings()
    layers = len(teacher.language.layers)

    def at(keep: shared_prefix.Keep, depth: int) -> Cost:
        with cut(teacher.language, depth):
            budget = activation_budget(teacher, len(layout.ids), keep)
            return measure(
                lambda: [
                    shared_prefix.answer_losses(teacher.language, head, layout, features[0], features[1:], budget)
                ],
                [teacher.model],
                features,
            )

    # from where DeepStack no longer adds anything, and the last layer, which answers only, does not either
    depth = min(len(features) + 1, layers - 1)
    found = {keep: per_layer(functools.partial(at, keep), depth) for keep in shared_prefix.Keep}
    free = [found[shared_prefix.Keep.ALL]] * layers
    return {keep: stack([parts] * layers, free) for keep, parts in found.items()}


def activation_budget(teacher: QwenVLTeacher, tokens: int, keep: shared_prefix.Keep) -> int:
    """The smallest `activation_bytes` with which the Teacher's layers keep as much as `keep`."""
    low, high = 0, 2**62
    while low < high:
        middle = (low + high) // 2
        enough = shared_prefix.how_much(teacher.language.layers, tokens, middle, META) <= keep
        low, high = (low, middle) if enough else (middle + 1, high)
    return low


def stock_teacher_cost(teacher: QwenVLTeacher, video: Video) -> tuple[Cost, Cost]:
    """(vision, language) of one question in transformers' own classes, without checkpoints."""
    from transformers.vision_utils import get_vision_interpolation_indices_and_weights, get_vision_position_ids

    frames = video.frames(torch.float32)
    clip = video.clip(teacher)
    visual, grid = teacher.visual, teacher.grid(clip)
    merge = teacher.video.merge_size
    places, factors = get_vision_interpolation_indices_and_weights(
        grid, visual.num_grid_per_side, visual.interpolation_mode, visual.interpolation_align_corners, merge
    )
    placed = {
        "interp_indices": places.to(META),
        "interp_weights": factors.to(META),
        "position_ids": get_vision_position_ids(grid, merge).to(META),
    }

    def see() -> list[Tensor]:
        rows, _ = preprocess_video(frames, teacher.video)
        # the grid stays on the CPU: the frames' lengths are a Python list
        seen = visual(rows.to(teacher.model.dtype), grid_thw=grid, return_dict=True, **placed)
        return [seen.pooler_output, *seen.deepstack_features]

    ((prompt, answer),) = teacher.chats(clip, [GOAL])
    ids = torch.tensor([prompt + answer])
    positions = teacher.positions(ids, clip).to(META)
    tokens = (ids[0] == teacher.model.config.video_token_id).nonzero().flatten().to(META)
    features = visual_features(teacher, video)

    def read() -> list[Tensor]:  # of a few layers
        embeds = teacher.language.embed_tokens(ids.to(META))[0].index_copy(0, tokens, features[0])
        for feature in features[1:]:  # added before the layers, not between them: meta tensors have no masks
            embeds = embeds.index_add(0, tokens, feature)
        hidden = teacher.language(inputs_embeds=embeds[None], position_ids=positions, use_cache=False).last_hidden_state
        return [teacher.model.lm_head(hidden[0, -len(answer) - 1 : -1]).float()]

    def at(depth: int) -> Cost:
        with cut(teacher.language, depth):
            return measure(read, [teacher.model], features)

    parts = [per_layer(at, 1)] * len(teacher.language.layers)
    return measure(see, [teacher.model], [frames]), stack(parts, parts)


def preprocessing_cost(teacher: QwenVLTeacher, video: Video) -> Cost:
    """Frames to patches: no products, only bytes."""
    frames = video.frames(teacher.model.dtype)
    return measure(lambda: [preprocess_video(frames, teacher.video)[0]], [], [frames])
