"""The method contract: an options dataclass and an `Adapter` that wraps ONE module of the model.

Every method wraps modules, so attaching, saving, merging, planning and training need to know nothing else about it:

- `Adapter.base` is the wrapped, frozen module, and `forward` takes what `base` takes.
- At the start the output equals the base's, unless the method says otherwise.
- `merged()` gives a new plain module, or raises `NotMergeableError` with the reason.
- `num_parameters()` counts what is trained; `auxiliary_loss()` adds to the loss (load balancing and the like).

The options know which kinds of module they can wrap and how to wrap one. A method is found by its file name:
`methods/lora.py` is the method `lora`, and its `OPTIONS` is the class that `method:` in run.yaml fills. The fields of
that class are the keys of run.yaml: type, range and description stand here once, as pydantic's `Field` in
`Annotated`, and are checked alike whether the options come from a file or from Python.
"""

from __future__ import annotations

import copy
import dataclasses
import importlib
import importlib.util
import re
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Annotated, Any, ClassVar, get_type_hints

import torch
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, create_model
from torch import Tensor, nn

from lorica.errors import ConfigError, TargetError


def _targets(value: object) -> object:
    if isinstance(value, str):
        try:
            re.compile(value)
        except re.error as error:
            raise ValueError(f"is no valid regular expression: {error}") from None
        if value.strip():
            return value
    elif isinstance(value, list | tuple) and value and all(isinstance(item, str) and item.strip() for item in value):
        return tuple(value)
    raise ValueError("must be a keyword such as all-linear, a regular expression, or a list of module names")


Targets = Annotated[str | tuple[str, ...], BeforeValidator(_targets)]
Names = Annotated[tuple[str, ...], BeforeValidator(lambda value: tuple(value) if isinstance(value, list) else value)]
Rank = Annotated[int, Field(ge=1, le=65536)]
Positive = Annotated[float, Field(gt=0)]
Probability = Annotated[float, Field(ge=0, lt=1)]


class Adapter(nn.Module, ABC):
    """One module of the model with something trainable around it."""

    base: nn.Module
    options: MethodOptions

    def __init__(self, base: nn.Module, options: MethodOptions) -> None:
        super().__init__()
        self.base = base.requires_grad_(False)
        self.options = options

    @property
    def weight(self) -> Tensor:
        """The base's weight: some models read it, if only for its dtype."""
        return self.base.weight  # type: ignore[return-value]

    @abstractmethod
    def merged(self) -> nn.Module:
        """A new plain module that computes what this adapter computes now.

        Raises:
            NotMergeableError: the adapter is not a fixed change of the base's weights.
        """

    def auxiliary_loss(self) -> Tensor | None:
        """A scalar to add to the training loss, or None."""
        return None

    def num_parameters(self) -> int:
        """How many parameters this adapter trains."""
        return sum(p.numel() for p in self.parameters() if p.requires_grad)

    def saved_tensors(self) -> dict[str, Tensor]:
        """What makes this adapter, by its name on disk behind the module's: in PEFT's names where PEFT has the method.

        The tensors are the adapter's own, so that loading copies into them; or they are computed, where `from_peft`
        reads them back as a plainer adapter (LoRA's `pissa`, saved as LoRA of twice the rank).
        """
        return {
            name: tensor
            for name, tensor in (*self.named_parameters(), *self.named_buffers())
            if not name.startswith("base.")
        }


@dataclass(frozen=True)
class MethodOptions(ABC):
    """What every method's options have in common.

    Attributes:
        targets: `"all-linear"` (every linear layer but the output head), or one pattern or several. A pattern is a
            regular expression that must match a module's whole dotted name, or a whole tail of it after a dot:
            `q_proj`, `mlp.down_proj`, `layers.[0-3]..*_proj`.

    Raises:
        ConfigError: fields that cannot be meant; all of them at once.
    """

    linear_kinds: ClassVar[tuple[type[nn.Module], ...]]
    """The kinds that `all-linear` means."""
    other_kinds: ClassVar[tuple[type[nn.Module], ...]] = ()
    """Further kinds that can be wrapped when they are named."""
    peft_type: ClassVar[str | None] = None
    """PEFT's name of the method; None where PEFT does not have it."""

    targets: Annotated[
        Targets,
        Field(description="modules to adapt: all-linear (all but the output head), a pattern, or a list of patterns"),
    ] = "all-linear"

    def __post_init__(self) -> None:
        given = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        try:
            checked = option_fields(type(self)).model_validate(given)
        except ValidationError as error:
            faults = [
                f"{'.'.join(map(str, detail['loc']))} is {detail['input']!r}: {detail['msg']}"
                for detail in error.errors(include_url=False)
            ]
            raise ConfigError(f"{type(self).__name__}: " + "; ".join(faults)) from None
        for name in given:
            # A list is a tuple from here on, a whole number a float where one is meant.
            object.__setattr__(self, name, getattr(checked, name))

    @classmethod
    def method_name(cls) -> str:
        """The name in run.yaml: that of the file."""
        return cls.__module__.rpartition(".")[2]

    def patterns(self) -> str | tuple[str, ...]:
        """What `targets` stands for. For methods with keywords of their own."""
        return self.targets

    def takes(self, module: nn.Module) -> bool:
        """Whether `module` can be wrapped. For methods that tell by more than its kind."""
        return isinstance(module, self.linear_kinds + self.other_kinds)

    @abstractmethod
    def wrap(self, module: nn.Module, name: str) -> Adapter:
        """Wrap `module`, which stands at `name` in the model and is one that the method takes."""

    def wrap_all(self, model: nn.Module, names: Sequence[str]) -> dict[str, Adapter]:
        """Wrap the modules at `names`, nothing replaced yet. For methods whose adapters share something."""
        return {name: self.wrap(model.get_submodule(name), name) for name in names}

    def after_step(self, model: nn.Module, step: int, num_steps: int) -> None:  # noqa: B027 - most do nothing
        """What the method does to its adapters after optimizer step `step`, counted from 1, of `num_steps`.

        It must be a function of the parameters, buffers and arguments alone, or a resumed run would differ.
        """

    @property
    def num_virtual_tokens(self) -> int:
        """Token ids that stand in front of every sample: vocabulary size, vocabulary size + 1, ..."""
        return 0

    @property
    def position_offset(self) -> int:
        """What the position of a sample's first token is."""
        return 0

    @classmethod
    def is_peft(cls, config: Mapping[str, Any]) -> bool:
        """Whether PEFT's adapter_config.json describes this method."""
        return cls.peft_type is not None and config.get("peft_type") == cls.peft_type

    def to_peft(self, found: Mapping[str, Any], model: nn.Module) -> dict[str, Any]:
        """The fields of PEFT's adapter_config.json that are this method's own; `found` are the adapters by name."""
        raise NotImplementedError

    @classmethod
    def from_peft(cls, config: Mapping[str, Any], names: Sequence[str]) -> MethodOptions:
        """The options by which `adapt` wraps the modules at `names` as PEFT's folder has them.

        Raises:
            AdapterError: the folder uses what this method does not have, with all faults.
        """
        raise NotImplementedError

    def shapes(self, module: nn.Module, name: str) -> dict[str, tuple[int, ...]]:
        """The shapes of `saved_tensors` of the adapter that would wrap `module`, found before one is made.

        They are compared with a folder that may be hostile: the adapter is made of tensors without memory.
        """
        empty: dict[int, object] = {
            id(p): nn.Parameter(torch.empty_like(p, device="meta"), requires_grad=False) for p in module.parameters()
        }
        with torch.device("meta"):
            adapter = self.wrap(copy.deepcopy(module, empty), name)
        return {key: tuple(tensor.shape) for key, tensor in adapter.saved_tensors().items()}


def method_options(name: str) -> type[MethodOptions]:
    """The options class of the method called `name`, found by its file name.

    Raises:
        ConfigError: there is no such method.
    """
    if name in method_names():
        return importlib.import_module(f"lorica.methods.{name}").OPTIONS  # type: ignore[no-any-return]
    raise ConfigError(f"method.name: there is no method {name!r}; there are {', '.join(method_names())}.")


@cache
def method_names() -> tuple[str, ...]:
    """The names of all methods: the files of this folder that define `OPTIONS`, read and not imported."""
    from pathlib import Path

    files = sorted(Path(__file__).parent.glob("*.py"))
    return tuple(file.stem for file in files if "\nOPTIONS = " in file.read_text(encoding="utf-8"))


@cache
def option_fields(options: type[MethodOptions]) -> type[BaseModel]:
    """The fields of an options class as a pydantic model, which checks them and knows their descriptions."""
    hints = get_type_hints(options, include_extras=True)
    fields: dict[str, Any] = {}
    for f in dataclasses.fields(options):
        default = f.default if f.default_factory is dataclasses.MISSING else f.default_factory()
        fields[f.name] = (hints[f.name], ... if default is dataclasses.MISSING else default)
    # Strict, but a whole number is a number.
    strict = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False, arbitrary_types_allowed=True)
    return create_model(options.__name__, __config__=strict, **fields)


def unsupported_kind(module: nn.Module, name: str, method: str) -> TargetError:
    """The error for a module of a kind that a method cannot wrap."""
    return TargetError(f"{method} cannot wrap {name}, which is a {type(module).__name__}.")
