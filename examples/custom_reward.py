"""A reward of one's own beside the Teacher: the packaged pair must also keep the corners of the picture as they were.

python examples/custom_reward.py [--weight 2] [--steps 20] [--out runs/custom_reward]
"""

from __future__ import annotations

import argparse

import torch
from torch import Tensor

from vlmteacher import TeacherPipeline, packaged_example
from vlmteacher.rewards import RewardContext, temporal_smoothness


def still_corners(frames: Tensor, context: RewardContext) -> Tensor:
    """The mean squared change of four corners of 8x8 pixels since the first frame. frames: (K, 3, H, W) in [0, 1]."""
    corners = torch.stack(
        [frames[..., down, across] for down in (slice(8), slice(-8, None)) for across in (slice(8), slice(-8, None))]
    )
    return (corners - corners[:, :1].detach()).square().mean()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--weight", type=float, default=2.0, help="of the reward (default: 2)")
    parser.add_argument("--steps", type=int, default=20, help="updates at most (default: 20)")
    parser.add_argument("--out", help="run folder to write")
    arguments = parser.parse_args()

    prompt, image, seed, _ = packaged_example()
    pipe = TeacherPipeline.from_pretrained()
    out = pipe(
        prompt,
        image,
        generator=torch.Generator().manual_seed(seed),
        rewards=[(still_corners, arguments.weight), (temporal_smoothness, 0.1)],
        max_steps=arguments.steps,
        run_dir=arguments.out,
    )
    print(out)
    assert out.rewards is not None
    for name, before in out.rewards["before"].items():
        print(f"{name}: {before:.4f} -> {out.rewards['after'][name]:.4f}")
    objective = out.rewards["objective_before"], out.rewards["objective_after"]
    print(f"objective: {objective[0]:.3f} -> {objective[1]:.3f}")


if __name__ == "__main__":
    main()
