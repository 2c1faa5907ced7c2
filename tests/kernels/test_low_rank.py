"""A frozen layer with its update as one node: output and gradients against float64, over every kind of base."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils.checkpoint import checkpoint
from transformers.pytorch_utils import Conv1D

from lorica.kernels import linear as door
from lorica.kernels import low_rank
from lorica.kernels.linear import Linear
from lorica.kernels.low_rank import low_rank_linear, takes
from lorica.quant.blockwise import quantize
from lorica.quant.linear import empty_like

IN, OUT, RANK, SCALE = 64, 24, 3, 1.7


def quantized(scheme: str) -> nn.Module:
    plain, is_double = nn.Linear(IN, OUT), scheme == "nf4"
    layer = empty_like(plain, scheme, double_quant=is_double)
    layer.hold(quantize(plain.weight.detach(), scheme, double_quant=is_double))
    return layer


BASES: dict[str, Callable[[], nn.Module]] = {
    "linear": lambda: nn.Linear(IN, OUT),
    "ours": lambda: Linear(nn.Linear(IN, OUT, bias=False)),
    "conv1d": lambda: Conv1D(OUT, IN),
    "nf4": lambda: quantized("nf4"),
    "int8": lambda: quantized("int8"),
}


def make(kind: str, dtype: torch.dtype = torch.float32) -> tuple[nn.Module, Tensor, Tensor]:
    torch.manual_seed(0)
    base = BASES[kind]().requires_grad_(False).to(dtype)
    lora_a, lora_b = torch.randn(RANK, IN, requires_grad=True), torch.randn(OUT, RANK, requires_grad=True)
    return base, lora_a, lora_b


def weight_of(base: nn.Module) -> Tensor:
    weight: Tensor = base.weight.detach().double()
    return weight.t() if isinstance(base, Conv1D) else weight


def bias_of(base: nn.Module) -> Tensor:
    bias = base._parameters["bias"]
    return torch.zeros((), dtype=torch.float64) if bias is None else bias.detach().double()


@pytest.mark.parametrize("kind", BASES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("widened", [False, True])
@pytest.mark.parametrize("shape", [(IN,), (7, IN), (2, 3, IN)])
def test_output_and_gradients(
    monkeypatch: pytest.MonkeyPatch, kind: str, dtype: torch.dtype, widened: bool, shape: tuple[int, ...]
) -> None:
    monkeypatch.setattr(door, "cpu_computes", lambda dtype: dtype.itemsize > 2 or not widened)
    base, lora_a, lora_b = make(kind, dtype)
    x = torch.randn(shape).to(dtype).requires_grad_()
    y = low_rank_linear(x, base, lora_a, lora_b, SCALE)
    grad = torch.randn_like(y)
    got = torch.autograd.grad(y, (x, lora_a, lora_b), grad)

    exact = [t.detach().double().requires_grad_() for t in (x, lora_a, lora_b)]
    bias = bias_of(base)
    want = exact[0] @ weight_of(base).t() + bias + SCALE * (exact[0] @ exact[1].t()) @ exact[2].t()
    expected = torch.autograd.grad(want, exact, grad.double())
    assert y.dtype is dtype and got[1].dtype is got[2].dtype is torch.float32
    tolerance = 1e-5 if dtype is torch.float32 else 4e-2
    for mine, theirs in zip((y, *got), (want, *expected), strict=True):
        error = (mine.double() - theirs).abs().max() / theirs.abs().max()
        assert error < tolerance


def test_dropout_acts_on_the_update_alone_and_alike_in_both_directions() -> None:
    base, lora_a, lora_b = make("linear")
    x = torch.randn(500, IN, requires_grad=True)
    torch.manual_seed(3)
    y = low_rank_linear(x, base, lora_a, lora_b, SCALE, 0.6)
    grad = torch.randn_like(y)
    got = torch.autograd.grad(y, (x, lora_a, lora_b), grad)
    torch.manual_seed(3)
    kept = torch.empty(500, IN, dtype=torch.bool).bernoulli_(0.4)
    assert abs(kept.double().mean() - 0.4) < 0.01
    exact = [t.detach().double().requires_grad_() for t in (x, lora_a, lora_b)]
    low = (exact[0] * kept / 0.4) @ exact[1].t() @ exact[2].t()
    want = exact[0] @ weight_of(base).t() + bias_of(base) + SCALE * low
    for mine, theirs in zip((y, *got), (want, *torch.autograd.grad(want, exact, grad.double())), strict=True):
        torch.testing.assert_close(mine.double(), theirs, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("reentrant", [False, True])
def test_dropout_is_the_same_when_a_layer_is_computed_again(reentrant: bool) -> None:
    base, lora_a, lora_b = make("linear")
    x = torch.randn(9, IN, requires_grad=True)

    def run(x: Tensor) -> Tensor:
        return low_rank_linear(x, base, lora_a, lora_b, SCALE, 0.5).square()

    found = []
    for again in (False, True):
        torch.manual_seed(1)
        y = checkpoint(run, x, use_reentrant=reentrant) if again else run(x)
        y.sum().backward()
        found.append([y.detach(), *(t.grad for t in (x, lora_a, lora_b))])
        for t in (x, lora_a, lora_b):
            t.grad = None
    for kept, made_again in zip(*found, strict=True):
        assert torch.equal(kept, made_again)


def test_the_input_is_kept_once_and_dropout_costs_a_byte() -> None:
    base, lora_a, lora_b = make("linear")
    x = torch.randn(100, IN, requires_grad=True)
    kept: list[Tensor] = []

    def pack(tensor: Tensor) -> Tensor:
        kept.append(tensor)
        return tensor

    for dropout, most in ((0.0, 0), (0.5, 100 * IN)):
        kept.clear()
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            low_rank_linear(x, base, lora_a, lora_b, SCALE, dropout)
        given = {t.data_ptr() for t in (x, lora_a, lora_b, base.weight)}
        own = sum(t.nbytes for t in kept if t.data_ptr() not in given)
        assert own == 4 * 100 * RANK + most


def test_what_it_takes() -> None:
    base = nn.Linear(4, 4).requires_grad_(False)
    assert takes(base)
    base.bias.requires_grad_()
    assert not takes(base)
    hooked = nn.Linear(4, 4).requires_grad_(False)
    hooked.register_forward_hook(lambda module, args, out: out * 2)
    assert not takes(hooked)

    class Scaled(nn.Linear):
        def forward(self, input: Tensor) -> Tensor:
            return 2 * super().forward(input)

    assert not takes(Scaled(4, 4).requires_grad_(False))
    replaced = nn.Linear(4, 4).requires_grad_(False)
    replaced.forward = lambda x: x  # type: ignore[method-assign]
    assert not takes(replaced)
    handle = nn.modules.module.register_module_forward_hook(lambda module, args, out: None)
    assert not takes(base.requires_grad_(False))
    handle.remove()
    assert takes(base)


def test_a_weight_that_changes_before_backward_is_noticed() -> None:
    base, lora_a, lora_b = make("linear")
    x = torch.randn(3, IN, requires_grad=True)
    y = low_rank_linear(x, base, lora_a, lora_b, SCALE)
    with torch.no_grad():
        base.get_parameter("weight").mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        torch.autograd.grad(y.sum(), x)
    # Another weight for the time of a call is the one that its backward reads.
    weight = torch.randn(OUT, IN)
    y = functional_call(Caller(base, lora_a, lora_b), {"base.weight": weight}, x)
    (got,) = torch.autograd.grad(y.sum(), x)
    want = (weight + SCALE * lora_b @ lora_a).sum(0).expand(3, -1)
    torch.testing.assert_close(got, want)


class Caller(nn.Module):
    def __init__(self, base: nn.Module, lora_a: Tensor, lora_b: Tensor) -> None:
        super().__init__()
        self.base, self.pair = base, (lora_a, lora_b)

    def forward(self, x: Tensor) -> Tensor:
        return low_rank_linear(x, self.base, *self.pair, SCALE)


@pytest.mark.parametrize("num_rows", [3, 60])
def test_second_derivatives_are_refused(num_rows: int) -> None:
    base, lora_a, lora_b = make("linear")
    x = torch.randn(num_rows, IN, requires_grad=True)
    y = low_rank_linear(x, base, lora_a, lora_b, SCALE)
    (grad,) = torch.autograd.grad(y.square().sum(), lora_a, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.square().sum().backward()  # type: ignore[no-untyped-call]


def test_a_model_may_write_into_what_it_gets() -> None:
    base, lora_a, lora_b = make("linear")
    x = torch.randn(2, 3, IN, requires_grad=True)
    (got,) = torch.autograd.grad(low_rank_linear(x, base, lora_a, lora_b, SCALE).mul_(2).sum(), x)
    (want,) = torch.autograd.grad(2 * low_rank_linear(x, base, lora_a, lora_b, SCALE).sum(), x)
    torch.testing.assert_close(got, want)


@pytest.fixture
def compiled_part() -> None:
    if low_rank.compiled() is None:
        pytest.skip("needs a C compiler")


@pytest.mark.parametrize("rank", [1, 3, 8, 16, 17, 32])
@pytest.mark.parametrize(("num_rows", "in_size", "out_size"), [(48, 64, 32), (101, 32, 96), (199, 96, 160)])
@pytest.mark.parametrize("threads", [1, 2])
def test_the_compiled_update(
    compiled_part: None, rank: int, num_rows: int, in_size: int, out_size: int, threads: int
) -> None:
    torch.manual_seed(rank)
    x, y, grad, grad_x = (torch.randn(num_rows, n) for n in (in_size, out_size, out_size, in_size))
    lora_a, lora_b = torch.randn(rank, in_size), torch.randn(out_size, rank)
    before, before_x = y.double(), grad_x.double()
    was = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        h = low_rank.low_rank_(y, x, lora_a, lora_b, SCALE)
        grad_a, grad_b = low_rank.low_rank_backward(grad, x, h, lora_a, lora_b, SCALE, grad_x)
    finally:
        torch.set_num_threads(was)
    exact = [t.double().requires_grad_() for t in (x, lora_a, lora_b)]
    update = SCALE * exact[0] @ exact[1].t() @ exact[2].t()
    of_x, of_a, of_b = torch.autograd.grad(update, exact, grad.double())
    wanted = (exact[0] @ exact[1].t(), before + update, before_x + of_x, of_a, of_b)
    for got, want in zip((h, y, grad_x, grad_a, grad_b), wanted, strict=True):
        assert (got.double() - want).abs().max() <= 2e-6 * want.abs().max()


def test_what_is_not_trained_gets_no_gradient(compiled_part: None) -> None:
    torch.manual_seed(0)
    base = nn.Linear(IN, 96).requires_grad_(False)
    x, lora_a, lora_b = torch.randn(60, IN), torch.randn(RANK, IN), torch.randn(96, RANK, requires_grad=True)
    low_rank_linear(x, base, lora_a, lora_b, SCALE).square().sum().backward()  # type: ignore[no-untyped-call]
    assert x.grad is None and lora_a.grad is None and lora_b.grad is not None


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_the_compiled_update_and_torchs_agree(
    compiled_part: None, monkeypatch: pytest.MonkeyPatch, dropout: float
) -> None:
    torch.manual_seed(0)
    base = nn.Linear(IN, 96).requires_grad_(False)
    inputs = [torch.randn(2, 31, IN), torch.randn(RANK, IN), torch.randn(96, RANK)]
    found = []
    for library in (low_rank.compiled(), None):
        monkeypatch.setattr(low_rank, "compiled", lambda library=library: library)
        x, lora_a, lora_b = (t.clone().requires_grad_() for t in inputs)
        torch.manual_seed(1)
        y = low_rank_linear(x, base, lora_a, lora_b, SCALE, dropout)
        found.append([y, *torch.autograd.grad(y.square().sum(), (x, lora_a, lora_b))])
    for ours, torchs in zip(*found, strict=True):
        assert (ours - torchs).abs().max() <= 1e-5 * torchs.abs().max()


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_the_operators_are_what_they_declare(compiled_part: None) -> None:
    x, y, grad, lora_a, lora_b = (torch.randn(s) for s in ((50, 32), (50, 64), (50, 64), (4, 32), (64, 4)))
    tests = ("test_schema", "test_faketensor")
    torch.library.opcheck(low_rank.low_rank_, (y, x, lora_a, lora_b, 0.5), test_utils=tests)
    h = x @ lora_a.t()
    for grad_x in (None, torch.zeros(50, 32)):
        arguments = (grad, x, h, lora_a, lora_b, 0.5, grad_x)
        torch.library.opcheck(low_rank.low_rank_backward, arguments, test_utils=tests)
