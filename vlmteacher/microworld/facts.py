"""The truth about a video, frame by frame and thing by thing, from which the Teacher's questions are answered.

Sources: simulator state (`facts_of`), or ``labeller.py`` for a Reasoner's own outputs; never the scorer.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from vlmteacher.microworld.scene import (
    CELL,
    COLORS,
    RADIUS,
    SIZE,
    Scene,
    Thing,
    Track,
    distance_to_block,
    mask,
)

VISIBLE = 0.7  # least opacity of a thing that counts as present
TRACE = 0.4  # least opacity of a thing whose position is known
SHADOW = 0.25  # least opacity of a second copy that counts
FASTEST = 10.5  # pixels from frame to frame; the right video makes 8
GROWTH = 1.6  # pixels of size from frame to frame; the right video makes 0.8
TURN = 14.0  # degrees from frame to frame; the right video makes 7.5
TOUCH = 4.0  # pixels from the ball's centre to a block
SAME = 2.5  # pixels (or the like in size and angle) within which two copies count as one

COLOR_NAMES = list(COLORS)
NONE = len(COLOR_NAMES)


@dataclass(frozen=True)
class Facts:
    """Arrays over the T frames of one video and the N things of its scene's first frame.

    Attributes:
        count: (T, N) the number of copies of a thing: 0, 1 or 2 (two or more).
        position: (T, N, 2) of the clearest copy, NaN if unknown.
        size: (T, N) of the clearest copy, NaN if unknown.
        angle: (T, N) of the clearest copy in [0, 180), NaN if unknown.
        color: (T, N) index of its colour in `COLOR_NAMES`, `NONE` for no colour of the world.
        kept: (T, N) whether a thing of the scenery looks as in the first frame.
        touching: (T,) whether an actor touches a block.
        changed: (T, cells) whether the scenery in a cell differs from the first frame.
    """

    count: np.ndarray
    position: np.ndarray
    size: np.ndarray
    angle: np.ndarray
    color: np.ndarray
    kept: np.ndarray
    touching: np.ndarray
    changed: np.ndarray

    @property
    def intact(self) -> np.ndarray:
        """(T,) whether all scenery looks as in the first frame."""
        return np.asarray(self.kept.all(1))

    @property
    def jumped(self) -> np.ndarray:
        """(T, N) whether a thing has moved, grown or turned too far since the frame before."""
        leap = np.hypot(*np.moveaxis(np.diff(self.position, axis=0), -1, 0)) > FASTEST
        leap |= np.abs(np.diff(self.size, axis=0)) > GROWTH
        leap |= np.abs(wrapped(np.diff(self.angle, axis=0))) > TURN
        return np.concatenate([np.zeros_like(leap[:1]), leap])


def wrapped(angle: np.ndarray) -> np.ndarray:
    """Wrap differences of bars' angles to [-90, 90)."""
    return (angle + 90) % 180 - 90


def cells(covered: np.ndarray) -> np.ndarray:
    """Return which of the 16-pixel cells, row by row, `covered` (H, W) fills by a fiftieth or more."""
    side = SIZE // CELL
    return covered.reshape(side, CELL, side, CELL).mean((1, 3)).ravel() > 0.02


def color_index(thing: Thing) -> int:
    """Return the index of the colour that a thing shows; `NONE` between two colours, or if it is dark."""
    shown = thing.color if thing.blend <= 1 - VISIBLE else thing.other if thing.blend >= VISIBLE else ""
    return COLOR_NAMES.index(shown) if shown in COLOR_NAMES else NONE


def _apart(one: Thing, two: Thing) -> float:
    turn = float(np.abs(wrapped(np.asarray(one.angle - two.angle))))
    return float(np.hypot(one.x - two.x, one.y - two.y)) + abs(one.size - two.size) + turn / 6


def _kept(thing: Thing, was: Thing) -> bool:
    same = (thing.at, thing.color) == (was.at, was.color)
    return same and thing.alpha >= VISIBLE and thing.blend <= 1 - VISIBLE


def facts_of(scene: Scene, track: Track) -> Facts:
    """Return the facts of a track; its things beyond the scene's own count as copies of actors."""
    length, number = len(track), len(scene.things)
    position = np.full((length, number, 2), np.nan)
    size, angle = np.full((length, number), np.nan), np.full((length, number), np.nan)
    count, color = np.zeros((length, number), int), np.full((length, number), NONE)
    kept, touching = np.ones((length, number), bool), np.zeros(length, bool)
    changed = np.zeros((length, (SIZE // CELL) ** 2), bool)
    for t, things in enumerate(track):
        for i, was in enumerate(scene.things):
            acts = i in scene.actors
            doubles = [x for x in things[number:] if (x.shape, x.color) == (was.shape, was.color)] if acts else []
            best = max([things[i], *doubles], key=lambda x: x.alpha)
            near = [x.alpha for x in (things[i], *doubles) if _apart(x, best) <= SAME]
            far = [x.alpha for x in (things[i], *doubles) if _apart(x, best) > SAME]
            opacity = 1 - np.prod(1 - np.asarray(near))
            if opacity >= VISIBLE:
                count[t, i] = 1 + (max(far, default=0.0) >= SHADOW)
            if opacity >= TRACE:
                position[t, i], size[t, i], angle[t, i] = best.at, best.size, best.angle % 180
                color[t, i] = color_index(best)
            if not acts and not _kept(things[i], was):
                kept[t, i] = False
                changed[t] |= cells(mask(was)) | cells(mask(things[i]))
        movers = [x for i, x in enumerate(things) if (i in scene.actors or i >= number) and x.alpha >= TRACE]
        touching[t] = any(distance_to_block(x.at, b) < TOUCH for x in movers for b in scene.blocks)
    return Facts(count, position, size, angle, color, kept, touching, changed)


def reach(thing: Thing) -> float:
    """Return about half the side of the square that encloses a thing."""
    return max(thing.size, RADIUS) if thing.shape != "bar" else 0.8 * thing.size
