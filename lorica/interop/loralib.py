"""loralib's state dicts (microsoft/LoRA 0.1.2, the code of arXiv 2106.09685) as low-rank pairs.

    <module>.lora_A [r, in]       <module>.lora_B [out, r]              Linear; Embedding with in = vocabulary
    <module>.lora_A [G r, in]     <module>.lora_B [G out / n, r]        MergedLinear, G of n parts enabled

The state holds neither alpha, nor what kind of module a pair belongs to, nor which parts are enabled: the caller says
it. MergedLinear (GPT-2's `c_attn`, whose outputs are q, k and v side by side) has a pair for each enabled part; they
become one pair of rank G r with B block-diagonal, and zeros where a part is not enabled.

What it gives up: loralib's convolutions, whose product is reshaped to the kernel, and its trained biases. It reads
tensors, not files: loralib's .pt files are pickles, and Lorica reads none.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from lorica.errors import AdapterError
from lorica.interop.arithmetic import LowRank


def read_loralib(
    state: Mapping[str, Tensor], *, alpha: float, rank: int | None = None, enabled: Mapping[str, Sequence[bool]] = {}
) -> dict[str, LowRank]:
    """The pairs of what `loralib.lora_state_dict(model)` gave, by module.

    Args:
        alpha: loralib's `lora_alpha`; the scale is alpha / r.
        rank: loralib's `r`, to be checked; None: as the tensors have it.
        enabled: the `enable_lora` of each MergedLinear, by its name or the tail of it.

    Raises:
        AdapterError: a tensor that is no half of a pair, or shapes that do not fit; the message lists every fault.
    """
    halves: dict[str, dict[str, Tensor]] = {}
    faults, pairs = [], {}
    for key, tensor in state.items():
        name, _, half = key.rpartition(".")
        if name and half in ("lora_A", "lora_B") and tensor.dim() == 2:
            halves.setdefault(name, {})[half] = tensor.detach().float()
        else:
            faults.append(f"{key} {list(tensor.shape)} is neither lora_A nor lora_B of a matrix")
    for name, found in halves.items():
        if len(found) < 2:
            faults.append(f"{name} has only {next(iter(found))}")
            continue
        a, b = found["lora_A"], found["lora_B"]
        flags = next((v for k, v in enabled.items() if f".{name}".endswith(f".{k}")), ())
        r, parts = b.shape[1], sum(flags)
        if rank not in (None, r):
            faults.append(f"{name} has rank {r}, expected {rank}")
        elif not flags and a.shape[0] == r:
            pairs[name] = LowRank(a, b, alpha / r)
        elif parts and a.shape[0] == parts * r and b.shape[0] % parts == 0:
            pairs[name] = LowRank(a, _block_diagonal(b, flags), alpha / r)
        else:
            faults.append(
                f"{name}: lora_A {list(a.shape)} and lora_B {list(b.shape)} are no pair"
                f"{f' with {parts} of {len(flags)} parts enabled' if flags else '; is it a MergedLinear?'}"
            )
    if not halves:
        faults.append("there is no lora_A in it")
    if faults:
        raise AdapterError("The loralib state cannot be used:\n  " + "\n  ".join(faults[:10]))
    return pairs


def _block_diagonal(b: Tensor, enabled: Sequence[bool]) -> Tensor:
    """[G out / n, r] as [out, G r]: a block for each enabled part, at that part's rows."""
    diagonal: Tensor = torch.block_diag(*b.chunk(sum(enabled)))  # type: ignore[no-untyped-call]
    blocks = iter(diagonal.chunk(sum(enabled)))
    zeros = b.new_zeros(b.shape[0] // sum(enabled), b.shape[1] * sum(enabled))
    return torch.cat([next(blocks) if on else zeros for on in enabled])
