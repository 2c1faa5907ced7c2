"""`lorica compare`: what differs between runs, how their losses went, what came out, what they answer.

It reads what the runs left: config.yaml, metrics.jsonl, result.json, and the answers of `lorica eval` in
evaluation.json. Nothing is loaded unless new answers are asked for. A run that is unfinished or damaged is shown with
what it has, and a note says what is missing. What it gives up: whether a difference is more than chance.
"""

from __future__ import annotations

import gc
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from lorica.config import Resolved, RunConfig, load_config
from lorica.data.rows import Example
from lorica.errors import ConfigError, LoricaError
from lorica.evaluate.compact import compact
from lorica.evaluate.generation import generate as generate_ids
from lorica.evaluate.generation import unanswerable
from lorica.files import read_json_object
from lorica.recipes import console
from lorica.recipes.evaluate import shortened, spread
from lorica.recipes.opening import open_model
from lorica.recipes.pictures import draw_comparison
from lorica.recipes.preparing import base_config, prepare
from lorica.recipes.report import energy_text
from lorica.recipes.routing import MEANS
from lorica.recipes.tasks import answering
from lorica.recipes.train import RESULT
from lorica.strict_yaml import dump_value
from lorica.training.metrics import read_metrics

SHOWN_SAMPLES = 3
MAX_COLUMNS = 4
"""Of more runs than this, each is a row."""
PICTURES = (".png", ".pdf", ".svg")
_Content = TypeVar("_Content")
_SCORES = {"exact_match": "exact match", "bleu": "BLEU", "rouge_l": "ROUGE-L", "chrf": "chrF"}


@dataclass(frozen=True)
class RunSummary:
    """What one run came to; None where the run does not say.

    Attributes:
        name: the folder's own, or its whole path where two have the same.
        status: of result.json, or `unfinished`.
        train_loss, eval_loss: the last ones; best_eval_loss: the lowest evaluation loss, at `best_step`. Nats a token.
        scores: of the adapter's answers, from evaluation.json: exact_match, bleu, rouge_l, chrf, 0 to 100.
        routing: at `best_step`, of HydraLoRA alone: `routing.MEANS`.
        energy_joules: drawn in steps, of what `energy_source` names; that says why there is none, "" is unknown.
        notes: what is missing or damaged, as sentences.
    """

    name: str
    run: str
    status: str
    steps: int | None
    tokens: int | None
    seconds: float | None
    energy_joules: float | None
    energy_source: str
    peak_memory_bytes: int | None
    trainable_parameters: int | None
    train_loss: float | None
    eval_loss: float | None
    best_eval_loss: float | None
    best_step: int | None
    scores: dict[str, float]
    routing: dict[str, float]
    notes: list[str]


@dataclass(frozen=True)
class Answers:
    """One prompt and what each run says, by its name; None where a run has no answer to it."""

    prompt: str
    reference: str
    answers: dict[str, str | None]


@dataclass(frozen=True)
class Comparison:
    """differences: by dotted key each run's value, by its name; keys on which all agree are left out."""

    runs: list[RunSummary]
    differences: dict[str, dict[str, Any]]
    picture: str
    samples: list[Answers]


@dataclass(frozen=True)
class _Run:
    """A run folder as it was read; what could not be read is None or empty, and noted.

    scores, answers: of evaluation.json; each answer under its prompt and reference.
    """

    name: str
    folder: Path
    config: Resolved | None
    metrics: list[dict[str, Any]]
    result: dict[str, Any]
    scores: dict[str, float]
    answers: dict[tuple[str, str], str]
    notes: list[str]


def compare(runs: Sequence[str | Path], *, output: str | Path = "compare.png", samples: int = 0) -> Comparison:
    """Print how `runs` differ in configuration, figures and answers, and draw their curves on one picture.

    Args:
        runs: run folders, at least two.
        output: the picture, a .png, .pdf or .svg; its folder is made where there is none.
        samples: let every run answer this many of the first run's evaluation rows, greedily; 0: show the answers that
            `lorica eval` left in the runs, where they have the same rows.

    Raises:
        ConfigError: fewer than two runs, folders that are no runs (all are listed), no evaluation rows to answer, or
            `output` is no picture or cannot be written.
    """
    _check_picture(Path(output))
    found = _read_runs([Path(run) for run in runs])
    differences = _differences(found)
    summaries = [_summary(run) for run in found]
    answers = _new_answers(found, samples) if samples else _left_answers(found)
    draw_comparison({run.name: run.metrics for run in found}, Path(output))
    comparison = Comparison(summaries, differences, str(output), answers)
    show(comparison)
    return comparison


def _check_picture(file: Path) -> None:
    """Before the answers, which take their time."""
    if file.suffix not in PICTURES:
        raise ConfigError(f"--output {file}: a picture ends in {', '.join(PICTURES)}.")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"--output {file} cannot be written: {error.strerror}.") from error


def show(comparison: Comparison) -> None:
    """Print the tables: a column a run, or a row a run where there are many."""
    runs = comparison.runs
    names = [run.name for run in runs]
    different = [
        [key, *(shortened(dump_value(values[name])) if name in values else None for name in names)]
        for key, values in comparison.differences.items()
    ]
    if different:
        _table("Configuration: what differs", ["key", *names], different)
    else:
        console.log("The configurations are the same.")
    figures = [[title, *(show_value(run) for run in runs)] for title, show_value in _FIGURES.items()]
    for key, title in _SCORES.items():
        if any(key in run.scores for run in runs):
            figures.append([title, *(f"{run.scores[key]:.1f}" if key in run.scores else None for run in runs)])
    for key in MEANS:
        if any(key in run.routing for run in runs):
            title = key.replace("_", " ").replace("nmi", "NMI")
            figures.append([title, *(_number(run.routing.get(key)) for run in runs)])
    _table("What came of them", ["", *names], figures)
    if comparison.samples:
        rows = [
            [shortened(sample.prompt), shortened(sample.reference), *(_answer(sample.answers[name]) for name in names)]
            for sample in comparison.samples
        ]
        console.table("Answers", ["prompt", "reference", *names], rows)
    for run in runs:
        for note in run.notes:
            console.log(f"{run.name}: {note}")
    console.log(f"The curves: {comparison.picture}")


def _table(title: str, columns: Sequence[str], rows: Sequence[Sequence[str | None]]) -> None:
    """A table with a column a run behind the first column; turned round where that makes too many."""
    if len(columns) <= 1 + MAX_COLUMNS:
        console.table(title, columns, rows)
    else:
        turned = list(zip(columns, *rows, strict=True))
        console.table(title, ["run", *(str(cell) for cell in turned[0][1:])], turned[1:])


def _number(value: float | None) -> str | None:
    return None if value is None else f"{value:.4f}"


def _count(value: int | None) -> str | None:
    return None if value is None else f"{value:,}"


def _energy(run: RunSummary) -> str | None:
    """None for a run that does not say whether it was measured."""
    if run.energy_joules is None:
        return "not readable" if run.energy_source else None
    return energy_text(run.energy_joules, run.energy_source or "so far")


def _answer(text: str | None) -> str | None:
    return None if text is None else shortened(text)


_FIGURES: Mapping[str, Callable[[RunSummary], str | None]] = {
    "status": lambda run: run.status,
    "steps": lambda run: _count(run.steps),
    "tokens": lambda run: _count(run.tokens),
    "time in steps": lambda run: None if run.seconds is None else console.human_seconds(run.seconds),
    "energy in steps": lambda run: _energy(run),
    "peak memory": lambda run: None if run.peak_memory_bytes is None else console.human_bytes(run.peak_memory_bytes),
    "trainable parameters": lambda run: _count(run.trainable_parameters),
    "training loss, last": lambda run: _number(run.train_loss),
    "evaluation loss, last": lambda run: _number(run.eval_loss),
    "evaluation loss, best": lambda run: _number(run.best_eval_loss),
    "best step": lambda run: _count(run.best_step),
}


def _read_runs(folders: Sequence[Path]) -> list[_Run]:
    folders = list({folder.resolve(): folder for folder in folders}.values())
    if len(folders) < 2:
        raise ConfigError("Give at least two different runs to compare.")
    strangers = [f for f in folders if not (f / "config.yaml").is_file() and not (f / "metrics.jsonl").is_file()]
    if strangers:
        raise ConfigError(
            "\n".join(
                f"{folder} is no run folder: it has neither config.yaml nor metrics.jsonl" for folder in strangers
            )
        )
    short = [folder.resolve().name for folder in folders]
    names = short if len(set(short)) == len(short) else [str(folder) for folder in folders]
    return [_read_run(name, folder) for name, folder in zip(names, folders, strict=True)]


def _read_run(name: str, folder: Path) -> _Run:
    notes: list[str] = []
    config = _noted(notes, lambda: load_config(folder))
    metrics = [_sound(row) for row in _noted(notes, lambda: read_metrics(folder / "metrics.jsonl")) or []]
    result = _noted(notes, lambda: read_json_object(folder / RESULT)) or {}
    evaluation = _noted(notes, lambda: _read_evaluation(folder / "evaluation.json"))
    return _Run(name, folder, config, metrics, result, *(evaluation or ({}, {})), notes)


def _sound(row: Mapping[str, Any]) -> dict[str, Any]:
    """What a row has in numbers, or explicitly has not; nobody vouches for the rest."""
    return {key: value for key, value in row.items() if value is None or isinstance(value, int | float)}


def _read_evaluation(file: Path) -> tuple[dict[str, float], dict[tuple[str, str], str]]:
    """The adapter's scores and answers that `lorica eval` left; nothing where the run was not evaluated."""
    if not file.exists():
        return {}, {}
    content = read_json_object(file)
    try:
        if "majority" in content:
            return {}, {(row["text"], row["label"]): row["predicted"] for row in content["samples"]}
        found = {key: content["all"]["adapter"][key] for key in _SCORES}
        answers = {(row["prompt"], row["references"][0]): row["adapter"] for row in content["samples"]}
    except (KeyError, IndexError, TypeError):
        raise ValueError(f"{file} is not what `lorica eval` writes.") from None
    return {key: value for key, value in _sound(found).items() if value is not None}, answers


def _noted(notes: list[str], read: Callable[[], _Content]) -> _Content | None:
    """What `read` gives; None, and a note, where it fails."""
    try:
        return read()
    except FileNotFoundError as error:
        notes.append(f"{os.path.basename(error.filename)} is missing.")
    except (LoricaError, OSError, ValueError) as error:
        notes.append(f"{str(error).splitlines()[0]}")
    return None


def _differences(runs: Sequence[_Run]) -> dict[str, dict[str, Any]]:
    """Keys on which the runs do not agree. A run whose configuration cannot be read has no part in it."""
    known = {run.name: {row.key: row.value for row in run.config.describe()} for run in runs if run.config is not None}
    keys = dict.fromkeys(key for values in known.values() for key in values if key != "train.output")
    found = {key: {name: values[key] for name, values in known.items() if key in values} for key in keys}
    return {
        key: values
        for key, values in found.items()
        if len(values) < len(known) or any(value != next(iter(values.values())) for value in values.values())
    }


def _summary(run: _Run) -> RunSummary:
    """The log says how far a run is; result.json what only a finished run knows."""
    last: Mapping[str, Any] = next((row for row in reversed(run.metrics) if "loss" in row), {})
    evaluations = [row for row in run.metrics if row.get("eval_loss") is not None]
    best: Mapping[str, Any] = min(evaluations, key=lambda row: (row["eval_loss"], row["step"]), default={})
    result = _sound(run.result)
    return RunSummary(
        name=run.name,
        run=str(run.folder),
        status=str(run.result.get("status", "unfinished")),
        steps=last.get("step"),
        tokens=last.get("tokens"),
        seconds=last.get("seconds"),
        energy_joules=result.get("energy_joules", last.get("joules")),
        energy_source=str(run.result.get("energy_source", "")),
        peak_memory_bytes=result.get("peak_memory_bytes", last.get("peak_memory_bytes")),
        trainable_parameters=result.get("trainable_parameters"),
        train_loss=last.get("loss"),
        eval_loss=evaluations[-1]["eval_loss"] if evaluations else None,
        best_eval_loss=best.get("eval_loss"),
        best_step=best.get("step"),
        scores=run.scores,
        routing={key: best[f"eval_{key}"] for key in MEANS if best.get(f"eval_{key}") is not None},
        notes=run.notes,
    )


def _left_answers(runs: Sequence[_Run]) -> list[Answers]:
    """A few answers of evaluation.json to rows that at least two runs have answered."""
    rows = dict.fromkeys(row for run in runs for row in run.answers)
    shared = [row for row in rows if sum(row in run.answers for run in runs) > 1]
    return [Answers(*row, {run.name: run.answers.get(row) for run in runs}) for row in spread(shared, SHOWN_SAMPLES)]


def _new_answers(runs: Sequence[_Run], num_samples: int) -> list[Answers]:
    """Answers of every run that can be opened to evaluation rows of the first one that has a configuration."""
    config = next((run.config.config for run in runs if run.config is not None), None)
    if config is None or config.data.eval is None:
        raise ConfigError("There are no evaluation rows to answer: the first run has none. Leave --samples out.")
    base_config(config.model)
    data = prepare(config)
    examples = spread([example for example in data.eval_examples if example.text is None], num_samples)
    if not examples:
        raise ConfigError("The evaluation rows are plain texts, which ask nothing. Leave --samples out.")
    given = {run.name: _answers(run, examples, config) for run in runs}
    return [
        Answers(
            prompt=next((m.content for m in reversed(example.messages) if m.role == "user"), ""),
            reference=answering(data.renderer).reference(example),
            answers={name: texts[index] for name, texts in given.items()},
        )
        for index, example in enumerate(examples)
    ]


def _answers(run: _Run, examples: Sequence[Example], config: RunConfig) -> list[str | None]:
    """What the run answers to each of `examples`; None where there is no room, or where the run cannot be opened."""
    answers: list[str | None] = [None] * len(examples)
    try:
        model, tokenizer, any_renderer = open_model(run.folder)
        renderer = answering(any_renderer)
        compact(model)
    except LoricaError as error:
        run.notes.append(f"It does not answer. {error}")
        return answers
    console.log(f"Rows that {run.name} answers: {len(examples):,}")
    prompts = [renderer.prompt_ids(example) for example in examples]
    misfits = unanswerable(model, prompts, config.eval.max_new_tokens)
    fitting = sorted(set(range(len(prompts))) - set(misfits))
    found = generate_ids(
        model,
        tokenizer,
        [prompts[index] for index in fitting],
        max_new_tokens=config.eval.max_new_tokens,
        stop_ids=renderer.stop_ids,
        batch_size=config.eval.batch_size,
    )
    for index, ids in zip(fitting, found, strict=True):
        answers[index] = str(tokenizer.decode(ids, skip_special_tokens=True))
    del model
    # Modules refer to each other in circles; the next run needs the memory.
    gc.collect()
    return answers
