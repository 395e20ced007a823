"""``count``: the ball goes into the box whose number from the left is that of the dots; four dots out of domain."""

from __future__ import annotations

import numpy as np

from vlmteacher.microworld.families.base import BallToBox, draw_colors, faded, other_boxes
from vlmteacher.microworld.kinds import SCENERY
from vlmteacher.microworld.scene import Point, Scene, Thing, Track, rerouted, scene_of

BOXES = 4
ORDINALS = ("first", "second", "third", "fourth")
DOT = BALL = 4.0  # radii
BOX = 7.0  # half its side: four fill a row


def _way(start: Point, end: Point) -> tuple[Point, ...]:
    """Along the row, then down."""
    return (start, (end[0], start[1]), end)


class Count(BallToBox):
    name = "count"
    category = "knowledge"
    prompts = (
        "Count the dots: the {ball} ball goes into the box with that number from the left.",
        "Move the {ball} ball into the box whose place from the left is the number of dots.",
        "As many dots as there are, so far from the left is the box for the {ball} ball.",
    )
    kept = "boxes and dots"
    breaks = SCENERY
    query_weight = 3.0

    def sample(self, rng: np.random.Generator, unseen: bool = False) -> Scene | None:
        number = 4 if unseen else int(rng.integers(1, 4))
        own, dots, boxes = draw_colors(rng, 3)
        left, top = float(rng.integers(6, 15)), float(rng.integers(7, 14))
        start = (float(rng.integers(7, 58)), float(rng.integers(30, 37)))
        end = (8.0 + 16 * (number - 1), 55.0)
        if abs(start[0] - end[0]) < 4:
            return None
        things = [Thing("disc", dots, left + 14 * k, top, DOT) for k in range(number)]
        things += [Thing("square", boxes, 8.0 + 16 * k, 55.0, BOX, outline=True) for k in range(BOXES)]
        things.append(Thing("disc", own, *start, BALL))
        return scene_of("count", things, {len(things) - 1: _way(start, end)}, [2 * number - 1])

    def is_unseen(self, scene: Scene) -> bool:
        return self._number(scene) > 3

    def describe(self, scene: Scene, index: int) -> str | None:
        """Boxes by their place in the row."""
        thing = scene.things[index]
        if (words := super().describe(scene, index)) is not None:
            return words
        row = sorted(x.x for x in scene.scenery if (x.color, x.outline) == (thing.color, thing.outline))
        return f"{ORDINALS[row.index(thing.x)]} {thing.color}"

    def key_color(self, scene: Scene) -> str:
        return scene.ball_color

    def mistaken(self, scene: Scene) -> Scene:
        """One box too far; the last one's left neighbour."""
        number = self._number(scene)
        wrong = scene.boxes[number if number < BOXES else BOXES - 2]
        return rerouted(scene, _way(scene.start, wrong.at))

    def forbidden(self, scene: Scene) -> Track:
        """The nearest other box fades."""
        return faded(scene, scene.things.index(other_boxes(scene)[0]))

    def wrong(self, scene: Scene, rng: np.random.Generator) -> Scene:
        """Into another box."""
        others = [b for b in scene.boxes if b != scene.target]
        return rerouted(scene, _way(scene.start, others[int(rng.integers(len(others)))].at))

    @staticmethod
    def _number(scene: Scene) -> int:
        return len(scene.scenery) - BOXES
