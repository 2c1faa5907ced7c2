"""The kinds of layers and options that PEFT tests its methods on, as small models of our own: exchanged both ways."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, GptOssConfig, GraniteMoeConfig, MixtralConfig, Qwen3MoeConfig
from transformers.pytorch_utils import Conv1D

import lorica
from lorica.errors import NotMergeableError

from .small_models import SMALL, check_exchange, check_peft_reads_ours
from .small_models import outputs as logits

peft = pytest.importorskip("peft", reason="needs peft, the oracle")


class Chain(nn.Module):
    """Modules one after another; `inputs` are what they are run on."""

    def __init__(self, inputs: Tensor, **parts: nn.Module) -> None:
        super().__init__()
        self.inputs = inputs
        self.names = tuple(parts)
        for name, part in parts.items():
            self.add_module(name, part)

    def forward(self, x: Tensor) -> Tensor:
        for name in self.names:
            x = getattr(self, name)(x)
        return x


class SelfAttention(nn.Module):
    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(12, 2, **options)

    def forward(self, x: Tensor) -> Tensor:
        return self.attention(x, x, x, need_weights=False)[0]


class OwnWeight(nn.Module):
    """A linear layer that is none of torch's: [in, out], as many write it."""

    def __init__(self, in_size: int, out_size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(in_size, out_size))

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight


def built(make: Callable[[], Chain]) -> Chain:
    torch.manual_seed(0)
    return make().eval()


def run(model: Any) -> Tensor:
    chain = next(module for module in model.modules() if isinstance(module, Chain))
    with torch.no_grad():
        return model(chain.inputs)


def drawn(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(5))


def mlp(bias: bool = True) -> Chain:
    first, second = nn.Linear(10, 20, bias), nn.Linear(20, 2, bias)
    return Chain(drawn(9, 10), lin0=first, act=nn.ReLU(), lin1=second, end=nn.LogSoftmax(-1))


def embedding(**options: Any) -> Chain:
    ids, table = torch.arange(90).view(9, 10), nn.Embedding(100, 5, **options)
    return Chain(ids, emb=table, conv1d=Conv1D(3, 5), flat=nn.Flatten(), lin0=nn.Linear(30, 2))


def convolution(kind: type[nn.Module], *sizes: Any, image: tuple[int, ...], **options: Any) -> Chain:
    x, layer = drawn(4, *image), kind(*sizes, **options)
    return Chain(x, conv=layer, act=nn.ReLU(), flat=nn.Flatten(), lin0=nn.Linear(layer(x)[0].numel(), 2))


def attention(**options: Any) -> Chain:
    return Chain(drawn(9, 4, 12), mha=SelfAttention(**options), lin0=nn.Linear(12, 2))


def encoder() -> Chain:
    layer = nn.TransformerEncoderLayer(12, 2, 16, batch_first=True)
    return Chain(drawn(3, 5, 12), encoder=nn.TransformerEncoder(layer, 2), lin0=nn.Linear(12, 2))


def own_weights() -> Chain:
    return Chain(drawn(9, 10), lin0=OwnWeight(10, 20), act=nn.ReLU(), lin1=OwnWeight(20, 2))


CONV1D = partial(convolution, nn.Conv1d, 2, 4, 2, image=(2, 10))
CONV2D = partial(convolution, nn.Conv2d, 5, 10, 3, image=(5, 4, 4))
CONV3D = partial(convolution, nn.Conv3d, 2, 6, 3, image=(2, 3, 3, 4))
POINT2D = partial(convolution, nn.Conv2d, 2, 10, 1, image=(2, 3, 3))
POINT3D = partial(convolution, nn.Conv3d, 2, 10, 1, image=(2, 3, 3, 2))
GROUPS = partial(convolution, nn.Conv2d, 16, 16, 3, image=(16, 3, 3), groups=8)
GROUPS2 = partial(convolution, nn.Conv2d, 16, 32, 3, image=(16, 4, 4), padding=1, groups=2)
STRIDED = partial(convolution, nn.Conv1d, 4, 8, 3, image=(4, 9), stride=2, padding=1, bias=False)

LORA: dict[str, tuple[Callable[[], Chain], dict[str, Any]]] = {
    "linear, an expression": (mlp, {"target_modules": "lin0"}),
    "linear, both": (mlp, {"target_modules": ["lin0", "lin1"], "lora_alpha": 4, "lora_dropout": 0.1}),
    "linear without bias": (partial(mlp, bias=False), {"target_modules": ["lin1"], "use_rslora": True}),
    "linear, patterns": (
        mlp, {"target_modules": ["lin0", "lin1"], "rank_pattern": {"lin1": 2}, "alpha_pattern": {"lin0": 5}},
    ),
    "linear, module to save": (mlp, {"target_modules": ["lin0"], "modules_to_save": ["lin1"]}),
    "linear, B has a bias": (mlp, {"target_modules": ["lin0", "lin1"], "lora_bias": True, "lora_alpha": 32}),
    "linear, its bias": (mlp, {"target_modules": ["lin0"], "bias": "lora_only"}),
    "linear, all biases": (mlp, {"target_modules": ["lin0"], "bias": "all", "lora_bias": True}),
    "Conv2d, its bias": (CONV2D, {"target_modules": ["conv"], "bias": "lora_only"}),
    "Conv1D, its bias": (embedding, {"target_modules": ["conv1d"], "bias": "lora_only"}),
    "Conv1D": (embedding, {"target_modules": ["conv1d"]}),
    "embedding": (embedding, {"target_modules": ["emb"]}),
    "embedding, sparse gradients": (partial(embedding, sparse=True), {"target_modules": ["emb"]}),
    "embedding with padding": (partial(embedding, padding_idx=3), {"target_modules": ["emb", "conv1d"]}),
    "Conv1d": (CONV1D, {"target_modules": ["conv"]}),
    "Conv1d with stride": (STRIDED, {"target_modules": ["conv"]}),
    "Conv2d": (CONV2D, {"target_modules": ["conv", "lin0"], "use_rslora": True}),
    "Conv2d, B has a bias": (CONV2D, {"target_modules": ["conv"], "lora_bias": True, "lora_alpha": 32}),
    "Conv2d 1 x 1": (POINT2D, {"target_modules": ["conv"]}),
    "Conv2d with groups": (GROUPS, {"target_modules": ["conv"]}),
    "Conv2d with two groups": (GROUPS2, {"target_modules": ["conv"]}),
    "Conv3d": (CONV3D, {"target_modules": ["conv", "lin0"]}),
    "Conv3d, B has a bias": (CONV3D, {"target_modules": ["conv"], "lora_bias": True, "lora_alpha": 32}),
    "Conv3d 1 x 1": (POINT3D, {"target_modules": ["conv"]}),
    "attention": (attention, {"target_modules": ["attention"], "lora_alpha": 16}),
    "attention and linear, patterns": (
        attention, {"target_modules": ["attention", "lin0"], "rank_pattern": {"attention": 3}},
    ),
    "attention without bias": (partial(attention, bias=False, add_bias_kv=True), {"target_modules": ["attention"]}),
    "an own weight": (own_weights, {"target_parameters": ["lin0.weight"]}),
    "two own weights, patterns": (
        own_weights, {"target_parameters": ["lin0.weight", "lin1.weight"], "rank_pattern": {"lin1.weight": 2}},
    ),
    "a layer and another's weight": (mlp, {"target_modules": ["lin0"], "target_parameters": ["lin1.weight"]}),
}  # fmt: skip

DORA = (
    "linear, both", "linear without bias", "linear, patterns", "Conv1D", "embedding", "Conv1d", "Conv1d with stride",
    "Conv2d", "Conv2d 1 x 1", "Conv2d with groups", "Conv2d with two groups", "Conv3d", "Conv3d 1 x 1",
)  # fmt: skip


def check(make: Callable[[], Chain], config: Any, folder: Path, scale: float = 0.2) -> None:
    """Both ways, and merged and detached."""
    model = check_exchange(partial(built, make), config, folder, scale, run)
    want = run(model)
    try:
        torch.testing.assert_close(run(lorica.merge(model)), want, atol=1e-5, rtol=1e-5)
    except NotMergeableError as error:
        assert "groups" in str(error) or "none to add it to" in str(error)
    assert torch.equal(run(lorica.detach(model)), run(built(make)))


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("case", LORA)
def test_lora(case: str, tmp_path: Path) -> None:
    make, fields = LORA[case]
    check(make, peft.LoraConfig(r=8, **{"target_modules": [], **fields}), tmp_path)


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("case", DORA)
def test_dora(case: str, tmp_path: Path) -> None:
    make, fields = LORA[case]
    check(make, peft.LoraConfig(r=8, use_dora=True, **fields), tmp_path)


IA3: dict[str, tuple[Callable[[], Chain], list[str], list[str]]] = {
    "linear": (mlp, ["lin0", "lin1"], []),
    "linear, inputs": (mlp, ["lin0", "lin1"], ["lin0", "lin1"]),
    "Conv1D": (embedding, ["conv1d", "lin0"], ["conv1d"]),
    "Conv2d": (CONV2D, ["conv", "lin0"], []),
    "Conv2d, inputs": (CONV2D, ["conv", "lin0"], ["conv"]),
    "Conv2d with groups, inputs": (GROUPS2, ["conv"], ["conv"]),
    "Conv3d": (CONV3D, ["conv"], []),
    "Conv3d, inputs": (CONV3D, ["conv"], ["conv"]),
}


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("case", IA3)
def test_ia3(case: str, tmp_path: Path) -> None:
    make, targets, feedforward = IA3[case]
    check(make, peft.IA3Config(target_modules=targets, feedforward_modules=feedforward), tmp_path, scale=0.5)


SMALL_MOE = {**SMALL, "intermediate_size": 24, "num_key_value_heads": 2, "num_experts_per_tok": 2}
MOE = {
    "mixtral": MixtralConfig(**SMALL_MOE, num_local_experts=4),
    "qwen3-moe": Qwen3MoeConfig(**SMALL_MOE, num_experts=4, moe_intermediate_size=24, head_dim=8),
    "gpt-oss": GptOssConfig(**SMALL_MOE, num_local_experts=4, head_dim=8),
    "granite-moe": GraniteMoeConfig(**SMALL_MOE, num_local_experts=4),
}


def moe(name: str) -> Any:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(MOE[name], dtype=torch.float32).eval()
    # Small as they are, their experts would hardly matter with the usual start.
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.2)
    return model


@pytest.mark.parametrize("name", MOE)
def test_experts(name: str, tmp_path: Path) -> None:
    # PEFT passes over the name that a model has not.
    down = ["1.mlp.experts.down_proj", "1.block_sparse_moe.experts.down_proj"]
    fields = {
        "target_modules": ["q_proj"],
        "target_parameters": ["experts.gate_up_proj", *down],
        "rank_pattern": {"experts.down_proj": 2},
        "alpha_pattern": {"experts.gate_up_proj": 3},
    }
    model = check_exchange(partial(moe, name), peft.LoraConfig(r=4, **fields), tmp_path)
    want = logits(model)
    torch.testing.assert_close(logits(lorica.merge(model)), want, atol=1e-5, rtol=1e-5)
    assert torch.equal(logits(lorica.detach(model)), logits(moe(name)))


def test_peft_reads_all_experts_and_all_linear_layers(tmp_path: Path) -> None:
    options = lorica.LoRA(rank=4, targets=("all-linear", "experts"), rslora=True)
    check_peft_reads_ours(partial(moe, "qwen3-moe"), options, tmp_path / "adapter")


@pytest.mark.parametrize("name", ["mixtral", "qwen3-moe"])
def test_all_linear_is_layers_alone_and_peft_s_with_experts_and_routers_is_read(name: str, tmp_path: Path) -> None:
    names = lorica.adapters(lorica.adapt(moe(name), lorica.LoRA()))
    assert all(tail.endswith(("q_proj", "k_proj", "v_proj", "o_proj")) for tail in names) and len(names) == 8
    model = check_exchange(partial(moe, name), peft.LoraConfig(r=4, target_modules="all-linear"), tmp_path, scale=0.1)
    assert {"model.layers.0.mlp.experts", "model.layers.1.mlp.gate"} <= lorica.adapters(model).keys()


def test_padded_batches_take_the_fast_path_of_an_encoder() -> None:
    """In evaluation nn.TransformerEncoder computes from the weights, with nested tensors where samples are padded.

    PEFT shows it the base's weights there: its adapter does nothing.
    """
    options = lorica.LoRA(rank=4, alpha=8, targets="self_attn")
    model = lorica.adapt(built(encoder), options)
    for parameter in lorica.trainable_parameters(model).values():
        nn.init.normal_(parameter, std=0.2)
    padding = torch.tensor([[False] * 5, [False] * 3 + [True] * 2, [False] * 4 + [True]])
    x = model.inputs
    fast = model.encoder.eval()
    with torch.no_grad():
        got = fast(x, src_key_padding_mask=padding)
        merged = lorica.merge(model).encoder(x, src_key_padding_mask=padding)
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with torch.no_grad():
            slow = fast(x, src_key_padding_mask=padding)
    finally:
        torch.backends.mha.set_fastpath_enabled(True)
    real = ~padding
    torch.testing.assert_close(got[real], slow[real], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(got[real], merged[real], atol=1e-5, rtol=1e-5)
    # With gradients the layers take the other path, and the adapters get theirs.
    fast(x).sum().backward()
    assert all(p.grad is not None for p in lorica.trainable_parameters(model).values())
