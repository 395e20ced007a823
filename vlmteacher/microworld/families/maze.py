"""``maze``: bring the ball into the box on a 4x4 grid without touching a dark block; more blocks out of domain."""

from __future__ import annotations

from typing import ClassVar

import numpy as np

from vlmteacher.microworld.facts import Facts
from vlmteacher.microworld.families.base import (
    BALL_TO_NAMED_BOX,
    BallToBox,
    draw_colors,
    free_point,
    growth,
    straight,
)
from vlmteacher.microworld.families.move import first_signature
from vlmteacher.microworld.kinds import ONE, SCENERY, Kind
from vlmteacher.microworld.scene import (
    CELL,
    RADIUS,
    Point,
    Scene,
    Track,
    ball,
    block,
    box,
    distance_to_block,
    distance_to_segment,
    edited,
    perform,
    rerouted,
    scene_of,
)

CLEARANCE = 4.0  # pixels from the ball's centre to a block; the right path keeps 8


def _avoids(facts: Facts, scene: Scene, a: int) -> np.ndarray:
    return ~facts.touching & np.isfinite(facts.position[:, a, 0])


AVOID = Kind(
    "avoid",
    ("Does the {a} ball stay off the dark blocks all the way?", "Does the {a} ball avoid the dark blocks?"),
    _avoids,
    subscore="avoid",
)


def _shortest_paths(start: int, goal: int, blocked: set[int]) -> list[list[int]]:
    """Return all shortest paths over the free cells of the 4x4 grid (cells are numbered row by row)."""
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


def _centre(cell: int) -> Point:
    return (cell % 4 * CELL + CELL / 2, cell // 4 * CELL + CELL / 2)


def through_the_blocks(scene: Scene) -> Track:
    return perform(straight(scene, scene.target.at))


def wall_crossing(scene: Scene, rng: np.random.Generator) -> Track:
    """Straight to the target, over the blocks."""
    return through_the_blocks(scene)


def disguise(scene: Scene, rng: np.random.Generator) -> Track:
    """Straight to the target, and the blocks on the way fade."""
    track, share = wall_crossing(scene, rng), growth(rng)
    actor = scene.actors[0]
    for index, thing in enumerate(scene.things):
        if thing in scene.blocks and min(distance_to_block(s[actor].at, thing) for s in track) < RADIUS:
            track = edited(track, index, lambda t, _: {"alpha": 1 - float(share[t])})
    return track


class Maze(BallToBox):
    name = "maze"
    category = "spatiality"
    prompts = (
        "Move the {ball} ball into the {box} box without touching the dark blocks.",
        "Bring the {ball} ball to the {box} box around the dark blocks.",
        "The {ball} ball goes into the {box} box and avoids the dark blocks.",
        "Guide the {ball} ball past the dark blocks into the {box} box.",
    )
    paraphrases = BALL_TO_NAMED_BOX
    endings = (
        " without touching the dark blocks",
        " around the dark blocks",
        " and avoids the dark blocks",
        " past the dark blocks",
        " and keep off the dark blocks",
    )
    kept = "boxes and blocks"
    process = (AVOID, ONE, SCENERY)
    breaks = AVOID
    single_flaw = "forbidden"
    corruptions: ClassVar = {"wall_crossing": wall_crossing, "disguise": disguise}

    def sample(self, rng: np.random.Generator, unseen: bool = False) -> Scene | None:
        colors = draw_colors(rng, 2)
        cells = rng.permutation(16)
        start, goal = int(cells[0]), int(cells[1])
        blocked = {int(c) for c in cells[2 : 2 + int(rng.integers(6, 9) if unseen else rng.integers(3, 6))]}
        paths = _shortest_paths(start, goal, blocked)
        if len(paths) != 1 or not 3 <= len(paths[0]) - 1 <= 5:
            return None
        a, b = np.asarray(_centre(start)), np.asarray(_centre(goal))
        blocks = [block(_centre(c)) for c in sorted(blocked)]
        if not any(distance_to_segment(np.asarray(b_.at), a, b) < 10 for b_ in blocks):
            return None  # no block in the straight line
        path = [_centre(c) for c in paths[0]]
        things = [*blocks, box(colors[1], path[-1]), ball(colors[0], path[0])]
        return scene_of("maze", things, {len(blocks) + 1: path}, [len(blocks)])

    def names(self, scene: Scene) -> dict[str, str]:
        return {"ball": scene.ball_color, "box": scene.target.color}

    def is_unseen(self, scene: Scene) -> bool:
        return len(scene.blocks) > 5

    def mistaken(self, scene: Scene) -> Scene:
        """Stops in the middle of the way."""
        return rerouted(scene, scene.waypoints[: len(scene.waypoints) // 2 + 1])

    def forbidden(self, scene: Scene) -> Track:
        """Straight through the blocks."""
        return through_the_blocks(scene)

    def wrong(self, scene: Scene, rng: np.random.Generator) -> Scene:
        """Beside the box."""
        return straight(scene, free_point(scene, rng, 14))

    def rules(self, scene: Scene, ways: np.ndarray) -> dict[str, float]:
        """``avoid``: the share of frames in which the ball keeps off every block."""
        return {
            "avoid": float(np.mean([all(distance_to_block(p, b) >= CLEARANCE for b in scene.blocks) for p in ways[0]]))
        }

    signature = staticmethod(first_signature)
