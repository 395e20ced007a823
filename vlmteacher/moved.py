"""Import paths of earlier releases: each still works for one release, with a warning that names the new path."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Sequence
from importlib import import_module
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType

MOVED = {
    "vlmteacher.engines": "vlmteacher.optimization.engines",
    "vlmteacher.memory_ladder": "vlmteacher.optimization.memory_ladder",
    "vlmteacher.reward": "vlmteacher.optimization.reward",
    "vlmteacher.lora_linear": "vlmteacher.lora.fused_layer",
    "vlmteacher.lora_files": "vlmteacher.lora.formats",
    "vlmteacher.run_folder": "vlmteacher.runs.folder",
    "vlmteacher.model_card": "vlmteacher.runs.model_card",
    "vlmteacher.hub": "vlmteacher.checkpoints.hub",
    "vlmteacher.weight_files": "vlmteacher.checkpoints.weight_files",
    "vlmteacher.pretrained": "vlmteacher.checkpoints.pretrained",
    "vlmteacher.workers": "vlmteacher.evaluation.workers",
    "vlmteacher.reasoners.few_step": "vlmteacher.reasoners.sampling",
    "vlmteacher.reasoners.wan_blocks": "vlmteacher.reasoners.wan.blocks",
    "vlmteacher.microworld.pointing": "recipes.microworld.teacher.pointing",
    "vlmteacher.microworld.train_teacher": "recipes.microworld.teacher.lesson",
    "vlmteacher.microworld.training": "recipes.microworld.training",
    "vlmteacher.ops.tiny_decoder": "vlmteacher.ops.surrogate_decoder",
}
"""Modules, by their old name."""

MOVED_NAMES = {
    "vlmteacher.optimization.Settings": "vlmteacher.settings",
    "vlmteacher.optimization.GUARDS": "vlmteacher.optimization.guards",
    "vlmteacher.optimization.frame_guards": "vlmteacher.optimization.guards",
    "vlmteacher.optimization.Optimization": "vlmteacher.optimization.loop",
    "vlmteacher.optimization.NonFiniteError": "vlmteacher.errors",
    "vlmteacher.optimization.teacher_frame_indices": "vlmteacher.optimization.frames",
    "vlmteacher.lora.add_lora": "vlmteacher.lora.adapter",
    "vlmteacher.lora.export_lora": "vlmteacher.lora.adapter",
    "vlmteacher.lora.lora_parameters": "vlmteacher.lora.adapter",
    "vlmteacher.lora.remove_lora": "vlmteacher.lora.adapter",
    "vlmteacher.decoders.TinyVideoDecoder": "vlmteacher.decoders.taehv:SurrogateDecoder",
    "vlmteacher.decoders.taehv.TinyVideoDecoder": "vlmteacher.decoders.taehv:SurrogateDecoder",
    "vlmteacher.reasoners.Condition": "vlmteacher.reasoners.condition",
    "vlmteacher.reasoners.Noise": "vlmteacher.reasoners.condition",
    "vlmteacher.reasoners.Reasoner": "vlmteacher.reasoners.base",
    "vlmteacher.reasoners.load_reasoner": "vlmteacher.reasoners.loading",
    "vlmteacher.reasoners.Settings": "vlmteacher.reasoners.sampling:SamplerSettings",
}
"""Names that left their module, and the module that has them; after a colon the new name, where it is another."""


class MovedFinder(MetaPathFinder, Loader):
    """Import a module of `MOVED` under its old name."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        return ModuleSpec(fullname, self) if fullname in MOVED else None

    def exec_module(self, module: ModuleType) -> None:
        name = module.__name__
        _warn(name, MOVED[name])
        try:
            sys.modules[name] = import_module(MOVED[name])  # the import system returns what stands here
        except ModuleNotFoundError as error:
            if error.name != "recipes":
                raise
            raise ImportError(
                f"{name} is now {MOVED[name]}, no part of the installed package: run from the root of the repository"
            ) from error


def moved_name(module: str, name: str) -> object:
    """The value of `name` that `module` had; for the `__getattr__` of a module. Raises AttributeError."""
    path = f"{module}.{name}"
    if path not in MOVED_NAMES:
        raise AttributeError(f"module {module!r} has no attribute {name!r}")
    home, _, renamed = MOVED_NAMES[path].partition(":")
    _warn(path, f"{home}.{renamed or name}")
    return getattr(import_module(home), renamed or name)


def _warn(old: str, new: str) -> None:
    warnings.warn(f"{old} is now {new}: the old path goes with the next release", FutureWarning, stacklevel=4)


sys.meta_path.append(MovedFinder())
