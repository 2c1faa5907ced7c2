"""Starts of a low-rank pair from the data that it will be trained on: `eva` from activations, `lora_ga` from gradients.

Both look at a few batches before the first step and leave the base as it is, and its output too: EVA has B = 0, LoRA-GA
trains the difference from its start as `pissa` does (see `inits.py`).

    eva        A = the principal directions of the layer's inputs           (Paischer et al. 2024, arXiv 2410.07170)
    lora_ga    A, B = singular vectors of the gradient G of the weight      (Wang et al. 2024, arXiv 2407.05000)

Neither ever holds what it decomposes. The directions are updated batch by batch (Ross et al. 2008). G itself is never
computed: where B = 0, the gradient of B is s G A^T, and where A = 0, that of A is s B^T G. With these two products,
which a training step computes anyway, subspace iteration (Halko et al. 2011, arXiv 0909.4061) finds the singular
vectors in the memory of an adapter of four times the rank without an optimizer, which is about that of a training step,
and the base may be of any kind, quantised too.

What it gives up: EVA's redistribution of ranks over the layers (its rho is 1 here): the shapes of a run would follow
from its data. And time: LoRA-GA goes through its batches 2 `ROUNDS` times, for one pass and one large gradient.

Shapes: lora_a [rank, in], lora_b [out, rank], rows [tokens, in].
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from lorica.errors import ConfigError, DivergedError
from lorica.methods.method import StartBatches, StartLoss

if TYPE_CHECKING:
    from lorica.methods.lora_kinds import LoraLinear

GAMMA = 16.0
"""LoRA-GA's gamma: the greater, the smaller the start. 16 is the default of PEFT and of the authors' code."""

ROUNDS = 2
"""Rounds of subspace iteration, of two passes each."""

_OVERSAMPLING = 2
"""Vectors carried along for each one that is wanted; those at the end are the least certain."""


class PrincipalDirections:
    """The first principal directions of rows that come in batches, in the memory of twice as many rows.

    `found` [k, in] are the directions, the strongest first, each times its singular value; k is at most `number`.
    """

    def __init__(self, number: int) -> None:
        self._number = number
        self.num_rows = 0
        self._mean = torch.zeros(())
        self.found = torch.zeros(0, 0)

    def add(self, rows: Tensor) -> None:
        """Take in `rows` [n, in]."""
        rows = rows.float()
        mean, before, now = rows.mean(0), self.num_rows, rows.shape[0]
        stacked = rows - mean
        if before:
            # The means of the two parts differ, and that is a direction in which the rows vary, too.
            between = math.sqrt(before * now / (before + now)) * (self._mean - mean)
            stacked = torch.cat([self.found, stacked, between[None]])
            mean = self._mean + (mean - self._mean) * (now / (before + now))
        _, s, v = torch.svd_lowrank(stacked, q=min(self._number, *stacked.shape), niter=4)
        self.found, self._mean, self.num_rows = s[:, None] * v.t(), mean, before + now

    def first(self, number: int) -> Tensor:
        """The first `number` directions, orthonormal, [number, in]."""
        return nn.functional.normalize(self.found[:number])


@torch.no_grad()
def eva(model: nn.Module, layers: Mapping[str, LoraLinear], loss_fn: StartLoss, batches: StartBatches) -> None:
    """Start each layer's `lora_a` with the principal directions of its inputs; `lora_b` stays zero.

    All real tokens count, of prompts too, and padding does not. (PEFT's default takes the trained tokens alone.)

    Raises:
        ConfigError: layers saw no more tokens than their rank.
        DivergedError: a layer's inputs are not finite.
    """
    ranks = {name: layer.lora_a.shape[0] for name, layer in layers.items()}
    number = _OVERSAMPLING * max(ranks.values())
    directions: dict[str, PrincipalDirections] = {}
    # Projections that read the same tensor one after another share one decomposition.
    last: tuple[Tensor | None, str] = (None, "")
    padding: Tensor | None = None

    def observe(name: str, x: Tensor) -> None:
        nonlocal last
        if x is last[0]:
            directions[name] = directions[last[1]]
            return
        last = (x, name)
        real = x.reshape(-1, x.shape[-1])
        if padding is not None and padding.shape == x.shape[:-1]:
            real = x[padding.bool()]
        if not bool(real.isfinite().all()):
            raise DivergedError(f"init eva: what {name} reads is not finite.")
        directions.setdefault(name, PrincipalDirections(number)).add(real)

    def hook(name: str) -> Callable[[nn.Module, tuple[Any, ...]], None]:
        return lambda module, args: observe(name, args[0])

    handles = [layer.register_forward_pre_hook(hook(name)) for name, layer in layers.items()]
    try:
        with _evaluating(model):
            for inputs, targets, *_ in batches:
                padding = inputs.get("attention_mask")
                loss_fn(model, inputs, targets)
    finally:
        for handle in handles:
            handle.remove()
    seen = {name: directions[name].num_rows if name in directions else 0 for name in layers}
    starved = [f"{name} saw {seen[name]}" for name in layers if seen[name] <= ranks[name]]
    if starved:
        raise ConfigError(
            f"init eva needs more tokens than the rank: {', '.join(starved[:5])}{', ...' if len(starved) > 5 else ''}. "
            "Raise init_batches, or take init kaiming."
        )
    for name, layer in layers.items():
        layer.lora_a.copy_(directions[name].first(ranks[name]))


def lora_ga(model: nn.Module, layers: Mapping[str, LoraLinear], loss_fn: StartLoss, batches: StartBatches) -> None:
    """Start each layer with c V_1..r^T as `lora_a` and c U_r+1..2r as `lora_b`, from G = U S V^T.

    c = out^(1/4) / sqrt(gamma). Of all pairs these make the first step of gradient descent the best approximation of G
    of rank 2r (theorem 3.1): A keeps the r strongest directions of its rows, B the next r of its columns. The signs and
    sizes of the singular values do not matter. (PEFT 0.21.2 multiplies B by S, and scales B alone.)

    The gradient is that of the loss summed over all `batches`, in training mode, with the adapters' dropout off.
    """
    ranks = {name: layer.lora_a.shape[0] for name, layer in layers.items()}
    left: dict[str, Tensor] = {}
    for layer in layers.values():
        (rank, in_size), out_size = layer.lora_a.shape, layer.lora_b.shape[0]
        number = min(2 * _OVERSAMPLING * rank, in_size, out_size)
        layer.start_a = layer.start_b = None
        layer.lora_a.data = layer.lora_a.new_empty(number, in_size).normal_()
        layer.lora_b.data = layer.lora_b.new_zeros(out_size, number)
    for _ in range(ROUNDS):
        for name, gradient in _gradients(model, layers, "lora_b", loss_fn, batches):
            layers[name].lora_b.data.copy_(torch.linalg.qr(gradient)[0])
            layers[name].lora_a.data.zero_()
        for name, gradient in _gradients(model, layers, "lora_a", loss_fn, batches):
            # s Q^T G, [number, in], small enough for an exact decomposition.
            u, _, vh = torch.linalg.svd(gradient, full_matrices=False)
            left[name] = layers[name].lora_b.detach() @ u
            layers[name].lora_a.data.copy_(vh)
            layers[name].lora_b.data.zero_()
    for name, layer in layers.items():
        rank, factor = ranks[name], layer.lora_b.shape[0] ** 0.25 / GAMMA**0.5
        layer.start_a = factor * layer.lora_a.detach()[:rank]
        layer.start_b = factor * left[name][:, rank : 2 * rank]
        layer.lora_a.data, layer.lora_b.data = layer.start_a.clone(), layer.start_b.clone()


def _gradients(
    model: nn.Module, layers: Mapping[str, LoraLinear], trained: str, loss_fn: StartLoss, batches: StartBatches
) -> list[tuple[str, Tensor]]:
    """Each layer's gradient of its `trained`, "lora_a" or "lora_b", summed over all batches.

    Raises:
        ConfigError: a layer gets none.
        DivergedError: one is not finite.
    """
    before = model.training
    model.train()
    for layer in layers.values():
        layer.eval()
        for half in ("lora_a", "lora_b"):
            getattr(layer, half).requires_grad_(half == trained)
    # Each pass draws the base's own dropout alike, or it would multiply by another G.
    with torch.random.fork_rng():
        torch.manual_seed(0)
        for inputs, targets, *_ in batches:
            loss_fn(model, inputs, targets).backward()  # type: ignore[no-untyped-call]
    found = [(name, getattr(layer, trained).grad) for name, layer in layers.items()]
    model.zero_grad(set_to_none=True)
    model.train(before)
    for layer in layers.values():
        layer.lora_a.requires_grad_()
        layer.lora_b.requires_grad_()
    idle = [name for name, gradient in found if gradient is None or not gradient.any()]
    if idle:
        raise ConfigError(f"init lora_ga: {idle[0]} gets no gradient from the data. Take init kaiming.")
    if broken := [name for name, gradient in found if not bool(gradient.isfinite().all())]:
        raise DivergedError(f"init lora_ga: the gradient of {broken[0]} is not finite on the first batches.")
    return found


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    before = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(before)


STARTS = {"eva": eva, "lora_ga": lora_ga}
