"""Full fine-tuning against a model trained without any adapter, and what ties, dtypes and folders make of it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModel, BertConfig, T5Config, T5ForConditionalGeneration, ViTConfig
from transformers.pytorch_utils import Conv1D

import lorica
from lorica.errors import AdapterError, TargetError
from lorica.interop.folder import PROOF, WEIGHTS
from lorica.methods.full import FullFineTuning

Make = Callable[..., Any]
IDS = torch.arange(18).view(2, 9)


def train(model: nn.Module, steps: int = 4) -> list[float]:
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(steps):
        loss = model(input_ids=IDS, labels=IDS).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize("tied", [False, True])
def test_it_trains_as_the_plain_model_does(tied: bool, tiny_llama: Make) -> None:
    plain = tiny_llama(tie_word_embeddings=tied)
    model = lorica.adapt(tiny_llama(tie_word_embeddings=tied), FullFineTuning())
    trained = lorica.trainable_parameters(model)
    assert sum(p.numel() for p in trained.values()) == sum(p.numel() for p in plain.parameters())
    assert train(model) == train(plain)
    merged = lorica.merge(model)
    assert merged.state_dict().keys() == plain.state_dict().keys()
    assert all(torch.equal(merged.state_dict()[name], tensor) for name, tensor in plain.state_dict().items())


def test_a_tied_weight_has_one_master_and_stays_tied(tiny_llama: Make, tmp_path: Path) -> None:
    model = lorica.adapt(tiny_llama(tie_word_embeddings=True), FullFineTuning(targets="embed_tokens"))
    assert list(lorica.adapters(model)) == ["model.embed_tokens", "lm_head"]
    assert model.lm_head.masters["weight"] is model.model.embed_tokens.masters["weight"]
    assert len(lorica.trainable_parameters(model)) == 1
    train(model)
    want = model(IDS).logits
    plain = lorica.merge(model)
    assert plain.lm_head.weight is plain.model.embed_tokens.weight and plain.config.tie_word_embeddings
    plain.save_pretrained(tmp_path / "plain")
    assert torch.equal(type(plain).from_pretrained(tmp_path / "plain")(IDS).logits, want)
    folder = lorica.save_adapter(model, tmp_path / "adapter")
    again = lorica.load_adapter(tiny_llama(tie_word_embeddings=True), folder)
    assert again.lm_head.masters["weight"] is again.model.embed_tokens.masters["weight"]
    assert torch.equal(again.eval()(IDS).logits, want)


def test_three_tied_embeddings_of_an_encoder_decoder() -> None:
    torch.manual_seed(0)
    shape = {"d_model": 16, "d_kv": 4, "d_ff": 24, "num_layers": 1, "num_heads": 2, "vocab_size": 32}
    config = T5Config(**shape, tie_word_embeddings=True, decoder_start_token_id=0)
    model = T5ForConditionalGeneration(config)
    count = sum(p.numel() for p in model.parameters())
    lorica.adapt(model, FullFineTuning())
    trained = lorica.trainable_parameters(model)
    assert sum(p.numel() for p in trained.values()) == count
    model(input_ids=IDS, labels=IDS).loss.backward()
    assert all(p.grad is not None for p in trained.values())
    plain = lorica.merge(model)
    assert plain.encoder.embed_tokens.weight is plain.decoder.embed_tokens.weight is plain.shared.weight


def test_small_updates_are_not_lost_in_16_bits_and_merging_rounds() -> None:
    model = lorica.adapt(nn.Sequential(nn.Linear(4, 4).to(torch.bfloat16)), FullFineTuning(targets="0"))
    base, master = model[0].base, model[0].masters["weight"]
    before = base.weight.clone()
    nn.init.ones_(base.weight)
    nn.init.ones_(master)
    for _ in range(8):
        # Far below half a unit in the last place of a bfloat16 one.
        master.data.add_(2**-10)
    x = torch.eye(4, dtype=torch.bfloat16)
    assert master[0, 0] == 1 + 2**-7 and before.dtype is torch.bfloat16
    plain = lorica.merge(model)[0]
    assert plain.weight.dtype is torch.bfloat16 and plain.weight[0, 0] == 1 + 2**-7
    assert torch.equal(plain(x), model(x)) and torch.equal(base.weight, torch.ones_like(base.weight))


def test_the_merged_model_does_not_follow_further_training() -> None:
    model = lorica.adapt(nn.Sequential(nn.Linear(4, 4)), FullFineTuning())
    plain = lorica.merge(model)
    before = plain[0].weight.clone()
    model[0].masters["weight"].data.zero_()
    assert torch.equal(plain[0].weight, before)


def test_only_some_layers_or_norms_or_biases(tiny_llama: Make) -> None:
    def trained(model: nn.Module, **options: Any) -> set[str]:
        found = lorica.adapters(lorica.adapt(model, FullFineTuning(**options)))
        return {f"{name}.{key}" for name, adapter in found.items() for key in adapter.saved_tensors()}

    assert trained(tiny_llama(), targets=r".*norm") == {n for n, _ in tiny_llama().named_parameters() if "norm" in n}
    layer = r"layers\.1\..*"
    assert trained(tiny_llama(), targets=layer) == {n for n, _ in tiny_llama().named_parameters() if "layers.1." in n}
    linear = trained(tiny_llama(), targets="all-linear")
    assert linear == {n for n, _ in tiny_llama().named_parameters() if "_proj" in n}

    bert = AutoModel.from_config(
        BertConfig(hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2, vocab_size=32)
    )
    biases = {n for n, _ in bert.named_parameters() if n.endswith("bias")}
    assert trained(bert, parameters="bias") == biases and len(biases) > 8
    with pytest.raises(TargetError, match="given: none"):
        lorica.adapt(nn.Sequential(nn.Linear(4, 4, bias=False)), FullFineTuning(parameters="bias"))


class Keywords(nn.Module):
    """Several inputs, keywords, a tuple out, and a parameter of its own name."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.randn(3, 4))
        self.register_buffer("steps", torch.zeros(1, dtype=torch.long))

    def forward(self, x: torch.Tensor, *, shift: float) -> tuple[torch.Tensor, torch.Tensor]:
        return x @ self.table.T + shift, self.table


def test_any_module_that_holds_no_others() -> None:
    model = nn.ModuleDict({"own": Keywords(), "conv": nn.Conv2d(1, 2, 3), "c1": Conv1D(4, 3)})
    x, image = torch.randn(2, 4), torch.randn(1, 1, 5, 5)
    want = [*model["own"](x, shift=2.0), model["conv"](image)]
    lorica.adapt(model, FullFineTuning())
    got = [*model["own"](x, shift=2.0), model["conv"](image)]
    assert all(torch.equal(a, b) for a, b in zip(want, got, strict=True))
    got[0].sum().backward()
    assert model["own"].masters["table"].grad is not None


def test_all_refuses_to_leave_something_out_silently() -> None:
    config = ViTConfig(
        hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2, image_size=8, patch_size=4
    )
    model = AutoModel.from_config(config)
    with pytest.raises(TargetError, match=r"targets all: 2 parameters cannot be trained, .* embeddings\.cls_token"):
        lorica.adapt(model, FullFineTuning())
    assert not lorica.adapters(model)
    lorica.adapt(model, FullFineTuning(targets=".*"))
    assert len(lorica.trainable_parameters(model)) == len(list(AutoModel.from_config(config).parameters())) - 2
    with pytest.raises(TargetError, match=r"4 parameters .*in_proj_weight"):
        lorica.adapt(nn.ModuleList([nn.MultiheadAttention(8, 2), nn.Linear(2, 2)]), FullFineTuning())


def test_a_folder_of_trained_weights_reads_back_and_is_guarded(tiny_llama: Make, tmp_path: Path) -> None:
    model = lorica.adapt(tiny_llama(), FullFineTuning())
    train(model)
    folder = lorica.save_adapter(model.eval(), tmp_path / "a")
    tensors = load_file(folder / WEIGHTS)
    prefix = "base_model.model."
    assert {key.removeprefix(prefix) for key in tensors} == {name for name, _ in tiny_llama().named_parameters()}
    again = lorica.load_adapter(tiny_llama(), folder)
    assert torch.equal(again.eval()(IDS).logits, model(IDS).logits)
    (folder / PROOF).unlink()
    save_file({**tensors, f"{prefix}lm_head.weight": torch.zeros(3, 3)}, folder / WEIGHTS)
    with pytest.raises(AdapterError, match=r"lm_head\.weight is \[3, 3\], expected \[64, 32\]"):
        lorica.load_adapter(tiny_llama(), folder)


def test_all_of_a_tied_model_with_its_head_named_beside(tiny_llama: Callable[..., Any]) -> None:
    model = lorica.adapt(tiny_llama(tie_word_embeddings=True), FullFineTuning(modules_to_save=["lm_head"]))
    assert (
        lorica.adapters(model)["lm_head"].masters["weight"]
        is lorica.adapters(model)["model.embed_tokens"].masters["weight"]
    )
    with pytest.raises(TargetError, match="leave trainable_tokens out"):
        lorica.adapt(tiny_llama(), FullFineTuning(trainable_tokens=[3]))
