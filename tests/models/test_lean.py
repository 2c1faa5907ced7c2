"""Layers that keep less for backward: equal to transformers' own, to float64, and smaller."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import AutoModelForCausalLM, GemmaConfig, LlamaConfig, Qwen3Config
from transformers.activations import NewGELUActivation
from transformers.models.gemma.modeling_gemma import GemmaMLP, GemmaRMSNorm
from transformers.models.gemma3.modeling_gemma3 import Gemma3RMSNorm
from transformers.models.llama.modeling_llama import LlamaMLP, LlamaRMSNorm
from transformers.models.qwen3.modeling_qwen3 import Qwen3RMSNorm

import lorica
from lorica.kernels import cpu_layers
from lorica.models.lean import GELU, GatedMLP, RMSNorm, use_lean_layers
from lorica.training.ledger import Ledger

SIZES = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
         "num_key_value_heads": 2, "vocab_size": 50, "head_dim": 8}  # fmt: skip


class Doubled(LlamaRMSNorm):
    """Looks like a normalisation and is another function."""

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return 2 * super().forward(hidden_states)


def lean(module: nn.Module) -> nn.Module:
    holder = nn.ModuleDict({"it": module})
    use_lean_layers(holder)
    return holder["it"]


@pytest.fixture(params=["compiled", "torch"])
def either_way(request: pytest.FixtureRequest) -> str:
    """Runs a test with the compiled kernels and without them."""
    if request.param == "compiled" and cpu_layers.compiled() is None:
        pytest.skip("there is no C compiler")
    if request.param == "torch":
        request.getfixturevalue("monkeypatch").setattr(cpu_layers, "compiled", lambda: None)
    return str(request.param)


@pytest.mark.parametrize("kind", [LlamaRMSNorm, Qwen3RMSNorm, GemmaRMSNorm, Gemma3RMSNorm])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_normalisation_equals_transformers(kind: type[nn.Module], dtype: torch.dtype, either_way: str) -> None:
    theirs = kind(16, eps=1e-3).to(dtype)
    nn.init.normal_(theirs.weight)
    x = torch.randn(2, 5, 16).to(dtype)
    ours = lean(theirs)
    assert type(ours) is RMSNorm and ours.weight is theirs.weight
    # The order of a sum may turn a rounding; with torch's own operations nothing does.
    rtol = 0 if either_way == "torch" else 1e-6 if dtype is torch.float32 else 2**-7
    torch.testing.assert_close(ours(x), theirs(x), rtol=rtol, atol=0)


@pytest.mark.usefixtures("either_way")
@pytest.mark.parametrize("plus_one", [False, True])
@pytest.mark.parametrize("trains_weight", [False, True])
def test_gradients_of_the_normalisation_equal_float64(trains_weight: bool, plus_one: bool) -> None:
    torch.manual_seed(0)
    x = torch.randn(3, 5, 16, requires_grad=True)
    ours = RMSNorm(nn.Parameter(torch.randn(16), requires_grad=trains_weight), 1e-3, plus_one)
    grad = torch.randn(3, 5, 16)
    ours(x).backward(grad)
    x64, w64 = x.detach().double().requires_grad_(), ours.weight.detach().double().requires_grad_()
    ((w64 + plus_one) * x64 / (x64.square().mean(-1, keepdim=True) + 1e-3).sqrt()).backward(grad.double())
    torch.testing.assert_close(x.grad.double(), x64.grad, rtol=1e-5, atol=1e-5)
    assert (ours.weight.grad is None) == (not trains_weight)
    if trains_weight:
        torch.testing.assert_close(ours.weight.grad.double(), w64.grad, rtol=1e-5, atol=1e-5)


@pytest.mark.usefixtures("either_way")
@pytest.mark.parametrize("kind", [LlamaMLP, GemmaMLP])
def test_the_gated_mlp_equals_the_model_it_comes_from(kind: type[nn.Module]) -> None:
    torch.manual_seed(0)
    config = LlamaConfig(**SIZES) if kind is LlamaMLP else GemmaConfig(**SIZES, hidden_act="gelu_pytorch_tanh")
    theirs = kind(config)
    ours = lean(copy.deepcopy(theirs))
    assert type(ours) is GatedMLP
    grad = torch.randn(2, 5, 32)
    x, y = (torch.linspace(-2, 2, 320).view(2, 5, 32).requires_grad_() for _ in range(2))
    out, want = ours(x), theirs(y)
    torch.testing.assert_close(out, want, rtol=1e-5, atol=1e-6)
    out.backward(grad)
    want.backward(grad)
    torch.testing.assert_close(x.grad, y.grad, rtol=1e-5, atol=1e-6)
    for mine, its in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, its.grad, rtol=1e-5, atol=1e-6)


def test_what_computes_something_else_stays() -> None:
    for module in (Doubled(8), nn.GroupNorm(2, 8), nn.Linear(8, 8), nn.Embedding(8, 8), nn.RMSNorm(8)):
        assert lean(module) is module


@pytest.mark.parametrize("config", [LlamaConfig(**SIZES), Qwen3Config(**SIZES)], ids=["llama", "qwen3"])
def test_an_adapted_model_has_the_same_loss_and_gradients(config: LlamaConfig) -> None:
    torch.manual_seed(0)
    plain = AutoModelForCausalLM.from_config(config)
    lorica.adapt(plain, lorica.LoRA(rank=4))
    for adapter in lorica.adapters(plain).values():
        nn.init.normal_(adapter.lora_b, std=0.1)
    ours = copy.deepcopy(plain)
    use_lean_layers(ours)
    assert list(ours.state_dict()) == list(plain.state_dict())
    ids = torch.randint(0, 50, (2, 9))
    for model in (plain, ours):
        model.train()(input_ids=ids, labels=ids).loss.backward()
    for (name, mine), (_, theirs) in zip(
        lorica.trainable_parameters(ours).items(), lorica.trainable_parameters(plain).items(), strict=True
    ):
        assert mine.grad is not None and theirs.grad is not None
        # Either is as far as 4e-6 from float64.
        assert (mine.grad - theirs.grad).abs().max() < 1e-5 * theirs.grad.abs().max(), name


@pytest.mark.parametrize("checkpointed", [False, True])
def test_an_mlp_keeps_gate_and_up_and_no_product_of_them(checkpointed: bool) -> None:
    """Of its inner size; under activation checkpointing nothing at all."""
    mlp = LlamaMLP(LlamaConfig(**SIZES)).requires_grad_(False)
    holder = lorica.adapt(nn.ModuleDict({"mlp": mlp}), lorica.LoRA(rank=2))
    kept = {}
    for name in ("plain", "lean"):
        if name == "lean":
            use_lean_layers(holder)
        x = torch.randn(7, 32, requires_grad=True)
        with Ledger() as ledger:
            out = checkpoint(holder["mlp"], x, use_reentrant=False) if checkpointed else holder["mlp"](x)
            kept[name] = sum(ledger.sizes[number] == 4 * 7 * 48 for number in ledger.alive())
        out.sum().backward()
    assert kept == ({"plain": 0, "lean": 0} if checkpointed else {"plain": 4, "lean": 2})


@pytest.mark.parametrize("checkpointed", [False, True])
@pytest.mark.parametrize("kind", ["rms", "layer", "gelu"])
def test_what_has_a_recipe_is_not_kept_by_the_adapters_that_read_it(kind: str, checkpointed: bool) -> None:
    torch.manual_seed(0)
    made = {"rms": LlamaRMSNorm(32), "layer": nn.LayerNorm(32), "gelu": NewGELUActivation()}[kind]
    holder = nn.ModuleDict({"made": made, "q": nn.Linear(32, 40), "k": nn.Linear(32, 40)})
    lorica.adapt(holder, lorica.LoRA(rank=2, targets=("q", "k")))
    for adapter in lorica.adapters(holder).values():
        nn.init.normal_(adapter.lora_b)
    source = torch.randn(7, 32)

    def run(x: torch.Tensor) -> torch.Tensor:
        read = holder["made"](x)
        out: torch.Tensor = holder["q"](read) * holder["k"](read)
        return out

    kept, gradients = [], []
    for is_lean in (False, True):
        if is_lean:
            use_lean_layers(holder)
        x = source.clone().requires_grad_()
        with Ledger() as ledger:
            out = checkpoint(run, x, use_reentrant=False) if checkpointed else run(x)
            kept.append(sum(ledger.sizes[number] == source.nbytes for number in ledger.alive()) - 1)
        wanted = [x, *lorica.trainable_parameters(holder).values()]
        gradients.append(torch.autograd.grad(out.square().sum(), wanted))
    # An adapter keeps what it reads; the lean one nothing beside x, which is counted off.
    assert kept[1] == 0 and (kept[0] == 0) == checkpointed
    for plain, lean_one in zip(*gradients, strict=True):
        assert (lean_one - plain).abs().max() <= 1e-5 * plain.abs().max()


class Swish(nn.Module):
    """x sigmoid(beta x): SiLU until beta is trained."""

    def __init__(self) -> None:
        super().__init__()
        self.beta = nn.Parameter(torch.ones(()))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * torch.sigmoid(self.beta * x)


def test_an_activation_that_can_be_trained_is_left_to_its_model() -> None:
    theirs = LlamaMLP(LlamaConfig(**SIZES))
    theirs.act_fn = Swish()
    assert lean(theirs) is theirs
    theirs.act_fn = nn.SiLU()
    assert type(lean(theirs)) is GatedMLP


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gpt2s_activation_is_torchs_own_and_keeps_its_input_alone(dtype: torch.dtype) -> None:
    theirs = NewGELUActivation()
    ours = lean(theirs)
    assert type(ours) is GELU and ours.approximate == "tanh"
    x = torch.linspace(-6, 6, 101, dtype=torch.float64).requires_grad_()
    narrow = x.detach().to(dtype).requires_grad_()
    kept: list[torch.Tensor] = []

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        y = ours(narrow)
    assert [t.data_ptr() for t in kept] == [narrow.data_ptr()]
    want = theirs(x)
    tolerance = 1e-5 if dtype is torch.float32 else 3e-2
    torch.testing.assert_close(y.double(), want, rtol=tolerance, atol=tolerance)
    (got,), (expected,) = torch.autograd.grad(y.sum(), narrow), torch.autograd.grad(want.sum(), x)
    torch.testing.assert_close(got.double(), expected, rtol=tolerance, atol=tolerance)
