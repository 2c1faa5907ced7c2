"""The method contract: an options dataclass and an `Adapter` that wraps ONE module of the model.

Every method wraps modules, so attaching, saving, merging, planning and training need to know nothing else about it:

- `Adapter.base` is the wrapped, frozen module, and `forward` takes what `base` takes.
- At the start the output equals the base's, unless the method says otherwise.
- `merged()` gives a new plain module, or raises `NotMergeableError` with the reason.
- `num_parameters()` counts what is trained; `auxiliary_loss()` adds to the loss (load balancing and the like).

The options know which kinds of module they can wrap and how to wrap one. A method is found by its file name:
`methods/lora.py` is the method `lora`, and its `OPTIONS` is what `method:` in run.yaml fills.
"""

from __future__ import annotations

import importlib
import importlib.util
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import nn

from lorica.errors import ConfigError, TargetError


class Adapter(nn.Module, ABC):
    """One module of the model with something trainable around it."""

    base: nn.Module
    options: MethodOptions

    def __init__(self, base: nn.Module, options: MethodOptions) -> None:
        super().__init__()
        self.base = base.requires_grad_(False)
        self.options = options

    @property
    def weight(self) -> torch.Tensor:
        """The base's weight: some models read it, if only for its dtype."""
        return self.base.weight  # type: ignore[return-value]

    @abstractmethod
    def merged(self) -> nn.Module:
        """A new plain module that computes what this adapter computes now.

        Raises:
            NotMergeableError: the adapter is not a fixed change of the base's weights.
        """

    def auxiliary_loss(self) -> torch.Tensor | None:
        """A scalar to add to the training loss, or None."""
        return None

    def num_parameters(self) -> int:
        """How many parameters this adapter trains."""
        return sum(p.numel() for p in self.parameters() if p.requires_grad)


@dataclass(frozen=True)
class MethodOptions(ABC):
    """What every method's options have in common.

    Attributes:
        targets: `"all-linear"` (every linear layer but the output head), or one pattern or several. A pattern is a
            regular expression that must match a module's whole dotted name, or a whole tail of it after a dot:
            `q_proj`, `mlp.down_proj`, `layers.[0-3]..*_proj`.
    """

    linear_kinds: ClassVar[tuple[type[nn.Module], ...]]
    """The kinds that `all-linear` means."""
    other_kinds: ClassVar[tuple[type[nn.Module], ...]] = ()
    """Further kinds that can be wrapped when they are named."""

    targets: str | tuple[str, ...] = "all-linear"

    @abstractmethod
    def wrap(self, module: nn.Module, name: str) -> Adapter:
        """Wrap `module`, which stands at `name` in the model and is of one of the method's kinds."""


def method_options(name: str) -> type[MethodOptions]:
    """The options class of the method called `name`, found by its file name.

    Raises:
        ConfigError: there is no such method.
    """
    if not name.isidentifier() or importlib.util.find_spec(f"lorica.methods.{name}") is None:
        raise ConfigError(f"method.name: there is no method {name!r}.")
    options = vars(importlib.import_module(f"lorica.methods.{name}")).get("OPTIONS")
    if options is None:
        raise ConfigError(f"method.name: {name!r} is not a method.")
    return options  # type: ignore[no-any-return]


def unsupported_kind(module: nn.Module, name: str, method: str) -> TargetError:
    """The error for a module of a kind that a method cannot wrap."""
    return TargetError(f"{method} cannot wrap {name}, which is a {type(module).__name__}.")
