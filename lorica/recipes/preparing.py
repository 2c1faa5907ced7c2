"""From a configuration to tokenised training and evaluation data: what train, plan, eval and `data check` begin
with.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from transformers import PretrainedConfig, PreTrainedTokenizerBase

from lorica.config import ModelConfig, RunConfig
from lorica.data.check import overlap
from lorica.data.layouts import Layout
from lorica.data.render import Prepared, load_dataset
from lorica.data.render_labels import LabelRenderer
from lorica.data.rows import Example, RowFault
from lorica.data.sampler import split_eval
from lorica.data.tokenized import TokenizedDataset
from lorica.errors import ModelError
from lorica.methods.method import MethodOptions
from lorica.models.load import is_local, load_config, load_tokenizer
from lorica.recipes import console
from lorica.recipes.tasks import AnyRenderer, RunTask, run_task


@dataclass(frozen=True)
class PreparedRun:
    """The data of a run: samples as tokens, and the rows that they come from in the same order.

    padding: as a sentence, why the batches are padded; None where they are packed.
    """

    tokenizer: PreTrainedTokenizerBase
    task: RunTask
    renderer: AnyRenderer
    layout: Layout
    padding: str | None
    train: TokenizedDataset
    train_examples: list[Example]
    eval: TokenizedDataset | None
    eval_examples: list[Example]
    faults: list[RowFault]
    format: str

    @property
    def labels(self) -> tuple[str, ...]:
        """A classifier's classes by id."""
        return self.renderer.labels if isinstance(self.renderer, LabelRenderer) else ()

    def for_method(self, options: MethodOptions, base: PretrainedConfig) -> PreparedRun:
        """The same rows as a model of this method wants to see them: behind its virtual tokens, if it has such."""
        ids, position = options.in_front(base.get_text_config().vocab_size)
        evaluation = None if self.eval is None else self.eval.behind(ids, position)
        return replace(self, train=self.train.behind(ids, position), eval=evaluation)


def announce_hub(base: str) -> None:
    """Say on stderr that the hub is asked for `base`, where that is no folder here and may be a hub id."""
    if not (is_local(base) or Path(base).exists()) and re.fullmatch(r"\w[\w.-]*(/[\w.-]+)?", base):
        console.log(f"{base} is no folder here; asking the hub for it.")


def base_config(model: ModelConfig) -> PretrainedConfig:
    """The configuration of the base that a run or an adapter names: the first that is read of it, and little.

    Raises:
        ModelError: as `models.load.load_config`; where the base is not found, with how to name another place.
    """
    announce_hub(model.base)
    try:
        return load_config(model.base, revision=model.revision)
    except ModelError as error:
        if is_local(model.base):
            raise
        raise ModelError(f"{error} If it has moved, say where it is now: model.base=FOLDER.") from None


def why_padded(config: RunConfig, base: PretrainedConfig) -> str | None:
    """None where the run packs its batches; else, as a sentence, why it pads them."""
    return run_task(config, base).layout(config, base, None)[1]


def prepare(config: RunConfig, labels: Sequence[str] = ()) -> PreparedRun:
    """Read, render and tokenise the run's data; hold out evaluation rows where `data.eval` is a fraction.

    `base_config` comes before this. Says on stderr what was left out and what overlaps. labels: a classifier's classes
    by id, where they are known; else those of the training rows.

    Raises:
        DataError: rows that cannot be read under `data.on_bad_row: error`, or nothing to train on.
    """
    data = config.data
    base = load_config(config.model.base, revision=config.model.revision)
    task = run_task(config, base)
    tokenizer = load_tokenizer(config.model.base, revision=config.model.revision)
    renderer = task.renderer(config, tokenizer, base, labels)
    layout, padding = task.layout(config, base, tokenizer)
    loaded = load_rows(config, task, renderer, data.train, data.split)
    faults = list(loaded.faults)
    train, train_examples = loaded.dataset, loaded.examples
    evaluation: TokenizedDataset | None = None
    eval_examples: list[Example] = []
    if isinstance(data.eval, str):
        held_out = load_rows(config, task, renderer, data.eval, data.eval_split)
        evaluation, eval_examples = held_out.dataset, held_out.examples
        faults += held_out.faults
    elif data.eval is not None:
        ours, theirs = split_eval(train, data.eval, config.train.seed)
        evaluation, eval_examples = train.subset(theirs), [train_examples[i] for i in theirs]
        train, train_examples = train.subset(ours), [train_examples[i] for i in ours]
    if faults:
        console.log(f"{len(faults):,} rows are left out; the first: {faults[0].origin}: {faults[0].reason}.")
    if evaluation is not None and (shared := overlap(train_examples, eval_examples)).num_exact:
        console.log(
            f"Warning: {shared.num_exact:,} of {shared.num_eval:,} evaluation rows are also training rows, the first "
            f"is {shared.examples[0][0]}: the evaluation loss will look better than it is."
        )
    return PreparedRun(
        tokenizer,
        task,
        renderer,
        layout,
        padding,
        train,
        train_examples,
        evaluation,
        eval_examples,
        faults,
        loaded.format,
    )


def load_rows(
    config: RunConfig,
    task: RunTask,
    renderer: AnyRenderer,
    source: str,
    split: str | None,
    on_bad_row: str | None = None,
) -> Prepared:
    """Read and tokenise one source as this run does; `on_bad_row` None: as its configuration says."""
    data = config.data
    return load_dataset(
        source,
        renderer,
        format=task.row_format(config),
        columns=data.columns,
        split=split,
        on_bad_row=data.on_bad_row if on_bad_row is None else on_bad_row,
        check_format=lambda found: task.refuse_format(source, found),
    )
