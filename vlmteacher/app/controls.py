"""What the controls of the page have alike."""

from __future__ import annotations

from typing import Any, TypeAlias

import gradio as gr

Update: TypeAlias = dict[Any, Any]
"""New values of controls."""

QUIETLY: dict[str, Any] = {"show_progress": "hidden", "api_visibility": "private", "concurrency_limit": None}
"""How events run: beside each other, without an animation, and not as an API."""

PICK = """element.addEventListener('click', (event) => {
    const button = event.target.closest('[data-pick]');
    if (button) trigger('click', { pick: button.dataset.pick });
});"""
"""Clicks on the buttons of a list go to the server with the name of what was picked."""


def html(value: str = "", **keywords: Any) -> gr.HTML:
    """A part of the page that is no control, in the page's own style."""
    return gr.HTML(value, apply_default_css=False, **keywords)


def picked(event: gr.EventData) -> str:
    """The name of what was picked in a list (see `PICK`)."""
    data = event._data
    return str(data.get("pick", "")) if isinstance(data, dict) else ""
