"""The chunked loss against torch's cross-entropy in float64, and against each model's own logits."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, CohereConfig, Gemma2Config, GPTJConfig, GraniteConfig, LlamaConfig

import lorica
from lorica.data.packing import pack, pad
from lorica.data.tokenized import TokenizedDataset
from lorica.kernels import attention
from lorica.models import loss as loss_module
from lorica.models.loss import PostProcessing, chunked_cross_entropy, logits_loss, make_loss

TINY: dict[str, Any] = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "vocab_size": 99, "initializer_range": 0.3,
}  # fmt: skip
MODELS = {
    "llama": LlamaConfig(**TINY),
    "tied llama": LlamaConfig(**TINY, tie_word_embeddings=True),
    "gemma2 caps its logits": Gemma2Config(**TINY, head_dim=8, final_logit_softcapping=5.0),
    "granite divides": GraniteConfig(**TINY, logits_scaling=3.0),
    "cohere multiplies": CohereConfig(**TINY, logit_scale=0.2),
    "gptj has a bias": GPTJConfig(n_embd=32, n_layer=2, n_head=4, vocab_size=99, rotary_dim=4),
}


@pytest.fixture
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """64 rows a chunk, so that small inputs need several."""
    monkeypatch.setattr(loss_module, "_CHUNK_BYTES", 1)
    monkeypatch.setattr(loss_module, "_FEWEST_ROWS", 64)


@pytest.mark.parametrize("rows", [1, 64, 150])
@pytest.mark.parametrize("bias", [False, True])
def test_loss_and_gradients_equal_float64(rows: int, bias: bool, small_chunks: None) -> None:
    torch.manual_seed(0)
    head = nn.Linear(32, 99, bias=bias)
    hidden, targets = torch.randn(rows, 32, requires_grad=True), torch.randint(0, 99, (rows,))
    loss = chunked_cross_entropy(hidden, targets, head, PostProcessing(cap=3))
    (0.5 * loss).backward()
    h = hidden.detach().double().requires_grad_()
    exact = nn.Linear(32, 99, bias=bias).double()
    exact.load_state_dict(head.state_dict())
    want = F.cross_entropy(3 * torch.tanh(exact(h) / 3), targets, reduction="sum")
    (0.5 * want).backward()
    torch.testing.assert_close(loss.double(), want, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(hidden.grad.double(), h.grad, rtol=1e-5, atol=1e-5)
    for mine, theirs in zip(head.parameters(), exact.parameters(), strict=True):
        torch.testing.assert_close(mine.grad.double(), theirs.grad, rtol=1e-5, atol=1e-5)


def test_a_frozen_head_costs_no_weight_gradient(small_chunks: None) -> None:
    head = nn.Linear(32, 99).requires_grad_(False)
    hidden = torch.randn(80, 32, requires_grad=True)
    chunked_cross_entropy(hidden, torch.randint(0, 99, (80,)), head).backward()
    assert hidden.grad is not None and head.weight.grad is None


def test_an_adapted_head_is_trained(small_chunks: None) -> None:
    torch.manual_seed(0)
    model = lorica.adapt(nn.ModuleDict({"head": nn.Linear(32, 99)}), lorica.LoRA(rank=4, targets="head"))
    for p in lorica.trainable_parameters(model).values():
        nn.init.normal_(p)
    hidden, targets = torch.randn(37, 32), torch.randint(0, 99, (37,))
    chunked_cross_entropy(hidden, targets, model["head"]).backward()
    got = [p.grad.clone() for p in lorica.trainable_parameters(model).values()]
    model.zero_grad()
    F.cross_entropy(model.double()["head"](hidden.double()), targets, reduction="sum").backward()
    for mine, p in zip(got, lorica.trainable_parameters(model).values(), strict=True):
        torch.testing.assert_close(mine.double(), p.grad, rtol=1e-4, atol=1e-5 * float(p.grad.abs().max()))


def test_an_adapted_head_is_measured_without_gradients(small_chunks: None) -> None:
    model = lorica.adapt(nn.ModuleDict({"head": nn.Linear(32, 99)}), lorica.LoRA(rank=4, targets="head"))
    hidden, targets = torch.randn(37, 32), torch.randint(0, 99, (37,))
    want = F.cross_entropy(model["head"](hidden), targets, reduction="sum")
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            torch.testing.assert_close(chunked_cross_entropy(hidden, targets, model["head"]), want)


def test_no_trained_position_is_zero_without_nan() -> None:
    hidden = torch.randn(0, 32, requires_grad=True)
    loss = chunked_cross_entropy(hidden, torch.zeros(0, dtype=torch.long), nn.Linear(32, 99))
    loss.backward()
    assert loss.item() == 0.0


def test_bfloat16_is_as_exact_as_its_logits(small_chunks: None) -> None:
    torch.manual_seed(0)
    head = nn.Linear(32, 99).to(torch.bfloat16)
    hidden = torch.randn(64, 32, dtype=torch.bfloat16, requires_grad=True)
    targets = torch.randint(0, 99, (64,))
    loss = chunked_cross_entropy(hidden, targets, head)
    loss.backward()
    plain = hidden.detach().clone().requires_grad_()
    F.cross_entropy(head(plain).float(), targets, reduction="sum").backward()
    h = hidden.detach().double().requires_grad_()
    exact = nn.Linear(32, 99).to(torch.bfloat16).double()
    exact.load_state_dict({k: v.double() for k, v in head.state_dict().items()})
    want = F.cross_entropy(exact(h), targets, reduction="sum")
    want.backward()
    ours, theirs = ((g.grad.double() - h.grad).abs().mean() for g in (hidden, plain))
    assert loss.dtype is torch.float32 and abs(loss.item() - want.item()) < 1e-2 * want.item()
    assert ours <= 1.1 * theirs


@pytest.mark.parametrize("name", MODELS)
def test_the_loss_equals_the_models_own_logits(name: str) -> None:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(MODELS[name], dtype=torch.float32).eval()
    loss_fn = make_loss(model)
    assert loss_fn is not logits_loss
    ids = torch.randint(0, 99, (2, 11))
    targets = torch.cat([ids[:, 1:], torch.full((2, 1), -100)], dim=1)
    targets[0, :4] = -100
    want = F.cross_entropy(model(ids, use_cache=False).logits.flatten(0, 1), targets.flatten(), reduction="sum")
    torch.testing.assert_close(loss_fn(model, {"input_ids": ids}, targets), want, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("rows", [1, 2])
def test_an_unknown_treatment_of_logits_falls_back_on_the_models_own(
    rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(LlamaConfig(**TINY), dtype=torch.float32).eval()
    forward = type(model).forward

    def stranger(self: Any, *args: Any, **kwargs: Any) -> Any:
        out = forward(self, *args, **kwargs)
        out.logits = out.logits.sin()
        return out

    monkeypatch.setattr(type(model), "forward", stranger)
    loss_fn = make_loss(model)
    assert loss_fn is logits_loss
    ids = torch.randint(0, 99, (rows, 9))
    targets = torch.cat([ids[:, 1:], torch.full((rows, 1), -100)], dim=1)
    want = F.cross_entropy(model(ids).logits.flatten(0, 1), targets.flatten(), reduction="sum")
    torch.testing.assert_close(loss_fn(model, {"input_ids": ids}, targets), want, rtol=1e-5, atol=1e-4)


def test_the_logits_of_all_tokens_never_exist(small_chunks: None) -> None:
    """Through the whole model, no tensor ever holds tokens x vocabulary numbers."""
    from torch.utils._python_dispatch import TorchDispatchMode

    torch.manual_seed(0)
    config = LlamaConfig(**{**TINY, "vocab_size": 4000, "num_hidden_layers": 1})
    model = lorica.adapt(AutoModelForCausalLM.from_config(config, dtype=torch.float32), lorica.LoRA(rank=2))
    loss_fn = make_loss(model)
    largest = 0

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            nonlocal largest
            out = func(*args, **(kwargs or {}))
            for tensor in out if isinstance(out, tuple | list) else [out]:
                if isinstance(tensor, torch.Tensor) and 4000 in tensor.shape[-1:]:
                    largest = max(largest, tensor.numel())
            return out

    ids = torch.randint(0, 4000, (1, 200))
    with Watch():
        loss_fn(model, {"input_ids": ids}, ids).backward()
    # A chunk of 16 rows rounded up to 64, or the transposed view of the head's own weight, against 200 rows of logits.
    assert 0 < largest <= 64 * 4000


@pytest.mark.parametrize("after", [PostProcessing(), PostProcessing(0.5, 3.0)])
def test_a_chunk_of_logits_becomes_its_own_gradient(after: PostProcessing, small_chunks: None) -> None:
    """Of tensors of that size a chunk makes one, the head's output: none for float32, softmax or gradient."""
    from torch.utils._python_dispatch import TorchDispatchMode

    made: list[str] = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            out = func(*args, **(kwargs or {}))
            given = {t.untyped_storage().data_ptr() for t in args if isinstance(t, torch.Tensor)}
            is_new = isinstance(out, torch.Tensor) and out.untyped_storage().data_ptr() not in given
            made.extend([str(func)] if is_new and out.shape == (64, 4000) else [])
            return out

    head = nn.Linear(32, 4000, bias=False).requires_grad_(False)
    hidden, targets = torch.randn(130, 32, requires_grad=True), torch.randint(0, 4000, (130,))
    with Watch():
        chunked_cross_entropy(hidden, targets, head, after).backward()
    assert len(made) == 3


def test_what_is_not_trained_has_no_loss_and_no_gradient(small_chunks: None) -> None:
    torch.manual_seed(0)
    head, targets = nn.Linear(32, 99), torch.randint(0, 99, (70,))
    targets[::3] = -100
    hidden = torch.randn(70, 32, requires_grad=True)
    loss = chunked_cross_entropy(hidden, targets, head)
    loss.backward()
    counts = targets != -100
    want = chunked_cross_entropy(hidden.detach()[counts], targets[counts], head)
    torch.testing.assert_close(loss, want)
    assert not hidden.grad[~counts].any() and bool(hidden.grad[counts].any(1).all())


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("targets", ["all-linear", ("embed_tokens", "lm_head")])
def test_a_step_on_another_device_mixes_none_and_waits_for_none(
    packed: bool, targets: str | tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a GPU: on the meta device most operations with a tensor of the CPU fail, and so does reading a value."""
    # Here transformers itself reads whether the positions are of several samples.
    monkeypatch.setattr("transformers.masking_utils.find_packed_sequence_indices", torch.zeros_like)
    config = Gemma2Config(**TINY, sliding_window=4, attn_logit_softcapping=2.0)
    attention.register()
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, attn_implementation=attention.NAME).train()
    lorica.adapt(model, lorica.LoRA(rank=4, dropout=0.1, targets=targets))
    samples = [(range(n), range(n)) for n in (3, 17, 9, 9)]
    dataset = TokenizedDataset.from_samples(samples)  # type: ignore[arg-type]
    batch = pack(dataset, range(4), 64) if packed else pad(dataset, range(4), 0)
    make_loss(model)(model, batch.to("meta").model_inputs(), batch.targets).backward()
    gradients = [parameter.grad for parameter in lorica.trainable_parameters(model).values()]
    assert gradients and all(gradient is not None and gradient.is_meta for gradient in gradients)
