"""Facts of a Reasoner's own video, which has no state: a matched filter for the ball, differences for scenery.

Written apart from ``scorer.py``, by another method and with other thresholds: the Teacher learns from these labels, so
the scorer stays a judge that it has never met.
"""

from __future__ import annotations

import numpy as np

from vlmteacher.microworld import world
from vlmteacher.microworld.facts import NEAR, NONE, Facts, cells, jumps
from vlmteacher.microworld.scene import Scene

THERE = 0.62  # response of the matched filter (1 for a perfect ball) that counts as a ball
TRACE = 0.4  # response by which a ball can still be followed
SECOND = 0.33  # response, away from the ball, that counts as one too many
CHANGED = 0.16  # mean difference in RGB over an object's own pixels; untouched scenery comes out below it
TOUCH = 4.3
_COLORS = list(world.COLORS)


def _fourier_kernel() -> np.ndarray:
    kernel = world.disc_mask(world.SIZE / 2 + 0.5, world.SIZE / 2 + 0.5)
    return np.conj(np.fft.rfft2(np.fft.ifftshift(kernel / kernel.sum())))


_KERNEL = _fourier_kernel()


def _response(frames: np.ndarray, scenery: np.ndarray, color: str) -> np.ndarray:
    """(T, H, W): the opacity in [0, 1] of a `color` ball centred at each pixel, as least squares sees it."""
    direction = np.asarray(world.COLORS[color], np.float32) - scenery
    scale = (direction**2).sum(-1) + 1e-3
    along = ((frames - scenery) * direction).sum(-1) / scale
    across = np.sqrt((((frames - scenery) - along[..., None] * direction) ** 2).sum(-1) / scale)
    likeness = np.clip(along, 0, 1) * np.clip(1.25 - across, 0, 1)
    return np.fft.irfft2(np.fft.rfft2(likeness) * _KERNEL, s=likeness.shape[-2:])


def label(frames: np.ndarray, scene: Scene) -> Facts:
    """Facts of `frames` (T, H, W, 3) in [0, 1], a Reasoner's answer to `scene`."""
    length = len(frames)
    scenery = world.draw_still(scene.scenery)
    own = _response(frames, scenery, scene.ball_color)
    others = [_response(frames, scenery, c) for c in _COLORS if c != scene.ball_color]
    names = [scene.ball_color, *(c for c in _COLORS if c != scene.ball_color)]

    position = np.full((length, 2), np.nan)
    count, color, inside = np.zeros(length, int), np.full(length, NONE), np.full(length, NONE)
    touching = np.zeros(length, bool)
    for t in range(length):
        peaks = [own[t].max(), *(r[t].max() for r in others)]
        best = int(np.argmax(peaks))
        if peaks[0] >= THERE:
            best = 0
            y, x = divmod(int(own[t].argmax()), world.SIZE)
            away = world.disc_mask(x + 0.5, y + 0.5, 9.5) == 0
            count[t] = 1 + bool((own[t] * away).max() >= SECOND)
        if peaks[best] < TRACE:
            continue
        response = own[t] if best == 0 else others[best - 1][t]
        y, x = divmod(int(response.argmax()), world.SIZE)
        position[t] = x + 0.5, y + 0.5
        color[t] = _COLORS.index(names[best])
        for box in scene.boxes:
            if np.max(np.abs(position[t] - (box.x, box.y))) <= NEAR:
                inside[t] = _COLORS.index(box.color)
        touching[t] = any(world.distance_to_block(position[t], block) < TOUCH for block in scene.blocks)
    changed = changes(frames, scene, position)
    return Facts(count, position, color, inside, touching, jumps(position), np.logical_not(changed.any(-1)), changed)


def changes(frames: np.ndarray, scene: Scene, position: np.ndarray) -> np.ndarray:
    """(T, cells): where a box or a block looks otherwise than it should, away from the ball at `position` (T, 2)."""
    difference = np.abs(frames - world.draw_still(scene.scenery)).mean(-1)
    masks = [world.mask(thing) for thing in scene.scenery]
    changed = np.zeros((len(frames), (world.SIZE // world.CELL) ** 2), bool)
    for t, at in enumerate(position):
        hidden = world.disc_mask(at[0], at[1], world.RADIUS + 3) if np.isfinite(at[0]) else 0.0
        for mask in masks:
            weight = mask * (1 - hidden)
            if weight.sum() > 12 and (difference[t] * weight).sum() / weight.sum() > CHANGED:
                changed[t] |= cells(mask)
    return changed


def succeeds(facts: Facts, scene: Scene) -> bool:
    """Whether goal and every rule hold, by these facts: to compare with the scorer's verdict."""
    target = _COLORS.index(scene.target.color)
    goal = (facts.inside[-2:] == target).all() and (facts.count[-2:] == 1).all()
    rules = (facts.count == 1).all() and not facts.touching.any() and not facts.jumped.any() and facts.intact.all()
    return bool(goal and rules)
