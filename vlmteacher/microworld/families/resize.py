"""``resize``: the named disc grows until it fills its ring; larger changes out of domain."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from vlmteacher.microworld.facts import Facts
from vlmteacher.microworld.families.base import Family, draw_colors, halfway, leap
from vlmteacher.microworld.kinds import ONE, SCENERY, SMOOTH, Kind, is_single, outline_of
from vlmteacher.microworld.scene import FIT, SIZE, Point, Scene, Thing, Track, scene_of

SMALLEST, LARGEST = 4, 12  # radii
FITS = 1.2  # pixels of a radius


def _fills(facts: Facts, scene: Scene, a: int) -> np.ndarray:
    end = outline_of(scene, a).size - FIT
    return is_single(facts, scene, a) & (np.abs(facts.size[:, a] - end) <= FITS)


FILLS = Kind(
    "fills",
    ("Does the {a} disc fill its ring at the end?", "Does the {a} disc grow to the size of its ring?"),
    _fills,
    at_end=True,
)


def _radii(rng: np.random.Generator, unseen: bool) -> tuple[float, float]:
    """Of a disc before and after."""
    growth = int(rng.integers(7, 9) if unseen else rng.integers(4, 7))
    small = int(rng.integers(SMALLEST, LARGEST - growth + 1))
    return float(small), float(small + growth)


class Resize(Family):
    name = "resize"
    category = "transformation"
    prompts = (
        "Make the {disc} disc fit its ring.",
        "The {disc} disc grows until it fills its ring.",
        "Let the {disc} disc grow to the size of its ring and leave the other disc as it is.",
        "Blow up the {disc} disc until it matches its ring.",
    )
    noun = "disc"
    verb = "grow"
    kept = "other things"
    goal = FILLS
    process = (ONE, SMOOTH, SCENERY)
    breaks = SMOOTH
    moves = False
    without = ("near_miss",)

    def sample(self, rng: np.random.Generator, unseen: bool = False) -> Scene | None:
        colors = draw_colors(rng, 2)
        sizes = [_radii(rng, unseen) for _ in colors]
        reach = [int(end + FIT) + 1 for _, end in sizes]
        places: list[Point] = []
        for r in reach:
            x, y = rng.integers(r, SIZE - r + 1, 2)
            places.append((float(x), float(y)))
        if np.hypot(places[0][0] - places[1][0], places[0][1] - places[1][1]) < sum(reach) + 3:
            return None
        discs = [Thing("disc", c, *p, s[0]) for c, p, s in zip(colors, places, sizes, strict=True)]
        rings = [Thing("disc", "dark", *p, s[1] + FIT, outline=True) for p, s in zip(places, sizes, strict=True)]
        which = int(rng.integers(2))
        end = replace(discs[which], size=sizes[which][1])
        return scene_of("resize", [*discs, *rings], {which: end}, [2 + which])

    def is_unseen(self, scene: Scene) -> bool:
        return scene.goals[0].size - scene.moving[0].size > 6

    def names(self, scene: Scene) -> dict[str, str]:
        return {"disc": scene.ball_color}

    def key_color(self, scene: Scene) -> str:
        return scene.ball_color

    def mistaken(self, scene: Scene) -> Scene:
        """Stops half-way."""
        return halfway(scene)

    def forbidden(self, scene: Scene) -> Track:
        """In one leap."""
        return leap(scene)

    def wrong(self, scene: Scene, rng: np.random.Generator) -> Scene:
        """Not far enough, or the other disc."""
        if rng.random() < 0.5:
            return halfway(scene, float(rng.uniform(0.2, 0.6)))
        other = 1 - scene.actors[0]
        goal = replace(scene.things[other], size=scene.things[2 + other].size - FIT)
        return replace(scene, actors=(other,), goals=(goal,), ways=((goal.at,),))
