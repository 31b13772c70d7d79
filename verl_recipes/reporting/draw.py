"""Charts as pictures by matplotlib: SVG for the page, whose colours follow the page's scheme, and curves.png.

A page with SVG needs no plotting library of its own: it opens at once and shows its charts without JavaScript. Plotly's
library is 4.8 MB and bokeh's 1.3 MB; all charts of the tiny run take 0.2 MB.
"""

import re
from collections.abc import Sequence
from io import StringIO
from typing import TYPE_CHECKING, Any

# Slow to import, so this module is imported late. A Figure needs no screen, unlike pyplot.
from matplotlib import rc_context
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from verl_recipes.reporting.charts import CHARTS, Chart, finished, lines_of
from verl_recipes.reporting.metrics import curves_of
from verl_recipes.run.folder import RunFolder, read_metrics

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# Lines in this order; report.css has them as --c0 to --c7, with others for dark. All stand out from the page by 3 to 1.
COLOURS = ("#2a6fb0", "#c8610a", "#1b8557", "#a8418a", "#7d7300", "#c0362f", "#6654c8", "#66707c")
DASHES = ("-", "--", ":", "-.")
INK, GRID = "#1c1e21", "#d0d4da"
# By term, of a run.
PANELS = ("reward", "well_formed", "response_tokens", "without_signal", "agreement", "parts_of_step")
FEW = 40  # points of a line whose points are shown
POINT: dict[str, Any] = {"fmt": "o", "markersize": 5, "capsize": 3, "linewidth": 1.4, "zorder": 3, "clip_on": False}


def looks(chart: dict[str, Any], line: dict[str, Any]) -> tuple[int, int]:
    """Colour and dash of a line: of one run a colour a metric; of several a colour a run, and a dash a metric."""
    if len({each["group"] for each in chart["lines"]}) > 1:
        dash = line["colour"] + line["group"] // len(COLOURS)  # the ninth run has the first one's colour
        return line["group"] % len(COLOURS), dash % len(DASHES)
    return line["colour"] % len(COLOURS), line["colour"] // len(COLOURS) % len(DASHES)


def plot_line(axis: "Axes", line: dict[str, Any], colour: str, dash: str) -> None:
    """One line with its band. Tests are points with bars, which nothing joins: between them nothing was measured."""
    steps, values, band = line["x"], line["y"], [line["low"], line["high"]] if "low" in line else None
    about: dict[str, Any] = {"color": colour, "label": f"{line['label']}{line['run'] and ', ' + line['run']}"}
    if line.get("test"):
        bars = [[abs(end - y) for end, y in zip(ends, values, strict=True)] for ends in band] if band else None
        axis.errorbar(steps, values, bars, **about, **POINT)
        return
    if band:
        axis.fill_between(steps, *band, color=colour, alpha=0.18, linewidth=0)
    if len(steps) < FEW:
        about |= {"marker": "o", "markersize": 2.4}
    axis.plot(steps, values, linestyle=dash, linewidth=1.5, **about)


def plot(axis: "Axes", chart: dict[str, Any]) -> None:
    """Draw a chart's lines. What cannot be negative is seen from 0."""
    for line in chart["lines"]:
        colour, dash = looks(chart, line)
        plot_line(axis, line, COLOURS[colour], DASHES[dash])
    axis.spines[["top", "right", "left"]].set_visible(False)
    axis.spines["bottom"].set_color(GRID)
    axis.grid(axis="y", color=GRID, linewidth=0.7)
    axis.tick_params(length=0, labelsize=8.5, colors=INK)
    axis.set_axisbelow(True)
    axis.margins(x=0.02)
    axis.xaxis.set_major_locator(MaxNLocator(6, integer=True, steps=[1, 2, 5, 10]))
    if all(value >= 0 for line in chart["lines"] for value in line.get("low", line["y"])):
        axis.set_ylim(0)


def svg(chart: dict[str, Any], number: int, size: tuple[float, float]) -> dict[str, Any]:
    """A chart as SVG, and where its axes are.

    Args:
        number: of the chart on the page; it makes ids unique.
        size: width and height in inches of 72 units.

    Returns:
        `svg`, and `box`: left, right, top and bottom of the axes in the SVG's units, and the steps at left and right.
    """
    out, nothing = StringIO(), dict.fromkeys(("Date", "Creator", "Format", "Type"))
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": "report"}):
        figure = Figure(figsize=size)
        axis = figure.subplots()
        plot(axis, chart)
        axis.set_xlabel("step", color=INK)
        figure.subplots_adjust(0.085, 0.14, 0.985, 0.97)
        figure.savefig(out, format="svg", transparent=True, metadata=nothing)
    place, width, height = axis.get_position(), *(72 * each for each in size)
    box = [place.x0 * width, place.x1 * width, (1 - place.y1) * height, (1 - place.y0) * height, *axis.get_xlim()]
    return {"svg": for_page(out.getvalue(), number), "box": [round(float(each), 2) for each in box]}


def for_page(text: str, number: int) -> str:
    """matplotlib's SVG with the page's colours, and without fonts, sizes, and ids that nothing names."""
    (view,) = re.findall(r'viewBox="([\d .]+)"', text)
    body = re.search(r"<svg[^>]*>(.*)</svg>", text, re.S)
    assert body
    inner = re.sub(r"<metadata>.*?</metadata>|<style.*?</style>|<!--.*?-->", "", body[1], flags=re.S)
    inner = re.sub(r'font[-a-z]*:[^;"]*;? ?| transform="rotate\(-0[^"]*"', "", inner)
    named = set(re.findall(r'(?:href="#|url\(#)([\w.-]+)', inner))
    inner = re.sub(r' id="([\w.-]+)"', lambda each: each[0] if each[1] in named else "", inner)
    inner = re.sub(r'(id="|href="#|url\(#)(?=[\w.-]+)', rf"\g<1>c{number}-", inner)
    inner = re.sub(r"\d+\.\d{3,}", lambda each: f"{float(each[0]):.2f}", inner)
    for colour, name in [*((colour, f"var(--c{i})") for i, colour in enumerate(COLOURS)), (GRID, "var(--line)")]:
        inner = inner.replace(colour, name)
    inner = re.sub(r">\s+<", "><", inner.replace(INK, "currentColor"))
    return f'<svg viewBox="{view}" aria-hidden="true" focusable="false">{inner}</svg>'


def picture(run: RunFolder, title: str, charts: Sequence[Chart] = ()) -> None:
    """Write curves.png from the metrics alone: these charts, or those of PANELS."""
    curves = curves_of(read_metrics(run))
    chosen = charts or [chart for term in PANELS for chart in CHARTS if chart.term == term]
    rows, columns, size = (2, 3, (12, 6.4)) if len(chosen) > 1 else (1, 1, (8, 4.5))
    figure = Figure(figsize=size, layout="constrained")
    for axis, each in zip(figure.subplots(rows, columns, squeeze=False).flat, chosen, strict=True):
        chart = finished(each, "metric", lines_of(each, [curves]))
        axis.set_title(f"{chart['title']} ({chart['unit']})", fontsize=9)
        if not chart["lines"]:
            said = "\n".join(chart["said"]) or "not recorded"
            axis.set_axis_off()
            axis.text(0.5, 0.5, said, ha="center", va="center", transform=axis.transAxes, color="gray", fontsize=8.5)
            continue
        plot(axis, chart)
        if (number := len(chart["lines"])) > 1:
            low, high = axis.get_ylim()
            axis.set_ylim(low, high + 0.1 * number * (high - low))  # so that the legend stands above the lines
            axis.legend(fontsize=7.5, edgecolor="none", loc="upper left", borderaxespad=0.1)
    for axis in figure.axes[-3:]:
        axis.set_xlabel("step", fontsize=9)
    figure.suptitle(title, parse_math=False)  # a name may hold dollar signs
    figure.savefig(run.curves, dpi=110)
