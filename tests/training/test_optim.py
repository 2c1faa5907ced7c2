from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from lorica.errors import CheckpointError
from lorica.training.optim import clip_gradients, load_optimizer_tensors, make_optimizer, optimizer_tensors


def make_parameters() -> dict[str, nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    return {
        "matrix": nn.Parameter(torch.randn(3, 4, generator=generator)),
        "vector": nn.Parameter(torch.randn(4, generator=generator)),
        "unused": nn.Parameter(torch.randn(2, 2, generator=generator)),
    }


def make_adamw(parameters: dict[str, nn.Parameter]) -> torch.optim.AdamW:
    return make_optimizer(parameters, lr=0.1, betas=(0.9, 0.99), epsilon=1e-8, weight_decay=0.5)


def step(parameters: dict[str, nn.Parameter], optimizer: torch.optim.AdamW, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for name in ("matrix", "vector"):
        parameters[name].grad = torch.randn(parameters[name].shape, generator=generator)
    optimizer.step()


def test_first_step_follows_the_paper_and_decays_matrices_only() -> None:
    parameters = make_parameters()
    before = {name: p.detach().double().clone() for name, p in parameters.items()}
    step(parameters, make_adamw(parameters), seed=1)
    for name, decay in (("matrix", 0.5), ("vector", 0.0)):
        gradient = parameters[name].grad
        assert gradient is not None
        # Bias correction makes the first step lr * g / (|g| + epsilon), after theta <- theta (1 - lr * decay).
        expected = before[name] * (1 - 0.1 * decay) - 0.1 * gradient.double() / (gradient.double().abs() + 1e-8)
        torch.testing.assert_close(parameters[name].double(), expected, rtol=1e-5, atol=1e-6)


def test_restored_state_continues_bit_for_bit() -> None:
    straight = make_parameters()
    optimizer = make_adamw(straight)
    step(straight, optimizer, seed=1)
    saved = {name: tensor.clone() for name, tensor in optimizer_tensors(optimizer, straight).items()}
    resumed = {name: nn.Parameter(p.detach().clone()) for name, p in straight.items()}
    again = make_adamw(resumed)
    load_optimizer_tensors(again, resumed, saved)
    for seed in (2, 3):
        step(straight, optimizer, seed)
        step(resumed, again, seed)
    assert all(torch.equal(straight[name], resumed[name]) for name in straight)
    assert sorted(saved) == [
        f"{n}.{m}" for n in ("matrix", "unused", "vector") for m in ("exp_avg", "exp_avg_sq", "step")
    ]


def test_state_that_does_not_fit_lists_every_fault_and_changes_nothing() -> None:
    parameters = make_parameters()
    optimizer = make_adamw(parameters)
    state = {
        "matrix.step": torch.tensor(1.0),
        "matrix.exp_avg": torch.zeros(3, 5),
        "matrix.exp_avg_sq": torch.zeros(3, 4),
        "vector.step": torch.tensor(1.0),
        "stranger.exp_avg": torch.zeros(1),
    }
    with pytest.raises(CheckpointError) as caught:
        load_optimizer_tensors(optimizer, parameters, state)
    for fault in ("matrix.exp_avg has shape [3, 5]", "vector.exp_avg is missing", "stranger.exp_avg belongs to no"):
        assert fault in str(caught.value)
    assert all(not moment.any() for moment in optimizer_tensors(optimizer, parameters).values())


@pytest.mark.parametrize(("max_norm", "factor"), [(6.5, 0.5), (0.0, 1.0), (20.0, 1.0)])
def test_clipping_scales_all_gradients_together(max_norm: float, factor: float) -> None:
    parameters = make_parameters()
    parameters["matrix"].grad = torch.full((3, 4), 5.0) * torch.eye(3, 4)
    parameters["vector"].grad = torch.tensor([0.0, 0.0, math.sqrt(94.0), 0.0])
    norm = clip_gradients(parameters.values(), max_norm)
    assert norm.item() == pytest.approx(13.0)
    assert parameters["vector"].grad is not None
    assert parameters["vector"].grad[2].item() == pytest.approx(factor * math.sqrt(94.0), rel=1e-5)


@pytest.mark.parametrize("value", [math.inf, math.nan])
def test_a_gradient_that_is_no_number_shows_in_the_norm(value: float) -> None:
    parameters = make_parameters()
    parameters["vector"].grad = torch.tensor([1.0, value, 0.0, 0.0])
    assert not math.isfinite(clip_gradients(parameters.values(), 1.0).item())


def test_without_gradients_the_norm_is_zero() -> None:
    assert clip_gradients(make_parameters().values(), 1.0).item() == 0.0
