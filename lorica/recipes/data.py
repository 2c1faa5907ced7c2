"""`lorica data check` and `lorica data preview`: the rows as training will see them, before it does.

Both use the readers, the renderer and the masks that training uses, with the run's own configuration; a bare file is
read with the defaults and the embedded base's tokenizer. Nothing is written.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from lorica.config import RunConfig, load_config
from lorica.errors import DataError
from lorica.recipes import console
from lorica.strict_yaml import dump_value

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from lorica.data.check import CheckReport, Segment
    from lorica.data.render import Prepared
    from lorica.data.rows import Example
    from lorica.recipes.tasks import AnyRenderer

# Where there is no colour, these stand around what is learned.
OPEN, CLOSE = "\N{MATHEMATICAL LEFT WHITE SQUARE BRACKET}", "\N{MATHEMATICAL RIGHT WHITE SQUARE BRACKET}"
SHOWN_FAULTS = 20
SHOWN_CLASSES = 8


@dataclass(frozen=True, slots=True)
class DataCheck:
    """What the rows hold. `refusal` is why `train` would not start, or None; `num_held_out` rows go to evaluation."""

    refusal: str | None
    train: CheckReport
    eval: CheckReport | None
    num_held_out: int


@dataclass(frozen=True, slots=True)
class Sample:
    """One row as the model gets it. A row that is left out has a `fault` and no segments. label: its class."""

    origin: str
    num_tokens: int
    num_trained_tokens: int
    segments: list[Segment]
    fault: str | None
    label: str | None = None


def configuration(target: str, overrides: Sequence[str] = ()) -> RunConfig:
    """A run.yaml or run folder as it is; a file or folder of rows with every default and the embedded tokenizer."""
    path = Path(target)
    if path.suffix in (".yaml", ".yml") or (path / "config.yaml").is_file():
        return load_config(path, overrides).config
    rows = ["model.base=embedded", f"data.train={dump_value(target)}"]
    return load_config(None, [*rows, *overrides]).config


def check(target: str, overrides: Sequence[str] = ()) -> DataCheck:
    """Read all rows and print what they hold, which of them are left out and why, and what would stop `train`.

    DataError if the rows cannot be read at all, or none is left.
    """
    from lorica.data.check import check as check_rows
    from lorica.recipes.preparing import base_config, load_rows
    from lorica.recipes.tasks import run_task

    config = configuration(target, overrides)
    data, base = config.data, base_config(config.model)
    task, tokenizer = run_task(config, base), _tokenizer(config)
    # Rows that are too long are wanted in the report; where they are an error, they are refused below.
    lenient = "truncate" if data.too_long == "truncate" else "drop"
    lenient_run = config.model_copy(update={"data": data.model_copy(update={"too_long": lenient})})
    renderer = task.renderer(lenient_run, tokenizer, base, ())
    train = load_rows(config, task, renderer, data.train, data.split, on_bad_row="drop")
    evaluation = None
    if isinstance(data.eval, str):
        evaluation = load_rows(config, task, renderer, data.eval, data.eval_split, on_bad_row="drop")
    num_held_out, refusals = 0, [_refusal(config, prepared) for prepared in (train, evaluation) if prepared]
    if isinstance(data.eval, float):
        try:
            num_held_out = _held_out(config, train)
        except DataError as error:
            refusals.append(str(error))
    layout, padding = task.layout(config, base, tokenizer)
    if padding is not None:
        console.log(padding)
    batch_tokens, padded = config.train.batch_tokens, layout.padded
    result = DataCheck(
        "\n".join(refusal for refusal in refusals if refusal) or None,
        check_rows(train, evaluation, batch_tokens=batch_tokens, padded=padded),
        check_rows(evaluation, batch_tokens=batch_tokens, padded=padded) if evaluation else None,
        num_held_out,
    )
    _print_check(config, result)
    return result


def preview(target: str, overrides: Sequence[str] = (), *, rows: int = 3, first: int = 0) -> list[Sample]:
    """Show `rows` rows from row `first` (of those that can be read, from 0) and which of their tokens are learned.

    DataError if the source has no such row.
    """
    from lorica.data.sources import ROWS_TO_DETECT, load_examples
    from lorica.recipes.preparing import base_config
    from lorica.recipes.tasks import run_task

    config = configuration(target, overrides)
    data, base = config.data, base_config(config.model)
    task = run_task(config, base)
    # Unreadable rows count towards the limit, so a few more are read than shown.
    limit = first + rows + ROWS_TO_DETECT
    format = task.row_format(config)
    loaded = load_examples(data.train, format=format, columns=data.columns, split=data.split, limit=limit)
    task.refuse_format(data.train, loaded.format)
    examples = loaded.examples[first : first + rows]
    if not examples:
        raise DataError(
            f"{data.train}: there is no row {first}; {len(loaded.examples)} of the first {loaded.num_rows} can be read."
        )
    labels = sorted({example.label for example in loaded.examples if example.label is not None})
    renderer = task.renderer(config, _tokenizer(config), base, labels)
    samples = [_sample(renderer, example) for example in examples]
    _print_samples(samples)
    return samples


def _tokenizer(config: RunConfig) -> PreTrainedTokenizerBase:
    from lorica.models.load import load_tokenizer

    return load_tokenizer(config.model.base, revision=config.model.revision)


def _refusal(config: RunConfig, prepared: Prepared) -> str | None:
    """What `train` would say to these rows, or None."""
    from lorica.data.rows import refuse

    too_long = [fault for fault in prepared.faults if fault.rule == "too_long"]
    if too_long and config.data.too_long == "error":
        return f"{len(too_long):,} rows are longer than data.max_length = {config.data.max_length} tokens."
    try:
        refuse([f for f in prepared.faults if f.rule != "too_long"], prepared.num_rows, config.data.on_bad_row)
    except DataError as error:
        return str(error)
    return None


def _held_out(config: RunConfig, train: Prepared) -> int:
    from lorica.data.sampler import split_eval

    assert isinstance(config.data.eval, float)
    return len(split_eval(train.dataset, config.data.eval, config.train.seed)[1])


def _print_check(config: RunConfig, result: DataCheck) -> None:
    _print_report(config.data.train, result.train)
    out = console.stdout()
    if result.eval is not None:
        _print_report(str(config.data.eval), result.eval)
    elif result.num_held_out:
        out.print(f"{result.num_held_out:,} of the samples will be held out for evaluation.")
    found = result.train.overlap
    if found is not None and found.num_prompts:
        exact = f"{found.num_exact:,} of {found.num_eval:,} evaluation rows are training rows too"
        out.print(f"Warning: {exact}, {found.num_prompts:,} share at least the prompt:")
        for evaluation_origin, train_origin in found.examples:
            out.print(f"  {evaluation_origin} and {train_origin}")
    if result.refusal is None:
        out.print("`train` would accept these rows.")
    else:
        # The indented lines are the faults that the table above has shown.
        reasons = [line for line in result.refusal.splitlines() if not line.startswith("  ")]
        out.print("\n".join(["`train` would refuse:", *reasons]))


def _shares(counts: Mapping[str, int]) -> str | None:
    """The classes and their shares, the most common first; None without classes."""
    if not counts:
        return None
    total = sum(counts.values())
    shown = [f"{label} {count / total:.1%}" for label, count in list(counts.items())[:SHOWN_CLASSES]]
    more = f" and {len(counts) - SHOWN_CLASSES:,} more" if len(counts) > SHOWN_CLASSES else ""
    return f"{len(counts):,}: {', '.join(shown)}{more}"


def _print_report(source: str, report: CheckReport) -> None:
    columns = ", ".join(name if name == own else f"{name} = {own}" for name, own in report.columns.items())
    lengths = ", ".join(f"{name} {length:,}" for name, length in report.length_percentiles.items())
    facts = [
        ("format", f"{report.format} ({columns})"),
        ("columns not used", ", ".join(report.unused_columns) or None),
        ("rows", f"{report.num_rows:,}"),
        ("samples", f"{report.num_samples:,}"),
        ("rows left out", f"{len(report.faults):,}"),
        ("repeated samples", f"{report.num_duplicates:,}"),
        ("classes", _shares(report.num_rows_by_label)),
        ("tokens", f"{report.num_tokens:,}, {report.num_trained_tokens:,} learned ({report.trained_share:.0%})"),
        ("tokens a sample", lengths),
        ("longest", ", ".join(f"{origin} ({length:,})" for origin, length in report.longest[:3])),
        ("steps an epoch", f"{report.num_steps:,} of {report.batch_tokens:,} tokens"),
    ]
    console.table(source, ("", ""), facts)
    out = console.stdout()
    if report.faults:
        counts = ", ".join(f"{count:,} {rule}" for rule, count in report.num_faults_by_rule.items())
        title = f"Rows left out: {counts}"
        console.table(title, ("row", "why"), [(fault.origin, fault.reason) for fault in report.faults[:SHOWN_FAULTS]])
        if len(report.faults) > SHOWN_FAULTS:
            out.print(f"... and {len(report.faults) - SHOWN_FAULTS:,} more; --json lists all")
    if report.duplicates:
        console.table("Repeated samples", ("row", "is the same as"), report.duplicates)


def _sample(renderer: AnyRenderer, example: Example) -> Sample:
    from lorica.data.check import preview as segments_of
    from lorica.data.rows import RowError
    from lorica.data.tokenized import IGNORE

    (rendered,) = renderer.render_all([example])
    if isinstance(rendered, RowError):
        return Sample(example.origin, 0, 0, [], rendered.reason)
    ids, labels = rendered
    if example.label is not None:
        # The class is learned, and none of the tokens.
        labels = labels * 0 + IGNORE
    segments = segments_of((ids, labels), renderer.tokenizer)
    trained = sum(segment.num_tokens for segment in segments if segment.trained)
    return Sample(example.origin, len(ids), trained, segments, None, example.label)


def _print_samples(samples: Sequence[Sample]) -> None:
    from rich.text import Text

    out = console.stdout()
    in_colour = out.color_system is not None
    if in_colour:
        out.print(Text.assemble("Learned: ", ("green and bold", "bold green"), "; seen only: ", ("dim", "dim")))
    else:
        out.print(f"Learned: between {OPEN} and {CLOSE}")
    for sample in samples:
        learned = f"{sample.num_trained_tokens:,}" if sample.label is None else f"its class, {sample.label},"
        counts = f"{sample.num_tokens:,} tokens, {learned} learned"
        out.print(Text(f"\n{console.printable(sample.origin)}: {sample.fault or counts}", style="bold"))
        text = Text()
        for segment in sample.segments:
            content = console.printable(segment.text)
            if in_colour:
                text.append(content, style="bold green" if segment.trained else "dim")
            else:
                text.append(f"{OPEN}{content}{CLOSE}" if segment.trained else content)
        text.rstrip()
        if sample.segments:
            out.print(text)
