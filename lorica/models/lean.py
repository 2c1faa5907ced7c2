"""Layers that keep less for backward: normalisations, gated MLPs and GELU.

Written as plain operations, the normalisation of a bfloat16 Llama keeps a float32 copy of its input and its output, and
the MLP keeps four tensors of its inner size: gate, act(gate), up and their product. From the input and one number a
token, or from gate and up alone, backward has all of it again for a few elementwise operations. On a Llama shape of 135
million parameters that is a third of all activations. GPT-2 writes GELU's tangent form out in eight operations, of
which four keep a tensor of the MLP's inner size; torch's own keeps its input. What normalisations and GELU give out has
a recipe, so that the adapters that read it need not keep it (kernels/made_again.py).

Which modules these replace is not guessed from a name: a class is taken for one of them if, on a small example, its own
`forward` computes what ours computes. The new modules hold the old ones' parameters and submodules under the same
names, so checkpoints, targets and merging see no difference.

What it gives up: second derivatives, and hooks on the modules that are replaced.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache, partial
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import unset_fake_temporarily
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from lorica.kernels import cpu_layers
from lorica.kernels.linear import gated, is_unwatched
from lorica.kernels.made_again import with_recipe


class RMSNorm(nn.Module):
    """weight * x / sqrt(mean(x^2) + eps) over the last dimension (arXiv 1910.07467), the quotient in float32.

    With `plus_one` the factor is 1 + weight, in float32 as well (Gemma).

    Shapes: x [..., E], weight [E].
    """

    def __init__(self, weight: nn.Parameter, eps: float, plus_one: bool = False) -> None:
        super().__init__()
        self.weight = weight
        self.eps = eps
        self.plus_one = plus_one

    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight
        if is_unwatched(x) and cpu_layers.takes(x, weight):
            return cpu_layers.rms_norm_now(x, weight, self.eps, self.plus_one)
        result: Tensor = _RMSNorm.apply(x, weight, self.eps, self.plus_one)  # type: ignore[no-untyped-call]
        return with_recipe(result, partial(_normed, eps=self.eps, plus_one=self.plus_one), x, weight)

    def extra_repr(self) -> str:
        return f"{tuple(self.weight.shape)}, eps={self.eps}"


def _normed_and_scale(x: Tensor, weight: Tensor, eps: float, plus_one: bool) -> tuple[Tensor, Tensor]:
    if cpu_layers.takes(x, weight):
        return cast(tuple[Tensor, Tensor], cpu_layers.rms_norm(x, weight, eps, plus_one))
    wide = x.to(torch.float32, copy=True)
    scale = wide.square().mean(-1, keepdim=True).add_(eps).rsqrt_()
    wide.mul_(scale)
    return wide.mul_(weight.float() + 1).to(x.dtype) if plus_one else weight * wide.to(x.dtype), scale


def _normed(x: Tensor, weight: Tensor, eps: float, plus_one: bool) -> Tensor:
    return _normed_and_scale(x, weight, eps, plus_one)[0]


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float, plus_one: bool) -> Tensor:
        ctx.plus_one, ctx.takes = plus_one, cpu_layers.takes(x, weight)
        out, scale = _normed_and_scale(x, weight, eps, plus_one)
        ctx.save_for_backward(x, weight, scale)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        x, weight, scale = ctx.saved_tensors
        (grad,) = grads
        needs_x, needs_weight = ctx.needs_input_grad[:2]
        grad_x = grad_weight = None
        if needs_x and ctx.takes:
            grad_x = cpu_layers.rms_norm_backward(grad, x, weight, scale, ctx.plus_one)
        if needs_weight or (needs_x and not ctx.takes):
            normed = x.to(torch.float32, copy=True).mul_(scale)
            if needs_weight:
                grad_weight = (grad * normed).flatten(0, -2).sum(0).to(weight.dtype)
            if grad_x is None and needs_x:
                inner = grad.float() * (weight.float() + 1 if ctx.plus_one else weight)
                along = (inner * normed).mean(-1, keepdim=True)
                grad_x = inner.sub_(normed.mul_(along)).mul_(scale).to(x.dtype)
        return grad_x, grad_weight, None, None


def _layer_normed(
    shape: tuple[int, ...], eps: float, x: Tensor, weight: Tensor | None = None, bias: Tensor | None = None
) -> Tensor:
    return F.layer_norm(x, shape, weight, bias, eps)


class LayerNorm(nn.LayerNorm):
    """nn.LayerNorm, whose result is not kept by the adapters that read it."""

    def __init__(self, layer: nn.LayerNorm) -> None:
        super().__init__(layer.normalized_shape, layer.eps, elementwise_affine=False)
        self.elementwise_affine, self.weight, self.bias = layer.elementwise_affine, layer.weight, layer.bias

    def forward(self, input: Tensor) -> Tensor:
        make = partial(_layer_normed, self.normalized_shape, self.eps)
        given = [p for p in (self.weight, self.bias) if p is not None]
        return with_recipe(super().forward(input), make, input, *given)


class GELU(nn.GELU):
    """nn.GELU, likewise."""

    def forward(self, input: Tensor) -> Tensor:
        return with_recipe(super().forward(input), super().forward, input)


class GatedMLP(nn.Module):
    """down(act(gate(x)) * up(x)) (arXiv 2002.05202): keeps gate and up, and makes their product again in backward.

    The product would be kept by whatever stands at `down_proj`, an adapter above all; it never knows the difference.
    """

    def __init__(self, gate_proj: nn.Module, up_proj: nn.Module, down_proj: nn.Module, act_fn: nn.Module) -> None:
        super().__init__()
        self.gate_proj, self.up_proj, self.down_proj, self.act_fn = gate_proj, up_proj, down_proj, act_fn
        self.act = _known_act(act_fn)

    def forward(self, x: Tensor) -> Tensor:
        decoded = gated(x, (self.gate_proj, self.up_proj, self.down_proj), self.act)
        if decoded is not None:
            return decoded
        gate, up = self.gate_proj(x), self.up_proj(x)
        act = self.act if self.act is not None and cpu_layers.takes(gate, up) else self.act_fn
        if is_unwatched(x):
            return cast(Tensor, self.down_proj(_gated(gate, up, act)))
        product: Tensor = _Gated.apply(gate, up, act)  # type: ignore[no-untyped-call]
        with _made_again(product, partial(_gated, gate.detach(), up.detach(), act)):
            out: Tensor = self.down_proj(product)
        return out


def _known_act(act: nn.Module) -> str | None:
    """The one of the compiled activations that `act` is, or None."""
    with _real_tensors():
        x = torch.linspace(-6, 6, 49)
        known = {"silu": F.silu(x), "gelu_tanh": F.gelu(x, approximate="tanh")}
        got = act(x)
        return next((name for name, want in known.items() if torch.allclose(got, want, rtol=0, atol=1e-6)), None)


def _gated(gate: Tensor, up: Tensor, act: nn.Module | str) -> Tensor:
    """act(gate) * up; a name of an activation stands for the compiled kernel."""
    with torch.no_grad():
        if isinstance(act, str):
            return cast(Tensor, (cpu_layers.gate_now if is_unwatched(gate) else cpu_layers.gate)(gate, up, act))
        result: Tensor = act(gate)
        # Never in place on the gate itself: an activation may be the identity.
        return result * up if result is gate else result.mul_(up)


class _Gated(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor, act: nn.Module | str) -> Tensor:
        ctx.save_for_backward(gate, up)
        ctx.act = act
        return _gated(gate, up, act)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None]:
        gate, up = ctx.saved_tensors
        if isinstance(ctx.act, str):
            return *cpu_layers.gate_backward(grads[0], gate, up, ctx.act), None
        with torch.enable_grad():
            gate = gate.detach().requires_grad_()
            active = ctx.act(gate)
        (grad_gate,) = torch.autograd.grad(active, gate, grads[0] * up)
        return grad_gate, active.detach() * grads[0], None


@contextmanager
def _made_again(tensor: Tensor, make: Callable[[], Tensor]) -> Iterator[None]:
    """Operations inside keep `make` for backward instead of `tensor`, and instead of views of the whole of it."""
    if torch._C._autograd._top_saved_tensors_default_hooks(True) is not None:
        # Activation checkpointing decides what is kept. Hooks inside its own would take its place, and what `make`
        # needs, gate and up of every layer, would be kept all the same.
        yield
        return
    storage = tensor.untyped_storage()._cdata

    def pack(kept: Tensor) -> Tensor | torch.Size:
        whole = kept.untyped_storage()._cdata == storage and kept.is_contiguous() and kept.numel() == tensor_numel
        return kept.shape if whole else kept

    def unpack(kept: Tensor | torch.Size) -> Tensor:
        return make().view(kept) if isinstance(kept, torch.Size) else kept

    tensor_numel = tensor.numel()
    with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
        yield


def use_lean_layers(model: nn.Module) -> None:
    """Replace, in place, every normalisation and gated MLP of `model` that the layers of this file compute as well."""
    for name, module in list(model.named_modules()):
        replacement = _replacement(module)
        if replacement is not None and name:
            parent, _, child = name.rpartition(".")
            replacement.train(module.training)
            setattr(model.get_submodule(parent), child, replacement)


def _replacement(module: nn.Module) -> nn.Module | None:
    children, parameters = dict(module.named_children()), dict(module.named_parameters(recurse=False))
    if type(module) is nn.LayerNorm:
        return LayerNorm(module)
    if not children and not parameters:
        approximate = module.approximate if type(module) is nn.GELU else _gelu(type(module))  # type: ignore[arg-type]
        return None if approximate is None else GELU(approximate)
    # mypy takes a class for no Hashable where its instances define a hash of their own.
    if not children and set(parameters) == {"weight"} and parameters["weight"].ndim == 1:
        plus_one = _is_rms_norm(type(module))  # type: ignore[arg-type]
        return None if plus_one is None else RMSNorm(parameters["weight"], _eps(module), plus_one)
    gated = set(children) == {"gate_proj", "up_proj", "down_proj", "act_fn"} and not parameters
    if gated and any(True for _ in children["act_fn"].parameters()):
        # Which may be trained, and backward here knows of gate and up alone.
        return None
    return GatedMLP(**children) if gated and _is_gated(type(module)) else None  # type: ignore[arg-type]


_EPS_NAMES = ("variance_epsilon", "eps")


def _eps(module: nn.Module) -> float:
    return float(next(vars(module)[name] for name in _EPS_NAMES if name in vars(module)))


@cache
def _is_rms_norm(kind: type[nn.Module]) -> bool | None:
    """`plus_one` of the RMSNorm that computes what `kind` does; None where none does."""
    with _real_tensors():
        for plus_one in (False, True):
            weight = nn.Parameter(torch.tensor([0.5, -1.0, 2.0, 1.5]))
            if _computes(kind, RMSNorm(weight, 0.25, plus_one), weight=weight, **dict.fromkeys(_EPS_NAMES, 0.25)):
                return plus_one
    return None


@cache
def _gelu(kind: type[nn.Module]) -> str | None:
    """`approximate` of the nn.GELU that computes what `kind` does; None where none does."""
    with _real_tensors():
        return next((name for name in ("none", "tanh") if _computes(kind, nn.GELU(name))), None)


@cache
def _is_gated(kind: type[nn.Module]) -> bool:
    with _real_tensors():
        parts: dict[str, nn.Module] = {
            "gate_proj": nn.Linear(4, 6), "up_proj": nn.Linear(4, 6), "down_proj": nn.Linear(6, 4), "act_fn": nn.SiLU()
        }  # fmt: skip
        return _computes(kind, GatedMLP(**parts), **parts)


@contextmanager
def _real_tensors() -> Iterator[None]:
    """Small real tensors on the CPU, also in a rehearsal on fake ones; the random state is left as it was."""
    with unset_fake_temporarily(), torch.device("cpu"), torch.random.fork_rng(devices=[]), torch.no_grad():
        yield


def _computes(kind: type[nn.Module], ours: nn.Module, **attributes: Any) -> bool:
    """Whether an instance of `kind` with these attributes, and no others, computes what `ours` computes."""
    theirs = kind.__new__(kind)
    nn.Module.__init__(theirs)
    for name, value in attributes.items():
        setattr(theirs, name, value)
    x = torch.linspace(-2, 3, 12).view(3, 4)
    try:
        got = theirs(x)
    except Exception:
        # It needs more than these attributes, so it is something else.
        return False
    return torch.is_tensor(got) and torch.allclose(got, ours(x), rtol=1e-6, atol=1e-6)
