"""`lorica eval`: how well a run's adapter does on held-out rows, beside its own base.

The base is loaded once: it is measured with the adapter on it, then the adapter is taken off and the same rows are
measured again. Weights are held as small as they are exact (evaluate/compact.py), which is decided for each. Loss
and perplexity are over every row; answers are generated greedily for up to `max_samples` of them, spread evenly over
the data, and compared with all references of their row. A row whose prompt leaves no room for an answer in the model's
context is counted and named, and stays without one.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lorica.config import RunConfig, load_config
from lorica.data.layouts import Layout
from lorica.data.render_labels import LabelRenderer
from lorica.data.rows import Example
from lorica.data.tokenized import IGNORE, TokenizedDataset
from lorica.errors import ConfigError
from lorica.evaluate.compact import compact
from lorica.evaluate.generation import check_prompts, unanswerable
from lorica.evaluate.generation import generate as generate_ids
from lorica.evaluate.likelihood import likelihood, summarize
from lorica.evaluate.text_metrics import score
from lorica.files import write_json
from lorica.interop.peft import load_adapter
from lorica.methods.attach import detach, in_front
from lorica.methods.gates import GateWatch, watching
from lorica.models.loss import LossFunction, make_loss
from lorica.recipes import console
from lorica.recipes.classify import ClassificationReport, evaluate_classes
from lorica.recipes.heat_map import show_routing
from lorica.recipes.opening import Source, find_source
from lorica.recipes.preparing import load_rows, prepare
from lorica.recipes.routing import Routing, Watched, is_routed, other_rows_to_watch, routing_of
from lorica.recipes.tasks import AnyRenderer, TextRenderer

SHOWN_SAMPLES = 3
SHOWN_UNANSWERED = 10
_SHOWN_CHARACTERS = 80
_Item = TypeVar("_Item")
_SCORES = ("exact_match", "bleu", "rouge_l", "chrf")


@dataclass(frozen=True, slots=True)
class Scores:
    """loss: nats a token. exact_match, bleu, rouge_l, chrf: 0 to 100, None where nothing was generated."""

    loss: float
    perplexity: float
    exact_match: float | None
    bleu: float | None
    rouge_l: float | None
    chrf: float | None


@dataclass(frozen=True, slots=True)
class TaskReport:
    """One task's rows, or all of them.

    num_tokens: trained tokens that the loss is over. num_generated: answers that the texts' scores are over.
    num_unanswered: rows that were to be answered as well, and could not be.
    """

    num_samples: int
    num_tokens: int
    num_generated: int
    num_unanswered: int
    base: Scores | None
    adapter: Scores


@dataclass(frozen=True, slots=True)
class Sample:
    """One row and what was answered to it."""

    origin: str
    task: str | None
    prompt: str
    references: tuple[str, ...]
    base: str | None
    adapter: str


@dataclass(frozen=True, slots=True)
class Unanswered:
    """A row whose prompt is empty, or leaves no room for `eval.max_new_tokens` in the model's context."""

    origin: str
    num_prompt_tokens: int


@dataclass(frozen=True, slots=True)
class EvaluationReport:
    """What an evaluation found. tasks: by task name, where the rows name tasks. samples: every generated answer.

    routing: of HydraLoRA, what its routers did.
    """

    run: str
    data: str
    all: TaskReport
    tasks: dict[str, TaskReport]
    samples: list[Sample]
    unanswered: list[Unanswered]
    routing: Routing | None


@dataclass(frozen=True)
class _Rows:
    """The rows to measure, and which of them to answer.

    watched: the rows as tokens, and what routers are compared with on them. groups: row indices by task, all of them
    under None. answered: row indices, in step with `prompts` (token ids) and `references`. unanswered: prompt tokens of
    the rows that could not be answered, by row index.
    """

    watched: Watched
    examples: list[Example]
    groups: dict[str | None, list[int]]
    answered: list[int]
    prompts: list[list[int]]
    references: list[tuple[str, ...]]
    unanswered: dict[int, int]


@dataclass(frozen=True)
class _Measured:
    """One model's figures. totals: summed -ln p and trained tokens of each group. answers: text by row index."""

    totals: dict[str | None, tuple[float, int]]
    answers: dict[int, str]
    routing: Routing | None


def evaluate(
    run: Path | str,
    overrides: Sequence[str] = (),
    *,
    data: str | None = None,
    split: str = "eval",
    base: bool = True,
    max_samples: int | None = None,
    generate: bool | None = None,
) -> EvaluationReport | ClassificationReport:
    """Measure the adapter of `run`, print a table and a few answers, and write evaluation.json into the run folder.

    Args:
        overrides: `section.key=value`, on top of the run's config.yaml.
        data: rows to measure on instead of the run's: what `data.eval` takes as a path.
        split: `eval` or `train`: which of the run's own rows.
        base: measure the base beside the adapter. (A classifier stands beside the most common class instead.)
        max_samples: most rows to answer; None: `eval.max_samples`.
        generate: answer rows at all; None: `eval.generate`.

    Raises:
        ConfigError: `run` is no run folder, or it has no evaluation data.
        DataError: the rows cannot be read, or not one prompt leaves room for an answer in the model's context.
    """
    folder, source = _open_run(run, overrides)
    config = source.config
    assert config is not None and source.adapter is not None
    wants_answers = config.eval.generate if generate is None else generate
    limit = (config.eval.max_samples if max_samples is None else max_samples) if wants_answers else 0
    name, dataset, examples, tokenizer, renderer = _load_rows(source, config, data, split)
    model, task = source.load_base(), source.task()
    layout, _ = task.layout(config, model.config, tokenizer)
    if isinstance(renderer, LabelRenderer):
        load_adapter(model, source.adapter)
        train = prepare(config, renderer.labels).train
        seen = train.labels[train.labels != IGNORE].astype(np.int64)
        return evaluate_classes(folder, model, name, dataset, examples, seen, renderer.labels, layout, config)
    rows = _choose(other_rows_to_watch(folder, dataset, examples, name), examples, renderer, limit)
    loss_fn = make_loss(model)
    # The adapter's own tokens take room that the base, which is asked here, does not know of.
    virtual = config.method.num_virtual_ids + config.method.position_offset
    rows = _leave_unanswered(model, rows, config.eval.max_new_tokens + virtual)
    console.log(f"{len(dataset):,} rows of {name}; answers to {len(rows.answered):,} of them")
    load_adapter(model, source.adapter).eval()
    after = _measure(compact(model), loss_fn, tokenizer, renderer, rows, config, layout)
    before = _measure(compact(detach(model)), loss_fn, tokenizer, renderer, rows, config, layout) if base else None

    report = EvaluationReport(
        run=str(folder),
        data=name,
        all=_task_report(None, rows, before, after),
        tasks={task: _task_report(task, rows, before, after) for task in rows.groups if task is not None},
        samples=_samples(rows, tokenizer, before, after),
        unanswered=[Unanswered(examples[index].origin, length) for index, length in rows.unanswered.items()],
        routing=after.routing,
    )
    write_json(folder / "evaluation.json", console.jsonable(report))
    show(report)
    return report


def show(report: EvaluationReport) -> None:
    """Print the report's table, and its first answers side by side."""
    rows: list[list[object]] = []
    for task, part in (*report.tasks.items(), ("all", report.all)):
        rows += _table_rows(task, part)
    columns = ["task", "rows", "model", "loss", "perplexity"]
    if report.all.num_generated:
        columns += ["exact match", "BLEU", "ROUGE-L", "chrF"]
    if report.unanswered:
        columns.append("unanswered")
    console.table(f"{report.run} on {report.data}", columns, [row[: len(columns)] for row in rows], numeric=columns[3:])
    if report.unanswered:
        console.stdout().print(_say_unanswered(report.unanswered))
    shown = spread(list(range(len(report.samples))), SHOWN_SAMPLES)
    if shown:
        sides = ["base", "adapter"] if report.all.base is not None else ["adapter"]
        answers = [report.samples[index] for index in shown]
        texts = [[s.prompt, s.references[0], *([s.base or ""] if len(sides) == 2 else []), s.adapter] for s in answers]
        console.table("Answers", ["prompt", "reference", *sides], [[shortened(text) for text in row] for row in texts])
    if report.routing is not None:
        show_routing(report.routing)


def _open_run(run: Path | str, overrides: Sequence[str]) -> tuple[Path, Source]:
    """The run's folder, and its base and adapter under `overrides`. `run` may also be the run.yaml that was trained."""
    path = Path(run)
    folder = Path(load_config(path, overrides).config.train.output) if path.is_file() else path
    source = find_source(folder, overrides)
    if source.config is None or source.adapter is None:
        raise ConfigError(
            f"{folder} is no run folder: it has no config.yaml, which says what the rows are and how they are read. "
            "Evaluate what `lorica train` wrote."
        )
    return source.adapter.parent, source


def _load_rows(
    source: Source, config: RunConfig, data: str | None, split: str
) -> tuple[str, TokenizedDataset, list[Example], PreTrainedTokenizerBase, AnyRenderer]:
    """Name of the data, samples, their rows, tokenizer, renderer. Training rows are read only where they are needed."""
    if split not in ("eval", "train"):
        raise ConfigError(f"split is {split!r}; expected eval or train.")
    own = config.data.eval if split == "eval" else config.data.train
    if data is None and own is None:
        raise ConfigError("The run has no evaluation data: data.eval is null. Give data.eval=PATH, or --data PATH.")
    if data is not None or (split == "eval" and isinstance(own, str)):
        path = data or str(own)
        tokenizer, renderer = source.open_tokenizer()
        hub_split = config.data.eval_split if data is None else None
        loaded = load_rows(config, source.task(), renderer, path, hub_split)
        return path, loaded.dataset, loaded.examples, tokenizer, renderer
    run = prepare(config, source.labels)
    if split == "train":
        return config.data.train, run.train, run.train_examples, run.tokenizer, run.renderer
    assert run.eval is not None
    return f"{own} of {config.data.train}", run.eval, run.eval_examples, run.tokenizer, run.renderer


def _choose(watched: Watched, examples: list[Example], renderer: TextRenderer, limit: int) -> _Rows:
    """The rows by task, and the conversations among them that are answered."""
    groups: dict[str | None, list[int]] = {}
    for index, example in enumerate(examples):
        if example.task is not None:
            groups.setdefault(example.task, []).append(index)
    groups[None] = list(range(len(examples)))
    answered = spread([index for index, example in enumerate(examples) if example.text is None], limit)
    prompts = [renderer.prompt_ids(examples[index]) for index in answered]
    references = [examples[index].references or (renderer.reference(examples[index]),) for index in answered]
    return _Rows(watched, examples, groups, answered, prompts, references, {})


def _leave_unanswered(model: PreTrainedModel, rows: _Rows, max_new_tokens: int) -> _Rows:
    """The rows without those to answer that leave no room for it; DataError that lists them if it is all of them."""
    misfits = unanswerable(model, rows.prompts, max_new_tokens)
    if len(misfits) == len(rows.prompts):
        check_prompts(model, rows.prompts, max_new_tokens, [rows.examples[index].origin for index in rows.answered])
    fitting = sorted(set(range(len(rows.prompts))) - set(misfits))
    return replace(
        rows,
        answered=[rows.answered[position] for position in fitting],
        prompts=[rows.prompts[position] for position in fitting],
        references=[rows.references[position] for position in fitting],
        unanswered={rows.answered[position]: len(rows.prompts[position]) for position in misfits},
    )


def spread(items: list[_Item], limit: int) -> list[_Item]:
    """At most `limit` of `items`, evenly spread: rows often stand in the order of their tasks."""
    if len(items) <= limit:
        return items
    return [items[(2 * k + 1) * len(items) // (2 * limit)] for k in range(limit)]


def _measure(
    model: PreTrainedModel,
    loss_fn: LossFunction,
    tokenizer: PreTrainedTokenizerBase,
    renderer: TextRenderer,
    rows: _Rows,
    config: RunConfig,
    layout: Layout,
) -> _Measured:
    budget = config.train.micro_batch_tokens or config.train.batch_tokens

    def total(indices: list[int], watch: GateWatch) -> tuple[float, int]:
        dataset = rows.watched.dataset.subset(indices).behind(*in_front(model))
        components = rows.watched.components[indices]
        parts = layout.parts(dataset, np.arange(len(dataset)), budget)
        batches = [layout.make(dataset, part) for part in parts]
        result = likelihood(model, loss_fn, watch.over(batches, [components[part] for part in parts]))
        return result.loss * result.num_tokens, result.num_tokens

    with watching(model, len(rows.watched.names)) as watch:
        totals: dict[str | None, tuple[float, int]] = {
            task: total(indices, watch) for task, indices in rows.groups.items() if task is not None
        }
        # Every row is run once: what belongs to no task is all that is left to add.
        rest = [index for index, example in enumerate(rows.examples) if example.task is None]
        sums = [*totals.values(), *([total(rest, watch)] if rest else [])]
    totals[None] = (sum(loss for loss, _ in sums), sum(num_tokens for _, num_tokens in sums))
    routing = routing_of(model, watch.summaries(), rows.watched) if is_routed(model) else None
    ids = generate_ids(
        model,
        tokenizer,
        rows.prompts,
        max_new_tokens=config.eval.max_new_tokens,
        stop_ids=renderer.stop_ids,
        batch_size=config.eval.batch_size,
    )
    texts = [str(tokenizer.decode(answer, skip_special_tokens=True)) for answer in ids]
    return _Measured(totals, dict(zip(rows.answered, texts, strict=True)), routing)


def _task_report(task: str | None, rows: _Rows, before: _Measured | None, after: _Measured) -> TaskReport:
    members = set(rows.groups[task])
    answered = [position for position, index in enumerate(rows.answered) if index in members]

    def scores(measured: _Measured) -> Scores:
        found = summarize(*measured.totals[task])
        texts: Mapping[str, float] = {}
        if answered:
            predictions = [measured.answers[rows.answered[position]] for position in answered]
            texts = score(predictions, [rows.references[position] for position in answered])
        return Scores(found.loss, found.perplexity, **{name: texts.get(name) for name in _SCORES})

    return TaskReport(
        num_samples=len(members),
        num_tokens=after.totals[task][1],
        num_generated=len(answered),
        num_unanswered=len(members & rows.unanswered.keys()),
        base=None if before is None else scores(before),
        adapter=scores(after),
    )


def _samples(
    rows: _Rows, tokenizer: PreTrainedTokenizerBase, before: _Measured | None, after: _Measured
) -> list[Sample]:
    return [
        Sample(
            origin=rows.examples[index].origin,
            task=rows.examples[index].task,
            prompt=_last_words(rows.examples[index], tokenizer, prompt),
            references=references,
            base=None if before is None else before.answers[index],
            adapter=after.answers[index],
        )
        for index, prompt, references in zip(rows.answered, rows.prompts, rows.references, strict=True)
    ]


def _last_words(example: Example, tokenizer: PreTrainedTokenizerBase, prompt: list[int]) -> str:
    """The user's last turn; the whole prompt where there is none."""
    turns = [message.content for message in example.messages if message.role == "user"]
    return turns[-1] if turns else str(tokenizer.decode(prompt))


def _say_unanswered(rows: Sequence[Unanswered]) -> str:
    named = [f"{row.origin} ({row.num_prompt_tokens:,} tokens)" for row in rows[:SHOWN_UNANSWERED]]
    more = f" and {len(rows) - len(named):,} more" if len(rows) > len(named) else ""
    longest = max(row.num_prompt_tokens for row in rows)
    return (
        f"Not answered, for want of room in the model's context: {len(rows):,} of the rows, the longest prompt of "
        f"{longest:,} tokens: {', '.join(named)}{more}. A lower eval.max_new_tokens leaves more room."
    )


def _table_rows(task: str, part: TaskReport) -> list[list[object]]:
    models: list[tuple[str, Scores | None]] = [("base", part.base), ("adapter", part.adapter)]
    rows, unanswered = f"{part.num_samples:,}", f"{part.num_unanswered:,}"
    return [
        [task, rows, name, f"{scores.loss:.3f}", _perplexity(scores.perplexity), *_percentages(scores), unanswered]
        for name, scores in models
        if scores is not None
    ]


def shortened(text: str) -> str:
    """One line of a table; evaluation.json has the whole text."""
    line = " ".join(text.split())
    return line if len(line) <= _SHOWN_CHARACTERS else line[: _SHOWN_CHARACTERS - 1] + "…"


def _perplexity(value: float) -> str:
    return f"{value:,.2f}" if value < 1e6 else f"{value:.2g}"


def _percentages(scores: Scores) -> list[Any]:
    values = [getattr(scores, name) for name in _SCORES]
    return [None if value is None else f"{value:.1f}" for value in values]
