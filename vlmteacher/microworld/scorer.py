"""The judge: goal and every rule of a microworld task, frame by frame, on pixels alone.

Each pixel is given to the nearest of the world's colours; the ball is a connected region of its colour. No learned
part, no look at the Teacher, and the Teacher is never trained on its verdicts (see ``labeller.py`` for those).
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

import numpy as np

from vlmteacher.microworld import world
from vlmteacher.microworld.world import Scene

_NAMES = ("background", "block", *world.COLORS)
_PALETTE = np.asarray([world.BACKGROUND, world.BLOCK_COLOR, *world.COLORS.values()], np.float32)
_BALL_AREA = float(np.pi * world.RADIUS**2)

# Set on ground truths and corruptions alone, rendered and sent through the packaged VAE, before any method was run.
NEAREST = 0.35  # a pixel further than this from every colour of the world belongs to none
AREA = (0.4, 1.9)  # of the ball's true area
SPREAD = 18  # pixels, the longer side of the ball's bounding box
STRAY = 20  # pixels of the ball's colour outside the ball
JUMP = 11.0  # pixels from frame to frame; the fastest right video makes 8
AT_GOAL = 4.0  # pixels from the box's centre, per axis
AT_START = 4.0
CLEARANCE = 4.0  # pixels from the ball's centre to a block; the right path keeps 8
INTACT = 0.6  # share of an object's visible pixels that must keep its colour
DEBRIS = 50  # pixels that are neither scenery nor ball nor background
GRACE = 1  # frames in which codec blur may spoil the ball, the scenery or the ground


@dataclass(frozen=True)
class Verdict:
    """`success`: goal and every rule hold in every frame.

    `score` in [0, 1]: (0.3 + 0.7 goal) times, for each rule that is broken, half the share of frames that keep it.
    """

    success: bool
    score: float
    subscores: dict[str, float]


def _classify(frames: np.ndarray) -> np.ndarray:
    """Index into `_NAMES` of each pixel's colour, -1 for none: (T, H, W)."""
    squared = (frames**2).sum(-1, keepdims=True) - 2 * frames @ _PALETTE.T + (_PALETTE**2).sum(-1)
    return np.where(squared.min(-1) < NEAREST**2, squared.argmin(-1), -1)


def _regions(mask: np.ndarray) -> list[np.ndarray]:
    """4-connected regions of `mask` as (n, 2) arrays of (y, x), largest first."""
    left = mask.copy()
    regions = []
    for y, x in zip(*np.nonzero(mask), strict=True):
        if not left[y, x]:
            continue
        left[y, x] = False
        queue, found = deque([(y, x)]), []
        while queue:
            i, j = queue.popleft()
            found.append((i, j))
            for a, b in ((i - 1, j), (i + 1, j), (i, j - 1), (i, j + 1)):
                if 0 <= a < world.SIZE and 0 <= b < world.SIZE and left[a, b]:
                    left[a, b] = False
                    queue.append((a, b))
        regions.append(np.asarray(found))
    return sorted(regions, key=len, reverse=True)


def score(frames: np.ndarray, scene: Scene) -> Verdict:
    """Judge `frames` (T, H, W, 3), float in [0, 1], as an answer to `scene`.

    Raises:
        ValueError: another shape than the world's frames have.
    """
    if frames.ndim != 4 or frames.shape[1:] != (world.SIZE, world.SIZE, 3) or len(frames) < 2:
        raise ValueError(f"frames of shape {frames.shape}: expected (T, {world.SIZE}, {world.SIZE}, 3), T >= 2")
    kinds = _classify(np.asarray(frames, np.float32))
    color = _NAMES.index(scene.ball_color)
    objects = [(world.box_mask(b) > 0.9, _NAMES.index(b.color)) for b in scene.boxes]
    objects += [(world.block_mask(b) > 0.9, _NAMES.index("block")) for b in scene.blocks]
    scenery = world.render_scenery(scene.boxes, scene.blocks)
    plain = np.abs(scenery - np.asarray(world.BACKGROUND, np.float32)).max(-1) < 0.02

    centre = np.asarray(scene.start)
    centres, one, intact, clean = [], [], [], []
    for kind in kinds:
        regions = _regions(kind == color)
        areas = [len(r) for r in regions]
        if areas and areas[0] >= 8:
            centre = regions[0].mean(0)[::-1] + 0.5
        centres.append(centre)
        spread = max(np.ptp(regions[0], axis=0) + 1) if areas else 0
        whole = bool(areas) and AREA[0] <= areas[0] / _BALL_AREA <= AREA[1] and spread <= SPREAD
        one.append(whole and sum(areas[1:]) <= STRAY)
        free = world.ball_mask(centre, world.RADIUS + 2.5) == 0
        intact.append(all(_kept(kind, mask & free, wanted) for mask, wanted in objects))
        clean.append(int(((kind != 0) & (kind != color) & plain & free).sum()) <= DEBRIS)

    way = np.asarray(centres)
    target = scene.target_box
    at_goal = [bool(np.max(np.abs(p - (target.x, target.y))) <= AT_GOAL) for p in way[-2:]]
    found_last = one[-1] or one[-2]
    jumps = np.hypot(*np.diff(way, axis=0).T)
    subscores = {
        "goal": float(np.mean(at_goal)) if found_last else 0.0,
        "start": float(np.max(np.abs(way[0] - scene.start)) <= AT_START),
        "one": _graced(one),
        "smooth": float(np.mean(jumps <= JUMP)),
        "avoid": float(np.mean([all(world.distance_to_block(p, b) >= CLEARANCE for b in scene.blocks) for p in way])),
        "scenery": _graced(intact),
        "clean": _graced(clean),
    }
    return Verdict(
        success=all(value == 1.0 for value in subscores.values()),
        score=_total(subscores),
        subscores=subscores,
    )


def _graced(kept: list[bool]) -> float:
    """Share of frames that keep a rule; 1 when no more than `GRACE` frames break it."""
    return 1.0 if kept.count(False) <= GRACE else float(np.mean(kept))


def _total(subscores: dict[str, float]) -> float:
    rules = [value if value == 1.0 else 0.5 * value for name, value in subscores.items() if name != "goal"]
    return (0.3 + 0.7 * subscores["goal"]) * float(np.prod(rules))


def _kept(kind: np.ndarray, visible: np.ndarray, wanted: int) -> bool:
    """Whether an object still has its colour where it can be seen (hidden objects count as kept)."""
    return visible.sum() < 8 or float((kind[visible] == wanted).mean()) >= INTACT
