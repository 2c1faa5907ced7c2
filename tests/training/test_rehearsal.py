"""The rehearsal against closed forms: bytes of every part, activations counted by hand, floating-point operations."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers import LlamaConfig

from lorica.data.packing import ROUND_TO
from lorica.errors import TargetError
from lorica.kernels.linear import cpu_computes
from lorica.methods.attach import adapt, trainable_parameters
from lorica.methods.lora import LoRA
from lorica.training.rehearsal import RUNTIME_BYTES, RUNTIME_BYTES_16_BIT, Rehearsal, example_batch, rehearse


@pytest.fixture
def rehearsed(tiny_llama: Callable[..., Any]) -> Callable[..., Rehearsal]:
    config: LlamaConfig = tiny_llama().config

    def run(options: LoRA | None = None, **changes: Any) -> Rehearsal:
        arguments: dict[str, Any] = {"dtype": torch.float32, "lengths": [16, 16, 7], **changes}
        return rehearse(config, options or LoRA(rank=4), **arguments)

    return run


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_parts_in_closed_form(
    rehearsed: Callable[..., Rehearsal], tiny_llama: Callable[..., Any], dtype: torch.dtype
) -> None:
    found = rehearsed(dtype=dtype, num_micro_batches=2)
    model = tiny_llama()
    buffers = sum(b.numel() * b.element_size() for b in model.buffers())
    num_base = sum(p.numel() for p in model.parameters())
    trained = trainable_parameters(adapt(model, LoRA(rank=4)))
    num_trained = sum(p.numel() for p in trained.values())
    assert (found.num_parameters, found.num_trainable) == (num_base + num_trained, num_trained)
    assert found.parts.weights == num_base * dtype.itemsize + buffers
    assert found.parts.adapter == found.parts.gradients == 4 * num_trained
    # AdamW counts its steps in one float32 a tensor.
    assert found.parts.optimizer == 8 * num_trained + 4 * len(trained)
    assert found.num_tokens == 39
    runtime = RUNTIME_BYTES_16_BIT if dtype == torch.bfloat16 and cpu_computes(dtype) else RUNTIME_BYTES
    # The rest is holes, and each of some thousand small tensors is rounded up to 64 bytes.
    assert 0 <= found.overhead - runtime < 0.35 * found.live_bytes
    assert found.peak_bytes == found.live_bytes + found.overhead


def test_gradients_do_not_wait_from_step_to_step(rehearsed: Callable[..., Rehearsal]) -> None:
    once, accumulated = rehearsed(num_micro_batches=1), rehearsed(num_micro_batches=2)
    assert once.parts.gradients < accumulated.parts.gradients


def flops(found: Rehearsal) -> int:
    return sum(operation.flops * count for operation, count in found.work.items())


def test_checkpointing_keeps_less_and_works_more(rehearsed: Callable[..., Rehearsal]) -> None:
    plain, checkpointed = (rehearsed(lengths=[64] * 4, activation_checkpointing=c) for c in (False, True))
    assert checkpointed.parts.activations < plain.parts.activations / 2 and checkpointed.live_bytes < plain.live_bytes

    assert 1.2 * flops(plain) < flops(checkpointed) < 1.6 * flops(plain)


def test_activations_grow_with_the_tokens(rehearsed: Callable[..., Rehearsal]) -> None:
    one, two = rehearsed(lengths=[64] * 2), rehearsed(lengths=[64] * 4)
    assert two.parts.activations == pytest.approx(2 * one.parts.activations, rel=0.02)


def test_untrained_tokens_skip_the_head(rehearsed: Callable[..., Rehearsal]) -> None:
    everything, half = (rehearsed(lengths=[64] * 4, trained_fraction=f) for f in (1.0, 0.5))
    assert flops(half) < flops(everything)
    batch = example_batch([64, 32], trained_fraction=0.25)
    # A quarter of 96 tokens; the first token of a sample is never a target.
    assert abs(batch.num_targets - 24) <= 2 and batch.num_tokens == 96


def test_padded_batches_pay_for_their_padding(rehearsed: Callable[..., Rehearsal]) -> None:
    packed, padded = (rehearsed(lengths=[64] + [4] * 16, padded=p) for p in (False, True))
    assert packed.num_tokens == padded.num_tokens == 128 and padded.parts.activations > 2 * packed.parts.activations


def test_large_tensors_leave_no_holes(rehearsed: Callable[..., Rehearsal]) -> None:
    one, two = rehearsed(lengths=[64] * 2), rehearsed(lengths=[64] * 512)
    # 32,768 tokens: the activations of the second are MiB each.
    assert two.live_bytes - one.live_bytes > 10 * (two.overhead - one.overhead)


def test_batches_are_rounded_as_in_training() -> None:
    batch = example_batch([50, 40])
    assert batch.input_ids.shape == (1, 2 * ROUND_TO) and batch.num_tokens == 90


def test_nothing_outside_is_touched(tiny_llama: Callable[..., Any]) -> None:
    config = tiny_llama().config
    before, described = torch.get_rng_state(), config.to_dict()
    rehearse(config, LoRA(rank=2, dropout=0.1), dtype=torch.bfloat16, lengths=[8])
    assert torch.equal(torch.get_rng_state(), before) and config.to_dict() == described
    assert torch.get_default_dtype() == torch.float32 and type(torch.zeros(1)) is torch.Tensor


def test_targets_that_match_nothing(rehearsed: Callable[..., Rehearsal]) -> None:
    with pytest.raises(TargetError, match="no_such"):
        rehearsed(LoRA(targets=("no_such",)))
