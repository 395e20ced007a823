"""Facts of a Reasoner's own video, which has no state: matched filters, moments, differences of scenery.

Written apart from ``scorer.py``, by other methods and with other thresholds: the Teacher learns from these labels, so
the scorer stays a judge that it has never met. What moves is found where a disc of its size and colour answers best;
what grows, turns or changes its colour, from area and second moments of its colour where it stands.
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

THERE = 0.62  # response of the matched filter (1 for a perfect disc) that counts as one
TRACE = 0.4  # response by which a thing can still be followed
SECOND = 0.33  # response, away from the thing, that counts as one too many
CHANGED = 0.16  # mean difference in RGB over a thing's own pixels; untouched scenery comes out below it
PASSING = 2  # frames before and after an actor covers a thing in which the VAE may lose it
TOUCH = 4.3
ALIKE = 0.05  # squared distance in RGB below which scenery hides a colour
SEEN = 0.6  # share of a disc that is made up for where scenery hides the rest
COLORED = 0.3  # distance in RGB to the nearest of the six colours, at most, that counts as that colour
_PALETTE = np.asarray(list(world.COLORS.values()), np.float32)


@cache
def _kernel(radius: float) -> np.ndarray:
    kernel = world.disc_mask(world.SIZE / 2 + 0.5, world.SIZE / 2 + 0.5, radius)
    return np.conj(np.fft.rfft2(np.fft.ifftshift(kernel / kernel.sum())))


def _differs(scenery: np.ndarray, color: str) -> np.ndarray:
    """(H, W) where `color` can be told from the scenery."""
    return ((np.asarray(world.COLORS[color], np.float32) - scenery) ** 2).sum(-1) > ALIKE


def _likeness(frames: np.ndarray, scenery: np.ndarray, color: str) -> np.ndarray:
    """(T, H, W): the opacity in [0, 1] of `color` over the scenery at each pixel, as least squares sees it."""
    direction = np.asarray(world.COLORS[color], np.float32) - scenery
    scale = np.maximum((direction**2).sum(-1), ALIKE)
    along = _differs(scenery, color) * ((frames - scenery) * direction).sum(-1) / scale
    across = np.sqrt((((frames - scenery) - along[..., None] * direction) ** 2).sum(-1) / scale)
    return np.clip(along, 0, 1) * np.clip(1.25 - across, 0, 1)


def _response(likeness: np.ndarray, differs: np.ndarray, radius: float) -> np.ndarray:
    """(T, H, W): the mean likeness in a disc around each pixel, of what can be told from the scenery there."""
    both = np.concatenate([likeness, differs[None]])
    mean = np.fft.irfft2(np.fft.rfft2(both) * _kernel(radius), s=likeness.shape[-2:])
    return mean[:-1] / np.maximum(mean[-1], SEEN)


def _peak(response: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(T,) heights and (T, 2) places of the highest responses."""
    flat = response.reshape(len(response), -1)
    y, x = np.divmod(flat.argmax(1), world.SIZE)
    return flat.max(1), np.stack([x, y], 1) + 0.5


def _apart(place: np.ndarray, radius: float) -> np.ndarray:
    """(T, H, W) where a frame's `place` (2,) is further away than `radius`."""
    return masks([Thing("disc", "dark", float(x), float(y), radius) for x, y in place]) == 0


class _Found:
    """Arrays over frames about one thing, as `Facts` has them for all."""

    def __init__(self, length: int, thing: Thing) -> None:
        self.count = np.ones(length, int)
        self.position = np.tile(np.asarray(thing.at), (length, 1))
        self.size, self.angle = np.full(length, thing.size), np.full(length, thing.angle % 180)
        self.color = np.full(length, COLOR_NAMES.index(thing.color) if thing.color in COLOR_NAMES else NONE)


def _moving(
    frames: np.ndarray, scenery: np.ndarray, thing: Thing, rivals: set[str], taken: set[str], dots: list[Thing]
) -> _Found:
    """A disc anywhere, of its own colour if it can be, else of one that no disc has (`taken`).

    rivals: the other movers' colours; a pixel that is more like one of them is not the thing's. dots: what is solid
    and stays; in front of it, where the VAE mixes the two, less of the thing is enough.
    """
    found = _Found(len(frames), thing)
    names = [thing.color, *(c for c in COLOR_NAMES if c not in taken and c != thing.color)]
    rival = np.stack([_likeness(frames, scenery, c) for c in rivals]).max(0) if rivals else 0.0
    responses = []
    for name in names:
        likeness = _likeness(frames, scenery, name)
        likeness = np.where(likeness >= rival, likeness, 0)
        responses.append(_response(likeness, _differs(scenery, name), thing.size))
    heights, places = zip(*(_peak(r) for r in responses), strict=True)
    over = [np.hypot(*(places[0] - dot.at).T) < thing.size + dot.size for dot in dots]
    there = np.where(np.any(over, axis=0), TRACE, THERE) if over else THERE
    best = np.where(heights[0] >= there, 0, np.argmax(heights, 0))
    row = np.arange(len(frames))
    found.position = np.stack(places)[best, row]
    found.color = np.asarray([COLOR_NAMES.index(c) for c in names])[best]
    away = _apart(places[0], thing.size + 4.5)
    for dot, near in zip(dots, over, strict=True):  # where it has just been, its colour may stay for a while
        passed = np.convolve(near, np.ones(2 * PASSING + 1), "same") > 0
        away[passed] &= world.disc_mask(*dot.at, dot.size + 2) == 0
    far = (responses[0] * away).max((1, 2)) >= SECOND
    found.count = np.where(heights[0] >= there, 1 + far, 0)
    lost = np.stack(heights)[best, row] < TRACE
    found.position[lost] = found.size[lost] = found.angle[lost] = np.nan
    found.color[lost] = NONE
    return found


def _staying(frames: np.ndarray, scenery: np.ndarray, thing: Thing, room: float) -> _Found:
    """What changes at its place, within `room` pixels of it."""
    found = _Found(len(frames), thing)
    core = world.disc_mask(*thing.at, min(thing.size, BAR_HALF) - 1) > 0.5
    shown = np.median(frames[:, core], axis=1)  # (T, 3)
    distance = np.sqrt(((shown[:, None] - _PALETTE) ** 2).sum(-1))
    found.color = np.where(distance.min(1) <= COLORED, distance.argmin(1), NONE)
    ground = np.linalg.norm(shown - scenery[core].mean(0), axis=1)
    opacity = np.minimum(ground / np.linalg.norm(_PALETTE[found.color.clip(0, 5)] - scenery[core].mean(0), axis=1), 1)

    window = world.disc_mask(*thing.at, room)
    likeness = _likeness(frames, scenery, thing.color)
    weight = likeness * window / np.maximum(opacity, 0.3)[:, None, None]
    area = weight.sum((1, 2))
    y, x = np.mgrid[: world.SIZE, : world.SIZE] + 0.5
    dx, dy = x - thing.x, y - thing.y
    if thing.shape == "bar":
        xx, yy, xy = ((weight * d).sum((1, 2)) for d in (dx**2, dy**2, dx * dy))
        found.angle = np.rad2deg(0.5 * np.arctan2(2 * xy, xx - yy)) % 180
        found.size = area / (4 * BAR_HALF)
    elif thing.shape == "disc":
        found.size = np.sqrt(area / np.pi)
    other = found.color != COLOR_NAMES.index(thing.color)
    found.size[other], found.angle[other] = thing.size, thing.angle % 180  # not to be told from the first colour
    away = _response(likeness, _differs(scenery, thing.color), min(thing.size, BAR_HALF))
    height, place = _peak(away * (world.disc_mask(*thing.at, room + 3) == 0))
    found.count = np.where(opacity >= THERE, 1 + (height >= SECOND), height >= THERE).astype(int)
    aside = (opacity < TRACE) & (height >= THERE)
    found.position[aside] = place[aside]
    found.color[aside] = COLOR_NAMES.index(thing.color)
    lost = (opacity < TRACE) & ~aside
    found.position[lost] = found.size[lost] = found.angle[lost] = np.nan
    found.color[lost] = NONE
    return found


def label(frames: np.ndarray, scene: Scene) -> Facts:
    """Facts of `frames` (T, H, W, 3) in [0, 1], a Reasoner's answer to `scene`."""
    frames = np.asarray(frames, np.float32)
    scenery = world.draw_still(scene.scenery)
    found = [_Found(len(frames), thing) for thing in scene.things]
    taken = {x.color for i, x in enumerate(scene.things) if i in scene.actors or (x.shape == "disc" and not x.outline)}
    for index, goal in zip(scene.actors, scene.goals, strict=True):
        thing = scene.things[index]
        if FAMILIES[scene.family].moves:
            rivals = {scene.things[i].color for i in scene.actors if i != index}
            dots = [x for x in scene.scenery if x.shape == "disc" and not x.outline]
            found[index] = _moving(frames, scenery, thing, rivals, taken, dots)
        else:
            found[index] = _staying(frames, scenery, thing, reach(max(thing, goal, key=lambda x: x.size)) + 3)
    places = np.stack([f.position for f in found], 1)
    sizes = np.stack([f.size for f in found], 1)
    touching = np.zeros(len(frames), bool)
    for index in scene.actors:
        for t, at in enumerate(places[:, index]):
            touching[t] |= any(world.distance_to_block(at, block) < TOUCH for block in scene.blocks)
    kept, changed = changes(frames, scene, places, sizes)
    return Facts(
        np.stack([f.count for f in found], 1),
        places,
        sizes,
        np.stack([f.angle for f in found], 1),
        np.stack([f.color for f in found], 1),
        kept,
        touching,
        changed,
    )


def changes(frames: np.ndarray, scene: Scene, places: np.ndarray, sizes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(T, N) and (T, cells): where scenery looks as it should or does not, away from the actors (T, N, 2)."""
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
    """Whether all of the task's own questions are to be answered Yes, by these facts."""
    return all(question.answer for question in own_questions(scene, facts))
