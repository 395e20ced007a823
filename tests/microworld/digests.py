"""Digests of everything that the microworld draws: two checkouts that print the same lines make the same world.

    python -m tests.microworld.digests [--scenes N] [--exact]

One line per family: scenes, prompts and pictures of every split, the queries, all questions with their answers, every
corruption, the labeller's and the scorer's verdicts, the packaged tokenizer's ids. With ``--exact`` pixels and all
other arrays count to the last bit, which one processor may round otherwise than another; without it text, integers and
booleans that no such bit decides.
"""

from __future__ import annotations

import argparse
import hashlib
import json
from functools import cache
from typing import Any

import numpy as np

from vlmteacher.checkpoints.pretrained import load_tokenizer
from vlmteacher.microworld import corruptions, labeller, scorer, world
from vlmteacher.microworld.facts import Facts, facts_of
from vlmteacher.microworld.families import FAMILIES
from vlmteacher.microworld.questions import ask, own_questions, recognise, right_queries, truths
from vlmteacher.microworld.scene import Scene
from vlmteacher.pipeline import PACKAGED_PAIR


class Digest:
    """A hash of values of any kind, in the order in which they are added."""

    def __init__(self, exact: bool) -> None:
        self.exact, self._hash = exact, hashlib.sha256()

    def text(self, value: Any) -> None:
        self._hash.update(json.dumps(value, sort_keys=True, default=repr).encode())

    def array(self, value: np.ndarray) -> None:
        if self.exact or value.dtype.kind != "f":
            self._hash.update(np.ascontiguousarray(value).tobytes())

    def hex(self) -> str:
        return self._hash.hexdigest()[:32]


@cache
def tokenizer() -> Any:
    return load_tokenizer(PACKAGED_PAIR / "teacher")


def add_questions(digest: Digest, scene: Scene, facts: Facts, rng: np.random.Generator) -> list[str]:
    """The task's own questions and others about a video; returns their texts."""
    asked = [*own_questions(scene, facts), *ask(scene, facts, rng, 12)]
    for question in asked:
        digest.text([question.kind, question.text, question.names, question.answer])
        digest.array(question.holds)
    texts = [question.text for question in asked]
    digest.text(tokenizer()(texts).input_ids)
    digest.text([list(truth) for truth in truths(scene, facts, right_queries(scene))])
    return texts


def add_facts(digest: Digest, facts: Facts) -> None:
    for name, value in sorted(vars(facts).items()):
        digest.text(name)
        digest.array(value)
    digest.array(facts.jumped)


def add_scene(digest: Digest, scene: Scene, rng: np.random.Generator) -> None:
    """The scene, its prompt, its right video, and its mistake where its training video shows that."""
    prompt, video = world.write_prompt(scene, rng), world.render(scene)
    digest.text([scene.to_json(), prompt, tokenizer()(prompt).input_ids, world.digest(scene), world.split_of(scene)])
    plan = FAMILIES[scene.family].mistaken(scene) if world.flaw(scene, world.PACKAGED_FLAWS) == "mistaken" else scene
    digest.text(plan.to_json())
    digest.array(video)
    digest.text(right_queries(scene).to_dict())
    add_questions(digest, scene, facts_of(scene, world.perform(scene)), rng)
    labels = labeller.label(video, scene)
    digest.text([labeller.succeeds(labels, scene), scorer.score(video, scene).success])
    if digest.exact:
        add_facts(digest, labels)


def digest_of(family: str, scenes: int, exact: bool) -> str:
    """The digest of a family over `scenes` scenes of each split."""
    digest, rng = Digest(exact), np.random.default_rng(list(family.encode()))
    for split in world.SPLITS:
        for index in range(scenes):
            scene, prompt = world.instance(index, 5, split, [family])
            digest.text([scene.to_json(), prompt])
            scene = world.sample_scene(rng, family, split)
            add_scene(digest, scene, rng)
            for kind in sorted(corruptions.kinds(family)):
                track = corruptions.corrupt(kind, scene, rng)
                digest.text([kind, [len(things) for things in track]])
                digest.array(world.draw(track))
                digest.text(track if exact else None)
                if kind != "another_instance":  # whose things are others
                    facts = facts_of(scene, track)
                    add_facts(digest, facts)
                    add_questions(digest, scene, facts, rng)
            other = world.sample_scene(rng)  # what is asked about one family's videos may be asked about another's
            facts = facts_of(other, world.perform(other))
            for question in ask(other, facts, rng, 8):
                again = recognise(question.text, scene, facts_of(scene, world.perform(scene)))
                digest.text([question.text, again and [again.kind, again.text, again.names, again.answer]])
    return digest.hex()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scenes", type=int, default=8, metavar="N", help="in each split (%(default)s)")
    parser.add_argument("--exact", action="store_true", help="to the last bit of the arrays")
    arguments = parser.parse_args()
    for family in world.FAMILIES:
        print(f"{family:<8} {digest_of(family, arguments.scenes, arguments.exact)}", flush=True)


if __name__ == "__main__":
    main()
