"""The wording of configuration faults: what came, what was expected, and which key was probably meant.

Apart from config.py because that file is read for the fields. The names of other tools are here so that a newcomer's
`learning_rate` is answered with `train.lr`; they are only hints and are never accepted.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, get_args

from lorica.strict_yaml import dump_value

# What other tools call the things here, by the key here.
_FOREIGN_NAMES = {
    "model.base": "model_name_or_path model_name base_model base_model_name_or_path pretrained",
    "model.dtype": "bf16 fp16 torch_dtype precision",
    "method.name": "finetuning_type peft_type adapter",
    "method.rank": "r lora_r lora_rank lora_dim",
    "method.alpha": "lora_alpha",
    "method.dropout": "lora_dropout",
    "method.targets": "target_modules lora_target lora_target_modules",
    "method.rslora": "use_rslora",
    "method.init": "init_lora_weights",
    "data.train": "dataset datasets train_file dataset_name data_path",
    "data.eval": "val_size val_set_size test_size eval_dataset validation validation_file",
    "data.loss_on": "train_on_inputs completion_only_loss assistant_only_loss mask_history",
    "data.max_length": "max_seq_length max_seq_len cutoff_len sequence_len model_max_length",
    "data.packing": "sample_packing",
    "data.template": "chat_template",
    "train.output": "output_dir",
    "train.epochs": "num_train_epochs num_epochs",
    "train.lr": "learning_rate",
    "train.schedule": "lr_scheduler lr_scheduler_type scheduler",
    "train.warmup": "warmup_ratio warmup_steps",
    "train.min_lr": "lr_min cosine_min_lr_ratio",
    "train.batch_tokens": "batch_size train_batch_size",
    "train.micro_batch_tokens": "per_device_train_batch_size micro_batch_size gradient_accumulation_steps",
    "train.clip": "max_grad_norm gradient_clipping",
    "train.beta1": "adam_beta1",
    "train.beta2": "adam_beta2",
    "train.epsilon": "adam_epsilon eps",
    "train.activation_checkpointing": "gradient_checkpointing",
    "train.eval_every": "eval_steps",
    "train.save_every": "save_steps",
    "train.keep_checkpoints": "save_total_limit",
    "train.early_stopping": "early_stopping_patience",
    "train.log_every": "logging_steps",
}
_FOREIGN = {name: key for key, names in _FOREIGN_NAMES.items() for name in names.split()}

_EXPECTED = {
    "int_type": "must be a whole number",
    "int_from_float": "must be a whole number",
    "float_type": "must be a number",
    "finite_number": "must be a finite number",
    "bool_type": "must be true or false",
    "string_type": "must be text",
    "dict_type": "must be a mapping {{name: value}}",
    "greater_than": "must be above {gt:g}",
    "greater_than_equal": "must be at least {ge:g}",
    "less_than": "must be below {lt:g}",
    "less_than_equal": "must be at most {le:g}",
    "value_error": "{error}",
}


def hint(sections: Mapping[str, Sequence[str]], section: str, key: str) -> str:
    """The end of an "unknown key" message: "; did you mean ...?", or what the section has.

    `sections` maps section names to their keys. Tried in this order: a near miss in the section ("" = the top level),
    the same name in another one, another tool's name, a near miss anywhere. What is less near is no answer: `rank` is
    nearer to `train` than to anything else where a method has no rank.
    """
    here = list(sections[section]) if section else list(sections)
    places: dict[str, list[str]] = {}
    for name, keys in sections.items():
        for field in keys:
            places.setdefault(field, []).append(f"{name}.{field}")
    if near := _near(key, here):
        return f"; did you mean {near!r}?"
    if key in places:
        return f"; did you mean {' or '.join(places[key])}?"
    if key.lower() in _FOREIGN:
        return f"; did you mean {_FOREIGN[key.lower()]}?"
    if near := _near(key, places):
        return f"; did you mean {' or '.join(places[near])}?"
    return f"; {section or 'the file'} has {', '.join(here)}"


def _near(key: str, names: Iterable[str]) -> str | None:
    """The one of `names` that differs from `key` by a slip or two, or that `key` is the beginning of."""
    close = difflib.get_close_matches(key.lower(), names, n=1, cutoff=0.75)
    longer = [name for name in names if len(key) > 2 and name.startswith(key.lower())]
    return next(iter([*close, *longer]), None)


def reason(detail: Mapping[str, Any], annotation: Any) -> str:
    """One entry of pydantic's `ValidationError.errors()` in our words; `annotation` is the field's type."""
    kind, got = detail["type"], detail["input"]
    if kind == "missing":
        return "missing, and it has no default"
    if kind == "literal_error":
        choices = _choices(annotation)
        near = difflib.get_close_matches(str(got), choices, n=1)
        expected = f"must be one of {', '.join(choices)}"
        return f"{expected}, got {show(got)}" + (f"; did you mean {near[0]}?" if near else "")
    expected = _EXPECTED[kind].format(**detail.get("ctx", {})) if kind in _EXPECTED else str(detail["msg"])
    return f"{expected}, got {show(got)}"


def _choices(annotation: Any) -> list[str]:
    """What a Literal allows, or a union of one with None, which is null in YAML."""
    parts = ["null" if part is type(None) else part for part in get_args(annotation)]
    choices = [choice for part in parts for choice in get_args(part) or (part,)]
    return [dump_value(choice) if isinstance(choice, bool) else str(choice) for choice in choices]


def show(value: Any) -> str:
    """A value as messages show it: its kind where that may be the fault, and at most 80 characters."""
    text = repr(value) if isinstance(value, str) else dump_value(value)
    text = text if len(text) <= 80 else f"{text[:77]}..."
    if isinstance(value, str | dict | list | tuple):
        return f"{'text' if isinstance(value, str) else 'mapping' if isinstance(value, dict) else 'list'} {text}"
    return text
