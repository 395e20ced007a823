"""``move``: bring the ball into the named box; two or three boxes stand around, four out of domain."""

from __future__ import annotations

from typing import Any, ClassVar

import numpy as np

from vlmteacher.microworld.families.base import (
    BALL_TO_NAMED_BOX,
    BallToBox,
    clear_way,
    draw_colors,
    draw_places,
    growth,
    leap,
    other_boxes,
    point,
    straight,
)
from vlmteacher.microworld.kinds import SMOOTH
from vlmteacher.microworld.scene import SIZE, Scene, Track, ball, box, edited, far_apart, perform, scene_of


def first_signature(scene: Scene) -> dict[str, Any]:
    """Return the form that scenes of ``move`` and ``maze`` had in the first version, which decided their splits."""
    return {
        "family": scene.family,
        "ball_color": scene.ball_color,
        "start": scene.start,
        "boxes": [{"color": b.color, "x": b.x, "y": b.y} for b in scene.boxes],
        "target": scene.boxes.index(scene.target),
        "blocks": [b.at for b in scene.blocks],
        "waypoints": scene.waypoints,
    }


def disguise(scene: Scene, rng: np.random.Generator) -> Track:
    """The ball goes into a wrong box, which takes the named colour; at times the right box fades."""
    others = other_boxes(scene)
    end = others[int(rng.integers(len(others)))]
    track, share = perform(straight(scene, end.at)), growth(rng)
    fade = float(rng.uniform(0, 1)) if rng.random() < 0.5 else 0.0
    color = scene.target.color
    track = edited(track, scene.things.index(end), lambda t, _: {"other": color, "blend": float(share[t])})
    return edited(track, scene.targets[-1], lambda t, _: {"alpha": 1 - fade * float(share[t])})


class Move(BallToBox):
    name = "move"
    category = "perception"
    prompts = (
        "Move the {ball} ball into the {box} box.",
        "Bring the {ball} ball to the {box} box.",
        "The {ball} ball goes into the {box} box.",
        "Put the {ball} ball in the {box} box and leave everything else in place.",
    )
    paraphrases = BALL_TO_NAMED_BOX
    endings = ("", "", " and leave everything else in place", " without touching anything else")
    breaks = SMOOTH
    corruptions: ClassVar = {"disguise": disguise}

    def sample(self, rng: np.random.Generator, unseen: bool = False) -> Scene | None:
        count = 4 if unseen else int(rng.integers(2, 4))
        colors = draw_colors(rng, count + 1)
        centres = draw_places(rng, count, 10, 21)
        if centres is None:
            return None
        start = rng.integers(8, SIZE - 7, size=2).astype(np.float64)
        if not far_apart(start, centres, 16) or np.hypot(*(start - centres[0])) < 22:
            return None
        if not clear_way(start, centres[0], centres[1:], 16):
            return None
        order = rng.permutation(count)
        boxes = [box(colors[1 + i], point(centres[i])) for i in order]
        things = [*boxes, ball(colors[0], point(start))]
        return scene_of("move", things, {count: (point(start), point(centres[0]))}, [int(np.argmin(order))])

    def names(self, scene: Scene) -> dict[str, str]:
        return {"ball": scene.ball_color, "box": scene.target.color}

    def is_unseen(self, scene: Scene) -> bool:
        return len(scene.boxes) > 3

    def forbidden(self, scene: Scene) -> Track:
        """In one leap."""
        return leap(scene)

    signature = staticmethod(first_signature)
