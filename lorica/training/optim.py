"""AdamW over named parameters, its state as plain named tensors, and gradient clipping.

torch's own `state_dict` numbers the parameters and asks for pickle. Here the state is `<parameter name>.<moment>` ->
tensor, which fits a safetensors file, survives another order of the parameters and shows what belongs to what.

Decoupled weight decay: Loshchilov and Hutter, 2019 (arXiv 1711.05101). Learning rates that differ by a factor:
LoRA+ (arXiv 2402.12354).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn

from lorica.errors import CheckpointError
from lorica.training.moments import ABSMAX, MOMENTS, num_blocks, saved_moment
from lorica.training.paged import PagedAdamW, Tiers
from lorica.training.tensor_file import layout_of


def make_optimizer(
    parameters: Mapping[str, nn.Parameter],
    *,
    lr: float,
    betas: tuple[float, float],
    epsilon: float,
    weight_decay: float,
    lr_factors: Mapping[str, float] | None = None,
    bits: int = 32,
    tiers: Tiers = Tiers(),  # noqa: B008
) -> torch.optim.AdamW:
    """AdamW, fused where the device has it. Vectors (biases, norms, gates) are never decayed.

    With `bits` 8, or where the moments do not fit into `tiers.device`, it is a `PagedAdamW`, which may raise.

    `lr_factors` names the parameters that learn at `lr` times a factor; each group has its own as `lr_factor`.

    The moments exist from the start: made after the first step, as torch does it, they settle in the holes that its
    activations left, and the next step's no longer fit there (0.3 GB of 3.5 in a model of 30 layers).
    """
    groups: dict[tuple[bool, float], list[nn.Parameter]] = {}
    for name, p in parameters.items():
        groups.setdefault((p.ndim > 1, (lr_factors or {}).get(name, 1.0)), []).append(p)
    torch_groups = [
        {"params": group, "weight_decay": weight_decay if is_matrix else 0.0, "lr_factor": factor}
        for (is_matrix, factor), group in groups.items()
    ]
    num_bytes = 2 * sum(p.nbytes for p in parameters.values())
    if bits == 8 or (tiers.device is not None and num_bytes > tiers.device):
        paged = PagedAdamW(torch_groups, lr=lr, betas=betas, eps=epsilon, bits=bits, tiers=tiers)
        set_learning_rate(paged, lr)
        return paged
    fused = all(p.device.type in ("cpu", "cuda") for p in parameters.values())
    optimizer = torch.optim.AdamW(torch_groups, lr=lr, betas=betas, eps=epsilon, fused=fused)
    set_learning_rate(optimizer, lr)
    for parameter in parameters.values():
        optimizer.state[parameter] = {
            "step": torch.zeros((), dtype=torch.float32, device=parameter.device if fused else "cpu"),
            "exp_avg": torch.zeros_like(parameter),
            "exp_avg_sq": torch.zeros_like(parameter),
        }
    return optimizer


def set_learning_rate(optimizer: torch.optim.AdamW, lr: float) -> None:
    """Give every group `lr` times its factor."""
    for group in optimizer.param_groups:
        group["lr"] = lr * group["lr_factor"]


def forget_moments(optimizer: torch.optim.AdamW, parameters: Iterable[nn.Parameter]) -> None:
    """Set the state of `parameters` to what it was before the first step, in place."""
    if isinstance(optimizer, PagedAdamW):
        return optimizer.forget(parameters)
    for parameter in parameters:
        for tensor in optimizer.state[parameter].values():
            tensor.zero_()


def held_tensors(optimizer: torch.optim.AdamW) -> list[Tensor]:
    """What the optimizer holds on the device between steps."""
    if isinstance(optimizer, PagedAdamW):
        return optimizer.held_tensors()
    return [tensor for state in optimizer.state.values() for tensor in state.values()]


def num_paged_bytes(optimizer: torch.optim.AdamW) -> int:
    """Bytes of moments that do not live on the device."""
    return optimizer.num_paged_bytes if isinstance(optimizer, PagedAdamW) else 0


def optimizer_tensors(optimizer: torch.optim.AdamW, parameters: Mapping[str, nn.Parameter]) -> Mapping[str, Tensor]:
    """The optimizer's state, `<name>.exp_avg` and so on; what is paged is read when it is asked for."""
    if isinstance(optimizer, PagedAdamW):
        return optimizer.tensors(parameters)
    return {
        f"{name}.{key}": optimizer.state[parameter][key]
        for name, parameter in parameters.items()
        for key in ("step", *MOMENTS)
    }


def load_optimizer_tensors(
    optimizer: torch.optim.AdamW, parameters: Mapping[str, nn.Parameter], tensors: Mapping[str, Tensor]
) -> None:
    """Put back what `optimizer_tensors` gave, of this optimizer or of one of other bits, on each parameter's device.

    Raises:
        CheckpointError: a tensor of no parameter, a missing moment, or another shape; lists them all, changes nothing.
    """
    faults = _faults(parameters, tensors)
    if faults:
        raise CheckpointError("The optimizer's state does not fit this model:\n  " + "\n  ".join(faults))
    if isinstance(optimizer, PagedAdamW):
        return optimizer.load(parameters, tensors)
    for name, parameter in parameters.items():
        if f"{name}.step" in tensors:
            state = optimizer.state[parameter]
            state["step"] = tensors[f"{name}.step"].to(state["step"].device, copy=True)
            for moment in MOMENTS:
                values = saved_moment(tensors, name, moment, 0, parameter.numel())
                state[moment] = values.view(parameter.shape).to(parameter.device, copy=True)


def _faults(parameters: Mapping[str, nn.Parameter], tensors: Mapping[str, Tensor]) -> list[str]:
    """What does not fit, a sentence each."""
    expected: dict[str, torch.Size] = {}
    known = set()
    for name, parameter in parameters.items():
        own = {f"{name}.step": torch.Size()} | {f"{name}.{moment}": parameter.shape for moment in MOMENTS}
        scales = {f"{name}.{moment}{ABSMAX}": torch.Size([num_blocks(parameter.numel())]) for moment in MOMENTS}
        known |= own.keys() | scales.keys()
        if not tensors.keys().isdisjoint(own.keys() | scales.keys()):
            expected |= own
            expected |= {
                key: size
                for key, size in scales.items()
                if key in tensors or _is_coded(tensors, key.removesuffix(ABSMAX))
            }
    faults = [f"{key} belongs to no parameter of this model" for key in sorted(tensors.keys() - known)]
    faults += [f"{key} is missing" for key in expected if key not in tensors]
    faults += [
        f"{key} has shape {list(layout_of(tensors, key).shape)}, for its parameter it should be {list(shape)}"
        for key, shape in expected.items()
        if key in tensors and layout_of(tensors, key).shape != shape
    ]
    return faults


def _is_coded(tensors: Mapping[str, Tensor], key: str) -> bool:
    return key in tensors and not layout_of(tensors, key).dtype.is_floating_point


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
