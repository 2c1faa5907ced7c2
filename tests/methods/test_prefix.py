"""Prefix tuning: its network in float64, one trunk for all layers, and what is saved of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import lorica
from lorica.errors import NotMergeableError
from lorica.methods.attach import in_front
from lorica.methods.prefix import PrefixTuning
from lorica.methods.ptuning_v2 import DeepPrompt, PTuningV2

N = 3
IDS = torch.randint(4, 64, (2, 7), generator=torch.Generator().manual_seed(5))
POSITIONS = (torch.arange(7) + N).expand(2, -1)


@pytest.fixture
def model(tiny_llama: Any) -> Any:
    torch.manual_seed(1)
    return lorica.adapt(tiny_llama(), PrefixTuning(num_virtual_tokens=N, encoder_hidden_size=10))


def test_one_network_writes_the_prefixes_of_all_layers(model: Any) -> None:
    found = list(lorica.adapters(model).values())
    assert found[0].trunk is found[1].trunk
    trunk, heads = found[0].trunk, [adapter.head for adapter in found]
    # The last layer as the paper has it: one Linear(hidden, 2 L d), of which each layer has its rows.
    last, bias = (torch.cat([getattr(h, name) for h in heads]).detach().double() for name in ("weight", "bias"))
    embedding, first = trunk[0].weight.detach().double(), trunk[1].weight.detach().double()
    assert first.shape == (10, 16) and last.shape == (2 * 2 * 16, 10)
    want = torch.tanh(embedding @ first.T + trunk[1].bias.detach().double()) @ last.T + bias
    got = torch.cat([adapter.prefix() for adapter in found], 1)
    torch.testing.assert_close(got.double(), want, atol=1e-6, rtol=1e-5)


def test_the_trunk_is_counted_and_trained_once(model: Any) -> None:
    parameters = lorica.trainable_parameters(model)
    assert sum(p.numel() for p in parameters.values()) == N * 16 + (16 * 10 + 10) + 2 * (10 * 32 + 32)
    model(IDS, position_ids=POSITIONS).logits.square().sum().backward()
    assert all(p.grad is not None and float(p.grad.abs().max()) > 0 for p in parameters.values())
    assert in_front(model) == (range(0), N)


def test_it_is_p_tuning_v2_with_the_keys_and_values_that_the_network_wrote(model: Any, tiny_llama: Any) -> None:
    plain = lorica.adapt(tiny_llama(), PTuningV2(num_virtual_tokens=N))
    with torch.no_grad():
        for mine, written in zip(lorica.adapters(plain).values(), lorica.adapters(model).values(), strict=True):
            mine.prompt_embeddings.copy_(written.prefix())
        want = plain(IDS, position_ids=POSITIONS).logits
        assert torch.equal(model(IDS, position_ids=POSITIONS).logits, want)


def test_a_folder_holds_keys_and_values_and_not_the_network(model: Any, tiny_llama: Any, tmp_path: Path) -> None:
    with torch.no_grad():
        want = model(IDS, position_ids=POSITIONS).logits
    lorica.save_adapter(model, tmp_path / "adapter")
    again = lorica.load_adapter(tiny_llama(), tmp_path / "adapter")
    found = lorica.adapters(again).values()
    assert all(isinstance(a, DeepPrompt) and a.num_parameters() == N * 32 for a in found)
    assert torch.equal(again(IDS, position_ids=POSITIONS).logits, want)


def test_checkpointing_changes_no_gradient(model: Any) -> None:
    parameters = list(lorica.trainable_parameters(model).values())

    def gradients() -> tuple[torch.Tensor, ...]:
        return torch.autograd.grad(
            model(IDS, position_ids=POSITIONS, use_cache=False).logits.square().sum(), parameters
        )

    plainly = gradients()
    model.train().activation_checkpointing_enable({"use_reentrant": False})
    for mine, wanted in zip(gradients(), plainly, strict=True):
        torch.testing.assert_close(mine, wanted, atol=1e-4, rtol=1e-4)


def test_it_cannot_be_merged(model: Any) -> None:
    with pytest.raises(NotMergeableError, match="keys and values"):
        lorica.merge(model)
