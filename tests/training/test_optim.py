from __future__ import annotations

import math

import pytest
import torch
from torch import nn

import lorica
from lorica.errors import CheckpointError
from lorica.methods.attach import lr_factors
from lorica.methods.dora import DoRA
from lorica.methods.lora import LoRA
from lorica.training.optim import (
    clip_gradients,
    forget_moments,
    load_optimizer_tensors,
    make_optimizer,
    optimizer_tensors,
    set_learning_rate,
)
from tests.interop.small_models import llama


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


def test_a_factor_is_a_group_of_its_own_and_each_follows_adamw() -> None:
    """LoRA+, against the update written out in float64, over steps whose learning rate changes."""
    parameters = make_parameters()
    optimizer = make_optimizer(
        parameters, lr=0.1, betas=(0.9, 0.99), epsilon=1e-8, weight_decay=0.5, lr_factors={"matrix": 16.0}
    )
    names = {id(p): name for name, p in parameters.items()}
    groups = {names[id(p)]: (g["lr"], g["weight_decay"]) for g in optimizer.param_groups for p in g["params"]}
    assert groups == {"matrix": (1.6, 0.5), "unused": (0.1, 0.5), "vector": (0.1, 0.0)}
    want = {name: parameters[name].detach().double().clone() for name in ("matrix", "vector")}
    moments = {name: (torch.zeros_like(w), torch.zeros_like(w)) for name, w in want.items()}
    for number, lr in enumerate((0.1, 0.07, 0.02), start=1):
        set_learning_rate(optimizer, lr)
        step(parameters, optimizer, seed=number)
        for name, (m, v) in moments.items():
            gradient, rate = parameters[name].grad, lr * (16.0 if name == "matrix" else 1.0)
            assert gradient is not None
            m.mul_(0.9).add_(0.1 * gradient.double())
            v.mul_(0.99).add_(0.01 * gradient.double() ** 2)
            direction = (m / (1 - 0.9**number)) / ((v / (1 - 0.99**number)).sqrt() + 1e-8)
            want[name] = want[name] * (1 - rate * (0.5 if name == "matrix" else 0.0)) - rate * direction
    for name, value in want.items():
        torch.testing.assert_close(parameters[name].double(), value, rtol=1e-4, atol=1e-5)


def test_forgotten_moments_are_those_before_the_first_step() -> None:
    parameters, fresh = make_parameters(), make_parameters()
    optimizer = make_adamw(parameters)
    step(parameters, optimizer, seed=1)
    vector = {k: v.clone() for k, v in optimizer.state[parameters["vector"]].items()}
    forget_moments(optimizer, [parameters["matrix"]])
    found, expected = (optimizer_tensors(o, p) for o, p in ((optimizer, parameters), (make_adamw(fresh), fresh)))
    assert all(torch.equal(found[f"matrix.{m}"], expected[f"matrix.{m}"]) for m in ("step", "exp_avg", "exp_avg_sq"))
    assert all(torch.equal(optimizer.state[parameters["vector"]][k], v) for k, v in vector.items())


def test_lora_plus_speeds_up_what_pefts_does() -> None:
    peft = pytest.importorskip("peft")
    from peft.optimizers import create_loraplus_optimizer

    targets = ["q_proj", "down_proj"]
    theirs = peft.get_peft_model(llama(), peft.LoraConfig(r=2, target_modules=targets))
    names = {id(p): name for name, p in theirs.named_parameters()}
    optimizer = create_loraplus_optimizer(theirs, torch.optim.AdamW, lr=0.1, loraplus_lr_ratio=16)
    expected = {names[id(p)]: group["lr"] for group in optimizer.param_groups for p in group["params"]}

    model = lorica.adapt(llama(), LoRA(rank=2, lr_ratio=16.0, targets=(*targets, "embed_tokens")))
    parameters = lorica.trainable_parameters(model)
    ours = make_optimizer(
        parameters, lr=0.1, betas=(0.9, 0.99), epsilon=1e-8, weight_decay=0.0, lr_factors=lr_factors(model)
    )
    names = {id(p): name for name, p in parameters.items()}
    found = {names[id(p)]: group["lr"] for group in ours.param_groups for p in group["params"]}
    # On an embedding A is what starts at zero; PEFT gives both 1e-6.
    assert {found.pop(f"model.embed_tokens.lora_{half}") for half in "ab"} == {0.1}
    assert found == {
        name.removeprefix("base_model.model.").replace("lora_A.default.weight", "lora_a")
        .replace("lora_B.default.weight", "lora_b"): lr
        for name, lr in expected.items()
    }  # fmt: skip
    assert set(found.values()) == {0.1, 1.6}


def test_the_ratio_is_for_every_b_of_the_low_rank_family() -> None:
    dora = lr_factors(lorica.adapt(llama(), DoRA(rank=2, targets="q_proj", lr_ratio=4.0)))
    assert dora == {f"model.layers.{i}.self_attn.q_proj.lora_b": 4.0 for i in range(2)}
    attention = nn.Sequential(nn.MultiheadAttention(8, 2))
    found = lr_factors(lorica.adapt(attention, LoRA(rank=2, targets="0", lr_ratio=4.0)))
    assert found == {"0.lora_b.in_proj_weight": 4.0, "0.lora_b.out_proj_weight": 4.0}
