"""Does LoRA over 4 bits learn as much as over 16? Losses on five domains, seed by seed, over each kind of base.

    python benchmarks/qlora.py --data MIXTURE                                    # about 12 minutes on 2 idle cores
    python benchmarks/qlora.py --data MIXTURE --steps 600 --rows 4000            # longer
    python benchmarks/qlora.py --data MIXTURE --steps 2 --seeds 1 --held-out 8   # to see that it works

The arms differ in the base's weights, in the optimizer's memory or in the pair's start alone: same rows, order and
steps for each seed (`mixture.py`). A difference is paired: an arm's loss minus that of the arm over the weights as they
are, with the same seed on the same domain. It is within the seeds' spread if its mean is no larger than one standard
deviation, over the seeds, of the mean over domains that LoRA over 16 bits comes to. Results: results/qlora.csv (a row a
seed and domain) and results/qlora.png.

What it does not show: anything about large bases. A small base has less that is redundant, and loses more when it is
quantised. FP4 is there to show that a difference would be seen.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from mixture import (
    DOMAINS,
    Arm,
    Losses,
    Spread,
    add_options,
    losses_of,
    make_experiment,
    paired_difference,
    summarize,
)

from lorica.models.load import load_model, load_tokenizer

REFERENCE = "16 bits"


def make_arms(base: str, folder: Path) -> dict[str, Arm]:
    """What each arm changes. NF4's and FP4's plain scales are float32; with double quantisation they take 8 bits."""
    double = {"quant": "nf4", "double_quant": True}
    return {
        REFERENCE: {},
        "nf4": {"model": {"quant": "nf4", "double_quant": False}},
        "nf4, double": {"model": double},
        # So little memory that most of even LoRA's moments are paged.
        "nf4, double, paged 8-bit AdamW": {
            "model": double,
            "train": {"optimizer_bits": 8, "optimizer_memory": "256KiB"},
        },
        "nf4, double, loftq": {"model": double, "method": {"init": "loftq"}},
        "fp4": {"model": {"base": str(save_fp4(base, folder / "fp4-base"))}},
    }


def save_fp4(base: str, folder: Path) -> Path:
    """The base with bitsandbytes' FP4 weights, as a checkpoint of its own."""
    if not folder.exists():
        load_tokenizer(base).save_pretrained(folder)
        load_model(base, quant="fp4", double_quant=False).save_pretrained(folder)
    return folder


def show(results: dict[str, Losses]) -> None:
    """Losses by domain, and each arm's paired difference from the reference."""
    print("| arm |", " | ".join(DOMAINS), "| all |")
    print("|---" + "|---:" * (len(DOMAINS) + 1) + "|")
    for name, losses in results.items():
        print(f"| {name} |", " | ".join(written(summarize(losses, domain)) for domain in (*DOMAINS, None)), "|")
    reference = results[REFERENCE]
    spread = summarize(reference).deviation
    print(f"\n| minus {REFERENCE} | mean | 95 % interval | within the seeds' spread ({spread:.4f})? |")
    print("|---|---:|---|---|")
    for name, losses in results.items():
        if name != REFERENCE:
            mean, low, high = paired_difference(losses, reference)
            verdict = "yes" if abs(mean) <= spread else "no"
            print(f"| {name} | {mean:+.4f} | {low:+.4f} to {high:+.4f} | {verdict} |")


def written(spread: Spread) -> str:
    return f"{spread.mean:.3f} ± {spread.deviation:.3f}"


def draw(results: dict[str, Losses], title: str, file: Path) -> None:
    """Each arm's paired differences: a dot a seed and domain, their mean and interval, and the seeds' spread."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    reference = results[REFERENCE]
    names = [name for name in results if name != REFERENCE]
    spread = summarize(reference).deviation
    figure, axis = plt.subplots(figsize=(9, 0.7 * len(names) + 1.8), layout="constrained")
    axis.axvspan(-spread, spread, color="0.9", label="one standard deviation over seeds of 16 bits")
    colours = dict(zip(DOMAINS, ("#20639b", "#3caea3", "#d9a21b", "#ed553b", "#7d5ba6"), strict=True))
    for row, name in enumerate(names):
        for domain, colour in colours.items():
            pairs = [key for key in reference if key[1] == domain and key in results[name]]
            values = [results[name][key] - reference[key] for key in pairs]
            label = domain if row == 0 else None
            axis.plot(values, [row - 0.18] * len(values), "o", color=colour, markersize=4, alpha=0.8, label=label)
        mean, low, high = paired_difference(results[name], reference)
        axis.errorbar([mean], [row + 0.12], xerr=[[mean - low], [high - mean]], fmt="D", color="black", capsize=3)
    axis.set_yticks(range(len(names)), names)
    axis.set_ylim(len(names) - 0.5, -0.5)
    axis.set_xlabel("loss minus that over 16 bits, nats a token")
    axis.grid(axis="x", alpha=0.3)
    axis.spines[["top", "right"]].set_visible(False)
    axis.legend(fontsize=8, ncols=3, loc="upper center", bbox_to_anchor=(0.5, -0.25), frameon=False)
    figure.suptitle(title)
    figure.savefig(file, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_options(parser, "qlora", steps=90)
    parser.add_argument("--arms", type=int, help="only the first so many arms")
    arguments = parser.parse_args()
    experiment = make_experiment(arguments)
    arms = list(make_arms(arguments.base, experiment.folder).items())[: arguments.arms]
    results = {name: losses_of(experiment.run(name, arm)) for name, arm in arms}
    show(results)
    title = f"{arguments.base}, {arguments.steps} steps of {arguments.batch_tokens:,} tokens, {arguments.seeds} seeds"
    draw(results, title, experiment.table.with_suffix(".png"))


if __name__ == "__main__":
    main()
