"""P-tuning against its encoders written out in float64; what is saved is what they wrote."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import lorica
from lorica.errors import ConfigError, NotMergeableError
from lorica.methods.attach import in_front
from lorica.methods.prompt import PromptEmbedding
from lorica.methods.ptuning import PTuning

N = 4


def adapted(tiny_llama: Any, **options: Any) -> Any:
    model = tiny_llama()
    torch.manual_seed(1)
    return lorica.adapt(model, PTuning(num_virtual_tokens=N, **options))


def weights(adapter: Any) -> dict[str, Tensor]:
    return {name: p.detach().double() for name, p in adapter.named_parameters() if not name.startswith("base.")}


def layer(w: dict[str, Tensor], name: str, x: Tensor) -> Tensor:
    return x @ w[f"{name}.weight"].T + w[f"{name}.bias"]


def lstm_direction(w: dict[str, Tensor], suffix: str, x: Tensor) -> Tensor:
    """One direction of one layer over x [n, in], gates in torch's order: input, forget, cell, output."""
    size = w[f"lstm_head.weight_hh_{suffix}"].shape[1]
    hidden, cell, out = torch.zeros(size).double(), torch.zeros(size).double(), []
    for row in x:
        gates = w[f"lstm_head.weight_ih_{suffix}"] @ row + w[f"lstm_head.bias_ih_{suffix}"]
        gates = gates + w[f"lstm_head.weight_hh_{suffix}"] @ hidden + w[f"lstm_head.bias_hh_{suffix}"]
        i, f, g, o = gates.chunk(4)
        cell = f.sigmoid() * cell + i.sigmoid() * g.tanh()
        hidden = o.sigmoid() * cell.tanh()
        out.append(hidden)
    return torch.stack(out)


def test_the_mlp_is_three_layers_with_relu_between(tiny_llama: Any) -> None:
    (adapter,) = lorica.adapters(adapted(tiny_llama, encoder_hidden_size=12)).values()
    w = weights(adapter)
    assert [tuple(w[f"mlp_head.{i}.weight"].shape) for i in (0, 2, 4)] == [(12, 32), (12, 12), (32, 12)]
    h = layer(w, "mlp_head.0", w["embedding.weight"]).clamp(min=0)
    want = layer(w, "mlp_head.4", layer(w, "mlp_head.2", h).clamp(min=0))
    torch.testing.assert_close(adapter.prompt().double(), want, atol=1e-6, rtol=1e-5)


def test_the_lstm_runs_both_ways_twice_and_two_layers_follow(tiny_llama: Any) -> None:
    (adapter,) = lorica.adapters(adapted(tiny_llama, encoder="lstm", encoder_hidden_size=6)).values()
    w = weights(adapter)
    x = w["embedding.weight"]
    for number in ("l0", "l1"):
        back = lstm_direction(w, f"{number}_reverse", x.flip(0)).flip(0)
        x = torch.cat([lstm_direction(w, number, x), back], 1)
    want = layer(w, "mlp_head.2", layer(w, "mlp_head.0", x).clamp(min=0))
    torch.testing.assert_close(adapter.prompt().double(), want, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("encoder", ["mlp", "lstm"])
def test_every_parameter_of_the_encoder_is_trained(tiny_llama: Any, encoder: str) -> None:
    model = adapted(tiny_llama, encoder=encoder)
    assert in_front(model) == (range(64, 64 + N), 0)
    ids = torch.tensor([[64, 65, 66, 67, 5, 6]])
    model(ids).logits.square().sum().backward()
    parameters = lorica.trainable_parameters(model)
    assert all(p.grad is not None and float(p.grad.abs().max()) > 0 for p in parameters.values())
    assert all(name.startswith("model.embed_tokens.") and ".base." not in name for name in parameters)
    (adapter,) = lorica.adapters(model).values()
    assert adapter.num_parameters() == sum(p.numel() for p in parameters.values())


@pytest.mark.parametrize("encoder", ["mlp", "lstm"])
def test_a_folder_holds_what_was_written_and_not_the_encoder(tiny_llama: Any, encoder: str, tmp_path: Path) -> None:
    model = adapted(tiny_llama, encoder=encoder)
    ids = torch.tensor([[64, 65, 66, 67, 5, 6]])
    with torch.no_grad():
        want = model(ids).logits
    lorica.save_adapter(model, tmp_path / "adapter")
    again = lorica.load_adapter(tiny_llama(), tmp_path / "adapter")
    (adapter,) = lorica.adapters(again).values()
    assert isinstance(adapter, PromptEmbedding) and adapter.num_parameters() == N * 32
    assert torch.equal(again(ids).logits, want)


def test_it_cannot_be_merged(tiny_llama: Any) -> None:
    with pytest.raises(NotMergeableError, match="in front of the text"):
        lorica.merge(adapted(tiny_llama))


def test_an_unknown_encoder_is_refused() -> None:
    with pytest.raises(ConfigError, match="encoder is 'gru'"):
        PTuning(encoder="gru")  # type: ignore[arg-type]
