"""AdaLoRA against its own equations in float64: the update, the importance, the budget and the choice of ranks."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

import lorica
from lorica.errors import ConfigError
from lorica.methods.adalora import AdaLoRA, AdaLoraLinear, keep_most_important


@pytest.mark.parametrize("kind", [nn.Linear, Conv1D])
def test_it_follows_the_equation_in_float64(kind: type[nn.Module]) -> None:
    torch.manual_seed(0)
    base = nn.Linear(12, 20) if kind is nn.Linear else Conv1D(20, 12)
    adapter = AdaLoraLinear(base, AdaLoRA(rank=4, target_rank=2, alpha=6))
    for parameter in (adapter.lora_a, adapter.lora_b, adapter.lora_e):
        nn.init.normal_(parameter)
    x = torch.randn(3, 5, 12, requires_grad=True)
    y = adapter(x)
    g = torch.randn_like(y)
    y.backward(g)

    w, bias, q, p, values, x64 = (
        t.detach().double().requires_grad_()
        for t in (base.weight, base.bias, adapter.lora_a, adapter.lora_b, adapter.lora_e, x)
    )
    update = 6 / 4 * p @ torch.diag(values[:, 0]) @ q
    want = x64 @ ((w if kind is nn.Linear else w.T) + update).T + bias
    want.backward(g.double())
    torch.testing.assert_close(y.double(), want, rtol=1e-5, atol=1e-5)
    for ours, exact in ((x, x64), (adapter.lora_a, q), (adapter.lora_b, p), (adapter.lora_e, values)):
        assert ours.grad is not None and exact.grad is not None
        torch.testing.assert_close(ours.grad.double(), exact.grad, rtol=1e-4, atol=1e-4)


def test_importance_is_smoothed_sensitivity_times_uncertainty() -> None:
    torch.manual_seed(0)
    adapter = AdaLoraLinear(nn.Linear(5, 7), AdaLoRA(rank=3, target_rank=2))
    parameters = {"a": adapter.lora_a, "b": adapter.lora_b, "e": adapter.lora_e}
    smooth, deviation = ({n: torch.zeros_like(p, dtype=torch.float64) for n, p in parameters.items()} for _ in range(2))
    for _ in range(4):
        for name, p in parameters.items():
            p.data.normal_()
            p.grad = torch.randn_like(p)
            now = (p.detach().double() * p.grad.double()).abs()
            smooth[name] = 0.85 * smooth[name] + 0.15 * now
            deviation[name] = 0.85 * deviation[name] + 0.15 * (now - smooth[name]).abs()
        adapter.observe(0.85)
    s = {name: smooth[name] * deviation[name] for name in parameters}
    want = [s["e"][i, 0] + s["a"][i].sum() / 5 + s["b"][:, i].sum() / 7 for i in range(3)]
    torch.testing.assert_close(adapter.scores().double(), torch.stack(want))


def test_the_budget_falls_by_the_cube() -> None:
    options = AdaLoRA(rank=12, target_rank=4)
    assert [options.budget(10, time) for time in (0.0, 0.5, 1.0)] == [120, 50, 40]


def test_ranks_go_to_the_layers_that_count() -> None:
    layers = [AdaLoraLinear(nn.Linear(5, 7), AdaLoRA(rank=3, target_rank=2)) for _ in range(2)]
    for layer, scores in zip(layers, ([5.0, 1.0, 4.0], [2.0, 3.0, 0.0]), strict=True):
        layer.lora_e.data.fill_(1.0)
        layer.importance[:, 0] = torch.tensor(scores)
        layer.deviation.fill_(1.0)
    keep_most_important(layers, 3)
    assert [layer.lora_e.flatten().tolist() for layer in layers] == [[1.0, 0.0, 1.0], [0.0, 1.0, 0.0]]


def test_layers_cut_to_their_ranks_keep_their_scale_and_share_the_budget() -> None:
    options = AdaLoRA(rank=4, target_rank=2, alpha=6, rank_pattern={"0": 3, "1": 0}, targets="all-linear")
    model = lorica.adapt(nn.Sequential(nn.Linear(5, 7), nn.Linear(7, 7), nn.Linear(7, 5)), options)
    layers: Any = list(lorica.adapters(model).values())
    assert [layer.lora_e.numel() for layer in layers] == [3, 0, 4] and {layer.scale for layer in layers} == {1.5}
    for layer, scores in zip(layers, ([5.0, 1.0, 4.0], [], [2.0, 3.0, 0.0, 6.0]), strict=True):
        layer.lora_e.data.fill_(1.0)
        layer.importance[:, 0] = torch.tensor(scores)
        layer.deviation.fill_(1.0)
    keep_most_important(layers, 3)
    assert [layer.lora_e.flatten().tolist() for layer in layers] == [[1.0, 0.0, 1.0], [], [0.0, 0.0, 0.0, 1.0]]
    keep_most_important(layers, 100)
    model(torch.randn(2, 5)).sum().backward()
    for layer in layers:
        layer.observe(0.85)


def test_a_run_ends_at_its_target_and_the_final_part_settles_the_choice() -> None:
    torch.manual_seed(0)
    options = AdaLoRA(rank=4, target_rank=2, warmup=0.2, final=0.4, interval=2, targets="all-linear")
    model = lorica.adapt(nn.Sequential(nn.Linear(6, 8), nn.Linear(8, 5)), options)
    layers: Any = list(lorica.adapters(model).values())
    x, want = torch.randn(32, 6), torch.randn(32, 5)
    optimizer = torch.optim.AdamW(lorica.trainable_parameters(model).values(), lr=0.05)
    kept = []
    for step in range(1, 21):
        loss = (model(x) - want).square().mean()
        loss = loss + sum(layer.auxiliary_loss() for layer in layers)
        loss.backward()
        optimizer.step()
        options.after_step(model, step, 20)
        optimizer.zero_grad()
        kept.append(tuple(bool(e) for layer in layers for e in layer.lora_e.flatten()))
    # 8 triplets; from step 4, each second step to 12: 4 + int(4 (1 - t)^3) at t = 1/4, 1/2, 3/4, 1.
    assert [sum(mask) for mask in kept[:4]] == [8] * 4
    assert [sum(kept[step - 1]) for step in (6, 8, 10, 12)] == [5, 4, 4, 4]
    assert len(set(kept[11:])) == 1 and sum(kept[-1]) == 4


def test_the_auxiliary_loss_is_the_mean_distance_from_orthogonality() -> None:
    model = lorica.adapt(nn.Sequential(nn.Linear(6, 8), nn.Linear(8, 5)), AdaLoRA(rank=4, target_rank=2))
    layers: Any = list(lorica.adapters(model).values())
    one = torch.eye(4)
    distances = [(m - one).norm() ** 2 for a in layers for m in (a.lora_a @ a.lora_a.T, a.lora_b.T @ a.lora_b)]
    total = sum(layer.auxiliary_loss() for layer in layers)
    torch.testing.assert_close(total, 0.1 * torch.stack(distances).mean())
    for layer in layers:
        nn.init.orthogonal_(layer.lora_a)
        nn.init.orthogonal_(layer.lora_b)
    assert sum(layer.auxiliary_loss() for layer in layers) < 1e-8


def test_schedules_that_cannot_be_meant_are_refused() -> None:
    with pytest.raises(ConfigError, match="target_rank is 8"):
        AdaLoRA(rank=4)
    with pytest.raises(ConfigError, match="leave no step"):
        AdaLoRA(warmup=0.5, final=0.5)
