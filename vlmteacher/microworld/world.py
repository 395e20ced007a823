"""The built-in world: 64x64 videos of one ball, coloured boxes and dark blocks, with exact symbolic state.

Two task families:

* ``move``: bring the ball into the named box; two or three boxes stand around.
* ``maze``: bring the ball into the box on a 4x4 grid without touching a dark block.

Given a :class:`Scene` the right video is unique (straight line, or the only shortest path; constant speed), so a
Reasoner's errors are its own and not the ambiguity of the task. Distances are in pixels, the origin is the upper left
corner, a position is ``(x, y)`` of a centre. Frames are float32 RGB in [0, 1], shape (T, H, W, 3).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

SIZE = 64
NUM_FRAMES = 13
FPS = 8.0
ARRIVAL = 10  # the ball rests in the box from this frame on
RADIUS = 5.0
BOX_HALF = 8.0
BOX_THICKNESS = 2.0
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
FAMILIES = ("move", "maze")

_YY, _XX = np.mgrid[0:SIZE, 0:SIZE].astype(np.float32) + 0.5


@dataclass(frozen=True)
class Box:
    """A square outline that a ball fits into."""

    color: str
    x: float
    y: float


@dataclass(frozen=True)
class Scene:
    """The symbolic truth of one instance: everything that the renderer and the scorer know about it."""

    family: str
    ball_color: str
    start: tuple[float, float]
    boxes: tuple[Box, ...]
    target: int
    blocks: tuple[tuple[float, float], ...] = ()
    waypoints: tuple[tuple[float, float], ...] = field(default=())
    """The right path, start and target included."""

    @property
    def target_box(self) -> Box:
        return self.boxes[self.target]

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @staticmethod
    def from_json(data: dict[str, Any]) -> Scene:
        return Scene(
            family=data["family"],
            ball_color=data["ball_color"],
            start=(data["start"][0], data["start"][1]),
            boxes=tuple(Box(**box) for box in data["boxes"]),
            target=data["target"],
            blocks=tuple((x, y) for x, y in data["blocks"]),
            waypoints=tuple((x, y) for x, y in data["waypoints"]),
        )

    def digest(self) -> str:
        return hashlib.sha1(json.dumps(self.to_json(), sort_keys=True).encode()).hexdigest()

    @property
    def held_out(self) -> bool:
        """True for the tenth of all scenes that belongs to the evaluation splits and never to training."""
        return int(self.digest(), 16) % 10 == 0


# ---------------------------------------------------------------- rendering


def _disc(x: float, y: float, radius: float) -> np.ndarray:
    return np.clip(radius + 0.5 - np.hypot(_XX - x, _YY - y), 0.0, 1.0)


def _square(x: float, y: float, half: float) -> np.ndarray:
    cover_x = np.clip(half + 0.5 - np.abs(_XX - x), 0.0, 1.0)
    cover_y = np.clip(half + 0.5 - np.abs(_YY - y), 0.0, 1.0)
    return cover_x * cover_y


def box_mask(box: Box) -> np.ndarray:
    """Coverage (H, W) in [0, 1] of the outline of `box`."""
    return _square(box.x, box.y, BOX_HALF) - _square(box.x, box.y, BOX_HALF - BOX_THICKNESS)


def block_mask(block: tuple[float, float]) -> np.ndarray:
    """Coverage (H, W) in [0, 1] of a dark block."""
    return _square(block[0], block[1], CELL / 2)


def ball_mask(position: Sequence[float] | np.ndarray, radius: float = RADIUS) -> np.ndarray:
    """Coverage (H, W) in [0, 1] of a ball."""
    return _disc(position[0], position[1], radius)


def paint(image: np.ndarray, mask: np.ndarray, color: Sequence[float], alpha: float = 1.0) -> np.ndarray:
    """Blend `color` over `image` (H, W, 3) where `mask` is, with opacity `alpha`."""
    weight = (mask * alpha)[..., None]
    return image * (1 - weight) + np.asarray(color, np.float32) * weight


def render_scenery(boxes: Sequence[Box], blocks: Sequence[tuple[float, float]]) -> np.ndarray:
    image = np.empty((SIZE, SIZE, 3), np.float32)
    image[:] = BACKGROUND
    for block in blocks:
        image = paint(image, block_mask(block), BLOCK_COLOR)
    for box in boxes:
        image = paint(image, box_mask(box), COLORS[box.color])
    return image


def render(scene: Scene, positions: np.ndarray | None = None) -> np.ndarray:
    """Draw the video (T, H, W, 3) of the ball at `positions` (T, 2); by default those of the right path."""
    if positions is None:
        positions = trajectory(scene.waypoints)
    scenery = render_scenery(scene.boxes, scene.blocks)
    return np.stack([paint(scenery, ball_mask(p), COLORS[scene.ball_color]) for p in positions])


def trajectory(
    waypoints: Sequence[Sequence[float]], num_frames: int = NUM_FRAMES, arrival: int = ARRIVAL
) -> np.ndarray:
    """Positions (T, 2) along the polyline `waypoints` at constant speed, at rest from frame `arrival` on."""
    points = np.asarray(waypoints, np.float64)
    lengths = np.concatenate([[0.0], np.cumsum(np.hypot(*np.diff(points, axis=0).T))])
    way = np.minimum(np.arange(num_frames) / arrival, 1.0) * lengths[-1]
    return np.stack([np.interp(way, lengths, points[:, axis]) for axis in (0, 1)], axis=1)


# ---------------------------------------------------------------- generators


def distance_to_block(point: np.ndarray, block: tuple[float, float]) -> float:
    """Pixels from `point` (2,) to the nearest edge of a block; 0 inside it."""
    return float(np.hypot(*np.maximum(np.abs(point - block) - CELL / 2, 0)))


def _distance_to_segment(point: np.ndarray, a: np.ndarray, b: np.ndarray) -> float:
    t = np.clip(np.dot(point - a, b - a) / max(np.dot(b - a, b - a), 1e-9), 0.0, 1.0)
    return float(np.hypot(*(point - (a + t * (b - a)))))


def _sample_move(rng: np.random.Generator) -> Scene | None:
    count = int(rng.integers(2, 4))
    colors = rng.permutation(list(COLORS))[: count + 1]
    centres: list[np.ndarray] = []
    for _ in range(60):
        candidate = rng.integers(10, SIZE - 9, size=2).astype(np.float64)
        if all(np.max(np.abs(candidate - c)) >= 21 for c in centres):
            centres.append(candidate)
        if len(centres) == count:
            break
    else:
        return None
    start = rng.integers(8, SIZE - 7, size=2).astype(np.float64)
    if any(np.max(np.abs(start - c)) < 16 for c in centres) or np.hypot(*(start - centres[0])) < 22:
        return None
    if any(_distance_to_segment(c, start, centres[0]) < 16 for c in centres[1:]):
        return None
    order = rng.permutation(count)
    boxes = tuple(Box(str(colors[1 + i]), float(centres[i][0]), float(centres[i][1])) for i in order)
    begin = (float(start[0]), float(start[1]))
    goal = (float(centres[0][0]), float(centres[0][1]))
    return Scene("move", str(colors[0]), begin, boxes, int(np.argmin(order)), (), (begin, goal))


def _shortest_paths(start: int, goal: int, blocked: set[int]) -> list[list[int]]:
    """All shortest paths over the free cells of the 4x4 grid (cells are numbered row by row)."""
    paths: list[list[int]] = []
    frontier = [[start]]
    while frontier and not paths:
        longer = []
        for path in frontier:
            row, column = divmod(path[-1], 4)
            for r, c in ((row - 1, column), (row + 1, column), (row, column - 1), (row, column + 1)):
                cell = 4 * r + c
                if 0 <= r < 4 and 0 <= c < 4 and cell not in blocked and cell not in path:
                    longer.append([*path, cell])
        paths = [path for path in longer if path[-1] == goal]
        frontier = longer if len(longer) < 400 else []
    return paths


def cell_centre(cell: int) -> tuple[float, float]:
    return (cell % 4 * CELL + CELL / 2, cell // 4 * CELL + CELL / 2)


def _sample_maze(rng: np.random.Generator) -> Scene | None:
    colors = rng.permutation(list(COLORS))[:2]
    cells = rng.permutation(16)
    start, goal = int(cells[0]), int(cells[1])
    blocked = {int(c) for c in cells[2 : 2 + int(rng.integers(3, 6))]}
    paths = _shortest_paths(start, goal, blocked)
    if len(paths) != 1 or not 3 <= len(paths[0]) - 1 <= 5:
        return None
    a, b = np.asarray(cell_centre(start)), np.asarray(cell_centre(goal))
    blocks = tuple(cell_centre(c) for c in sorted(blocked))
    if not any(_distance_to_segment(np.asarray(block), a, b) < 10 for block in blocks):
        return None  # the straight line is free: nothing to navigate around
    path = tuple(cell_centre(c) for c in paths[0])
    return Scene("maze", str(colors[0]), path[0], (Box(str(colors[1]), *path[-1]),), 0, blocks, path)


_SAMPLERS = {"move": _sample_move, "maze": _sample_maze}


def sample_scene(rng: np.random.Generator, family: str | None = None, held_out: bool = False) -> Scene:
    """Draw a scene of `family` (either of them by default) from the training or from the held-out tenth."""
    name = family or str(rng.choice(FAMILIES))
    while True:
        scene = _SAMPLERS[name](rng)
        if scene is not None and scene.held_out == held_out:
            return scene


PROMPTS = {
    "move": (
        "Move the {ball} ball into the {box} box.",
        "Bring the {ball} ball to the {box} box.",
        "The {ball} ball goes into the {box} box.",
        "Put the {ball} ball in the {box} box and leave everything else in place.",
    ),
    "maze": (
        "Move the {ball} ball into the {box} box without touching the dark blocks.",
        "Bring the {ball} ball to the {box} box around the dark blocks.",
        "The {ball} ball goes into the {box} box and avoids the dark blocks.",
        "Guide the {ball} ball past the dark blocks into the {box} box.",
    ),
}


def write_prompt(scene: Scene, rng: np.random.Generator) -> str:
    """One of the wordings of the scene's task."""
    template = PROMPTS[scene.family][int(rng.integers(len(PROMPTS[scene.family])))]
    return template.format(ball=scene.ball_color, box=scene.target_box.color)


def instance(index: int, seed: int, held_out: bool = True) -> tuple[Scene, str]:
    """The `index`-th instance of the evaluation split `seed`: scene and prompt. Families alternate."""
    rng = np.random.default_rng([seed, index])
    scene = sample_scene(rng, FAMILIES[index % len(FAMILIES)], held_out)
    return scene, write_prompt(scene, rng)
