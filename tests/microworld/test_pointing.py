"""Where the gradient of the Teacher is turned to."""

import numpy as np
import pytest
import torch

from vlmteacher.microworld import train_teacher
from vlmteacher.microworld.pointing import Pointing
from vlmteacher.microworld.training import load_config
from vlmteacher.optimization import Settings
from vlmteacher.pipeline import TeacherPipeline

TEACHER = {"width": 32, "layers": 3, "mlp": 48, "vision_layers": 2, "vision_mlp": 48, "bf16": False}
OPTIMISATIONS = {"runs": 2, "at_once": 2, "outside": 0.5, "flawed": 1.0, "longest": 3, "straight": 0.5}
CONFIG = OPTIMISATIONS | {"far": 1e-6, "weight": 2.0, "early": 0.5}


@pytest.fixture(scope="module")
def pointing(tmp_path_factory):
    pipe = TeacherPipeline.from_pretrained()
    torch.manual_seed(0)  # after the loading, whose draws are the libraries' own
    config = load_config("teacher") | TEACHER
    lesson = train_teacher.Lesson(train_teacher.build(config, tmp_path_factory.mktemp("t") / "tokenizer"), config)
    settings = Settings(rank=2, learning_rate=1e-3, teacher_frames=train_teacher.FRAMES)
    return Pointing(lesson, pipe.reasoner, pipe.decoder, settings, dict(CONFIG))


@pytest.fixture(autouse=True)
def begin(pointing):
    pointing.clear()


def test_the_loss_is_that_of_the_cosine(pointing, monkeypatch):
    """Its gradient at the Teacher's weights against differences of the cosine, two steps into the optimisations."""
    monkeypatch.setitem(pointing.config, "straight", 1.0)  # so that all see the same LoRAs whatever the Teacher is
    monkeypatch.setitem(pointing.config, "early", 0.0)
    parameters = list(pointing.lesson.teacher.model.parameters())

    def second_step() -> tuple[torch.Tensor, float]:
        pointing.clear()
        rng = np.random.default_rng(4)
        pointing.step(rng)
        loss, told = pointing.step(rng)
        assert loss.item() == pytest.approx(2.0 * (1 - told["cosine"]), rel=1e-4)
        return loss, told["cosine"]

    def move(size: float) -> None:
        with torch.no_grad():
            for parameter, g in zip(parameters, gradients, strict=True):
                parameter += size * g / norm

    gradients = torch.autograd.grad(second_step()[0], parameters, allow_unused=True, materialize_grads=True)
    norm = torch.cat([g.flatten() for g in gradients]).norm()
    move(1e-3)
    more = second_step()[1]
    move(-2e-3)
    less = second_step()[1]
    move(1e-3)
    assert 2.0 * (less - more) / 2e-3 == pytest.approx(norm.item(), rel=0.02)


def test_yes_too_early_costs(pointing, monkeypatch):
    """As far from the right video as at first, the objective is to be 1.5."""
    monkeypatch.setitem(pointing.config, "weight", 0.0)
    bias = torch.zeros((), requires_grad=True)
    answers = pointing.lesson.read

    def sure(*args, **kwargs):
        reading = answers(*args, **kwargs)
        return train_teacher.Reading(**vars(reading) | {"yes": reading.yes * 0 + bias})

    monkeypatch.setattr(pointing.lesson, "read", sure)
    loss, told = pointing.step(np.random.default_rng(0))
    assert told["early"] == pytest.approx(1.5) and loss.item() == pytest.approx(0.5 * 1.5)
    (gradient,) = torch.autograd.grad(loss, bias)
    assert gradient > 0  # the answers' likelihood is to fall


def test_a_change_of_latents_is_carried_into_frames(pointing):
    run = pointing.begin(pointing.transformers[0], np.random.default_rng(0))
    direction = torch.randn(run.right.shape, generator=torch.Generator().manual_seed(0))
    video = pointing.decoder.decode(run.right, frame_indices=pointing.lesson.indices)
    carried = pointing.carried(video, run.right, direction)

    def decode(z: torch.Tensor) -> torch.Tensor:
        return pointing.decoder.decode_batch(z)[0, pointing.lesson.indices]

    exact = torch.autograd.functional.jvp(decode, run.right, direction)[1]
    assert (carried - exact).square().mean() < 1e-3 * exact.square().mean()


def test_optimisations_end_and_others_begin(pointing):
    rng = np.random.default_rng(0)
    pointing.step(rng)
    first = list(pointing.runs)
    assert all(run is None or run.updates == 1 for run in first)
    for _ in range(CONFIG["longest"]):
        pointing.step(rng)
    assert not {id(run) for run in pointing.runs if run} & {id(run) for run in first if run}
