"""The losses of a training step: equal to the Teacher's own, and what they reward."""

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from recipes.microworld.teacher import data, model
from recipes.microworld.teacher.lesson import Lesson
from recipes.microworld.teacher.train import pretrain
from recipes.microworld.training import Run, load_config
from vlmteacher.microworld import world
from vlmteacher.microworld.facts import facts_of
from vlmteacher.microworld.questions import ask
from vlmteacher.queries import QuerySet

TINY_TEACHER = {"width": 32, "layers": 3, "mlp": 48, "vision_layers": 2, "vision_mlp": 48, "answer_weight": 1.0}


@pytest.fixture(scope="module")
def lesson(tmp_path_factory):
    torch.manual_seed(0)
    vocabulary = tmp_path_factory.mktemp("teacher") / "tokenizer"
    return Lesson(model.build(TINY_TEACHER, vocabulary), TINY_TEACHER)


def test_the_vocabulary_is_kept(tmp_path, monkeypatch):
    first = model.build(TINY_TEACHER, tmp_path / "tokenizer").tokenizer.get_vocab()
    monkeypatch.setattr(model, "corpus", lambda: ["a world that has changed since"])
    assert model.build(TINY_TEACHER, tmp_path / "tokenizer").tokenizer.get_vocab() == first


def test_every_word_that_names_a_thing_is_one_token(lesson):
    rng = np.random.default_rng(4)
    for family in world.FAMILIES:
        scene = world.sample_scene(rng, family)
        for question in ask(scene, facts_of(scene, world.perform(scene)), rng, 12):
            ids = lesson.teacher.tokenizer(question.text, add_special_tokens=False).input_ids
            assert sum(i in lesson.color_ids for i in ids) == len(question.names), question.text
            assert ids.count(lesson.mark) == 1


def test_packed_questions_equal_the_teachers_own_losses(lesson):
    rng = np.random.default_rng(0)
    drawn = [data.rendered(rng) for _ in range(3)]
    asked = [ask(scene, facts, rng) for _, scene, facts in drawn]
    shown = data.Batch.of(drawn, asked)
    logits = []
    hook = lesson.teacher.model.lm_head.register_forward_hook(lambda module, args, output: logits.append(output))
    loss, report = lesson.judge(shown)
    hook.remove()
    loss.backward()
    assert {"changed", "l_states", "actor_look", "holds", "yes"} <= report.keys()
    packed = -logits[0].float().log_softmax(-1)[..., lesson.yes]
    for row, questions, expected in zip(shown.frames, asked, packed, strict=True):
        texts = [question.text for question in questions]
        seen = row[lesson.indices]
        with torch.no_grad():
            losses = lesson.teacher.losses(seen, lesson.indices, world.FPS, QuerySet(texts[0], tuple(texts[1:])))
        torch.testing.assert_close(losses, expected, rtol=1e-4, atol=1e-4)


def test_misleading_frames_are_near_and_cost_more(lesson):
    rng = np.random.default_rng(0)
    rows = [data.rendered(rng) for _ in range(3)]
    shown = data.Batch.of(rows, [ask(scene, facts, rng) for _, scene, facts in rows])
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(lesson.config, "adversary", 0.02)
        other = lesson.perturb(shown, rng)
    misleading = other.frames
    change = (misleading - shown.frames).abs()
    assert 0 < change.max() <= 0.02 + 1e-6 and misleading.min() >= 0 and misleading.max() <= 1
    losses = []
    for seen in (shown, other):
        lesson.judge(seen)
        losses.append(lesson.answer_loss.item())
    assert losses[1] > losses[0] and not misleading.requires_grad


def test_an_interrupted_training_with_misleading_frames_resumes_to_the_same_weights(tmp_path):
    config = load_config("teacher") | TINY_TEACHER | {"batch": 1, "steps": 3, "adversary": 0.1, "write_every": 0}
    for name, stops in (("whole", [None]), ("parts", [1, None])):
        for until in stops:
            torch.manual_seed(len(name))  # whatever the process drew before
            pretrain(Run(tmp_path, tmp_path / name, config, until=until))
    whole, parts = (load_file(tmp_path / name / "teacher/model.safetensors") for name in ("whole", "parts"))
    assert all(torch.equal(whole[name], parts[name]) for name in whole)


def test_keeping_a_teacher_costs_nothing_until_it_is_another(lesson, tmp_path):
    """Neither the answers nor their gradients at the frames; and the cost's own gradient is that of differences."""
    config = lesson.config | {"keep": 2.0}
    mine = Lesson(model.build(TINY_TEACHER, tmp_path / "tokenizer"), config)
    mine.teacher.model.load_state_dict(lesson.teacher.model.state_dict())
    rng = np.random.default_rng(0)
    rows = [data.rendered(rng) for _ in range(2)]
    shown = data.Batch.of(rows, [ask(scene, facts, rng, 4) for _, scene, facts in rows])
    loss, told = mine.keep(shown, lesson)
    assert abs(loss.item()) < 1e-5 and told["kept_cosine"] == pytest.approx(1.0, abs=1e-5)
    parameters = list(mine.teacher.model.parameters())

    def move(size: float) -> None:
        with torch.no_grad():
            for parameter, way in zip(parameters, ways, strict=True):
                parameter += size * way

    torch.manual_seed(0)
    ways = [torch.randn_like(p) * p.std().nan_to_num() for p in parameters]
    move(0.1)
    loss, told = mine.keep(shown, lesson)
    assert told["kept_cosine"] < 0.99 and told["kept_answers"] > 0
    gradients = torch.autograd.grad(loss, parameters, allow_unused=True, materialize_grads=True)
    norm = torch.cat([g.flatten() for g in gradients]).norm()
    ways = [g / norm for g in gradients]
    costs = []
    for size in (1e-3, -2e-3):
        move(size)
        costs.append(mine.keep(shown, lesson)[0].item())
    assert (costs[0] - costs[1]) / 2e-3 == pytest.approx(norm.item(), rel=0.03)


def test_the_loss_of_a_right_video_does_not_change_as_it_is_faded(lesson):
    """What is faded over into itself stays as it is, and so do its answers."""
    rng = np.random.default_rng(0)
    scene = world.sample_scene(rng, "maze")
    track = world.perform(scene)
    row = world.draw(track), scene, facts_of(scene, track)
    losses = []
    for yes in (torch.ones(1, 4), torch.zeros(1, 4)):
        lesson.judge(data.Batch.of([row], [data.fade(row, 1.0, rng)[1]], yes))
        losses.append(lesson.answer_loss.item())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(data, "distort", lambda frames, rng: frames)
        lesson.judge(data.blend([row], rng))
        assert lesson.answer_loss.item() == pytest.approx(losses[0], rel=1e-5) != losses[1]


def test_writing_lesson_is_what_the_teacher_would_be_asked(lesson):
    scene = world.sample_scene(np.random.default_rng(1))
    loss = lesson.write([scene], np.random.default_rng(1))
    assert torch.isfinite(loss) and float(loss) > 1
