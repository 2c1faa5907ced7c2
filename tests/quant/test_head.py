"""Output heads in few bits, against their own weight in float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, LlamaModel

import lorica
from lorica.errors import ConfigError
from lorica.quant.head import quantize_head
from lorica.quant.linear import QuantizedLinear


def small(tied: bool = True) -> Any:
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=64, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2, vocab_size=100,
        tie_word_embeddings=tied,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize(("scheme", "widest"), [("int8", 1 / 127), ("nf4", 1 - 0.6961928)])
def test_logits_are_those_of_the_weight_rounded_to_its_levels(tied: bool, scheme: str, widest: float) -> None:
    model, ids = small(tied), torch.arange(12)[None]
    embedding, weight = model.get_input_embeddings().weight, model.lm_head.weight.detach().clone()
    with torch.no_grad():
        hidden = model.model(ids).last_hidden_state.double()
        assert quantize_head(model, scheme) is model
        logits = model(ids).logits.double()
    assert isinstance(model.lm_head, QuantizedLinear) and model.lm_head.scheme == scheme
    exact = hidden @ weight.double().t()
    # Half of the widest gap between levels, in each element of a block of 64, which here is a row.
    limit = hidden.abs().sum(-1, keepdim=True) * weight.abs().amax(1).double() * widest / 2
    assert ((logits - exact).abs() <= limit + 1e-5).all() and not torch.equal(logits, exact)
    # The embedding stays what it was, also where it was the head's.
    assert model.get_input_embeddings().weight is embedding and (not tied or embedding.equal(weight))


def test_over_a_quantised_and_adapted_base() -> None:
    model = lorica.adapt(lorica.quantize(small()), lorica.LoRA(rank=2))
    quantize_head(model, "int8")
    assert model(torch.arange(5)[None]).logits.isfinite().all()


def test_what_cannot_be_is_refused() -> None:
    with pytest.raises(ConfigError, match="no quantisation scheme 'int9'"):
        quantize_head(small(), "int9")
    with pytest.raises(ConfigError, match="has an output head of type QuantizedLinear"):
        quantize_head(quantize_head(small()))
    with pytest.raises(ConfigError, match="LlamaModel has no output head"):
        quantize_head(LlamaModel(small().config))
    model = small()
    model.lm_head = nn.Sequential(model.lm_head)
    with pytest.raises(ConfigError, match="type Sequential: only a plain linear head"):
        quantize_head(model)
