"""What the tables of `hydra.py` say of HydraLoRA's claims (arXiv 2404.19245), by rule.

A claim holds if the 95 % interval of its paired difference lies wholly on its side of zero, the opposite holds if it
lies wholly on the other side, and else it is undecided. The intervals are those of `mixture.paired_difference`: seeds
and domains (or layers, or pairs) are drawn apart. With three seeds such an interval is too narrow rather than too wide,
and of a dozen intervals one can be expected to miss zero by chance more often than one in twenty: read "holds" as "is
worth more seeds".
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from mixture import DOMAINS, Difference, Losses, losses_of, paired_difference, summarize

BASE, REFERENCE = "base", "lora"
Row = dict[str, Any]
HOLDS, OPPOSITE, UNDECIDED = "holds", "the opposite holds", "undecided"


class Claim(NamedTuple):
    """It holds if `minuend` minus `subtrahend`, losses of two arms, is below zero."""

    text: str
    minuend: str
    subtrahend: str


CLAIMS = (
    Claim("1. Hydra beats LoRA with as many parameters", "hydra", REFERENCE),
    Claim("2. Hydra beats LoRA of the same rank", "hydra", "lora-same-rank"),
    Claim("3a. The heads need a router: learned against equal gates", "hydra", "hydra-uniform"),
    Claim("3b. The router must be learned: against one that stays as drawn", "hydra", "hydra-frozen"),
    Claim("6a. Heads from components beat heads at zero", "hydra-components", "hydra"),
    Claim("6b. Heads from components beat heads at random", "hydra-components", "hydra-random"),
    Claim("7. LoRAs split by domain beat one LoRA", "lora-by-domain", REFERENCE),
)


def show(rows: Sequence[Row], layers: Sequence[Row], alike: Sequence[Row]) -> None:
    """Print every table, the claims last."""
    results = by_arm(rows)
    show_losses(results)
    show_differences(results)
    show_routers(layers)
    show_alike(alike)
    show_costs(rows)
    show_claims(results, layers, alike)


def by_arm(rows: Iterable[Row]) -> dict[str, Losses]:
    """Losses by arm, in the order of the rows."""
    rows = list(rows)
    return {arm: losses_of(r for r in rows if r["arm"] == arm) for arm in dict.fromkeys(r["arm"] for r in rows)}


def show_losses(results: dict[str, Losses]) -> None:
    print("\n| loss, nats a token |", " | ".join(DOMAINS), "| all |")
    print("|---" + "|---:" * (len(DOMAINS) + 1) + "|")
    for arm, losses in results.items():
        cells = [summarize(losses, domain) for domain in (*DOMAINS, None)]
        print(f"| {arm} |", " | ".join(f"{c.mean:.3f} ± {c.deviation:.3f}" for c in cells), "|")


def show_differences(results: dict[str, Losses]) -> None:
    if REFERENCE not in results:
        return
    print(f"\n| minus {REFERENCE} | mean | 95 % interval |\n|---|---:|---|")
    for arm, losses in results.items():
        if arm not in (BASE, REFERENCE):
            print(f"| {arm} | {_written(paired_difference(losses, results[REFERENCE]))} |")


def show_routers(layers: Sequence[Row]) -> None:
    """Means over layers and seeds."""
    names = ("nmi", "adjusted_nmi", "soft_nmi", "row_entropy", "load_entropy", "head_cosine")
    titles = ("NMI of top head and domain", "less chance", "soft NMI", "entropy of a token", "entropy of loads", "cosine of two heads")  # fmt: skip  # noqa: E501
    print("\n| routers |", " | ".join(titles), "|")
    print("|---" + "|---:" * len(names) + "|")
    for arm in dict.fromkeys(row["arm"] for row in layers):
        cells = []
        for name in names:
            values = [float(row[name]) for row in layers if row["arm"] == arm and row[name] != ""]
            cells.append(f"{np.mean(values):.3f}" if values else "")
        print(f"| {arm} |", " | ".join(cells), "|")


def show_alike(alike: Sequence[Row]) -> None:
    """Means over layers, seeds and domains."""
    if not alike:
        return
    print("\n| LoRAs by domain | matrix | cosine | subspace | of chance |\n|---|---|---:|---:|---:|")
    for title, is_wanted in (("one seed, two domains", _one_seed), ("two seeds, one domain", _two_seeds)):
        for matrix in ("A", "B"):
            found = [row for row in alike if is_wanted(row) and row["matrix"] == matrix]
            if found:
                cells = [f"{np.mean([float(r[name]) for r in found]):.3f}" for name in ("cosine", "subspace", "chance")]
                print(f"| {title} | {matrix} |", " | ".join(cells), "|")


def show_costs(rows: Sequence[Row]) -> None:
    """Means over seeds."""
    print("\n| cost of a run | lr | parameters | tokens | s in steps | joules |\n|---|---:|---:|---:|---:|---:|")
    for arm in dict.fromkeys(row["arm"] for row in rows if row["arm"] != BASE):
        runs = [row for row in rows if row["arm"] == arm and row["domain"] == DOMAINS[0]]
        tokens, seconds = (np.mean([float(row[name]) for row in runs]) for name in ("tokens", "seconds"))
        joules = [float(row["joules"]) for row in runs if row["joules"] != ""]
        energy = f"{np.mean(joules):,.0f}" if joules else "unreadable"
        lr, parameters = float(runs[0]["lr"]), int(runs[0]["parameters"])
        print(f"| {arm} | {lr:g} | {parameters:,} | {tokens:,.0f} | {seconds:.1f} | {energy} |")


def show_claims(results: dict[str, Losses], layers: Sequence[Row], alike: Sequence[Row]) -> None:
    print("\n| claim | difference | 95 % interval | at this scale |\n|---|---:|---|---|")
    for text, minuend, subtrahend in CLAIMS:
        if {minuend, subtrahend} <= results.keys():
            _say(text, paired_difference(results[minuend], results[subtrahend]), sign=-1)
    learned, frozen = (_agreement(layers, arm) for arm in ("hydra", "hydra-frozen"))
    if learned:
        _say(
            "4a. The router finds the domains: NMI less chance above zero",
            paired_difference(learned, dict.fromkeys(learned, 0.0)),
        )
    if learned and frozen:
        _say("4b. It learns them: NMI above that of a router as drawn", paired_difference(learned, frozen))
    for text, is_wanted in (
        ("5a. A's of two domains are more alike than B's, from one start", _one_seed),
        ("5b. The same for two seeds, whose A's start apart", _two_seeds),
    ):
        a, b = (_subspaces(alike, is_wanted, matrix) for matrix in ("A", "B"))
        if a:
            _say(text, paired_difference(a, b))


def _say(text: str, difference: Difference, sign: int = 1) -> None:
    print(f"| {text} | {_written(difference)} | {verdict(difference, sign)} |")


def _written(difference: Difference) -> str:
    return f"{difference.mean:+.4f} | {difference.low:+.4f} to {difference.high:+.4f}"


def verdict(difference: Difference, sign: int) -> str:
    """Of a claim that the difference has this sign."""
    low, high = sorted((sign * difference.low, sign * difference.high))
    return HOLDS if low > 0 else OPPOSITE if high < 0 else UNDECIDED


def _agreement(layers: Sequence[Row], arm: str) -> Losses:
    """NMI less chance, by seed and layer: a layer takes a domain's place in the bootstrap.

    Left out are layers where the rows were too few to tell in some seed of some arm.
    """
    untold = {row["layer"] for row in layers if row["soft_nmi"] != "" and row["adjusted_nmi"] == ""}
    found = [row for row in layers if row["arm"] == arm and row["adjusted_nmi"] != "" and row["layer"] not in untold]
    return {(int(row["seed"]), row["layer"]): float(row["adjusted_nmi"]) for row in found}


def _subspaces(alike: Sequence[Row], is_wanted: Callable[[Row], bool], matrix: str) -> Losses:
    """How far two spaces overlap, by seed (or the pair of them) and pair of domains (or the domain)."""
    found = [row for row in alike if is_wanted(row) and row["matrix"] == matrix]
    numbers = {seeds: number for number, seeds in enumerate(dict.fromkeys(row["seeds"] for row in found))}
    return {(numbers[row["seeds"]], row["domains"]): float(row["subspace"]) for row in found}


def _one_seed(row: Row) -> bool:
    one, two = row["seeds"].split("-")
    return bool(one == two)


def _two_seeds(row: Row) -> bool:
    return not _one_seed(row)


def draw(rows: Sequence[Row], title: str, file: Path) -> None:
    """Each arm's paired difference from the reference with its interval, over all domains and on each."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    results = by_arm(rows)
    if REFERENCE not in results:
        return
    reference = results[REFERENCE]
    arms = [arm for arm in results if arm not in (BASE, REFERENCE)]
    size = (14, 0.4 * len(arms) + 1.6)
    figure, axes = plt.subplots(1, len(DOMAINS) + 1, figsize=size, sharey=True, layout="constrained")
    for axis, domain in zip(axes, (None, *DOMAINS), strict=True):
        axis.axvline(0, color="0.6", linewidth=1)
        for place, arm in enumerate(arms):
            pairs = [{k: v for k, v in x.items() if domain in (None, k[1])} for x in (results[arm], reference)]
            mean, low, high = paired_difference(*pairs)
            colour = "#3caea3" if high < 0 else "#ed553b" if low > 0 else "0.35"
            axis.errorbar([mean], [place], xerr=[[mean - low], [high - mean]], fmt="o", color=colour, capsize=3)
        axis.set_title(domain or "all", fontsize=10)
        axis.grid(axis="x", alpha=0.3)
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].set_yticks(range(len(arms)), arms)
    axes[0].set_ylim(len(arms) - 0.5, -0.5)
    figure.supxlabel(f"loss minus that of {REFERENCE}, nats a token, with 95 % intervals", fontsize=10)
    figure.suptitle(title)
    figure.savefig(file, dpi=120)
    plt.close(figure)
