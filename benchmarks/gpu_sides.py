"""The sides of benchmarks/gpu.py: the same LoRA step of the same base, by Lorica, by PEFT, and by PEFT with Liger.

A base is made on its device with random weights. In NF4 each linear layer but the head is quantised after it was made,
ours by Lorica and theirs by bitsandbytes, both with double quantisation.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from train_step import resident_bytes

SHAPES: dict[str, dict[str, Any]] = {
    "1b": {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "num_attention_heads": 32,
           "num_key_value_heads": 8, "head_dim": 64, "vocab_size": 128256, "tie_word_embeddings": True},
    "8b": {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32,
           "num_key_value_heads": 8, "vocab_size": 128256, "tie_word_embeddings": False},
    "tiny": {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 1, "num_attention_heads": 4,
             "num_key_value_heads": 2, "vocab_size": 256, "tie_word_embeddings": True},
}  # fmt: skip


@dataclass(frozen=True)
class Case:
    """One piece of work, the same for all sides. quant: nf4, or empty. lengths: tokens of each sample."""

    shape: str
    quant: str
    checkpointing: bool
    lengths: tuple[int, ...]

    @property
    def name(self) -> str:
        rows = f"{len(self.lengths)} x {max(self.lengths)}" if len(set(self.lengths)) == 1 else "uneven"
        return f"{self.shape} {self.quant or 'bf16'} {rows}" + (", checkpointing" if self.checkpointing else "")


def build(case: Case, device: str, ours: bool) -> Any:
    """The base on its device; in NF4, each linear layer but the head is quantised after it was made."""
    import torch
    from transformers import AutoModelForCausalLM, LlamaConfig

    torch.manual_seed(0)
    config = LlamaConfig(**SHAPES[case.shape], bos_token_id=0, eos_token_id=2, max_position_embeddings=8192)
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    if case.quant:
        for name, layer in list(model.named_modules()):
            if isinstance(layer, torch.nn.Linear) and name != "lm_head":
                model.set_submodule(name, (quantized_by_lorica if ours else quantized_by_bitsandbytes)(layer))
        model.is_loaded_in_4bit = not ours
    if ours:
        from lorica.models.load import equip

        equip(model)
    return model


def quantized_by_lorica(layer: Any) -> Any:
    from lorica.quant.linear import empty_like

    made = empty_like(layer, "nf4", double_quant=True)
    made.take({"weight": layer.weight})
    return made


def quantized_by_bitsandbytes(layer: Any) -> Any:
    import bitsandbytes as bnb
    import torch

    made = bnb.nn.Linear4bit(
        layer.in_features, layer.out_features, bias=False, compute_dtype=torch.bfloat16, compress_statistics=True,
        quant_type="nf4", device="meta",
    )  # fmt: skip
    weight = layer.weight.detach()
    made.weight = bnb.nn.Params4bit(
        weight.cpu(), requires_grad=False, compress_statistics=True, quant_type="nf4", module=made
    )
    return made.to(weight.device)


def dataset_of(case: Case) -> Any:
    import numpy as np

    from lorica.data.tokenized import TokenizedDataset

    random, vocabulary = np.random.default_rng(1), SHAPES[case.shape]["vocab_size"]
    rows = (random.integers(3, vocabulary, n).astype(np.int32) for n in case.lengths)
    return TokenizedDataset.from_samples([(row, row) for row in rows])


def prepare_lorica(case: Case, device: str) -> Callable[[], float]:
    import numpy as np

    import lorica
    from lorica.data.packing import ROUND_TO, pack
    from lorica.models.loss import make_loss
    from lorica.training.offload import checkpoint_layers
    from lorica.training.optim import make_optimizer

    model = build(case, device, ours=True)
    lorica.adapt(model, lorica.LoRA(rank=16, alpha=32, targets="all-linear"))
    checkpoint_layers(model, case.checkpointing)
    loss_of = make_loss(model.train())
    trained = lorica.trainable_parameters(model)
    optimizer = make_optimizer(trained, lr=1e-3, betas=(0.9, 0.999), epsilon=1e-8, weight_decay=0.01)
    batch = pack(dataset_of(case), np.arange(len(case.lengths)), ROUND_TO)
    on_device = batch.to(device)

    def step() -> float:
        loss = loss_of(model, on_device.model_inputs(), batch.targets) / batch.num_targets
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.item()

    return step


def prepare_peft(case: Case, device: str) -> Callable[[], float]:
    import numpy as np
    import torch
    from peft import LoraConfig, get_peft_model

    from lorica.data.packing import pad

    model = build(case, device, ours=False)
    model.config.use_cache = False
    adapted = get_peft_model(
        model, LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM")
    ).train()
    if case.checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    optimizer = torch.optim.AdamW([p for p in adapted.parameters() if p.requires_grad], lr=1e-3, fused=True)
    batch = pad(dataset_of(case), np.arange(len(case.lengths)), 0)
    ids, mask = batch.input_ids.to(device), batch.attention_mask.to(device)
    arguments = {"input_ids": ids, "labels": ids.masked_fill(mask == 0, -100)}
    # Without padding the mask is left out, with which PEFT's side would take a slower kernel.
    arguments |= {} if bool((mask == 1).all()) else {"attention_mask": mask}

    def step() -> float:
        loss = adapted(**arguments).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.item()

    return step


def prepare_liger(case: Case, device: str) -> Callable[[], float]:
    from liger_kernel.transformers import apply_liger_kernel_to_llama

    apply_liger_kernel_to_llama()
    return prepare_peft(case, device)


SIDES = {"lorica": prepare_lorica, "peft": prepare_peft, "liger": prepare_liger}


def run_side(side: str, case: Case, device: str, steps: int) -> dict[str, Any]:
    """Seconds of each step but two that warm up, the losses, and the peak of memory over the steps."""
    import torch

    step = SIDES[side](case, device)
    is_cuda = torch.device(device).type == "cuda"
    losses, seconds = [], []
    if is_cuda:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    for _ in range(steps + 2):
        begin = time.perf_counter()
        losses.append(step())  # reading the loss waits for the device
        seconds.append(time.perf_counter() - begin)
    peak = torch.cuda.max_memory_allocated() if is_cuda else resident_bytes("VmHWM")
    return {"seconds": seconds[2:], "losses": losses, "peak": peak}


def predicted_bytes(case: Case, device: str) -> int:
    """What `lorica plan` says for this case: tensors that live at the worst moment of a step."""
    import torch
    from transformers import LlamaConfig

    import lorica
    from lorica.training.rehearsal import rehearse

    config = LlamaConfig(**SHAPES[case.shape], bos_token_id=0, eos_token_id=2, max_position_embeddings=8192)
    found = rehearse(
        config, lorica.LoRA(rank=16, alpha=32, targets="all-linear"), dtype=torch.bfloat16, lengths=case.lengths,
        device=device, activation_checkpointing=case.checkpointing, quant=case.quant or None,
    )  # fmt: skip
    return found.live_bytes
