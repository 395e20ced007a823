"""A picture of a run: the loss, and P(Yes) of every query over the steps."""

from __future__ import annotations

from PIL import Image, ImageDraw, ImageFont

from vlmteacher.output import TeacherPipelineOutput
from vlmteacher.runs.charts import HEIGHT, WIDTH, Chart, line_chart

SCALE = 2  # pixels of a unit of a chart
LINE = 16  # units of a line of text above and below the charts
COLOURS = ("#1f77b4", "#d62728", "#2ca02c", "#9467bd", "#ff7f0e", "#17becf", "#8c564b", "#e377c2")
INK, FAINT = "#333333", "#cccccc"


def plot(output: TeacherPipelineOutput) -> Image.Image:
    """The charts of a run side by side, with the queries below; the dots at the right belong to the final video."""
    questions, steps, threshold = output.queries.questions, output.history, output.config["threshold"]
    charts = (
        line_chart(
            "loss",
            {"loss": [row["loss"] for row in steps]},
            levels={f"threshold {threshold:g}": threshold},
            ends={"loss": output.loss_after},
        ),
        line_chart(
            "P(Yes)",
            {question: [row["p_yes"][number] for row in steps] for number, question in enumerate(questions)},
            high=1.0,
            ends=dict(zip(questions, output.p_yes_after, strict=True)),
        ),
    )
    picture = Image.new("RGB", (2 * WIDTH * SCALE, (HEIGHT + LINE * (len(questions) + 2)) * SCALE), "white")
    draw, font = ImageDraw.Draw(picture), ImageFont.load_default(11 * SCALE)
    for number, chart in enumerate(charts):
        _draw(draw, font, chart, number * WIDTH)
    for number, question in enumerate(questions):
        x, y = (WIDTH + 40) * SCALE, (HEIGHT + LINE * (number + 1.5)) * SCALE
        draw.rectangle((x - 18, y - 6, x - 6, y + 6), COLOURS[number])
        draw.text((x, y), question, INK, font, anchor="lm")
    return picture


def _draw(draw: ImageDraw.ImageDraw, font: ImageFont.ImageFont | ImageFont.FreeTypeFont, chart: Chart, x0: int) -> None:
    left, _, right, bottom = chart.box

    def at(x: float, y: float) -> tuple[float, float]:
        return (x0 + x) * SCALE, (LINE + y) * SCALE

    for y, text in chart.y_ticks:
        draw.line([at(left, y), at(right, y)], FAINT)
        draw.text(at(left - 5, y), text, INK, font, anchor="rm")
    for x, text in chart.x_ticks:
        draw.text(at(x, bottom + 5), text, INK, font, anchor="mt")
    for y, text in chart.levels:
        draw.line([at(left, y), at(right, y)], INK)
        draw.text(at(left + 4, y - 2), text, INK, font, anchor="lb")
    for number, line in enumerate(chart.lines):
        colour = COLOURS[number % len(COLOURS)]
        points = [at(x, y) for x, y, _ in line["dots"]]
        draw.line(points, colour, 2 * SCALE, joint="curve")
        for x, y in [*points, *([at(*line["end"][:2])] if line["end"] else [])]:
            draw.circle((x, y), 2.5 * SCALE, colour)
    draw.text(at(left, -LINE + 2), f"{chart.label} over the steps", INK, font)
