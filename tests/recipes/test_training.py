"""The training stages: resumable, exact where they shortcut, and on the real classes."""

import json
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from recipes.microworld import decoder as decoder_stage
from recipes.microworld import stages, training
from recipes.microworld import vae as vae_stage
from recipes.microworld.attention import fast_attention
from recipes.microworld.clips import random_clip, to_video
from recipes.microworld.shards import Shard, load
from recipes.microworld.teacher import data, model
from recipes.microworld.teacher.lesson import Lesson
from recipes.microworld.training import Run, train
from vlmteacher.distillation.trainer import STATE
from vlmteacher.errors import InputError
from vlmteacher.microworld import world
from vlmteacher.microworld.facts import facts_of
from vlmteacher.microworld.questions import ask
from vlmteacher.microworld.tokenizer import build_tokenizer
from vlmteacher.queries import QuerySet

TINY_TEACHER = {"width": 32, "layers": 3, "mlp": 48, "vision_layers": 2, "vision_mlp": 48, "answer_weight": 1.0}


def fit(out, stop_at: int | None = None, until=None, continues=None, **changes) -> torch.Tensor:
    torch.manual_seed(0)
    model = nn.Linear(3, 1)

    def step(index, rng):
        if index == stop_at:
            raise KeyboardInterrupt
        x = torch.from_numpy(rng.normal(size=(8, 3))).float()
        loss = (model(x)[:, 0] - x.sum(1)).square().mean()
        return loss, {"double": 2 * float(loss.detach())}

    config = {"steps": 30, "learning_rate": 0.05, "seed": 1} | changes
    run = Run(out.parent, out, config, until=until, continues=continues)
    train({"model": model}, step, run, save_every=5, log_every=10, ema=0.9)
    return model.weight.detach().clone()


def test_interrupted_training_resumes_to_the_same_weights(tmp_path):
    whole = fit(tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        fit(tmp_path / "cut", stop_at=17)
    assert torch.equal(fit(tmp_path / "cut"), whole)
    rows = [json.loads(line) for line in (tmp_path / "whole" / "log.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [10, 20, 30]
    assert rows[-1]["loss"] < rows[0]["loss"]


def test_a_run_continues_another(tmp_path):
    """One that was stopped amid its schedule goes on to what it would have been; or with another seed elsewhere."""
    whole, half = fit(tmp_path / "whole"), fit(tmp_path / "half", until=12)
    same = fit(tmp_path / "same", continues=tmp_path / "half")
    assert torch.equal(same, whole) and not torch.equal(half, whole)
    assert not torch.equal(fit(tmp_path / "other", continues=tmp_path / "half", seed=2), whole)
    with pytest.raises(InputError, match=r"trained with other settings: seed \(1, now 2\)"):
        fit(tmp_path / "half", seed=2)


def test_the_state_of_an_earlier_release_resumes(tmp_path):
    """Stages had a loop of their own, with one optimizer and the state in another place."""
    whole = fit(tmp_path / "whole")
    fit(tmp_path / "old", until=12)
    state = torch.load(tmp_path / "old" / STATE, weights_only=True)
    state["optimizer"] = state.pop("optimizers")["adamw"]
    shutil.rmtree((tmp_path / "old" / STATE).parent)
    torch.save(state | {"form": training.EARLIER_FORM}, tmp_path / "old/state.pt")
    assert torch.equal(fit(tmp_path / "old"), whole)
    assert not (tmp_path / "old/state.pt").exists()


@pytest.fixture(scope="module")
def lesson(tmp_path_factory):
    torch.manual_seed(0)
    vocabulary = tmp_path_factory.mktemp("teacher") / "tokenizer"
    return Lesson(model.build(TINY_TEACHER, vocabulary), TINY_TEACHER)


def test_the_vocabulary_is_kept(tmp_path, monkeypatch):
    first = model.build(TINY_TEACHER, tmp_path / "tokenizer").tokenizer.get_vocab()
    monkeypatch.setattr(model, "corpus", lambda: ["a world that has changed since"])
    assert model.build(TINY_TEACHER, tmp_path / "tokenizer").tokenizer.get_vocab() == first


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
    torch.manual_seed(0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(lesson.config, "adversary", 0.02)
        other = lesson.perturb(shown)
    misleading = other.frames
    change = (misleading - shown.frames).abs()
    assert 0 < change.max() <= 0.02 + 1e-6 and misleading.min() >= 0 and misleading.max() <= 1
    losses = []
    for seen in (shown, other):
        lesson.judge(seen)
        losses.append(lesson.answer_loss.item())
    assert losses[1] > losses[0] and not misleading.requires_grad


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


def test_a_batch_is_of_what_is_to_be_learnt():
    rng = np.random.default_rng(0)
    rows = []
    for family in ("move", "count"):
        for outside in (0.0, 1.0):
            _, scene, facts = data.rendered(rng, outside, [family])
            rows.append((np.zeros((world.NUM_FRAMES, world.SIZE, world.SIZE, 3), np.uint8), scene, facts))
    for families, outside, count in ((["move"], 0.0, 1), (["move", "count"], 1.0, 2), (["count"], 0.5, 2)):
        source = data.Source({"optimised": rows, "lessons": []}, families, outside)
        assert len(source.groups["optimised"]) == count
        drawn = [source.draw(rng, {"optimised": 2, "lessons": 1}, 4) for _ in range(8)]
        splits = {world.split_of(scene) for batch in drawn for _, scene, _ in batch}
        assert all(len(batch) == 4 for batch in drawn)
        assert {scene.family for batch in drawn for _, scene, _ in batch} == set(families)
        assert ("ood" in splits, splits - {"ood"} != set()) == (outside > 0, outside < 1)


@pytest.mark.parametrize("family", world.FAMILIES)
def test_a_faded_video_and_its_answers_go_to_the_right_ones(family):
    rng = np.random.default_rng(0)
    scene = world.sample_scene(rng, family)
    track = [scene.things] * world.NUM_FRAMES  # nothing happens: the goal is missed
    row = world.draw(track), scene, facts_of(scene, track)
    ends = [data.fade(row, way, rng) for way in (0.0, 0.5, 1.0)]
    frames, asked, yes = zip(*ends, strict=True)
    assert np.array_equal(frames[0], row[0]) and np.abs(frames[2] - world.render(scene)).mean() < 0.05
    assert (
        yes[0] == [float(q.answer) for q in asked[0]] and yes[0][0] == 0 and yes[1][0] == pytest.approx(0.5 * 0.5 / 0.9)
    )
    assert yes[2] == [1.0] * 4 and len({tuple(q.text for q in questions) for questions in asked}) == 1


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


def test_collected_shard_comes_back(tmp_path):
    rng = np.random.default_rng(3)
    shard = Shard()
    scene, track = data.draw_track(rng)
    frames = world.draw(track)
    shard.add(frames, scene, facts_of(scene, track))
    shard.add(frames, scene)
    shard.save(tmp_path / "a.pt")
    (video, again, facts), (_, _, labelled) = load([tmp_path / "a.pt"])
    assert again == scene and video.shape == frames.shape
    np.testing.assert_allclose(video / 255, frames, atol=0.003)
    for name, value in vars(facts_of(scene, track)).items():
        np.testing.assert_array_equal(getattr(facts, name), value)
    for found in (facts, labelled):
        assert found.changed.shape == (world.NUM_FRAMES, 16)
        assert found.changed.any() == (not found.intact.all())


def test_autoencoder_and_surrogate_fit_together():
    vae = vae_stage.build(8).eval()
    x = to_video(random_clip(np.random.default_rng(5), world.NUM_FRAMES)[None])
    with torch.no_grad():
        latents = vae.encode(x).latent_dist.mode()
        assert latents.shape == (1, 24, 4, 8, 8)
        torch.testing.assert_close(vae_stage.decode_unclamped(vae, latents).clamp(-1, 1), vae.decode(latents).sample)
        decoder = decoder_stage.build([16, 8, 8, 8])
        assert decoder.decode_batch(latents).shape == (1, world.NUM_FRAMES, 3, world.SIZE, world.SIZE)


def test_every_word_that_names_a_thing_is_one_token(lesson):
    rng = np.random.default_rng(4)
    for family in world.FAMILIES:
        scene = world.sample_scene(rng, family)
        for question in ask(scene, facts_of(scene, world.perform(scene)), rng, 12):
            ids = lesson.teacher.tokenizer(question.text, add_special_tokens=False).input_ids
            assert sum(i in lesson.color_ids for i in ids) == len(question.names), question.text
            assert ids.count(lesson.mark) == 1


def test_known_weights_are_adopted_token_by_token():
    tokenizers = [build_tokenizer([text], 300) for text in ("the red red ball", "a red blue box the ball")]
    new, old = nn.Embedding(len(tokenizers[0]), 4), nn.Embedding(len(tokenizers[1]), 4)
    before = new.weight.detach().clone()
    training.adopt(new, old, *tokenizers)
    vocabularies = [tokenizer.get_vocab() for tokenizer in tokenizers]
    assert vocabularies[0] != vocabularies[1]
    for token, index in vocabularies[0].items():
        same = old.weight[vocabularies[1][token]] if token in vocabularies[1] else before[index]
        assert torch.equal(new.weight[index], same), token
    with pytest.raises(InputError, match="no fitting weight"):
        training.adopt(nn.Linear(2, 3), nn.Linear(2, 4))


def test_a_stage_says_what_it_starts_from(tmp_path):
    with pytest.raises(InputError, match=r"no pair\.json"):
        stages.run("vae", tmp_path, tmp_path)
    (tmp_path / "pair.json").touch()
    with pytest.raises(InputError, match="starts from no other weights"):
        stages.run("latents", tmp_path, tmp_path)


def test_a_stage_says_where_it_works(tmp_path, monkeypatch):
    with pytest.raises(InputError, match="stage vae is for the CPU: leave out --device cuda"):
        stages.run("vae", tmp_path, device="cuda")
    monkeypatch.setitem(stages.STAGES, "teacher-point", replace(stages.STAGES["teacher-point"], needs=(), start=None))
    with pytest.raises(InputError, match="--device abc cannot be used here"):
        stages.run("teacher-point", tmp_path, device="abc")


def test_a_stage_says_what_it_needs(tmp_path):
    with pytest.raises(InputError, match="stage reasoner needs"):
        stages.run("reasoner", tmp_path)


def test_our_attention_stands_in_for_torchs():
    stock = F.scaled_dot_product_attention
    q, k, v = (torch.randn(2, 3, 7, 8, requires_grad=True) for _ in range(3))
    found = []
    for mask in (None, torch.rand(7, 7) > 0.3):
        expected = stock(q, k, v, mask)
        with fast_attention():
            given = F.scaled_dot_product_attention(query=q, key=k, value=v, attn_mask=mask)
        torch.testing.assert_close(given, expected, rtol=1e-4, atol=1e-5)
        found.append(given.grad_fn.name() == expected.grad_fn.name())
    assert found == [False, True] and F.scaled_dot_product_attention is stock
    with fast_attention(), torch.autocast("cpu", torch.bfloat16):
        assert F.scaled_dot_product_attention(q, k, v).dtype == torch.bfloat16
