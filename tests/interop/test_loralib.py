"""loralib's own layers are the oracle: its state dicts, read as pairs, give what its forward gives."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from lorica.errors import AdapterError
from lorica.interop.arithmetic import delta
from lorica.interop.loralib import read_loralib

loralib = pytest.importorskip("loralib", reason="needs loralib, the oracle")


class Model(nn.Module):
    def __init__(self, enabled: list[bool]) -> None:
        super().__init__()
        self.embed = loralib.Embedding(11, 12, r=2, lora_alpha=6)
        self.c_attn = loralib.MergedLinear(12, 36, r=2, lora_alpha=6, enable_lora=enabled)
        self.head = loralib.Linear(12, 5, r=2, lora_alpha=6)


def randomised(enabled: list[bool]) -> Any:
    torch.manual_seed(0)
    model = Model(enabled)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.normal_()
    return model


@pytest.mark.parametrize("enabled", [[True, False, True], [False, True, False], [True, True, True]])
def test_loralib_computes_what_the_pairs_say(enabled: list[bool]) -> None:
    model = randomised(enabled)
    pairs = read_loralib(loralib.lora_state_dict(model), alpha=6, rank=2, enabled={"c_attn": enabled})
    x, ids = torch.randn(4, 12), torch.arange(11)
    with torch.no_grad():
        for name in ("c_attn", "head"):
            module = model.get_submodule(name)
            base = nn.functional.linear(x, module.weight, module.bias)
            torch.testing.assert_close(module(x) - base, x @ delta(pairs[name]).float().T, rtol=0, atol=1e-4)
        embedded = model.embed(ids) - model.embed.weight
        torch.testing.assert_close(embedded, delta(pairs["embed"]).float().T, rtol=0, atol=1e-4)
    assert pairs["c_attn"].rank == 2 * sum(enabled)


def test_every_tensor_is_accounted_for() -> None:
    model = randomised([True, False, True])
    state = dict(loralib.lora_state_dict(model, bias="lora_only"))
    del state["head.lora_B"]
    with pytest.raises(AdapterError) as error:
        read_loralib(state, alpha=6, rank=4)
    for fault in ("head.bias [5]", "head has only lora_A", "embed has rank 2, expected 4"):
        assert fault in str(error.value)
    with pytest.raises(AdapterError, match="is it a MergedLinear"):
        read_loralib(loralib.lora_state_dict(model), alpha=6)
    with pytest.raises(AdapterError, match="with 1 of 3 parts enabled"):
        read_loralib(loralib.lora_state_dict(model), alpha=6, enabled={"c_attn": [True, False, False]})
    with pytest.raises(AdapterError, match="no lora_A"):
        read_loralib({}, alpha=6)
