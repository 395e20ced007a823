"""Compares every family with one unchanged stock pass per question: small random models, odd frame counts, sizes."""

import functools
import json
import shutil

import pytest
import torch
import torch.nn.functional as F
import transformers
from transformers import AutoTokenizer

from tests.tiny_teacher import (
    CORPUS,
    EXPERTS,
    tiny_glm4v,
    tiny_glm4v_moe,
    tiny_internvl,
    tiny_qwen3_5,
    tiny_qwen3_5_moe,
    tiny_qwen3_vl,
    tiny_qwen3_vl_moe,
    tiny_qwen25_vl,
    tiny_smolvlm,
)
from vlmteacher.errors import InputError, NonFiniteFrames
from vlmteacher.ops.patchify import PatchLayout, PatchRows
from vlmteacher.planning.models import KNOWN
from vlmteacher.queries import QuerySet
from vlmteacher.teachers import base, load_teacher, vlm
from vlmteacher.teachers.preprocessing import preprocess_video
from vlmteacher.teachers.prompt import shared_length

QUESTIONS = (
    "Is the red ball on the square?",
    "Is it?",
    "Does the ball go around all of the blocked cells, from the first frame to the last one?",
    "Red?",
    "Is the red ball on the red square?",
    "Is the red ball on the square?",
    "Does it move slowly?",
    "Is there one ball in every frame of the video?",
)
FPS = 8.0


def qwen3_inputs(settings, frames, indices):
    pixels, grid = preprocess_video(frames, settings)
    indices = [*indices, indices[-1]] if len(indices) % 2 else list(indices)
    pads = "<|video_pad|>" * int(grid[0, 1:].prod() // 4)
    times = [(a + b) / 2 / FPS for a, b in zip(indices[::2], indices[1::2], strict=True)]
    text = "".join(f"<{time:.1f} seconds><|vision_start|>{pads}<|vision_end|>" for time in times)
    return text, {"pixel_values_videos": pixels, "video_grid_thw": grid}


def patch_rows(frames, mean, std, patch):
    """Patch rows by hand: (pixels - mean) / std, the last frame repeated, the patches of a 2x2 block adjacent."""
    frames = (frames - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1)
    frames = torch.cat([frames, frames[-1:]]) if len(frames) % 2 else frames
    t, _, h, w = frames.shape
    x = frames.view(t // 2, 2, 3, h // patch // 2, 2, patch, w // patch // 2, 2, patch)
    grid = torch.tensor([[t // 2, h // patch, w // patch]])
    return x.permute(0, 3, 6, 4, 7, 2, 1, 5, 8).reshape(int(grid.prod()), -1), grid


def qwen25_inputs(settings, frames, indices):
    rows, grid = patch_rows(frames, (0.4, 0.5, 0.6), (0.5, 0.5, 0.5), 8)
    text = "<|vision_start|>" + "<|video_pad|>" * int(grid.prod() // 4) + "<|vision_end|>"
    seconds = 2 * (indices[1] - indices[0]) / FPS if len(indices) > 1 else 2 / FPS
    return text, {"pixel_values_videos": rows, "video_grid_thw": grid, "second_per_grid_ts": torch.tensor([seconds])}


def internvl_inputs(settings, frames, indices):
    frames = F.interpolate(frames, (32, 32), mode="bicubic", align_corners=False, antialias=True)
    mean, std = (torch.tensor(x).view(3, 1, 1) for x in ((0.4, 0.5, 0.6), (0.2, 0.3, 0.25)))
    text = "\n".join(f"Frame{i + 1}: <img>{'<IMG_CONTEXT>' * 4}</img>" for i in range(len(frames))) + "\n"
    return text, {"pixel_values": (frames - mean) / std}


def smolvlm_inputs(settings, frames, indices):
    height, width = frames.shape[-2:]
    short = min(height, width) * 32 // max(height, width)
    first = tuple(32 if side == max(height, width) else short + short % 2 for side in (height, width))
    for size in (first, (32, 32)):
        frames = F.interpolate(frames, size, mode="lanczos", align_corners=False, antialias=True)
    mean, std = (torch.tensor(x).view(3, 1, 1) for x in ((0.4, 0.5, 0.6), (0.2, 0.3, 0.25)))
    image = "<fake_token_around_image><global-img>" + "<image>" * 4 + "<fake_token_around_image>"
    words = ["zero", "one", "two", "three", "four", "five", "six", "seven"]
    text = f"You are provided the following series of {words[len(frames)]} frames from a "
    text += f"0:00:{indices[-1] // FPS:02.0f} [H:MM:SS] video.\n"
    text += "".join(f"\nFrame from 00:{i // FPS:02.0f}:{image}" for i in indices)
    return text + "\n\n", {"pixel_values": ((frames - mean) / std)[None]}


def glm_inputs(settings, frames, indices):
    pixels, grid = patch_rows(frames, (0.4, 0.5, 0.6), (0.5, 0.5, 0.5), 8)
    image = "<|begin_of_image|>" + "<|image|>" * int(grid[0, 1:].prod() // 4) + "<|end_of_image|>"
    text = "".join(f"{image}{i // FPS:.0f}" for i in indices[::2])
    return text, {"pixel_values_videos": pixels, "video_grid_thw": grid}


FAMILIES = {
    "qwen3_vl": (tiny_qwen3_vl, qwen3_inputs),
    "qwen3_vl_moe": (tiny_qwen3_vl_moe, qwen3_inputs),
    "qwen3_5": (tiny_qwen3_5, qwen3_inputs),
    "qwen3_5_moe": (tiny_qwen3_5_moe, qwen3_inputs),
    "qwen2_5_vl": (tiny_qwen25_vl, qwen25_inputs),
    "internvl": (tiny_internvl, internvl_inputs),
    "glm4v": (tiny_glm4v, glm_inputs),
    "glm4v_moe": (tiny_glm4v_moe, glm_inputs),
    "smolvlm": (tiny_smolvlm, smolvlm_inputs),
}
# the chat of one question by hand
CHAT = "<|im_start|>user\n{video}{question} Answer Yes or No.<|im_end|>\n<|im_start|>assistant\n"
GLM = "[gMASK]<sop><|user|>\n<|begin_of_video|>{video}<|end_of_video|>{question} Answer Yes or No.<|assistant|>\n"
CHATS = {
    "qwen3_5": CHAT + "<think>\n\n</think>\n\n",  # a thought of nothing
    "qwen3_5_moe": CHAT + "<think>\n\n</think>\n\n",
    "glm4v": GLM + "<think></think><answer><|begin_of_box|>",
    "glm4v_moe": GLM + "<think></think>\n<|begin_of_box|>",
    "smolvlm": "<|im_start|>User: {video}{question} Answer Yes or No.<end_of_utterance>\nAssistant: ",
}


def qwen_picture(picture, settings, inputs):
    """The text of a picture before the video, and the inputs with it."""
    rows, grid = patch_rows(picture[None], settings.image_mean, settings.image_std, 8)
    text = "<|vision_start|>" + "<|image_pad|>" * int(grid.prod() // 4) + "<|vision_end|>"
    return text, inputs | {"pixel_values": rows, "image_grid_thw": grid}


def internvl_picture(picture, settings, inputs):
    _, own = internvl_inputs(settings, picture[None], [0])
    pixels = torch.cat([own["pixel_values"], inputs["pixel_values"]])
    return f"<img>{'<IMG_CONTEXT>' * 4}</img>\n", {"pixel_values": pixels}


def smolvlm_picture(picture, settings, inputs):
    text, own = smolvlm_inputs(settings, picture[None], [0])
    pixels = torch.cat([own["pixel_values"], inputs["pixel_values"]], 1)
    return text.partition("00:00:")[2].strip(), {"pixel_values": pixels}


PICTURES = {"internvl": internvl_picture, "smolvlm": smolvlm_picture}  # of the families that are no Qwen-VL
# another shape for each, so that no test passes by coincidence: (text config, vision config)
OTHERS = {
    "qwen3_vl": (
        {"num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 4, "tie_word_embeddings": False},
        {"depth": 3, "num_heads": 4, "intermediate_size": 80, "deepstack_visual_indexes": [1]},
    ),
    "qwen3_vl_moe": (
        {"num_experts": 7, "num_experts_per_tok": 3, "mlp_only_layers": [1], "num_key_value_heads": 2},
        {"depth": 3, "num_heads": 4, "deepstack_visual_indexes": [1]},
    ),
    "qwen3_5": (  # its last layer recurs, its convolution is short, keys are wider than values
        {
            "layer_types": ["full_attention", *3 * ["linear_attention"], "full_attention", "linear_attention"],
            "num_hidden_layers": 6,
            "num_key_value_heads": 2,
            "linear_conv_kernel_dim": 2,
            "linear_key_head_dim": 16,
            "linear_num_key_heads": 3,
            "linear_num_value_heads": 3,
        },
        {"depth": 3, "num_heads": 4, "intermediate_size": 80},
    ),
    "qwen3_5_moe": (
        {"num_hidden_layers": 3, "full_attention_interval": 3, "num_experts": 5, "num_experts_per_tok": 1},
        {"depth": 1},
    ),
    "qwen2_5_vl": (
        {"num_hidden_layers": 4, "hidden_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2},
        {"depth": 3, "hidden_size": 48, "num_heads": 3, "out_hidden_size": 64, "fullatt_block_indexes": [0, 2]},
    ),
    "internvl": (
        {"model_type": "qwen3", "head_dim": 16, "num_hidden_layers": 4, "hidden_size": 48},
        {"use_qk_norm": True, "norm_type": "rms_norm", "attention_bias": True, "use_mean_pooling": False},
    ),
    "glm4v": (
        {"num_hidden_layers": 2, "hidden_size": 48, "num_attention_heads": 3, "num_key_value_heads": 3},
        {"depth": 3, "hidden_size": 48, "num_heads": 3, "out_hidden_size": 48, "image_size": 40},
    ),
    "glm4v_moe": (
        {"num_hidden_layers": 4, "hidden_size": 48, "first_k_dense_replace": 2, "n_shared_experts": 2, "n_group": 2},
        {"depth": 3, "num_heads": 4, "out_hidden_size": 48, "image_size": 80},
    ),
    "smolvlm": (  # 4x4 patches of 7 pixels: 4 pixels at the right and lower edge are not seen
        {"num_hidden_layers": 4, "hidden_size": 48, "num_attention_heads": 3, "num_key_value_heads": 3},
        {"num_hidden_layers": 3, "hidden_size": 48, "num_attention_heads": 4, "patch_size": 7},
    ),
}


def test_every_family_is_tested_documented_and_planned():
    assert FAMILIES.keys() == base.FAMILIES.keys() == OTHERS.keys()
    facts = [json.loads(file.read_text()) for file in KNOWN.glob("*.json")]
    assert {model["config"]["model_type"] for model in facts if model["kind"] == "teacher"} == set(base.FAMILIES)
    page = (KNOWN.parents[1] / "docs" / "guides" / "teachers.md").read_text()
    for model_type, (module, _) in base.FAMILIES.items():
        assert any(f"`{model_type}`" in line and f"teachers/{module}.py" in line for line in page.splitlines())


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    @functools.cache
    def make(family, variant="small"):
        text, vision = OTHERS[family] if variant == "other" else (None, None)
        if variant == "no choice" and "moe" in family:
            text = {"num_experts_per_tok": EXPERTS["num_experts"]}
        corpus = [line.replace("Yes", "") for line in CORPUS] if variant == "spelling" else CORPUS
        return FAMILIES[family][0](tmp_path_factory.mktemp(family), corpus, seed=3, text=text, vision=vision)

    return make


def stock_losses(path, family, frames, indices, questions, settings, dtype=torch.float32, picture=None):
    """The losses of the checkpoint as transformers loads it, one pass for each question, its prompt written by hand."""
    config = transformers.AutoConfig.from_pretrained(path)
    model = getattr(transformers, config.architectures[0]).from_pretrained(path, dtype=dtype).eval()
    tokenizer = AutoTokenizer.from_pretrained(path)
    video, inputs = FAMILIES[family][1](settings, frames, indices)
    if picture is not None:
        before, inputs = PICTURES.get(family, qwen_picture)(picture, settings, inputs)
        video = f"{before}{video}The picture before the video shows the goal: how the video should end. "
    losses = []
    for question in questions:
        text = CHATS.get(family, CHAT).format(video=video, question=question)
        text = text.replace("User: <fake", "User:<fake")  # SmolVLM's template has no space before a picture
        prompt, ids = tokenizer(text)["input_ids"], tokenizer(text + "Yes")["input_ids"]
        prompt = prompt[: shared_length([prompt, ids])]  # a space may be part of the answer's first token
        input_ids = torch.tensor([ids])
        visual = config.image_token_id if "glm" in family else getattr(config, "video_token_id", None)
        more = {} if visual is None else {"mm_token_type_ids": (input_ids == visual).int() * 2}
        if more and picture is not None:
            more["mm_token_type_ids"] += (input_ids == config.image_token_id).int()
        logits = model(input_ids=input_ids, **inputs, **more).logits
        log_p = logits[0, len(prompt) - 1 : -1].float().log_softmax(-1)
        losses.append(-log_p.gather(1, input_ids[0, len(prompt) :, None]).sum())
    return torch.stack(losses)


def frames_of(count, size=(32, 48), seed=0):
    return torch.rand(count, 3, *size, generator=torch.Generator().manual_seed(seed))


def both(teacher, path, family, count, questions, size=(32, 48), seed=0, **settings):
    """[(losses, gradient to the frames)] of ours and of stock."""
    indices = [2 * i for i in range(count)]
    queries = QuerySet(questions[0], questions[1:])
    weights = torch.linspace(1, 2, len(questions))
    results = []
    for losses in (
        lambda x: teacher.losses(x, indices, FPS, queries),
        lambda x: stock_losses(path, family, x, indices, questions, teacher.video, **settings),
    ):
        frames = frames_of(count, size, seed).requires_grad_()
        values = losses(frames)
        results.append((values.detach(), torch.autograd.grad(values @ weights, frames)[0]))
    return results


def assert_equal(ours, theirs):
    torch.testing.assert_close(ours[0], theirs[0], atol=1e-5, rtol=1e-5)
    assert theirs[1].abs().max() > 1e-4
    # Two roundings of a whole model, up to 1e-5 apart on one processor or another; a wrong term is off by far more.
    assert (ours[1] - theirs[1]).norm() < 1e-4 * theirs[1].norm()


@pytest.mark.slow
@pytest.mark.parametrize("variant", ["small", "other"])
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(("processes", "count", "size"), [(0, 5, (32, 48)), (3, 1, (48, 32)), (7, 4, (48, 80))])
def test_losses_and_pixel_gradients_equal_a_stock_pass_per_question(
    checkpoint, family, variant, processes, count, size
):
    path = checkpoint(family, variant)
    assert_equal(*both(load_teacher(path), path, family, count, QUESTIONS[: 1 + processes], size))


QWEN3 = {"model_type": "qwen3", "head_dim": 16, "num_hidden_layers": 2}


@pytest.mark.parametrize("text", [QWEN3, QWEN3 | EXPERTS | {"model_type": "qwen3_moe"}], ids=["dense", "experts"])
def test_internvl35_is_internvl3_with_another_language_model(tmp_path, text):
    """The published configs differ in nothing else, and prompts, losses and gradients are made in the same way."""
    facts = {file.stem: json.loads(file.read_text())["config"] for file in KNOWN.glob("internvl3*.json")}
    rest = [{key: value for key, value in config.items() if key != "text_config"} for config in facts.values()]
    assert len(facts) == 10 and all(config == rest[0] for config in rest)
    old = load_teacher(tiny_internvl(tmp_path / "old", seed=3))
    path = tiny_internvl(tmp_path / "new", seed=3, text=text)
    new = load_teacher(path)
    clip = old.clip([0, 4, 8], FPS, 48, 32)
    assert clip == new.clip([0, 4, 8], FPS, 48, 32) and old.chats(clip, QUESTIONS) == new.chats(clip, QUESTIONS)
    assert hasattr(new.language.layers[0].self_attn, "q_norm") > hasattr(old.language.layers[0].self_attn, "q_norm")
    assert_equal(*both(new, path, "internvl", 3, QUESTIONS[:3]))


WITH_GOAL = [name for name in FAMILIES if base.find_family(name, name).takes_goal_image]


@pytest.mark.parametrize("family", WITH_GOAL)
def test_a_picture_of_the_goal_equals_the_stock_chat_with_it(checkpoint, family):
    path = checkpoint(family)
    teacher = load_teacher(path)
    pixels = torch.randint(0, 256, (32, 48, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    seeing = teacher.with_goal(pixels.numpy())
    for seeing.chunk_patches in (None, 1):
        ours, theirs = both(seeing, path, family, 5, QUESTIONS[:4], picture=pixels.permute(2, 0, 1) / 255)
        assert_equal(ours, theirs)
    plain = teacher.losses(frames_of(5), range(0, 10, 2), FPS, QuerySet(QUESTIONS[0], QUESTIONS[1:4]))
    assert (plain.detach() - ours[0]).abs().max() > 1e-3
    with_goal, plain = (
        each.layout(each.clip(range(0, 10, 2), FPS, 32, 48), QuerySet(QUESTIONS[0], QUESTIONS[1:4]))
        for each in (seeing, teacher)
    )
    assert len(with_goal.video) > len(plain.video)
    # It is paid once, for all questions; a word's first letter may join what precedes it to another token.
    assert (with_goal.tokens - plain.tokens) - (with_goal.prefix - plain.prefix) <= 4


@pytest.mark.parametrize("family", WITH_GOAL)
def test_queries_are_written_from_the_goal_too(checkpoint, family):
    from PIL import Image

    teacher = load_teacher(checkpoint(family))
    image, goal = Image.new("RGB", (48, 32), "red"), Image.new("RGB", (48, 32), "blue")
    ids = [
        each._query_inputs("Move it.", first)["input_ids"]
        for each in (teacher, teacher.with_goal(goal))
        for first in (image, None)
    ]
    token = teacher.model.config.image_token_id
    counts = [int((each == token).sum()) for each in ids]
    assert counts == [counts[0], 0, 2 * counts[0], counts[0]]
    assert "second image shows the goal" in teacher.tokenizer.decode(ids[2][0])
    assert "There is no first frame" in teacher.tokenizer.decode(ids[3][0])
    assert teacher.goal is None and teacher.with_goal(None) is teacher


@pytest.mark.parametrize("family", sorted(FAMILIES.keys() - WITH_GOAL))
def test_a_family_without_pictures_of_the_goal_refuses_one(checkpoint, family):
    with pytest.raises(InputError, match="takes no picture of the goal: leave out goal_image"):
        load_teacher(checkpoint(family)).with_goal(torch.zeros(3, 32, 48))


@pytest.mark.parametrize("processes", range(8))
def test_any_number_of_questions(checkpoint, processes):
    path = checkpoint("qwen3_vl")
    assert_equal(*both(load_teacher(path), path, "qwen3_vl", 3, QUESTIONS[: 1 + processes]))


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_streaming_and_recomputation_change_nothing(checkpoint, family):
    path = checkpoint(family)
    teacher = load_teacher(path)
    plain, stock = both(teacher, path, family, 7, QUESTIONS[:3], (48, 48))
    assert_equal(plain, stock)
    for chunk, budget in ((1, 0), (80, 10**5), (80, 0), (1, 10**9)):
        teacher.chunk_patches, teacher.activation_bytes = chunk, budget
        assert_equal(both(teacher, path, family, 7, QUESTIONS[:3], (48, 48))[0], stock)


@pytest.mark.parametrize("family", FAMILIES)
def test_an_answer_of_several_tokens(checkpoint, family):
    path = checkpoint(family, "spelling")
    teacher = load_teacher(path)
    assert len(teacher._question_chat(QUESTIONS[0], "")[1]) > 1
    assert_equal(*both(teacher, path, family, 3, QUESTIONS[:3]))


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_bfloat16_is_no_worse_than_stock(checkpoint, family):
    path = checkpoint(family, "no choice")  # of experts: a rounding that changes it is an error of any size
    single, half = load_teacher(path), load_teacher(path, dtype=torch.bfloat16)
    half.chunk_patches = 1
    errors = []
    for seed in range(4):  # one draw of the stock model's rounding may be a lucky one
        truth = both(single, path, family, 5, QUESTIONS[:4], seed=seed)[1]
        results = both(half, path, family, 5, QUESTIONS[:4], seed=seed, dtype=torch.bfloat16)
        errors.append([[(a - b).norm() / b.norm() for a, b in zip(pair, truth, strict=True)] for pair in results])
    ours, theirs = torch.tensor(errors).square().mean(0).sqrt()
    assert (ours <= 2 * theirs + 2**-9).all()


@pytest.mark.parametrize("family", FAMILIES)
def test_bad_frames_are_refused(checkpoint, family):
    teacher = load_teacher(checkpoint(family))
    ask = functools.partial(teacher.losses, frame_indices=range(2), fps=FPS, queries=QuerySet("Is it?"))
    for bad in (2 * frames_of(2), frames_of(2) - 0.5, 255 * frames_of(2)):
        with pytest.raises(InputError, match=r"RGB in \[0, 1\], these span"):
            ask(bad)
    for value in (torch.nan, torch.inf):
        frames = frames_of(2)
        frames[1, 2, 3, 4] = value
        with pytest.raises(NonFiniteFrames, match="NaN"):
            ask(frames)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_question_longer_than_the_context_is_refused(checkpoint, family):
    teacher = load_teacher(checkpoint(family))
    with pytest.raises(InputError, match=r"the question 'Is the ball the ball .* holds 2048"):
        teacher.losses(frames_of(2), range(2), FPS, QuerySet("Is" + " the ball" * 1200 + "?"))


@pytest.mark.parametrize("family", FAMILIES)
def test_a_chat_template_without_video_is_refused(checkpoint, family, tmp_path):
    path = checkpoint(family)
    for file in path.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    template = (path / "chat_template.jinja").read_text().replace("part.type == 'video'", "part.type == 'audio'")
    (tmp_path / "chat_template.jinja").write_text(template)
    with pytest.raises(InputError, match="no place for a video"):
        load_teacher(tmp_path)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("change", ["[:9]", ".upper()", ".split()[0]"])
def test_a_chat_template_that_changes_the_question_is_refused(checkpoint, family, change, tmp_path):
    path = shutil.copytree(checkpoint(family), tmp_path / "copy")
    template = (path / "chat_template.jinja").read_text()
    assert "part.text" in template
    (path / "chat_template.jinja").write_text(template.replace("part.text", f"part.text{change}"))
    with pytest.raises(InputError, match="leaves out or changes what it is asked"):
        load_teacher(path)


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("with_image", [True, False])
def test_queries_are_generated_from_the_image_too(checkpoint, family, with_image, monkeypatch):
    from PIL import Image

    monkeypatch.setattr(vlm, "MAX_NEW_TOKENS", 16)
    teacher = load_teacher(checkpoint(family))
    image = Image.new("RGB", (32, 48), (200, 30, 90)) if with_image else None
    with pytest.raises(InputError, match="no usable queries, twice"):  # weights are random: it has to run only
        teacher.write_queries("Move it.", image)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("count", [1, 4, 5])
@pytest.mark.parametrize("family", FAMILIES)
def test_patch_rows_in_the_place_of_frames(checkpoint, family, count, dtype):
    """Losses and gradients are those of frames, streamed too."""
    teacher = load_teacher(checkpoint(family), dtype=dtype)
    size = (32, 32)
    layout = teacher.patch_layout(count, *size)
    assert teacher.patch_layout(count, 31, 32) is None
    frames = torch.rand(count, 3, *size, generator=torch.Generator().manual_seed(0)).requires_grad_()
    queries, indices = QuerySet(QUESTIONS[0], QUESTIONS[1:2]), list(range(0, 3 * count, 3))
    for teacher.chunk_patches in (None, 1):
        results = []
        for video in (frames, PatchRows(layout.of(frames), layout, count, *size)):
            losses = teacher.losses(video, indices, FPS, queries)
            results.append((losses.detach(), *torch.autograd.grad(losses.sum(), frames)))
        (expected, expected_grad), (ours, grad) = results
        assert torch.equal(ours, expected)
        torch.testing.assert_close(grad, expected_grad, atol=1e-6 * float(expected_grad.abs().max()), rtol=1e-5)


def test_patch_rows_that_the_teacher_does_not_take(checkpoint):
    teacher = load_teacher(checkpoint("qwen3_vl"))
    layout = teacher.patch_layout(2, 32, 32)
    queries = QuerySet(QUESTIONS[0], ())

    def ask(layout, size, fill=0.0):
        rows = torch.full(layout.rows(2, *size), fill, dtype=layout.dtype)
        return teacher.losses(PatchRows(rows, layout, 2, *size), [0, 1], FPS, queries)

    other = PatchLayout(4, 2, 2, layout.mean, layout.std, layout.dtype)
    with pytest.raises(InputError, match=r"rows of PatchLayout\(patch=4.*teacher takes PatchLayout\(patch=8"):
        ask(other, (32, 32))
    with pytest.raises(InputError, match=r"this teacher takes frames, which it resizes"):
        ask(layout, (16, 16))  # fewer pixels than it wants
    with pytest.raises(InputError, match=r"frames must be RGB in \[0, 1\], these span \[1.25, 1.25\]"):
        ask(layout, (32, 32), 1.5)
    with pytest.raises(NonFiniteFrames):
        ask(layout, (32, 32), float("nan"))
    with pytest.raises(InputError, match="1 frame indices for 2 frames"):
        teacher.losses(PatchRows(torch.zeros(layout.rows(2, 32, 32)), layout, 2, 32, 32), [0], FPS, queries)
