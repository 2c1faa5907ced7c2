"""What LoRA and its relatives share: rank and scale by module, and the product that adds an update.

    y + s B A x,    A [rank, in],  B [out, rank],  s = alpha / rank   (rsLoRA: alpha / sqrt(rank), arXiv 2312.03732)

Rank and alpha may differ by pattern. They are written as PEFT has them: the most common values as `r` and `lora_alpha`,
the others by the whole names of their modules.
"""

from __future__ import annotations

import math
import re
from abc import ABC
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any

from pydantic import Field
from torch import nn

from lorica.methods.method import Adapter, MethodOptions, Positive, Probability, Rank


@dataclass(frozen=True)
class LowRankOptions(MethodOptions, ABC):
    """Options of every method that trains a low-rank pair.

    Attributes:
        rank: rank of the update.
        alpha: the update is scaled by alpha / rank.
        dropout: probability of dropping an input feature on the low-rank branch.
        rslora: scale by alpha / sqrt(rank) instead (Kalajdzievski 2023, arXiv 2312.03732).
        lr_ratio: B learns at this times the learning rate of A (LoRA+, Hayou et al. 2024, arXiv 2402.12354). On an
            embedding, where A starts at zero and B does not, both learn at the plain rate.
        rank_pattern: other ranks for the modules that match a pattern (as in `targets`); the first match counts.
        alpha_pattern: other alphas, likewise.
    """

    rank: Annotated[Rank, Field(description="rank of the update, 1 to 65536")] = 16
    alpha: Annotated[
        Positive, Field(description="the update is scaled by alpha / rank (alpha / sqrt(rank) with rslora)")
    ] = 32.0
    dropout: Annotated[Probability, Field(description="probability of dropping an input of the low-rank branch")] = 0.0
    rslora: Annotated[
        bool, Field(description="scale by alpha / sqrt(rank), so that high ranks learn as fast as low ones")
    ] = False
    lr_ratio: Annotated[
        Positive, Field(description="learning rate of lora_b over that of lora_a; LoRA+ takes about 16")
    ] = 1.0
    rank_pattern: Annotated[
        Mapping[str, Rank], Field(description="other ranks for modules whose name matches: {name or regex: rank}")
    ] = field(default_factory=dict)
    alpha_pattern: Annotated[
        Mapping[str, Positive], Field(description="other alphas for modules whose name matches: {name or regex: alpha}")
    ] = field(default_factory=dict)

    def rank_and_scale(self, name: str) -> tuple[int, float]:
        """Rank and scale s of the module (or parameter) at `name`."""
        rank = int(_by_pattern(self.rank_pattern, name, self.rank))
        alpha = _by_pattern(self.alpha_pattern, name, self.alpha)
        return rank, alpha / (math.sqrt(rank) if self.rslora else rank)

    def lr_factor(self, adapter: Adapter, parameter: str) -> float:
        is_b = parameter.split(".")[0] == "lora_b" and not isinstance(adapter.base, nn.Embedding)
        return self.lr_ratio if is_b else 1.0

    def peft_scales(self, found: Mapping[str, tuple[int, float]]) -> dict[str, Any]:
        """PEFT's fields for these ranks and scales, by name."""
        ranks = {name: rank for name, (rank, _) in found.items()}
        # PEFT divides alpha by the rank again, or by its root.
        alphas = {n: scale * (math.sqrt(rank) if self.rslora else rank) for n, (rank, scale) in found.items()}
        rank, alpha = (Counter(values.values()).most_common(1)[0][0] for values in (ranks, alphas))
        return {
            "r": rank,
            "lora_alpha": alpha,
            "lora_dropout": self.dropout,
            "rank_pattern": {re.escape(name): r for name, r in ranks.items() if r != rank},
            "alpha_pattern": {re.escape(name): a for name, a in alphas.items() if a != alpha},
            "use_rslora": self.rslora,
        }


def options_from_peft(config: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of `LowRankOptions` that PEFT's adapter_config.json says."""
    return {
        "rank": int(config["r"]),
        "alpha": float(config.get("lora_alpha", 8)),
        "dropout": float(config.get("lora_dropout") or 0.0),
        "rslora": bool(config.get("use_rslora", False)),
        "rank_pattern": {str(k): int(v) for k, v in (config.get("rank_pattern") or {}).items()},
        "alpha_pattern": {str(k): float(v) for k, v in (config.get("alpha_pattern") or {}).items()},
    }


def matches(pattern: str, name: str) -> bool:
    """Whether `pattern` is the whole of `name`, or a whole tail of it after a dot."""
    return re.fullmatch(rf"(.*\.)?({pattern})", name) is not None


def _by_pattern(patterns: Mapping[str, Any], name: str, default: float) -> float:
    return next((v for k, v in patterns.items() if matches(k, name)), default)
