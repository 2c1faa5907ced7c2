"""HydraLoRA's layer: shared A, heads side by side in one B, gates from a router or constant.

    y = base(x) + s [B_1 ... B_N] (g (x) h),    h = A x [rows, r],  g [rows, N],  g (x) h [rows, N r]

A and the router read the same x, so they are one product with [A; W_g]. Of the second product backward keeps h and g
alone, which are N times smaller than g (x) h, and makes that again. Softmax and everything with gates is float32; the
products run in the dtype of x, as everywhere.

What it gives up: second derivatives.

Shapes: x [rows, in], lora_a [r, in], lora_b [out, N r] with head i in columns i r to (i + 1) r, router [N, in | r].
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F
from transformers.pytorch_utils import Conv1D

from lorica.errors import NotMergeableError
from lorica.kernels.linear import is_low_rank_for_rows, is_widened, linear
from lorica.kernels.low_rank import add_low_rank
from lorica.kernels.rows import add_low_rank as add_low_rank_now
from lorica.methods import inits
from lorica.methods.hydra_sequence import Sequences, running_mean
from lorica.methods.lora_kinds import with_parameters
from lorica.methods.method import Adapter

if TYPE_CHECKING:
    from lorica.methods.hydra import HydraLoRA

# What heads at random are drawn with, and the grid on which their sum is zero in 16 bits as well.
_HEAD_STD, _GRID = 0.02, 2.0**-10


class HydraLinear(Adapter):
    """HydraLoRA on nn.Linear and Conv1D: `lora_a`, `lora_b` and, where gates differ, `router`, all float32.

    Attributes:
        watch: called in each forward with the gates, [rows, N] float32, detached; None: nobody looks.
        name: where the layer stands, if that matters.
        sequences: what tells the samples of a batch apart, if that matters and the model can tell.
    """

    base: nn.Linear | Conv1D
    leaves_base = True
    options: HydraLoRA
    router: Tensor | None
    watch: Callable[[Tensor], None] | None
    name: str
    sequences: Sequences | None

    def __init__(self, base: nn.Linear | Conv1D, options: HydraLoRA, rank: int, scale: float) -> None:
        super().__init__(base, options)
        assert isinstance(options.num_heads, int)
        weight = base.weight.t() if isinstance(base, Conv1D) else base.weight
        out_size, in_size = weight.shape
        factory: dict[str, Any] = {"device": weight.device, "dtype": torch.float32}
        self.rank, self.scale, self.num_heads, self.dropout = rank, scale, options.num_heads, options.dropout
        self.is_routed = options.is_routed
        self.watch, self.name, self.sequences = None, "", None
        self._balance: Tensor | None = None
        self.lora_a = nn.Parameter(torch.empty(rank, in_size, **factory))
        self.lora_b = nn.Parameter(torch.empty(out_size, self.num_heads * rank, **factory))
        inits.kaiming(self.lora_a, self.lora_b)
        if not self.is_routed:
            self.register_parameter("router", None)
        else:
            router = torch.empty(self.num_heads, in_size if options.router_input == "x" else rank, **factory)
            nn.init.kaiming_uniform_(router, a=math.sqrt(5))
            if options.gate == "learned":
                self.router = nn.Parameter(router)
            else:
                self.register_buffer("router", router)
        if options.init == "random":
            self.start_heads(cancelling(torch.randn(self.num_heads, out_size, rank, device=weight.device)))

    @torch.no_grad()
    def start_heads(self, heads: Tensor, lora_a: Tensor | None = None) -> None:
        """Start from these heads [N, out, r], their mean taken off, and from this A [r, in], if one is given.

        The gates start equal, so the output is the base's up to the rounding of the heads' sum.
        """
        self.lora_b.copy_((heads - heads.mean(0)).permute(1, 0, 2).flatten(1))
        if lora_a is not None:
            self.lora_a.copy_(lora_a)
        if self.router is not None:
            self.router.zero_()

    def heads(self) -> Tensor:
        """The heads [N, out, r], a view."""
        return self.lora_b.view(-1, self.num_heads, self.rank).transpose(0, 1)

    def mixed(self, gates: Tensor) -> Tensor:
        """sum_i g_i B_i for constant gates [N], [out, r] in float32."""
        return torch.einsum("n,nor->or", gates.to(self.lora_b), self.heads())

    def forward(self, x: Tensor) -> Tensor:
        rows = x.reshape(-1, x.shape[-1])
        y: Tensor = self.base(rows)
        if self._is_for_rows(y, rows):
            y = add_low_rank_now(y, rows, self.lora_a, self.lora_b, self.scale, self.router, self.options.temperature)
            return y.view(*x.shape[:-1], y.shape[-1])
        h, logits = self._projected(rows)
        h = F.dropout(h, self.dropout, self.training)
        if logits is None:
            # Equal gates are LoRA with the heads' mean.
            y = add_low_rank(y, h, self._mean_head(), self.scale)
        else:
            gates = self._gates(logits, x.shape[:-1], remember=True)
            self._note(gates)
            y = _AddHeads.apply(y, h, gates, self.lora_b, self.scale)  # type: ignore[no-untyped-call]
        return y.view(*x.shape[:-1], y.shape[-1])

    def gates(self, x: Tensor) -> Tensor:
        """The gates for inputs x [..., in] of this layer, [rows, N] in float32.

        With routing by sequence x holds whole samples, as the model's latest forward did where it is one of
        transformers, else along its last but one dimension.
        """
        rows = x.reshape(-1, x.shape[-1])
        _, logits = self._projected(rows)
        if logits is None:
            return torch.full((len(rows), self.num_heads), 1 / self.num_heads, device=x.device)
        return self._gates(logits, x.shape[:-1], remember=False)

    def _projected(self, rows: Tensor) -> tuple[Tensor, Tensor | None]:
        """h [rows, r] and the router's outputs [rows, N]."""
        if self.router is None:
            return linear(rows, self.lora_a), None
        if self.options.router_input == "ax":
            h = linear(rows, self.lora_a)
            return h, linear(h, self.router)
        both = linear(rows, torch.cat([self.lora_a, self.router]))
        h, logits = torch.split(both, [self.rank, self.num_heads], 1)
        return h, logits

    def _is_for_rows(self, y: Tensor, rows: Tensor) -> bool:
        """Whether the kernel for decoding knows all that this adapter does."""
        options, router = self.options, self.router
        plain = options.router_input == "x" and options.routing == "token" and self.watch is None and not self.training
        return plain and router is not None and is_low_rank_for_rows(y, rows, self.lora_a, self.lora_b, router)

    def _gates(self, logits: Tensor, shape: torch.Size, *, remember: bool) -> Tensor:
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        if self.options.routing == "sequence":
            if self.sequences is None:
                logits = running_mean(logits.view(-1, *(shape[-1:] or (1,)), self.num_heads)).view_as(logits)
            else:
                logits = self.sequences.running_mean(logits, self.name, remember and not _in_backward())
        temperature = self.options.temperature
        logits = logits if temperature == 1 else logits / temperature
        # Over the first dimension torch works on many rows at once, five times as fast for a few heads.
        return logits.t().softmax(0).t()

    def _note(self, gates: Tensor) -> None:
        """Show the gates to who watches, and keep what the load-balance loss needs."""
        balances = self.options.balance_loss > 0 and self.training and gates.requires_grad
        if self.watch is not None and not _in_backward():
            self.watch(gates.detach())
        if balances:
            loss = balance(gates, None if self.sequences is None else self.sequences.counted(len(gates)))
            # Activation checkpointing computes it again as it was, but kept it would keep its whole layer alive.
            if not _in_backward():
                self._balance = loss

    def _mean_head(self) -> Tensor:
        return self.heads().mean(0) if self.num_heads > 1 else self.lora_b

    def auxiliary_loss(self) -> Tensor | None:
        """The weighted load-balance loss of the latest forward, once; of a layer called several times, its last call's.

        None in evaluation, and without `balance_loss`.
        """
        loss, self._balance = self._balance, None
        return None if loss is None else self.options.balance_loss * loss

    def taken_off(self, model: nn.Module) -> None:
        if self.sequences is not None:
            self.sequences.remove()

    @torch.no_grad()
    def merged(self) -> nn.Module:
        if self.is_routed:
            raise NotMergeableError(
                f"The gates of {self.num_heads} heads depend on the input, so no change of the base's weights computes "
                "the same. `lorica adapter static RUN --rows ROWS --output FOLDER` weights the heads as suits rows "
                "best, writes a stock LoRA, which can be merged, and says how far it is from the routed model."
            )
        delta = self.scale * (self._mean_head() @ self.lora_a)
        weight = self.weight.detach()
        merged = (weight.float() + (delta.t() if isinstance(self.base, Conv1D) else delta)).to(weight.dtype)
        return with_parameters(self.base, {"weight": merged})

    def extra_repr(self) -> str:
        return f"rank={self.rank}, num_heads={self.num_heads}, scale={self.scale:g}, gate={self.options.gate}"


def balance(gates: Tensor, real: Tensor | None = None) -> Tensor:
    """N sum_i f_i P_i over the rows [rows, N] of which `real` [rows] says that they count: 1 where the load is even.

    f_i is the share of rows in which head i has the largest gate (heads that tie share a row), P_i the mean of its
    gate, through which the gradient goes.
    """
    weights = gates.new_ones(len(gates)) if real is None else real.to(gates)
    weights = (weights / weights.sum().clamp(min=1))[:, None]
    top = (gates == gates.amax(1, keepdim=True)).to(gates)
    f = (weights * top / top.sum(1, keepdim=True)).sum(0)
    return gates.shape[1] * (f * (weights * gates).sum(0)).sum()


class _AddHeads(torch.autograd.Function):
    """y + s [B_1 ... B_N] (g (x) h), written into y [rows, out]; h and g are kept."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, h: Tensor, gates: Tensor, lora_b: Tensor, scale: float) -> Tensor:
        ctx.save_for_backward(h, gates, lora_b)
        ctx.scale = scale
        ctx.mark_dirty(y)
        return add_low_rank(y, _spread(h, gates), lora_b, scale)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, None]:
        h, gates, lora_b = ctx.saved_tensors
        wide = grad.float() if is_widened(grad) else grad
        # The scale goes into what is small: h and g alone carry it on.
        grad_b = wide.t() @ _spread(h, gates * ctx.scale).to(wide.dtype)
        grad_spread = (wide @ lora_b.to(wide.dtype)).view(len(h), gates.shape[1], h.shape[1]).to(gates.dtype)
        # Sums of products: einsum would call a batched product, slower by far where matrices are this small.
        grad_h = (grad_spread * (gates * ctx.scale)[:, :, None]).sum(1)
        grad_gates = torch.bmm(grad_spread, (h.to(gates.dtype) * ctx.scale)[:, :, None]).squeeze(2)
        return grad, grad_h.to(h.dtype), grad_gates, grad_b.to(lora_b.dtype), None


def _spread(h: Tensor, gates: Tensor) -> Tensor:
    """g (x) h [rows, N r] in the dtype of h."""
    return (gates[:, :, None] * h[:, None, :]).to(h.dtype).flatten(1)


def cancelling(heads: Tensor) -> Tensor:
    """Heads [N, out, r] without their mean and with a root mean square of `_HEAD_STD`.

    Their sum is zero, exactly so in bfloat16 and float16 too, where no value is more than twelve times that.
    """
    heads = heads - heads.mean(0)
    heads = heads * (_HEAD_STD / heads.square().mean().sqrt().clamp(min=torch.finfo(heads.dtype).tiny))
    heads = (heads / _GRID).round() * _GRID
    heads[-1] = -heads[:-1].sum(0)
    return heads


def _in_backward() -> bool:
    """Whether a forward runs inside a backward pass: activation checkpointing computes it again."""
    return torch._C._current_graph_task_id() != -1
