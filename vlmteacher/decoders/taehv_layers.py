"""The modules of TAEHV-class decoders, in plain torch. x_BTCHW: batch, frames, channels, height, width."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class SoftClamp(nn.Module):
    """3 tanh(x / 3): keeps latents within the range that the decoder was trained on."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(x / 3) * 3


def activation(slope: float) -> nn.Module:
    """ReLU for a slope of 0, LeakyReLU for any other."""
    return nn.LeakyReLU(slope, inplace=True) if slope else nn.ReLU(inplace=True)


class MemBlock(nn.Module):
    """Residual block whose convolutions read the previous frame's input beside this frame's."""

    def __init__(self, width: int, slope: float = 0.0) -> None:
        super().__init__()
        self.conv = nn.Sequential(
            nn.Conv2d(2 * width, width, 3, padding=1),
            activation(slope),
            nn.Conv2d(width, width, 3, padding=1),
            activation(slope),
            nn.Conv2d(width, width, 3, padding=1),
        )
        self.act = activation(slope)

    def forward(self, x_BTCHW: Tensor) -> Tensor:
        return self.act(self.conv(_with_past(x_BTCHW)).view_as(x_BTCHW) + x_BTCHW)


class SuperMemBlock(nn.Module):
    """The MemBlock of the ``_super`` decoders: a 7x7 depthwise convolution, then an inverted bottleneck (ConvNeXt)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv = nn.Sequential(
            nn.Conv2d(2 * width, 2 * width, 7, padding=3, groups=2 * width, bias=False),
            nn.Conv2d(2 * width, 4 * width, 1),
            nn.ReLU(inplace=True),
            nn.Conv2d(4 * width, width, 1, bias=False),
        )

    def forward(self, x_BTCHW: Tensor) -> Tensor:
        return self.conv(_with_past(x_BTCHW)).view_as(x_BTCHW) + x_BTCHW


def _with_past(x_BTCHW: Tensor) -> Tensor:
    """(B T, 2C, H, W): each frame's channels, then those of the frame before it (zeros before the first)."""
    past = F.pad(x_BTCHW, (0, 0, 0, 0, 0, 0, 1, 0))[:, :-1]
    return torch.cat([x_BTCHW, past], 2).flatten(0, 1)


class TGrow(nn.Module):
    """A 1x1 convolution that turns one frame into `stride` frames."""

    def __init__(self, width: int, stride: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(width, width * stride, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x).reshape(-1, *x.shape[1:])
