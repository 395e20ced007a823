"""``rotate``: the named bar turns, the shorter way, until it lies in its outline; larger angles out of domain."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from vlmteacher.microworld.facts import Facts, wrapped
from vlmteacher.microworld.families.base import Family, draw_colors, halfway
from vlmteacher.microworld.kinds import ONE, SMOOTH, Kind, is_single, outline_of
from vlmteacher.microworld.scene import FIT, NUM_FRAMES, SIZE, Scene, Thing, Track, edited, perform, scene_of

HALF = 11.0  # of a bar's length
REACH = 16  # from a centre to the corners of the outline
LIES = 8.0  # degrees
SWING = 16.0  # degrees that the forbidden way turns back at first


def _lies(facts: Facts, scene: Scene, a: int) -> np.ndarray:
    end = outline_of(scene, a).angle
    return is_single(facts, scene, a) & (np.abs(wrapped(facts.angle[:, a] - end)) <= LIES)


def _turns_shorter(facts: Facts, scene: Scene, a: int) -> np.ndarray:
    start = scene.things[a].angle
    direction = np.sign(wrapped(np.asarray(outline_of(scene, a).angle - start)))
    return ~(direction * wrapped(facts.angle[:, a] - start) < -LIES)


LIES_IN_OUTLINE = Kind(
    "lies",
    ("Does the {a} bar lie in its outline at the end?", "Does the {a} bar turn into its outline?"),
    _lies,
    at_end=True,
)
SHORTER = Kind(
    "shorter",
    ("Does the {a} bar turn the shorter way?", "Does the {a} bar turn the shorter way to its outline?"),
    _turns_shorter,
    subscore="direct",
)


class Rotate(Family):
    name = "rotate"
    category = "transformation"
    prompts = (
        "Turn the {bar} bar into its outline.",
        "The {bar} bar turns until it fits its outline.",
        "Rotate the {bar} bar to match its outline and leave the other bar as it is.",
        "Turn the {bar} bar the shorter way until it lies in its outline.",
    )
    noun = "bar"
    verb = "turn"
    kept = "other things"
    goal = LIES_IN_OUTLINE
    process = (SHORTER, ONE, SMOOTH)
    breaks = SHORTER
    moves = False
    without = ("near_miss",)

    def sample(self, rng: np.random.Generator, unseen: bool = False) -> Scene | None:
        colors = draw_colors(rng, 2)
        places = rng.integers(REACH, SIZE - REACH + 1, (2, 2)).astype(float)
        if np.hypot(*(places[0] - places[1])) < 2 * REACH:
            return None
        angles = rng.integers(0, 36, 2) * 5.0
        turns = rng.integers(*((13, 16) if unseen else (6, 13)), size=2) * 5.0 * rng.choice([-1, 1], 2)
        bars = [
            Thing("bar", color, float(x), float(y), HALF, float(angle))
            for color, (x, y), angle in zip(colors, places, angles, strict=True)
        ]
        outlines = [
            Thing("bar", "dark", *b.at, HALF + FIT, float(b.angle + turn), outline=True)
            for b, turn in zip(bars, turns, strict=True)
        ]
        which = int(rng.integers(2))
        end = replace(bars[which], angle=outlines[which].angle)
        return scene_of("rotate", [*bars, *outlines], {which: end}, [2 + which])

    def is_unseen(self, scene: Scene) -> bool:
        return abs(scene.goals[0].angle - scene.moving[0].angle) > 60

    def names(self, scene: Scene) -> dict[str, str]:
        return {"bar": scene.ball_color}

    def key_color(self, scene: Scene) -> str:
        return scene.ball_color

    def mistaken(self, scene: Scene) -> Scene:
        """As far the other way."""
        start, goal = scene.moving[0], scene.goals[0]
        return replace(scene, goals=(replace(goal, angle=2 * start.angle - goal.angle),))

    def forbidden(self, scene: Scene) -> Track:
        """The other way round at first."""
        start, end = scene.moving[0].angle, scene.goals[0].angle
        back = start - np.copysign(SWING, end - start)
        speed = (SWING + abs(end - back)) / (NUM_FRAMES - 2)  # it rests in the last two frames
        turned = speed * np.arange(NUM_FRAMES)
        angles = np.interp(turned, (0, SWING, SWING + abs(end - back)), (start, back, end))
        return edited(perform(scene), scene.actors[0], lambda t, _: {"angle": float(angles[t])})

    def wrong(self, scene: Scene, rng: np.random.Generator) -> Scene:
        """Not far enough, the other way round, or the other bar."""
        kind = int(rng.integers(3))
        if kind == 0:
            return halfway(scene, float(rng.uniform(0.2, 0.6)))
        if kind == 1:
            return self.mistaken(scene)
        other = 1 - scene.actors[0]
        goal = replace(scene.things[other], angle=scene.things[2 + other].angle)
        return replace(scene, actors=(other,), goals=(goal,), ways=((goal.at,),))
