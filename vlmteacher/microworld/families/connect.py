"""``connect``: the ball visits two of three dots in the order of the prompt; all three out of domain."""

from __future__ import annotations

from itertools import pairwise

import numpy as np

from vlmteacher.microworld.facts import Facts
from vlmteacher.microworld.families.base import Family, clear_way, draw_colors, draw_places, point
from vlmteacher.microworld.kinds import ONE, SCENERY, Asked, Kind, Names, is_at, is_inside, reached
from vlmteacher.microworld.scene import SIZE, Scene, Thing, Track, ball, far_apart, perform, rerouted, scene_of

DOTS = 3
DOT = 4.0  # radius
REACHED = 6.0  # pixels between the centres; the right video comes as near as 4
LONGEST = 80.0  # pixels in all, 8 a frame
VISITED = 6.5  # pixels per axis between the centres, for the Teacher's questions


def _in_order(facts: Facts, scene: Scene, a: int, b: int, c: int) -> np.ndarray:
    """Whether `b` has been visited wherever `c` has, and both in the end."""
    first, second = (np.maximum.accumulate(is_at(facts, scene, a, i, VISITED)) for i in (b, c))
    holds = first | ~second
    holds[-1] &= second[-1]
    return holds


def _swapped(facts: Facts, scene: Scene, a: int, b: int, c: int) -> list[Names]:
    return [(a, c, b)]


AT = Kind(
    "at",
    ("Is the {a} ball at the {b} dot at the end?", "Does the {a} ball end up at the {b} dot?"),
    is_inside,
    at_end=True,
    true_names=reached,
)
ORDER = Kind(
    "order",
    (
        "Does the {a} ball visit the {b} dot before the {c} dot?",
        "Does the {a} ball go to the {b} dot first, then to the {c} dot?",
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
    kept = "dots"
    goal = AT
    process = (ORDER, ONE, SCENERY)
    breaks = ORDER
    query_weight = 2.0

    def sample(self, rng: np.random.Generator, unseen: bool = False) -> Scene | None:
        count = DOTS if unseen else 2
        own, *colors = draw_colors(rng, DOTS + 1)
        dots = draw_places(rng, DOTS, 8, 16)
        if dots is None:
            return None
        start = rng.integers(8, SIZE - 7, size=2).astype(np.float64)
        if not far_apart(start, dots, 14):
            return None
        for order in (range(count), range(count)[::-1]):  # the mistake must be drawable as well
            stops = [start, *(dots[i] for i in order)]
            legs = list(pairwise(stops))
            if sum(np.hypot(*(b - a)) for a, b in legs) > LONGEST:
                return None
            if not all(clear_way(a, b, [d for d in dots if d is not a and d is not b], 11) for a, b in legs):
                return None
        things = [Thing("disc", c, *point(d), DOT) for c, d in zip(colors, dots, strict=True)]
        things.append(ball(own, point(start)))
        path = [point(start), *(point(dots[i]) for i in range(count))]
        return scene_of("connect", things, {DOTS: path}, range(count))

    def is_unseen(self, scene: Scene) -> bool:
        return len(scene.targets) > 2

    def names(self, scene: Scene) -> dict[str, str]:
        dots = [f"the {scene.things[i].color} dot" for i in scene.targets]
        return {"ball": scene.ball_color, "order": ", then ".join(dots)}

    def questions(self, scene: Scene) -> list[Asked]:
        a, dots = scene.actors[0], scene.targets
        pairs: list[Asked] = [(ORDER, (a, *pair)) for pair in pairwise(dots)]
        one: list[Asked] = [(ONE, (a,))] if len(pairs) < 2 else []
        return [(AT, (a, dots[-1])), *pairs, *one, (SCENERY, ())]

    def key_color(self, scene: Scene) -> str:
        return scene.things[scene.targets[0]].color

    def rules(self, scene: Scene, ways: np.ndarray) -> dict[str, float]:
        """``order``: the share of dots that the ball reaches, each after the one before it in the prompt."""
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
        """Straight to the last dot."""
        return perform(rerouted(scene, (scene.start, scene.waypoints[-1])))

    def wrong(self, scene: Scene, rng: np.random.Generator) -> Scene:
        """In the opposite order, straight to the last dot, or only to the first."""
        return (
            self.mistaken(scene),
            rerouted(scene, (scene.start, scene.waypoints[-1])),
            rerouted(scene, scene.waypoints[:2]),
        )[int(rng.integers(3))]
