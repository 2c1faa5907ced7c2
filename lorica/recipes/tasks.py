"""What the task of a run decides beyond the model: how rows become samples, samples batches, and batches scores.

One `RunTask` a task; the recipes hold one and ask it, and know no task by name but where answers and classes part ways
(`evaluate.py`, `generate.py`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from lorica.config import DataConfig, RunConfig
from lorica.data.layouts import PACKED, Layout, classes, padded, pairs
from lorica.data.packing import Batch
from lorica.data.render import Renderer
from lorica.data.render_labels import LabelRenderer
from lorica.data.render_pairs import PairRenderer
from lorica.errors import ConfigError, DataError
from lorica.evaluate.classification import measure_classes
from lorica.evaluate.likelihood import likelihood
from lorica.models.attention import packing_support
from lorica.models.loss import LossFunction
from lorica.models.tasks import (
    CAUSAL,
    CLASSIFICATION,
    SEQ2SEQ,
    Task,
    choose_task,
    own_labels,
    padding_id,
    start_position,
)

TextRenderer = Renderer | PairRenderer
AnyRenderer = TextRenderer | LabelRenderer
Scores = Callable[[PreTrainedModel, LossFunction, Iterable[Batch]], Mapping[str, float]]


@dataclass(frozen=True)
class RunTask:
    """One task, for the recipes.

    Attributes:
        task: what the model is loaded for.
        renderer: (configuration, tokenizer, the base's configuration, classes if they are known) -> renderer.
        layout: (configuration, the base's configuration, tokenizer) -> layout, and as a sentence why it pads, if so.
        scores: of a model on batches; `loss` is one of them.
        format: what `data.format: auto` means for the rows.
        idle: keys of `data` that mean nothing here.
    """

    task: Task
    renderer: Callable[[RunConfig, PreTrainedTokenizerBase, PretrainedConfig, Sequence[str]], AnyRenderer]
    layout: Callable[[RunConfig, PretrainedConfig, PreTrainedTokenizerBase | None], tuple[Layout, str | None]]
    scores: Scores
    format: str = "auto"
    idle: tuple[str, ...] = ()

    def row_format(self, config: RunConfig) -> str:
        """The format to read rows as."""
        return self.format if config.data.format == "auto" else config.data.format

    def refuse_format(self, source: str, found: str) -> None:
        """DataError where rows of the format `found` cannot be trained on."""
        if (found == "classification") != (self.task is CLASSIFICATION):
            if found != "classification":
                advice = "A classifier needs rows of text and label: data.format=classification."
            elif self.task is SEQ2SEQ:
                advice = (
                    "An encoder-decoder learns one text from another: data.format=prompt_response, and as "
                    "data.columns={prompt: text, response: label} which is which."
                )
            else:
                advice = (
                    "To learn their classes set model.task=classification; to learn the text as it is, "
                    "data.format=text."
                )
            raise DataError(f"{source}: rows of the format {found} do not fit model.task={self.task.name}. {advice}")


def run_task(config: RunConfig, base: PretrainedConfig) -> RunTask:
    """The task of a run.

    Raises:
        ModelError: the base cannot do what `model.task` asks for.
        ConfigError: values that mean nothing for this task.
    """
    task = choose_task(config.model.task, base, config.model.base)
    chosen = next(run for run in _TASKS if run.task is task)
    fields = DataConfig.model_fields
    faults = [
        f"data.{key} = {getattr(config.data, key)} means nothing for model.task={task.name}; leave it out"
        for key in chosen.idle
        if getattr(config.data, key) != fields[key].default
    ]
    if faults:
        raise ConfigError("\n".join(faults))
    return chosen


def answering(renderer: AnyRenderer) -> TextRenderer:
    """The renderer of a model that answers; ConfigError for a classifier's."""
    if isinstance(renderer, LabelRenderer):
        raise ConfigError("A classifier answers nothing: lorica generate names classes, lorica eval measures them.")
    return renderer


def _chat(
    config: RunConfig, tokenizer: PreTrainedTokenizerBase, base: PretrainedConfig, labels: Sequence[str]
) -> Renderer:
    data = config.data
    return Renderer(
        tokenizer,
        loss_on=data.loss_on,
        max_length=data.max_length,
        template=data.template,
        too_long=data.too_long,
    )


def _labels(
    config: RunConfig, tokenizer: PreTrainedTokenizerBase, base: PretrainedConfig, labels: Sequence[str]
) -> LabelRenderer:
    data = config.data
    return LabelRenderer(
        tokenizer, labels=labels, known=own_labels(base), max_length=data.max_length, too_long=data.too_long
    )


def _pairs(
    config: RunConfig, tokenizer: PreTrainedTokenizerBase, base: PretrainedConfig, labels: Sequence[str]
) -> PairRenderer:
    data = config.data
    return PairRenderer(tokenizer, max_length=data.max_length, template=data.template, too_long=data.too_long)


def _packed(
    config: RunConfig, base: PretrainedConfig, tokenizer: PreTrainedTokenizerBase | None
) -> tuple[Layout, str | None]:
    if not config.data.packing:
        return padded(_pad_id(tokenizer)), "Batches are padded: data.packing is false."
    reason = packing_support(base)
    if reason is None:
        return PACKED, None
    return padded(_pad_id(tokenizer)), f"Batches are padded, because this model cannot pack: {reason}."


def _classes(
    config: RunConfig, base: PretrainedConfig, tokenizer: PreTrainedTokenizerBase | None
) -> tuple[Layout, str | None]:
    # A model has more than one token type only if it was trained with them.
    told = tokenizer is not None and "token_type_ids" in tokenizer.model_input_names
    types = told and (getattr(base, "type_vocab_size", None) or 0) > 1
    reason = packing_support(base, CLASSIFICATION) if config.data.packing else None
    layout = classes(padding_id(base), types, start_position(base), packing=config.data.packing and reason is None)
    if not config.data.packing:
        return layout, "Batches are padded: data.packing is false."
    return layout, None if reason is None else f"Batches are padded, because this model cannot pack: {reason}."


def _sources_and_targets(
    config: RunConfig, base: PretrainedConfig, tokenizer: PreTrainedTokenizerBase | None
) -> tuple[Layout, str | None]:
    start = getattr(base, "decoder_start_token_id", None)
    pad = padding_id(base)
    return pairs(pad, pad if start is None else start), "Batches are padded: the model is an encoder-decoder."


def _pad_id(tokenizer: PreTrainedTokenizerBase | None) -> int:
    # It is masked everywhere, so any will do where the tokenizer names none.
    pad = None if tokenizer is None else tokenizer.pad_token_id
    return int(pad) if isinstance(pad, int) else 0


def _likelihood(model: PreTrainedModel, loss_fn: LossFunction, batches: Iterable[Batch]) -> Mapping[str, float]:
    found = likelihood(model, loss_fn, batches)
    return {"loss": found.loss, "perplexity": found.perplexity}


_TASKS = (
    RunTask(CAUSAL, _chat, _packed, _likelihood),
    RunTask(CLASSIFICATION, _labels, _classes, measure_classes, "classification", ("loss_on", "template")),
    RunTask(SEQ2SEQ, _pairs, _sources_and_targets, _likelihood, idle=("loss_on",)),
)
