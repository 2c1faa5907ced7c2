"""AdamW over named parameters, its state as plain named tensors, and gradient clipping.

torch's own `state_dict` numbers the parameters and asks for pickle. Here the state is `<parameter name>.<moment>` ->
tensor, which fits a safetensors file, survives another order of the parameters and shows what belongs to what.

Decoupled weight decay: Loshchilov and Hutter, 2019 (arXiv 1711.05101).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn

from lorica.errors import CheckpointError

MOMENTS = ("step", "exp_avg", "exp_avg_sq")


def make_optimizer(
    parameters: Mapping[str, nn.Parameter],
    *,
    lr: float,
    betas: tuple[float, float],
    epsilon: float,
    weight_decay: float,
) -> torch.optim.AdamW:
    """AdamW, fused where the device has it. Vectors (biases, norms, gates) are never decayed.

    The moments exist from the start: made after the first step, as torch does it, they settle in the holes that its
    activations left, and the next step's no longer fit there (0.3 GB of 3.5 in a model of 30 layers).
    """
    groups = [
        {"params": [p for p in parameters.values() if p.ndim > 1], "weight_decay": weight_decay},
        {"params": [p for p in parameters.values() if p.ndim <= 1], "weight_decay": 0.0},
    ]
    fused = all(p.device.type in ("cpu", "cuda") for p in parameters.values())
    optimizer = torch.optim.AdamW([g for g in groups if g["params"]], lr=lr, betas=betas, eps=epsilon, fused=fused)
    for parameter in parameters.values():
        optimizer.state[parameter] = {
            "step": torch.zeros((), dtype=torch.float32, device=parameter.device if fused else "cpu"),
            "exp_avg": torch.zeros_like(parameter),
            "exp_avg_sq": torch.zeros_like(parameter),
        }
    return optimizer


def optimizer_tensors(optimizer: torch.optim.AdamW, parameters: Mapping[str, nn.Parameter]) -> dict[str, Tensor]:
    """The optimizer's state, `<name>.exp_avg` and so on."""
    return {
        f"{name}.{moment}": optimizer.state[parameter][moment]
        for name, parameter in parameters.items()
        for moment in MOMENTS
    }


def load_optimizer_tensors(
    optimizer: torch.optim.AdamW, parameters: Mapping[str, nn.Parameter], tensors: Mapping[str, Tensor]
) -> None:
    """Put back what `optimizer_tensors` gave, on each parameter's device.

    Raises:
        CheckpointError: a tensor of no parameter, a missing moment, or another shape; lists them all, changes nothing.
    """
    owners = {name: {m: tensors[f"{name}.{m}"] for m in MOMENTS if f"{name}.{m}" in tensors} for name in parameters}
    known = {f"{name}.{moment}" for name in parameters for moment in MOMENTS}
    faults = [f"{key} belongs to no parameter of this model" for key in sorted(tensors.keys() - known)]
    for name, state in owners.items():
        faults += [f"{name}.{moment} is missing" for moment in MOMENTS if state and moment not in state]
        faults += [
            f"{name}.{moment} has shape {list(value.shape)}, its parameter {list(parameters[name].shape)}"
            for moment, value in state.items()
            if moment != "step" and value.shape != parameters[name].shape
        ]
    if faults:
        raise CheckpointError("The optimizer's state does not fit this model:\n  " + "\n  ".join(faults))
    for name, state in owners.items():
        if state:
            device = parameters[name].device
            optimizer.state[parameters[name]] = {m: value.to(device, copy=True) for m, value in state.items()}


def clip_gradients(parameters: Iterable[nn.Parameter], max_norm: float) -> Tensor:
    """Scale all gradients down together so that their norm is at most `max_norm`; 0 only measures.

    Returns:
        The norm before scaling: float32 scalar ON THE DEVICE, so that nobody waits for it here. Infinite or NaN
        gradients give such a norm and are then worthless; the caller looks before it steps.
    """
    gradients = [p.grad for p in parameters if p.grad is not None]
    norm = torch.nn.utils.get_total_norm(gradients).float()
    if max_norm > 0 and gradients:
        scale = (max_norm / (norm + 1e-6)).clamp(max=1.0)
        torch._foreach_mul_(gradients, scale)
    return norm
