"""``deliver``: each of two balls goes into the box of its own colour; three balls out of domain."""

from __future__ import annotations

import numpy as np

from vlmteacher.microworld.families.base import (
    Family,
    clear_way,
    draw_colors,
    draw_places,
    followed,
    free_point,
    halfway,
    point,
    straight,
)
from vlmteacher.microworld.kinds import INSIDE, ONE, Asked
from vlmteacher.microworld.scene import Scene, Track, ball, box, scene_of, trajectory


class Deliver(Family):
    name = "deliver"
    category = "perception"
    prompts = (
        "Bring each ball into the matching box.",
        "Every ball goes into the box like it.",
        "Put all balls into the boxes that match them.",
        "Move each ball to the box that looks like it and leave the boxes in place.",
    )
    goal = INSIDE
    process = (ONE,)
    breaks = ONE
    query_weight = 3.0

    def sample(self, rng: np.random.Generator, unseen: bool = False) -> Scene | None:
        balls = 3 if unseen else 2
        count = balls + (0 if unseen else int(rng.integers(2)))  # a box more than balls, at times
        colors = draw_colors(rng, count)
        centres = draw_places(rng, count, 10, 19)
        starts = draw_places(rng, balls, 8, 15, centres) if centres else None
        if centres is None or starts is None:
            return None
        for i, start in enumerate(starts):
            if np.hypot(*(start - centres[i])) < 22:
                return None
            if not clear_way(start, centres[i], [c for k, c in enumerate(centres) if k != i], 14):
                return None
        ways = [(point(s), point(c)) for s, c in zip(starts, centres, strict=False)]
        runs = [trajectory(way) for way in ways]
        if any(np.hypot(*(runs[i] - runs[k]).T).min() < 13 for i in range(balls) for k in range(i)):
            return None
        order = sorted(range(balls), key=lambda i: tuple(starts[i][::-1]))  # the upper ball is the first actor
        things = [box(c, point(p)) for c, p in zip(colors, centres, strict=True)]
        things += [ball(colors[i], point(starts[i])) for i in order]
        return scene_of("deliver", things, {count + k: ways[i] for k, i in enumerate(order)}, order)

    def is_unseen(self, scene: Scene) -> bool:
        return len(scene.actors) > 2

    def names(self, scene: Scene) -> dict[str, str]:
        return {}

    def questions(self, scene: Scene) -> list[Asked]:
        """Where each ball should be, the upper ball first; no more than four."""
        inside: list[Asked] = [(INSIDE, pair) for pair in zip(scene.actors, scene.targets, strict=True)]
        return [*inside, *((ONE, (a,)) for a in scene.actors)][:4]

    def key_color(self, scene: Scene) -> str:
        return scene.ball_color

    def mistaken(self, scene: Scene) -> Scene:
        """The upper ball stops half-way."""
        return halfway(scene)

    def forbidden(self, scene: Scene) -> Track:
        """A copy follows the upper ball."""
        return followed(scene, scene.actors[0])

    def wrong(self, scene: Scene, rng: np.random.Generator) -> Scene:
        """A ball goes to another box, or to none."""
        which = int(rng.integers(len(scene.actors)))
        others = [b for b in scene.boxes if b != scene.things[scene.targets[which]]]
        ends = [way[-1] for way in scene.ways]
        ends[which] = others[int(rng.integers(len(others)))].at if rng.random() < 0.7 else free_point(scene, rng, 14)
        if np.hypot(*np.subtract(ends[which], scene.ways[which][-1])) < 12:
            ends[which] = scene.moving[which].at
        return straight(scene, *ends)
