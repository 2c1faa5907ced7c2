"""VeRA: one random low-rank pair for all layers, two trained vectors for each (Kopiczko et al. 2023, arXiv 2310.11454).

    y = W x + b0 + b * (B (d * (A x)))      A [rank, in],  B [out, rank] frozen and shared,  d [rank],  b [out] trained

A and B are drawn from `seed`, as large as the largest layer asks, and each layer takes the first columns of A and the
first rows of B. That is PEFT's layout and its generator, so a folder holds the vectors alone and both sides draw the
same pair. b starts at zero. A 4096 x 4096 layer trains 4,352 numbers at rank 256, and 131,072 by LoRA of rank 16.

With `save_projection`, as PEFT has it by default, the folder holds the pair too, and reading takes it from there.

What it gives up: rank and products are larger than LoRA's.
"""

from __future__ import annotations

import copy
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.pytorch_utils import Conv1D

from lorica.errors import AdapterError, ConfigError
from lorica.kernels.linear import linear
from lorica.kernels.low_rank import add_low_rank
from lorica.methods.method import Adapter, MethodOptions, Positive, Probability, Rank, unsupported_kind

# The names on disk of what belongs to no module.
_SHARED_A, _SHARED_B = "base_model.vera_A", "base_model.vera_B"


@dataclass(frozen=True)
class VeRA(MethodOptions):
    """Options of VeRA.

    Attributes:
        rank: rank of the shared pair.
        d_initial: what the elements of d start at.
        dropout: probability of dropping an input feature on the adapter's branch.
        seed: what A and B are drawn from; without them an adapter means nothing.
        save_projection: whether A and B are saved with the adapter: for a reader that draws other numbers.
    """

    linear_kinds: ClassVar[tuple[type[nn.Module], ...]] = (nn.Linear, Conv1D)
    peft_type: ClassVar[str | None] = "VERA"
    shared_names: ClassVar[tuple[str, ...]] = (_SHARED_A, _SHARED_B)

    rank: Annotated[Rank, Field(description="rank of the shared pair, 1 to 65536")] = 256
    d_initial: Annotated[Positive, Field(description="what the trained factors of A x start at")] = 0.1
    dropout: Annotated[Probability, Field(description="probability of dropping an input of the adapter")] = 0.0
    seed: Annotated[int, Field(ge=0, description="what the shared random pair is drawn from")] = 0
    save_projection: Annotated[bool, Field(description="whether the shared pair is saved with the adapter")] = False

    def wrap(self, module: nn.Module, name: str) -> Adapter:
        return self._wrap({name: module})[name]

    def wrap_all(self, model: nn.Module, names: Sequence[str]) -> dict[str, Adapter]:
        return self._wrap({name: model.get_submodule(name) for name in names})

    def _wrap(self, modules: Mapping[str, nn.Module]) -> dict[str, Adapter]:
        linears: dict[str, nn.Linear | Conv1D] = {}
        for name, module in modules.items():
            if not isinstance(module, nn.Linear | Conv1D):
                raise unsupported_kind(module, name, "vera")
            linears[name] = module
        out_size, in_size = _largest(linears.values())
        # A pair for each device. Parameters, which stay one tensor when the model moves; buffers would part.
        pairs = {
            device: [nn.Parameter(t.to(device), requires_grad=False) for t in self.draw(in_size, out_size, device)]
            for device in dict.fromkeys(m.weight.device for m in linears.values())
        }
        if self.save_projection and len(pairs) > 1:
            raise ConfigError("VeRA: save_projection needs a model on one device; this one lies on several.")
        return {name: VeraLinear(m, self, *pairs[m.weight.device]) for name, m in linears.items()}

    def draw(self, in_size: int, out_size: int, device: torch.device) -> tuple[Tensor, Tensor]:
        """A [rank, in] and B [out, rank] from the seed, float32, on the CPU whose generator PEFT takes (or on meta)."""
        place = device if device.type == "meta" else "cpu"
        generator = torch.Generator("cpu").manual_seed(self.seed)
        pair = [torch.empty(shape, device=place) for shape in ((self.rank, in_size), (out_size, self.rank))]
        for matrix in pair:
            # Kaiming's uniform distribution, in PEFT's order of rounding.
            bound = math.sqrt(3.0) * (math.sqrt(2) / math.sqrt(matrix.shape[1]))
            matrix.uniform_(-bound, bound, generator=generator)
        return pair[0], pair[1]

    def shared_shapes(self, modules: Sequence[nn.Module]) -> dict[str, tuple[int, ...]]:
        wrapped = [module for module in modules if self.takes(module)]
        if not self.save_projection or not wrapped:
            return {}
        out_size, in_size = _largest(wrapped)
        return {_SHARED_A: (self.rank, in_size), _SHARED_B: (out_size, self.rank)}

    def shared_tensors(self, found: Mapping[str, Any]) -> dict[str, Tensor]:
        first = next(iter(found.values()))
        return {_SHARED_A: first.shared_a, _SHARED_B: first.shared_b} if self.save_projection else {}

    def to_peft(self, found: Mapping[str, Any], model: nn.Module) -> dict[str, Any]:
        return {
            "r": self.rank,
            "d_initial": self.d_initial,
            "vera_dropout": self.dropout,
            "projection_prng_key": self.seed,
            "save_projection": self.save_projection,
            "fan_in_fan_out": any(isinstance(a.base, Conv1D) for a in found.values()),
            "bias": "none",
            "init_weights": True,
        }

    @classmethod
    def from_peft(cls, config: Mapping[str, Any], names: Sequence[str]) -> VeRA:
        if config.get("bias", "none") != "none":
            raise AdapterError(f"bias is {config['bias']!r}, which is not supported.")
        return cls(
            rank=int(config["r"]),
            d_initial=float(config.get("d_initial", 0.1)),
            dropout=float(config.get("vera_dropout") or 0.0),
            seed=int(config.get("projection_prng_key") or 0),
            save_projection=bool(config.get("save_projection", True)),
            targets=tuple(re.escape(name) for name in names),
        )


def _largest(modules: Iterable[nn.Module]) -> tuple[int, int]:
    """The most outputs and the most inputs that any of the linear layers has."""
    shapes = [_rows(module.weight, module).shape for module in modules]  # type: ignore[arg-type]
    return max(shape[0] for shape in shapes), max(shape[1] for shape in shapes)


def _rows(weight: Tensor, module: nn.Module) -> Tensor:
    """The weight as [out, in]: Conv1D stores it transposed."""
    return weight.t() if isinstance(module, Conv1D) else weight


class VeraLinear(Adapter):
    """VeRA on nn.Linear and Conv1D; `vera_lambda_d` [rank] and `vera_lambda_b` [out] are float32, in PEFT's names."""

    base: nn.Linear | Conv1D
    leaves_base = True

    def __init__(self, base: nn.Linear | Conv1D, options: VeRA, shared_a: nn.Parameter, shared_b: nn.Parameter) -> None:
        super().__init__(base, options)
        self.dropout = options.dropout
        self.shared_a, self.shared_b = shared_a, shared_b
        self.out_size, self.in_size = _rows(base.weight, base).shape
        factory: dict[str, Any] = {"device": base.weight.device, "dtype": torch.float32}
        self.vera_lambda_d = nn.Parameter(torch.full((options.rank,), options.d_initial, **factory))
        self.vera_lambda_b = nn.Parameter(torch.zeros(self.out_size, **factory))

    def scaled_b(self) -> Tensor:
        """b * B, [out, rank]: smaller than b's product with the outputs, [tokens, out], as a rule."""
        return self.vera_lambda_b[:, None] * self.shared_b[: self.out_size]

    def forward(self, x: Tensor) -> Tensor:
        rows = x.reshape(-1, x.shape[-1])
        y = self.base(rows)
        h = linear(F.dropout(rows, self.dropout, self.training), self.shared_a[:, : self.in_size])
        h = h * self.vera_lambda_d.to(h.dtype)
        return add_low_rank(y, h, self.scaled_b(), 1.0).view(*x.shape[:-1], y.shape[-1])

    @torch.no_grad()
    def merged(self) -> nn.Module:
        delta = self.scaled_b() @ (self.vera_lambda_d[:, None] * self.shared_a[:, : self.in_size])
        plain = copy.deepcopy(self.base)
        _rows(plain.weight, plain).add_(delta)
        return plain

    def saved_tensors(self) -> dict[str, Tensor]:
        return {"vera_lambda_b": self.vera_lambda_b, "vera_lambda_d": self.vera_lambda_d}


OPTIONS = VeRA
