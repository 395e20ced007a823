"""Recognise an optimisation that has diverged, from the metrics of a step or from the final video."""

from __future__ import annotations

import math
from collections.abc import Sequence

from vlmteacher.errors import NonFiniteError, NonFiniteFrames
from vlmteacher.optimization.objective import Metrics
from vlmteacher.teachers.base import check_range

REMEDY = "try a lower learning rate or another dtype"
DIVERGED_RISE = math.log(5)  # of the loss above its start: the P(Yes) of the questions have fallen to a fifth
DIVERGED_STEPS = 5  # in a row; a healthy run rises so far at single steps only
SUSPICIOUS_RISE = 0.1  # of the final video's loss: the last update needs an evaluation of its own
FLAT_CONTRAST = 0.5 / 255  # standard deviation of frames that 8 bits show as one colour
PICTURE_CONTRAST = 4 * FLAT_CONTRAST  # first frames below it are nearly blank, so that they cannot collapse


def check_finite(metrics: Metrics, step: int) -> None:
    """Raise NonFiniteError when the prediction or the loss is not finite; the gradient is not checked.

    Raises InputError for frames outside [0, 1].
    """
    if metrics.latents_nan:
        raise NonFiniteError(f"the prediction of step {step} holds NaN: {REMEDY}")
    try:
        check_range(metrics.frames_min, metrics.frames_max)
    except NonFiniteFrames as error:
        raise NonFiniteError(f"step {step}: {error}") from error
    if not math.isfinite(metrics.loss):
        raise NonFiniteError(f"the loss of step {step} is {metrics.loss}: {REMEDY}")


def check_gradient(metrics: Metrics, step: int) -> None:
    """Raise NonFiniteError when the gradient's norm is not finite."""
    assert metrics.grad_norm is not None
    if not math.isfinite(metrics.grad_norm):
        raise NonFiniteError(f"the gradient of step {step} is not finite: {REMEDY}")


def diagnose(metrics: Metrics, losses: Sequence[float], threshold: float, first_contrast: float) -> str | None:
    """Why finite metrics show that the updates before them led nowhere, or None.

    losses: of the steps before, all of them. first_contrast: see `collapse`.
    """
    if metrics.grad_norm == 0 and metrics.loss > threshold:
        return f"the gradient of step {len(losses)} is exactly 0"
    if not losses:
        return None
    recent = [*losses[1 - DIVERGED_STEPS :], metrics.loss]
    if len(recent) == DIVERGED_STEPS and min(recent) > losses[0] + DIVERGED_RISE:
        return f"the loss is far above its start for {DIVERGED_STEPS} steps"
    return collapse(metrics.contrast, first_contrast)


def collapse(contrast: float, first_contrast: float) -> str | None:
    """Why frames of this `frame_contrast` have lost their picture, or None.

    first_contrast: of the frames before the first update.
    """
    if contrast < FLAT_CONTRAST and first_contrast >= PICTURE_CONTRAST:
        return "the frames have become one colour"
    return None


def reason(error: object) -> str:
    """The message of an error without `REMEDY`, which rolling back makes needless."""
    return str(error).removesuffix(f": {REMEDY}")
