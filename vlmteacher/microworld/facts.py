"""What is true in a video, frame by frame and thing by thing.

Facts come from simulator state (`facts_of`), or for a Reasoner's own outputs from ``labeller.py``; never from the
scorer. ``questions.py`` answers the Teacher's questions from them.
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

VISIBLE = 0.7  # a thing of this opacity is there
TRACE = 0.4  # and one of this opacity can be followed
SHADOW = 0.25  # a second one of this opacity is one too many
FASTEST = 10.5  # pixels from frame to frame
GROWTH = 1.6  # pixels of size from frame to frame; the right video makes 0.8
TURN = 14.0  # degrees from frame to frame; the right video makes 7.5
TOUCH = 4.0  # pixels from the ball's centre to a block
SAME = 2.5  # pixels (or as much in size and angle) within which two of a kind are seen as one

COLOR_NAMES = list(COLORS)
NONE = len(COLOR_NAMES)


@dataclass(frozen=True)
class Facts:
    """Arrays over the T frames of one video and the N things of its scene's first frame.

    count: (T, N) how many of a thing are there, 0, 1 or 2 (two or more). position, size, angle: (T, N, 2), (T, N),
    (T, N) of the clearest of them, NaN where it cannot be made out; an angle is in [0, 180). color: (T, N) index of the
    colour that it shows, `NONE` for none of the six. kept: (T, N) whether a thing of the scenery looks as at first.
    touching: (T,) whether an actor is on a block. changed: (T, cells), where the scenery is not what it was.
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
        """(T,) whether all of the scenery looks as at first."""
        return np.asarray(self.kept.all(1))

    @property
    def jumped(self) -> np.ndarray:
        """(T, N) whether a thing has moved, grown or turned since the frame before by more than it can."""
        leap = np.hypot(*np.moveaxis(np.diff(self.position, axis=0), -1, 0)) > FASTEST
        leap |= np.abs(np.diff(self.size, axis=0)) > GROWTH
        leap |= np.abs(wrapped(np.diff(self.angle, axis=0))) > TURN
        return np.concatenate([np.zeros_like(leap[:1]), leap])


def wrapped(angle: np.ndarray) -> np.ndarray:
    """Differences of bars' angles, in [-90, 90)."""
    return (angle + 90) % 180 - 90


def cells(covered: np.ndarray) -> np.ndarray:
    """Which of the 16-pixel cells, row by row, `covered` (H, W) fills by a fiftieth or more."""
    side = SIZE // CELL
    return covered.reshape(side, CELL, side, CELL).mean((1, 3)).ravel() > 0.02


def color_index(thing: Thing) -> int:
    """Of the colour that a thing shows; `NONE` while it is between two, or dark."""
    shown = thing.color if thing.blend <= 1 - VISIBLE else thing.other if thing.blend >= VISIBLE else ""
    return COLOR_NAMES.index(shown) if shown in COLOR_NAMES else NONE


def _apart(one: Thing, two: Thing) -> float:
    turn = float(np.abs(wrapped(np.asarray(one.angle - two.angle))))
    return float(np.hypot(one.x - two.x, one.y - two.y)) + abs(one.size - two.size) + turn / 6


def _kept(thing: Thing, was: Thing) -> bool:
    same = (thing.at, thing.color) == (was.at, was.color)
    return same and thing.alpha >= VISIBLE and thing.blend <= 1 - VISIBLE


def facts_of(scene: Scene, track: Track) -> Facts:
    """Facts from the simulator's own state; things beyond the scene's own count as doubles of its actors."""
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
    """Half the side of the square that a thing lies in, about."""
    return max(thing.size, RADIUS) if thing.shape != "bar" else 0.8 * thing.size
