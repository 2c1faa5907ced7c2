"""What a path or a name on the command line stands for, and how it is opened: for eval, generate, merge, export.

a run folder        config.yaml + adapter/             -> the run's base with the run's adapter
an adapter folder   adapter_config.json                -> the base that it names, with this adapter
anything else       a folder, a hub id, "embedded"     -> that model as it is
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lorica.config import ModelConfig, RunConfig, load_config
from lorica.data.render import Renderer
from lorica.errors import AdapterError
from lorica.files import read_json_object
from lorica.interop.peft import CONFIG as ADAPTER_CONFIG
from lorica.interop.peft import load_adapter
from lorica.models.load import is_local, load_model, load_tokenizer
from lorica.recipes import console
from lorica.recipes.preparing import make_renderer


@dataclass(frozen=True, slots=True)
class Source:
    """A model that can be opened. adapter: None for a plain model. config: of the run that it belongs to, if any."""

    model: ModelConfig
    adapter: Path | None
    config: RunConfig | None

    def load_base(self) -> PreTrainedModel:
        """The base without the adapter, frozen."""
        model = self.model
        return load_model(model.base, dtype=model.dtype, device=model.device, revision=model.revision).requires_grad_(
            False
        )

    def open_tokenizer(self) -> tuple[PreTrainedTokenizerBase, Renderer]:
        """The base's tokenizer, and the renderer that the run trained with (the default one without a run)."""
        tokenizer = load_tokenizer(self.model.base, revision=self.model.revision)
        return tokenizer, Renderer(tokenizer) if self.config is None else make_renderer(self.config, tokenizer)


def open_model(
    run_or_base: str | Path, base_only: bool = False
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase, Renderer]:
    """The model that `run_or_base` stands for, in evaluation mode, with its tokenizer and renderer.

    Args:
        base_only: leave the adapter off.

    Raises:
        AdapterError: the run has no adapter yet, or the adapter cannot be loaded.
        ModelError: the base cannot be loaded.
    """
    source = find_source(run_or_base)
    tokenizer, renderer = source.open_tokenizer()
    model = source.load_base()
    if source.adapter is not None and not base_only:
        load_adapter(model, source.adapter).eval()
    return model, tokenizer, renderer


def find_source(run_or_base: str | Path) -> Source:
    """What `run_or_base` stands for; nothing heavy is loaded.

    Raises:
        AdapterError: a run folder without an adapter, or an adapter folder that does not name its base.
        ConfigError: the run's config.yaml cannot be read.
    """
    path = Path(run_or_base)
    if _is_run(path):
        config = load_config(path).config
        if not (path / "adapter" / ADAPTER_CONFIG).is_file():
            raise AdapterError(
                f"{path} is a run without an adapter: its training has not finished. "
                f"`lorica train {path} --resume auto` goes on with it."
            )
        return Source(config.model, path / "adapter", config)
    if (path / ADAPTER_CONFIG).is_file():
        # A run's own folder knows its base better than the adapter inside it: dtype, revision, template.
        if path.name == "adapter" and _is_run(path.parent):
            return find_source(path.parent)
        return Source(_named_base(path), path, None)
    if not is_local(run_or_base):
        console.log(f"{run_or_base} is no folder here; asking the hub for it.")
    return Source(ModelConfig(base=str(run_or_base)), None, None)


def _is_run(path: Path) -> bool:
    return (path / "config.yaml").is_file()


def _named_base(folder: Path) -> ModelConfig:
    try:
        config = read_json_object(folder / ADAPTER_CONFIG)
    except (OSError, ValueError) as error:
        raise AdapterError(str(error)) from None
    base, revision = config.get("base_model_name_or_path"), config.get("revision")
    if not (isinstance(base, str) and base):
        raise AdapterError(
            f"{folder / ADAPTER_CONFIG}: base_model_name_or_path is {base!r}, so the base is not known. "
            "Write the base's folder or hub id there."
        )
    return ModelConfig(base=base, revision=revision if isinstance(revision, str) and revision else None)
