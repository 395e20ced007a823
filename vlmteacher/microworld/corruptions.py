"""Corruptions: wrong videos of a scene as tracks, for the Teacher's training and for the scorer's tests.

A corruption breaks the goal or a rule of the task. Those that fit most families are here; a family's own are in its
file (`Family.corruptions`).
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np

from vlmteacher.microworld import world
from vlmteacher.microworld.families import FAMILIES
from vlmteacher.microworld.families.base import Corruption
from vlmteacher.microworld.scene import NUM_FRAMES, SIZE, Scene, Thing, Track, edited, perform, rerouted


def _actor(scene: Scene, rng: np.random.Generator) -> int:
    return int(rng.choice(scene.actors))


def _other_color(rng: np.random.Generator, *used: str) -> str:
    return str(rng.choice([c for c in world.COLORS if c not in used]))


def _interval(rng: np.random.Generator, shortest: int = 2) -> tuple[int, int]:
    first = int(rng.integers(1, NUM_FRAMES - shortest + 1))
    return first, int(rng.integers(first + shortest, NUM_FRAMES + 1))


def _is_visible(track: Track, right: Track, thing: Thing) -> bool:
    """Whether at least half of the thing's area differs visibly from the right track in at least three frames."""
    difference = np.sqrt(((world.draw(track) - world.draw(right)) ** 2).sum(-1)) > 0.35
    return bool((difference.sum((1, 2)) >= 0.5 * world.mask(thing).sum()).sum() >= 3)


def static(scene: Scene, rng: np.random.Generator) -> Track:
    return [scene.things] * NUM_FRAMES


def backwards(scene: Scene, rng: np.random.Generator) -> Track:
    return perform(scene)[::-1]


def final_only(scene: Scene, rng: np.random.Generator) -> Track:
    return [perform(scene)[-1]] * NUM_FRAMES


def half_finished(scene: Scene, rng: np.random.Generator) -> Track:
    """Stop half-way."""
    track, stop = perform(scene), int(rng.integers(3, 8))
    return [track[min(t, stop)] for t in range(NUM_FRAMES)]


def mistaken(scene: Scene, rng: np.random.Generator) -> Track:
    """Make the family's systematic mistake."""
    return perform(FAMILIES[scene.family].mistaken(scene))


def forbidden(scene: Scene, rng: np.random.Generator) -> Track:
    """Reach the goal in the family's forbidden way."""
    return FAMILIES[scene.family].forbidden(scene)


def wrong_target(scene: Scene, rng: np.random.Generator) -> Track:
    """End in another box, order, colour, size or angle than the task's."""
    return perform(FAMILIES[scene.family].wrong(scene, rng))


def near_miss(scene: Scene, rng: np.random.Generator) -> Track:
    """End beside the goal, for one actor that moves."""
    which = int(rng.choice([k for k, points in enumerate(scene.ways) if len(points) > 1]))
    x, y = scene.ways[which][-1]
    while True:
        angle, away = rng.uniform(0, 2 * np.pi), rng.uniform(9, 15)
        end = np.clip((x + away * np.cos(angle), y + away * np.sin(angle)), 6, SIZE - 6)
        if np.max(np.abs(end - (x, y))) >= 7:
            break
    ways = list(scene.ways)
    ways[which] = (*ways[which][:-1], (float(end[0]), float(end[1])))
    return perform(rerouted(scene, *ways))


def teleport(scene: Scene, rng: np.random.Generator) -> Track:
    """Jump ahead, aside for a moment, or to the goal at once."""
    track, kind = perform(scene), int(rng.integers(3))
    if kind == 0:
        k = int(rng.integers(1, 5))
        return [track[t] if t < k else track[min(t + 6, NUM_FRAMES - 1)] for t in range(NUM_FRAMES)]
    if kind == 1:
        k, length, actor = int(rng.integers(2, 9)), int(rng.integers(1, 4)), _actor(scene, rng)
        while True:
            x, y = rng.uniform(7, SIZE - 7, 2)
            if np.hypot(x - track[k][actor].x, y - track[k][actor].y) > 18:
                break
        return edited(track, actor, lambda t, thing: {"x": float(x), "y": float(y)} if k <= t < k + length else {})
    k = int(rng.integers(1, 5))
    return [track[0] if t < k else track[-1] for t in range(NUM_FRAMES)]


def vanish(scene: Scene, rng: np.random.Generator) -> Track:
    """Fade, at least in part, for some frames or for good."""
    first, last = _interval(rng)
    depth = float(rng.uniform(0, 0.4))
    return edited(perform(scene), _actor(scene, rng), lambda t, _: {"alpha": depth} if first <= t < last else {})


def fade_through(scene: Scene, rng: np.random.Generator) -> Track:
    """Fade out at the start and in at the goal, or change opacity on the way."""
    track, actor = perform(scene), _actor(scene, rng)
    if rng.random() < 0.5:
        arrived = np.clip(np.arange(NUM_FRAMES) / rng.uniform(4, 11), 0, 1)
        start, end = track[0][actor], track[-1][actor]
        faded = edited(track, actor, lambda t, _: {**vars(start), "alpha": float(1 - arrived[t])})
        return [(*things, replace(end, alpha=float(w))) for things, w in zip(faded, arrived, strict=True)]
    alphas = np.interp(np.arange(NUM_FRAMES), [0, *np.sort(rng.uniform(1, 12, 3)), 12], [1, *rng.uniform(0, 1, 3), 1])
    return edited(track, actor, lambda t, _: {"alpha": float(alphas[t])})


def duplicate(scene: Scene, rng: np.random.Generator) -> Track:
    """Add a copy of an actor that stays behind or moves elsewhere."""
    track, actor = perform(scene), _actor(scene, rng)
    start = scene.things[actor]
    while True:
        first, last = _interval(rng)
        path = np.repeat([start.at], NUM_FRAMES, 0)
        if rng.random() < 0.6:
            path = world.trajectory((start.at, (float(rng.uniform(7, SIZE - 7)), float(rng.uniform(7, SIZE - 7)))))
        alpha = float(rng.uniform(0.6, 1.0))
        far = [np.hypot(*np.subtract(things[actor].at, place)) for things, place in zip(track, path, strict=True)]
        sizes = [start.size + things[actor].size for things in track]
        if sum(far[t] > sizes[t] + 1 for t in range(first, last)) >= 3:
            return [
                (*things, replace(start.moved((float(x), float(y))), alpha=alpha if first <= t < last else 0.0))
                for t, (things, (x, y)) in enumerate(zip(track, path, strict=True))
            ]


def ghost(scene: Scene, rng: np.random.Generator) -> Track:
    """Show a right and a wrong actor, both half-transparent: the prediction of an undecided Reasoner."""
    share = float(rng.uniform(0.05, 0.95))
    track, wrong = perform(scene), wrong_target(scene, rng)
    actor = next(i for i in scene.actors if any(a[i] != b[i] for a, b in zip(track, wrong, strict=True)))
    faded = edited(track, actor, lambda t, _: {"alpha": share if t else 1.0})
    return [
        (*things, replace(other[actor], alpha=1 - share if t else 0.0))
        for t, (things, other) in enumerate(zip(faded, wrong, strict=True))
    ]


def wrong_color(scene: Scene, rng: np.random.Generator) -> Track:
    """Give an actor another colour from some frame on, or for three frames."""
    first, actor = int(rng.integers(1, 9)), _actor(scene, rng)
    last = NUM_FRAMES if rng.random() < 0.6 else first + 3
    track = perform(scene)
    color = _other_color(rng, track[-1][actor].color, track[-1][actor].other)
    new = {"color": color, "other": "", "blend": 0.0}
    return edited(track, actor, lambda t, _: new if first <= t < last else {})


def eroded_scenery(scene: Scene, rng: np.random.Generator) -> Track:
    """Let a thing of the scenery visibly fade, move or change colour."""
    right = perform(scene)
    while True:
        first, kind = int(rng.integers(1, 9)), int(rng.integers(3))
        which = int(rng.choice([i for i in range(len(scene.things)) if i not in scene.actors]))
        thing = scene.things[which]
        change: dict[str, Any] = {"alpha": float(rng.uniform(0, 0.4))}
        if kind == 1:
            change = {"color": _other_color(rng, thing.color, *(actor.color for actor in scene.moving))}
        elif kind == 2:
            shift = rng.choice([-1, 1], 2) * rng.uniform(5, 9, 2)
            x, y = np.clip(np.add(thing.at, shift), 9, SIZE - 9)
            if max(abs(x - thing.x), abs(y - thing.y)) >= 4:
                change = {"x": float(x), "y": float(y)}
        track = right[:first] + [
            tuple(replace(x, **change) if i == which else x for i, x in enumerate(s)) for s in right[first:]
        ]
        if _is_visible(track, right, thing):
            return track


def another_instance(scene: Scene, rng: np.random.Generator) -> Track:
    return perform(world.sample_scene(rng, scene.family))


CORRUPTIONS: dict[str, Corruption | None] = {
    "static": static,
    "backwards": backwards,
    "final_only": final_only,
    "half_finished": half_finished,
    "mistaken": mistaken,
    "wrong_target": wrong_target,
    "near_miss": near_miss,
    "wall_crossing": None,
    "teleport": teleport,
    "vanish": vanish,
    "fade_through": fade_through,
    "duplicate": duplicate,
    "ghost": ghost,
    "wrong_color": wrong_color,
    "eroded_scenery": eroded_scenery,
    "disguise": None,
    "another_instance": another_instance,
    "forbidden": forbidden,
}
"""The general corruptions, in the order in which training draws from them; None: only in families that define it."""


def kinds(family: str) -> list[str]:
    """The corruptions that make sense in a family, in the order of `CORRUPTIONS`; others of its own come last."""
    own, without = FAMILIES[family].corruptions, FAMILIES[family].without
    general = [kind for kind, make in CORRUPTIONS.items() if kind in own or (make and kind not in without)]
    return [*general, *(kind for kind in own if kind not in CORRUPTIONS)]


def corrupt(kind: str, scene: Scene, rng: np.random.Generator) -> Track:
    """Draw a wrong video of a scene. Raises KeyError for a kind that makes no sense in its family (see `kinds`)."""
    make = FAMILIES[scene.family].corruptions.get(kind) or CORRUPTIONS[kind]
    if make is None:
        raise KeyError(f"{kind} of {scene.family}")
    return make(scene, rng)
