"""``connect``: the ball visits two boxes in the order of the prompt; a third one stands around out of domain."""

from __future__ import annotations

from itertools import pairwise

import numpy as np

from vlmteacher.microworld.facts import Facts
from vlmteacher.microworld.families.base import Family, clear_way, draw_colors, draw_places, point
from vlmteacher.microworld.kinds import INSIDE, ONE, SCENERY, Asked, Kind, Names, is_at
from vlmteacher.microworld.scene import SIZE, Scene, Track, ball, box, far_apart, perform, rerouted, scene_of

REACHED = 6.0  # pixels between the centres; the right video comes as near as 3
LONGEST = 56.0  # pixels in all, 5.6 a frame: what turns while it moves faster blurs in a small VAE
VISITED = 6.5  # pixels per axis between the centres, for the Teacher's questions


def _in_order(facts: Facts, scene: Scene, a: int, b: int, c: int) -> np.ndarray:
    """Whether `b` has been visited wherever `c` has, and both in the end."""
    first, second = (np.maximum.accumulate(is_at(facts, scene, a, i, VISITED)) for i in (b, c))
    holds = first | ~second
    holds[-1] &= second[-1]
    return holds


def _swapped(facts: Facts, scene: Scene, a: int, b: int, c: int) -> list[Names]:
    return [(a, c, b)]


ORDER = Kind(
    "order",
    (
        "Does the {a} ball visit the {b} box before the {c} box?",
        "Does the {a} ball go to the {b} box first, then to the {c} box?",
    ),
    _in_order,
    subscore="order",
    true_names=_swapped,
)


class Connect(Family):
    name = "connect"
    category = "spatiality"
    prompts = (
        "The {ball} ball goes to {order}.",
        "Move the {ball} ball to {order}.",
        "Let the {ball} ball visit {order}.",
        "Lead the {ball} ball to {order}.",
    )
    goal = INSIDE
    process = (ORDER, ONE, SCENERY)
    breaks = ORDER
    query_weight = 2.0

    def sample(self, rng: np.random.Generator, unseen: bool = False) -> Scene | None:
        count = 3 if unseen else 2
        own, *colors = draw_colors(rng, count + 1)
        places = draw_places(rng, count, 10, 19)
        if places is None:
            return None
        start = rng.integers(8, SIZE - 7, size=2).astype(np.float64)
        if not far_apart(start, places, 15):
            return None
        first, second = places[:2]
        for order in ((first, second), (second, first)):  # the mistake must be drawable as well
            legs = list(pairwise([start, *order]))
            if sum(np.hypot(*(b - a)) for a, b in legs) > LONGEST:
                return None
            if not all(clear_way(a, b, [p for p in places if p is not a and p is not b], 15) for a, b in legs):
                return None
        things = [*(box(c, point(p)) for c, p in zip(colors, places, strict=True)), ball(own, point(start))]
        return scene_of("connect", things, {count: [point(p) for p in (start, first, second)]}, (0, 1))

    def is_unseen(self, scene: Scene) -> bool:
        return len(scene.boxes) > 2

    def names(self, scene: Scene) -> dict[str, str]:
        boxes = [f"the {scene.things[i].color} box" for i in scene.targets]
        return {"ball": scene.ball_color, "order": ", then ".join(boxes)}

    def questions(self, scene: Scene) -> list[Asked]:
        a, (first, second) = scene.actors[0], scene.targets
        return [(INSIDE, (a, second)), (ORDER, (a, first, second)), (ONE, (a,)), (SCENERY, ())]

    def key_color(self, scene: Scene) -> str:
        return scene.things[scene.targets[0]].color

    def rules(self, scene: Scene, ways: np.ndarray) -> dict[str, float]:
        """``order``: the share of boxes that the ball reaches, each after the one before it in the prompt."""
        reached, since = 0, -1
        for index in scene.targets:
            near = np.flatnonzero(np.hypot(*(ways[0] - scene.things[index].at).T) <= REACHED)
            if len(near) and near[0] > since:
                reached, since = reached + 1, int(near[0])
        return {"order": reached / len(scene.targets)}

    def mistaken(self, scene: Scene) -> Scene:
        """In the opposite order."""
        return rerouted(scene, (scene.start, *scene.waypoints[:0:-1]))

    def forbidden(self, scene: Scene) -> Track:
        """Straight to the last box."""
        return perform(rerouted(scene, (scene.start, scene.waypoints[-1])))

    def wrong(self, scene: Scene, rng: np.random.Generator) -> Scene:
        """In the opposite order, straight to the last box, or only to the first."""
        return (
            self.mistaken(scene),
            rerouted(scene, (scene.start, scene.waypoints[-1])),
            rerouted(scene, scene.waypoints[:2]),
        )[int(rng.integers(3))]
