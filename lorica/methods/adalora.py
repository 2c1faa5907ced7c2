"""AdaLoRA: low-rank updates like an SVD, whose ranks go where they count (Zhang et al. 2023, arXiv 2303.10512).

    y = W x + b + s P (l * (Q x))        Q [rank, in],  P [out, rank],  l [rank] starting at zero,  s = alpha / rank

P and Q are drawn towards orthogonality by an auxiliary loss (section 3.1). All layers start with `rank` triplets (P_i,
l_i, Q_i); after each interval the least important of the whole model lose their l, until `target_rank` a layer remain
on average. A triplet that lost it is still trained and may come back, up to the last part of the run.

    importance of one number w      I = |w dL/dw|,   its mean over time times the mean of its deviation  (section 3.2)
    importance of a triplet         that of l_i, plus the means over P_i and Q_i
    budget at time t of [0, 1]      target + (start - target) (1 - t)^3                                  (section 3.3)

What it gives up: two more numbers for each trained one beside the optimizer's, in memory and in each checkpoint. In the
adapter's folder the triplets that lost their l stay, with a zero. PEFT cuts them out: its folders come with the ranks
that are left, `rank_pattern`, and have only these from then on.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any, ClassVar

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.pytorch_utils import Conv1D

from lorica.errors import AdapterError, ConfigError
from lorica.kernels.linear import linear
from lorica.kernels.low_rank import add_low_rank
from lorica.methods.attach import adapters
from lorica.methods.lora import check_peft_fields
from lorica.methods.low_rank import matches, options_from_peft
from lorica.methods.method import Adapter, MethodOptions, Positive, Probability, Rank, unsupported_kind


@dataclass(frozen=True)
class AdaLoRA(MethodOptions):
    """Options of AdaLoRA.

    Attributes:
        rank: triplets of each layer at the start.
        target_rank: triplets that a layer keeps on average.
        alpha: the update is scaled by alpha / rank.
        dropout: probability of dropping an input feature on the adapter's branch.
        warmup: part of the run before the first triplet goes.
        final: part of the run at its end in which the choice is settled.
        interval: optimizer steps from one choice to the next.
        beta: how much of the old a running mean keeps at each step, of importance and of its deviation alike.
        orthogonality: weight of the auxiliary loss, which is the mean over all P and Q.
        rank_pattern: ranks, down to 0, that modules which match a pattern were cut to; the first match counts. They
            change no scale.
    """

    linear_kinds: ClassVar[tuple[type[nn.Module], ...]] = (nn.Linear, Conv1D)
    peft_type: ClassVar[str | None] = "ADALORA"

    rank: Annotated[Rank, Field(description="rank of every layer at the start, 1 to 65536")] = 12
    target_rank: Annotated[Rank, Field(description="rank that a layer keeps on average, at most rank")] = 8
    alpha: Annotated[Positive, Field(description="the update is scaled by alpha / rank")] = 32.0
    dropout: Annotated[Probability, Field(description="probability of dropping an input of the adapter")] = 0.0
    warmup: Annotated[Probability, Field(description="part of the run before ranks are taken away")] = 0.1
    final: Annotated[Probability, Field(description="part of the run at its end with the ranks settled")] = 0.3
    interval: Annotated[int, Field(ge=1, description="optimizer steps from one choice of ranks to the next")] = 10
    beta: Annotated[Probability, Field(description="what the running means of importance keep at each step")] = 0.85
    orthogonality: Annotated[float, Field(ge=0, description="weight of the loss that keeps P and Q orthogonal")] = 0.1
    rank_pattern: Annotated[
        Mapping[str, Annotated[int, Field(ge=0, le=65536)]],
        Field(description="ranks that modules were cut to: {name or regex: rank}"),
    ] = field(default_factory=dict)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.target_rank > self.rank:
            raise ConfigError(f"AdaLoRA: target_rank is {self.target_rank}, more than rank, which is {self.rank}.")
        if self.warmup + self.final >= 1:
            raise ConfigError(f"AdaLoRA: warmup {self.warmup} and final {self.final} leave no step to choose ranks in.")

    def wrap(self, module: nn.Module, name: str) -> Adapter:
        if isinstance(module, nn.Linear | Conv1D):
            rank = next((r for pattern, r in self.rank_pattern.items() if matches(pattern, name)), self.rank)
            return AdaLoraLinear(module, self, rank)
        raise unsupported_kind(module, name, "adalora")

    def wrap_all(self, model: nn.Module, names: Sequence[str]) -> dict[str, Adapter]:
        wrapped = super().wrap_all(model, names)
        for adapter in wrapped.values():
            assert isinstance(adapter, AdaLoraLinear)
            adapter.loss_weight = self.orthogonality / (2 * len(wrapped))
        return wrapped

    def after_step(self, model: nn.Module, step: int, num_steps: int) -> None:
        layers = [adapter for adapter in adapters(model).values() if isinstance(adapter, AdaLoraLinear)]
        first, last = int(self.warmup * num_steps), num_steps - int(self.final * num_steps)
        if step < last:
            for layer in layers:
                layer.observe(self.beta)
        if step > first and (step >= last or (step - first) % self.interval == 0):
            keep_most_important(layers, self.budget(len(layers), min(1.0, (step - first) / max(1, last - first))))

    def budget(self, num_layers: int, time: float) -> int:
        """How many triplets the model keeps at `time` of [0, 1] between warm-up and final part."""
        return num_layers * self.target_rank + int(num_layers * (self.rank - self.target_rank) * (1 - time) ** 3)

    def to_peft(self, found: Mapping[str, Any], model: nn.Module) -> dict[str, Any]:
        return {
            "init_r": self.rank,
            "target_r": self.target_rank,
            "lora_alpha": self.alpha,
            "lora_dropout": self.dropout,
            "deltaT": self.interval,
            "beta1": self.beta,
            "beta2": self.beta,
            "orth_reg_weight": self.orthogonality,
            # PEFT refuses a folder without a schedule; this one has been followed.
            "total_step": 1,
            "rank_pattern": self._masks({name: a.lora_e.numel() for name, a in found.items()}),
            "init_lora_weights": True,
            "fan_in_fan_out": any(isinstance(a.base, Conv1D) for a in found.values()),
            "bias": "none",
        }

    @classmethod
    def from_peft(cls, config: Mapping[str, Any], names: Sequence[str]) -> AdaLoRA:
        check_peft_fields(config)
        lora = options_from_peft({**config, "r": config["init_r"], "rank_pattern": None})
        # PEFT lists, for each layer's lora_E, which triplets it kept.
        kept = {str(key).removesuffix(".lora_E"): mask for key, mask in (config.get("rank_pattern") or {}).items()}
        if any(not isinstance(mask, list) or not all(type(bit) is bool for bit in mask) for mask in kept.values()):
            raise AdapterError("rank_pattern must say true or false for each triplet of each layer.")
        return cls(
            rank_pattern={re.escape(name): sum(mask) for name, mask in kept.items()},
            rank=lora["rank"],
            target_rank=min(int(config["target_r"]), lora["rank"]),
            alpha=lora["alpha"],
            dropout=lora["dropout"],
            interval=int(config.get("deltaT") or 1),
            beta=float(config.get("beta1") or 0.85),
            targets=tuple(re.escape(name) for name in names),
        )

    def _masks(self, ranks: Mapping[str, int]) -> dict[str, list[bool]] | None:
        """PEFT's `rank_pattern`, where a layer has fewer triplets than `rank`."""
        masks = {f"{name}.lora_E": [i < rank for i in range(self.rank)] for name, rank in ranks.items()}
        return masks if any(rank < self.rank for rank in ranks.values()) else None


@torch.no_grad()
def keep_most_important(layers: Sequence[AdaLoraLinear], num_kept: int) -> None:
    """Set l to zero in all triplets of all layers but the `num_kept` most important."""
    scores = torch.cat([layer.scores().to(layers[0].lora_e.device) for layer in layers])
    mask = torch.zeros_like(scores)
    mask[scores.topk(min(num_kept, len(scores))).indices] = 1
    sizes = [layer.lora_e.numel() for layer in layers]
    for layer, kept in zip(layers, torch.split(mask, sizes), strict=True):
        layer.lora_e.mul_(kept[:, None].to(layer.lora_e.device))


class AdaLoraLinear(Adapter):
    """AdaLoRA on nn.Linear and Conv1D: `lora_a` Q [rank, in], `lora_b` P [out, rank], `lora_e` l [rank, 1], float32.

    `importance` and `deviation`, [rank, 1 + in + out], are the running means for each number of a triplet (l, Q, P).
    """

    base: nn.Linear | Conv1D
    leaves_base = True
    importance: Tensor
    deviation: Tensor

    def __init__(self, base: nn.Linear | Conv1D, options: AdaLoRA, rank: int | None = None) -> None:
        super().__init__(base, options)
        self.transposed = isinstance(base, Conv1D)
        self.scale, self.dropout, self.loss_weight = options.alpha / options.rank, options.dropout, 0.0
        out_size, in_size = reversed(base.weight.shape) if self.transposed else base.weight.shape
        rank = options.rank if rank is None else rank
        factory: dict[str, Any] = {"device": base.weight.device, "dtype": torch.float32}
        self.lora_a = nn.Parameter(torch.empty(rank, in_size, **factory).normal_(std=0.02))
        self.lora_b = nn.Parameter(torch.empty(out_size, rank, **factory).normal_(std=0.02))
        self.lora_e = nn.Parameter(torch.zeros(rank, 1, **factory))
        for name in ("importance", "deviation"):
            self.register_buffer(name, torch.zeros(rank, 1 + in_size + out_size, **factory))

    def forward(self, x: Tensor) -> Tensor:
        rows = x.reshape(-1, x.shape[-1])
        y = self.base(rows)
        h = linear(F.dropout(rows, self.dropout, self.training), self.lora_a)
        h = h * self.lora_e.flatten().to(h.dtype)
        return add_low_rank(y, h, self.lora_b, self.scale).view(*x.shape[:-1], y.shape[-1])

    def auxiliary_loss(self) -> Tensor | None:
        """|P^T P - 1|^2 + |Q Q^T - 1|^2, weighted."""
        one = torch.eye(self.lora_e.numel(), device=self.lora_e.device)
        p, q = self.lora_b.t() @ self.lora_b - one, self.lora_a @ self.lora_a.t() - one
        return self.loss_weight * (p.square().sum() + q.square().sum())

    @torch.no_grad()
    def observe(self, beta: float) -> None:
        """Take in the importance of each number at this step, from its gradient."""
        triplets = (self.lora_e, self.lora_a, self.lora_b)
        e, a, b = (w * (torch.zeros_like(w) if w.grad is None else w.grad) for w in triplets)
        now = torch.cat([e, a, b.t()], dim=1).abs()
        self.importance.lerp_(now, 1 - beta)
        self.deviation.lerp_((now - self.importance).abs(), 1 - beta)

    def scores(self) -> Tensor:
        """The importance of each triplet, [rank]."""
        numbers, first_p = self.importance * self.deviation, 1 + self.lora_a.shape[1]
        return numbers[:, 0] + numbers[:, 1:first_p].mean(1) + numbers[:, first_p:].mean(1)

    @torch.no_grad()
    def merged(self) -> nn.Module:
        delta = self.scale * (self.lora_b @ (self.lora_e * self.lora_a))
        plain = copy.deepcopy(self.base)
        plain.weight.add_(delta.t() if self.transposed else delta)
        return plain

    def saved_tensors(self) -> dict[str, Tensor]:
        return {"lora_A": self.lora_a, "lora_B": self.lora_b, "lora_E": self.lora_e}


OPTIONS = AdaLoRA
