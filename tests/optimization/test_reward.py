import pytest
import torch

from vlmteacher.errors import InputError
from vlmteacher.optimization.reward import vqa_objective


def test_goal_and_mean_of_process_questions_are_mixed():
    losses = torch.tensor([2.0, 0.5, 1.0, 4.5], requires_grad=True)
    value = vqa_objective(losses, 0.25)
    assert value.item() == pytest.approx(0.25 * 2.0 + 0.75 / 3 * (0.5 + 1.0 + 4.5))
    value.backward()
    assert losses.grad.tolist() == pytest.approx([0.25, 0.25, 0.25, 0.25])


@pytest.mark.parametrize("goal_weight", [0.0, 0.5, 1.0])
def test_without_process_questions_the_goal_is_all(goal_weight):
    assert vqa_objective(torch.tensor([3.0]), goal_weight).item() == 3.0


@pytest.mark.parametrize("goal_weight", [-0.1, 1.1, float("nan")])
def test_a_weight_outside_the_unit_interval_is_refused(goal_weight):
    with pytest.raises(InputError, match="goal_weight"):
        vqa_objective(torch.ones(2), goal_weight)
