"""Wrong videos of every kind, with their exact symbolic state: the Teacher's lessons and the scorer's own test.

A video is a list of :class:`FrameState`. `right_states` tells the right one; each function in `CORRUPTIONS` tells one
that breaks the goal or a rule. `render_states` draws either.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from vlmteacher.microworld import world
from vlmteacher.microworld.world import Box, Scene


@dataclass(frozen=True)
class Ball:
    x: float
    y: float
    color: str
    alpha: float = 1.0


@dataclass(frozen=True)
class FrameState:
    """What stands in one frame; opacities in [0, 1]. `tints` lie over boxes and blocks, under the balls."""

    balls: tuple[Ball, ...]
    boxes: tuple[tuple[Box, float], ...]
    blocks: tuple[tuple[tuple[float, float], float], ...]
    tints: tuple[tuple[Box, float], ...] = ()


States = list[FrameState]


def render_states(states: Sequence[FrameState]) -> np.ndarray:
    """Draw the video (T, H, W, 3)."""
    frames = []
    known: dict[tuple, np.ndarray] = {}
    for state in states:
        key = (state.boxes, state.blocks, state.tints)
        if key not in known:
            image = world.render_scenery((), ())
            for block, alpha in state.blocks:
                image = world.paint(image, world.block_mask(block), world.BLOCK_COLOR, alpha)
            for box, alpha in (*state.boxes, *state.tints):
                image = world.paint(image, world.box_mask(box), world.COLORS[box.color], alpha)
            known[key] = image
        image = known[key]
        for ball in state.balls:
            image = world.paint(image, world.ball_mask((ball.x, ball.y)), world.COLORS[ball.color], ball.alpha)
        frames.append(image)
    return np.stack(frames)


def states_of(scene: Scene, positions: np.ndarray) -> States:
    """The scene with its ball at `positions` (T, 2) and nothing else wrong."""
    boxes = tuple((box, 1.0) for box in scene.boxes)
    blocks = tuple((block, 1.0) for block in scene.blocks)
    return [FrameState((Ball(float(x), float(y), scene.ball_color),), boxes, blocks) for x, y in positions]


def right_states(scene: Scene) -> States:
    return states_of(scene, world.trajectory(scene.waypoints))


def _straight(scene: Scene, end: Sequence[float] | np.ndarray) -> np.ndarray:
    return world.trajectory((scene.start, (float(end[0]), float(end[1]))))


def _free_point(scene: Scene, rng: np.random.Generator, away: float) -> tuple[float, float]:
    """A point at least `away` from start and target."""
    while True:
        x, y = rng.uniform(7, world.SIZE - 7, 2)
        far = [np.hypot(x - px, y - py) for px, py in (scene.start, scene.waypoints[-1])]
        if min(far) >= away:
            return float(x), float(y)


def _other_color(scene: Scene, rng: np.random.Generator) -> str:
    return str(rng.choice([c for c in world.COLORS if c != scene.ball_color]))


def _interval(rng: np.random.Generator, shortest: int = 2) -> tuple[int, int]:
    first = int(rng.integers(1, world.NUM_FRAMES - shortest + 1))
    return first, int(rng.integers(first + shortest, world.NUM_FRAMES + 1))


def static(scene: Scene, rng: np.random.Generator) -> States:
    return [right_states(scene)[0]] * world.NUM_FRAMES


def backwards(scene: Scene, rng: np.random.Generator) -> States:
    return right_states(scene)[::-1]


def final_only(scene: Scene, rng: np.random.Generator) -> States:
    return [right_states(scene)[-1]] * world.NUM_FRAMES


def half_finished(scene: Scene, rng: np.random.Generator) -> States:
    """Stops on the way, at least a ball's width before the box."""
    states = right_states(scene)
    return [states[min(t, stop)] for stop in [int(rng.integers(3, 8))] for t in range(world.NUM_FRAMES)]


def wrong_target(scene: Scene, rng: np.random.Generator) -> States:
    """Another box, or no box at all."""
    others = [(b.x, b.y) for i, b in enumerate(scene.boxes) if i != scene.target]
    end = others[int(rng.integers(len(others)))] if others and rng.random() < 0.8 else _free_point(scene, rng, 14)
    return states_of(scene, _straight(scene, end))


def near_miss(scene: Scene, rng: np.random.Generator) -> States:
    """Ends beside the box."""
    box, angle, away = scene.target_box, rng.uniform(0, 2 * np.pi), rng.uniform(9, 15)
    end = np.clip((box.x + away * np.cos(angle), box.y + away * np.sin(angle)), 6, world.SIZE - 6)
    if np.max(np.abs(end - (box.x, box.y))) < 7:
        end = np.asarray(_free_point(scene, rng, 14))
    return states_of(scene, world.trajectory((*scene.waypoints[:-1], tuple(end))))


def wall_crossing(scene: Scene, rng: np.random.Generator) -> States:
    """Straight to the target, over a block (in a scene without blocks: over one that is put there)."""
    a, b = np.asarray(scene.start), np.asarray(scene.waypoints[-1])
    if not scene.blocks:
        scene = replace(scene, blocks=((float(a[0] + b[0]) / 2, float(a[1] + b[1]) / 2),))
    return states_of(scene, _straight(scene, b))


def teleport(scene: Scene, rng: np.random.Generator) -> States:
    """Jumps ahead, aside for a moment, or to the goal at once."""
    states = right_states(scene)
    kind = int(rng.integers(3))
    if kind == 0:
        k = int(rng.integers(1, 6))
        return [states[t] if t < k else states[min(t + 6, world.NUM_FRAMES - 1)] for t in range(world.NUM_FRAMES)]
    if kind == 1:
        k, length = int(rng.integers(2, 9)), int(rng.integers(1, 4))
        x, y = states[k].balls[0].x, states[k].balls[0].y
        while True:
            aside = rng.uniform(7, world.SIZE - 7, 2)
            if np.hypot(aside[0] - x, aside[1] - y) > 18:
                break
        moved = Ball(float(aside[0]), float(aside[1]), scene.ball_color)
        return [replace(s, balls=(moved,)) if k <= t < k + length else s for t, s in enumerate(states)]
    k = int(rng.integers(1, 5))
    return [states[0] if t < k else states[-1] for t in range(world.NUM_FRAMES)]


def vanish(scene: Scene, rng: np.random.Generator) -> States:
    """Fades (partly) away for some frames, at times for good."""
    first, last = _interval(rng)
    depth = float(rng.uniform(0, 0.4))
    states = right_states(scene)
    return [
        replace(s, balls=(replace(s.balls[0], alpha=depth),)) if first <= t < last else s for t, s in enumerate(states)
    ]


def fade_through(scene: Scene, rng: np.random.Generator) -> States:
    """Fades out at the start and in at the target, or goes with changing opacity on the way."""
    states = right_states(scene)
    alphas = np.interp(
        np.arange(world.NUM_FRAMES), [0, *np.sort(rng.uniform(1, 12, 3)), 12], [1, *rng.uniform(0, 1, 3), 1]
    )
    if rng.random() < 0.5:
        there = np.clip(np.arange(world.NUM_FRAMES) / rng.uniform(4, 11), 0, 1)
        a, b = states[0].balls[0], states[-1].balls[0]
        return [
            replace(s, balls=(replace(a, alpha=float(1 - w)), replace(b, alpha=float(w))))
            for s, w in zip(states, there, strict=True)
        ]
    return [replace(s, balls=(replace(s.balls[0], alpha=float(w)),)) for s, w in zip(states, alphas, strict=True)]


def duplicate(scene: Scene, rng: np.random.Generator) -> States:
    """A second ball of the same colour: a still one left behind, or one on its way elsewhere."""
    first, last = _interval(rng)
    states = right_states(scene)
    if rng.random() < 0.4:
        second = np.repeat([scene.start], world.NUM_FRAMES, 0)
        first = max(first, 5)
        last = max(last, first + 2)
    else:
        second = _straight(scene, _free_point(scene, rng, 16))
        first, last = max(first, 4), max(last, 7)
    alpha = float(rng.uniform(0.6, 1.0))
    return [
        replace(s, balls=(*s.balls, Ball(float(second[t][0]), float(second[t][1]), scene.ball_color, alpha)))
        if first <= t < last
        else s
        for t, s in enumerate(states)
    ]


def ghost(scene: Scene, rng: np.random.Generator) -> States:
    """Two half-transparent balls, one on the right way and one on a wrong one: an undecided Reasoner's prediction."""
    share = float(rng.uniform(0.05, 0.95))
    others = [(b.x, b.y) for i, b in enumerate(scene.boxes) if i != scene.target]
    if others and rng.random() < 0.7:
        wrong = _straight(scene, others[int(rng.integers(len(others)))])
    elif scene.blocks and rng.random() < 0.7:
        wrong = _straight(scene, scene.waypoints[-1])
    else:
        wrong = _straight(scene, _free_point(scene, rng, 16))
    states = right_states(scene)
    balls = [
        (replace(s.balls[0], alpha=share), Ball(float(wrong[t][0]), float(wrong[t][1]), scene.ball_color, 1 - share))
        for t, s in enumerate(states)
    ]
    return [s if t == 0 else replace(s, balls=balls[t]) for t, s in enumerate(states)]


def wrong_color(scene: Scene, rng: np.random.Generator) -> States:
    """The ball changes its colour on the way."""
    first, color = int(rng.integers(1, 9)), _other_color(scene, rng)
    states = right_states(scene)
    last = world.NUM_FRAMES if rng.random() < 0.6 else first + 3
    return [
        replace(s, balls=(replace(s.balls[0], color=color),)) if first <= t < last else s for t, s in enumerate(states)
    ]


def eroded_scenery(scene: Scene, rng: np.random.Generator) -> States:
    """A box or a block fades, moves or changes colour."""
    first = int(rng.integers(1, 9))
    states = right_states(scene)
    if scene.blocks and rng.random() < 0.6:
        which, alpha = int(rng.integers(len(scene.blocks))), float(rng.uniform(0, 0.4))
        blocks = tuple((b, alpha if i == which else 1.0) for i, b in enumerate(scene.blocks))
        return [replace(s, blocks=blocks) if t >= first else s for t, s in enumerate(states)]
    which, kind = int(rng.integers(len(scene.boxes))), int(rng.integers(3))
    box, alpha = scene.boxes[which], 1.0
    if kind == 0:
        alpha = float(rng.uniform(0, 0.4))
    elif kind == 1:
        box = replace(box, color=str(rng.choice([c for c in world.COLORS if c not in (box.color, scene.ball_color)])))
    else:
        shift = rng.choice([-1, 1], 2) * rng.uniform(5, 9, 2)
        box = replace(box, x=float(np.clip(box.x + shift[0], 9, 55)), y=float(np.clip(box.y + shift[1], 9, 55)))
        if max(abs(box.x - scene.boxes[which].x), abs(box.y - scene.boxes[which].y)) < 4:
            alpha = 0.0
    boxes = tuple((box, alpha) if i == which else (b, 1.0) for i, b in enumerate(scene.boxes))
    return [replace(s, boxes=boxes) if t >= first else s for t, s in enumerate(states)]


def disguise(scene: Scene, rng: np.random.Generator) -> States:
    """Goes wrong, and the scenery is bent to fit: the wrong box takes the named colour, the crossed blocks fade."""
    others = [b for i, b in enumerate(scene.boxes) if i != scene.target]
    end = others[int(rng.integers(len(others)))] if others else scene.target_box
    states = states_of(scene, _straight(scene, (end.x, end.y)))
    growth = np.clip(np.linspace(-float(rng.uniform(0, 1)), 1, world.NUM_FRAMES), 0, 1) * float(rng.uniform(0.3, 1.0))
    if others:
        fade = float(rng.uniform(0, 1)) if rng.random() < 0.5 else 0.0  # of the right box, at the same time
        named = replace(end, color=scene.target_box.color)
        return [
            replace(
                s,
                tints=((named, float(g)),),
                boxes=tuple((b, 1 - fade * float(g) if i == scene.target else 1.0) for i, b in enumerate(scene.boxes)),
            )
            for s, g in zip(states, growth, strict=True)
        ]
    way = [np.asarray((s.balls[0].x, s.balls[0].y)) for s in states]
    crossed = {b for b in scene.blocks if min(world.distance_to_block(p, b) for p in way) < world.RADIUS}
    return [
        replace(s, blocks=tuple((b, 1 - float(g) if b in crossed else 1.0) for b in scene.blocks))
        for s, g in zip(states, growth, strict=True)
    ]


def another_instance(scene: Scene, rng: np.random.Generator) -> States:
    return right_states(world.sample_scene(rng, scene.family))


CORRUPTIONS: dict[str, Callable[[Scene, np.random.Generator], States]] = {
    f.__name__: f
    for f in (
        static,
        backwards,
        final_only,
        half_finished,
        wrong_target,
        near_miss,
        wall_crossing,
        teleport,
        vanish,
        fade_through,
        duplicate,
        ghost,
        wrong_color,
        eroded_scenery,
        disguise,
        another_instance,
    )
}
