"""``odd``: the ball goes into the box that is unlike the others, by colour or by shape; five boxes out of domain."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from vlmteacher.microworld.families.base import BallToBox, clear_way, draw_colors, draw_places, point
from vlmteacher.microworld.kinds import SCENERY
from vlmteacher.microworld.scene import (
    ARRIVAL,
    BOX_HALF,
    SIZE,
    Scene,
    Thing,
    Track,
    ball,
    box,
    edited,
    perform,
    scene_of,
)

DRAG = 14.0  # pixels that another box is dragged in the forbidden way, less at the border


class Odd(BallToBox):
    name = "odd"
    category = "abstraction"
    prompts = (
        "Move the {ball} ball into the box that is unlike the others.",
        "The {ball} ball goes into the odd box.",
        "Bring the {ball} ball to the box that differs from the rest.",
        "Put the {ball} ball in the box that does not match the others.",
    )
    breaks = SCENERY
    query_weight = 6.0

    def sample(self, rng: np.random.Generator, unseen: bool = False) -> Scene | None:
        count = 5 if unseen else int(rng.integers(3, 5))
        own, common, rare = draw_colors(rng, 3)
        centres = draw_places(rng, count, 10, 19)
        if centres is None:
            return None
        starts = draw_places(rng, 1, 8, 15, centres)
        if starts is None or np.hypot(*(starts[0] - centres[0])) < 22:
            return None
        start = starts[0]
        if not clear_way(start, centres[0], centres[1:], 15):
            return None
        boxes = [box(common, point(centre)) for centre in centres]
        kind = int(rng.integers(3))
        if kind == 0:
            boxes[0] = replace(boxes[0], color=rare)
        elif kind == 1:
            boxes[0] = replace(boxes[0], shape="disc")
        else:
            boxes[1:] = [replace(b, shape="disc") for b in boxes[1:]]
        order = [int(i) for i in rng.permutation(count)]
        things = [*(boxes[i] for i in order), ball(own, point(start))]
        return scene_of("odd", things, {count: (point(start), point(centres[0]))}, [order.index(0)])

    def forbidden(self, scene: Scene) -> Track:
        """The ball drags another box along."""
        step = np.subtract(scene.waypoints[-1], scene.start)
        step *= DRAG / np.hypot(*step)
        room = BOX_HALF + 1, SIZE - BOX_HALF - 1
        ways = {i: np.clip(np.add(thing.at, step), *room) - thing.at for i, thing in enumerate(scene.scenery)}
        which = max((i for i in ways if i not in scene.targets), key=lambda i: np.hypot(*ways[i]))

        def moved(t: int, thing: Thing) -> dict[str, float]:
            x, y = thing.at + min(t / ARRIVAL, 1.0) * ways[which]
            return {"x": float(x), "y": float(y)}

        return edited(perform(scene), which, moved)

    def is_unseen(self, scene: Scene) -> bool:
        return len(scene.boxes) > 4
