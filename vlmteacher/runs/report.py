"""report.html of a run folder."""

from __future__ import annotations

import html
from typing import Any


def report(record: dict[str, Any]) -> str:
    """An HTML page about a finished run. It loads only the videos beside it.

    record: the content of run.json.
    """
    questions = [record["queries"]["goal"], *record["queries"]["process"]]
    rows = "".join(
        f"<tr><td>{'goal' if number == 0 else 'process'}<td>{html.escape(question)}<td>{before:.2f}<td>{after:.2f}"
        for number, (question, before, after) in enumerate(
            zip(questions, record["p_yes_before"], record["p_yes_after"], strict=True)
        )
    )
    config = "".join(f"<tr><td>{html.escape(k)}<td>{html.escape(str(v))}" for k, v in record["config"].items())
    return f"""<!doctype html>
<html lang="en"><meta charset="utf-8"><title>vlmteacher: {html.escape(record["prompt"][:60])}</title>
<style>
body {{ font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; color: #222 }}
figure {{ display: inline-block; margin: 0 1rem 1rem 0 }}
video {{ width: 20rem; max-width: 100%; image-rendering: pixelated }}
table {{ border-collapse: collapse; margin: 1rem 0 }}
td, th {{ padding: .2rem .8rem; border-bottom: 1px solid #ddd; text-align: left }}
svg {{ width: 100%; max-width: 40rem }}
</style>
<h1>{html.escape(record["prompt"])}</h1>
<figure><video src="before.mp4" controls autoplay loop muted></video><figcaption>before</figcaption></figure>
<figure><video src="after.mp4" controls autoplay loop muted></video><figcaption>after {record["updates"]} updates \
(stopped: {record["stopped"]})</figcaption></figure>
<table><tr><th><th>question<th>P(Yes) before<th>P(Yes) after{rows}</table>
<h2>Loss</h2>
{loss_curve([row["loss"] for row in record["steps"]], record["config"]["threshold"])}
<h2>Settings</h2>
<table>{config}</table>
</html>
"""


def loss_curve(losses: list[float], threshold: float) -> str:
    """The loss over the steps and the threshold, as an SVG drawing."""
    width, height, margin = 640, 240, 40
    top = max([*losses, threshold]) * 1.05
    x = [margin + i * (width - 2 * margin) / max(len(losses) - 1, 1) for i in range(len(losses))]

    def y(value: float) -> float:
        return height - margin - value / top * (height - 2 * margin)

    points = " ".join(f"{a:.1f},{y(b):.1f}" for a, b in zip(x, losses, strict=True))
    dots = "".join(f'<circle cx="{a:.1f}" cy="{y(b):.1f}" r="2.5"/>' for a, b in zip(x, losses, strict=True))
    return (
        f'<svg viewBox="0 0 {width} {height}" role="img" aria-label="loss over the steps" font-size="12">'
        f'<path d="M{margin},{margin}V{height - margin}H{width - margin}" fill="none" stroke="#999"/>'
        f'<line x1="{margin}" x2="{width - margin}" y1="{y(threshold):.1f}" y2="{y(threshold):.1f}" '
        f'stroke="#c33" stroke-dasharray="4"/>'
        f'<text x="{width - margin}" y="{y(threshold) - 4:.1f}" text-anchor="end" fill="#c33">'
        f"threshold {threshold:g}</text>"
        f'<polyline points="{points}" fill="none" stroke="#36c" stroke-width="2"/><g fill="#36c">{dots}</g>'
        f'<text x="{margin - 4}" y="{margin}" text-anchor="end">{top:.2f}</text>'
        f'<text x="{margin - 4}" y="{height - margin}" text-anchor="end">0</text>'
        f'<text x="{width / 2}" y="{height - 8}" text-anchor="middle">step</text></svg>'
    )
