"""The symbolic state that everything in the microworld shares, and how it is drawn.

A :class:`Scene` tells the things of the first frame and the plan: which of them act, and how each is to end. `perform`
carries the plan out: a :data:`Track`, the things of every frame. `draw` turns any track, right or wrong, into pixels.

Distances are in pixels, angles in degrees (clockwise on the screen), the origin is the upper left corner, a position is
the centre's. Frames are float32 RGB in [0, 1], shape (T, H, W, 3).
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
ARRIVAL = 10  # everything rests from this frame on
RADIUS = 5.0
BOX_HALF = 8.0
THICKNESS = 2.0  # of outlines
BAR_HALF = 4.0  # half the width of a bar
FIT = 3.0  # an outline is larger than what fits into it by so much on every side
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

    shape: ``disc`` (`size` is its radius), ``square`` (half its side) or ``bar`` (half its length; its width is
    fixed). outline: only the edge, `THICKNESS` wide, inside `size`. color, other: names in `PAINTS`; the colour shown
    is `color` blended with the share `blend` in [0, 1] of `other`. alpha: opacity in [0, 1]; 0 where it is not there.
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
"""The things of each frame: in drawing order, as many in every frame and each always at the same index."""


def ball(color: str, at: Point) -> Thing:
    return Thing("disc", color, *at, RADIUS)


def box(color: str, at: Point) -> Thing:
    """A square outline that a ball fits into."""
    return Thing("square", color, *at, BOX_HALF, outline=True)


def block(at: Point) -> Thing:
    """A dark cell that must not be touched."""
    return Thing("square", "dark", *at, CELL / 2)


@dataclass(frozen=True)
class Scene:
    """The symbolic truth of one instance: everything that the renderer and the scorer know about it.

    things: of the first frame, in drawing order. actors: indices of those that the task is about. goals: what each
    actor is in the end. ways: the polyline that each actor's centre goes along, start and end included (one point: it
    stays). targets: indices of the things that the actors go to or fit into, in the order of the task.
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
        """What must stay as it is."""
        return tuple(thing for i, thing in enumerate(self.things) if i not in self.actors)

    @property
    def boxes(self) -> tuple[Thing, ...]:
        return tuple(thing for thing in self.things if thing.outline and thing.color != "dark")

    @property
    def blocks(self) -> tuple[Thing, ...]:
        return tuple(thing for thing in self.things if not thing.outline and thing.color == "dark")

    @property
    def target(self) -> Thing:
        """What the task names: the last of the targets, mostly the only one."""
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
        """Plain data; defaults of a thing's fields are left out."""
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
    """The scene with another plan: its actors go along `ways`."""
    ends = tuple(goal.moved(way[-1]) for goal, way in zip(scene.goals, ways, strict=True))
    return replace(scene, goals=ends, ways=tuple(tuple(way) for way in ways))


def digest_of(data: dict[str, Any]) -> str:
    return hashlib.sha1(json.dumps(data, sort_keys=True).encode()).hexdigest()


def scene_of(family: str, things: Sequence[Thing], plan: dict[int, Any], targets: Sequence[int] = ()) -> Scene:
    """A scene whose `plan` tells for the index of each actor the polyline it goes along, or what it turns into."""
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
    """Positions (T, 2) along the polyline `waypoints` at constant speed, at rest from frame `arrival` on."""
    points = np.asarray(waypoints, np.float64)
    lengths = np.concatenate([[0.0], np.cumsum(np.hypot(*np.diff(points, axis=0).T))])
    way = np.minimum(np.arange(num_frames) / arrival, 1.0) * lengths[-1]
    return np.stack([np.interp(way, lengths, points[:, axis]) for axis in (0, 1)], axis=1)


def between(start: Thing, end: Thing, share: float) -> Thing:
    """`start` on its way to `end`: size, angle and colour; the position stays."""
    return replace(
        start,
        size=start.size + share * (end.size - start.size),
        angle=start.angle + share * (end.angle - start.angle),
        other=end.other if share else start.other,
        blend=share * end.blend,
    )


def perform(scene: Scene) -> Track:
    """Every frame's things when the actors do what the scene's plan says."""
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
    """The track with fields of one thing changed, frame by frame: changes(t, thing) -> the new values."""
    return [
        tuple(replace(thing, **changes(t, thing)) if i == index else thing for i, thing in enumerate(things))
        for t, things in enumerate(track)
    ]


# ---------------------------------------------------------------- drawing


def _edge(distance: Any) -> Any:
    """Coverage of a pixel whose centre is `distance` inside an edge."""
    return np.clip(distance + 0.5, 0.0, 1.0)


def masks(things: Sequence[Thing]) -> np.ndarray:
    """Coverage (N, H, W), float32 in [0, 1], of N things of one shape; opacity does not count."""
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
    """Coverage (H, W) in [0, 1] of one thing."""
    return masks([thing])[0]


def disc_mask(x: float, y: float, radius: float = RADIUS) -> np.ndarray:
    """Coverage (H, W) in [0, 1] of a disc."""
    return mask(Thing("disc", "dark", x, y, radius))


def rgb(thing: Thing) -> np.ndarray:
    """(3,): the colour that the thing shows."""
    color = np.asarray(PAINTS[thing.color], np.float32)
    if thing.other and thing.blend:
        color = color + thing.blend * (np.asarray(PAINTS[thing.other], np.float32) - color)
    return color.astype(np.float32)


def draw(track: Sequence[Sequence[Thing]]) -> np.ndarray:
    """The video (T, H, W, 3) of any track."""
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
    """One image (H, W, 3)."""
    return draw([tuple(things)])[0] if things else np.full((SIZE, SIZE, 3), BACKGROUND, np.float32)


# ---------------------------------------------------------------- geometry


def distance_to_block(point: Sequence[float] | np.ndarray, block: Thing) -> float:
    """Pixels from `point` (2,) to the nearest edge of a block; 0 inside it."""
    return float(np.hypot(*np.maximum(np.abs(np.subtract(point, block.at)) - block.size, 0)))


def distance_to_segment(point: np.ndarray, a: np.ndarray, b: np.ndarray) -> float:
    t = np.clip(np.dot(point - a, b - a) / max(np.dot(b - a, b - a), 1e-9), 0.0, 1.0)
    return float(np.hypot(*(point - (a + t * (b - a)))))


def far_apart(point: np.ndarray, others: Sequence[np.ndarray], least: float) -> bool:
    """Whether `point` is `least` pixels or more from each of `others`, on one axis or the other."""
    return all(np.max(np.abs(point - other)) >= least for other in others)
