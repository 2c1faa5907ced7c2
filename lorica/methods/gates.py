"""What HydraLoRA's routers do: how the heads are used, how sure a router is, whether heads follow components.

Everything follows from one table a layer, sums over rows, so batches add up and a pass over the evaluation rows keeps
none of their gates. With g [rows, N] the gates and c [rows] the component of each row's sample:

    utilisation    mean of g, and the share of rows where a head is on top; heads that tie share the row
    entropy        mean of H(g), 0 to log N: how sure the router is. H(mean of g): low where heads have collapsed
    agreement      mutual information of head and component over the mean of their entropies (NMI), 0 to 1: `nmi` with
                   each row's top head, `soft_nmi` with g as the joint distribution, low while gates are mild

NMI finds agreement in noise too, the more the fewer samples there are. `adjusted_nmi` is less what independent draws
would show, (N - 1) (K - 1) / 2n nats (Miller 1955), as Vinh et al. 2010 do (JMLR 11). The rows of a sample have one
component and are alike, so n counts samples: too strict rather than too lenient.

Also how alike heads are, and how far two adapters lie apart in A and in B, which figures 2 and 3 of the paper
(arXiv 2404.19245) argue from.

What it gives up: encoder-decoders, whose halves have different rows, and layers that see some rows only, as experts do:
gates whose number of rows is not that of the batch are passed over.

N: heads, K: components, n: samples, r: rank.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Protocol, TypeVar

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from lorica.methods.attach import adapters
from lorica.methods.hydra_linear import HydraLinear

UNKNOWN = -1
"""The component of a sample that belongs to none: it counts, but not for agreement."""
NO_TOKEN = -2
"""The label of a row that counts nowhere: padding, or the filler of a packed batch."""


@dataclass(frozen=True)
class GateSummary:
    """One layer's router over the rows seen.

    Attributes:
        mean_gates: [N], sum 1.
        top_shares: [N], sum 1: of the rows, those where the head's gate is the largest.
        entropy: mean over rows, in nats; row_entropy: the same over log N, 1 = undecided, 0 = one head a row.
        load_entropy: of `mean_gates`, over log N: 1 = all heads are used alike, 0 = one does everything.
        nmi, soft_nmi, adjusted_nmi: agreement with the components; None where the rows have fewer than two of them,
            the adjusted one also where the samples are too few to tell.
        by_component: [K][N], the mean gates of each component's rows; None for one without rows.
    """

    num_rows: int
    mean_gates: tuple[float, ...]
    top_shares: tuple[float, ...]
    entropy: float
    row_entropy: float
    load_entropy: float
    nmi: float | None
    soft_nmi: float | None
    adjusted_nmi: float | None
    by_component: tuple[tuple[float, ...] | None, ...]


def gate_sums(gates: Tensor, labels: Tensor, num_components: int) -> Tensor:
    """Sums over rows for each component, and for UNKNOWN in the last column: [2 N + 1, K + 1] float64.

    Rows 0 to N are the gates', N to 2 N the top heads', the last one their entropy's.

    Args:
        gates: [rows, N], summing to 1.
        labels: [rows] int64 below K; UNKNOWN or NO_TOKEN.
    """
    gates = gates.detach().double()
    top = (gates == gates.amax(1, keepdim=True)).double()
    rows = torch.cat([gates, top / top.sum(1, keepdim=True), torch.special.entr(gates).sum(1, keepdim=True)], 1)
    columns = torch.where(labels == UNKNOWN, num_components, labels)
    one_hot = columns[:, None] == torch.arange(num_components + 1, device=labels.device)
    return rows.t() @ one_hot.double()


def summarize_gates(sums: Tensor, num_samples: int) -> GateSummary:
    """What `gate_sums`, added up over batches, come to. num_samples: how many of a known component were in them."""
    sums = sums.cpu()
    num_heads = len(sums) // 2
    gates, top = sums[:num_heads], sums[num_heads:-1]
    num_rows = float(top.sum())
    assert num_rows > 0, "a summary needs rows"
    mean_gates, entropy = gates.sum(1) / num_rows, float(sums[-1].sum()) / num_rows
    # One head is never undecided, and does everything.
    most = math.log(num_heads) if num_heads > 1 else math.inf
    known = top[:, :-1].sum(0)
    nmi = soft_nmi = adjusted_nmi = None
    if int((known > 0).sum()) > 1:
        nmi, soft_nmi = (normalized_mutual_information(table[:, :-1]) for table in (top, gates))
        adjusted_nmi = normalized_mutual_information(top[:, :-1], chance_information(top[:, :-1], num_samples))
    return GateSummary(
        num_rows=round(num_rows),
        mean_gates=tuple(mean_gates.tolist()),
        top_shares=tuple((top.sum(1) / num_rows).tolist()),
        entropy=entropy,
        row_entropy=entropy / most,
        load_entropy=_entropy(mean_gates) / most,
        nmi=nmi,
        soft_nmi=soft_nmi,
        adjusted_nmi=adjusted_nmi,
        by_component=tuple(
            tuple((gates[:, k] / count).tolist()) if count > 0 else None for k, count in enumerate(known.tolist())
        ),
    )


def _entropy(weights: Tensor) -> float:
    """In nats, of weights >= 0 that need not sum to 1."""
    return float(torch.special.entr(weights / weights.sum()).sum())


def mutual_information(table: Tensor) -> float:
    """In nats, of the two variables that `table` [N, K] counts jointly; counts need not be whole."""
    return max(0.0, _entropy(table.sum(0)) + _entropy(table.sum(1)) - _entropy(table.flatten()))


def normalized_mutual_information(table: Tensor, chance: float = 0.0) -> float | None:
    """Mutual information of a joint table [N, K] over the mean of the two entropies, both less `chance` nats.

    0 where the larger of them is 0, and None where chance alone is as much as there can be.
    """
    mean = (_entropy(table.sum(0)) + _entropy(table.sum(1))) / 2
    if mean <= chance:
        return None if chance else 0.0
    return (mutual_information(table) - chance) / (mean - chance)


def chance_information(table: Tensor, num_samples: int) -> float:
    """Mutual information, in nats, that so many independent draws show on average where there is none.

    Miller 1955's first-order term, for as many classes as `table` [N, K] has non-empty rows and columns. It is good
    where each cell can expect a few draws, and too large below.
    """
    heads, components = (int((table.sum(axis) > 0).sum()) for axis in (1, 0))
    return (heads - 1) * (components - 1) / (2 * num_samples) if num_samples else math.inf


class _BatchLike(Protocol):
    """What of a batch says which rows are whose: see `data/packing.py`."""

    @property
    def input_ids(self) -> Tensor: ...
    @property
    def cu_seqlens(self) -> Tensor | None: ...
    @property
    def attention_mask(self) -> Tensor | None: ...


_Batch = TypeVar("_Batch", bound=_BatchLike)
_Labels = Sequence[int] | npt.NDArray[np.int64] | Tensor


def row_labels(labels: Tensor, batch: _BatchLike) -> Tensor:
    """The label of each row [B T] of a batch whose samples have the components `labels` [n] int64, in its order."""
    if batch.cu_seqlens is None:
        assert batch.attention_mask is not None and len(labels) == len(batch.input_ids), "a label a sample"
        real = batch.attention_mask.cpu() == 1
        return torch.where(real, labels[:, None], NO_TOKEN).flatten()
    lengths = batch.cu_seqlens.cpu().long().diff()
    # A filler is the last sample, and has no label.
    num_fillers = len(lengths) - len(labels)
    assert num_fillers in (0, 1), "a label a sample"
    return torch.cat([labels, labels.new_full((num_fillers,), NO_TOKEN)]).repeat_interleave(lengths)


class GateWatch:
    """Adds up the gates of every routed layer over the batches that `over` hands out."""

    def __init__(self, num_components: int) -> None:
        self.num_components = num_components
        self._num_samples = 0
        self._labels: Tensor | None = None
        self._sums: dict[str, Tensor] = {}

    def over(self, batches: Iterable[_Batch], components: Iterable[_Labels]) -> Iterator[_Batch]:
        """The batches one by one, each to go through the model once before the next is asked for.

        Args:
            components: for each batch those of its samples [n], 0 to K - 1 or UNKNOWN.
        """
        try:
            for batch, labels in zip(batches, components, strict=True):
                labels = torch.as_tensor(labels, dtype=torch.int64)
                assert bool((labels < self.num_components).all()), "a component beyond the last"
                self._labels = row_labels(labels, batch)
                self._num_samples += int((labels >= 0).sum())
                yield batch
        finally:
            self._labels = None

    def see(self, name: str, gates: Tensor) -> None:
        """Add the gates [rows, N] of the layer `name`, if they are those of the batch."""
        if self._labels is None or len(gates) != len(self._labels):
            return
        self._labels = self._labels.to(gates.device)
        sums = gate_sums(gates, self._labels, self.num_components)
        self._sums[name] = self._sums[name] + sums if name in self._sums else sums

    def summaries(self) -> dict[str, GateSummary]:
        """By name, in the model's order, the layers that saw rows. One whose gates are no numbers is left out."""
        # any() is true of NaN too.
        sound = {name: sums for name, sums in self._sums.items() if bool(sums.any()) and bool(sums.isfinite().all())}
        return {name: summarize_gates(sums, self._num_samples) for name, sums in sound.items()}


@contextmanager
def watching(model: nn.Module, num_components: int = 0) -> Iterator[GateWatch]:
    """Watch the routers of `model` for a pass over data: an evaluation costs little more, training steps nothing.

    with watching(model, 5) as watch:
        likelihood(model, loss_fn, watch.over(batches, components))
    watch.summaries()
    """
    watch = GateWatch(num_components)
    layers = {name: layer for name, layer in adapters(model).items() if isinstance(layer, HydraLinear)}

    before = {name: layer.watch for name, layer in layers.items()}
    for name, layer in layers.items():
        layer.watch = partial(watch.see, name)
    try:
        yield watch
    finally:
        for name, layer in layers.items():
            layer.watch = before[name]


def head_cosines(heads: Tensor) -> Tensor:
    """Cosine of each two heads [N, out, r] as vectors: [N, N] float64. One that is zero is like none, 0."""
    return _cosines(heads.detach().double().flatten(1))


def _cosines(rows: Tensor) -> Tensor:
    norms = rows.norm(dim=1, keepdim=True)
    rows = rows / torch.where(norms > 0, norms, 1)
    return rows @ rows.t()


@dataclass(frozen=True)
class Alikeness:
    """How alike two matrices are, of two adapters at the same place.

    Attributes:
        cosine: of the matrices as vectors, -1 to 1. Two that span the same space in other bases may have 0.
        subspace: ||U^T V||^2 / min(r, r') of orthonormal bases of what they span (LoRA, arXiv 2106.09685, equation 4),
            0 to 1.
        chance: what `subspace` is on average for spaces drawn at random.
    """

    cosine: float
    subspace: float
    chance: float


def alikeness(one: Tensor, other: Tensor) -> Alikeness:
    """Compare A [r, in] with A, or B [out, r] with B: the spaces of `in` or `out` features that they span.

    Two adapters of one seed begin with the same A and with B = 0. So that A stays alike and B does not says little as
    long as adapters of different seeds are not compared too.
    """
    one, other = one.detach().double(), other.detach().double()
    cosine = (
        float(_cosines(torch.stack([one.flatten(), other.flatten()]))[0, 1]) if one.shape == other.shape else math.nan
    )
    # The long side is that of the features.
    u, v = (_basis(m.t() if m.shape[0] < m.shape[1] else m) for m in (one, other))
    ranks = u.shape[1], v.shape[1]
    subspace = float((u.t() @ v).square().sum()) / min(ranks) if min(ranks) else 0.0
    return Alikeness(cosine, subspace, max(ranks) / len(u))


def _basis(matrix: Tensor) -> Tensor:
    """An orthonormal basis of the columns of [d, r], [d, rank]."""
    u, singular, _ = torch.linalg.svd(matrix, full_matrices=False)
    kept: Tensor = u[:, singular > singular[0] * max(matrix.shape) * torch.finfo(matrix.dtype).eps]
    return kept
