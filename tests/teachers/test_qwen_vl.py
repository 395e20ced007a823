import json
import time

import pytest
import torch
from PIL import Image
from transformers import AutoTokenizer, Qwen3VLForConditionalGeneration

from tests.tiny_teacher import CORPUS, tiny_qwen3_vl
from vlmteacher.errors import InputError
from vlmteacher.pipeline import PACKAGED_PAIR
from vlmteacher.queries import QuerySet
from vlmteacher.teachers import load_teacher, vlm
from vlmteacher.teachers.preprocessing import preprocess_image, preprocess_video
from vlmteacher.teachers.prompt import question_text
from vlmteacher.teachers.qwen_vl import QwenVLTeacher, video_placeholder
from vlmteacher.teachers.visual_checkpoint import LinearPatchEmbed

QUESTIONS = ("Is the red ball on the square?", "Is it?", "Does the ball go around all of the blocked cells?", "Red?")


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return tiny_qwen3_vl(tmp_path_factory.mktemp("teacher"))


@pytest.fixture(scope="module")
def teacher(path):
    return load_teacher(path)


@pytest.fixture(scope="module")
def spelling(tmp_path_factory):
    """A checkpoint whose tokenizer has no token for the whole answer."""
    path = tiny_qwen3_vl(tmp_path_factory.mktemp("spelling"), [text.replace("Yes", "") for text in CORPUS])
    return path, load_teacher(path)


def frames_of(count, size=(32, 48), seed=0):
    return torch.rand(count, 3, *size, generator=torch.Generator().manual_seed(seed))


def stock_losses(path, frames, indices, fps, questions, settings):
    """One full forward of an unchanged stock model for each question; the prompt is written by hand."""
    model = Qwen3VLForConditionalGeneration.from_pretrained(path).eval()
    tokenizer = AutoTokenizer.from_pretrained(path)
    pixels, grid = preprocess_video(frames, settings)
    pairs, height, width = grid[0].tolist()
    indices = list(indices) + [indices[-1]] * (len(indices) % 2)
    video = "".join(
        f"<{(indices[2 * i] + indices[2 * i + 1]) / (2 * fps):.1f} seconds><|vision_start|>"
        + "<|video_pad|>" * (height * width // 4)
        + "<|vision_end|>"
        for i in range(pairs)
    )
    losses = []
    for question in questions:
        text = f"<|im_start|>user\n{video}{question} Answer Yes or No.<|im_end|>\n<|im_start|>assistant\n"
        prompt, ids = tokenizer(text)["input_ids"], tokenizer(text + "Yes")["input_ids"]
        input_ids = torch.tensor([ids])
        types = (input_ids == model.config.video_token_id).int() * 2
        logits = model(
            input_ids=input_ids, pixel_values_videos=pixels, video_grid_thw=grid, mm_token_type_ids=types
        ).logits
        log_p = logits[0, len(prompt) - 1 : -1].float().log_softmax(-1)
        losses.append(-log_p.gather(1, input_ids[0, len(prompt) :, None]).sum())
    return torch.stack(losses)


@pytest.mark.parametrize("processes", [0, 1, 2, 3])
@pytest.mark.parametrize("count", [4, 7])
def test_losses_and_pixel_gradients_equal_a_stock_forward_per_question(path, teacher, processes, count):
    queries = QuerySet(QUESTIONS[0], QUESTIONS[1 : 1 + processes])
    indices = [2 * i for i in range(count)]
    ours, theirs = frames_of(count).requires_grad_(), frames_of(count).requires_grad_()
    losses = teacher.losses(ours, indices, 8.0, queries)
    want = stock_losses(path, theirs, indices, 8.0, queries.questions, teacher.video)
    assert losses.shape == (1 + processes,) and losses.dtype == torch.float32
    torch.testing.assert_close(losses, want, atol=1e-5, rtol=1e-5)
    mixture = torch.arange(1.0, 2 + processes)
    (losses @ mixture).backward()
    (want @ mixture).backward()
    assert theirs.grad.abs().max() > 1e-4
    assert (ours.grad - theirs.grad).norm() < 1e-5 * theirs.grad.norm()


def test_an_answer_of_several_tokens(spelling):
    path, teacher = spelling
    queries = QuerySet(QUESTIONS[0], QUESTIONS[1:3])
    _, answer = teacher._question_chat(QUESTIONS[0], "")
    assert len(answer) > 1 and teacher.tokenizer.decode(answer) == "Yes"
    losses = teacher.losses(frames_of(3), [0, 4, 8], 8.0, queries)
    want = stock_losses(path, frames_of(3), [0, 4, 8], 8.0, queries.questions, teacher.video)
    torch.testing.assert_close(losses, want, atol=1e-5, rtol=1e-5)


def test_the_answer_of_one_token(teacher):
    prompt, answer = teacher._question_chat(QUESTIONS[0], "")
    assert len(answer) == 1 and teacher.tokenizer.decode(prompt + answer).endswith("assistant\nYes")


def test_the_gradient_matches_finite_differences(path):
    teacher = load_teacher(path)
    queries = QuerySet(QUESTIONS[0], QUESTIONS[1:2])
    frames = frames_of(4, (24, 40)).requires_grad_()  # resized on the way

    def value(x):
        return teacher.losses(x, range(4), 8.0, queries).sum()

    (gradient,) = torch.autograd.grad(value(frames), frames)
    direction = gradient / gradient.norm()
    step = 1e-2
    with torch.no_grad():
        slope = (value(frames + step * direction) - value(frames - step * direction)) / (2 * step)
    assert slope.item() == pytest.approx((gradient * direction).sum().item(), rel=1e-2)


def test_the_model_is_frozen_and_generation_leaves_no_trace(teacher):
    frames = frames_of(4).requires_grad_()
    queries = QuerySet(QUESTIONS[0])
    before = teacher.losses(frames, range(4), 8.0, queries)
    before.sum().backward()
    assert (
        all(p.grad is None and not p.requires_grad for p in teacher.model.parameters()) and not teacher.model.training
    )
    inputs = teacher._query_inputs("Move the ball.", Image.new("RGB", (32, 32), "red"))
    state = torch.random.get_rng_state()
    teacher._generate(inputs, sample=True)
    assert torch.equal(state, torch.random.get_rng_state())
    assert torch.equal(before, teacher.losses(frames, range(4), 8.0, queries))


def test_time_and_frame_places_matter(teacher):
    queries = QuerySet(QUESTIONS[0])
    frames = frames_of(4)
    slow = teacher.losses(frames, [0, 10, 20, 30], 8.0, queries)
    assert not torch.allclose(slow, teacher.losses(frames, [0, 1, 2, 3], 8.0, queries), atol=1e-6)
    torch.testing.assert_close(slow, teacher.losses(frames, [0, 20, 40, 60], 16.0, queries))


def test_the_prompt_is_exactly_the_agreed_text(teacher):
    placeholder = video_placeholder([0, 3, 6], 8.0, 2)
    assert placeholder == (
        "<0.2 seconds><|vision_start|><|video_pad|><|video_pad|><|vision_end|>"
        "<0.8 seconds><|vision_start|><|video_pad|><|video_pad|><|vision_end|>"
    )
    assert teacher._chat(question_text(" Is it? "), "video", placeholder) == (
        f"<|im_start|>user\n{placeholder}Is it? Answer Yes or No.<|im_end|>\n<|im_start|>assistant\n"
    )


def test_the_video_is_encoded_once_whatever_the_number_of_questions(teacher):
    calls = []
    handle = teacher.model.model.visual.merger.register_forward_hook(lambda *_: calls.append(1))
    try:
        teacher.losses(frames_of(4), range(4), 8.0, QuerySet(QUESTIONS[0], QUESTIONS[1:]))
    finally:
        handle.remove()
    assert len(calls) == 1


def test_the_linear_patch_embedding_equals_the_convolution(path, teacher):
    stock = Qwen3VLForConditionalGeneration.from_pretrained(path)
    rows = torch.randn(50, 3 * 2 * 8 * 8, generator=torch.Generator().manual_seed(0))
    ours = teacher.model.model.visual.patch_embed
    assert isinstance(ours, LinearPatchEmbed)
    torch.testing.assert_close(ours(rows), stock.model.visual.patch_embed(rows), atol=4e-6, rtol=1e-5)
    assert stock.state_dict().keys() == teacher.model.state_dict().keys()


@pytest.mark.parametrize(
    ("frames", "indices", "fps", "what"),
    [
        (torch.rand(4, 1, 32, 32), range(4), 8.0, r"\(4, 1, 32, 32\)"),
        (torch.rand(0, 3, 32, 32), [], 8.0, "K >= 1"),
        (torch.rand(4, 3, 32, 32), range(3), 8.0, "3 frame indices for 4"),
        (torch.rand(4, 3, 32, 32), range(4), 0.0, "fps"),
    ],
)
def test_bad_frames_are_refused(teacher, frames, indices, fps, what):
    with pytest.raises(InputError, match=what):
        teacher.losses(frames, indices, fps, QuerySet("Is it?"))


def test_garbage_is_retried_once_then_refused(teacher, monkeypatch):
    answers = []
    generate = QwenVLTeacher._generate
    monkeypatch.setattr(
        QwenVLTeacher, "_generate", lambda *args, **kw: answers.append(generate(*args, **kw)) or answers[-1]
    )
    with pytest.raises(InputError, match="no usable queries, twice") as error:
        teacher.write_queries("Move the red ball.", Image.new("RGB", (40, 32), "red"))
    assert len(answers) == 2 and answers[0] != answers[1]
    assert "\n" not in str(error.value) and len(str(error.value)) < 400
    with pytest.raises(InputError) as again:
        teacher.write_queries("Move the red ball.", Image.new("RGB", (40, 32), "red"))
    assert str(again.value) == str(error.value) and answers[:2] == answers[2:]


def test_the_retry_can_succeed_and_is_the_same_each_time(teacher, monkeypatch):
    good = QuerySet("Is it there?", ("Is it one?",))
    asked = []

    def answer(self, inputs, sample):
        asked.append(sample)
        return f"Here: {good.to_json()}" if sample else "no"

    monkeypatch.setattr(QwenVLTeacher, "_generate", answer)
    assert teacher.write_queries("Move it.") == good and asked == [False, True]
    monkeypatch.undo()
    inputs = teacher._query_inputs("Move it.", None)
    assert teacher._generate(inputs, sample=True) == teacher._generate(inputs, sample=True)


def test_the_retry_is_told_in_the_same_conversation(teacher, monkeypatch):
    bad, good = QuerySet("Is it there?", ("Does it never fall?",)), QuerySet("Is it there?", ("Is it one?",))
    heard = []

    def answer(self, inputs, sample):
        heard.append(self.tokenizer.decode(inputs["input_ids"][0]))
        return (good if sample else bad).to_json()

    monkeypatch.setattr(QwenVLTeacher, "_generate", answer)
    assert teacher.write_queries("Move it.", Image.new("RGB", (32, 32), "red")) == good
    first, second = heard
    begin, reply = "<|im_start|>assistant\n", "'Does it never fall?' is negated (\"never\")"
    assert second.startswith(first + bad.to_json() + "<|im_end|>\n<|im_start|>user\nThis answer cannot be used: ")
    assert reply in second.removeprefix(first) and second.endswith(f"<|im_end|>\n{begin}") and first.endswith(begin)
    assert second.count("<|image_pad|>") == first.count("<|image_pad|>") > 0


def test_real_answers_are_held_to_the_rules_and_the_packaged_teachers_are_not(teacher, monkeypatch):
    """The packaged Teacher writes "without jumps", as it was trained to."""
    from vlmteacher.microworld.questions import right_queries
    from vlmteacher.microworld.world import instance, render

    packaged = load_teacher(PACKAGED_PAIR / "teacher")
    scene, prompt = instance(0, 7)
    image = Image.fromarray((render(scene)[0] * 255).round().astype("uint8"))
    chats = []
    encode = QwenVLTeacher._encode
    monkeypatch.setattr(
        QwenVLTeacher, "_encode", lambda self, text, *rest: chats.append(text) or encode(self, text, *rest)
    )
    written = packaged.write_queries(prompt, image)
    assert written == right_queries(scene) and "without" in written.process[1]
    assert [chat.replace("<|image_pad|>", "") for chat in chats] == [
        "<|im_start|>user\n<|vision_start|><|vision_end|>A video must carry out this task: "
        f"{prompt}\nWrite questions to check the video. Each is answered yes or no by watching the video, and Yes "
        "means satisfied. Write one goal question about the final result and one to three process questions about "
        'rules that must hold all the way. Answer only with JSON: {"goal": "...", "process": ["...", "..."]}'
        "<|im_end|>\n"
        "<|im_start|>assistant\n"
    ]
    monkeypatch.setattr(QwenVLTeacher, "_generate", lambda *args: written.to_json())
    assert packaged.write_queries(prompt, image) == written
    with pytest.raises(InputError, match=r"without jumps.* is negated \(\"without\"\)"):
        teacher.write_queries(prompt, image)


def test_a_checkpoint_brings_its_way_of_asking(tmp_path, path):
    for file in path.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    (tmp_path / "teacher.json").write_text('{"query_instruction": "Ask about: {prompt}"}')
    style = load_teacher(tmp_path).style
    assert (style.query_instruction, style.own_wording) == ("Ask about: {prompt}", False)
    (tmp_path / "teacher.json").write_text('{"query_instruction": "Ask."}')
    with pytest.raises(InputError, match=r"teacher.json cannot be used: .*\{prompt\}"):
        load_teacher(tmp_path)


@pytest.mark.parametrize("with_image", [True, False])
def test_generation_equals_a_stepwise_stock_greedy_search(path, teacher, monkeypatch, with_image):
    monkeypatch.setattr(vlm, "MAX_NEW_TOKENS", 6)
    image = Image.new("RGB", (32, 48), (200, 30, 90)) if with_image else None
    text = teacher._generate(teacher._query_inputs("Move it.", image), sample=False)

    model = Qwen3VLForConditionalGeneration.from_pretrained(path).eval()
    vision = {}
    placeholder = ""
    if with_image:
        pixels = torch.tensor([200, 30, 90]).view(3, 1, 1).expand(3, 48, 32) / 255
        values, grid = preprocess_image(pixels, teacher.image)
        vision = {"pixel_values": values, "image_grid_thw": grid}
        placeholder = "<|vision_start|>" + "<|image_pad|>" * 6 + "<|vision_end|>"
    question = vlm.query_prompt("Move it.")
    prompt = f"<|im_start|>user\n{placeholder}{question}<|im_end|>\n<|im_start|>assistant\n"
    ids = teacher.tokenizer(prompt, return_tensors="pt")["input_ids"]
    start = ids.shape[1]
    for _ in range(6):
        types = (ids == model.config.image_token_id).int()
        logits = model(input_ids=ids, mm_token_type_ids=types, **vision).logits[:, -1]
        ids = torch.cat([ids, logits.argmax(-1, keepdim=True)], 1)
        if ids[0, -1] == teacher.tokenizer.eos_token_id:
            break
    assert text == teacher.tokenizer.decode(ids[0, start:], skip_special_tokens=True)


def test_an_empty_prompt_is_refused(teacher):
    with pytest.raises(InputError, match="prompt is empty"):
        teacher.write_queries("  ")


def test_bfloat16_stays_close(path, teacher):
    half = load_teacher(path, dtype=torch.bfloat16)
    queries = QuerySet(QUESTIONS[0], QUESTIONS[1:2])
    losses = half.losses(frames_of(4), range(4), 8.0, queries)
    assert losses.dtype == torch.float32
    torch.testing.assert_close(losses, teacher.losses(frames_of(4), range(4), 8.0, queries), atol=0.15, rtol=0.05)
    assert half.to(dtype=torch.float32).model.dtype == torch.float32 and half.device.type == "cpu"


def test_a_checkpoint_of_another_family_is_refused(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama"}))
    with pytest.raises(InputError, match=r"'llama'; known types: qwen3_vl"):
        load_teacher(tmp_path)


def test_an_unknown_id_without_network_asks_for_a_directory(monkeypatch):
    monkeypatch.setenv("HTTPS_PROXY", "http://127.0.0.1:9")  # out of reach, also where there is a network
    from huggingface_hub.utils import close_session

    close_session()
    started = time.perf_counter()
    with pytest.raises(InputError, match="give the path of a directory"):
        load_teacher("nobody/nothing-of-this-name")
    assert time.perf_counter() - started < 60  # without the waits of repeated attempts
    close_session()


def test_a_directory_without_weights_or_config_is_refused(tmp_path, path):
    with pytest.raises(InputError, match="no usable config"):
        load_teacher(tmp_path)
    for file in path.iterdir():
        if file.suffix != ".safetensors":
            (tmp_path / file.name).write_bytes(file.read_bytes())
    with pytest.raises(InputError, match="cannot be loaded"):
        load_teacher(tmp_path)


def test_a_tokenizer_without_chat_template_is_refused(tmp_path, path):
    for file in path.iterdir():
        if file.name != "chat_template.jinja":
            (tmp_path / file.name).write_bytes(file.read_bytes())
    with pytest.raises(InputError, match="no chat template"):
        load_teacher(tmp_path)
