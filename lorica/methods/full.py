"""Full fine-tuning, and training some layers, norms or biases alone, behind the same contract as every other method.

    y = base(x; round(W)),    W a float32 master of each trained parameter, round(W) in that parameter's own dtype

The masters keep the small updates that a 16-bit weight would lose. The base's own parameters stay as they were, so
detaching gives it back bit for bit, and a fingerprint of the base still fits; merging rounds the masters to the base's
dtype, which is what `forward` computes with, so nothing is lost by it. `parameters: bias` is BitFit (Ben Zaken et al.
2021, arXiv 2106.10199).

The running statistics of a normalisation are the adapter's too, and move while the base keeps its own.

A weight that several modules share (a head tied to the embedding) has one master, and naming one of these modules
trains it in all of them: what is tied stays tied, also in the merged model. A folder holds it once for each of them.

What it gives up: memory. Beside AdamW's 16 bytes a trained parameter stand the base's own and, until backward, the
rounded copies. Only modules that hold no others with parameters can be trained: a token beside the layers of an
encoder, or the input projection of nn.MultiheadAttention, cannot.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.func import functional_call
from transformers.pytorch_utils import Conv1D

from lorica.errors import TargetError
from lorica.methods.method import Adapter, MethodOptions, Targets, unsupported_kind

ALL = "all"


@dataclass(frozen=True)
class FullFineTuning(MethodOptions):
    """Options of full fine-tuning.

    Attributes:
        targets: `"all"` (every module with parameters of its own), or as in every method.
        parameters: which parameters of these modules: `all`, or `bias` for those whose name ends so.
    """

    linear_kinds: ClassVar[tuple[type[nn.Module], ...]] = (nn.Linear, Conv1D)
    other_kinds: ClassVar[tuple[type[nn.Module], ...]] = (nn.Module,)

    targets: Annotated[
        Targets,
        Field(description="modules to train: all, all-linear (all but the output head), a pattern, or a list"),
    ] = ALL
    parameters: Annotated[
        Literal["all", "bias"], Field(description="which parameters of these modules: all of them, or the biases alone")
    ] = "all"

    def patterns(self) -> str | tuple[str, ...]:
        return ".*" if self.targets == ALL else self.targets

    def takes(self, module: nn.Module) -> bool:
        """Whether `module` has parameters to train, and none in modules inside it."""
        return bool(self.trained(module)) and not any(list(child.parameters()) for child in module.children())

    def trained(self, module: nn.Module) -> dict[str, nn.Parameter]:
        """The parameters of `module` itself that are trained, by name."""
        own = module.named_parameters(recurse=False)
        return {name: p for name, p in own if p.is_floating_point() and self._is_meant(name)}

    def _is_meant(self, name: str) -> bool:
        return self.parameters == "all" or name.endswith("bias")

    def wrap(self, module: nn.Module, name: str) -> Adapter:
        if not self.takes(module):
            raise unsupported_kind(module, name, "full")
        return FullAdapter(module, self, {key: master(p) for key, p in self.trained(module).items()})

    def wrap_all(self, model: nn.Module, names: Sequence[str]) -> dict[str, Adapter]:
        """Wrap the modules at `names` and those that share a parameter with them; a shared one has one master.

        Raises:
            TargetError: `targets` is `all`, and a parameter cannot be trained.
        """
        if self.targets == ALL:
            self._refuse_what_would_stay(model, names)
        found = {name: self.trained(model.get_submodule(name)) for name in self.with_tied(model, names)}
        masters = {id(p): master(p) for own in found.values() for p in own.values()}
        return {
            name: FullAdapter(model.get_submodule(name), self, {key: masters[id(p)] for key, p in own.items()})
            for name, own in found.items()
        }

    def with_tied(self, model: nn.Module, names: Iterable[str]) -> list[str]:
        """`names`, and the modules that share a parameter with one of them, in the model's order."""
        named = {id(p) for name in names for p in self.trained(model.get_submodule(name)).values()}
        return [
            name
            for name, module in model.named_modules()
            if name and self.takes(module) and any(id(p) in named for p in self.trained(module).values())
        ]

    def _refuse_what_would_stay(self, model: nn.Module, names: Sequence[str]) -> None:
        if self.trainable_tokens and self.parameters == "all":
            raise TargetError("targets all trains the embedding of every token: leave trainable_tokens out.")
        chosen = set(names)
        beside = re.compile(rf"(.*\.)?({'|'.join(self.modules_to_save) or '(?!)'})\..*")
        # By identity: a weight may be named elsewhere too.
        trained = {id(p) for name, p in model.named_parameters(remove_duplicate=False) if beside.fullmatch(name)}
        left = [
            name
            for name, p in model.named_parameters()
            if self._is_meant(name) and name.rpartition(".")[0] not in chosen and id(p) not in trained
        ]
        if left:
            raise TargetError(
                f"targets all: {len(left)} parameters cannot be trained, the first is {left[0]}: its module holds "
                "others, is read without being called, or has no floating-point weights. targets '.*' leaves them as "
                "they are and trains the rest."
            )


def persistent_buffers(module: nn.Module) -> list[str]:
    """The names of the buffers of `module` itself that a saved model holds."""
    return [name for name, _ in module.named_buffers(recurse=False) if name not in module._non_persistent_buffers_set]


def master(parameter: Tensor) -> nn.Parameter:
    """A trainable float32 copy."""
    return nn.Parameter(parameter.detach().to(torch.float32, copy=True))


class FullAdapter(Adapter):
    """Any module that holds no others with parameters, computed with `masters` in place of its own parameters."""

    def __init__(self, base: nn.Module, options: MethodOptions, masters: dict[str, nn.Parameter]) -> None:
        super().__init__(base, options)
        self.masters = nn.ParameterDict(masters)
        # Running statistics change while they are trained with: these are ours, the base keeps its own.
        self.statistics = nn.Module()
        for name in persistent_buffers(base):
            self.statistics.register_buffer(name, base.get_buffer(name).detach().clone())
        self.replaced = tuple(masters)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        rounded = {name: master.to(self.base.get_parameter(name).dtype) for name, master in self.masters.items()}
        return functional_call(self.base, {**rounded, **dict(self.statistics.named_buffers())}, args, kwargs)

    def merged(self) -> nn.Module:
        """The base's module with the masters, rounded to the base's dtype."""
        # A shallow copy keeps the base's type and attributes, whatever class it is.
        plain = copy.copy(self.base)
        plain._parameters = dict(self.base._parameters)
        plain._buffers = dict(self.base._buffers)
        for name, master in self.masters.items():
            rounded = master.detach().to(self.base.get_parameter(name).dtype, copy=True)
            plain._parameters[name] = nn.Parameter(rounded, requires_grad=False)
        plain._buffers |= {name: buffer.clone() for name, buffer in self.statistics.named_buffers()}
        return plain

    def saved_tensors(self) -> dict[str, Tensor]:
        return {**dict(self.masters.items()), **dict(self.statistics.named_buffers())}


OPTIONS = FullFineTuning
