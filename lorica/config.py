"""The configuration: five sections of typed fields, read from run.yaml and `section.key=value` overrides.

Every field stands here once, with its type, default, range and description; nothing else in the project parses options.
The section `method` is the exception: its fields are those of the chosen method's options, in the method's own file.
A fault says `run.yaml:7: train.lr: ...`, an unknown key says which one was probably meant, and all faults of a file and
a command line come at once, before any work is done. Values are literal: no templates, no environment
variables. A path in run.yaml is relative to the directory in which the command runs.

What it gives up: inheritance between files. A run is one file and what the command line changes in it.
"""

from __future__ import annotations

import dataclasses
import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, Self

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PlainSerializer,
    ValidationError,
    create_model,
    model_validator,
)

from lorica.config_faults import hint, reason, show
from lorica.errors import ConfigError
from lorica.strict_yaml import Document, Fault, KeyPath, dotted, dump_value, parse, read_text, resolve_scalar

if TYPE_CHECKING:
    from lorica.methods.method import MethodOptions

_DEFAULT = "default"
_DEFAULT_METHOD = "lora"
_Sections = Mapping[str, type[BaseModel]]
# The line number of what stands on the command line: it sorts after every line of a file.
_OVERRIDE = 2**31
_MAX_SHOWN = 100
_NO_OVERRIDE = "{!r} is no override; write section.key=value, as in train.lr=3e-4"


def _path_text(value: object) -> object:
    """Python callers may give a `Path`; text must be able to name something."""
    if isinstance(value, os.PathLike):
        value = os.fspath(value)
    if isinstance(value, str):
        if not value.strip():
            raise ValueError("must not be empty")
        if "\0" in value or any("\ud800" <= character <= "\udfff" for character in value):
            raise ValueError("holds characters that no path or name can hold")
    return value


def _evaluation_data(value: object) -> object:
    if value is None or isinstance(value, str | os.PathLike):
        return _path_text(value)
    if isinstance(value, int | float) and not isinstance(value, bool) and 0 < value < 1:
        return float(value)
    raise ValueError("must be a fraction between 0 and 1 of the training rows, a path, or null for no evaluation")


def num_bytes(text: str) -> int:
    """Bytes of "8GiB", "8 GB", "512M" or "1000000"; all prefixes are powers of 1024. ValueError for anything else."""
    match = re.fullmatch(r"([0-9]+(?:\.[0-9]+)?)\s*([kmgt]?)(?:i?b)?", text.strip().lower())
    if match is None or float(match[1]) == 0:
        raise ValueError(f"{text!r} is no amount of memory; write it like 8GiB, 512MiB or a number of bytes")
    return int(float(match[1]) * 1024 ** " kmgt".index(match[2] or " "))


def _memory(value: object) -> object:
    if value is None or isinstance(value, bool):
        return value
    try:
        return num_bytes(str(value))
    except ValueError:
        raise ValueError("must be an amount of memory such as 8GiB, 512MiB or a number of bytes, or null") from None


def _warmup(value: object) -> object:
    if isinstance(value, int | float) and value >= 1 and value % 1:
        raise ValueError("must be a fraction below 1 or a whole number of steps")
    return value


PathText = Annotated[str, BeforeValidator(_path_text)]
Count = Annotated[int, Field(ge=1, lt=2**31)]
Positive = Annotated[float, Field(gt=0)]
# One field may take two types; the validator in front decides, so that a fault is one sentence.
Memory = Annotated[int | None, BeforeValidator(_memory)]
EvaluationData = Annotated[float | str | None, BeforeValidator(_evaluation_data)]


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


class ModelConfig(_Section):
    """Which base model, and how it is held."""

    base: PathText = Field(description='folder or hub id of the base model; "embedded" is the small one in the package')
    task: Literal["auto", "causal", "classification", "seq2seq"] = Field(
        default="auto",
        description="what it is trained to do; auto: classification for an encoder, seq2seq for an encoder-decoder, "
        "else causal",
    )
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        default="auto",
        description="number format of the base's weights; auto: as stored, where this machine computes it well",
    )
    quant: Literal["nf4", "fp4"] | None = Field(
        default=None,
        description="quantise the frozen weights of linear layers to 4 bits while they are read; nf4 is QLoRA's",
    )
    double_quant: bool = Field(
        default=True, description="with quant: quantise the scales too, 4.13 bits instead of 4.5"
    )
    revision: PathText | None = Field(default=None, description="branch, tag or commit of a hub id")
    device: Literal["auto", "cpu", "cuda"] = Field(
        default="auto", description="where to compute; auto: the GPU if there is one"
    )


class DataConfig(_Section):
    """Which rows, and how they become tokens."""

    train: PathText = Field(
        description="training rows: a .jsonl, .json, .csv or .parquet file, a folder of them, or a hub id"
    )
    eval: EvaluationData = Field(
        default=0.05, description="evaluation rows: a fraction of the training rows held out, a path, or null for none"
    )
    format: Literal["auto", "alpaca", "sharegpt", "messages", "prompt_response", "text", "classification"] = Field(
        default="auto", description="how a row is laid out; auto: recognised by its columns"
    )
    columns: dict[str, str] = Field(
        default={}, description="where your columns have other names: {the format's name: yours}"
    )
    split: PathText | None = Field(default=None, description="split of a hub id to train on")
    eval_split: PathText | None = Field(default=None, description="split of a hub id to evaluate on")
    template: PathText = Field(
        default="auto",
        description="chat template: auto (the base's own, else chatml), chatml, plain, or the path of a Jinja file",
    )
    loss_on: Literal["response", "assistant", "all"] = Field(
        default="response",
        description="tokens that are learned: the last assistant turn, all assistant turns, or everything",
    )
    max_length: int = Field(default=1024, ge=2, lt=2**31, description="longest sample, in tokens")
    too_long: Literal["drop", "truncate", "error"] = Field(default="drop", description="what happens to longer samples")
    packing: bool = Field(
        default=True, description="lay samples end to end instead of padding them; attention never crosses samples"
    )
    on_bad_row: Literal["error", "drop"] = Field(
        default="error", description="rows that cannot be read: refuse to train, or leave them out"
    )


class TrainConfig(_Section):
    """How it is trained."""

    output: PathText = Field(default="runs/run", description="the run folder: checkpoints, adapter, metrics, report")
    epochs: Positive = Field(default=1.0, description="passes over the training rows; may be a fraction")
    max_steps: Count | None = Field(
        default=None, description="stop after this many optimizer steps, if the epochs last longer"
    )
    lr: Positive = Field(default=1e-4, description="learning rate at its peak")
    schedule: Literal["cosine", "linear", "constant"] = Field(
        default="cosine", description="how the learning rate falls after the warm-up"
    )
    warmup: Annotated[float, BeforeValidator(_warmup)] = Field(
        default=0.03, ge=0, lt=2**31, description="warm-up: a fraction of all steps if below 1, else a number of steps"
    )
    min_lr: float = Field(default=0.0, ge=0, le=1, description="learning rate at the end, as a fraction of lr")
    restart_every: Count | None = Field(
        default=None,
        description="steps after which what a low-rank pair learned is folded away and a fresh one starts; null: never",
    )
    batch_tokens: Count = Field(default=4096, description="tokens per optimizer step")
    micro_batch_tokens: Count | None = Field(
        default=None,
        description="tokens per forward pass; less needs less memory and gives the same gradient; null: batch_tokens",
    )
    weight_decay: float = Field(default=0.0, ge=0, description="AdamW's decoupled weight decay")
    beta1: float = Field(default=0.9, ge=0, lt=1, description="AdamW's decay of the mean gradient")
    beta2: float = Field(default=0.999, ge=0, lt=1, description="AdamW's decay of the mean squared gradient")
    epsilon: Positive = Field(default=1e-8, description="AdamW's term against division by zero")
    clip: Positive = Field(default=1.0, description="largest norm of the gradient of a step")
    optimizer_memory: Memory = Field(
        default=None,
        description="most memory, as in 2GiB, for AdamW's moments on the device; the rest is paged; null: no limit",
    )
    optimizer_host_memory: Memory = Field(
        default=None,
        description="with a GPU, most host memory for paged moments, before the disk; null: half of what is free",
    )
    optimizer_bits: Literal[32, 8] = Field(
        default=32, description="bits of each of AdamW's moments; 8: a quarter of the memory, coarser"
    )
    activation_checkpointing: Literal[False, True, "offload"] = Field(
        default=False,
        description="compute activations twice instead of keeping them: less memory, slower; offload: what is kept all "
        "the same waits on disk, or with a GPU in host memory",
    )
    eval_every: Count = Field(default=50, description="optimizer steps between evaluations")
    save_every: Count = Field(default=50, description="optimizer steps between checkpoints")
    keep_checkpoints: Count = Field(default=2, description="newest checkpoints kept; the best one always stays")
    early_stopping: Count | None = Field(
        default=None, description="stop after this many evaluations without improvement; null: never"
    )
    on_nan: Literal["stop", "skip"] = Field(
        default="stop", description="a loss that is not finite: stop with exit code 5, or skip the step"
    )
    seed: int = Field(
        default=0, ge=0, lt=2**32, description="seed of everything random: order, initial adapter, dropout"
    )
    threads: Annotated[int, Field(ge=1, le=4096)] | None = Field(
        default=None, description="CPU threads; null: as many as torch chooses"
    )
    log_every: Count = Field(default=1, description="optimizer steps between log lines")


class EvalConfig(_Section):
    """How `lorica eval` and the report measure."""

    max_new_tokens: Count = Field(default=64, description="longest generated answer, in tokens")
    batch_size: Count = Field(default=16, description="prompts generated at once")
    max_samples: Count = Field(default=200, description="most evaluation rows to generate answers for")
    generate: bool = Field(default=True, description="generate answers and score them, besides loss and perplexity")


def _method(value: object) -> object:
    """Options as they are, or made of a mapping that has the method's name and its fields."""
    # Here and below methods are imported when they are needed: they bring torch.
    from lorica.methods.method import MethodOptions, method_options

    if isinstance(value, Mapping):
        fields = {str(key): item for key, item in value.items()}
        return method_options(str(fields.pop("name", _DEFAULT_METHOD)))(**fields)
    if not isinstance(value, MethodOptions):
        raise ValueError("must be the options of a method, such as lorica.LoRA(rank=16)")
    return value


def _method_values(options: MethodOptions) -> dict[str, Any]:
    fields = {field.name: getattr(options, field.name) for field in dataclasses.fields(options)}
    return {"name": options.method_name(), **fields}


Method = Annotated[Any, BeforeValidator(_method), PlainSerializer(_method_values)]


class RunConfig(_Section):
    """A whole run, from `load_config` or from Python: `RunConfig(model=ModelConfig(base=...), data=DataConfig(...))`.

    `method` takes a method's options, `lorica.LoRA(rank=8)`. In Python a fault raises pydantic's `ValidationError` (a
    `ValueError`).
    """

    model: ModelConfig
    method: Method = Field(default_factory=lambda: _method({}))
    data: DataConfig
    train: TrainConfig = TrainConfig()
    eval: EvalConfig = EvalConfig()

    @model_validator(mode="after")
    def _values_agree(self) -> Self:
        flat = {f"{name}.{key}": value for name, keys in values(self).items() for key, value in keys.items()}
        faults = _disagreements(flat)
        if faults:
            raise ValueError("; ".join(f"{keys[0]}: {reason}" for keys, reason in faults))
        return self


@cache
def sections(method: str = _DEFAULT_METHOD) -> Mapping[str, type[BaseModel]]:
    """The sections of run.yaml for a method, each a model of its fields."""
    from lorica.methods.method import method_names, method_options, option_fields

    known = Literal[method_names()]  # type: ignore[valid-type]
    name = (known, Field(default=_DEFAULT_METHOD, description="the parameter-efficient method"))
    fields = option_fields(method_options(method if method in method_names() else _DEFAULT_METHOD))
    # The name stands first, before the fields of the options.
    own = {key: (info.annotation, info) for key, info in fields.model_fields.items()}
    return {
        "model": ModelConfig,
        "method": create_model("MethodConfig", __base__=_Section, __doc__="What is trained.", name=name, **own),  # type: ignore[call-overload]
        "data": DataConfig,
        "train": TrainConfig,
        "eval": EvalConfig,
    }


def values(config: RunConfig) -> dict[str, dict[str, Any]]:
    """Every value of a configuration, by section and key."""
    own = {name: dict(getattr(config, name)) for name in SECTION_NAMES if name != "method"}
    return {name: own.get(name) or _method_values(config.method) for name in SECTION_NAMES}


SECTION_NAMES = ("model", "method", "data", "train", "eval")


@dataclass(frozen=True, slots=True)
class Described:
    """One row of `lorica config show`."""

    key: str
    value: Any
    origin: str
    description: str


@dataclass(frozen=True, slots=True)
class Resolved:
    """A configuration and where each value came from: "run.yaml:7", "command line" or "default", by dotted key."""

    config: RunConfig
    origin: dict[str, str]

    def dump_yaml(self) -> str:
        """Every field as YAML that `load_config` reads back to the same configuration; comments give the origins."""
        return dump_yaml(self.config, self.origin)

    def describe(self) -> list[Described]:
        """All fields in the order of the sections."""
        known = sections(self.config.method.method_name())
        return [
            Described(
                f"{name}.{key}", value, self.origin[f"{name}.{key}"], known[name].model_fields[key].description or ""
            )
            for name, keys in values(self.config).items()
            for key, value in keys.items()
        ]


def dump_yaml(config: RunConfig, origin: Mapping[str, str] | None = None) -> str:
    """Every field of `config` as YAML; with `origin`, values that are no defaults say where they came from."""
    lines = []
    for name, keys in values(config).items():
        lines.append(f"{name}:")
        for key, value in keys.items():
            source = (origin or {}).get(f"{name}.{key}", _DEFAULT)
            # The comment is for readers; JSON's escapes keep a file name from ending the line.
            comment = "" if source == _DEFAULT else f"  # {dump_value(source)}"
            lines.append(f"  {key}: {dump_value(value)}{comment}")
    return "\n".join(lines) + "\n"


def load_config(path: str | Path | None, overrides: Sequence[str] = ()) -> Resolved:
    """Read run.yaml and apply `section.key=value` overrides; of two overrides of one key the later wins.

    `path` may be a run folder, whose config.yaml is read, or None for overrides alone. Raises `ConfigError` with every
    fault, those of the file sorted by line, those of the command line last.
    """
    file = Path(path) if path is not None else None
    if file is not None and (file / "config.yaml").is_file():
        file = file / "config.yaml"
    document = _read(file)
    known = sections(_method_name(document.value, overrides))
    faults = [*document.faults, *_shape_faults(document, known)]
    tree = _known_keys(document.value, known)
    faults += _apply_overrides(tree, overrides, document.lines, known)
    config, value_faults = _validate(tree, faults, document.lines, known)
    faults = sorted([*faults, *value_faults], key=lambda fault: fault.line)
    if faults or config is None:
        more = [f"... and {len(faults) - _MAX_SHOWN} more"] if len(faults) > _MAX_SHOWN else []
        messages = [f"{_where(file, fault.line)}: {_message(fault)}" for fault in faults[:_MAX_SHOWN]]
        raise ConfigError("\n".join(messages + more))
    keys = [(name, key) for name, section in known.items() for key in section.model_fields]
    origin = {
        dotted(place): _where(file, document.lines[place]) if place in document.lines else _DEFAULT for place in keys
    }
    return Resolved(config, origin)


def _method_name(document: Any, overrides: Sequence[str]) -> str:
    """The method that is asked for, where that can be made out; its faults are found later."""
    from lorica.methods.method import method_names

    names = [text.partition("=")[2].strip() for text in overrides if text.partition("=")[0].strip() == "method.name"]
    method = document.get("method") if isinstance(document, dict) else None
    given = method.get("name") if isinstance(method, dict) else None
    name = names[-1] if names else given
    return name if isinstance(name, str) and name in method_names() else _DEFAULT_METHOD


def _read(file: Path | None) -> Document:
    if file is None:
        return Document()
    text = read_text(file)
    if isinstance(text, str):
        return parse(text)
    next_step = "" if file.exists() else "; `lorica init` writes one"
    raise ConfigError(f"{_where(file, text.line)}: {text.reason}{next_step}")


def _where(file: Path | None, line: int) -> str:
    if line == _OVERRIDE or file is None:
        return "command line"
    return f"{file}:{line}" if line else str(file)


def _message(fault: Fault) -> str:
    return f"{fault.key}: {fault.reason}" if fault.key else fault.reason


def _shape_faults(document: Document, known: _Sections) -> list[Fault]:
    """Faults of the outer form: what is no mapping, and sections and keys that do not exist."""
    value, lines = document.value, document.lines
    if value is None:
        return []
    if not isinstance(value, dict):
        expected = f"must hold the sections {', '.join(known)}"
        return [] if document.faults else [Fault(lines[()], "", f"{expected}, got {show(value)}")]
    faults = []
    keys = _keys(known)
    for name, section in value.items():
        if name not in keys:
            faults.append(Fault(lines[(name,)], name, f"unknown section{hint(keys, '', name)}"))
        elif isinstance(section, dict):
            unknown = [key for key in section if key not in keys[name]]
            faults += [Fault(lines[name, key], f"{name}.{key}", _unknown(known, name, key)) for key in unknown]
        elif section is not None:
            faults.append(Fault(lines[(name,)], name, f"must be a section of keys, got {show(section)}"))
    return faults


def _keys(known: _Sections) -> dict[str, list[str]]:
    return {name: list(section.model_fields) for name, section in known.items()}


def _unknown(known: _Sections, section: str, key: str) -> str:
    if section == "method" and (owners := _methods_with(key)):
        has = ", ".join(_keys(known)[section])
        return f"unknown key for this method, which has {has}; it belongs to {', '.join(owners)}"
    return f"unknown key{hint(_keys(known), section, key)}"


def _methods_with(key: str) -> list[str]:
    from lorica.methods.method import method_names, method_options, option_fields

    return [name for name in method_names() if key in option_fields(method_options(name)).model_fields]


def _known_keys(value: Any, known: _Sections) -> dict[str, dict[str, Any]]:
    """What remains without the faults of `_shape_faults`."""
    given = value if isinstance(value, dict) else {}
    return {
        name: {key: item for key, item in section.items() if key in known[name].model_fields}
        for name, section in given.items()
        if name in known and isinstance(section, dict)
    }


def _apply_overrides(
    tree: dict[str, dict[str, Any]], overrides: Sequence[str], lines: dict[KeyPath, int], known: _Sections
) -> list[Fault]:
    """Put overrides into `tree` and note them in `lines`; a mapping field takes a key of its own after a dot."""
    faults: list[Fault] = []
    for override in overrides:
        key, equals, text = override.partition("=")
        key = key.strip()
        name, _, rest = key.partition(".")
        field, _, inner = rest.partition(".")
        if problem := _override_problem(known, name, field, inner) if equals else _NO_OVERRIDE.format(override):
            faults.append(Fault(_OVERRIDE, key if equals else "", problem))
            continue
        value, value_faults = _override_value(text)
        faults += [Fault(_OVERRIDE, key, fault.reason) for fault in value_faults]
        section = tree.setdefault(name, {})
        before = section.get(field)
        section[field] = {**(before if isinstance(before, dict) else {}), inner: value} if inner else value
        for place in [place for place in lines if place[:2] == (name, field)]:
            del lines[place]
        lines[name, field] = _OVERRIDE
    return faults


def _override_problem(known: _Sections, name: str, field: str, inner: str) -> str | None:
    keys = _keys(known)
    if name not in keys:
        return f"unknown key{hint(keys, '', field or name)}"
    if not field:
        return f"is a section; name a key in it, as in {name}.{keys[name][0]}=..."
    if field not in keys[name]:
        return _unknown(known, name, field)
    if inner and not isinstance(known[name].model_fields[field].default, dict):
        return f"unknown key; {name}.{field} is a single value"
    return None


def _override_value(text: str) -> tuple[Any, list[Fault]]:
    """What stands after the `=`: by the file's rules, but unquoted text is taken whole, with its `#` and `: `."""
    text = text.strip()
    if text.startswith(tuple("[{\"'!&*|>@`%")):
        document = parse(text)
        return document.value, document.faults
    try:
        return resolve_scalar(text), []
    except ValueError as error:
        return None, [Fault(_OVERRIDE, "", str(error))]


def _validate(
    tree: Mapping[str, Mapping[str, Any]],
    known_faults: Sequence[Fault],
    lines: Mapping[KeyPath, int],
    known: _Sections,
) -> tuple[RunConfig | None, list[Fault]]:
    """The configuration (None if anything is at fault) and the faults that do not follow from `known_faults`."""
    faults: list[Fault] = []
    sound: dict[str, Any] = {}
    for name, section in known.items():
        given = tree.get(name, {})
        unsound = set()
        try:
            section.model_validate(given)
        except ValidationError as error:
            for detail in error.errors(include_url=False):
                place, key = (name, *detail["loc"]), str(detail["loc"][0])
                unsound.add(key)
                what = reason(dict(detail), section.model_fields[key].annotation)
                faults.append(Fault(_nearest_line(place, lines), dotted(place), what))
        sound |= {
            f"{name}.{key}": given.get(key, info.default)
            for key, info in section.model_fields.items()
            if key not in unsound
        }
    faults = [fault for fault in faults if not any(_follows(fault, earlier) for earlier in known_faults)]
    for keys, what in _disagreements(sound):
        places = [tuple(key.split(".")) for key in keys]
        place = next((place for place in places if place in lines), places[0])
        faults.append(Fault(_nearest_line(place, lines), dotted(place), what))
    if faults or known_faults:
        return None, faults
    return RunConfig.model_validate({name: tree.get(name, {}) for name in known}), []


def _follows(fault: Fault, known: Fault) -> bool:
    """Whether a value's fault only follows from a known one: of the file, of its section, its own, or an item's."""
    in_file = known.line != _OVERRIDE
    return (
        (in_file and not known.key)
        or (in_file and known.key in SECTION_NAMES and fault.key.startswith(f"{known.key}."))
        or fault.key == known.key.partition("[")[0]
    )


def _nearest_line(place: KeyPath, lines: Mapping[KeyPath, int]) -> int:
    """The line of a key, or of what it should stand in, or 0."""
    return next((lines[place[:n]] for n in range(len(place), 0, -1) if place[:n] in lines), 0)


def _disagreements(values: Mapping[str, Any]) -> list[tuple[tuple[str, ...], str]]:
    """Values that are fine alone and not together, as (keys, reason). Absent values are at fault already: skipped."""
    faults: list[tuple[tuple[str, ...], str]] = []
    missing = object()

    def check(keys: tuple[str, ...], problem: Callable[..., str | None]) -> None:
        given = [values.get(key, missing) for key in keys]
        if missing not in given and (what := problem(*given)):
            faults.append((keys, what))

    check(("train.micro_batch_tokens", "train.batch_tokens"), _micro_batch_problem)
    check(("data.max_length", "train.micro_batch_tokens", "train.batch_tokens"), _length_problem)
    check(("train.warmup", "train.max_steps"), _warmup_problem)
    check(("train.early_stopping", "data.eval"), _early_stopping_problem)
    check(("train.restart_every", "method.name"), _restart_problem)
    check(("method.init", "model.quant"), _loftq_problem)
    return faults


def _micro_batch_problem(micro: int | None, batch: int) -> str | None:
    if micro is None or micro <= batch:
        return None
    return f"{micro} tokens per forward pass are more than the {batch} of a whole step (train.batch_tokens)"


def _length_problem(longest: int, micro: int | None, batch: int) -> str | None:
    name, budget = ("train.batch_tokens", batch) if micro is None else ("train.micro_batch_tokens", micro)
    if longest <= budget:
        return None
    return (
        f"samples of data.max_length = {longest} tokens do not fit into {name} = {budget}; lower one or raise the other"
    )


def _warmup_problem(warmup: float, max_steps: int | None) -> str | None:
    if max_steps is None or warmup < 1 or warmup <= max_steps:
        return None
    return f"{warmup:g} warm-up steps are more than train.max_steps = {max_steps}"


def _restart_problem(every: int | None, method: str) -> str | None:
    from lorica.methods.method import method_names, method_options

    if every is None or method not in method_names() or method_options(method).can_restart:
        return None
    able = [name for name in method_names() if method_options(name).can_restart]
    return f"{method} cannot start anew in a run; {', '.join(able)} can. Set null, or another method.name"


def _loftq_problem(init: str, quant: str | None) -> str | None:
    if init != "loftq" or quant is not None:
        return None
    return "loftq starts from what quantising takes away, and model.quant = null takes nothing; set nf4 there"


def _early_stopping_problem(patience: int | None, evaluation: float | str | None) -> str | None:
    if patience is None or evaluation is not None:
        return None
    return "counts evaluations, and data.eval = null leaves none; give data.eval, or null here"
