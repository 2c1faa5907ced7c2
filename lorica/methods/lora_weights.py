"""LoRA on weights that their module reads itself: nn.MultiheadAttention, and parameters by name.

    W' = W + s B A    (a stack of matrices: W'_e = W_e + s B_e A_e)

There is no layer whose product an update could be added to, so the module computes with W' in place of W, as PEFT's
does. The pairs lie as PEFT has them: `lora_a` [E rank, in] holds A_e under A_e, `lora_b` [out, rank E] is read as
[out, rank, E]; E is 1 for a matrix. On disk the pair of the last parameter stands at the module itself, that of the one
before at `base_layer`, and so on; an attention's output projection has `base_layer.out_proj`, and twice the scale.

What it gives up: W' in memory, kept for backward, and in 16 bits the part of an update that rounds away in W + s B A.
Experts of transformers' interface need neither: `lora_experts.py`. Dropout drops an input feature for all tokens of a
pass alike. PEFT has no queries, keys and values of unequal sizes; a folder with these is right here alone.
"""

from __future__ import annotations

from abc import ABC
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F

from lorica.methods import inits
from lorica.methods.lora_kinds import with_parameters
from lorica.methods.method import Adapter
from lorica.quant.experts import own_experts, parameter_of, tensor_of, with_room

if TYPE_CHECKING:
    from lorica.methods.lora import LoRA

PEFT_OUT_PROJ = 2
"""How often PEFT 0.21.2 adds the update of an attention's output projection (its pull request 3774). So do we, or the
numbers of a folder would mean one thing here and another there."""


class Site(NamedTuple):
    """A parameter that is adapted: rank, scale, and what stands before `lora_A` on disk."""

    rank: int
    scale: float
    folder: str


def matrices(module: nn.Module, smallest: int) -> list[str]:
    """The names of the module's own matrices and stacks of them, of `smallest` dimensions or more."""
    # A recurrent layer reads copies of its parameters.
    if isinstance(module, nn.RNNBase):
        return []
    own = module.named_parameters(recurse=False)
    plain = [name for name, p in own if smallest <= p.dim() <= 3 and p.is_floating_point()]
    return [*plain, *own_experts(module)]


def parameter_names(module: nn.Module) -> list[str]:
    """The names of the module's own parameters, also of those that are quantised."""
    return [*(name for name, _ in module.named_parameters(recurse=False)), *own_experts(module)]


class LoraWeights(Adapter, ABC):
    """A module with a pair for some of its parameters; what all kinds share.

    `lora_a` and `lora_b` hold float32 parameters by the parameter's name, a dot in it being an underscore.
    """

    options: LoRA

    def __init__(self, base: nn.Module, options: LoRA, sites: Mapping[str, Site]) -> None:
        super().__init__(base, options)
        self.sites = dict(sites)
        self.dropout = options.dropout
        self.transposed = bool(vars(base).get("is_transposed", False))
        self.lora_a, self.lora_b = nn.ParameterDict(), nn.ParameterDict()
        for name, site in self.sites.items():
            weight = parameter_of(base, name)
            num, out_size, in_size = (1, *weight.shape) if weight.dim() == 2 else self._sizes(weight)
            factory: dict[str, Any] = {"device": weight.device, "dtype": torch.float32}
            lora_a = torch.empty(num * site.rank, in_size, **factory)
            lora_b = torch.empty(out_size, site.rank * num, **factory)
            for each in lora_a.view(num, site.rank, in_size):
                inits.INITS[options.init](each, lora_b)
            self.lora_a[_key(name)], self.lora_b[_key(name)] = nn.Parameter(lora_a), nn.Parameter(lora_b)

    def _sizes(self, weight: Tensor) -> tuple[int, int, int]:
        """How many matrices, their outputs, their inputs."""
        num, first, second = weight.shape
        return (num, second, first) if self.transposed else (num, first, second)

    def factors(self, name: str) -> tuple[Tensor, Tensor]:
        """A [E, rank, in] and B [E, out, rank] of the parameter `name`."""
        lora_a, lora_b, rank = self.lora_a[_key(name)], self.lora_b[_key(name)], self.sites[name].rank
        num = lora_a.shape[0] // rank
        return lora_a.view(num, rank, -1), lora_b.view(-1, rank, num).permute(2, 0, 1)

    def delta_weight(self, name: str, dropout: float = 0.0) -> Tensor:
        """s B A in float32, as the parameter `name` lies; each input feature dropped with probability `dropout`."""
        weight = parameter_of(self.base, name)
        lora_a, lora_b = self.factors(name)
        if dropout:
            lora_a = lora_a * F.dropout(lora_a.new_ones(lora_a.shape[-1]), dropout)
        delta = self.sites[name].scale * (lora_b @ lora_a)
        return (delta.mT if self.transposed and weight.dim() == 3 else delta).reshape(weight.shape)

    def adapted(self, name: str) -> Tensor:
        """W' of the parameter `name`, in its dtype."""
        weight = tensor_of(self.base, name)
        return (weight + self.delta_weight(name, self.dropout if self.training else 0.0)).to(weight.dtype)

    @torch.no_grad()
    def merged(self) -> nn.Module:
        weights = {name: tensor_of(self.base, name) for name in self.sites}
        return with_parameters(
            self.base, {name: (weight + self.delta_weight(name)).to(weight.dtype) for name, weight in weights.items()}
        )

    def ranks_and_scales(self, name: str) -> dict[str, tuple[int, float]]:
        """Rank and scale by the names to which PEFT's patterns are compared, where the adapter stands at `name`."""
        return {f"{name}.{key}": (site.rank, site.scale) for key, site in self.sites.items()}

    def target_parameters(self, name: str) -> list[str]:
        """What PEFT's `target_parameters` must name, where the adapter stands at `name`."""
        return [f"{name}.{key}" for key in self.sites]

    def saved_tensors(self) -> dict[str, Tensor]:
        return {
            f"{site.folder}lora_{half}.weight": tensors[_key(name)]
            for name, site in self.sites.items()
            for half, tensors in (("A", self.lora_a), ("B", self.lora_b))
        }

    def __getattr__(self, name: str) -> Any:
        # Who reads weights from outside reads other attributes too: sizes, flags.
        modules = self.__dict__.get("_modules", {})
        try:
            return super().__getattr__(name)
        except AttributeError:
            if "base" not in modules:
                raise
            return getattr(modules["base"], name)

    def extra_repr(self) -> str:
        return ", ".join(f"{name}: rank={site.rank}, scale={site.scale:g}" for name, site in self.sites.items())


class LoraParameters(LoraWeights):
    """LoRA on parameters of any module: PEFT's `target_parameters`."""

    def __init__(self, base: nn.Module, options: LoRA, name: str, parameters: Sequence[str]) -> None:
        super().__init__(base, options, nested_sites(options, name, parameters))

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        base = with_room(self.base, self.sites) if own_experts(self.base) else self.base
        return functional_call(base, {name: self.adapted(name) for name in self.sites}, args, kwargs)


def nested_sites(options: LoRA, name: str, parameters: Sequence[str]) -> dict[str, Site]:
    """The sites of `parameters`, which the module at `name` has in this order: each wrapped around those before."""
    folders = ["base_layer." * (len(parameters) - 1 - i) for i in range(len(parameters))]
    return {
        key: Site(*options.rank_and_scale(f"{name}.{key}"), folder)
        for key, folder in zip(parameters, folders, strict=True)
    }


class LoraAttention(LoraWeights):
    """LoRA on the input and output projections of nn.MultiheadAttention, or on the `parameters` that are named.

    It shows W' as `in_proj_weight` and `out_proj.weight`: nn.TransformerEncoderLayer reads them in evaluation.
    """

    base: nn.MultiheadAttention

    def __init__(self, base: nn.MultiheadAttention, options: LoRA, name: str, parameters: Sequence[str]) -> None:
        self.is_whole = not parameters
        sites = nested_sites(options, name, parameters) if parameters else _all_projections(base, options, name)
        super().__init__(base, options, sites)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return functional_call(self.base, {name: self.adapted(name) for name in self.sites}, args, kwargs)

    @property
    def in_proj_weight(self) -> Tensor | None:
        """[3 dim, dim]; None where queries, keys and values have weights of their own."""
        return self.adapted("in_proj_weight") if "in_proj_weight" in self.sites else self.base.in_proj_weight

    @property
    def out_proj(self) -> nn.Module:
        """The output projection as a layer of its own."""
        plain = with_parameters(self.base.out_proj, {})
        if "out_proj.weight" in self.sites:
            # No nn.Parameter, which would hide from the reader that it has a gradient.
            plain._parameters["weight"] = self.adapted("out_proj.weight")  # type: ignore[assignment]
        return plain

    def ranks_and_scales(self, name: str) -> dict[str, tuple[int, float]]:
        return {name: next(iter(self.sites.values()))[:2]} if self.is_whole else super().ranks_and_scales(name)

    def target_parameters(self, name: str) -> list[str]:
        return [] if self.is_whole else super().target_parameters(name)


def _all_projections(base: nn.MultiheadAttention, options: LoRA, name: str) -> dict[str, Site]:
    rank, scale = options.rank_and_scale(name)
    apart = {f"{part}_proj_weight": f"{part}_proj." for part in ("q", "k", "v")}
    inner = {"in_proj_weight": ""} if base.in_proj_weight is not None else apart
    sites = {key: Site(rank, scale, folder) for key, folder in inner.items()}
    return {**sites, "out_proj.weight": Site(rank, PEFT_OUT_PROJ * scale, "base_layer.out_proj.")}


def _key(name: str) -> str:
    return name.replace(".", "_")
