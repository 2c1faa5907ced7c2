"""`init: components`: each of HydraLoRA's heads starts from the first gradient of its own component of the data.

With all B = 0 the heads' gradients of a batch add up to s G A^T, where G [out, in] is that of the layer's weight: the
gates of a token sum to one. So one backward pass over some rows of each component alone gives s G_c A^T, over a base
of any kind, in less memory than a training step has; G_c itself is never made. Then

    B_c = -k (D_c - mean over c' of D_c'),    D_c = s G_c A^T / rms(s G_c A^T)

and the router starts at zero. The sign is that of a step downhill: for the tokens of component c the loss falls where
the gate of head c rises, so the router's first gradient already sends components to heads, which heads drawn at random
leave to chance. All D_c are of one length, so neither a large component nor one with a high loss wins. What is common
to all is taken off: it would change the output. k makes the heads as large as `init: random` does, so that the two
differ in direction alone.

What it gives up: a pass over `init_batches` batches of each component before the first step. A layer that no batch
reaches starts as with `init: zero`. Other gradients than the first are not looked at.

Shapes: lora_a [r, in], lora_b [out, N r], heads [N, out, r]; N heads for N components.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from lorica.errors import ConfigError, DivergedError
from lorica.methods.hydra_linear import HydraLinear, cancelling
from lorica.methods.method import StartBatches, StartLoss


def start_from_components(
    model: nn.Module, layers: Mapping[str, HydraLinear], loss_fn: StartLoss, batches: StartBatches
) -> None:
    """Start the heads of the fresh `layers` of `model`, which all have as many, from labelled batches.

    Args:
        batches: (inputs, targets, component), the components being numbered from 0, each with rows of one alone.

    Raises:
        ConfigError: the components of the batches are not as many as the heads.
        DivergedError: a gradient is not finite.
    """
    num_heads = next(iter(layers.values())).num_heads
    _check_labels(batches, num_heads)
    found = {name: torch.zeros_like(layer.heads()) for name, layer in layers.items()}
    with _only_heads_trained(model, layers):
        for component in range(num_heads):
            for inputs, targets, *label in batches:
                if label == [component]:
                    loss_fn(model, inputs, targets).backward()  # type: ignore[no-untyped-call]
            for name, layer in layers.items():
                if layer.lora_b.grad is not None:
                    gradient = layer.lora_b.grad.view(-1, num_heads, layer.rank).sum(1)
                    found[name][component] = -_of_unit_rms(gradient, name, component)
                layer.lora_b.grad = None
    for name, layer in layers.items():
        if bool(found[name].any()):
            layer.start_heads(cancelling(found.pop(name)))


def _of_unit_rms(gradient: Tensor, name: str, component: int) -> Tensor:
    rms = gradient.square().mean().sqrt()
    if not bool(rms.isfinite()):
        raise DivergedError(f"init components: the gradient of {name} is not finite on rows of component {component}.")
    return gradient / rms if rms > 0 else gradient


def _check_labels(batches: StartBatches, num_heads: int) -> None:
    if any(len(batch) != 3 for batch in batches):
        raise ConfigError(
            "init components: a batch is (inputs, targets, component), rows of one component with its number from 0."
        )
    labels = {batch[2] for batch in batches if len(batch) == 3}
    if labels != set(range(num_heads)):
        raise ConfigError(
            f"init components: num_heads is {num_heads}, and the batches are of the components "
            f"{', '.join(map(str, sorted(labels)))}; expected are some of each, numbered from 0 to {num_heads - 1}."
        )


@contextmanager
def _only_heads_trained(model: nn.Module, layers: Mapping[str, HydraLinear]) -> Iterator[None]:
    """Training mode, for activation checkpointing, without the adapters' dropout and load-balance loss."""
    before, trained = model.training, [p for p in model.parameters() if p.requires_grad]
    heads = {id(layer.lora_b) for layer in layers.values()}
    model.train()
    for layer in layers.values():
        layer.eval()
    for parameter in trained:
        parameter.requires_grad_(id(parameter) in heads)
    try:
        # The base's own dropout shall not move the run's generator.
        with torch.random.fork_rng():
            torch.manual_seed(0)
            yield
    finally:
        model.train(before)
        for parameter in trained:
            parameter.requires_grad_()
            parameter.grad = None
