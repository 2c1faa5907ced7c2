"""What a run's routers do, as a picture and as the paragraphs of a report; the figures come from `methods/gates.py`.

The picture has a row a layer, those of one kind (all q_proj, all k_proj, ...) behind one another from the first to the
last, and in each panel a column a head: all tokens together, then those of each component's rows. White is the even
share, so a white picture is a router that decides nothing, and panels that differ are heads that follow components.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from lorica.methods.gates import GateSummary
from lorica.recipes import console
from lorica.recipes.report import markdown_table
from lorica.recipes.routing import FILE, PICTURE, Routing, mean

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_BLUE, _ORANGE, _GREY = "#2563a8", "#d97706", "#6b7280"
_LEAST_CONTRAST = 0.05
"""Gates nearer to the even share than this are not blown up to full colour."""
_MAX_TITLE, _MAX_NAMED, _MAX_TICKS, _MAX_INCHES = 16, 8, 16, 4.0
"""Letters of a name, heads in a sentence and at an axis, width of a panel: a thousand heads can be reported too."""


def write_routing(folder: Path, routing: Routing) -> list[str]:
    """Write `routing.json` and `routing.png` into a run's folder; the paragraphs that the report has on them."""
    routing.save(folder / FILE)
    if routing.layers:
        draw_routing(routing, folder / PICTURE)
    return routing_sections(routing, PICTURE)


def by_kind(names: Iterable[str]) -> dict[str, list[str]]:
    """Layers in groups, by what their names say behind the first number: `self_attn.q_proj`."""
    kinds: dict[str, list[str]] = {}
    for name in names:
        kinds.setdefault(re.split(r"\.\d+\.", name, maxsplit=1)[-1], []).append(name)
    return kinds


def routing_sections(routing: Routing, picture: str) -> list[str]:
    """The report's paragraphs on routing, none where no layer is routed.

    picture: the file that `draw_routing` made, as seen from the report.
    """
    if not routing.layers:
        return []
    sections = [
        "## Routing",
        f"What the routers of {len(routing.layers)} layers do on {routing.rows}.",
        "\n".join(f"- {sentence}" for sentence in in_words(routing)),
        markdown_table(_TITLES, _rows(routing)),
        _EXPLAINED,
    ]
    if routing.components:
        apart = [
            (f"{k}: {name}", _text(mean(_apart(layer, k) for layer in routing.layers.values())))
            for k, name in enumerate(routing.components)
        ]
        sections.append(markdown_table(["component", "routed apart"], apart))
    return [*sections, f"![Mean gates by layer, head and component]({picture})"]


def show_routing(routing: Routing) -> None:
    """Print the table and the sentences."""
    if not routing.layers:
        return
    console.table(f"Routing on {routing.rows}", _TITLES, _rows(routing), numeric=_TITLES[1:])
    for sentence in in_words(routing):
        console.stdout().print(sentence)


def _rows(routing: Routing) -> list[list[str]]:
    """The means of each kind of layers, and of all."""
    return [
        [
            kind,
            str(len(names)),
            *(_text(mean(value(routing.layers[name]) for name in names)) for value in _COLUMNS.values()),
            _text(mean(routing.cosines[name].mean for name in names)),
        ]
        for kind, names in {**by_kind(routing.layers), "all": list(routing.layers)}.items()
    ]


def in_words(routing: Routing) -> list[str]:
    """Sentences on what a reader should know first: heads that do nothing or everything, and what routing follows."""
    layers = list(routing.layers.values())
    found = []
    idle = [[head for head, share in enumerate(layer.top_shares) if share < _IDLE] for layer in layers]
    if some := sum(map(bool, idle)):
        times = Counter(head for heads in idle for head in heads)
        which = ", ".join(f"head {head} in {number}" for head, number in times.most_common(_MAX_NAMED))
        which += ", ..." if len(times) > _MAX_NAMED else ""
        found.append(f"A head is on top of under {_IDLE:.0%} of the tokens in {_of(some, layers)}: {which}.")
    if sole := sum(max(layer.mean_gates) > _SOLE for layer in layers):
        found.append(
            f"One head has over {_SOLE:.0%} of the gates in {_of(sole, layers)}: little more than a plain LoRA."
        )
    if even := sum(layer.row_entropy > _EVEN for layer in layers):
        found.append(
            f"The gates of a token are nearly even in {_of(even, layers)}: there the router decides next to nothing."
        )
    if alike := sum(cosines.least > _ALIKE for cosines in routing.cosines.values()):
        found.append(f"All heads are alike, with cosines above {_ALIKE}, in {_of(alike, layers)}.")
    if not found:
        found = [
            "No head has collapsed: each is on top now and then in every layer, and none has nearly all of the gates."
        ]
    return [*found, _agreement_in_words(routing)]


def _agreement_in_words(routing: Routing) -> str:
    if not routing.components:
        return (
            "Whether heads follow kinds of rows is not known: the rows name fewer than two tasks, and this run looked "
            "for no components. A column `task`, or method.num_heads=auto, tells."
        )
    agreement = mean(layer.adjusted_nmi for layer in routing.layers.values())
    if agreement is None:
        return "The rows are too few to tell whether heads follow components."
    gates = _text(mean(layer.soft_nmi for layer in routing.layers.values()))
    return (
        f"Top heads follow the {len(routing.components)} components by {agreement:.3f} (adjusted NMI: 0 = as by "
        f"chance, 1 = wholly), the gates themselves by {gates}."
    )


def _of(number: int, layers: Sequence[object]) -> str:
    return f"{number} of {len(layers)} layers"


_IDLE, _SOLE, _EVEN, _ALIKE = 0.01, 0.9, 0.99, 0.99
"""What counts as collapse: see `in_words`. Entropy of 0.99 are gates of 0.44 and 0.56 of two heads."""

_COLUMNS: Mapping[str, Callable[[GateSummary], float | None]] = {
    "busiest head": lambda layer: max(layer.mean_gates),
    "idlest head": lambda layer: min(layer.mean_gates),
    "on top": lambda layer: max(layer.top_shares),
    "undecided": lambda layer: layer.row_entropy,
    "even load": lambda layer: layer.load_entropy,
    "NMI": lambda layer: layer.nmi,
    "adjusted": lambda layer: layer.adjusted_nmi,
    "soft": lambda layer: layer.soft_nmi,
}
_TITLES = ["layers of", "number", *_COLUMNS, "head cosine"]
_EXPLAINED = """Means over layers; `routing.json` has each layer. Heads are numbered from 0 in each layer by
itself, so none is averaged over layers.

- busiest head, idlest head: the largest and the smallest mean gate of a head.
- on top: the share of tokens on which the head that wins most often has the largest gate.
- undecided: entropy of a token's gates, 1 = all alike, 0 = one head.
- even load: entropy of the mean gates, 1 = all heads do as much, 0 = one does all.
- NMI: agreement of the top head with the row's component, 0 to 1; adjusted: less what as many rows show by chance;
  soft: agreement of the gates themselves, low while they are mild.
- head cosine: how alike two heads are, 1 = the same, 0 = nothing in common.
- routed apart: how much of a component's gates lies on other heads than all tokens' gates do, 0 to 1."""


def _apart(layer: GateSummary, component: int) -> float | None:
    """Total variation between a component's mean gates and those of all rows."""
    gates = layer.by_component[component]
    if gates is None:
        return None
    return sum(abs(one - other) for one, other in zip(gates, layer.mean_gates, strict=True)) / 2


def _text(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


def draw_routing(routing: Routing, file: Path) -> None:
    """The heat map of at least one layer, see above; beside it how undecided each layer is, and how it agrees."""
    from matplotlib.colors import TwoSlopeNorm
    from matplotlib.figure import Figure

    kinds = by_kind(routing.layers)
    layers = [routing.layers[name] for names in kinds.values() for name in names]
    num_heads = len(layers[0].mean_gates)
    even = 1 / num_heads
    tables = {"all tokens": [layer.mean_gates for layer in layers]}
    for k, name in enumerate(routing.components):
        tables[_title(k, name)] = [layer.by_component[k] or (float("nan"),) * num_heads for layer in layers]
    drawn = [gate for table in tables.values() for row in table for gate in row if not math.isnan(gate)]
    contrast = max(_LEAST_CONTRAST, *(abs(gate - even) for gate in drawn))
    norm = TwoSlopeNorm(even, max(0.0, even - contrast), even + contrast)

    widths = [min(_MAX_INCHES, 0.3 + 0.22 * num_heads)] * len(tables) + [1.6]
    height = min(9.0, max(3.6, 1.6 + 0.035 * len(layers) + 0.1 * len(kinds)))
    figure = Figure(figsize=(2.4 + sum(widths), height), layout="constrained")
    *panels, last = figure.subplots(1, len(tables) + 1, sharey=True, width_ratios=widths)
    for panel, (title, table) in zip(panels, tables.items(), strict=True):
        image = panel.imshow(table, cmap="RdBu_r", norm=norm, aspect="auto", interpolation="nearest")
        panel.set_title(title, fontsize="small")
        panel.set_xticks(range(0, num_heads, math.ceil(num_heads / _MAX_TICKS)))
        panel.tick_params(length=0)
        panel.spines[:].set_visible(False)
        panel.set_facecolor("#d1d5db")
    panels[0].set_xlabel("head")
    _mark_kinds(panels[0], kinds, [*panels, last])
    _draw_lines(last, layers)
    bar = figure.colorbar(image, ax=[*panels, last], shrink=0.6, pad=0.01)
    bar.set_label(f"mean gate (white: the even share, {even:.3g})", fontsize="small")
    bar.ax.tick_params(labelsize="small")
    bar.outline.set_visible(False)
    figure.savefig(file, dpi=130)


def _mark_kinds(first: Axes, kinds: Mapping[str, Sequence[str]], panels: Sequence[Axes]) -> None:
    """A name in the middle of each group of rows, and a line between two."""
    begin, middles = 0, []
    for group in kinds.values():
        if begin:
            for panel in panels:
                panel.axhline(begin - 0.5, color=_GREY, linewidth=0.8)
        middles.append(begin + (len(group) - 1) / 2)
        begin += len(group)
    first.set_yticks(middles, [_short(kind.rpartition(".")[2]) for kind in kinds])
    first.set_ylabel("layers of each kind, the first on top")


def _draw_lines(panel: Axes, layers: Sequence[GateSummary]) -> None:
    """Each layer's entropy and agreement, 0 to 1."""
    lines: Mapping[str, tuple[list[float | None], str]] = {
        "undecided": ([layer.row_entropy for layer in layers], _GREY),
        "even load": ([layer.load_entropy for layer in layers], _ORANGE),
        "NMI": ([layer.nmi for layer in layers], _BLUE),
    }
    for label, (values, colour) in lines.items():
        # What is None is not drawn.
        at = [float("nan") if value is None else value for value in values]
        if any(value is not None for value in values):
            panel.plot(at, range(len(at)), ".", markersize=3.5, color=colour, label=label)
    panel.set_xlim(-0.03, 1.03)
    panel.grid(alpha=0.25, axis="x")
    panel.spines[["top", "right"]].set_visible(False)
    panel.tick_params(axis="y", length=0)
    panel.legend(frameon=False, fontsize="small", loc="lower center", bbox_to_anchor=(0.5, 1.0), borderpad=0.1)


def _title(number: int, name: str) -> str:
    """What stands above a component's panel: its number alone where the font does not have its name."""
    from matplotlib.font_manager import findfont, get_font

    font = get_font(findfont("DejaVu Sans"))
    return _short(f"{number}: {name}") if all(font.get_char_index(ord(c)) for c in name) else f"component {number}"


def _short(text: str) -> str:
    """Names are texts of others: no TeX between dollars, and no more than fits above a panel."""
    return (text if len(text) <= _MAX_TITLE else f"{text[: _MAX_TITLE - 1]}…").replace("$", r"\$")
