"""What a path or a name on the command line stands for, and how it is opened: for eval, generate, merge, export.

a run folder        config.yaml + adapter/             -> the run's base with the run's adapter
an adapter folder   adapter_config.json                -> the base that it names, with this adapter
anything else       a folder, a hub id, "embedded"     -> that model as it is

A base that has moved since is named anew by the override `model.base=FOLDER`, which every verb takes.
"""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from safetensors import SafetensorError, safe_open
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lorica.config import DataConfig, ModelConfig, RunConfig, load_config
from lorica.errors import AdapterError, ConfigError
from lorica.files import read_json_object
from lorica.interop.folder import CONFIG as ADAPTER_CONFIG
from lorica.interop.folder import WEIGHTS as ADAPTER_WEIGHTS
from lorica.interop.folder import read_base_quant, read_labels
from lorica.interop.peft import load_adapter
from lorica.models.load import load_config as load_base_config
from lorica.models.load import load_model, load_tokenizer
from lorica.models.tasks import TASKS, own_labels
from lorica.recipes.preparing import announce_hub, base_config
from lorica.recipes.tasks import AnyRenderer, RunTask, run_task
from lorica.strict_yaml import dump_value


@dataclass(frozen=True, slots=True)
class Source:
    """A model that can be opened. adapter: None for a plain model. config: of the run that it belongs to, if any.

    labels: a classifier's classes by id, where its adapter says them.
    """

    model: ModelConfig
    adapter: Path | None
    config: RunConfig | None
    labels: tuple[str, ...] = ()

    @property
    def run(self) -> RunConfig:
        """The run that it belongs to, or one of defaults."""
        return self.config or RunConfig(model=self.model, data=DataConfig(train="none"))

    def task(self) -> RunTask:
        """What it is trained to do."""
        return run_task(self.run, load_base_config(self.model.base, revision=self.model.revision))

    def load_base(self) -> PreTrainedModel:
        """The base without the adapter, frozen."""
        model = self.model
        return load_model(
            model.base,
            dtype=model.dtype,
            device=model.device,
            revision=model.revision,
            task=model.task,
            labels=self.labels,
            quant=model.quant,
            double_quant=model.double_quant,
        ).requires_grad_(False)

    def open_tokenizer(self) -> tuple[PreTrainedTokenizerBase, AnyRenderer]:
        """The base's tokenizer, and the renderer that the run trained with (the default one without a run)."""
        tokenizer = load_tokenizer(self.model.base, revision=self.model.revision)
        base = load_base_config(self.model.base, revision=self.model.revision)
        return tokenizer, run_task(self.run, base).renderer(self.run, tokenizer, base, self.labels or own_labels(base))


def open_model(
    run_or_base: str | Path, overrides: Sequence[str] = (), *, base_only: bool = False
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase, AnyRenderer]:
    """The model that `run_or_base` stands for, in evaluation mode, with its tokenizer and renderer.

    Args:
        overrides: `section.key=value`, as `find_source` takes them.
        base_only: leave the adapter off.

    Raises:
        AdapterError: the run has no adapter yet, or the adapter cannot be loaded.
        ConfigError: overrides that cannot be meant.
        ModelError: the base cannot be loaded.
    """
    source = find_source(run_or_base, overrides)
    tokenizer, renderer = source.open_tokenizer()
    model = source.load_base()
    if source.adapter is not None and not base_only:
        load_adapter(model, source.adapter).eval()
    return model, tokenizer, renderer


def find_source(run_or_base: str | Path, overrides: Sequence[str] = ()) -> Source:
    """What `run_or_base` stands for; nothing heavy is loaded.

    Args:
        overrides: `section.key=value`, on top of the run's config.yaml; of the section `model` alone where there is no
            run.

    Raises:
        AdapterError: a run folder without an adapter, an adapter folder that does not name its base, or weights that
            are cut off.
        ConfigError: a run that is not among those beside it, a config.yaml that cannot be read, or overrides that
            cannot be meant.
        ModelError: the base that a run or an adapter names is nowhere.
    """
    path = Path(run_or_base)
    if _is_run(path):
        config = load_config(path, overrides).config
        if not (path / "adapter" / ADAPTER_CONFIG).is_file():
            raise AdapterError(
                f"{path} is a run without an adapter: its training has not finished. "
                f"`lorica train {path} --resume auto` goes on with it."
            )
        if fault := adapter_fault(path / "adapter"):
            raise AdapterError(
                f"{fault} `lorica train {path} --resume auto` writes it again from the run's checkpoints."
            )
        base_config(config.model)
        return Source(config.model, path / "adapter", config, read_labels(path / "adapter"))
    if (path / ADAPTER_CONFIG).is_file():
        # A run's own folder knows its base better than the adapter inside it: dtype, revision, template.
        if path.name == "adapter" and _is_run(path.parent):
            return find_source(path.parent, overrides)
        if (path / ADAPTER_WEIGHTS).is_file() and (fault := adapter_fault(path)):
            raise AdapterError(f"{fault} Copy the folder again from where it was made.")
        model = _without_run(path, [*_named_base(path, overrides), *overrides])
        base_config(model)
        return Source(model, path, None, read_labels(path))
    _refuse_misspelt(path)
    model = _without_run(path, [f"model.base={dump_value(str(run_or_base))}", *overrides])
    announce_hub(model.base)
    return Source(model, None, None)


def adapter_fault(folder: Path) -> str | None:
    """Why the weights of an adapter folder cannot be read, as a sentence, or None; their header alone is read."""
    file = folder / ADAPTER_WEIGHTS
    if not file.is_file():
        return f"{file} is missing."
    try:
        with safe_open(file, framework="pt"):
            return None
    except (SafetensorError, OSError) as error:
        return f"{file} is damaged or cut off ({error})."


def _is_run(path: Path) -> bool:
    return (path / "config.yaml").is_file()


def _refuse_misspelt(path: Path) -> None:
    """Refuse a name beside runs that is none: taken for a hub id, it would be looked for on the network."""
    if path.exists() or len(path.parts) < 2 or not path.parent.is_dir():
        return
    runs = sorted(folder.name for folder in path.parent.iterdir() if _is_run(folder))
    if runs:
        close = difflib.get_close_matches(path.name, runs, n=1)
        hint = f"Did you mean {path.parent / close[0]}?" if close else f"There are {', '.join(runs[:8])}."
        raise ConfigError(f"{path}: there is no such run in {path.parent}. {hint}")


def _without_run(path: Path, assignments: Sequence[str]) -> ModelConfig:
    """The section `model` that `assignments` make, of which a later one wins, where no config.yaml says it."""
    others = [assignment for assignment in assignments if not assignment.startswith("model.")]
    if others:
        raise ConfigError(f"{path} is no run folder: only model.KEY=VALUE can be given for it, not {others[0]}.")
    # The rows that a configuration must name are not read.
    return load_config(None, ["data.train=none", *assignments]).config.model


def _named_base(folder: Path, overrides: Sequence[str]) -> list[str]:
    """What an adapter folder says of its base, as assignments."""
    try:
        config = read_json_object(folder / ADAPTER_CONFIG)
    except (OSError, ValueError) as error:
        raise AdapterError(str(error)) from None
    tasks = {task.peft_name: task.name for task in TASKS.values()}
    said = {
        "model.base": config.get("base_model_name_or_path"),
        "model.revision": config.get("revision"),
        "model.task": tasks.get(str(config.get("task_type"))),
    }
    named = [f"{key}={dump_value(value)}" for key, value in said.items() if isinstance(value, str) and value]
    if not any(assignment.startswith("model.base=") for assignment in (*named, *overrides)):
        raise AdapterError(
            f"{folder / ADAPTER_CONFIG}: base_model_name_or_path is {said['model.base']!r}, so the base is not known. "
            "Say which it is: model.base=FOLDER."
        )
    if quant := read_base_quant(folder):
        scheme, _, nested = quant.partition(", ")
        named += [f"model.quant={dump_value(scheme)}", f"model.double_quant={dump_value(bool(nested))}"]
    return named
