"""Label a Reasoner's own videos, which have no state, from pixels: matched filters, moments, differences of scenery.

The Teacher learns from these labels. Methods and thresholds therefore differ from those of ``scorer.py``, which stays
an independent judge. A moving actor is located by the best response of a disc of its size and colour; an actor that
grows, turns or changes its colour is measured by area and second moments of its colour at its place.
"""

from __future__ import annotations

from dataclasses import replace
from functools import cache

import numpy as np

from vlmteacher.microworld import world
from vlmteacher.microworld.facts import COLOR_NAMES, NONE, Facts, cells, reach
from vlmteacher.microworld.families import FAMILIES
from vlmteacher.microworld.questions import own_questions
from vlmteacher.microworld.scene import BAR_HALF, Scene, Thing, masks

PRESENT = 0.62  # least response of the matched filter (1 for a perfect disc) to a present thing
TRACE = 0.4  # least response to a thing whose position is known
SECOND = 0.33  # least response, away from the thing, to a second copy
CHANGED = 0.16  # mean difference in RGB over a thing's own pixels; that of untouched scenery is smaller
PASSING = 2  # frames before and after an actor covers a thing in which the VAE may lose it
TOUCH = 4.3  # pixels from the ball's centre to a block
ALIKE = 0.05  # squared distance in RGB below which scenery hides a colour
UNHIDDEN = 0.6  # least share of a disc outside such scenery for an unbiased mean
COLORED = 0.3  # largest distance in RGB to the nearest of the six colours that counts as that colour
_PALETTE = np.asarray(list(world.COLORS.values()), np.float32)


@cache
def _kernel(radius: float) -> np.ndarray:
    kernel = world.disc_mask(world.SIZE / 2 + 0.5, world.SIZE / 2 + 0.5, radius)
    return np.conj(np.fft.rfft2(np.fft.ifftshift(kernel / kernel.sum())))


def _differs(scenery: np.ndarray, color: str) -> np.ndarray:
    """Return (H, W), where `color` differs from the scenery."""
    return ((np.asarray(world.COLORS[color], np.float32) - scenery) ** 2).sum(-1) > ALIKE


def _likeness(frames: np.ndarray, scenery: np.ndarray, color: str) -> np.ndarray:
    """Return (T, H, W), the opacity in [0, 1] of `color` over the scenery at each pixel by least squares."""
    direction = np.asarray(world.COLORS[color], np.float32) - scenery
    scale = np.maximum((direction**2).sum(-1), ALIKE)
    along = _differs(scenery, color) * ((frames - scenery) * direction).sum(-1) / scale
    across = np.sqrt((((frames - scenery) - along[..., None] * direction) ** 2).sum(-1) / scale)
    return np.clip(along, 0, 1) * np.clip(1.25 - across, 0, 1)


def _response(likeness: np.ndarray, differs: np.ndarray, radius: float) -> np.ndarray:
    """Return (T, H, W), the mean likeness in a disc around each pixel, over the pixels in `differs` only."""
    both = np.concatenate([likeness, differs[None]])
    mean = np.fft.irfft2(np.fft.rfft2(both) * _kernel(radius), s=likeness.shape[-2:])
    return mean[:-1] / np.maximum(mean[-1], UNHIDDEN)


def _peak(response: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return heights (T,) and places (T, 2) of the highest responses."""
    flat = response.reshape(len(response), -1)
    y, x = np.divmod(flat.argmax(1), world.SIZE)
    return flat.max(1), np.stack([x, y], 1) + 0.5


def _apart(place: np.ndarray, radius: float) -> np.ndarray:
    """Return (T, H, W), where the distance to the frame's `place` (2,) is larger than `radius`."""
    return masks([Thing("disc", "dark", float(x), float(y), radius) for x, y in place]) == 0


class _Labels:
    """The entries of `Facts` for one thing: arrays over frames, of a thing that does not change."""

    def __init__(self, length: int, thing: Thing) -> None:
        self.count = np.ones(length, int)
        self.position = np.tile(np.asarray(thing.at), (length, 1))
        self.size, self.angle = np.full(length, thing.size), np.full(length, thing.angle % 180)
        self.color = np.full(length, COLOR_NAMES.index(thing.color) if thing.color in COLOR_NAMES else NONE)


def _moving(
    frames: np.ndarray, scenery: np.ndarray, thing: Thing, rivals: set[str], taken: set[str], dots: list[Thing]
) -> _Labels:
    """Locate a disc anywhere: in its own colour if possible, else in a colour that no disc has.

    Args:
        rivals: colours of other moving actors; a pixel more like one of them does not count.
        taken: colours of all discs.
        dots: solid scenery; in front of it, where the VAE mixes the two, a weaker response is enough.
    """
    labels = _Labels(len(frames), thing)
    names = [thing.color, *(c for c in COLOR_NAMES if c not in taken and c != thing.color)]
    rival = np.stack([_likeness(frames, scenery, c) for c in rivals]).max(0) if rivals else 0.0
    responses = []
    for name in names:
        likeness = _likeness(frames, scenery, name)
        likeness = np.where(likeness >= rival, likeness, 0)
        responses.append(_response(likeness, _differs(scenery, name), thing.size))
    heights, places = zip(*(_peak(r) for r in responses), strict=True)
    over = [np.hypot(*(places[0] - dot.at).T) < thing.size + dot.size for dot in dots]
    least = np.where(np.any(over, axis=0), TRACE, PRESENT) if over else PRESENT
    best = np.where(heights[0] >= least, 0, np.argmax(heights, 0))
    row = np.arange(len(frames))
    labels.position = np.stack(places)[best, row]
    labels.color = np.asarray([COLOR_NAMES.index(c) for c in names])[best]
    away = _apart(places[0], thing.size + 4.5)
    for dot, near in zip(dots, over, strict=True):  # its colour may linger where it has just been
        passed = np.convolve(near, np.ones(2 * PASSING + 1), "same") > 0
        away[passed] &= world.disc_mask(*dot.at, dot.size + 2) == 0
    far = (responses[0] * away).max((1, 2)) >= SECOND
    labels.count = np.where(heights[0] >= least, 1 + far, 0)
    lost = np.stack(heights)[best, row] < TRACE
    labels.position[lost] = labels.size[lost] = labels.angle[lost] = np.nan
    labels.color[lost] = NONE
    return labels


def _staying(frames: np.ndarray, scenery: np.ndarray, thing: Thing, room: float) -> _Labels:
    """Measure a thing that changes in place, within `room` pixels of it."""
    labels = _Labels(len(frames), thing)
    core = world.disc_mask(*thing.at, min(thing.size, BAR_HALF) - 1) > 0.5
    shown = np.median(frames[:, core], axis=1)  # (T, 3)
    distance = np.sqrt(((shown[:, None] - _PALETTE) ** 2).sum(-1))
    labels.color = np.where(distance.min(1) <= COLORED, distance.argmin(1), NONE)
    ground = np.linalg.norm(shown - scenery[core].mean(0), axis=1)
    opacity = np.minimum(ground / np.linalg.norm(_PALETTE[labels.color.clip(0, 5)] - scenery[core].mean(0), axis=1), 1)

    window = world.disc_mask(*thing.at, room)
    likeness = _likeness(frames, scenery, thing.color)
    weight = likeness * window / np.maximum(opacity, 0.3)[:, None, None]
    area = weight.sum((1, 2))
    y, x = np.mgrid[: world.SIZE, : world.SIZE] + 0.5
    dx, dy = x - thing.x, y - thing.y
    if thing.shape == "bar":
        xx, yy, xy = ((weight * d).sum((1, 2)) for d in (dx**2, dy**2, dx * dy))
        labels.angle = np.rad2deg(0.5 * np.arctan2(2 * xy, xx - yy)) % 180
        labels.size = area / (4 * BAR_HALF)
    elif thing.shape == "disc":
        labels.size = np.sqrt(area / np.pi)
    other = labels.color != COLOR_NAMES.index(thing.color)
    labels.size[other], labels.angle[other] = thing.size, thing.angle % 180  # cannot be measured in another colour
    away = _response(likeness, _differs(scenery, thing.color), min(thing.size, BAR_HALF))
    height, place = _peak(away * (world.disc_mask(*thing.at, room + 3) == 0))
    labels.count = np.where(opacity >= PRESENT, 1 + (height >= SECOND), height >= PRESENT).astype(int)
    aside = (opacity < TRACE) & (height >= PRESENT)
    labels.position[aside] = place[aside]
    labels.color[aside] = COLOR_NAMES.index(thing.color)
    lost = (opacity < TRACE) & ~aside
    labels.position[lost] = labels.size[lost] = labels.angle[lost] = np.nan
    labels.color[lost] = NONE
    return labels


def label(frames: np.ndarray, scene: Scene) -> Facts:
    """Return the facts of `frames` (T, H, W, 3) in [0, 1], a Reasoner's answer to `scene`."""
    frames = np.asarray(frames, np.float32)
    scenery = world.draw_still(scene.scenery)
    labels = [_Labels(len(frames), thing) for thing in scene.things]
    taken = {x.color for i, x in enumerate(scene.things) if i in scene.actors or (x.shape == "disc" and not x.outline)}
    for index, goal in zip(scene.actors, scene.goals, strict=True):
        thing = scene.things[index]
        if FAMILIES[scene.family].moves:
            rivals = {scene.things[i].color for i in scene.actors if i != index}
            dots = [x for x in scene.scenery if x.shape == "disc" and not x.outline]
            labels[index] = _moving(frames, scenery, thing, rivals, taken, dots)
        else:
            labels[index] = _staying(frames, scenery, thing, reach(max(thing, goal, key=lambda x: x.size)) + 3)
    places = np.stack([f.position for f in labels], 1)
    sizes = np.stack([f.size for f in labels], 1)
    touching = np.zeros(len(frames), bool)
    for index in scene.actors:
        for t, at in enumerate(places[:, index]):
            touching[t] |= any(world.distance_to_block(at, block) < TOUCH for block in scene.blocks)
    kept, changed = changes(frames, scene, places, sizes)
    return Facts(
        np.stack([f.count for f in labels], 1),
        places,
        sizes,
        np.stack([f.angle for f in labels], 1),
        np.stack([f.color for f in labels], 1),
        kept,
        touching,
        changed,
    )


def changes(frames: np.ndarray, scene: Scene, places: np.ndarray, sizes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Compare the scenery with the first frame, away from the actors.

    places: (T, N, 2) and sizes: (T, N), of all things. Returns `Facts.kept` (T, N) and `Facts.changed` (T, cells).
    """
    difference = np.abs(frames - world.draw_still(scene.scenery)).mean(-1)
    covers = [world.mask(thing) for thing in scene.things]
    kept = np.ones((len(frames), len(covers)), bool)
    changed = np.zeros((len(frames), (world.SIZE // world.CELL) ** 2), bool)
    free = np.ones(difference.shape, np.float32)
    for t in range(len(frames)):
        for index, way in zip(scene.actors, scene.ways, strict=True):
            if np.isfinite(places[t, index, 0]):
                margin = 3.0 if len(way) > 1 else 0.5
                at, size = places[t, index], max(float(sizes[t, index]), scene.things[index].size)
                shape = replace(scene.things[index].moved((float(at[0]), float(at[1]))), size=size + margin)
                free[t] *= 1 - world.mask(shape)
    for t in range(len(frames)):
        clear = free[max(0, t - PASSING) : t + PASSING + 1].min(0)
        for i, cover in enumerate(covers):
            weight = cover * clear
            if i not in scene.actors and weight.sum() > 12:
                kept[t, i] = (difference[t] * weight).sum() / weight.sum() <= CHANGED
                if not kept[t, i]:
                    changed[t] |= cells(cover)
    return kept, changed


def succeeds(facts: Facts, scene: Scene) -> bool:
    """Whether the answer to all of the task's own questions is Yes by these facts."""
    return all(question.answer for question in own_questions(scene, facts))
