"""The training stages: resumable, exact where they shortcut, and on the real classes."""

import json

import numpy as np
import pytest
import torch
from torch import nn

from vlmteacher.errors import InputError
from vlmteacher.microworld import corruptions, stages, train_decoder, train_teacher, train_vae, world
from vlmteacher.microworld.collect import Shard, load
from vlmteacher.microworld.facts import PROCESS, answer, ask, facts_of, right_queries
from vlmteacher.microworld.training import random_clip, to_video, train
from vlmteacher.queries import QuerySet

TINY_TEACHER = {"width": 32, "layers": 2, "mlp": 48, "vision_layers": 2, "vision_mlp": 48, "answer_weight": 1.0}


def fit(out, stop_at: int | None = None) -> torch.Tensor:
    torch.manual_seed(0)
    model = nn.Linear(3, 1)

    def step(index, rng):
        if index == stop_at:
            raise KeyboardInterrupt
        x = torch.from_numpy(rng.normal(size=(8, 3))).float()
        loss = (model(x)[:, 0] - x.sum(1)).square().mean()
        return loss, {"double": 2 * float(loss.detach())}

    train({"model": model}, step, out, steps=30, learning_rate=0.05, seed=1, save_every=5, log_every=10, ema=0.9)
    return model.weight.detach().clone()


def test_interrupted_training_resumes_to_the_same_weights(tmp_path):
    whole = fit(tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        fit(tmp_path / "cut", stop_at=17)
    assert torch.equal(fit(tmp_path / "cut"), whole)
    rows = [json.loads(line) for line in (tmp_path / "whole" / "log.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [10, 20, 30]
    assert rows[-1]["loss"] < rows[0]["loss"]


@pytest.fixture(scope="module")
def lesson():
    torch.manual_seed(0)
    return train_teacher.Lesson(train_teacher.build(TINY_TEACHER), TINY_TEACHER)


def test_packed_questions_equal_the_teachers_own_losses(lesson):
    rng = np.random.default_rng(0)
    drawn = [train_teacher.lesson(rng) for _ in range(2)]
    frames = torch.from_numpy(np.stack([d[0] for d in drawn])).permute(0, 1, 4, 2, 3)
    asked = [ask(scene, facts, rng) for _, scene, facts in drawn]
    logits = []
    hook = lesson.teacher.model.lm_head.register_forward_hook(lambda module, args, output: logits.append(output))
    loss, report = lesson.judge(frames, [d[1] for d in drawn], [d[2] for d in drawn], asked)
    hook.remove()
    loss.backward()
    assert {"changed", "l_position", "box_word"} <= report.keys()
    packed = -logits[0].float().log_softmax(-1)[..., lesson.yes]
    for row, questions, expected in zip(frames, asked, packed, strict=True):
        texts = [text for text, _ in questions]
        seen = row[lesson.indices]
        with torch.no_grad():
            losses = lesson.teacher.losses(seen, lesson.indices, world.FPS, QuerySet(texts[0], tuple(texts[1:])))
        torch.testing.assert_close(losses, expected, rtol=1e-4, atol=1e-4)


def test_writing_lesson_is_what_the_teacher_would_be_asked(lesson):
    scene = world.sample_scene(np.random.default_rng(1))
    loss = lesson.write([scene], np.random.default_rng(1))
    assert torch.isfinite(loss) and float(loss) > 1


def test_answers_follow_from_state():
    rng = np.random.default_rng(2)
    wrong = {"half_finished": "goal", "vanish": "one", "teleport": None, "eroded_scenery": "scenery"}
    for family in world.PACKAGED:
        scene = world.sample_scene(rng, family)
        names = {"ball": scene.ball_color, "box": scene.target.color}
        right = facts_of(scene, world.perform(scene))
        assert all(answer(kind, right, **names) for kind in ("goal", "one", "smooth", "avoid", "scenery"))
        assert not right.changed.any()
        for kind, question in wrong.items():
            facts = facts_of(scene, corruptions.CORRUPTIONS[kind](scene, rng))
            broken = {q for q in ("goal", "one", "smooth", "avoid", "scenery") if not answer(q, facts, **names)}
            assert broken if question is None else question in broken, kind
        assert len(right_queries(scene).process) == len(PROCESS[family])


def test_collected_shard_comes_back(tmp_path):
    rng = np.random.default_rng(3)
    shard = Shard()
    scene, track = train_teacher.draw_track(rng)
    frames = world.draw(track)
    shard.add(frames, scene, facts_of(scene, track))
    shard.add(frames, scene)
    shard.save(tmp_path / "a.pt")
    (video, again, facts), (_, _, labelled) = load([tmp_path / "a.pt"])
    assert again == scene and video.shape == frames.shape
    np.testing.assert_allclose(video / 255, frames, atol=0.003)
    np.testing.assert_array_equal(facts.count, facts_of(scene, track).count)
    for found in (facts, labelled):
        assert found.changed.shape == (world.NUM_FRAMES, 16)
        assert found.changed.any() == (not found.intact.all())


def test_autoencoder_and_surrogate_fit_together():
    vae = train_vae.build(8).eval()
    x = to_video(random_clip(np.random.default_rng(5), world.NUM_FRAMES)[None])
    with torch.no_grad():
        latents = vae.encode(x).latent_dist.mode()
        assert latents.shape == (1, 24, 4, 8, 8)
        torch.testing.assert_close(train_vae.decode_unclamped(vae, latents).clamp(-1, 1), vae.decode(latents).sample)
        decoder = train_decoder.build([16, 8, 8, 8])
        assert decoder.decode_batch(latents).shape == (1, world.NUM_FRAMES, 3, world.SIZE, world.SIZE)


def test_a_stage_says_what_it_needs(tmp_path):
    with pytest.raises(InputError, match="stage reasoner needs"):
        stages.run("reasoner", tmp_path)
