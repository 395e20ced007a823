"""The rule scorer: checks goal and every rule of a microworld task, frame by frame, on pixels alone.

If actors move, each pixel is assigned to the nearest of the world's colours, and an actor is the largest connected
region of its colour. If a thing grows, turns or changes its colour, each frame is assigned to the nearest of the right
pictures at all stages and compared with it. The scorer has no learned part, and the Teacher is never trained on its
verdicts (``labeller.py`` makes the labels for that).
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import ArrayLike

from vlmteacher.microworld import world
from vlmteacher.microworld.families import FAMILIES
from vlmteacher.microworld.scene import Scene, Thing, between, masks

_NAMES = ("background", *world.PAINTS)
_PALETTE = np.asarray([world.BACKGROUND, *world.PAINTS.values()], np.float32)

# Set on ground truths and corruptions alone, rendered and sent through the packaged VAE, before any method was run.
NEAREST = 0.35  # largest distance in RGB from a pixel to the colour that it is assigned to
AREA = (0.4, 1.9)  # of an actor's true area
SPREAD = 8  # pixels by which the longer side of an actor's bounding box may exceed its diameter
STRAY = 20  # pixels of an actor's colour outside it
JUMP = 11.0  # pixels from frame to frame; the fastest right video makes 8
AT_GOAL = 4.0  # pixels from the goal, per axis
AT_START = 4.0
INTACT = 0.6  # share of a thing's visible pixels that must keep its colour
DEBRIS = 0.64  # share of the smallest thing's area, and of a ball's at most, that may be neither thing nor ground
GRACE = 1  # frames in which codec blur may spoil an actor, the scenery or the ground
PASSING = 1  # frames before and after an actor covers a thing in which a codec may lose it
SPOTS = 12  # pixels of a wrong colour away from edges
STAGES = np.arange(-1.2, 2.21, 0.05)  # of a change: 0 is the start and 1 the goal
AT_STAGE = 0.2
LEAP = 0.35  # of a change, from frame to frame; the right video makes 0.1
BACK = 0.15  # of a change, undone


@dataclass(frozen=True)
class Verdict:
    """The verdict on a video.

    Attributes:
        success: goal and every rule hold in every frame.
        score: in [0, 1]: (0.3 + 0.7 goal), times half the share of good frames for each rule that is broken.
        subscores: for the goal and each rule the share of frames in which it holds.
    """

    success: bool
    score: float
    subscores: dict[str, float]


def score(frames: np.ndarray, scene: Scene) -> Verdict:
    """Judge `frames` (T, H, W, 3), float in [0, 1], as an answer to `scene`.

    Raises ValueError: frames of another size than the world's, or fewer than two.
    """
    if frames.ndim != 4 or frames.shape[1:] != (world.SIZE, world.SIZE, 3) or len(frames) < 2:
        raise ValueError(f"frames of shape {frames.shape}: expected (T, {world.SIZE}, {world.SIZE}, 3), T >= 2")
    frames = np.asarray(frames, np.float32)
    moves = any(len(way) > 1 for way in scene.ways)
    subscores = _judge_motion(frames, scene) if moves else _judge_change(frames, scene)
    return Verdict(
        success=all(value == 1.0 for value in subscores.values()),
        score=_total(subscores),
        subscores=subscores,
    )


def _total(subscores: dict[str, float]) -> float:
    rules = [value if value == 1.0 else 0.5 * value for name, value in subscores.items() if name != "goal"]
    return (0.3 + 0.7 * subscores["goal"]) * float(np.prod(rules))


def _graced(kept: ArrayLike) -> float:
    """Return the share of frames that keep a rule; 1 if at most `GRACE` frames break it."""
    broken = np.logical_not(kept)
    return 1.0 if broken.sum() <= GRACE else float(1 - broken.mean())


# ---------------------------------------------------------------- things that move


def _judge_motion(frames: np.ndarray, scene: Scene) -> dict[str, float]:
    kinds = _classify(frames)
    tracks = [_follow(kinds, scene, actor) for actor in scene.moving]
    paths = np.stack([centres for centres, _ in tracks])
    one = np.stack([whole for _, whole in tracks])
    ends = np.asarray([points[-1] for points in scene.ways])[:, None]
    starts = np.asarray([points[0] for points in scene.ways])

    free = np.ones(kinds.shape, bool)
    for actor, path in zip(scene.moving, paths, strict=True):
        free &= masks([replace(actor.moved(tuple(at)), size=actor.size + 2.5) for at in path]) == 0
    clear = _clear(free)
    kept = [_kept(kinds == _NAMES.index(thing.color), world.mask(thing) > 0.9, clear) for thing in scene.scenery]
    known = [0, *(_NAMES.index(actor.color) for actor in scene.moving)]
    debris = ~np.isin(kinds, known) & _plain(scene) & free

    at_goal = np.abs(paths[:, -2:] - ends).max(-1) <= AT_GOAL
    present = one[:, -2:].any(-1).all()
    steps = np.hypot(*np.moveaxis(np.diff(paths, axis=1), -1, 0))
    return {
        "goal": float(at_goal.all(0).mean()) if present else 0.0,
        "start": float(np.abs(paths[:, 0] - starts).max() <= AT_START),
        "one": _graced(one.all(0)),
        "smooth": float((steps <= JUMP).all(0).mean()),
        "scenery": _graced(np.stack(kept).all(0)) if kept else 1.0,
        "clean": _graced(debris.sum((1, 2)) <= _debris(scene)),
        **FAMILIES[scene.family].rules(scene, paths),
    }


def _classify(frames: np.ndarray) -> np.ndarray:
    """Return (T, H, W), the index into `_NAMES` of each pixel's colour, -1 for none."""
    pixels = frames.reshape(-1, 3).T
    squared = (_PALETTE**2).sum(-1)[:, None] - 2 * _PALETTE @ pixels
    kinds = np.where(squared.min(0) + (pixels**2).sum(0) < NEAREST**2, squared.argmin(0), -1)
    return kinds.reshape(frames.shape[:3])


def _follow(kinds: np.ndarray, scene: Scene, actor: Thing) -> tuple[np.ndarray, np.ndarray]:
    """Return an actor's centres (T, 2), the last known while it is absent, and (T,) whether it is single and whole."""
    own, radius = kinds == _NAMES.index(actor.color), actor.size
    if any(thing.color == actor.color for thing in scene.scenery):  # erosion removes outlines and keeps discs
        inner = own[:, 1:-1, 1:-1] & own[:, :-2, 1:-1] & own[:, 2:, 1:-1]
        own = np.pad(inner & own[:, 1:-1, :-2] & own[:, 1:-1, 2:], ((0, 0), (1, 1), (1, 1)))
        radius -= 1
    frame, area, centre, spread = _regions(own)
    centres, whole, last = [], np.zeros(len(kinds), bool), np.asarray(actor.at)
    for t in range(len(kinds)):
        here = np.flatnonzero(frame == t)
        if len(here):
            best = here[area[here].argmax()]
            if area[best] >= 8:
                last = centre[best]
            true = AREA[0] <= area[best] / (np.pi * radius**2) <= AREA[1]
            whole[t] = true and spread[best] <= 2 * radius + SPREAD and area[here].sum() - area[best] <= STRAY
        centres.append(last)
    return np.stack(centres), whole


def _regions(pixels: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Find the 4-connected regions of (T, H, W): frame, area, centre (N, 2), longer side of the bounding box.

    Runs of pixels in a row are joined with the runs that they touch in the next row until no label changes.
    """
    length, height, width = pixels.shape
    padded = np.zeros((length, height + 1, width + 2), np.int8)  # an empty row separates the frames
    padded[:, :-1, 1:-1] = pixels
    edges = np.diff(padded.reshape(-1, width + 2), axis=1)
    row, start = np.nonzero(edges == 1)
    end = np.nonzero(edges == -1)[1]
    begins, ends = row * (width + 2) + start, row * (width + 2) + end
    low = np.searchsorted(ends, begins + width + 2, "right")
    high = np.maximum(np.searchsorted(begins, ends + width + 2, "left"), low)
    upper = np.repeat(np.arange(len(row)), high - low)
    lower = np.arange(len(upper)) - np.repeat(np.cumsum(high - low) - (high - low), high - low) + low[upper]
    label, before = np.arange(len(row)), None
    while before is None or (label != before).any():
        before = label.copy()
        least = np.minimum(label[upper], label[lower])
        np.minimum.at(label, upper, least)
        np.minimum.at(label, lower, least)
        label = label[label]
    first, index = np.unique(label, return_inverse=True)
    y, count = row % (height + 1), end - start
    area = np.bincount(index, count)
    x_mean = np.bincount(index, count * (start + end) / 2) / area
    y_mean = np.bincount(index, count * (y + 0.5)) / area
    box = np.full((4, len(first)), -(width + height))
    for side, values in zip(box, (-start, end, -y, y + 1), strict=True):
        np.maximum.at(side, index, values)
    spread = np.maximum(box[0] + box[1], box[2] + box[3])
    return row[first] // (height + 1), area, np.stack([x_mean, y_mean], axis=1), spread


def _clear(free: np.ndarray) -> np.ndarray:
    """Return (T, H, W), where no actor is within `PASSING` frames."""
    clear = free.copy()
    for shift in range(1, PASSING + 1):
        clear[shift:] &= free[:-shift]
        clear[:-shift] &= free[shift:]
    return clear


def _kept(right: np.ndarray, where: np.ndarray, free: np.ndarray) -> np.ndarray:
    """Return (T,), whether enough of a thing's visible pixels are right (a hidden thing counts as kept)."""
    visible = where & free
    count = visible.sum((1, 2))
    return (count < 8) | ((right & visible).sum((1, 2)) >= INTACT * count)


def _debris(scene: Scene) -> float:
    """Return the number of pixels that may be neither thing nor ground."""
    areas = [world.mask(thing).sum() for thing in scene.things]
    return DEBRIS * min(np.pi * world.RADIUS**2, *areas)


def _plain(scene: Scene) -> np.ndarray:
    """Return (H, W), the ground outside the scenery.

    Boxes of one colour blur alike, and what a codec leaves around them would add up: their surroundings are then left
    out.
    """
    scenery = world.draw_still(scene.scenery)
    ground = np.abs(scenery - np.asarray(world.BACKGROUND, np.float32)).max(-1) < 0.02
    alike = len({box.color for box in scene.boxes}) < len(scene.boxes)
    return ground & _even(scenery[None])[0] if alike else ground


# ---------------------------------------------------------------- things that change where they are


def _judge_change(frames: np.ndarray, scene: Scene) -> dict[str, float]:
    index, start, goal = scene.actors[0], scene.moving[0], scene.goals[0]
    stages = STAGES
    if goal.blend:
        stages = stages[(stages > -0.01) & (stages < 1.01)]
    stages = stages[start.size + stages * (goal.size - start.size) >= 2]
    states = [
        tuple(between(start, goal, float(s)) if i == index else x for i, x in enumerate(scene.things)) for s in stages
    ]
    pictures = world.draw(states)
    flat = pictures.reshape(len(stages), -1)
    best = ((flat**2).sum(1) - 2 * frames.reshape(len(frames), -1) @ flat.T).argmin(1)
    stage = stages[best]
    wrong = ((frames - pictures[best]) ** 2).sum(-1) > NEAREST**2

    own = masks([states[b][index] for b in best]) > 0.9
    covers = np.stack([world.mask(thing) for thing in scene.things])
    shown = [~(covers[i + 1 :].max(0, initial=0.0) > 0.1) for i in range(len(covers))]  # not under things drawn later
    whole = (wrong & own & shown[index]).sum((1, 2)) <= (1 - INTACT) * (own & shown[index]).sum((1, 2))
    kept = [_kept(~wrong, covers[i] > 0.9, shown[i] & ~(own & (i < index))) for i in range(len(covers)) if i != index]
    steps = np.diff(stage)
    back = np.maximum.accumulate(stage) - stage
    return {
        "goal": float((np.abs(stage[-2:] - 1) <= AT_STAGE).mean()),
        "start": float(abs(stage[0]) <= AT_STAGE),
        "one": float(whole.mean()),
        "smooth": float((np.abs(steps) <= LEAP).mean()),
        "direct": float((back <= BACK).mean()),
        "scenery": _graced(np.stack(kept).all(0)),
        "clean": _graced((wrong & _even(pictures[best])).sum((1, 2)) <= SPOTS),
    }


def _even(pictures: np.ndarray) -> np.ndarray:
    """Return (N, H, W), where a picture has one colour within two pixels, so that blur changes nothing."""
    edges = np.zeros(pictures.shape[:3], bool)
    edges[:, 1:] |= (np.abs(np.diff(pictures, axis=1)) > 0.05) @ np.ones(3, bool)
    edges[:, :, 1:] |= (np.abs(np.diff(pictures, axis=2)) > 0.05) @ np.ones(3, bool)
    grown = edges.copy()
    for axis in (1, 2):
        for shift in (-1, 1):
            grown |= np.roll(edges, shift, axis)
    return ~grown
