"""ReLoRA restarts: the function and the base stay, and what is saved is a plain LoRA of a greater rank."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

import lorica
from lorica.methods.ia3 import IA3
from lorica.methods.lora import LoRA
from lorica.methods.lora_kinds import LoraAdapter
from tests.interop.small_models import llama, outputs

KINDS: dict[str, tuple[Any, Any, tuple[int, ...]]] = {
    "Linear": (lambda: nn.Linear(12, 20), {}, (5, 12)),
    "Conv1D": (lambda: Conv1D(20, 12), {}, (5, 12)),
    "Conv2d": (lambda: nn.Conv2d(3, 20, 2), {}, (2, 3, 5, 5)),
    "slices": (lambda: nn.Linear(12, 18), {"slices": {"x": {"sizes": [1, 1, 1], "train": [0, 2]}}}, (5, 12)),
    "pissa": (lambda: nn.Linear(12, 20), {"init": "pissa"}, (5, 12)),
}


def moved(adapter: LoraAdapter) -> None:
    with torch.no_grad():
        for parameter in (adapter.lora_a, adapter.lora_b):
            parameter.add_(torch.randn_like(parameter), alpha=0.3)


@pytest.mark.parametrize("kind", KINDS)
def test_a_restart_keeps_the_function_and_trains_as_if_the_base_had_been_written(kind: str) -> None:
    """The paper's W' = W + s B A with a fresh pair on it, in float64, and its gradients."""
    torch.manual_seed(0)
    make, options, shape = KINDS[kind]
    base = make()
    before = base.weight.detach().clone()
    adapter = LoRA(rank=2, alpha=4, **options).wrap(base, "x")
    assert isinstance(adapter, LoraAdapter)
    x, past = torch.randn(shape), 0.0
    for _ in range(2):
        moved(adapter)
        want, written = adapter(x).detach(), adapter.delta_weight().double()
        assert (written - past).norm() > 0.1
        past = written
        assert adapter.restart() == (adapter.lora_a, adapter.lora_b)
        assert not adapter.lora_b.any() and adapter.lora_a.abs().max() <= 12**-0.5
        torch.testing.assert_close(adapter(x), want, rtol=1e-5, atol=1e-5)
    assert torch.equal(base.weight, before)
    if kind == "slices":
        return

    moved(adapter)
    a, b = (p.detach().double().requires_grad_() for p in (adapter.lora_a, adapter.lora_b))
    w = (before.t() if kind == "Conv1D" else before).double()
    new = w + (past + 2.0 * b.flatten(1) @ a.flatten(1)).view_as(w)
    if kind == "Conv2d":
        theirs = torch.nn.functional.conv2d(x.double(), new, base.bias.double())
    else:
        theirs = x.double() @ new.T + base.bias.double()
    ours = adapter(x)
    torch.testing.assert_close(ours.double(), theirs, rtol=1e-4, atol=1e-4)
    ours.square().sum().backward()
    theirs.square().sum().backward()
    for mine, other in ((adapter.lora_a, a), (adapter.lora_b, b)):
        torch.testing.assert_close(mine.grad.double(), other.grad, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(adapter.merged()(x), ours, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "options", [{}, {"init": "olora"}, {"slices": {"up_proj": {"sizes": [1, 1], "train": [1]}}}], ids=str
)
def test_what_is_saved_is_a_plain_lora_that_peft_reads(options: dict[str, Any], tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    model = lorica.adapt(llama(), LoRA(rank=2, targets=("q_proj", "up_proj"), **options))
    found = [adapter for adapter in lorica.adapters(model).values() if isinstance(adapter, LoraAdapter)]
    num_trained = sum(p.numel() for p in lorica.trainable_parameters(model).values())
    for _ in range(2):
        for adapter in found:
            moved(adapter)
            adapter.restart()
    for adapter in found:
        moved(adapter)
    assert sum(p.numel() for p in lorica.trainable_parameters(model).values()) == num_trained
    assert {adapter.rank for adapter in found} == {2 * (4 if "init" in options else 3)}
    ours = outputs(model)
    lorica.save_adapter(model, tmp_path / "adapter")
    theirs = outputs(peft.PeftModel.from_pretrained(llama(), tmp_path / "adapter").eval())
    assert (ours - outputs(llama())).abs().max() > 1e-2
    torch.testing.assert_close(theirs, ours, atol=1e-5, rtol=1e-5)
    assert torch.equal(outputs(lorica.load_adapter(llama(), tmp_path / "adapter")), ours)
    assert torch.equal(outputs(lorica.detach(model)), outputs(llama()))


@pytest.mark.parametrize(
    ("options", "module"),
    [
        (LoRA(rank=2), nn.Embedding(30, 8)),
        (LoRA(rank=2), nn.Conv1d(4, 8, 3, groups=2)),
        (IA3(), nn.Linear(4, 4)),
    ],
    ids=lambda value: type(value).__name__,
)
def test_what_cannot_be_stacked_goes_on(options: Any, module: nn.Module) -> None:
    adapter = options.wrap(module, "x")
    before = {name: p.clone() for name, p in adapter.named_parameters()}
    assert adapter.restart() == ()
    assert all(torch.equal(p, before[name]) for name, p in adapter.named_parameters())
