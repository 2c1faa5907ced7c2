"""Arithmetic on low-rank updates: measure, re-rank, scale and combine them without their base.

    ΔW = s B A,    A [r, in],  B [out, r]

A module's update is known by its pair alone, so most of this never forms ΔW: with the reduced QR decompositions
B = Q_b R_b and A^T = Q_a R_a, the singular values of ΔW are those of the small matrix s R_b R_a^T.

    how      the update of a module                                    paper
    linear   (Σ √|w s| B) (Σ ±√|w s| A): factor by factor, ranks alike  PEFT's `linear`
    cat      Σ w s B A, exactly: the ranks add up                       PEFT's `cat`
    svd      `cat`, cut to a rank: the nearest there is (Eckart-Young)  PEFT's `svd`
    ties     trim each s B A, elect a sign, mean of those that agree    arXiv 2306.01708; PEFT's `ties_svd`
    dare     drop entries of each s B A at random, rescale, Σ w         arXiv 2311.03099; PEFT's `dare_linear_svd`

TIES and DARE work on ΔW, as their papers do; on the factors, as PEFT's `ties` and `dare_linear` do, the result would
depend on how ΔW happens to be factored. What that gives up: they form ΔW and take its SVD, slow on wide modules.

Everything is computed in float64 and returned in float32. An error is a Frobenius distance from what was to be
computed; for `linear` that is the exact sum, since cross terms B_i A_j are what it adds.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor

from lorica.errors import AdapterError, ConfigError

How = Literal["linear", "cat", "svd", "ties", "dare"]


class LowRank(NamedTuple):
    """A module's update s B A: `a` [r, in], `b` [out, r]."""

    a: Tensor
    b: Tensor
    scale: float = 1.0

    @property
    def rank(self) -> int:
        return self.a.shape[0]


class Approximation(NamedTuple):
    """A pair, its Frobenius distance `error` from the update that was wanted, and that one's Frobenius `norm`."""

    pair: LowRank
    error: float
    norm: float


def delta(pair: LowRank) -> Tensor:
    """s B A in float64, [out, in]."""
    return pair.scale * (pair.b.double() @ pair.a.double())


def norm(pair: LowRank) -> float:
    """The Frobenius norm of s B A."""
    return float(_decomposed(pair)[1].norm())


def fold(pair: LowRank) -> LowRank:
    """The same update with its scale multiplied into B."""
    return LowRank(pair.a.float(), (pair.b.double() * pair.scale).float())


def pad(pair: LowRank, rank: int) -> LowRank:
    """The same update with rows and columns of zeros up to `rank`."""
    more = rank - pair.rank
    a = torch.cat([pair.a, pair.a.new_zeros(more, pair.a.shape[1])], 0)
    b = torch.cat([pair.b, pair.b.new_zeros(pair.b.shape[0], more)], 1)
    return LowRank(a, b, pair.scale)


def truncate(pair: LowRank, rank: int) -> Approximation:
    """The nearest update of at most `rank`; a pair that has no higher rank keeps its factors."""
    if pair.rank <= rank:
        return Approximation(fold(pair), 0.0, norm(pair))
    q_b, core, q_a = _decomposed(pair)
    u, s, vh = torch.linalg.svd(core)
    return _cut(q_b @ u, s, vh @ q_a.T, rank)


def concatenate(pairs: Sequence[LowRank], weights: Sequence[float]) -> LowRank:
    """Σ w s B A exactly; the ranks add up."""
    b = [w * pair.scale * pair.b.double() for pair, w in zip(pairs, weights, strict=True)]
    return LowRank(torch.cat([pair.a.double() for pair in pairs], 0), torch.cat(b, 1))


def add_factors(pairs: Sequence[LowRank], weights: Sequence[float]) -> LowRank:
    """(Σ √|w s| B) (Σ ±√|w s| A), the sign of w s on A; the ranks are equal."""
    shares = [w * pair.scale for pair, w in zip(pairs, weights, strict=True)]
    a = [math.copysign(math.sqrt(abs(x)), x) * pair.a.double() for pair, x in zip(pairs, shares, strict=True)]
    b = [math.sqrt(abs(x)) * pair.b.double() for pair, x in zip(pairs, shares, strict=True)]
    return LowRank(torch.stack(a).sum(0), torch.stack(b).sum(0))


def ties(deltas: Sequence[Tensor], weights: Sequence[float], density: float) -> Tensor:
    """Trim, elect a sign, and take the mean of the weighted values that have it (2306.01708, algorithm 1).

    Each of `deltas` keeps its `density` largest magnitudes. The sign is elected before weighting, as PEFT does.
    """
    trimmed = torch.stack([_largest(x, density) for x in deltas])
    elected = torch.where(trimmed.sum(0) >= 0, 1.0, -1.0).to(trimmed)
    agrees = trimmed.sign() == elected
    return (_weighted(trimmed, weights) * agrees).sum(0) / agrees.sum(0).clamp(min=1)


def dare(deltas: Sequence[Tensor], weights: Sequence[float], density: float, generator: torch.Generator) -> Tensor:
    """Drop each entry with probability 1 - density and divide the rest by density (2311.03099), then Σ w."""
    kept = [x * torch.bernoulli(torch.full(x.shape, density), generator=generator) / density for x in deltas]
    return _weighted(torch.stack(kept), weights).sum(0)


def factor(update: Tensor, rank: int) -> Approximation:
    """The nearest pair of `rank` to a dense update [out, in]."""
    u, s, vh = torch.linalg.svd(update.double(), full_matrices=False)
    return _cut(u, s, vh, rank)


def combine(
    adapters: Sequence[Mapping[str, LowRank]],
    weights: Sequence[float],
    how: How,
    *,
    rank: int | None = None,
    density: float = 0.5,
    seed: int = 0,
) -> dict[str, Approximation]:
    """Combine adapters module by module; one that lacks a module adds nothing there.

    Args:
        rank: of the result. None: the sum of the ranks for `cat`, else the largest of the module's.
        density: which share of the entries `ties` and `dare` keep, above 0 and at most 1.
        seed: of what `dare` drops.

    Raises:
        ConfigError: an unknown `how`, or a density out of range.
        AdapterError: a module's shapes differ between adapters, or its ranks where `linear` adds the factors.
    """
    if how not in get_args(How):
        raise ConfigError(f"how is {how!r}; expected {', '.join(get_args(How))}.")
    if not 0 < density <= 1:
        raise ConfigError(f"density is {density:g}; expected more than 0 and at most 1.")
    names = sorted(set().union(*adapters))
    found = {name: [(x[name], w) for x, w in zip(adapters, weights, strict=True) if name in x] for name in names}
    _check_alike({name: [pair for pair, _ in both] for name, both in found.items()}, how)
    generator = torch.Generator().manual_seed(seed)

    def combined(pairs: Sequence[LowRank], weights: Sequence[float]) -> Approximation:
        wanted = rank or max(pair.rank for pair in pairs)
        if how == "ties":
            return factor(ties([delta(pair) for pair in pairs], weights, density), wanted)
        if how == "dare":
            return factor(dare([delta(pair) for pair in pairs], weights, density, generator), wanted)
        exact = concatenate(pairs, weights)
        if how == "linear":
            pair = truncate(add_factors(pairs, weights), wanted).pair
            return Approximation(pair, norm(concatenate([pair, exact], [1, -1])), norm(exact))
        return truncate(exact, exact.rank if how == "cat" and rank is None else wanted)

    return {name: combined(*zip(*both, strict=True)) for name, both in found.items()}


def relative_error(parts: Iterable[Approximation]) -> float:
    """The error of all modules together, relative to the norm of what was wanted; 0 for an update of zero."""
    parts = list(parts)
    error, size = (math.hypot(*(getattr(part, key) for part in parts)) for key in ("error", "norm"))
    return error / size if size > 0 else error


def _decomposed(pair: LowRank) -> tuple[Tensor, Tensor, Tensor]:
    """Q_b [out, r], the core s R_b R_a^T [r, r] and Q_a [in, r], of which the outer two are orthonormal."""
    q_b, r_b = torch.linalg.qr(pair.b.double())
    q_a, r_a = torch.linalg.qr(pair.a.double().T)
    return q_b, pair.scale * r_b @ r_a.T, q_a


def _cut(u: Tensor, s: Tensor, vh: Tensor, rank: int) -> Approximation:
    """Keep the `rank` largest singular values, shared between the factors by their roots."""
    root = s[:rank].sqrt()
    pair = LowRank((root[:, None] * vh[:rank]).float(), (u[:, :rank] * root).float())
    return Approximation(pair, float(s[rank:].norm()), float(s.norm()))


def _largest(x: Tensor, density: float) -> Tensor:
    kept = x.abs().flatten().topk(int(density * x.numel())).indices
    return torch.zeros_like(x).flatten().index_copy(0, kept, x.flatten()[kept]).view_as(x)


def _weighted(stacked: Tensor, weights: Sequence[float]) -> Tensor:
    return stacked * torch.tensor(weights, dtype=stacked.dtype)[:, None, None]


def _check_alike(found: Mapping[str, Sequence[LowRank]], how: How) -> None:
    def differing(key: Callable[[LowRank], object]) -> list[str]:
        return [name for name, pairs in found.items() if len({key(pair) for pair in pairs}) > 1]

    if wrong := differing(lambda pair: (pair.b.shape[0], pair.a.shape[1])):
        raise AdapterError(f"The adapters are of other shapes at {', '.join(wrong[:5])}: they belong to other bases.")
    if how == "linear" and (wrong := differing(lambda pair: pair.rank)):
        raise AdapterError(
            f"`linear` adds the factors, and the ranks differ at {', '.join(wrong[:5])}. Use svd or cat, or give them "
            "one rank with `lorica adapter convert --rank`."
        )
