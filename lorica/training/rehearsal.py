"""Rehearse a training step on fake tensors: its memory and its work, without weights and without doing the work.

The real model class, the real adapters, the real loss, backward, clipping and AdamW run on tensors that have shapes but
no contents. A dispatch mode below autograd sees every operation and follows every storage from birth to death, views
included, so activation checkpointing, tied weights and the loss's chunks need no formula of their own. Fake CPU tensors
take the CPU's own kernels (its attention among them), so what is kept for backward is what is really kept.

On a GPU that torch can see the rehearsal runs on fake CUDA tensors; torch cannot pretend a GPU that is not there, and
then the CPU's accounting stands in. What it gives up: memory inside a kernel (scratch of matrix products), and the
allocator's, for which `allocator_bytes` has a rule that was measured.
"""

from __future__ import annotations

import copy
import weakref
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry, sdpa_flop_count
from transformers import AutoModelForCausalLM, PretrainedConfig

from lorica.data.packing import Batch, pack, pad
from lorica.data.tokenized import IGNORE, TokenizedDataset
from lorica.methods.attach import adapt, trainable_parameters
from lorica.methods.method import MethodOptions
from lorica.models import attention
from lorica.models.loss import make_loss
from lorica.training.optim import clip_gradients, make_optimizer


class Ledger(TorchDispatchMode):
    """Books every storage that operations give out and drop while the mode is on, and the work that they do.

    `events` holds (storage, +1 or -1) in order, storages being numbered from 0 in the order of birth; `sizes` their
    bytes; `work` counts operations by (floating-point operations, bytes read and written).
    """

    def __init__(self) -> None:
        super().__init__()
        self.sizes: list[int] = []
        self.events: list[tuple[int, int]] = []
        self.work: Counter[tuple[int, int]] = Counter()
        self._numbers: dict[int, int] = {}

    def add(self, tensor: Tensor) -> int:
        """The number of the tensor's storage, which is born now if it was not known."""
        storage = tensor.untyped_storage()
        key = id(storage)
        if key not in self._numbers:
            number = self._numbers[key] = len(self.sizes)
            self.sizes.append(storage.nbytes())
            self.events.append((number, 1))
            weakref.finalize(storage, self._died, key, number).atexit = False
        return self._numbers[key]

    def _died(self, key: int, number: int) -> None:
        del self._numbers[key]
        self.events.append((number, -1))

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        inputs = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
        outputs = [t for t in tree_leaves(out) if isinstance(t, Tensor)]
        known = {self.add(t) for t in inputs}
        born = [t for t in outputs if self.add(t) not in known]
        if born or func._schema.is_mutable:
            moved = sum(t.numel() * t.element_size() for t in inputs + born)
            self.work[_flops(func, args, kwargs, out), moved] += 1
        return out
