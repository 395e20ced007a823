"""The symbolic state of the microworld and its renderer.

A :class:`Scene` holds the things of the first frame and the plan: which of them act, and how each ends. `perform`
carries the plan out and returns a :data:`Track`, the things of every frame. `draw` renders any track, right or wrong.

Distances are in pixels, angles in degrees (clockwise on the screen). The origin is the upper left corner; positions are
those of centres. Frames are float32 RGB in [0, 1], shape (T, H, W, 3).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np

SIZE = 64
NUM_FRAMES = 13
FPS = 8.0
ARRIVAL = 10  # the first frame in which everything rests
RADIUS = 5.0
BOX_HALF = 8.0
THICKNESS = 2.0  # of outlines
BAR_HALF = 4.0  # half the width of a bar
FIT = 3.0  # pixels on every side by which an outline is larger than what fits into it
CELL = 16

COLORS: dict[str, tuple[float, float, float]] = {
    "red": (0.86, 0.16, 0.16),
    "green": (0.16, 0.68, 0.27),
    "blue": (0.16, 0.32, 0.88),
    "yellow": (0.96, 0.80, 0.12),
    "purple": (0.60, 0.20, 0.76),
    "cyan": (0.10, 0.76, 0.80),
}
BACKGROUND = (0.95, 0.95, 0.93)
BLOCK_COLOR = (0.25, 0.25, 0.28)
PAINTS = {**COLORS, "dark": BLOCK_COLOR}

_YY, _XX = np.mgrid[0:SIZE, 0:SIZE].astype(np.float32) + 0.5

Point = tuple[float, float]


@dataclass(frozen=True)
class Thing:
    """One shape in one frame.

    Attributes:
        shape: ``disc``, ``square`` or ``bar``.
        color: name in `PAINTS`.
        x, y: the centre.
        size: radius of a disc, half the side of a square, half the length of a bar (whose width is fixed).
        angle: of a bar.
        outline: draw only the edge, `THICKNESS` wide, inside `size`.
        other, blend: the colour shown is `color` mixed with the share `blend` in [0, 1] of `other`.
        alpha: opacity in [0, 1].
    """

    shape: str
    color: str
    x: float
    y: float
    size: float
    angle: float = 0.0
    outline: bool = False
    other: str = ""
    blend: float = 0.0
    alpha: float = 1.0

    @property
    def at(self) -> Point:
        return (self.x, self.y)

    def moved(self, to: Point) -> Thing:
        return replace(self, x=to[0], y=to[1])


Track = list[tuple[Thing, ...]]
"""The things of every frame in drawing order; a thing has the same index in every frame."""


def ball(color: str, at: Point) -> Thing:
    """Return a solid disc of the usual size."""
    return Thing("disc", color, *at, RADIUS)


def box(color: str, at: Point) -> Thing:
    """Return a square outline that a ball fits into."""
    return Thing("square", color, *at, BOX_HALF, outline=True)


def block(at: Point) -> Thing:
    """Return a dark cell that the ball must not touch."""
    return Thing("square", "dark", *at, CELL / 2)


@dataclass(frozen=True)
class Scene:
    """The symbolic truth of one instance: everything that the renderer and the scorer know about it.

    Attributes:
        family: name of the task family.
        things: the things of the first frame, in drawing order.
        actors: indices of the things that the task changes or moves.
        goals: the final state of each actor.
        ways: the polyline of each actor's centre, start and end included; one point if it stays in place.
        targets: indices of the things that the actors go to or fit into, in the order of the task.
    """

    family: str
    things: tuple[Thing, ...]
    actors: tuple[int, ...]
    goals: tuple[Thing, ...]
    ways: tuple[tuple[Point, ...], ...]
    targets: tuple[int, ...] = ()

    @property
    def moving(self) -> tuple[Thing, ...]:
        """The actors in the first frame."""
        return tuple(self.things[i] for i in self.actors)

    @property
    def scenery(self) -> tuple[Thing, ...]:
        """The things that must stay as they are."""
        return tuple(thing for i, thing in enumerate(self.things) if i not in self.actors)

    @property
    def boxes(self) -> tuple[Thing, ...]:
        return tuple(thing for thing in self.things if thing.outline and thing.color != "dark")

    @property
    def blocks(self) -> tuple[Thing, ...]:
        return tuple(thing for thing in self.things if not thing.outline and thing.color == "dark")

    @property
    def target(self) -> Thing:
        """The last target, mostly the only one."""
        return self.things[self.targets[-1]]

    @property
    def ball_color(self) -> str:
        return self.moving[0].color

    @property
    def start(self) -> Point:
        return self.moving[0].at

    @property
    def waypoints(self) -> tuple[Point, ...]:
        return self.ways[0]

    def to_json(self) -> dict[str, Any]:
        """Return plain data, without the default values of a thing's fields."""
        data = asdict(self)
        for name in ("things", "goals"):
            data[name] = [{k: v for k, v in t.items() if v != getattr(Thing, k, None)} for t in data[name]]
        return data

    @staticmethod
    def from_json(data: dict[str, Any]) -> Scene:
        return Scene(
            family=data["family"],
            things=tuple(Thing(**thing) for thing in data["things"]),
            actors=tuple(data["actors"]),
            goals=tuple(Thing(**thing) for thing in data["goals"]),
            ways=tuple(tuple((x, y) for x, y in way) for way in data["ways"]),
            targets=tuple(data["targets"]),
        )


def rerouted(scene: Scene, *ways: Sequence[Point]) -> Scene:
    """Return the scene with another plan: its actors move along `ways`."""
    ends = tuple(goal.moved(way[-1]) for goal, way in zip(scene.goals, ways, strict=True))
    return replace(scene, goals=ends, ways=tuple(tuple(way) for way in ways))


def digest_of(data: dict[str, Any]) -> str:
    return hashlib.sha1(json.dumps(data, sort_keys=True).encode()).hexdigest()


def scene_of(family: str, things: Sequence[Thing], plan: dict[int, Any], targets: Sequence[int] = ()) -> Scene:
    """Return a scene. plan: for the index of each actor the polyline that it moves along, or its final state."""
    goals, ways = [], []
    for index, end in plan.items():
        start = things[index]
        goals.append(end if isinstance(end, Thing) else start.moved(end[-1]))
        ways.append((start.at,) if isinstance(end, Thing) else tuple(end))
    return Scene(family, tuple(things), tuple(plan), tuple(goals), tuple(ways), tuple(targets))


# ---------------------------------------------------------------- motion


def trajectory(
    waypoints: Sequence[Sequence[float]], num_frames: int = NUM_FRAMES, arrival: int = ARRIVAL
) -> np.ndarray:
    """Return positions (T, 2) along the polyline `waypoints` at constant speed, at rest from frame `arrival` on."""
    points = np.asarray(waypoints, np.float64)
    lengths = np.concatenate([[0.0], np.cumsum(np.hypot(*np.diff(points, axis=0).T))])
    travelled = np.minimum(np.arange(num_frames) / arrival, 1.0) * lengths[-1]
    return np.stack([np.interp(travelled, lengths, points[:, axis]) for axis in (0, 1)], axis=1)


def between(start: Thing, end: Thing, share: float) -> Thing:
    """Interpolate size, angle and colour between two states of a thing; the position is that of `start`."""
    return replace(
        start,
        size=start.size + share * (end.size - start.size),
        angle=start.angle + share * (end.angle - start.angle),
        other=end.other if share else start.other,
        blend=share * end.blend,
    )


def perform(scene: Scene) -> Track:
    """Return the track in which the actors carry out the scene's plan."""
    places = [trajectory(way) for way in scene.ways]
    track = []
    for t in range(NUM_FRAMES):
        things = list(scene.things)
        for index, end, place in zip(scene.actors, scene.goals, places, strict=True):
            now = between(things[index], end, min(t / ARRIVAL, 1.0))
            things[index] = now.moved((float(place[t, 0]), float(place[t, 1])))
        track.append(tuple(things))
    return track


def edited(track: Track, index: int, changes: Callable[[int, Thing], dict[str, Any]]) -> Track:
    """Return the track with fields of one thing changed frame by frame. changes: (t, thing) -> the new values."""
    return [
        tuple(replace(thing, **changes(t, thing)) if i == index else thing for i, thing in enumerate(things))
        for t, things in enumerate(track)
    ]


# ---------------------------------------------------------------- drawing


def _edge(distance: Any) -> Any:
    """Return the coverage in [0, 1] of pixels whose centres are `distance` inside an edge."""
    return np.clip(distance + 0.5, 0.0, 1.0)


def masks(things: Sequence[Thing]) -> np.ndarray:
    """Return the coverage (N, H, W), float32 in [0, 1], of N things of one shape, whatever their opacity."""
    first = things[0]
    x, y, size, angle = (
        np.asarray([getattr(t, name) for t in things], np.float32)[:, None, None]
        for name in ("x", "y", "size", "angle")
    )
    dx, dy = _XX - x, _YY - y
    if first.shape == "disc":
        far = np.hypot(dx, dy)
        whole, hole = _edge(size - far), _edge(size - THICKNESS - far)
    else:
        wide = size
        if first.shape == "bar":
            cos, sin = np.cos(np.deg2rad(angle)), np.sin(np.deg2rad(angle))
            dx, dy = cos * dx + sin * dy, cos * dy - sin * dx
            wide = np.full_like(size, BAR_HALF + FIT * first.outline)
        dx, dy = np.abs(dx), np.abs(dy)
        whole = _edge(size - dx) * _edge(wide - dy)
        hole = _edge(size - THICKNESS - dx) * _edge(wide - THICKNESS - dy)
    return whole - hole if first.outline else whole


def mask(thing: Thing) -> np.ndarray:
    """Return the coverage (H, W) in [0, 1] of one thing."""
    return masks([thing])[0]


def disc_mask(x: float, y: float, radius: float = RADIUS) -> np.ndarray:
    """Return the coverage (H, W) in [0, 1] of a disc."""
    return mask(Thing("disc", "dark", x, y, radius))


def rgb(thing: Thing) -> np.ndarray:
    """Return the RGB colour (3,) that a thing shows."""
    color = np.asarray(PAINTS[thing.color], np.float32)
    if thing.other and thing.blend:
        color = color + thing.blend * (np.asarray(PAINTS[thing.other], np.float32) - color)
    return color.astype(np.float32)


def draw(track: Sequence[Sequence[Thing]]) -> np.ndarray:
    """Render a track as a video (T, H, W, 3)."""
    frames = np.empty((len(track), SIZE, SIZE, 3), np.float32)
    frames[:] = BACKGROUND
    for column in zip(*track, strict=True):
        things = column[:1] if all(thing == column[0] for thing in column) else column
        weight = masks(things) * np.asarray([t.alpha for t in things], np.float32)[:, None, None]
        rows, columns = (np.flatnonzero(weight.any(axis)) for axis in ((0, 2), (0, 1)))
        if not len(rows):
            continue
        part = np.s_[:, rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
        cover = weight[part][..., None]
        frames[part] = frames[part] * (1 - cover) + np.stack([rgb(t) for t in things])[:, None, None] * cover
    return frames


def draw_still(things: Sequence[Thing]) -> np.ndarray:
    """Render things as one image (H, W, 3)."""
    return draw([tuple(things)])[0] if things else np.full((SIZE, SIZE, 3), BACKGROUND, np.float32)


# ---------------------------------------------------------------- geometry


def distance_to_block(point: Sequence[float] | np.ndarray, block: Thing) -> float:
    """Return the distance from `point` (2,) to the nearest edge of a block; 0 inside it."""
    return float(np.hypot(*np.maximum(np.abs(np.subtract(point, block.at)) - block.size, 0)))


def distance_to_segment(point: np.ndarray, a: np.ndarray, b: np.ndarray) -> float:
    """Return the distance from `point` (2,) to the segment from `a` to `b`."""
    t = np.clip(np.dot(point - a, b - a) / max(np.dot(b - a, b - a), 1e-9), 0.0, 1.0)
    return float(np.hypot(*(point - (a + t * (b - a)))))


def far_apart(point: np.ndarray, others: Sequence[np.ndarray], least: float) -> bool:
    """Whether `point` is at least `least` pixels from all `others` on one of the axes."""
    return all(np.max(np.abs(point - other)) >= least for other in others)
