"""LoRA against its own equation in float64, and against loralib's conventions."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from transformers.models.gemma.modeling_gemma import GemmaTextScaledWordEmbedding
from transformers.pytorch_utils import Conv1D

import lorica
from lorica.errors import ConfigError, NotMergeableError, TargetError
from lorica.kernels.low_rank import add_low_rank
from lorica.methods.lora import LoRA
from lorica.methods.lora_conv import LoraConv
from lorica.methods.lora_kinds import LoraEmbedding, LoraLinear


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


def float64(*tensors: torch.Tensor) -> list[torch.Tensor]:
    return [tensor.detach().double() for tensor in tensors]


@pytest.mark.parametrize(
    "base",
    [
        nn.Conv1d(6, 8, 3, stride=2, padding=1, dilation=2),
        nn.Conv1d(6, 8, 4, padding="same", padding_mode="replicate"),
        nn.Conv2d(6, 8, (3, 1), stride=(1, 2), padding=(2, 0), padding_mode="reflect", bias=False),
        nn.Conv2d(6, 8, 3, padding="same", padding_mode="circular"),
        nn.Conv3d(6, 8, 2, dilation=(1, 2, 1)),
    ],
    ids=str,
)
def test_a_convolution_is_its_kernel_plus_b_times_a(base: nn.Conv1d | nn.Conv2d | nn.Conv3d) -> None:
    torch.manual_seed(0)
    adapter = LoraConv(base, LoRA(), rank=4, scale=0.7)
    for parameter in (adapter.lora_a, adapter.lora_b):
        nn.init.normal_(parameter)
    x = torch.randn(2, 6, *([7] * len(base.kernel_size)))
    # The definition, tap by tap: dW[o, i, k] = s sum_r B[o, r] A[r, i, k].
    w, a, b, x64 = float64(base.weight, adapter.lora_a, adapter.lora_b, x)
    reference = copy.deepcopy(base).double()
    reference.weight.data = w + 0.7 * torch.einsum("or,ri...->oi...", b.flatten(1), a)
    torch.testing.assert_close(adapter(x).double(), reference(x64), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(adapter.merged().weight.double(), reference.weight, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(adapter(x[0]), adapter(x)[0], rtol=1e-5, atol=1e-5)


def test_a_grouped_convolution_reads_all_channels_and_cannot_be_merged() -> None:
    torch.manual_seed(0)
    base = nn.Conv1d(6, 8, 3, groups=2)
    adapter = LoRA(rank=4, alpha=4, targets="x").wrap(base, "x")
    assert isinstance(adapter, LoraConv)
    assert adapter.lora_a.shape == (4, 6, 3) and adapter.lora_b.shape == (8, 2, 1)
    x = torch.randn(2, 6, 9)
    assert torch.equal(adapter(x), base(x))
    nn.init.normal_(adapter.lora_b)
    h = F.conv1d(x, adapter.lora_a)
    halves = [adapter.lora_b[4 * g : 4 * g + 4, :, 0] @ h[:, 2 * g : 2 * g + 2] for g in range(2)]
    torch.testing.assert_close(adapter(x), base(x) + torch.cat(halves, 1), rtol=1e-5, atol=1e-5)
    with pytest.raises(NotMergeableError, match="2 groups"):
        adapter.merged()
    with pytest.raises(TargetError, match="2 groups, which must divide the rank; it is 3"):
        LoRA(rank=3).wrap(base, "x")
    with pytest.raises(TargetError, match="init pissa takes no convolution of 2 groups"):
        LoRA(rank=2, init="pissa").wrap(base, "x")


def test_dropout_acts_on_a_convolutions_branch_alone() -> None:
    torch.manual_seed(0)
    adapter = LoraConv(nn.Conv1d(6, 8, 3, padding=1), LoRA(dropout=0.5), rank=4, scale=1.0)
    nn.init.normal_(adapter.lora_b)
    x = torch.randn(2, 6, 9)
    torch.manual_seed(1)
    got = adapter.train()(x)
    torch.manual_seed(1)
    branch = F.conv1d(F.conv1d(F.dropout(x, 0.5), adapter.lora_a, padding=1), adapter.lora_b)
    torch.testing.assert_close(got, adapter.base(x) + branch)


def evaluating(loralibs: nn.Module) -> nn.Module:
    """Its `eval` returns nothing. It merges there, which makes it an oracle of merging."""
    loralibs.eval()
    return loralibs


def test_loralibs_convolution_is_ours_of_a_higher_rank() -> None:
    """loralib reshapes B [out k, r k] A [r k, in k] to [out, in, k, k]: row o k + j of the product holds the j-th part
    of output o's taps, so the same kernel has rank r k^2 as A' = I_k (x) A and B' = B reshaped.
    """
    loralib = pytest.importorskip("loralib", reason="needs loralib, the oracle")
    torch.manual_seed(0)
    k, r = 3, 2
    theirs = loralib.Conv2d(6, 8, k, r=r, lora_alpha=4, stride=2, padding=1)
    nn.init.normal_(theirs.lora_B)
    adapter = LoraConv(copy.deepcopy(theirs.conv), LoRA(), rank=r * k * k, scale=4 / r)
    adapter.lora_a.data = torch.kron(torch.eye(k), theirs.lora_A.detach()).view_as(adapter.lora_a)
    adapter.lora_b.data = theirs.lora_B.detach().view_as(adapter.lora_b)
    x = torch.randn(2, 6, 9, 9)
    torch.testing.assert_close(adapter(x), theirs(x), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(adapter.merged()(x), evaluating(theirs)(x), rtol=1e-5, atol=1e-5)


QV = {"sizes": (1, 1, 1), "train": (0, 2)}


@pytest.mark.parametrize("transposed", [False, True], ids=["Linear", "Conv1D"])
def test_slices_are_loralibs_merged_linear(transposed: bool) -> None:
    loralib = pytest.importorskip("loralib", reason="needs loralib, the oracle")
    torch.manual_seed(0)
    theirs = loralib.MergedLinear(12, 24, r=4, lora_alpha=8, enable_lora=[True, False, True], fan_in_fan_out=transposed)
    base = Conv1D(24, 12) if transposed else nn.Linear(12, 24)
    base.weight.data, base.bias.data = theirs.weight.detach().clone(), theirs.bias.detach().clone()
    adapter = LoRA(rank=4, alpha=8, slices={"c_attn": QV}).wrap(base, "h.0.c_attn")
    assert isinstance(adapter, LoraLinear)
    assert adapter.lora_a.shape == theirs.lora_A.shape and adapter.lora_b.shape == theirs.lora_B.shape
    nn.init.normal_(theirs.lora_B)
    adapter.lora_a.data, adapter.lora_b.data = theirs.lora_A.detach().clone(), theirs.lora_B.detach().clone()
    x, g = torch.randn(3, 5, 12), torch.randn(3, 5, 24)
    ours, want = adapter(x), theirs(x)
    torch.testing.assert_close(ours, want, rtol=1e-5, atol=1e-5)
    ours.backward(g)
    want.backward(g)
    torch.testing.assert_close(adapter.lora_a.grad, theirs.lora_A.grad, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(adapter.lora_b.grad, theirs.lora_B.grad, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(adapter.merged()(x), evaluating(theirs)(x), rtol=1e-5, atol=1e-5)


def test_slices_may_be_of_unequal_sizes_and_the_others_stay_the_bases() -> None:
    torch.manual_seed(0)
    base = nn.Linear(12, 32)
    # 4 query heads, 2 of keys and 2 of values, each of 4.
    options = LoRA(rank=4, alpha=4, slices={"qkv": {"sizes": [4, 2, 2], "train": [2, 0]}})
    adapter = options.wrap(base, "qkv")
    assert isinstance(adapter, LoraLinear) and adapter.num_parameters() == 8 * 12 + 24 * 4
    x = torch.randn(5, 12)
    assert torch.equal(adapter(x), base(x))
    nn.init.normal_(adapter.lora_b)
    a, b = adapter.lora_a, adapter.lora_b
    y, out = base(x), adapter(x)
    torch.testing.assert_close(out[:, :16], y[:, :16] + x @ a[:4].T @ b[:16].T, rtol=1e-5, atol=1e-5)
    assert torch.equal(out[:, 16:24], y[:, 16:24])
    torch.testing.assert_close(out[:, 24:], y[:, 24:] + x @ a[4:].T @ b[16:].T, rtol=1e-5, atol=1e-5)
    merged = adapter.merged()
    torch.testing.assert_close(merged(x), out, rtol=1e-5, atol=1e-5)
    assert torch.equal(merged.weight[16:24], base.weight[16:24])


def test_each_slice_starts_as_one_of_its_rank_does() -> None:
    torch.manual_seed(0)
    options = LoRA(rank=64, init="gaussian", slices={"qkv": {"sizes": [1, 1, 1], "train": [0, 1, 2]}})
    lora_a = options.wrap(nn.Linear(400, 30), "qkv").lora_a
    assert isinstance(lora_a, torch.Tensor) and abs(lora_a.std().item() - 1 / 64) < 0.02 / 64


@pytest.mark.parametrize(
    "wrong",
    [
        {"sizes": [1, 1]},
        {"sizes": [1, 0], "train": [0]},
        {"sizes": [1, 1], "train": [2]},
        {"sizes": [1, 1], "train": [0, 0]},
        {"sizes": [1, 1], "train": []},
        {"sizes": [1, True], "train": [0]},
        {"sizes": 3, "train": [0]},
        [1, 1],
    ],
    ids=str,
)
def test_slices_that_cannot_be_meant_are_refused(wrong: object) -> None:
    with pytest.raises(ConfigError, match=r"slices\.qkv.*must be as \{sizes: \[1, 1, 1\], train: \[0, 2\]\}"):
        LoRA(slices={"qkv": wrong})


def test_slices_that_fit_no_module_are_refused(tiny_llama: Callable[[], nn.Module]) -> None:
    with pytest.raises(TargetError, match="'qkv' match none of the 14 targets"):
        lorica.adapt(tiny_llama(), LoRA(slices={"qkv": QV}))
    with pytest.raises(TargetError, match=r"the 32 outputs of .*q_proj cannot be shared out as \(1, 1, 1\)"):
        lorica.adapt(tiny_llama(), LoRA(slices={"q_proj": QV}))
    with pytest.raises(TargetError, match=r"embed_tokens is a Embedding; only linear layers have slices"):
        lorica.adapt(tiny_llama(), LoRA(targets="embed_tokens", slices={"embed_tokens": QV}))
    with pytest.raises(ConfigError, match=r"init olora starts from a whole weight.*svd_niter is 4, but init olora"):
        LoRA(init="olora", svd_niter=4, slices={"q_proj": QV})


@pytest.mark.parametrize("transposed", [False, True], ids=["Linear", "Conv1D"])
def test_biases_follow_the_equation_and_are_merged(transposed: bool) -> None:
    torch.manual_seed(0)
    base = Conv1D(20, 12) if transposed else nn.Linear(12, 20)
    nn.init.normal_(base.bias)
    adapter = LoraLinear(base, LoRA(bias="lora_only", lora_bias=True), rank=4, scale=1.5)
    assert adapter.lora_bias is not None and adapter.base_bias is not None
    x = torch.randn(5, 12)
    assert torch.equal(adapter(x), base(x))
    for parameter in (adapter.lora_b, adapter.lora_bias, adapter.base_bias):
        nn.init.normal_(parameter)
    w, a, b, x64 = float64(base.weight, adapter.lora_a, adapter.lora_b, x)
    inner, own = float64(adapter.lora_bias, adapter.base_bias)
    want = x64 @ (w if transposed else w.T) + own + 1.5 * (x64 @ a.T @ b.T + inner)
    torch.testing.assert_close(adapter(x).double(), want, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(adapter.merged()(x), adapter(x), rtol=1e-5, atol=1e-5)
    adapter(x).sum().backward()
    assert all(p.grad is not None for p in (adapter.lora_bias, adapter.base_bias))


def test_a_layer_without_a_bias_trains_none_and_cannot_take_bs_in() -> None:
    base = nn.Linear(12, 20, bias=False)
    assert LoraLinear(base, LoRA(bias="lora_only"), rank=4, scale=1.0).base_bias is None
    with pytest.raises(NotMergeableError, match="none to add it to"):
        LoraLinear(base, LoRA(lora_bias=True), rank=4, scale=1.0).merged()
    with pytest.raises(TargetError, match="lora_bias: wte is an Embedding, which has no bias"):
        LoRA(lora_bias=True).wrap(nn.Embedding(4, 4), "wte")


def test_bs_bias_covers_all_slices() -> None:
    options = LoRA(rank=2, alpha=2, lora_bias=True, slices={"qkv": QV})
    adapter = options.wrap(nn.Linear(4, 12), "qkv")
    assert isinstance(adapter, LoraLinear) and adapter.lora_bias is not None
    nn.init.normal_(adapter.lora_bias)
    x = torch.randn(3, 4)
    torch.testing.assert_close(adapter(x), adapter.base(x) + adapter.lora_bias)
