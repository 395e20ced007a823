"""Tasks of the microworld that the page offers for the packaged pair of models."""

from __future__ import annotations

from typing import NamedTuple

from PIL import Image

from vlmteacher.microworld import world
from vlmteacher.microworld.example import packaged_example

HELD_OUT = (18, 6, 5, 0)  # instances of the frozen test split in domain, one of each family
SPLIT_SEED = 1


class Example(NamedTuple):
    """A task by its family, with the first frame and the seed of its noise."""

    family: str
    prompt: str
    image: Image.Image
    seed: int


def packaged_examples() -> list[Example]:
    """The example of `vlmteacher demo`, and others of the held-out scenes of the microworld."""
    first = packaged_example()
    examples = [Example(first.scene.family, first.prompt, first.image, first.seed)]
    for index in HELD_OUT:
        scene, prompt = world.instance(index, SPLIT_SEED)
        examples.append(Example(scene.family, prompt, world.first_frame(scene), 0))
    return examples
