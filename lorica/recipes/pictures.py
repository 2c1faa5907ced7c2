"""The pictures of more than one run: what a sweep found, the curves of runs side by side, the map of the components.

Names and values are texts of others, so they are drawn as they are: no TeX between dollars, and a legend made of
handles, since matplotlib leaves out labels that begin with an underscore.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lorica.recipes.arms import short_keys
from lorica.recipes.report import smooth
from lorica.strict_yaml import dump_value

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from lorica.data.components import Components
    from lorica.recipes.sweep import ArmResult

# Okabe & Ito: told apart by the colour-blind too. A ninth run begins them anew, dashed.
_COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#e69f00", "#000000", "#7f7f7f")
_STYLES = ("-", "--", ":", "-.")
_MAX_NAME = 40
_FITTING_TEXT = 36  # characters under a panel


def draw_sweep(results: Sequence[ArmResult], file: Path) -> None:
    """Evaluation loss against each swept key, a panel a key; with two keys, a colour for each value of the other.

    Lines join arms that were trained equally far, solid to the end: other losses cannot be compared.
    """
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

    keys = list(results[0].values)
    num_columns = min(len(keys), 3)
    num_rows = math.ceil(len(keys) / num_columns)
    size = (max(6.4, 4.6 * num_columns), 3.8 * num_rows + 0.9)
    figure = Figure(figsize=size, layout="constrained")
    panels = list(figure.subplots(num_rows, num_columns, squeeze=False, sharey=True).flat)
    names = short_keys(keys)
    for key, panel in zip(keys, panels, strict=False):
        others = [other for other in keys if other != key] if len(keys) == 2 else []
        _draw_key(panel, results, key, others, names)
    for panel in panels[len(keys) :]:
        panel.set_visible(False)
    for row in range(num_rows):
        panels[row * num_columns].set_ylabel("lowest evaluation loss (nats a token)")
    grey: dict[str, Any] = {"color": "#6b7280", "linestyle": "", "markersize": 7}
    found = {result.status for result in results}
    marks = [Line2D([], [], marker="o", label="trained to the end", **grey)]
    if "stopped" in found:
        marks.append(Line2D([], [], marker="o", markerfacecolor="none", label="stopped early", **grey))
    if found - {"finished", "stopped"}:
        marks.append(Line2D([], [], marker="x", label="diverged, or does not fit", **grey))
    if results[0].status == "finished":
        marks.append(Line2D([], [], marker="*", **{**grey, "color": "#b91c1c", "markersize": 11}, label="best"))
    figure.legend(handles=marks, loc="outside lower center", ncols=len(marks), frameon=False)
    figure.savefig(file, dpi=130)


def _draw_key(
    panel: Axes, results: Sequence[ArmResult], key: str, others: Sequence[str], names: Mapping[str, str]
) -> None:
    """One panel: a point an arm, filled where it was trained to the end, a cross at the top where it failed."""
    from matplotlib.lines import Line2D

    place = _scale(panel, [result.values[key] for result in results])
    groups: dict[str, list[ArmResult]] = {}
    for result in sorted(results, key=lambda result: place(result.values[key])):
        label = ", ".join(f"{names[other]} = {dump_value(result.values[other])}" for other in others)
        groups.setdefault(label, []).append(result)
    colours = {label: _COLOURS[i % len(_COLOURS)] for i, label in enumerate(sorted(groups, key=_natural))}
    for label, colour in colours.items():
        known = [(result, result.eval_loss) for result in groups[label] if result.eval_loss is not None]
        for reached in {_reached(result) for result, _ in known} if others else ():
            points = [(place(result.values[key]), loss) for result, loss in known if _reached(result) == reached]
            panel.plot(*zip(*points, strict=True), linestyle=":" if reached else "-", color=colour, alpha=0.6)
        for result in groups[label]:
            at = place(result.values[key])
            if result.eval_loss is None:
                panel.plot(at, 0.97, "x", color=colour, transform=panel.get_xaxis_transform())
            else:
                face = colour if result.status == "finished" else "none"
                panel.plot(at, result.eval_loss, "o", color=colour, markerfacecolor=face, markersize=6)
    best = results[0]
    if best.status == "finished" and best.eval_loss is not None:
        panel.plot(place(best.values[key]), best.eval_loss, "*", color="#b91c1c", markersize=12, zorder=5)
    _scale_losses(panel, [result.eval_loss for result in results if result.eval_loss is not None], 4)
    panel.margins(y=0.12)
    panel.set_xlabel(_short(key))
    if others:
        handles = [Line2D([], [], color=colour) for colour in colours.values()]
        panel.legend(handles, [_short(label) for label in colours], edgecolor="none", fontsize="small")
    _tidy(panel)


def _reached(result: ArmResult) -> int:
    """The step where an arm was stopped; 0 for one that came to its end, wherever that is."""
    return 0 if result.status == "finished" else result.step


def _scale_losses(panel: Axes, losses: Sequence[float], ratio: float) -> None:
    """A logarithmic y axis, with readable ticks, where the losses span more than `ratio`."""
    from matplotlib.ticker import LogLocator

    if losses and max(losses) > ratio * min(losses) > 0:
        panel.set_yscale("log")
        panel.yaxis.set_minor_locator(LogLocator(subs=(2, 5)))
        panel.yaxis.set_major_formatter("{x:g}")
        panel.yaxis.set_minor_formatter("{x:g}")


def _scale(panel: Axes, values: Sequence[Any]) -> Any:
    """Set up the x axis, with a tick at each value; what places a value on it.

    Numbers stand where they belong, logarithmically where they span a factor; evenly, as texts do, where two would be
    too near each other to be read.
    """
    distinct = {dump_value(value): value for value in values}
    labels = sorted(distinct, key=_natural)
    numbers = [distinct[label] for label in labels]
    numeric = all(isinstance(number, int | float) and not isinstance(number, bool) for number in numbers)
    logarithmic = numeric and min(numbers) > 0 and max(numbers) >= 4 * min(numbers)
    if numeric and _are_apart([math.log(number) for number in numbers] if logarithmic else numbers):
        panel.set_xscale("log" if logarithmic else "linear")
    else:
        numbers = list(range(len(labels)))
    where = dict(zip(labels, numbers, strict=True))
    panel.set_xticks(numbers, [_short(label) for label in labels])
    panel.xaxis.minorticks_off()
    if sum(len(_short(label)) + 1 for label in labels) > _FITTING_TEXT:
        panel.tick_params("x", rotation=25)
        for tick in panel.get_xticklabels():
            tick.set(horizontalalignment="right", rotation_mode="anchor")
    return lambda value: where[dump_value(value)]


def _are_apart(places: Sequence[float]) -> bool:
    """Whether sorted places are at least a twelfth of the axis apart."""
    gaps = [after - before for before, after in itertools.pairwise(places)]
    return all(gap >= (places[-1] - places[0]) / 12 for gap in gaps)


def draw_comparison(curves: Mapping[str, Sequence[Mapping[str, Any]]], file: Path) -> None:
    """Training loss, smoothed, and evaluation loss of each run over its steps; `curves` are rows of metrics.jsonl."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    num_columns = min(len(curves), 3)
    figure = Figure(figsize=(11, 4.4 + 0.25 * math.ceil(len(curves) / num_columns)), layout="constrained")
    left, right = figure.subplots(1, 2, sharex=True)
    for index, rows in enumerate(curves.values()):
        look: dict[str, Any] = {
            "color": _COLOURS[index % len(_COLOURS)],
            "linestyle": _STYLES[index // len(_COLOURS) % len(_STYLES)],
            "linewidth": 1.6,
        }
        steps = [row for row in rows if row.get("loss") is not None]
        losses = [row["loss"] for row in steps]
        left.plot([row["step"] for row in steps], smooth(losses), **look)
        evaluations = [row for row in rows if row.get("eval_loss") is not None]
        right.plot(
            [row["step"] for row in evaluations],
            [row["eval_loss"] for row in evaluations],
            marker="o",
            markersize=3.5,
            **look,
        )
    left.set_ylabel("training loss, smoothed (nats a token)")
    right.set_ylabel("evaluation loss (nats a token)")
    for panel in (left, right):
        panel.set_xlabel("optimizer step")
        panel.xaxis.set_major_locator(MaxNLocator("auto", integer=True))
        drawn = [float(loss) for line in panel.get_lines() for loss in line.get_ydata()]
        _scale_losses(panel, [loss for loss in drawn if math.isfinite(loss)], 20)
        _tidy(panel)
    # A run without steps has its name in the legend all the same.
    names = [_short(name) for name in curves]
    figure.legend(left.get_lines(), names, loc="outside lower center", ncols=num_columns, frameon=False)
    figure.savefig(file, dpi=130)


def _tidy(panel: Axes) -> None:
    panel.grid(alpha=0.25)
    panel.spines[["top", "right"]].set_visible(False)


def _natural(label: str) -> tuple[bool, float, str]:
    """Sorts numbers by their size, before texts."""
    number = label.rpartition("= ")[2]
    try:
        return False, float(number), ""
    except ValueError:
        return True, 0.0, label


def _short(text: str) -> str:
    short = text if len(text) <= _MAX_NAME else f"{text[: _MAX_NAME - 1]}…"
    return short.replace("$", r"\$")


def draw_components(found: Components, file: Path) -> None:
    """Rows of the sample in two dimensions, a colour a component, which the legend names by number and size."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.2, 5.6), layout="constrained")
    panel = figure.subplots()
    for label in range(-1, found.num):
        chosen = found.points[found.point_labels == label]
        if label < 0 and not len(chosen):
            continue
        name = "none" if label < 0 else f"{label}: {found.sizes[label]:,} rows"
        colour = "#c7c7c7" if label < 0 else _COLOURS[label % len(_COLOURS)]
        marker = "." if label < len(_COLOURS) else "x"
        panel.scatter(chosen[:, 0], chosen[:, 1], s=18, alpha=0.6, color=colour, marker=marker, label=name)
    panel.set_xticks([])
    panel.set_yticks([])
    panel.set_xlabel("first direction between components")
    panel.set_ylabel("second direction")
    panel.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside lower center", ncols=min(found.num, 4), frameon=False)
    figure.savefig(file, dpi=130)
