"""What is true in a video, frame by frame, and the Teacher's questions with their answers.

Facts come from simulator state (`facts_of`), or for a Reasoner's own outputs from ``labeller.py``; never from the
scorer.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from vlmteacher.microworld import world
from vlmteacher.microworld.scene import Scene, Thing, Track
from vlmteacher.queries import QuerySet, QueryStyle

VISIBLE = 0.7  # a ball of this opacity is there
SHADOW = 0.25  # a second one of this opacity is one too many
FASTEST = 10.5  # pixels from frame to frame
NEAR = 4.5  # pixels from the box's centre, per axis
TOUCH = 4.0  # pixels from the ball's centre to a block

# What the packaged Teacher is asked: it is trained on this text, character for character, and knows no other.
STYLE = QueryStyle(
    "A video must carry out this task: {prompt}\n"
    "Write questions to check the video. Each is answered yes or no by watching the video, and Yes means satisfied. "
    "Write one goal question about the final result and one to three process questions about rules that must hold "
    "all the way. "
    'Answer only with JSON: {"goal": "...", "process": ["...", "..."]}',
    own_wording=True,
)


@dataclass(frozen=True)
class Facts:
    """Arrays over the T frames of one video. Boxes and blocks are those of the first frame, whatever becomes of them.

    count: balls of the scene's ball colour, 0, 1 or 2 (two or more). position: (T, 2) of the clearest ball of any
    colour, NaN where there is none. color: index of its colour, 6 for none. inside: index of the colour of the box
    that it is in, 6 for none. touching, jumped, intact: booleans (jumped: since the frame before). changed: (T, cells),
    where the scenery is not what it was at first.
    """

    count: np.ndarray
    position: np.ndarray
    color: np.ndarray
    inside: np.ndarray
    touching: np.ndarray
    jumped: np.ndarray
    intact: np.ndarray
    changed: np.ndarray


_COLORS = list(world.COLORS)
NONE = len(_COLORS)


def jumps(position: np.ndarray) -> np.ndarray:
    """Whether the ball is further than `FASTEST` from where it was in the frame before; (T,)."""
    step = np.hypot(*np.diff(position, axis=0).T)
    return np.concatenate([[False], np.nan_to_num(step) > FASTEST])


def cells(mask: np.ndarray) -> np.ndarray:
    """Which of the 16-pixel cells, row by row, a mask (H, W) covers by a fiftieth or more."""
    side = world.SIZE // world.CELL
    return mask.reshape(side, world.CELL, side, world.CELL).mean((1, 3)).ravel() > 0.02


def _is_ball(thing: Thing) -> bool:
    return thing.shape == "disc" and not thing.outline


def _kept(thing: Thing, was: Thing) -> bool:
    """Whether a box or a block looks as it did."""
    same = (thing.at, thing.color) == (was.at, was.color)
    return same and thing.alpha >= VISIBLE and thing.blend <= 1 - VISIBLE


def _changes(track: Track) -> np.ndarray:
    """(T, cells): where a box or a block fades, moves, changes colour."""
    changed = np.zeros((len(track), (world.SIZE // world.CELL) ** 2), bool)
    for t, things in enumerate(track):
        for thing, was in zip(things, track[0], strict=True):
            if not _is_ball(was) and not _kept(thing, was):
                changed[t] |= cells(world.mask(was)) | cells(world.mask(thing))
    return changed


def facts_of(scene: Scene, track: Track) -> Facts:
    """Facts from the simulator's own state."""
    length = len(track)
    position = np.full((length, 2), np.nan)
    count, color, inside = np.zeros(length, int), np.full(length, NONE), np.full(length, NONE)
    touching, intact = np.zeros(length, bool), np.ones(length, bool)
    boxes = [i for i, thing in enumerate(track[0]) if thing.outline]
    blocks = [thing for thing in track[0] if not thing.outline and not _is_ball(thing)]
    for t, things in enumerate(track):
        balls = [thing for thing in things if _is_ball(thing)]
        alphas = sorted((b.alpha for b in balls if b.color == scene.ball_color), reverse=True)
        if alphas and alphas[0] >= VISIBLE:
            count[t] = 1 + any(a >= SHADOW for a in alphas[1:])
        best = max(balls, key=lambda b: b.alpha)
        if best.alpha >= 0.4:
            position[t] = best.at
            color[t] = _COLORS.index(best.color)
            for box, was in ((things[i], track[0][i]) for i in boxes):
                if box.alpha >= 0.5 and np.max(np.abs(position[t] - box.at)) <= NEAR:
                    inside[t] = _COLORS.index(was.color)
        for ball in balls:
            if ball.alpha >= 0.4:
                touching[t] |= any(world.distance_to_block(ball.at, b) < TOUCH for b in blocks)
        intact[t] = all(_kept(thing, was) for thing, was in zip(things, track[0], strict=True) if not _is_ball(was))
    return Facts(count, position, color, inside, touching, jumps(position), intact, _changes(track))


QUESTIONS = {
    "goal": (
        "Is the {ball} ball inside the {box} box at the end?",
        "Does the {ball} ball end up in the {box} box?",
    ),
    "one": ("Is there exactly one {ball} ball in every frame?", "Is exactly one {ball} ball visible all the time?"),
    "smooth": ("Does the {ball} ball move smoothly, without jumps?", "Is the motion of the {ball} ball smooth?"),
    "avoid": (
        "Does the {ball} ball stay off the dark blocks all the way?",
        "Does the {ball} ball avoid the dark blocks?",
    ),
    "scenery": ("Do all boxes and blocks stay as they are?", "Do all boxes stay as they are?"),
}
PROCESS = {"move": ("one", "smooth", "scenery"), "maze": ("avoid", "one", "scenery")}


def right_queries(scene: Scene) -> QuerySet:
    """The queries that the Teacher learns to write for a task."""
    names = {"ball": scene.ball_color, "box": scene.target.color}
    wording = 1 if scene.family == "move" else 0
    process = [QUESTIONS[k][wording if k == "scenery" else 0].format(**names) for k in PROCESS[scene.family]]
    return QuerySet(goal=QUESTIONS["goal"][0].format(**names), process=tuple(process))


def answer(kind: str, facts: Facts, ball: str, box: str) -> bool:
    """The true answer to a question of `kind` about the `ball`-coloured ball and the `box`-coloured box."""
    if kind == "scenery":
        return bool(facts.intact.all())
    right_color = bool((facts.color == _COLORS.index(ball)).all())
    if kind == "goal":
        last = slice(-2, None)
        there = (facts.inside[last] == _COLORS.index(box)) & (facts.color[last] == _COLORS.index(ball))
        return bool((there & (facts.count[last] == 1)).all())
    if kind == "one":
        return right_color and bool((facts.count == 1).all())
    if kind == "smooth":
        return bool(not facts.jumped.any() and (facts.count > 0).all() and right_color)
    if kind == "avoid":
        return bool(not facts.touching.any() and not np.isnan(facts.position).any())
    raise ValueError(f"unknown kind of question {kind!r}")


def ask(scene: Scene, facts: Facts, rng: np.random.Generator, extras: int = 2) -> list[tuple[str, bool]]:
    """The task's own questions and `extras` others (other names, other wordings), with their answers."""
    names = {"ball": scene.ball_color, "box": scene.target.color}
    asked = []
    kinds = ["goal", *PROCESS[scene.family]]
    canonical = right_queries(scene).questions
    for kind, text in zip(kinds, canonical, strict=True):
        asked.append((text, answer(kind, facts, **names)))
    for extra in range(extras):
        kind = str(rng.choice(["goal", "goal", "goal", "one", "smooth", "avoid", "scenery"]))
        kind = "goal" if extra < extras // 2 else kind  # which box it is, is what is hardest to learn
        other = dict(names)
        if kind == "goal" and rng.random() < 0.7:
            seen = [b.color for b in scene.boxes]
            inside = facts.inside[-1]
            if inside != NONE and rng.random() < 0.5:
                other["box"] = _COLORS[inside]
            else:
                other["box"] = str(rng.choice(seen if rng.random() < 0.7 else _COLORS))
        if kind != "scenery" and rng.random() < 0.15:
            other["ball"] = str(rng.choice(_COLORS))
            if other["ball"] != scene.ball_color:
                if kind != "goal":
                    kind = "one"
                asked.append((_wording(kind, rng).format(**other), False))
                continue
        asked.append((_wording(kind, rng).format(**other), answer(kind, facts, **other)))
    return asked


def _wording(kind: str, rng: np.random.Generator) -> str:
    return QUESTIONS[kind][int(rng.integers(len(QUESTIONS[kind])))]
