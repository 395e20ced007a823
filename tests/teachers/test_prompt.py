import pytest
import torch

from tests.tiny_teacher import tiny_glm4v, tiny_glm4v_moe, tiny_internvl, tiny_qwen3_vl, tiny_qwen25_vl, tiny_smolvlm
from vlmteacher.queries import QuerySet
from vlmteacher.teachers import load_teacher
from vlmteacher.teachers.prompt import LAYOUTS_KEPT, Clip, lay_out, pack, shared_length

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    return load_teacher(tiny_qwen3_vl(tmp_path_factory.mktemp("teacher")))


def positions(ids):
    return torch.arange(ids.shape[1])[None]


def rotary(positions):
    """The positions in the place of angles, so that the test can read them back."""
    places = positions[0].float()[:, None].expand(-1, 4)
    return places, -places


@pytest.mark.parametrize(
    ("rows", "length"), [([[1, 2, 3], [1, 2, 4], [1, 2, 3, 9]], 2), ([[5]], 1), ([[1], [2]], 0), ([[1, 2], [1, 2]], 2)]
)
def test_shared_length(rows, length):
    assert shared_length(rows) == length


def test_a_layout_is_the_agreed_one():
    chats = [([9, 7, 7, 1, 2], [50]), ([9, 7, 7, 3], [50, 51])]
    layout = lay_out(chats, [7], positions, rotary, CPU)
    assert layout.ids.tolist() == [9, 7, 7, 1, 2, 3, 50] and layout.prefix == 3 and layout.questions == 2
    assert layout.starts == (3, 5) and layout.tokens == 7
    assert layout.positions.tolist() == [[0, 1, 2, 3, 4, 3, 4]]  # they restart after the prefix
    assert layout.cos[:, 0, 0].tolist() == [0, 1, 2, 3, 4, 3, 4]
    assert layout.video.tolist() == [1, 2]
    assert layout.answers.tolist() == [4, 5, 6] and layout.targets.tolist() == [50, 50, 51]
    assert layout.owners.tolist() == [0, 1, 1]
    assert layout.sees.rest.int().tolist() == [
        [1, 1, 1, 1, 0, 0, 0],
        [1, 1, 1, 1, 1, 0, 0],
        [1, 1, 1, 0, 0, 1, 0],
        [1, 1, 1, 0, 0, 1, 1],
    ]
    assert torch.equal(layout.sees.mask()[:3], torch.ones(3, 7).tril().bool())
    assert torch.equal(layout.answers_see.mask(), layout.sees.rest[[1, 2, 3]])


def test_one_question_is_all_prefix_and_equal_ones_keep_a_position_each():
    one = lay_out([([9, 7, 1], [50])], [7], positions, rotary, CPU)
    assert one.prefix == 3 and len(one.sees.rest) == 0 and one.answers.tolist() == [2]
    same = lay_out([([9, 7, 1], [50])] * 2, [7], positions, rotary, CPU)
    assert same.ids.tolist() == [9, 7, 1, 1] and same.answers.tolist() == [2, 3]


def test_rows_of_a_batch_are_padded_to_one_length():
    rows = [[9, 7, 1, 2], [9, 7, 3], [9, 7, 4, 5]]
    packed = pack(rows, 2, room=2)
    assert packed.ids == [9, 7, 1, 2, 3, 0, 4, 5] and packed.starts == (2, 4, 6)
    assert packed.spans()[:, 1:].tolist() == [[2, 1], [2, 2], [2, 3], [2, 4], [4, 5], [4, 6], [6, 7], [6, 8]]
    assert packed.spans()[:, 0].tolist() == [1, 2, 2, 2, 2, 2, 2, 2]
    assert pack(rows, 2).ids == [9, 7, 1, 2, 3, 4, 5]


TINY = [tiny_qwen3_vl, tiny_qwen25_vl, tiny_internvl, tiny_smolvlm, tiny_glm4v, tiny_glm4v_moe]


@pytest.mark.parametrize("family", TINY)
def test_a_layout_holds_what_each_chat_holds_by_itself(family, tmp_path):
    teacher = load_teacher(family(tmp_path))
    clip = teacher.clip([0, 2, 5], 8.0, 32, 48)
    assert clip == Clip((0, 2, 5), 8.0, teacher.resized(3, 32, 48))
    queries = QuerySet("Is the red ball on the square?", ("Is it?", "Is the red square?"))
    layout, chats = teacher.layout(clip, queries), teacher.chats(clip, queries.questions)
    visual = teacher.tokenizer.convert_tokens_to_ids(teacher.visual_pads[-1])
    bounds = [*layout.starts, layout.tokens]
    for question, (prompt, answer) in enumerate(chats):
        ids = torch.tensor([*prompt, *answer[:-1]])
        own = torch.arange(bounds[question], bounds[question + 1])
        places = torch.cat([torch.arange(layout.prefix), own])
        assert torch.equal(layout.ids[places], ids)
        positions = teacher.positions(ids[None], clip)
        assert torch.equal(layout.positions[..., places], positions)
        cos, sin = (x[:, None] for x in teacher.rotary(positions))
        half = cos.shape[-1] // 2
        assert torch.equal(layout.cos[places], cos[..., :half]) and torch.equal(layout.sin[places], sin[..., :half])
        mine = layout.owners == question
        assert layout.targets[mine].tolist() == answer
        assert torch.equal(layout.ids[layout.answers[mine][0]], torch.tensor(prompt[-1]))
        assert prompt.count(visual) == len(layout.video)


def test_layouts_are_kept_but_not_all(teacher):
    frames = torch.rand(2, 3, 32, 32)
    for index in range(LAYOUTS_KEPT + 2):
        teacher.losses(frames, range(2), 8.0, QuerySet(f"Is it {index}?"))
    assert len(teacher._layouts) == LAYOUTS_KEPT
    clip = Clip((0, 1), 8.0, (32, 32))
    queries = QuerySet(f"Is it {LAYOUTS_KEPT + 1}?")
    assert teacher.layout(clip, queries) is teacher.layout(clip, queries)
