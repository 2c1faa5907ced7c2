"""LoRA on weights that modules read themselves, against the equation in float64: attention, parameters, experts."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from transformers import GptOssConfig, Qwen3MoeConfig
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssExperts
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts

import lorica
from lorica.errors import TargetError
from lorica.methods.lora import LoRA
from lorica.methods.lora_experts import LoraExperts, grouped_linear
from lorica.methods.lora_weights import LoraAttention, LoraParameters, LoraWeights

NUM_EXPERTS, HIDDEN, INNER = 3, 16, 8


def randomised(adapter: Any) -> Any:
    for parameter in adapter.parameters():
        nn.init.normal_(parameter, std=0.3)
    return adapter


def in_float64(adapter: LoraWeights, deltas: dict[str, Tensor]) -> nn.Module:
    """The base with W + delta."""
    plain = copy.deepcopy(adapter.base).double().requires_grad_()
    for name, delta in deltas.items():
        weight = plain.get_parameter(name)
        assert weight.shape == delta.shape
        weight.data += delta
    return plain


@pytest.mark.parametrize("sizes", [{}, {"kdim": 8, "vdim": 6}], ids=["fused", "apart"])
def test_attention_follows_the_equation_in_float64(sizes: dict[str, int]) -> None:
    torch.manual_seed(0)
    adapter = randomised(LoRA(rank=4, alpha=6).wrap(nn.MultiheadAttention(12, 2, batch_first=True, **sizes), "mha"))
    assert isinstance(adapter, LoraAttention)
    names = ["q_proj_weight", "k_proj_weight", "v_proj_weight"] if sizes else ["in_proj_weight"]
    assert [*adapter.sites] == [*names, "out_proj.weight"]
    a, b = ({key: p.detach().double() for key, p in half.items()} for half in (adapter.lora_a, adapter.lora_b))
    deltas = {name: 1.5 * b[name] @ a[name] for name in names}
    # PEFT 0.21.2 adds this one twice.
    deltas["out_proj.weight"] = 3.0 * b["out_proj_weight"] @ a["out_proj_weight"]
    q, k, v = (torch.randn(2, 5, size) for size in (12, sizes.get("kdim", 12), sizes.get("vdim", 12)))
    mask = torch.tensor([[False] * 5, [False] * 3 + [True] * 2])
    plain = in_float64(adapter, deltas)
    want = plain(q.double(), k.double(), v.double(), key_padding_mask=mask)
    for ours, exact in zip(adapter(q, k, v, key_padding_mask=mask), want, strict=True):
        torch.testing.assert_close(ours.double(), exact, rtol=1e-5, atol=1e-5)
    inner = 4 * (12 + 12) + 4 * (8 + 12) + 4 * (6 + 12) if sizes else 4 * (12 + 36)
    adapter.base.requires_grad_(False)
    assert adapter.num_parameters() == inner + 4 * (12 + 12)


def test_attention_shows_its_adapted_weights_and_the_rest_of_its_base() -> None:
    adapter = randomised(LoRA(rank=4).wrap(nn.MultiheadAttention(12, 2), "mha"))
    merged: Any = adapter.merged()
    torch.testing.assert_close(adapter.in_proj_weight, merged.in_proj_weight)
    torch.testing.assert_close(adapter.out_proj.weight, merged.out_proj.weight)
    assert adapter.in_proj_weight.requires_grad and adapter.out_proj.weight.requires_grad
    assert adapter.num_heads == 2 and adapter.in_proj_bias is adapter.base.in_proj_bias
    with pytest.raises(AttributeError, match="no_such_thing"):
        _ = adapter.no_such_thing


def experts(kind: type[nn.Module]) -> Any:
    if kind is GptOssExperts:
        layer = kind(GptOssConfig(hidden_size=HIDDEN, intermediate_size=INNER, num_local_experts=NUM_EXPERTS))
    else:
        layer = kind(Qwen3MoeConfig(hidden_size=HIDDEN, moe_intermediate_size=INNER, num_experts=NUM_EXPERTS))
    # transformers' loop over the experts.
    layer.config._experts_implementation = "eager"
    return randomised(layer)


@pytest.mark.parametrize("rank", [4, 3])
@pytest.mark.parametrize("kind", [Qwen3MoeExperts, GptOssExperts])
def test_tokens_of_an_expert_see_its_own_update(kind: type[nn.Module], rank: int) -> None:
    torch.manual_seed(0)
    adapter = randomised(LoRA(rank=rank, alpha=2 * rank).wrap(experts(kind), "experts"))
    assert isinstance(adapter, LoraExperts)
    transposed = kind is GptOssExperts
    deltas = {}
    for name, (out_size, in_size) in {"gate_up_proj": (2 * INNER, HIDDEN), "down_proj": (HIDDEN, INNER)}.items():
        a, b = adapter.lora_a[name].detach().double(), adapter.lora_b[name].detach().double()
        assert a.shape == (NUM_EXPERTS * rank, in_size) and b.shape == (out_size, rank * NUM_EXPERTS)
        # PEFT's layouts: A is [E, rank, in], B [out, rank, E].
        each = [2.0 * b[:, e::NUM_EXPERTS] @ a[e * rank : (e + 1) * rank] for e in range(NUM_EXPERTS)]
        deltas[name] = torch.stack([delta.T if transposed else delta for delta in each])
    plain = in_float64(adapter, deltas)
    # Expert 1 gets no token.
    x, index = torch.randn(5, HIDDEN), torch.tensor([[0, 2], [2, 0], [0, 2], [2, 0], [0, 2]])
    weights = torch.rand(5, 2)
    ours, x64 = x.clone().requires_grad_(), x.double().requires_grad_()
    got, want = adapter(ours, index, weights), plain(x64, index, weights.double())
    torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(adapter.merged()(x, index, weights), got, rtol=1e-5, atol=1e-5)
    grad = torch.randn(5, HIDDEN)
    got.backward(grad)
    want.backward(grad.double())
    assert ours.grad is not None and x64.grad is not None
    torch.testing.assert_close(ours.grad.double(), x64.grad, rtol=1e-4, atol=1e-5)
    # dL/dB_e = s dL/dW_e A_e^T.
    grads = plain.get_parameter("down_proj").grad
    assert grads is not None
    a = adapter.lora_a["down_proj"].detach().double().view(NUM_EXPERTS, rank, INNER)
    wanted = 2.0 * (grads.mT if transposed else grads) @ a.mT
    found = adapter.lora_b["down_proj"].grad.double().view(HIDDEN, rank, NUM_EXPERTS).permute(2, 0, 1)
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)
    assert not found[1].any()


def test_experts_count_in_closed_form_and_take_ranks_by_the_parameters_name() -> None:
    options = LoRA(rank=4, rank_pattern={"down_proj": 2}, targets="experts")
    adapter = options.wrap(experts(Qwen3MoeExperts).requires_grad_(False), "mlp.experts")
    up, down = 4 * (HIDDEN + 2 * INNER), 2 * (INNER + HIDDEN)
    assert adapter.num_parameters() == NUM_EXPERTS * (up + down)


def test_dropout_of_experts_acts_on_the_branch_in_training_only() -> None:
    torch.manual_seed(0)
    adapter = randomised(LoRA(rank=4, dropout=0.5).wrap(experts(Qwen3MoeExperts), "experts"))
    x, index, weights = torch.randn(4, HIDDEN), torch.tensor([[0], [1], [2], [0]]), torch.ones(4, 1)
    assert not torch.equal(adapter.train()(x, index, weights), adapter(x, index, weights))
    assert torch.equal(adapter.eval()(x, index, weights), adapter(x, index, weights))
    nn.init.zeros_(adapter.lora_b["gate_up_proj"])
    nn.init.zeros_(adapter.lora_b["down_proj"])
    assert torch.equal(adapter.train()(x, index, weights), adapter(x, index, weights))


@pytest.mark.parametrize("sizes", [(4, 8), (3, 8), (4, 5)])
def test_grouped_products_are_products_of_the_groups(sizes: tuple[int, int]) -> None:
    in_size, out_size = sizes
    rows, weight, ends = torch.randn(7, in_size), torch.randn(3, out_size, in_size), torch.tensor([2, 2, 7])
    want = torch.cat([rows[:2] @ weight[0].T, rows[2:] @ weight[2].T])
    torch.testing.assert_close(grouped_linear(rows, weight, ends.int()), want)


def test_a_rehearsal_needs_no_numbers_to_route_tokens_by() -> None:
    with FakeTensorMode():
        adapter = LoRA(rank=4).wrap(experts(Qwen3MoeExperts), "experts")
        y = adapter(torch.randn(5, HIDDEN), torch.zeros(5, 2, dtype=torch.long), torch.rand(5, 2))
        assert isinstance(y, FakeTensor) and y.shape == (5, HIDDEN)
        y.sum().backward()


class OwnWeights(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Parameter(torch.randn(6, 4))
        self.stack = nn.Parameter(torch.randn(2, 4, 6))
        self.bias = nn.Parameter(torch.zeros(6))

    def forward(self, x: Tensor) -> Tensor:
        return (x @ self.first @ self.stack).sum(0) + self.bias


class Holder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.own, self.layer = OwnWeights(), nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        return self.own(self.layer(x))


def test_any_parameter_can_be_named() -> None:
    torch.manual_seed(0)
    options = LoRA(rank=2, alpha=2, targets=("own", "layer"), target_parameters=(r"own\.(first|stack)",))
    model = lorica.adapt(Holder(), options)
    adapter = randomised(lorica.adapters(model)["own"])
    assert isinstance(adapter, LoraParameters) and [*adapter.sites] == ["first", "stack"]
    assert [*adapter.saved_tensors()] == [
        f"{folder}lora_{half}.weight" for folder in ("base_layer.", "") for half in ("A", "B")
    ]
    a, b = adapter.lora_a["first"].double(), adapter.lora_b["first"].double()
    x = torch.randn(5, 6)
    plain = in_float64(adapter, {"first": (b @ a).detach(), "stack": adapter.delta_weight("stack").detach().double()})
    want = plain(lorica.adapters(model)["layer"](x).double())
    torch.testing.assert_close(model(x).double(), want, rtol=1e-5, atol=1e-5)


def test_dropout_of_a_weight_drops_input_features() -> None:
    torch.manual_seed(0)
    adapter = randomised(LoRA(rank=2, dropout=0.5, target_parameters=("first",)).wrap(OwnWeights(), "own"))
    zeros = (adapter.delta_weight("first", 0.5) == 0).all(0)
    assert zeros.any() and not zeros.all()
    assert torch.equal(adapter.eval().adapted("first"), adapter.merged().first)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"targets": "own", "target_parameters": ["own.bias"]}, r"own\.bias is no matrix, and no stack of matrices"),
        ({"targets": "own", "target_parameters": ["own.third"]}, "'own.third' match no parameter of the 1 targets"),
        (
            {"targets": "own", "init": "pissa", "lora_bias": True},
            "pissa starts a layer; bias and lora_bias are those",
        ),
        ({"targets": "own", "slices": {"own": {"sizes": [1, 1], "train": [0]}}}, "only linear layers have slices"),
    ],
)
def test_what_cannot_be_done_is_refused(options: dict[str, Any], words: str) -> None:
    with pytest.raises(TargetError, match=words):
        lorica.adapt(Holder(), LoRA(**options))


def test_a_recurrent_layer_is_refused_since_it_reads_copies_of_its_weights() -> None:
    model = nn.Sequential(nn.LSTM(4, 4))
    with pytest.raises(TargetError, match="LSTM there cannot be wrapped"):
        lorica.adapt(model, LoRA(targets="0", target_parameters=("weight_ih_l0",)))


def test_keywords_and_names_go_together() -> None:
    model = lorica.adapt(Holder(), LoRA(targets=("all-linear", "own")))
    assert lorica.adapters(model).keys() == {"own", "layer"}
