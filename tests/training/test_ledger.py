"""The ledger: storages followed by hand, and floating-point operations beside torch's own counter and brute force."""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry, sdpa_backward_flop_count, sdpa_flop_count

import lorica
from lorica.kernels import cpu_attention, low_rank
from lorica.kernels.attention import attention
from lorica.methods.attach import adapt
from lorica.methods.lora import LoRA
from lorica.models.load import equip
from lorica.models.loss import make_loss
from lorica.training.ledger import Ledger
from lorica.training.rehearsal import example_batch, rehearse

needs_compiler = pytest.mark.skipif(cpu_attention.compiled() is None, reason="no C compiler")


def test_activations_of_an_mlp_by_hand() -> None:
    rows, width, inner = 10, 4, 8
    ledger = Ledger()
    with FakeTensorMode():
        model = nn.Sequential(nn.Linear(width, inner), nn.Tanh(), nn.Linear(inner, width, bias=False))
        model[0].requires_grad_(False)
        x = torch.empty(rows, width, requires_grad=True)
        with ledger:
            held = {ledger.add(t) for t in (x, *model.parameters())}
            loss = model(x).sum()
            kept = ledger.alive() - held
            forward = dict(ledger.work)
            loss.backward()
    # tanh keeps its output, which is also what the second weight's gradient needs; the scalar is the caller's.
    assert sorted(ledger.sizes[n] for n in kept) == [4, 4 * rows * inner]
    assert sum(o.flops * n for o, n in forward.items()) == 2 * (2 * rows * width * inner)
    backward = sum(o.flops * n for o, n in ledger.work.items()) - sum(o.flops * n for o, n in forward.items())
    # The frozen weight costs the gradient of its input alone, the trained one both.
    assert backward == 3 * (2 * rows * width * inner)


def test_views_are_not_counted_twice_and_deaths_are_seen() -> None:
    ledger = Ledger()
    with FakeTensorMode(), ledger:
        x = torch.empty(100)
        y = x.view(10, 10).t()[2:]
        z = x + 1
        assert ledger.sizes == [400, 400] and len(ledger.alive()) == 2
        del x, z
        assert len(ledger.alive()) == 1, "the view keeps the storage"
        del y
    assert ledger.alive() == set() and len(ledger.alive(ledger.peak())) == 2
    assert ledger.events == [(0, 1), (1, 1), (1, -1), (0, -1)]


def booked(call: Callable[[], object]) -> dict[str, int]:
    """Floating-point operations by kind, of what has some."""
    ledger = Ledger()
    with ledger:
        call()
    kinds = {operation.kind for operation in ledger.work if operation.flops}
    return {kind: sum(o.flops * n for o, n in ledger.work.items() if o.kind == kind) for kind in kinds}


def both_ways(query: Tensor, key: Tensor, value: Tensor, **how: Any) -> dict[str, int]:
    tensors = [t.requires_grad_() for t in (query, key, value)]
    return booked(lambda: attention(nn.Identity(), *tensors, None, **how)[0].sum().backward())


@pytest.mark.parametrize("kernel", ["lorica", "torch"])
def test_attention_of_whole_squares_as_torch_counts_it(monkeypatch: pytest.MonkeyPatch, kernel: str) -> None:
    if kernel == "torch":
        monkeypatch.setattr(cpu_attention, "takes", lambda *_, **__: False)
    elif cpu_attention.compiled() is None:
        pytest.skip("no C compiler")
    # torch's kernel for CPUs takes keys of every head, and values as wide as them.
    heads, width = (4, 8) if kernel == "torch" else (2, 16)
    shapes = (3, 4, 5, 8), (3, heads, 5, 8), (3, heads, 5, width)
    found = both_ways(*(torch.randn(shape) for shape in shapes), is_causal=False)
    assert found == {
        "attention": sdpa_flop_count(*shapes),
        "attention_backward": sdpa_backward_flop_count((3, 4, 5, width), *shapes),
    }


def test_causal_attention_is_counted_alike_in_both_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    tensors = [torch.randn(2, 4, 7, 8) for _ in range(3)]
    # 1 + 2 + ... + 7 pairs of 2 samples and 4 heads; two products of 8, and five in backward.
    expected = {"attention": 28 * 8 * 2 * 2 * 8, "attention_backward": 28 * 8 * 5 * 2 * 8}
    assert both_ways(*tensors, is_causal=True) == expected
    monkeypatch.setattr(cpu_attention, "takes", lambda *_, **__: False)
    assert both_ways(*tensors, is_causal=True) == expected


@needs_compiler
@pytest.mark.parametrize(
    ("causal", "window", "prefix"), [(True, None, 0), (False, None, 0), (True, 3, 0), (True, 4, 5)]
)
def test_packed_attention_is_counted_pair_by_pair(causal: bool, window: int | None, prefix: int) -> None:
    lengths, heads, size = [5, 1, 9], 4, 8
    query, key = torch.randn(1, heads, sum(lengths), size), torch.randn(1, 2, sum(lengths), size)
    in_front = [torch.randn(2, prefix, size) if prefix else None for _ in range(2)]
    found = both_ways(
        query, key, torch.randn_like(key), is_causal=causal, sliding_window=window, prefix_key=in_front[0],
        prefix_value=in_front[1], cu_seq_lens_q=torch.tensor([0, *lengths]).cumsum(0, dtype=torch.int32),
    )  # fmt: skip
    seen = lambda i, j: not causal or (j <= i and i - j < (window or sys.maxsize))  # noqa: E731
    pairs = sum(seen(i, j) for n in lengths for i in range(n) for j in range(n)) + prefix * sum(lengths)
    assert found["attention"] == 2 * heads * pairs * 2 * size
    assert found["attention_backward"] == 2 * heads * pairs * 5 * size


class TorchCounts(TorchDispatchMode):
    """What torch's own formulas make of an operation, and a product of ours as that of the matrices it stands for.

    (torch's FlopCounterMode does not bear a gradient that is taken within a forward.)
    """

    def __init__(self) -> None:
        super().__init__()
        self.flops, self.names = 0, set[str]()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if func._overloadpacket in flop_registry:
            self.names.add(str(func))
            self.flops += flop_registry[func._overloadpacket](*args, **(kwargs or {}), out_val=out)
        elif str(func).startswith("lorica.linear_"):
            self.flops += 2 * args[0].shape[:-1].numel() * args[0].shape[-1] * out.shape[-1]
        elif str(func).startswith("lorica.low_rank"):
            # Each row meets A and B once, and in backward twice.
            times, begin = (2, 3) if "backward" in str(func) else (1, 2)
            self.flops += times * 2 * args[0].shape[0] * sum(t.numel() for t in args[begin : begin + 2])
        return out


@pytest.mark.parametrize(("dtype", "quant"), [("float32", None), ("bfloat16", None), ("bfloat16", "nf4")])
def test_a_step_is_what_torch_counts_and_its_attention(
    tiny_llama: Callable[..., Any], dtype: str, quant: str | None
) -> None:
    lengths, kind = [16, 9], getattr(torch, dtype)
    if not cpu_attention.takes(torch.empty(1, 1, 1, 8, dtype=kind), torch.empty(1, 1, 1, 8, dtype=kind), True):
        pytest.skip("another kernel, which fills samples up")
    model = tiny_llama().to(kind)
    config = copy.deepcopy(model.config)
    model = equip(model if quant is None else lorica.quantize(model, quant))
    loss_fn, batch = make_loss(model), example_batch(lengths)
    adapt(model, LoRA(rank=4)).train()
    counter = TorchCounts()
    with counter:
        (loss_fn(model, batch.model_inputs(), batch.targets) / batch.num_targets).backward()
    assert not any("attention" in name for name in counter.names), "torch would count it, and it is added below"
    # Both samples and the filler up to a multiple of 64 tokens, which is a sample too; 2 layers, 4 heads of 8.
    filler = batch.input_ids.shape[1] - sum(lengths)
    pairs = sum(n * (n + 1) // 2 for n in (*lengths, filler))
    found = rehearse(config, LoRA(rank=4), lengths=lengths, dtype=kind, quant=quant)
    attention_flops = 2 * 4 * pairs * 2 * (2 + 5) * 8
    assert sum(operation.flops * count for operation, count in found.work.items()) == counter.flops + attention_flops


def test_the_kernel_for_few_rows_counts_as_a_product() -> None:
    x, weight = torch.randn(3, 16).bfloat16(), torch.randn(8, 16).bfloat16()
    kind = "narrow_matmul"
    assert booked(lambda: torch.ops.lorica.linear_rows(x, weight)) == booked(lambda: F.linear(x, weight))
    assert booked(lambda: F.linear(x, weight)) == {kind: 2 * 3 * 8 * 16}


@needs_compiler
def test_a_low_rank_update_counts_as_its_products() -> None:
    y, x, lora_a, lora_b = (torch.randn(s) for s in ((50, 64), (50, 32), (4, 32), (64, 4)))
    each = 2 * 50 * 4 * (32 + 64)
    assert booked(lambda: low_rank.low_rank_(y, x, lora_a, lora_b, 1.0)) == {"narrow_matmul": each}
    h, grad_x = x @ lora_a.t(), torch.zeros_like(x)
    backward = partial(low_rank.low_rank_backward, y, x, h, lora_a, lora_b, 1.0, grad_x)
    assert booked(backward) == {"narrow_matmul": 2 * each}


def test_every_operator_of_ours_is_known() -> None:
    """One that is not counted, and should be, would make the plan promise a faster step than there is."""
    lorica.kernels.nf4_quantize(torch.zeros(64))  # all of them are imported
    names = {name.removeprefix("lorica::") for name in torch._C._dispatch_get_all_op_names() if "lorica::" in name}
    counted = {"attention", "attention_backward", "linear_rows"}
    counted |= {"low_rank_", "low_rank_backward"}
    counted |= {f"linear_{bits}bit{of}" for bits in (4, 8) for of in ("", "_input_grad")}
    moving = {f"{verb}_{bits}bit" for verb in ("quantize", "dequantize") for bits in (4, 8)}
    moving |= {"cross_entropy_", "gate", "gate_backward", "rms_norm", "rms_norm_backward"}
    assert names - counted - moving == set(), "count it in training/ledger.py, or say here that it only moves memory"
