"""What every method promises, over every method and every kind of module that it wraps."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from transformers import GptOssConfig, Qwen3MoeConfig
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssExperts
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts
from transformers.pytorch_utils import Conv1D

import lorica
from lorica.errors import NotMergeableError
from lorica.methods.adalora import AdaLoRA
from lorica.methods.bottleneck import Bottleneck
from lorica.methods.dora import DoRA
from lorica.methods.full import FullFineTuning
from lorica.methods.hydra import HydraLoRA
from lorica.methods.ia3 import IA3
from lorica.methods.lora import LoRA
from lorica.methods.method import MethodOptions, method_options
from lorica.methods.vera import VeRA

METHODS: dict[str, MethodOptions] = {
    "adalora": AdaLoRA(rank=4, target_rank=2, targets="layer"),
    "bottleneck": Bottleneck(size=4, targets="layer"),
    "dora": DoRA(rank=4, alpha=8, targets="layer"),
    "full": FullFineTuning(targets="layer"),
    "hydra": HydraLoRA(rank=4, alpha=8, num_heads=3, targets="layer"),
    "hydra uniform": HydraLoRA(rank=4, alpha=8, num_heads=3, gate="uniform", targets="layer"),
    "ia3 of the output": IA3(targets="layer"),
    "ia3 of the input": IA3(targets="layer", feedforward="layer"),
    "lora": LoRA(rank=4, alpha=8, targets="layer"),
    "lora with biases": LoRA(rank=4, alpha=8, bias="lora_only", lora_bias=True, targets="layer"),
    "lora pissa": LoRA(rank=4, alpha=8, init="pissa", targets="layer"),
    "lora rslora gaussian": LoRA(rank=4, alpha=8, rslora=True, init="gaussian", targets="layer"),
    "vera": VeRA(rank=16, targets="layer"),
}


ROUTES = torch.tensor([[0, 2], [2, 1], [1, 0], [2, 0]]), torch.tensor([[0.7, 0.3], [0.5, 0.5], [0.9, 0.1], [0.6, 0.4]])
# How a module is called on one tensor, where that is not all that it takes.
CALLS: dict[type[nn.Module], Callable[[nn.Module, torch.Tensor], torch.Tensor]] = {
    nn.MultiheadAttention: lambda layer, x: layer(x, x[..., : layer.kdim], x[..., : layer.vdim])[0],
    Qwen3MoeExperts: lambda layer, x: layer(x, ROUTES[0], ROUTES[1].to(x.dtype)),
    GptOssExperts: lambda layer, x: layer(x, ROUTES[0], ROUTES[1].to(x.dtype)),
}


class Holder(nn.Module):
    """One module called `layer`."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer
        self.call = CALLS.get(type(layer), lambda layer, x: layer(x))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.call(self.layer, x)


def experts(kind: type[nn.Module], config: Any) -> nn.Module:
    # The implementation that transformers takes where it can, and that ours equals bit for bit.
    config._experts_implementation = "grouped_mm"
    layer = kind(config)
    for parameter in layer.parameters():
        nn.init.normal_(parameter, std=0.3)
    return layer


KINDS: dict[str, tuple[Callable[[], nn.Module], Callable[[], torch.Tensor]]] = {
    "Linear": (lambda: nn.Linear(12, 20), lambda: torch.randn(3, 5, 12)),
    "Linear without bias, 2-D input": (lambda: nn.Linear(12, 20, bias=False), lambda: torch.randn(7, 12)),
    "Conv1D": (lambda: Conv1D(20, 12), lambda: torch.randn(3, 5, 12)),
    "LayerNorm": (lambda: nn.LayerNorm(12), lambda: torch.randn(3, 5, 12)),
    "Conv1d": (lambda: nn.Conv1d(6, 8, 3, stride=2, padding_mode="circular", padding=2), lambda: torch.randn(2, 6, 9)),
    "Conv2d": (lambda: nn.Conv2d(6, 8, (3, 2), dilation=2, bias=False), lambda: torch.randn(2, 6, 9, 7)),
    "Conv3d": (lambda: nn.Conv3d(4, 8, 2, padding="same"), lambda: torch.randn(4, 4, 3, 5)),
    "Embedding": (lambda: nn.Embedding(30, 20, padding_idx=1), lambda: torch.randint(0, 30, (3, 5))),
    "MultiheadAttention": (lambda: nn.MultiheadAttention(12, 2, batch_first=True), lambda: torch.randn(3, 5, 12)),
    "MultiheadAttention of sizes apart": (
        lambda: nn.MultiheadAttention(12, 2, kdim=8, vdim=6),
        lambda: torch.randn(5, 3, 12),
    ),
    "experts": (
        lambda: experts(Qwen3MoeExperts, Qwen3MoeConfig(hidden_size=16, moe_intermediate_size=8, num_experts=3)),
        lambda: torch.randn(4, 16),
    ),
    "experts with biases": (
        lambda: experts(GptOssExperts, GptOssConfig(hidden_size=16, intermediate_size=8, num_local_experts=3)),
        lambda: torch.randn(4, 16),
    ),
}


def weights_hash(module: nn.Module) -> str:
    digest = hashlib.sha256()
    for name, tensor in sorted(module.state_dict().items()):
        digest.update(name.encode() + tensor.numpy().tobytes())
    return digest.hexdigest()


def randomise(model: nn.Module, scale: float = 0.3) -> None:
    with torch.no_grad():
        for parameter in lorica.trainable_parameters(model).values():
            parameter.normal_(std=scale)


# Every method with every kind that it takes.
PAIRS = [
    (method, kind)
    for method in METHODS
    for kind in KINDS
    if METHODS[method].takes(KINDS[kind][0]())
    # Starts from a weight are those of a layer, and so are biases.
    and not (method in ("lora pissa", "lora with biases") and kind.startswith(("MultiheadAttention", "experts")))
    and not (method == "lora with biases" and kind == "Embedding")
]


@pytest.fixture(params=PAIRS, ids=" on ".join)
def pair(request: pytest.FixtureRequest) -> tuple[str, str]:
    return request.param


@pytest.fixture
def options(pair: tuple[str, str]) -> MethodOptions:
    return METHODS[pair[0]]


@pytest.fixture
def case(pair: tuple[str, str]) -> tuple[Holder, torch.Tensor]:
    torch.manual_seed(0)
    make, draw = KINDS[pair[1]]
    return Holder(make()), draw()


def merged_or_skip(model: nn.Module) -> nn.Module:
    try:
        return lorica.merge(model)
    except NotMergeableError as error:
        # A method that is no change of weights says so, with the reason.
        assert len(str(error)) > 20
        pytest.skip(str(error))


def test_the_start_equals_the_base_exactly(options: MethodOptions, case: Any) -> None:
    model, x = case
    before = model(x)
    assert torch.equal(lorica.adapt(model, options)(x), before)


def test_only_the_adapter_is_trained_and_the_base_never_changes(options: MethodOptions, case: Any) -> None:
    model, x = case
    base = model.layer
    before = weights_hash(base)
    lorica.adapt(model, options)
    parameters = lorica.trainable_parameters(model)
    assert parameters and all(name.startswith("layer.") and ".base." not in name for name in parameters)
    assert lorica.adapters(model)["layer"].num_parameters() == sum(p.numel() for p in parameters.values())
    optimizer = torch.optim.AdamW(parameters.values(), lr=0.1)
    start = {name: p.detach().clone() for name, p in parameters.items()}
    for _ in range(3):
        model(x).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    assert all(not torch.equal(p, start[name]) for name, p in parameters.items())
    assert weights_hash(base) == before


def test_merged_equals_adapted_and_is_plain(options: MethodOptions, case: Any) -> None:
    model, x = case
    kind = type(model.layer)
    randomise(lorica.adapt(model, options))
    plain = merged_or_skip(model)
    torch.testing.assert_close(plain(x), model(x), atol=1e-5, rtol=1e-5)
    assert type(plain.layer) is kind and not lorica.adapters(plain)
    assert lorica.adapters(model), "the original must stay adapted"


def test_detach_gives_the_base_back_bit_for_bit(options: MethodOptions, case: Any) -> None:
    model, x = case
    # Where nothing has a gradient torch may take other kernels, and after detaching nothing has.
    model.requires_grad_(False)
    base, before, out = model.layer, weights_hash(model), model(x)
    randomise(lorica.adapt(model, options))
    assert not torch.equal(model(x), out)
    assert lorica.detach(model).layer is base
    assert weights_hash(model) == before and torch.equal(model(x), out)


def test_masters_are_float32_and_the_product_runs_in_the_bases_dtype(options: MethodOptions, case: Any) -> None:
    model, x = case
    model.to(torch.bfloat16)
    x = x.to(torch.bfloat16) if x.is_floating_point() else x
    randomise(lorica.adapt(model, options))
    assert all(p.dtype is torch.float32 for p in lorica.trainable_parameters(model).values())
    out = model(x)
    assert out.dtype is torch.bfloat16
    out.float().square().sum().backward()
    assert all(
        p.grad is not None and p.grad.dtype is torch.float32 for p in lorica.trainable_parameters(model).values()
    )
    merged = merged_or_skip(model)(x).float()
    torch.testing.assert_close(merged, out.float(), atol=0.2, rtol=0.05)


def test_the_wrapper_shows_the_bases_weight(options: MethodOptions, case: Any) -> None:
    model, _ = case
    weight = getattr(model.layer, "weight", None)
    assert getattr(lorica.adapt(model, options).layer, "weight", None) is weight


def test_saved_tensors_are_the_adapters_own_and_have_the_shapes_that_are_foretold(
    options: MethodOptions, case: Any
) -> None:
    model, _ = case
    foretold = options.shapes(model.layer, "layer")
    saved = lorica.adapt(model, options).layer.saved_tensors()
    assert {name: tuple(tensor.shape) for name, tensor in saved.items()} == foretold
    own = {tensor.data_ptr() for tensor in (*model.layer.parameters(), *model.layer.buffers())}
    if not {tensor.data_ptr() for tensor in saved.values()} <= own:
        # What is computed is read back as a plainer adapter, and that one's are its own.
        plainer = type(options).from_peft(options.to_peft({"layer": model.layer}, model), ["layer"])
        assert plainer.shapes(model.layer.base, "layer") == foretold
        again = lorica.adapt(Holder(model.layer.base), plainer).layer
        assert {t.data_ptr() for t in again.saved_tensors().values()} <= {p.data_ptr() for p in again.parameters()}


def test_the_method_is_found_by_its_name(options: MethodOptions) -> None:
    assert method_options(options.method_name()) is type(options)


@pytest.mark.parametrize("name", ["lora", "dora", "vera", "adalora", "hydra"])
def test_no_rows_are_no_error(name: str) -> None:
    """As an expert without tokens is called."""
    model = lorica.adapt(nn.Sequential(nn.Linear(8, 6)), method_options(name)(targets=("0",)))
    assert [model(torch.zeros(shape)).shape for shape in ((0, 8), (2, 0, 8))] == [(0, 6), (2, 0, 6)]
