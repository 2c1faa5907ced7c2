"""The method contract: an options dataclass and an `Adapter` that wraps ONE module of the model.

Every method wraps modules, so attaching, saving, merging, planning and training need to know nothing else about it:

- `Adapter.base` is the wrapped, frozen module, and `forward` takes what `base` takes.
- At the start the output equals the base's, unless the method says otherwise.
- `merged()` gives a new plain module, or raises `NotMergeableError` with the reason.
- `num_parameters()` counts what is trained; `auxiliary_loss()` adds to the loss (load balancing and the like).

What any method can train beside its own adapters (whole modules, single tokens) are adapters too: see `beside.py`.

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
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Annotated, Any, ClassVar, get_type_hints

import torch
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, create_model
from torch import Tensor, nn

from lorica.errors import ConfigError, TargetError
from lorica.quant.weight import Mender


def _targets(value: object) -> object:
    names = [value] if isinstance(value, str) else value
    if not isinstance(names, list | tuple) or not names or not all(isinstance(n, str) and n.strip() for n in names):
        raise ValueError("must be a keyword such as all-linear, a regular expression, or a list of module names")
    for name in names:
        try:
            re.compile(name)
        except re.error as error:
            raise ValueError(f"is no valid regular expression: {error}") from None
    return value if isinstance(value, str) else tuple(names)


def _patterns(value: object) -> object:
    if value == [] or value == ():
        return ()
    names = _targets(value)
    return (names,) if isinstance(names, str) else names


def _tokens(value: object) -> object:
    if isinstance(value, Mapping):
        return {str(name): _tokens(ids) for name, ids in value.items()}
    if isinstance(value, list | tuple) and all(type(item) is int and item >= 0 for item in value):
        if len(set(value)) == len(value):
            return tuple(value)
        raise ValueError(f"names {next(item for item in value if value.count(item) > 1)} twice")
    raise ValueError("must be a list of token ids, or such a list for each module: {embed_tokens: [32000, 32001]}")


Targets = Annotated[str | tuple[str, ...], BeforeValidator(_targets)]
Patterns = Annotated[tuple[str, ...], BeforeValidator(_patterns)]
Tokens = Annotated[tuple[int, ...] | Mapping[str, tuple[int, ...]], BeforeValidator(_tokens)]
Names = Annotated[tuple[str, ...], BeforeValidator(lambda value: tuple(value) if isinstance(value, list) else value)]
Rank = Annotated[int, Field(ge=1, le=65536)]
Positive = Annotated[float, Field(gt=0)]
Probability = Annotated[float, Field(ge=0, lt=1)]
StartBatches = Sequence[tuple[Mapping[str, Any], Tensor] | tuple[Mapping[str, Any], Tensor, int]]
"""Keywords for the model's forward and the targets [B, T], for each batch; and the component that its rows are of."""
StartLoss = Callable[[Any, Mapping[str, Any], Tensor], Tensor]
"""(model, keywords, targets) -> a scalar loss."""


class Adapter(nn.Module, ABC):
    """One module of the model with something trainable around it.

    Attributes:
        base: the wrapped module, frozen.
        options: those that the whole model was adapted with.
        is_beside: whether it is trained beside the method's own adapters (`beside.py`), and is none of them.
        replaced: names of the base's parameters of which the output does not depend on every value: what an adapter
            was trained on is told by the others.
        mends: whether it began as what quantising took from its base: it belongs to the quantised base alone.
        leaves_base: whether its forward takes nothing from the base but what calling it gives, so that the base may
            store the same weights in another dtype.
    """

    base: nn.Module
    options: MethodOptions
    is_beside: bool = False
    replaced: tuple[str, ...] = ()
    mends: bool = False
    leaves_base: bool = False

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

    def restart(self) -> Sequence[nn.Parameter]:
        """Fold what was learned away as a constant, start anew, and return the parameters that are fresh.

        The output stays as it is. Nothing where an adapter cannot: it goes on.
        """
        return ()

    def taken_off(self, model: nn.Module) -> None:
        """Undo in `model` what the method changed beside its modules, now that `base` stands there again."""

    def make_room(self, saved: Mapping[str, Tensor]) -> None:
        """Give buffers that come, go or grow in a run the shapes that they have in `saved`, a checkpoint's tensors."""

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
        modules_to_save: patterns of modules that are trained whole beside the adapters, and saved with them: a fresh
            classification head, a resized embedding, norms. A module that holds others stands for all in it.
        trainable_tokens: ids of tokens whose rows of the input embedding are trained; or the ids for each module, an
            embedding or an output head, by pattern.

    Raises:
        ConfigError: fields that cannot be meant; all of them at once.
    """

    linear_kinds: ClassVar[tuple[type[nn.Module], ...]]
    """The kinds that `all-linear` means."""
    other_kinds: ClassVar[tuple[type[nn.Module], ...]] = ()
    """Further kinds that can be wrapped when they are named."""
    peft_type: ClassVar[str | None] = None
    """PEFT's name of the method; None where PEFT does not have it."""
    shared_names: ClassVar[tuple[str, ...]] = ()
    """Whole names on disk of tensors that all adapters share and that belong to no module."""
    can_restart: ClassVar[bool] = False
    """Whether its adapters can `restart`."""

    targets: Annotated[
        Targets,
        Field(description="modules to adapt: all-linear (all but the output head), a pattern, or a list of patterns"),
    ] = "all-linear"
    modules_to_save: Annotated[
        Patterns, Field(description="modules trained whole beside the adapter: patterns of names, such as [lm_head]")
    ] = ()
    trainable_tokens: Annotated[
        Tokens, Field(description="tokens whose embeddings are trained: a list of ids, or {name or regex: ids}")
    ] = ()

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

    def menders(self, model: nn.Module) -> Mapping[str, Mender]:
        """By module, what wants to see what quantising takes from the weight; asked before `model` has weights.

        Raises:
            TargetError: `targets` matches nothing.
        """
        return {}

    @property
    def num_start_batches(self) -> int:
        """How many optimizer steps' worth of data `start` looks at; 0: there is no start from data."""
        return 0

    def start(self, model: nn.Module, loss_fn: StartLoss, batches: StartBatches) -> None:  # noqa: B027 - most do nothing
        """Start the adapters, fresh on `model`, from data. The model's output stays the base's.

        A resumed run never calls it: what it finds is in parameters and buffers.

        Raises:
            ConfigError: the data does not suffice.
            DivergedError: the loss or a gradient is not finite.
        """

    def lr_factor(self, adapter: Adapter, parameter: str) -> float:
        """By what the learning rate of one of an adapter's parameters is multiplied."""
        return 1.0

    def after_step(self, model: nn.Module, step: int, num_steps: int) -> None:  # noqa: B027 - most do nothing
        """What the method does to its adapters after optimizer step `step`, counted from 1, of `num_steps`.

        It must be a function of the parameters, buffers and arguments alone, or a resumed run would differ.
        """

    def candidates(self, model: nn.Module) -> dict[str, nn.Module]:
        """The modules that `targets` choose from, by name. For methods to which a module's place matters.

        Raises:
            TargetError: the method cannot be had with this model.
        """
        # The model itself, whose name is empty, cannot be replaced in place.
        return {name: module for name, module in model.named_modules() if name and self.takes(module)}

    def in_front(self, vocab_size: int) -> tuple[range, int]:
        """Ids that stand in front of every sample of a model with `vocab_size` embeddings, and `position_offset`."""
        return range(vocab_size, vocab_size + self.num_virtual_ids), self.position_offset

    @property
    def num_virtual_ids(self) -> int:
        """How many token ids stand in front of every sample: vocabulary size, vocabulary size + 1, ..."""
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

    def shared_shapes(self, modules: Sequence[nn.Module]) -> dict[str, tuple[int, ...]]:
        """The shapes of `shared_tensors` of the adapters that would wrap `modules`."""
        return {}

    def shared_tensors(self, found: Mapping[str, Any]) -> dict[str, Tensor]:
        """Those of `shared_names` that are saved beside the adapters `found`; loading copies into them."""
        return {}

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

    def shapes_in(self, model: nn.Module, names: Sequence[str]) -> dict[str, dict[str, tuple[int, ...]]]:
        """`shapes` of those of the modules at `names` that can be wrapped. For methods that ask the whole model."""
        candidates = self.candidates(model)
        return {name: self.shapes(candidates[name], name) for name in names if name in candidates}


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
