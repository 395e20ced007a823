"""Where the gradient of the Teacher is turned to, and what else it learns there."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from recipes.microworld.teacher import model
from recipes.microworld.teacher.lesson import FRAMES, Lesson, Reading
from recipes.microworld.teacher.point import draw_rows, label_rows
from recipes.microworld.teacher.pointing import Pointing, RowAdam, Scenes
from recipes.microworld.training import load_config
from vlmteacher.lora.adapter import add_lora, lora_parameters, remove_lora
from vlmteacher.optimization.objective import GRADIENT_CLIP
from vlmteacher.optimization.reward import vqa_objective
from vlmteacher.pipeline import TeacherPipeline
from vlmteacher.settings import Settings

TEACHER = {"width": 32, "layers": 3, "mlp": 48, "vision_layers": 2, "vision_mlp": 48, "bf16": False}
SCENES = {"scenes": 4, "outside": 0.5, "flawed": 1.0, "flaws": "both", "often": {"connect": 0.0}}
OPTIMISATIONS = {
    "runs": 2,
    "longest": 3,
    "straight": 0.5,
    "far": 1e-6,
    "weight": 2.0,
    "early": 0.5,
    "content_from": 0.4,
}


@pytest.fixture(scope="module")
def pointing(tmp_path_factory):
    pipe = TeacherPipeline.from_pretrained()
    torch.manual_seed(0)  # after the loading, whose draws are the libraries' own
    config = load_config("teacher") | TEACHER
    lesson = Lesson(model.build(config, tmp_path_factory.mktemp("t") / "tokenizer"), config)
    settings = Settings(rank=2, learning_rate=1e-3, teacher_frames=FRAMES)
    scenes = Scenes.draw(pipe.reasoner, SCENES, np.random.default_rng(0))
    return Pointing(lesson, pipe.reasoner, pipe.decoder, scenes, settings, dict(OPTIMISATIONS))


@pytest.fixture(autouse=True)
def begin(pointing):
    pointing.clear()


@pytest.mark.slow
def test_the_loss_is_that_of_the_cosine(pointing, monkeypatch):
    """Its gradient at the Teacher's weights against differences of the cosine, two steps into the optimisations."""
    monkeypatch.setitem(pointing.config, "straight", 1.0)  # so that all see the same LoRAs whatever the Teacher is
    monkeypatch.setitem(pointing.config, "early", 0.0)
    parameters = list(pointing.lesson.teacher.model.parameters())

    def second_step() -> tuple[torch.Tensor, float]:
        pointing.clear()
        rng = np.random.default_rng(4)
        pointing.step(rng)
        loss, told, _ = pointing.step(rng)
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


def test_each_row_is_the_optimisation_that_it_would_be_alone(pointing, monkeypatch):
    """Two steps against PEFT's LoRA and torch's Adam, with the gradient of the Teacher's loss through the decoder."""
    monkeypatch.setitem(pointing.config, "straight", 0.0)
    monkeypatch.setitem(pointing.config, "longest", 9)
    rng = np.random.default_rng(1)
    pointing.begin(rng)
    pointing.length[:] = 9
    begun = pointing.weights.detach().clone()
    reported = [pointing.step(rng)[1]["objective"] for _ in range(2)]
    reasoner, lesson, scenes = pointing.reasoner, pointing.lesson, pointing.scenes
    objectives = []
    for row, which in enumerate(pointing.which.tolist()):
        add_lora(reasoner.transformer, 2, seed=0, fused=False)
        parameters = list(lora_parameters(reasoner.transformer))
        for parameter, values in zip(parameters, begun[row].split(pointing.loras.sizes), strict=True):
            parameter.data = values.view(parameter.shape).clone()
        optimizer = torch.optim.AdamW(parameters, lr=1e-3, weight_decay=0)
        condition = replace(
            reasoner.encode("x", None, 13, 64, 64),
            prompt_embeds=scenes.prompts[which : which + 1],
            first_frame=scenes.first[which : which + 1],
        )
        for _ in range(2):
            z = reasoner.predict_clean_at(condition, pointing.noise[row : row + 1], 1.0)
            frames = pointing.decoder.decode(z)[lesson.indices]
            loss = vqa_objective(-lesson.read(frames[None], [scenes.questions[which]], backend="sdpa").yes[0])
            objectives.append(loss.item())
            gradients = torch.autograd.grad(loss, parameters)
            for parameter, gradient in zip(parameters, gradients, strict=True):
                parameter.grad = gradient
            torch.nn.utils.clip_grad_norm_(parameters, GRADIENT_CLIP)
            optimizer.step()
        mine, alone = pointing.weights[row], torch.cat([p.detach().flatten() for p in parameters])
        remove_lora(reasoner.transformer)
        # Adam's first steps are the signs of the gradient, whose tiny entries are rounding.
        assert (mine - alone).abs().mean() < 0.03 * (begun[row] - alone).abs().mean()
    for step, told in enumerate(reported):
        assert told == pytest.approx(np.mean(objectives[step::2]), rel=1e-4)


def test_rows_of_adam_are_torchs():
    generator = torch.Generator().manual_seed(0)
    start, gradients = torch.randn(2, 5, generator=generator), 3 * torch.randn(4, 2, 5, generator=generator)
    mine = start.clone()
    rows = RowAdam(mine, 0.1)
    parameters = [row.clone() for row in start]
    optimizers = [torch.optim.AdamW([p], lr=0.1, weight_decay=0) for p in parameters]
    for step, gradient in enumerate(gradients):
        if step == 2:  # the second begins anew
            mine[1] = parameters[1] = torch.ones(5)
            rows.clear(torch.tensor([1]))
            optimizers[1] = torch.optim.AdamW([parameters[1]], lr=0.1, weight_decay=0)
        rows.step(gradient)
        for p, g, optimizer in zip(parameters, gradient, optimizers, strict=True):
            p.grad = g.clone()
            torch.nn.utils.clip_grad_norm_(p, GRADIENT_CLIP)
            optimizer.step()
        torch.testing.assert_close(mine, torch.stack(parameters), atol=1e-5, rtol=1e-4)


def test_yes_too_early_costs(pointing, monkeypatch):
    """As far from the right video as at first, the objective is to be 2.5 times what is left of the way."""
    monkeypatch.setitem(pointing.config, "weight", 0.0)
    bias = torch.zeros((), requires_grad=True)
    answers = pointing.lesson.read

    def sure(*args, **kwargs):
        reading = answers(*args, **kwargs)
        return Reading(**vars(reading) | {"yes": reading.yes * 0 + bias})

    monkeypatch.setattr(pointing.lesson, "read", sure)
    loss, told, _ = pointing.step(np.random.default_rng(0))
    flawed = pointing.scenes.flawed[pointing.which].float().mean().item()
    assert flawed > 0
    assert told["early"] == pytest.approx(1.5 * flawed) and loss.item() == pytest.approx(0.5 * 1.5 * flawed)
    (gradient,) = torch.autograd.grad(loss, bias)
    assert gradient > 0  # the answers' likelihood is to fall


def test_a_change_of_latents_is_carried_into_frames(pointing):
    latents = pointing.scenes.right[:2]
    direction = 1e-9 * torch.randn(latents.shape, generator=torch.Generator().manual_seed(0))

    def decode(z: torch.Tensor) -> torch.Tensor:
        return pointing.decoder.decode_batch(z)[:, pointing.lesson.indices]

    exact = torch.autograd.functional.jvp(decode, latents, direction)[1]
    assert (pointing.pushed_forward(latents, direction) - exact).norm() < 1e-3 * exact.norm()


@pytest.mark.slow
def test_optimisations_end_and_others_begin(pointing):
    rng = np.random.default_rng(0)
    pointing.step(rng)
    begun = pointing.noise.clone()
    assert (pointing.updates == 1).all() and ((pointing.length >= 1) & (pointing.length <= 3)).all()
    for _ in range(OPTIMISATIONS["longest"]):
        pointing.step(rng)
    assert (pointing.updates <= 3).all() and (pointing.noise != begun).flatten(1).any(1).all()


def test_scenes_are_drawn_as_told(pointing):
    scenes = pointing.scenes
    assert len(scenes.scenes) == len(scenes.prompts) == len(scenes.first) == len(scenes.right) == 4
    assert all(scene.family != "connect" for scene in scenes.scenes)
    assert scenes.first.shape[2] == 1 and (scenes.flawed | scenes.outside).all()
    assert all(asked[0].endswith("?") for asked in scenes.questions)


def test_predictions_are_labelled(pointing):
    config = {"seed": 0, "batch": 3, "outside": 0.5, "faded": 0.5, "questions": 4}
    shown = draw_rows(config, 0)
    assert shown.videos.shape == (3, 13, 64, 64, 3) and shown.yes.shape == (3, 4)
    frames = shown.frames(torch.device("cpu"))
    assert frames.shape == (3, 13, 3, 64, 64) and frames.max() <= 1
    scenes = pointing.scenes.scenes
    right = pointing.decoder.decode_batch(pointing.scenes.right)
    videos = (right * 255).round().byte().permute(0, 1, 3, 4, 2).numpy()
    labelled, share = label_rows(config, 0, videos, scenes)
    still, none = label_rows(config, 0, videos[:, :1].repeat(13, 1), scenes)
    assert share > 0.5 and none == 0
    assert labelled.yes.mean() > still.yes.mean()
