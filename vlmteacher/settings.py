"""What a call may be told, with the defaults of the paper."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any, Literal, get_args

from vlmteacher import arguments
from vlmteacher.errors import InputError
from vlmteacher.lora.adapter import parse_blocks
from vlmteacher.optimization.engines import ENGINES, Engine
from vlmteacher.reasoners.base import Target


@dataclass(frozen=True)
class Settings:
    """What the loop may be told; the defaults are the paper's (arXiv 2606.02564, section on the implementation).

    max_steps N >= 0; threshold tau > 0 on the loss (0.22 = -ln 0.8); goal_weight lambda in [0, 1]; teacher_frames
    K >= 1, frames that the Teacher sees; rank >= 1 of the LoRA; learning_rate > 0 of AdamW; keep: after N updates
    the "last" LoRA, or the "best" one, which had the lowest loss seen. check_final: where the one-step prediction is
    good enough, look at the few-step video too, and go on while that is not (the paper does not). fused_lora: compute
    the LoRA layers and what is between them by our operators, not by PEFT's and diffusers' expressions; the results
    agree to rounding. engine: how a step is run (`optimization/engines.py`). lora_blocks: "last:n" adapts the last n
    blocks of the Reasoner only, which is another method than the paper's: what comes before them is computed once.
    target: which latents the Teacher looks at, and through what the gradient goes (`Reasoner.predict_target`); the
    paper's is the "first_step". deterministic: the same bytes whatever the number of threads (`torch_modes.py`).

    Remedies against videos that please only the Teacher, all off: preserve asks for what the task does not change, by a
    process question of the Teacher's (`QueryStyle.preservation_query`). frame_jitter >= 0, pixels by which the frames
    are shifted, another way at each step. lora_decay >= 0, AdamW's weight decay. pull >= 0, weight of the mean squared
    distance of the latents from what they were before the first update, beside the loss. final_samples >= 1: what is
    optimised is a one-step prediction, which the later steps, with their own noise, may spoil; so many videos are
    sampled in the end, which differ in that noise, and the one counts that the Teacher likes best. Raises InputError.
    """

    max_steps: int = 40
    threshold: float = 0.22
    goal_weight: float = 0.5
    teacher_frames: int = 24
    rank: int = 16
    learning_rate: float = 5e-5
    keep: Literal["last", "best"] = "last"
    check_final: bool = False
    fused_lora: bool = True
    engine: Engine = "eager"
    lora_blocks: str | None = None
    target: Target = "first_step"
    preserve: bool = False
    frame_jitter: int = 0
    lora_decay: float = 0.0
    pull: float = 0.0
    final_samples: int = 1
    deterministic: bool = False

    def __post_init__(self) -> None:
        whole = {"max_steps": 0, "teacher_frames": 1, "rank": 1, "frame_jitter": 0, "final_samples": 1}
        for name, least in whole.items():
            self._set(name, arguments.whole(name, getattr(self, name), least))
        for name in ("check_final", "fused_lora", "preserve", "deterministic"):
            self._set(name, arguments.flag(name, getattr(self, name)))
        for name in ("threshold", "learning_rate", "goal_weight", "lora_decay", "pull"):
            self._set(name, arguments.number(name, getattr(self, name)))
        for name, choices in (("keep", ("last", "best")), ("target", get_args(Target)), ("engine", ENGINES)):
            arguments.one_of(name, getattr(self, name), choices)
        for name in ("threshold", "learning_rate"):
            value = getattr(self, name)
            if not 0 < value <= arguments.LARGEST_NUMBER:
                raise InputError(f"{name} must be greater than 0 and at most {arguments.LARGEST_NUMBER:g}, not {value}")
        for name in ("lora_decay", "pull"):
            value = getattr(self, name)
            if not 0 <= value <= arguments.LARGEST_NUMBER:
                raise InputError(
                    f"{name} must be 0 (off) or greater, at most {arguments.LARGEST_NUMBER:g}, not {value}"
                )
        if not 0 <= self.goal_weight <= 1:
            raise InputError(f"goal_weight must lie between 0 and 1, not {self.goal_weight}")
        if self.engine == "cuda_graph" and self.frame_jitter:
            raise InputError('frame_jitter changes from step to step, a CUDA graph does not: take engine "eager"')
        if self.lora_blocks is not None:
            parse_blocks(arguments.text("lora_blocks", self.lora_blocks))

    def _set(self, name: str, value: object) -> None:
        object.__setattr__(self, name, value)

    @classmethod
    def of(cls, values: object, source: str) -> Settings:
        """Settings by name. Raises InputError, which names `source`, for what is no mapping or an unknown name."""
        known = [field.name for field in fields(cls)]
        if not isinstance(values, Mapping):
            raise InputError(f"{source} must be settings by name, not {arguments.show(values)}")
        if unknown := [name for name in values if name not in known]:
            raise InputError(
                f"{source}: there is no setting {arguments.show(unknown[0])}: it can be {', '.join(known)}"
            )
        return cls(**values)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)
