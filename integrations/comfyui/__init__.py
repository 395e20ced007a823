"""ComfyUI nodes: a Teacher optimises a LoRA for one prompt and picture. ComfyUI calls `comfy_entrypoint`."""

from __future__ import annotations

from typing import Any


async def comfy_entrypoint() -> Any:
    """The extension with the nodes; ComfyUI is imported here, so that the rest needs none."""
    from .nodes import TeacherExtension

    return TeacherExtension()
