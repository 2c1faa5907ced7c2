"""LoRA against its own equation in float64, and against loralib's conventions."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from transformers.models.gemma.modeling_gemma import GemmaTextScaledWordEmbedding
from transformers.pytorch_utils import Conv1D

import lorica
from lorica.errors import ConfigError
from lorica.methods.lora import LoRA, LoraEmbedding, LoraLinear, add_low_rank


def test_linear_follows_the_equation_in_float64() -> None:
    torch.manual_seed(0)
    adapter = LoraLinear(nn.Linear(12, 20), LoRA(), rank=4, scale=1.7)
    nn.init.normal_(adapter.lora_b)
    x = torch.randn(3, 5, 12, requires_grad=True)
    y = adapter(x)
    g = torch.randn_like(y)
    y.backward(g)

    w, b, a, bb, x64, g64 = (
        t.detach().double() for t in (adapter.base.weight, adapter.base.bias, adapter.lora_a, adapter.lora_b, x, g)
    )
    rows, grads = x64.reshape(-1, 12), g64.reshape(-1, 20)
    torch.testing.assert_close(y.double(), x64 @ w.T + b + 1.7 * x64 @ a.T @ bb.T, rtol=1e-5, atol=1e-5)
    assert x.grad is not None and adapter.lora_a.grad is not None and adapter.lora_b.grad is not None
    torch.testing.assert_close(x.grad.double(), g64 @ (w + 1.7 * bb @ a), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(adapter.lora_a.grad.double(), 1.7 * (grads @ bb).T @ rows, rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(adapter.lora_b.grad.double(), 1.7 * grads.T @ (rows @ a.T), rtol=1e-5, atol=1e-4)


def test_one_row_without_a_batch() -> None:
    torch.manual_seed(0)
    adapter = LoraLinear(nn.Linear(12, 20), LoRA(), rank=4, scale=1.7)
    nn.init.normal_(adapter.lora_b)
    x = torch.randn(3, 12)
    torch.testing.assert_close(adapter(x[0]), adapter(x)[0])


def test_merging_leaves_the_base_its_buffers() -> None:
    base = nn.Linear(4, 4)
    base.register_buffer("factor", torch.ones(1))
    LoraLinear(base, LoRA(), rank=2, scale=1.0).merged().double()
    assert base.factor.dtype is torch.float32


def test_conv1d_is_linear_with_its_weight_transposed() -> None:
    torch.manual_seed(0)
    base = Conv1D(20, 12)
    linear = nn.Linear(12, 20)
    linear.weight.data, linear.bias.data = base.weight.data.T.clone(), base.bias.data.clone()
    ours, reference = (LoraLinear(m, LoRA(), rank=4, scale=0.5) for m in (base, linear))
    for name in ("lora_a", "lora_b"):
        value = torch.randn_like(getattr(ours, name))
        getattr(ours, name).data, getattr(reference, name).data = value, value.clone()
    x = torch.randn(6, 12)
    torch.testing.assert_close(ours(x), reference(x))
    torch.testing.assert_close(ours.merged()(x), ours(x), rtol=1e-5, atol=1e-5)


def test_embedding_follows_the_equation_and_its_factor() -> None:
    torch.manual_seed(0)

    class Scaled(nn.Embedding):
        embed_scale = 3.0

        def forward(self, ids: torch.Tensor) -> torch.Tensor:
            return super().forward(ids) * self.embed_scale

    base = Scaled(30, 8)
    adapter = LoraEmbedding(base, LoRA(), rank=4, scale=0.5)
    assert not adapter.lora_a.any() and adapter.lora_b.std() > 0.5
    nn.init.normal_(adapter.lora_a)
    ids = torch.randint(0, 30, (2, 7))
    table = base.weight.double() + 0.5 * (adapter.lora_b.double() @ adapter.lora_a.double()).T
    torch.testing.assert_close(adapter(ids).double(), 3.0 * table[ids], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(adapter.merged()(ids), adapter(ids), rtol=1e-5, atol=1e-5)


def test_embedding_takes_gemmas_factor_without_waiting_for_a_tensor() -> None:
    with torch.device("meta"):
        base = GemmaTextScaledWordEmbedding(30, 8, 0, embed_scale=2.5)
    assert LoraEmbedding(base, LoRA(), rank=4, scale=0.5).output_scale == 2.5


def test_padding_ids_get_no_gradient_in_an_embedding() -> None:
    adapter = LoraEmbedding(nn.Embedding(30, 8, padding_idx=1), LoRA(), rank=4, scale=1.0)
    adapter(torch.tensor([[1, 1, 5]])).sum().backward()
    assert adapter.lora_a.grad is not None
    assert not adapter.lora_a.grad[:, 1].any() and adapter.lora_a.grad[:, 5].any()


def test_initialisation_is_what_loralib_and_peft_draw() -> None:
    torch.manual_seed(0)
    kaiming = LoraLinear(nn.Linear(400, 50), LoRA(), rank=64, scale=1.0)
    bound = 1 / math.sqrt(400)
    assert kaiming.lora_a.abs().max() <= bound and kaiming.lora_a.abs().max() > 0.99 * bound
    assert abs(kaiming.lora_a.std().item() - bound / math.sqrt(3)) < 0.02 * bound
    gaussian = LoraLinear(nn.Linear(400, 50), LoRA(init="gaussian"), rank=64, scale=1.0)
    assert abs(gaussian.lora_a.std().item() - 1 / 64) < 0.02 / 64
    assert not kaiming.lora_b.any() and not gaussian.lora_b.any()


def test_scale_is_alpha_over_rank_or_its_root() -> None:
    assert LoRA(rank=16, alpha=32).rank_and_scale("x") == (16, 2.0)
    assert LoRA(rank=16, alpha=32, rslora=True).rank_and_scale("x") == (16, 8.0)


def test_patterns_choose_rank_and_alpha_by_name() -> None:
    options = LoRA(rank=8, alpha=16, rank_pattern={"q_proj": 2, r"layers\.1\..*": 4}, alpha_pattern={"q_proj": 1.0})
    assert options.rank_and_scale("model.layers.0.q_proj") == (2, 0.5)
    assert options.rank_and_scale("model.layers.1.q_proj") == (2, 0.5)
    assert options.rank_and_scale("model.layers.1.v_proj") == (4, 4.0)
    assert options.rank_and_scale("model.layers.0.my_q_proj") == (8, 2.0)


def test_dropout_acts_on_the_adapters_input_in_training_only() -> None:
    torch.manual_seed(0)
    adapter = LoraLinear(nn.Linear(400, 20), LoRA(dropout=0.25), rank=4, scale=1.0)
    nn.init.normal_(adapter.lora_b)
    x = torch.randn(64, 400)
    adapter.eval()
    still = adapter(x)
    assert torch.equal(still, adapter(x))
    adapter.train()
    torch.manual_seed(1)
    got = adapter(x)
    torch.manual_seed(1)
    dropped = F.dropout(x, 0.25)
    assert abs((dropped == 0).float().mean().item() - 0.25) < 0.01
    want = adapter.base(x) + dropped @ adapter.lora_a.T @ adapter.lora_b.T
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)


def test_every_impossible_option_is_named_at_once() -> None:
    with pytest.raises(ConfigError, match=r"rank is -1.*alpha is nan.*dropout is 1\.5.*init is 'zero'"):
        LoRA(rank=-1, alpha=math.nan, dropout=1.5, init="zero")


def test_the_shared_line_equals_its_two_products() -> None:
    y, h, b = torch.randn(6, 20), torch.randn(6, 4), torch.randn(20, 4)
    torch.testing.assert_close(add_low_rank(y.clone(), h, b, 0.3), y + 0.3 * h @ b.T)


def test_gradients_reach_through_a_frozen_model(tiny_llama: object) -> None:
    model = lorica.adapt(tiny_llama(), LoRA(rank=2))  # type: ignore[operator]
    ids = torch.randint(0, 64, (1, 8))
    model(ids).logits.sum().backward()
    parameters = lorica.trainable_parameters(model)
    # B is zero at the start, so A's gradient is zero and B's is not.
    assert all(p.grad is not None and (p.grad.any() == ("lora_b" in name)) for name, p in parameters.items())
