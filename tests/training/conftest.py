"""A tiny language model on random rows: enough for every promise of the loop, and milliseconds a step."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from lorica.data.sampler import Order
from lorica.data.tokenized import TokenizedDataset
from lorica.methods.attach import adapt
from lorica.methods.lora import LoRA
from lorica.training.checkpoint import Checkpoint
from lorica.training.loop import LoopResult, run_loop
from lorica.training.step import LoopOptions

VOCABULARY = 24
IDENTITY = {"data": {"fingerprint": "abc"}, "settings": {"lr": 0.01}}


class Bigram(nn.Module):
    """Predicts the next token from this one alone, so packing needs no attention and an oracle is one line."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, 12)
        self.up = nn.Linear(12, 16)
        self.head = nn.Linear(16, VOCABULARY)

    def forward(self, input_ids: Tensor) -> Tensor:
        return self.head(torch.tanh(self.up(self.embedding(input_ids))))


def summed_loss(model: nn.Module, inputs: Mapping[str, Any], targets: Tensor) -> Tensor:
    logits = model(inputs["input_ids"]).flatten(0, 1)
    return nn.functional.cross_entropy(logits, targets.flatten(), ignore_index=-100, reduction="sum")


def make_model(dropout: float = 0.1) -> nn.Module:
    torch.manual_seed(7)
    model = adapt(Bigram(), LoRA(rank=4, alpha=8.0, dropout=dropout, targets="all-linear"))
    torch.manual_seed(8)
    return model


def make_dataset(num_samples: int = 24, masked: frozenset[int] = frozenset()) -> TokenizedDataset:
    """Rows of 3 to 11 tokens, each token following from the one before; two are a prompt, in `masked` rows all."""
    random = np.random.default_rng(0)
    samples = []
    for index in range(num_samples):
        ids = [int(random.integers(VOCABULARY))]
        while len(ids) < 3 + index % 9:
            ids.append((5 * ids[-1] + 3) % VOCABULARY)
        kept = len(ids) if index in masked else 2
        samples.append((ids, [-100] * kept + ids[kept:]))
    return TokenizedDataset.from_samples(samples)


def make_order(dataset: TokenizedDataset, batch_tokens: int = 40, epochs: float = 2.0) -> Order:
    return Order(dataset.lengths, seed=3, batch_tokens=batch_tokens, epochs=epochs)


@pytest.fixture
def train(tmp_path: Path) -> Callable[..., tuple[nn.Module, LoopResult]]:
    """Run the loop on a fresh tiny model: train(resume=..., loss_fn=..., and any field of LoopOptions)."""

    def run(
        *,
        folder: Path = tmp_path / "run",
        resume: Checkpoint | None = None,
        loss_fn: Any = summed_loss,
        evaluate: Any = None,
        dataset: TokenizedDataset | None = None,
        order: Order | None = None,
        model: nn.Module | None = None,
        **options: Any,
    ) -> tuple[nn.Module, LoopResult]:
        model = make_model() if model is None else model
        dataset = make_dataset() if dataset is None else dataset
        result = run_loop(
            model,
            loss_fn,
            dataset,
            make_order(dataset) if order is None else order,
            folder=folder,
            options=LoopOptions(**{"lr": 0.01, "micro_batch_tokens": 15, "save_every": 2, "eval_every": 3, **options}),
            evaluate=evaluate,
            resume=resume,
            identity=IDENTITY,
        )
        return model, result

    return run


def in_child(work: Callable[[], None]) -> int:
    """Run `work` in a forked process; its exit code, or minus the signal that ended it. 99 is an exception."""
    pid = os.fork()
    if pid == 0:
        try:
            work()
            os._exit(0)
        except BaseException as error:
            os.write(2, repr(error).encode())
            os._exit(99)
    _, status = os.waitpid(pid, 0)
    return os.waitstatus_to_exitcode(status)


def kill_self() -> None:
    os.kill(os.getpid(), signal.SIGKILL)
