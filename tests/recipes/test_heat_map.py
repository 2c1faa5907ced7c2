"""The table of routers by hand, and that their picture has its panels whatever the names and the gates are."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import matplotlib.figure
import pytest
import torch

from lorica.methods.gates import UNKNOWN, GateSummary, gate_sums, summarize_gates
from lorica.recipes.heat_map import by_kind, draw_routing, in_words, routing_sections, write_routing
from lorica.recipes.routing import Cosines, Routing


def sure(heads: list[int], labels: list[int], num_components: int, num_heads: int = 2) -> GateSummary:
    """A layer that gives each row to one head."""
    sums = gate_sums(torch.eye(num_heads)[heads], torch.tensor(labels), num_components)
    return summarize_gates(sums, num_samples=100)


def mixed(gates: list[float], num_rows: int = 4) -> GateSummary:
    """A layer whose router gives every row the same gates."""
    sums = gate_sums(torch.tensor([gates] * num_rows), torch.tensor([0, 1] * (num_rows // 2)), 2)
    return summarize_gates(sums, num_samples=100)


def routing(layers: dict[str, GateSummary], names: list[str], cosine: float = 0.25) -> Routing:
    """Every two heads with the same cosine."""
    return Routing("these rows", tuple(names), layers, {name: Cosines(cosine, cosine) for name in layers})


SORTED, FIRST_ONLY = sure([0, 0, 1, 1], [0, 0, 1, 1], 2), sure([0, 0, 0, 0], [0, 0, 1, 1], 2)


def test_the_table_has_the_means_by_kind() -> None:
    layers = {
        "model.layers.0.mlp.up_proj": SORTED,
        "model.layers.0.mlp.down_proj": FIRST_ONLY,
        "model.layers.1.mlp.up_proj": SORTED,
        "model.layers.1.mlp.down_proj": SORTED,
    }
    assert list(by_kind(layers)) == ["mlp.up_proj", "mlp.down_proj"]
    page = "\n".join(routing_sections(routing(layers, ["law", "code"]), "routing.png")).splitlines()
    # Sorted out: two heads at 1/2 each, even load, full agreement; less (2 - 1)(2 - 1) / (2 * 100) nats on both sides.
    # busiest, idlest, on top, undecided, even load, NMI, adjusted, soft, cosine
    for line in (
        "What the routers of 4 layers do on these rows.",
        "| mlp.up_proj | 2 | 0.500 | 0.500 | 0.500 | 0.000 | 1.000 | 1.000 | 1.000 | 1.000 | 0.250 |",
        "| mlp.down_proj | 2 | 0.750 | 0.250 | 0.750 | 0.000 | 0.500 | 0.500 | 0.500 | 0.500 | 0.250 |",
        "| all | 4 | 0.625 | 0.375 | 0.625 | 0.000 | 0.750 | 0.750 | 0.750 | 0.750 | 0.250 |",
        # Half of a component's gates lie on another head than all rows', in three layers of four.
        "| 0: law | 0.375 |",
        "| 1: code | 0.375 |",
        "![Mean gates by layer, head and component](routing.png)",
    ):
        assert line in page


def test_without_components_or_layers_there_is_less_to_say(tmp_path: Path) -> None:
    page = routing_sections(routing({"layers.0.q": sure([0, 1], [UNKNOWN, UNKNOWN], 0)}, []), "x.png")
    assert "| q | 1 | 0.500 | 0.500 | 0.500 | 0.000 | 1.000 | - | - | - | 0.250 |" in page[3].splitlines()
    assert "looked for no components" in page[2] and not any("| component |" in part for part in page)
    assert write_routing(tmp_path, routing({}, ["a", "b"])) == [] and not (tmp_path / "routing.png").exists()


def test_collapse_is_said_in_words() -> None:
    layers = {
        "layers.0.q": sure([0, 1, 1, 1], [0, 0, 1, 1], 2, num_heads=3),
        "layers.1.q": sure([1, 1, 1, 1], [0, 0, 1, 1], 2, num_heads=3),
        "layers.2.q": mixed([0.34, 0.33, 0.33]),
        "layers.3.q": mixed([0.3, 0.4, 0.3]),
    }
    found = in_words(routing(layers, ["law", "code"]))
    assert found[:3] == [
        "A head is on top of under 1% of the tokens in 4 of 4 layers: head 2 in 4, head 0 in 2, head 1 in 1.",
        "One head has over 90% of the gates in 1 of 4 layers: little more than a plain LoRA.",
        # 0.3 / 0.4 / 0.3 has 0.991 of log 3.
        "The gates of a token are nearly even in 2 of 4 layers: there the router decides next to nothing.",
    ]
    assert len(found) == 4 and found[3].startswith("Top heads follow the 2 components by 0.")
    same = in_words(routing(layers, ["law", "code"], cosine=0.999))
    assert same[3] == "All heads are alike, with cosines above 0.99, in 4 of 4 layers."


def test_what_has_not_collapsed_is_not_complained_about() -> None:
    fine = {"layers.0.q": SORTED}
    assert in_words(routing(fine, ["law", "code"])) == [
        "No head has collapsed: each is on top now and then in every layer, and none has nearly all of the gates.",
        "Top heads follow the 2 components by 1.000 (adjusted NMI: 0 = as by chance, 1 = wholly), the gates themselves "
        "by 1.000.",
    ]
    few = {"layers.0.q": summarize_gates(gate_sums(torch.eye(2), torch.tensor([0, 1]), 2), num_samples=0)}
    assert in_words(routing(few, ["law", "code"]))[1].startswith("The rows are too few")


@pytest.mark.parametrize("names", [["law", "code"], ["$x$ of _y", "中文法律"], ["a" * 90, ""]])
def test_the_picture_has_a_panel_for_all_rows_and_each_component(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, names: list[str]
) -> None:
    figures: list[Any] = []
    save = matplotlib.figure.Figure.savefig
    monkeypatch.setattr(
        matplotlib.figure.Figure, "savefig", lambda figure, *a, **k: (figures.append(figure), save(figure, *a, **k))
    )
    layers = {"layers.0.q_proj": SORTED, "layers.1.q_proj": FIRST_ONLY, "layers.0.up_proj": SORTED}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        draw_routing(routing(layers, names), tmp_path / "routing.png")
    assert (tmp_path / "routing.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    panels = figures[0].axes
    everything, first, second = (panel.images[0].get_array().tolist() for panel in panels[:3])
    assert everything == [[0.5, 0.5], [1, 0], [0.5, 0.5]]
    assert first == [[1, 0], [1, 0], [1, 0]] and second == [[0, 1], [1, 0], [0, 1]]
    assert panels[2].get_title() == {"code": "1: code", "中文法律": "component 1", "": "1: "}[names[1]]


@pytest.mark.parametrize(
    "layers",
    [
        {"q": sure([0, 0], [0, UNKNOWN], 2)},
        {f"layers.{n}.q": sure([0] * 8, [UNKNOWN] * 8, 2, num_heads=1) for n in range(40)},
        {"q": summarize_gates(gate_sums(torch.full((3, 9), 1 / 9), torch.tensor([0, 1, 1]), 2), 0)},
        {"q": sure([0, 1, 2, 3], [0, 0, 1, 1], 2, num_heads=1024)},
    ],
    ids=["a component without rows", "one head", "even", "a thousand heads"],
)
def test_any_routers_can_be_drawn(tmp_path: Path, layers: dict[str, GateSummary]) -> None:
    drawn = routing(layers, ["a", "b"])
    draw_routing(drawn, tmp_path / "routing.png")
    assert all(len(part) < 1500 for part in routing_sections(drawn, "routing.png"))
    assert (tmp_path / "routing.png").stat().st_size > 1000
