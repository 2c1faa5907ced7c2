"""HydraLoRA's layer against its own equation in float64, against LoRA, and against a loop over the heads."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.pytorch_utils import Conv1D

import lorica
from lorica.data.packing import pack
from lorica.data.tokenized import TokenizedDataset
from lorica.errors import ConfigError, NotMergeableError, TargetError
from lorica.kernels.linear import Linear, is_widened
from lorica.methods.attach import trained_state
from lorica.methods.hydra import HydraLoRA
from lorica.methods.hydra_linear import HydraLinear, balance
from lorica.methods.requantize import merge_requantized
from lorica.models.load import equip
from lorica.quant.linear import layers

IDS = torch.randint(3, 64, (2, 9), generator=torch.Generator().manual_seed(5))


def made(kind: type[nn.Module] = nn.Linear, **fields: Any) -> HydraLinear:
    """An adapter on [20, 12] with everything at random."""
    torch.manual_seed(0)
    base = nn.Linear(12, 20) if kind is nn.Linear else Conv1D(20, 12)
    nn.init.normal_(base.bias)
    adapter = HydraLoRA(**{"rank": 4, "alpha": 6, "num_heads": 3, **fields}).wrap(base, "layer")
    assert isinstance(adapter, HydraLinear)
    for parameter in (adapter.lora_a, adapter.lora_b, adapter.router):
        if parameter is not None:
            nn.init.normal_(parameter, std=0.5)
    return adapter


def by_the_equation(adapter: HydraLinear, x: Tensor, given: dict[str, Tensor] | None = None) -> Tensor:
    """W x + b + s sum_i g_i B_i A x in float64, head by head; `given` are its tensors."""
    own = dict(adapter.named_parameters()) | dict(adapter.named_buffers())
    t = given or {name: tensor.detach().double() for name, tensor in own.items()}
    weight = t["base.weight"].T if isinstance(adapter.base, Conv1D) else t["base.weight"]
    n, r, options = adapter.num_heads, adapter.rank, adapter.options
    h = x @ t["lora_a"].T
    read = x if options.router_input == "x" else h
    logits = read @ t["router"].T / options.temperature
    gates = logits.exp() / logits.exp().sum(-1, keepdim=True)
    y = x @ weight.T + t["base.bias"]
    for i in range(n):
        y = y + options.alpha / r * gates[..., i, None] * (h @ t["lora_b"][:, i * r : (i + 1) * r].T)
    return y


@pytest.mark.parametrize("kind", [nn.Linear, Conv1D])
@pytest.mark.parametrize("router_input", ["x", "ax"])
@pytest.mark.parametrize("shape", [(3, 5, 12), (7, 12), (0, 12), (2, 0, 12)], ids=str)
def test_outputs_and_gradients_follow_the_equation(kind: type[nn.Module], router_input: str, shape: Any) -> None:
    adapter = made(kind, router_input=router_input, temperature=0.7)
    x = torch.randn(shape, requires_grad=True)
    y = adapter(x)
    g = torch.randn_like(y)
    y.backward(g)
    wide = {name: p.detach().double().requires_grad_() for name, p in adapter.named_parameters()}
    x64 = x.detach().double().requires_grad_()
    want = by_the_equation(adapter, x64, wide)
    want.backward(g.double())
    torch.testing.assert_close(y.double(), want, rtol=1e-5, atol=1e-5)
    for ours, exact in ((x, x64), *((getattr(adapter, k), wide[k]) for k in ("lora_a", "lora_b", "router"))):
        torch.testing.assert_close(ours.grad.double(), exact.grad, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("fields", [{}, {"router_input": "ax"}, {"routing": "sequence"}, {"gate": "frozen"}], ids=str)
def test_gradcheck(fields: dict[str, Any]) -> None:
    adapter = made(num_heads=2, rank=2, **fields).double()
    names = [n for n, p in adapter.named_parameters() if p.requires_grad]
    tensors = [adapter.get_parameter(n) for n in names]
    x = torch.randn(2, 3, 12, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(
        lambda x, *given: torch.func.functional_call(adapter, dict(zip(names, given, strict=True)), (x,)), (x, *tensors)
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_products_run_in_the_dtype_of_x(dtype: torch.dtype) -> None:
    exact, adapter = made(), made()
    adapter.base.to(dtype)
    wrapped = HydraLoRA(rank=4, alpha=6, num_heads=3).wrap(Linear(adapter.base), "layer")
    wrapped.load_state_dict({k: v for k, v in adapter.state_dict().items()})
    x = torch.randn(6, 12).to(dtype).requires_grad_()
    y, want = wrapped(x), exact(x.float())
    assert y.dtype is dtype
    torch.testing.assert_close(y.float(), want, rtol=0.03, atol=0.1)
    g = torch.randn(6, 20).to(dtype)
    y.backward(g)
    want.backward(g.float())
    for name in ("lora_a", "lora_b", "router"):
        ours, wanted = wrapped.get_parameter(name).grad, exact.get_parameter(name).grad
        assert ours.dtype is torch.float32
        assert (ours - wanted).norm() < 0.05 * wanted.norm()
    assert is_widened(x) in (True, False)


def test_dropout_drops_h_once(check_dropout: Callable[..., None]) -> None:
    adapter = made(dropout=0.5)
    x = torch.randn(4, 12)

    def wanted() -> Tensor:
        gates = (x @ adapter.router.T).softmax(-1)
        h = F.dropout(x @ adapter.lora_a.T, 0.5)
        each = torch.stack([h @ head.T for head in adapter.heads()], 1)
        return adapter.base(x) + 1.5 * (gates[..., None] * each).sum(1)

    check_dropout(adapter, x, wanted)


def trained(options: Any, lr_of_b: float, heads: Tensor | None, start: Tensor, optimizer: Any) -> list[Tensor]:
    """A, and B or the mean head, after each of a few steps."""
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(12, 20))
    adapter: Any = lorica.adapt(model, options)[0]
    with torch.no_grad():
        adapter.lora_a.copy_(torch.linspace(-1, 1, 48).sin().view(4, 12))
        adapter.lora_b.copy_(start if heads is None else heads.permute(1, 0, 2).flatten(1))
    x, target = torch.randn(16, 12), torch.randn(16, 20)
    step = optimizer([{"params": [adapter.lora_a]}, {"params": [adapter.lora_b], "lr": lr_of_b}])
    seen = []
    for _ in range(5):
        (model(x) - target).square().mean().backward()
        step.step()
        step.zero_grad()
        mean = adapter.lora_b if heads is None else adapter.heads().mean(0)
        seen += [adapter.lora_a.detach().clone(), mean.detach().clone()]
    return seen


@pytest.mark.parametrize("name", ["sgd", "adam"])
def test_uniform_gates_are_lora(name: str) -> None:
    """The gradient of a head is that of the mean over N, so SGD moves the mean at lr / N, and Adam, which knows no
    scale, at lr.
    """
    num_heads, lr = 4, 0.05
    heads = torch.randn(num_heads, 20, 4, generator=torch.Generator().manual_seed(3)) * 0.1
    sgd, adam = (lambda p: torch.optim.SGD(p, lr=lr)), (lambda p: torch.optim.Adam(p, lr=lr, eps=1e-20))
    make = sgd if name == "sgd" else adam
    lora = lorica.LoRA(rank=4, alpha=6, targets="0")
    hydra = HydraLoRA(rank=4, alpha=6, num_heads=num_heads, gate="uniform", targets="0")
    want = trained(lora, lr / num_heads if name == "sgd" else lr, None, heads.mean(0), make)
    got = trained(hydra, lr, heads, heads.mean(0), make)
    for ours, theirs in zip(got, want, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)


def test_zero_heads_and_equal_gates_stay_one_lora_and_a_random_router_parts_them() -> None:
    def head_gradients(router: float) -> Tensor:
        adapter = made()
        nn.init.zeros_(adapter.lora_b)
        nn.init.normal_(adapter.router, std=router or 1.0)
        if not router:
            nn.init.zeros_(adapter.router)
        adapter(torch.randn(8, 12)).square().sum().backward()
        return adapter.lora_b.grad.view(20, 3, 4).transpose(0, 1)

    same, apart = head_gradients(0.0), head_gradients(0.5)
    torch.testing.assert_close(same[0], same[1])
    assert (apart[0] - apart[1]).norm() > 0.1 * apart.norm()


@pytest.mark.parametrize("num_heads", [2, 3, 5])
def test_random_heads_cancel_and_leave_the_output(num_heads: int) -> None:
    torch.manual_seed(0)
    base = nn.Linear(12, 200)
    adapter: Any = HydraLoRA(rank=4, num_heads=num_heads, init="random").wrap(base, "layer")
    heads = adapter.heads().detach()
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        assert torch.equal(heads.to(dtype).float(), heads)
    assert torch.equal(heads.sum(0), torch.zeros(200, 4))
    assert 0.015 < heads.std() < 0.025 and (heads[0] - heads[1]).std() > 0.01
    x = torch.randn(50, 12)
    assert not adapter.router.any()
    torch.testing.assert_close(adapter(x), base(x), rtol=0, atol=1e-6)
    # Symmetry is broken: each head has a gradient of its own to the router.
    adapter(x).sum().backward()
    assert adapter.router.grad.abs().max() > 1e-3


def test_heads_can_be_given() -> None:
    adapter = made()
    heads, lora_a = torch.randn(3, 20, 4), torch.randn(4, 12)
    adapter.start_heads(heads, lora_a)
    torch.testing.assert_close(adapter.heads().detach(), heads - heads.mean(0))
    assert torch.equal(adapter.lora_a.detach(), lora_a)
    x = torch.randn(5, 12)
    torch.testing.assert_close(adapter(x), adapter.base(x), rtol=1e-5, atol=1e-5)


def test_the_load_balance_loss_is_the_papers() -> None:
    gates = torch.tensor([[0.7, 0.2, 0.1], [0.6, 0.3, 0.1], [0.1, 0.8, 0.1], [0.5, 0.1, 0.4]], requires_grad=True)
    loss = balance(gates)
    f, p = (3 / 4, 1 / 4, 0), (1.9 / 4, 1.4 / 4, 0.7 / 4)
    assert loss.item() == pytest.approx(3 * sum(a * b for a, b in zip(f, p, strict=True)))
    loss.backward()
    torch.testing.assert_close(gates.grad, torch.tensor([[9 / 16, 3 / 16, 0.0]]).expand(4, 3))
    assert balance(torch.full((5, 4), 0.25)).item() == pytest.approx(1.0)
    # Padding does not count.
    real = torch.tensor([True, False, True, False])
    assert balance(gates, real).item() == pytest.approx(balance(gates[[0, 2]]).item())


def llama(tiny_llama: Any, model: Any = None, **fields: Any) -> Any:
    torch.manual_seed(2)
    model = lorica.adapt(model or tiny_llama(), HydraLoRA(**{"rank": 4, "num_heads": 3, **fields}))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in lorica.trainable_parameters(model).values():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.2)
    return model


def balance_gradients(model: Any, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    model.train()
    loss = model(**inputs).logits.square().mean()
    for adapter in lorica.adapters(model).values():
        extra = adapter.auxiliary_loss()
        assert extra is not None and adapter.auxiliary_loss() is None
        loss = loss + extra
    loss.backward()
    return {name: p.grad.clone() for name, p in lorica.trainable_parameters(model).items()}


def test_balance_is_the_same_under_activation_checkpointing(tiny_llama: Any) -> None:
    plain, checkpointed = (llama(tiny_llama, balance_loss=0.5) for _ in range(2))
    checkpointed.gradient_checkpointing_enable({"use_reentrant": False})
    want, got = (balance_gradients(model, {"input_ids": IDS}) for model in (plain, checkpointed))
    for name in want:
        torch.testing.assert_close(got[name], want[name], msg=name)
    without = balance_gradients(llama(tiny_llama, balance_loss=1e-9), {"input_ids": IDS})
    assert any((without[name] - want[name]).abs().max() > 1e-4 for name in want if name.endswith("router"))
    # What was computed again in backward is not kept.
    assert all(a._balance is None for a in lorica.adapters(checkpointed).values())
    plain.eval()(IDS)
    assert all(a.auxiliary_loss() is None for a in lorica.adapters(plain).values())


def test_balance_leaves_padding_and_filler_out(tiny_llama: Any) -> None:
    model = llama(tiny_llama, balance_loss=1.0, model=equip(tiny_llama())).train()

    def balances(**inputs: Any) -> list[float]:
        model(**inputs)
        return [a.auxiliary_loss().item() for a in lorica.adapters(model).values()]

    want = balances(input_ids=IDS)
    padded = {"input_ids": F.pad(IDS, (0, 4), value=1), "attention_mask": F.pad(torch.ones_like(IDS), (0, 4))}
    assert balances(**padded) == pytest.approx(want, rel=1e-5)
    rows = TokenizedDataset(IDS.flatten().int().numpy(), IDS.flatten().int().numpy(), np.array([0, 9, 18]))
    # None, one token, and many.
    for multiple in (1, 19, 32):
        assert balances(**pack(rows, [0, 1], multiple).model_inputs()) == pytest.approx(want, rel=1e-5), multiple


def test_gates_and_watch_show_what_the_forward_uses(tiny_llama: Any) -> None:
    model = llama(tiny_llama)
    seen: dict[str, list[Tensor]] = {}
    inputs: dict[str, Tensor] = {}
    for name, adapter in lorica.adapters(model).items():
        adapter.watch = seen.setdefault(name, []).append
        adapter.base.register_forward_pre_hook(lambda _, args, name=name: inputs.__setitem__(name, args[0]))
    model.gradient_checkpointing_enable({"use_reentrant": False})
    model.train()(IDS).logits.sum().backward()
    for name, adapter in lorica.adapters(model).items():
        # Once, though the forward ran twice.
        (gates,) = seen[name]
        assert gates.shape == (18, 3) and gates.dtype is torch.float32 and not gates.requires_grad
        torch.testing.assert_close(gates, adapter.gates(inputs[name]).detach())
        torch.testing.assert_close(gates.sum(1), torch.ones(18))
    uniform = made(gate="uniform")
    assert torch.equal(uniform.gates(torch.randn(2, 3, 12)), torch.full((6, 3), 1 / 3))


@pytest.mark.parametrize("routing", ["token", "sequence"])
@pytest.mark.parametrize("quant", [None, "nf4"])
def test_a_later_token_never_changes_an_earlier_output(tiny_llama: Any, routing: str, quant: str | None) -> None:
    model = tiny_llama().eval()
    if quant:
        lorica.quantize(model, quant)
    torch.manual_seed(0)
    lorica.adapt(model, HydraLoRA(rank=4, num_heads=3, routing=routing))
    for parameter in lorica.trainable_parameters(model).values():
        nn.init.normal_(parameter, std=0.2)
    assert bool(list(layers(model))) == bool(quant)
    other = IDS.clone()
    other[:, 5:] = (IDS[:, 5:] + 7) % 60 + 3
    before, after = model(IDS).logits, model(other).logits
    torch.testing.assert_close(before[:, :5], after[:, :5], rtol=0, atol=1e-5)
    assert (before[:, 5:] - after[:, 5:]).abs().max() > 1e-2


@pytest.mark.parametrize("num_heads, gate", [(1, "learned"), (3, "uniform")])
def test_constant_gates_merge_exactly_and_have_no_router(tiny_llama: Any, num_heads: int, gate: str) -> None:
    model = llama(tiny_llama, num_heads=num_heads, gate=gate)
    assert not any(name.endswith("router") for name, _ in model.named_parameters())
    torch.testing.assert_close(lorica.merge(model)(IDS).logits, model(IDS).logits, rtol=1e-4, atol=1e-5)


def test_equal_gates_over_nf4_are_merged_where_that_is_asked_for(tiny_llama: Any) -> None:
    model = tiny_llama().eval()
    lorica.quantize(model, "nf4")
    lorica.adapt(model, HydraLoRA(rank=4, num_heads=3, gate="uniform"))
    for parameter in lorica.trainable_parameters(model).values():
        nn.init.normal_(parameter, std=0.3)
    plain, drift = merge_requantized(model)
    assert drift.change > 0 and bool(list(layers(plain))) and not lorica.adapters(plain)


def test_gates_that_differ_cannot_be_merged_and_the_error_says_what_can(tiny_llama: Any) -> None:
    with pytest.raises(NotMergeableError, match=r"lorica adapter static RUN --rows"):
        lorica.merge(llama(tiny_llama))


def test_a_frozen_router_is_saved_and_not_trained(tiny_llama: Any, tmp_path: Any) -> None:
    model = llama(tiny_llama, gate="frozen")
    trained, state = lorica.trainable_parameters(model), trained_state(model)
    assert not any(name.endswith("router") for name in trained)
    assert any(name.endswith("router") for name in state)
    lorica.save_adapter(model, tmp_path / "adapter")
    again = lorica.load_adapter(tiny_llama(), tmp_path / "adapter")
    assert torch.equal(again(IDS).logits, model(IDS).logits)


def test_the_router_counts_as_parameters() -> None:
    assert made().num_parameters() == 4 * 12 + 20 * 12 + 3 * 12
    assert made(router_input="ax").num_parameters() == 4 * 12 + 20 * 12 + 3 * 4
    for without in ({"gate": "frozen"}, {"gate": "uniform"}):
        assert made(**without).num_parameters() == 4 * 12 + 20 * 12


@pytest.mark.parametrize(
    "fields, said",
    [
        ({"num_heads": 0}, "num_heads.*1 to 1024"),
        ({"num_heads": "many"}, "num_heads.*auto"),
        ({"num_heads": True}, "num_heads"),
        ({"temperature": 0}, "temperature"),
        ({"balance_loss": 0.1, "gate": "uniform"}, "balance_loss"),
        ({"init": "random", "gate": "frozen"}, "init random"),
    ],
)
def test_options_that_cannot_be_meant(fields: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        HydraLoRA(**fields)


def test_auto_must_be_settled_before_wrapping(tiny_llama: Any) -> None:
    with pytest.raises(ConfigError, match="num_heads is auto"):
        lorica.adapt(tiny_llama(), HydraLoRA(num_heads="auto"))


@pytest.mark.parametrize("fields", [{"balance_loss": 0.1}, {"routing": "sequence"}], ids=str)
def test_the_output_head_is_refused_where_it_would_see_pieces(tiny_llama: Any, fields: dict[str, Any]) -> None:
    with pytest.raises(TargetError, match="output head"):
        lorica.adapt(tiny_llama(), HydraLoRA(targets=("q_proj", "lm_head"), **fields))


def test_a_copy_is_independent(tiny_llama: Any) -> None:
    model = llama(tiny_llama, routing="sequence", balance_loss=0.1)
    twin = copy.deepcopy(model)
    want = model(IDS).logits
    model(IDS[:1, :4])
    assert torch.equal(twin(IDS).logits, want)
    lorica.detach(model)
    assert torch.equal(twin(IDS).logits, want)
    assert not model.base_model._forward_pre_hooks and not model.base_model._forward_hooks
