"""`lorica quickstart`: the whole road in a few minutes, on a base and a data set that come with the package.

A fictional company's handbook is generated: facts that no base can know, records to put into sentences, small sums.
The embedded base is trained on it with LoRA, measured before and after on questions in words that training never used
and on records and sums that it never saw, merged, exported, and each step proved. Everything a step writes stays in the
output folder, run.yaml first: it is an ordinary run, to be repeated with `lorica train` and changed.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path

from lorica.assets.handbook import write_handbook
from lorica.config import DataConfig, EvalConfig, ModelConfig, RunConfig, TrainConfig, dump_yaml
from lorica.errors import ConfigError
from lorica.files import write_json
from lorica.methods.lora import LoRA
from lorica.recipes import console
from lorica.recipes.evaluate import EvaluationReport, Sample, Scores, evaluate
from lorica.recipes.export import ExportResult, export
from lorica.recipes.merge import MergeResult, check_free, merge
from lorica.recipes.report import markdown_table, run_sections
from lorica.recipes.train import TrainResult, train

# The score that fits each task's answers: one right answer, or one of several good sentences.
_HEADLINES = {"facts": "exact_match", "records": "bleu", "sums": "exact_match"}
_NAMES = {"exact_match": "exact match", "bleu": "BLEU", "rouge_l": "ROUGE-L", "chrf": "chrF"}


@dataclass(frozen=True)
class QuickstartResult:
    """What the quickstart made and measured. before, after: headline score of each task, 0 to 100. seconds: in all."""

    output: str
    report: str
    before: dict[str, float]
    after: dict[str, float]
    training: TrainResult
    merge: MergeResult
    export: ExportResult
    seconds: float


def quickstart(output: str | Path = "runs/quickstart", seed: int = 0) -> QuickstartResult:
    """Generate the handbook, train, measure, merge, export, and write a report, all under `output`.

    Raises:
        ConfigError: `output` exists and is no earlier quickstart.
    """
    output = _fresh(Path(output))
    started = time.monotonic()
    console.log(f"1/5  Writing the handbook of a company that does not exist to {output / 'handbook'}")
    handbook = write_handbook(output / "handbook", seed=seed)
    config = _config(output, handbook.train, handbook.evaluation, seed)
    (output / "run.yaml").write_text(dump_yaml(config), encoding="utf-8")
    console.log("2/5  Training")
    training = train(config)
    assert isinstance(training, TrainResult)
    run = Path(config.train.output)
    console.log("3/5  Measuring base and adapter on what was held out")
    evaluation = evaluate(run)
    assert isinstance(evaluation, EvaluationReport)
    console.log("4/5  Merging")
    merged = merge(run, output / "merged")
    console.log("5/5  Exporting for PEFT")
    exported = export(run, output / "peft")
    result = QuickstartResult(
        output=str(output),
        report=str(output / "report.md"),
        before={task: _headline(task, part.base) for task, part in evaluation.tasks.items()},
        after={task: _headline(task, part.adapter) for task, part in evaluation.tasks.items()},
        training=training,
        merge=merged,
        export=exported,
        seconds=time.monotonic() - started,
    )
    _write_report(output, result, evaluation)
    write_json(output / "quickstart.json", console.jsonable(result))
    _say_goodbye(result)
    return result


def _fresh(output: Path) -> Path:
    """`output`, or where an earlier quickstart stands there, the next free name beside it."""
    if not (output / "handbook").is_dir():
        check_free(output)
        return output
    for number in range(2, 1000):
        other = output.with_name(f"{output.name}-{number}")
        if not other.exists():
            return other
    raise ConfigError(f"{output} and its next 998 names are taken; give another --output.")


def _config(output: Path, train_rows: Path, eval_rows: Path, seed: int) -> RunConfig:
    return RunConfig(
        model=ModelConfig(base="embedded"),
        method=LoRA(rank=16, alpha=32.0),
        data=DataConfig(train=str(train_rows), eval=str(eval_rows), max_length=256),
        train=TrainConfig(
            output=str(output / "run"),
            epochs=8.0,
            lr=3e-3,
            batch_tokens=1024,
            warmup=0.05,
            eval_every=100,
            save_every=100,
            log_every=1,
            seed=seed,
        ),
        eval=EvalConfig(max_new_tokens=48, batch_size=64, max_samples=1000),
    )


def _headline(task: str, scores: Scores | None) -> float:
    value = getattr(scores, _HEADLINES[task])
    assert isinstance(value, float)
    return value


def _write_report(output: Path, result: QuickstartResult, evaluation: EvaluationReport) -> None:
    training, merged = run_sections(console.jsonable(result.training)), result.merge.agreement
    pages = [
        "# Quickstart report",
        "An 8M-parameter base that knows nothing of this company, before and after LoRA training on its handbook. The "
        "questions below use phrasings, and the records and sums use values, that no training row has.",
        markdown_table(("task", "rows", "model", "loss", "perplexity", *_NAMES.values()), _score_rows(evaluation)),
        "## Answers before and after",
        markdown_table(("prompt", "expected", "base", "adapter"), _answer_rows(evaluation)),
        "## Training",
        training[1],
        "![Loss and learning rate](run/curves.png)",
        "## Proofs",
        markdown_table(
            ("what", "value"),
            (
                ("adapter saved and read back: largest difference of a logit", f"{result.export.max_difference:g}"),
                ("merged folder read back: largest difference of a logit", f"{merged.max_difference:.3g}"),
                ("largest logit, to read that against", f"{merged.largest_logit:.3g}"),
                ("merged against adapted: KL divergence, nats a token", f"{merged.kl:.2g}"),
                ("share of the adapter's effect that merging keeps", f"{merged.kept:.2%}"),
                ("merged against adapted: same most likely token", f"{merged.top1:.1%}"),
                ("seconds for everything", f"{result.seconds:.0f}"),
            ),
        ),
        "## What stands in this folder",
        markdown_table(
            ("path", "what"),
            (
                ("`handbook/`", "the generated rows: training and held-out"),
                ("`run.yaml`", "the configuration; `lorica train run.yaml train.output=...` repeats the training"),
                ("`run/`", "the run: checkpoints, metrics, adapter"),
                ("`merged/`", "a plain Hugging Face folder with the adapter merged in"),
                ("`peft/`", "the adapter for `peft.PeftModel.from_pretrained`"),
            ),
        ),
    ]
    (output / "report.md").write_text("\n\n".join(pages) + "\n", encoding="utf-8")


def _score_rows(evaluation: EvaluationReport) -> list[list[str]]:
    rows = []
    for task, part in evaluation.tasks.items():
        for name, scores in (("base", part.base), ("adapter", part.adapter)):
            if scores is not None:
                rows.append([task, f"{part.num_samples:,}", name, *_figures(task, scores)])
    return rows


def _figures(task: str, scores: Scores) -> list[str]:
    figures = [f"{scores.loss:.3f}", f"{scores.perplexity:,.2f}"]
    for name in _NAMES:
        value = getattr(scores, name)
        text = "-" if value is None else f"{value:.1f}"
        figures.append(f"**{text}**" if name == _HEADLINES[task] else text)
    return figures


def _answer_rows(evaluation: EvaluationReport) -> list[list[str]]:
    """One answer of each task: the first of its held-out rows, whatever came of it."""
    first: dict[str | None, Sample] = {}
    for sample in evaluation.samples:
        first.setdefault(sample.task, sample)
    return [[s.prompt, s.references[0], s.base or "", s.adapter] for s in first.values()]


def _say_goodbye(result: QuickstartResult) -> None:
    rows = [
        [task, _NAMES[_HEADLINES[task]], f"{result.before[task]:.1f}", f"{result.after[task]:.1f}"]
        for task in result.after
    ]
    console.table("On held-out rows", ["task", "score", "before", "after"], rows, numeric=["before", "after"])
    console.log(f"Done in {console.human_seconds(result.seconds)}. The report: {result.report}")
    console.log(f"Ask it something: lorica chat {result.training.output}")
