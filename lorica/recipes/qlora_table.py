"""`lorica plan --qlora-table`: the memory that the QLoRA paper gives for LLaMA of 7 to 65B, beside our prediction.

From the four architectures alone: no weights, no data, no GPU, no network. A step is rehearsed as any run's is
(`training/deep.py`), so this is also the proof of `lorica plan` on sizes that no test can run.

The paper (arXiv 2305.14314) gives totals in Figure 6, for a batch of one sequence of 512 tokens, and of the 7B model in
Section 3 the base, 5,048 MB, and LoRA weights "equivalent to commonly used 0.2 %" of the parameters: 26 MB, which are
0.2 % of 6.74 G in two bytes. Its totals are those of the LoRA that Section 4 trains, r = 64 on all linear layers, 24
times as many: base and 12 bytes for each of these, 2 of weights, 2 of gradients and 8 of moments, come within 0.9 to
1.4 GB of all four. What it gives up: that rest is not ours to know; 32-bit embeddings and the CUDA context are of that
size. And the reading of the 26 MB and of the rank is an inference from these sums.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from transformers import LlamaConfig

from lorica.methods.lora import LoRA
from lorica.recipes import console
from lorica.training.deep import rehearse_deep
from lorica.training.rehearsal import Parts

LENGTH, RANK = 512, 64

PAPER = {
    # name: (hidden size, intermediate size, layers, heads), GB of Figure 6
    "7B": ((4096, 11008, 32, 32), 6.9),
    "13B": ((5120, 13824, 40, 40), 11.3),
    "33B": ((6656, 17920, 60, 52), 24.7),
    "65B": ((8192, 22016, 80, 64), 45.0),
}
_NOTES = (
    f"One sequence of {LENGTH} tokens, activation checkpointing, NF4 with double quantisation, bfloat16, LoRA of rank "
    f"{RANK} on all linear layers: what the paper (arXiv 2305.14314) trains. Tensors of one card; GB are 10^9 bytes.",
    "Why ours differ. More: adapter and gradients in float32, 8 bytes a trained parameter instead of 4. Less: for 7B "
    "the paper counts 5.0 GB of base, and 4.127 bits a weight with embeddings and head in bfloat16 are 3.9; and the "
    "CUDA context of some 0.5 GB is not among tensors.",
    "`paged`: with AdamW's moments in host memory or on disk (train.optimizer_memory), but for two buffers.",
)
_BUFFERS = 64 << 20
_PARTS = ("base", "adapter", "gradients", "optimizer", "activations", "rest")


@dataclass(frozen=True)
class Row:
    """One model: the parts at the peak in bytes, their sum, the same with paged moments, and the paper's figure."""

    model: str
    parts: Parts
    peak_bytes: int
    paged_bytes: int
    paper_bytes: int
    trained_parameters: int

    @property
    def ratio(self) -> float:
        """Ours by the paper's."""
        return self.peak_bytes / self.paper_bytes


def qlora_table() -> list[Row]:
    """Predict what the paper's four runs need, and print it beside the paper's figures."""
    rows = [_row(name) for name in PAPER]
    heads = ["model", *_PARTS, "ours", "paged", "paper", "ratio"]
    cells = [
        (row.model, *map(_gb, row.parts), _gb(row.peak_bytes), _gb(row.paged_bytes), _gb(row.paper_bytes, 1),
         f"{row.ratio:.2f}")
        for row in rows
    ]  # fmt: skip
    console.table("QLoRA on one card, in GB", heads, cells, numeric=heads[1:])
    for note in _NOTES:
        console.stdout().print(note)
    return rows


def _row(name: str) -> Row:
    shape, paper = PAPER[name]
    found = rehearse_deep(
        _llama(*shape),
        LoRA(rank=RANK, alpha=16),
        dtype=torch.bfloat16,
        device="cuda",
        lengths=[LENGTH],
        activation_checkpointing=True,
        quant="nf4",
        double_quant=True,
    )
    paged = _BUFFERS + max(sum(parts) - parts.optimizer for parts in found.moments.values())
    return Row(name, found.parts, found.live_bytes, paged, round(paper * 1e9), found.num_trainable)


def _llama(hidden: int, intermediate: int, layers: int, heads: int) -> LlamaConfig:
    return LlamaConfig(
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        vocab_size=32000,
        tie_word_embeddings=False,
    )


def _gb(num_bytes: int, digits: int = 2) -> str:
    return f"{num_bytes / 1e9:.{digits}f}"
