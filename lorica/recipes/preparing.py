"""From a configuration to tokenised training and evaluation data: what train, plan, eval and `data check` begin
with.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from transformers import PretrainedConfig, PreTrainedTokenizerBase

from lorica.config import ModelConfig, RunConfig
from lorica.data.check import overlap
from lorica.data.render import Prepared, Renderer, load_dataset
from lorica.data.rows import Example, RowFault
from lorica.data.sampler import split_eval
from lorica.data.tokenized import TokenizedDataset
from lorica.errors import ModelError
from lorica.models.attention import packing_support
from lorica.models.load import is_local, load_config, load_tokenizer
from lorica.recipes import console


@dataclass(frozen=True)
class PreparedRun:
    """The data of a run: samples as tokens, and the rows that they come from in the same order."""

    tokenizer: PreTrainedTokenizerBase
    renderer: Renderer
    train: TokenizedDataset
    train_examples: list[Example]
    eval: TokenizedDataset | None
    eval_examples: list[Example]
    faults: list[RowFault]
    format: str

    @property
    def pad_id(self) -> int:
        """A token for padding; it is masked everywhere, so any will do where the tokenizer names none."""
        pad = self.tokenizer.pad_token_id
        return int(pad) if isinstance(pad, int) else 0


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


def make_renderer(config: RunConfig, tokenizer: PreTrainedTokenizerBase) -> Renderer:
    """How this run turns rows into tokens."""
    data = config.data
    return Renderer(
        tokenizer,
        loss_on=data.loss_on,
        max_length=data.max_length,
        template=data.template,
        too_long=data.too_long,
    )


def why_padded(config: RunConfig, base: PretrainedConfig) -> str | None:
    """None where the run packs its batches; else, as a sentence, why it pads them."""
    if not config.data.packing:
        return "Batches are padded: data.packing is false."
    reason = packing_support(base)
    return None if reason is None else f"Batches are padded, because this model cannot pack: {reason}."


def prepare(config: RunConfig) -> PreparedRun:
    """Read, render and tokenise the run's data; hold out evaluation rows where `data.eval` is a fraction.

    `base_config` comes before this. Says on stderr what was left out and what overlaps.

    Raises:
        DataError: rows that cannot be read under `data.on_bad_row: error`, or nothing to train on.
    """
    data = config.data
    tokenizer = load_tokenizer(config.model.base, revision=config.model.revision)
    renderer = make_renderer(config, tokenizer)
    loaded = _load(config, renderer, data.train, data.split)
    faults = list(loaded.faults)
    train, train_examples = loaded.dataset, loaded.examples
    evaluation: TokenizedDataset | None = None
    eval_examples: list[Example] = []
    if isinstance(data.eval, str):
        held_out = _load(config, renderer, data.eval, data.eval_split)
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
    return PreparedRun(tokenizer, renderer, train, train_examples, evaluation, eval_examples, faults, loaded.format)


def _load(config: RunConfig, renderer: Renderer, source: str, split: str | None) -> Prepared:
    data = config.data
    return load_dataset(
        source, renderer, format=data.format, columns=data.columns, split=split, on_bad_row=data.on_bad_row
    )
