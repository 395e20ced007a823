"""The three models that a pipeline works with, and the devices that they are on."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import wraps
from typing import TYPE_CHECKING, Any, Concatenate, ParamSpec, Self, TypeVar

import torch
from torch import Tensor

from vlmteacher import arguments
from vlmteacher.errors import InputError, Notice, OutOfMemory, first_line
from vlmteacher.exclusive import exclusive
from vlmteacher.media import ImageInput
from vlmteacher.microworld.known_tasks import unknown_task
from vlmteacher.optimization.frames import window_losses
from vlmteacher.optimization.out_of_memory import is_out_of_memory
from vlmteacher.placement import DeviceMap, find_devices
from vlmteacher.progress import bar, listeners, listening
from vlmteacher.queries import QuerySet
from vlmteacher.ranks import Ranks
from vlmteacher.reasoners.context_parallel import check_ranks
from vlmteacher.settings import Settings
from vlmteacher.teachers.base import ANSWER_TOKENS
from vlmteacher.torch_modes import deterministic, plain_torch

if TYPE_CHECKING:
    from vlmteacher.decoders.taehv import SurrogateDecoder
    from vlmteacher.lora.formats import LoRA
    from vlmteacher.optimization.loop import Optimization
    from vlmteacher.reasoners.base import Reasoner
    from vlmteacher.reasoners.condition import Condition, Noise
    from vlmteacher.teachers.base import Teacher

P = ParamSpec("P")
R = TypeVar("R")


def alone(
    nested: bool = False,
) -> Callable[[Callable[Concatenate[Any, P], R]], Callable[Concatenate[Any, P], R]]:
    """Decorate a method of `FrozenModels`: one thread and one call at a time, in torch's plain modes.

    nested: the method may also be called inside another call of the same thread, as a callback does. The method raises
    InputError while another call is at work, and OutOfMemory where memory runs out.
    """

    def decorate(method: Callable[Concatenate[Any, P], R]) -> Callable[Concatenate[Any, P], R]:
        @wraps(method)
        def run(self: Any, *args: P.args, **keywords: P.kwargs) -> R:
            with exclusive(self.reasoner.transformer, nested), plain_torch(), self.modes(keywords):
                try:
                    return method(self, *args, **keywords)
                except (RuntimeError, MemoryError) as error:
                    if not is_out_of_memory(error):
                        raise
                    why = first_line(error)
            # Here the error is gone, and with its traceback the tensors of the call.
            raise OutOfMemory(
                f"it does not fit in memory ({why}): give fewer or smaller frames, or offload; `vlmteacher plan` says"
                " what fits"
            )

        return run

    return decorate


class FrozenModels:
    """A Reasoner, a Teacher and a surrogate decoder, and the devices that they are on.

    Attributes:
        defaults: settings of a call, where the call leaves them out.
        models: names for the record, under "reasoner", "teacher" and "decoder".
        offload: networks that are not at work wait in main memory (see `need`).
        lora: the LoRA that a call starts from; None for a fresh one.
        loop: during the steps of a call, its optimisation, for a callback.
    """

    def __init__(
        self,
        reasoner: Reasoner,
        teacher: Teacher,
        decoder: SurrogateDecoder,
        defaults: dict[str, Any] | None = None,
        models: dict[str, str] | None = None,
        offload: bool = False,
    ) -> None:
        for name, part in (("reasoner", reasoner), ("teacher", teacher), ("decoder", decoder)):
            if not hasattr(part, "to"):
                raise InputError(
                    f"{name} must be a loaded model, not {arguments.show(part)}: `from_pretrained` loads by name"
                )
        self.reasoner, self.teacher, self.decoder = reasoner, teacher, decoder
        self.offload = offload
        self.devices = {"reasoner": reasoner.device, "teacher": teacher.device}
        self.defaults = Settings.of(defaults or {}, "defaults")
        self.models = models or {}
        self.lora: LoRA | None = None
        self.loop: Optimization | None = None
        self._progress_bar: dict[str, Any] = {}

    def modes(self, keywords: Mapping[str, Any]) -> AbstractContextManager[None]:
        """The context for a method with these keywords: `deterministic` where it or `defaults` ask for it."""
        value = keywords.get("deterministic")
        wanted = arguments.flag("deterministic", self.defaults.deterministic if value is None else value)
        return deterministic(*self.devices.values()) if wanted else nullcontext()

    @alone()
    def to(self, device: str | torch.device | DeviceMap) -> Self:
        """Move to one device, or to one for each of "reasoner" and "teacher"; the decoder goes with the Reasoner.

        Frames go from the Reasoner's device to the Teacher's, and their gradients back. Raises InputError for an
        unknown part, a device that cannot be used, and a quantised Teacher that would have to move.
        """
        self.devices = find_devices(device)
        self.place()
        return self

    @property
    def device(self) -> torch.device:
        """The Reasoner's device."""
        return self.devices["reasoner"]

    @property
    def dtype(self) -> torch.dtype:
        """The Reasoner's dtype."""
        return self.reasoner.dtype

    def enable_model_cpu_offload(self, device: str | torch.device | DeviceMap | None = None) -> None:
        """Keep idle networks in main memory (`offload`), and compute on `device`; None is the GPU, if there is one."""
        self.offload = True
        self.to(find_devices(device))

    def share(self, ranks: Ranks) -> None:
        """Work on every call together with the other processes of `ranks`, which make the same calls.

        The transformers' tokens, and the frames that the Teacher encodes, are shared; the rest every rank does whole.
        Raises InputError for a Reasoner that cannot be shared.
        """
        check_ranks(self.reasoner, ranks)
        self.reasoner.ranks = self.teacher.ranks = ranks

    def set_progress_bar_config(self, **keywords: Any) -> None:
        """Set keywords of tqdm for the progress bars of calls, such as `disable=True`, as in diffusers."""
        self._progress_bar = keywords

    def showing(self, progress: bool) -> AbstractContextManager[None]:
        """The context in which the progress of a call is shown, by `set_progress_bar_config` if no one listens yet."""
        if not progress or self.reasoner.ranks.rank > 0:
            return listening()
        takers = listeners()
        return listening(*([bar(self._progress_bar)] if takers is None else takers))

    def place(self) -> None:
        """Move all networks to their devices; with `offload` all but the decoder to main memory."""
        self.reasoner.to(self.devices["reasoner"], networks=not self.offload)
        self.decoder.to(self.devices["reasoner"])
        if self.teacher.quantized or not self.offload:
            self.teacher.to(self.devices["teacher"])
        self.need()

    def need(self, *names: str) -> None:
        """With `offload`, move these networks to their devices and all others to main memory.

        names: keys of `Reasoner.networks`, or "teacher"; a quantised Teacher stays on its device.
        """
        if not self.offload:
            return
        parts: dict[str, Any] = dict(self.reasoner.networks)
        if not self.teacher.quantized:
            parts["teacher"] = self.teacher
        for name in sorted(parts, key=lambda name: name in names):  # those that leave make room for those that come
            home = self.devices["teacher" if name == "teacher" else "reasoner"]
            parts[name].to(home if name in names else torch.device("cpu"))

    def check_task(self, prompt: str) -> None:
        """Warn with a Notice where a packaged model gets a prompt that is outside of its families."""
        packaged = any(self.models.get(name, "").startswith("packaged/") for name in ("reasoner", "teacher"))
        if packaged and isinstance(prompt, str) and (note := unknown_task(prompt)):
            warnings.warn(note, Notice, stacklevel=2)

    @alone(nested=True)
    def write_queries(
        self, prompt: str, image: ImageInput | None = None, goal_image: ImageInput | None = None
    ) -> QuerySet:
        """The Teacher's queries for a task (see `Teacher.write_queries`). goal_image: see `Teacher.with_goal`."""
        self.check_task(prompt)
        self.need("teacher")
        return self.teacher.with_goal(goal_image).write_queries(prompt, image)

    @alone(nested=True)
    def answer(self, text: str, images: Sequence[ImageInput] = (), max_tokens: int = ANSWER_TOKENS) -> str:
        """The Teacher's answer to a request in free text (see `Teacher.answer`)."""
        self.need("teacher")
        return self.teacher.answer(text, images, max_tokens)

    @alone(nested=True)
    def sample(self, condition: Condition, noise: Noise, reasoner: Reasoner | None = None) -> Tensor:
        """The few-step video (F, 3, H, W) of the Reasoner with its present weights; float32 in [0, 1].

        reasoner: the Reasoner with other settings (`with_sampling`).
        """
        self.need("transformer")
        latents = (reasoner or self.reasoner).sample(condition, noise)
        self.need("vae")
        return self.reasoner.decode(latents)

    @alone(nested=True)
    def at_work(self, work: Callable[[], R], *, deterministic: bool) -> R:
        """The result of `work` on the models, in the modes of a call with this setting."""
        return work()

    @alone(nested=True)
    @torch.no_grad()
    def judge(
        self,
        video: Tensor,
        frame_indices: Sequence[int],
        queries: QuerySet,
        teacher: Teacher | None = None,
        settings: Settings | None = None,
    ) -> Tensor:
        """-log P(Yes) (1+M,) of each query on a decoded video (F, 3, H, W).

        teacher: the Teacher with a picture of the goal (`with_goal`). settings: of the windows; None: one window.
        """
        self.need("teacher")
        frames, fps = video[list(frame_indices)], self.reasoner.fps
        return window_losses(
            teacher or self.teacher, frames, frame_indices, fps, queries, settings or Settings(windows=1)
        )
