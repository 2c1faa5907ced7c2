"""What a base is trained to do: go on with a text, name its class, or turn one text into another.

The task decides which of transformers' Auto classes loads the base. The rest follows from the model: its loss
(`loss.py`), how its samples become batches (`data/layouts.py`) and how it is scored.

A classifier's head is new: no checkpoint of a language model holds one, and one that was trained for other classes says
nothing of these. So it is trained whole beside the adapter and saved with it (`modules_to_save`), and what was saved
replaces whatever stands there when the base is loaded again.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn
from transformers import (
    MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    PretrainedConfig,
    PreTrainedModel,
)
from transformers.models.auto import modeling_auto as names

from lorica.errors import ModelError


@dataclass(frozen=True)
class Task:
    """name: in run.yaml. peft_name: PEFT's task_type. auto: loads the model. classes: names by model type."""

    name: str
    peft_name: str
    auto: Any
    classes: Mapping[str, str]


CAUSAL = Task("causal", "CAUSAL_LM", AutoModelForCausalLM, names.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
CLASSIFICATION = Task(
    "classification",
    "SEQ_CLS",
    AutoModelForSequenceClassification,
    names.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES,
)
SEQ2SEQ = Task("seq2seq", "SEQ_2_SEQ_LM", AutoModelForSeq2SeqLM, names.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES)
TASKS = {task.name: task for task in (CAUSAL, CLASSIFICATION, SEQ2SEQ)}


def choose_task(wanted: str, config: PretrainedConfig, base: str = "The base") -> Task:
    """The task called `wanted`; for `auto` a saved classifier's or an encoder's is classification, an encoder-decoder's
    seq2seq, all others' causal.

    Raises:
        ModelError: the base cannot do it.
    """
    kind, is_pair = config.model_type, bool(config.is_encoder_decoder)
    fitting = SEQ2SEQ if is_pair else CLASSIFICATION if is_encoder(config) or own_labels(config) else CAUSAL
    task = fitting if wanted == "auto" else TASKS[wanted]
    # Loaded as causal, an encoder still sees the token it should predict: its loss would fall and mean nothing.
    if is_encoder(config) and task is CAUSAL:
        raise ModelError(
            f"{base}: a {kind} model reads in both directions, and a causal language model is wanted. Train it as a "
            "classifier, with model.task=classification; lorica.adapt takes it for anything else."
        )
    if is_pair != (task is SEQ2SEQ) or (task is not CAUSAL and kind not in task.classes):
        raise ModelError(f"{base}: a {kind} model cannot be trained for model.task={task.name}; try {fitting.name}.")
    return task


def is_encoder(config: PretrainedConfig) -> bool:
    """Whether the base reads in both directions and writes nothing."""
    masked = config.model_type in names.MODEL_FOR_MASKED_LM_MAPPING_NAMES
    return masked and not (config.is_encoder_decoder or getattr(config, "is_decoder", True))


def task_of(model: nn.Module) -> Task | None:
    """What `model` was loaded for, by its class; None for a module that is none of these."""
    if type(model).__name__ in CLASSIFICATION.classes.values():
        return CLASSIFICATION
    if isinstance(model, PreTrainedModel) and model.can_generate():
        return SEQ2SEQ if model.config.is_encoder_decoder else CAUSAL
    return None


def own_labels(config: PretrainedConfig) -> tuple[str, ...]:
    """The classes of a checkpoint that was saved as a classifier, by id; none of any other."""
    saved = config.architectures or []
    if not any(name in CLASSIFICATION.classes.values() for name in saved):
        return ()
    return tuple(str(config.id2label[index]) for index in sorted(config.id2label))


def set_labels(config: PretrainedConfig, labels: Sequence[str]) -> None:
    """Write the classes into a base's configuration, which decides the size of the head; and a padding token.

    A decoder's head reads the last token that is no padding, so there must be a token for it.
    """
    config.id2label = dict(enumerate(labels))
    config.label2id = {label: index for index, label in enumerate(labels)}
    config.problem_type = "single_label_classification"
    text = config.get_text_config()
    if text.pad_token_id is None:
        text.pad_token_id = padding_id(config)


def padding_id(config: PretrainedConfig) -> int:
    """The token that a classifier's rows are padded with: the base's own, else its end token."""
    text = config.get_text_config()
    end = text.eos_token_id[0] if isinstance(text.eos_token_id, list) else text.eos_token_id
    return int(next((token for token in (text.pad_token_id, end) if token is not None), 0))


def start_position(config: PretrainedConfig) -> int:
    """The position of a classifier's first token: RoBERTa and its kin count on from that of padding."""
    home = sys.modules[MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING[type(config)].__module__]
    counts_on = any(hasattr(part, "create_position_ids_from_input_ids") for part in (home, *vars(home).values()))
    return padding_id(config) + 1 if counts_on else 0


def head_modules(model: PreTrainedModel) -> tuple[str, ...]:
    """The names of a classifier's modules that are no part of the language model: its head."""
    if task_of(model) is not CLASSIFICATION:
        return ()
    children = model.named_children()
    return tuple(name for name, child in children if child is not model.base_model and list(child.parameters()))
