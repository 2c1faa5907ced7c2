"""The state of every random generator as named tensors: torch on the CPU and each GPU, numpy, Python.

Dropout draws from them, so a resumed run equals an uninterrupted one only when all of them continue where they stood.
"""

from __future__ import annotations

import random
from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

from lorica.errors import CheckpointError


def rng_tensors() -> dict[str, Tensor]:
    """Names to states: torch's as uint8 bytes, numpy's and Python's Mersenne twisters as int64 words.

    A GPU is asked only when CUDA already runs: asking would start it, at half a gigabyte, in a run on the CPU.
    """
    _, words, position, has_gauss, gauss = np.random.get_state(legacy=True)
    version, python_words, python_gauss = random.getstate()
    tensors = {
        "torch.cpu": torch.get_rng_state(),
        "numpy.words": torch.from_numpy(np.asarray(words, dtype=np.int64)),
        "numpy.position": torch.tensor([int(position), int(has_gauss)]),
        "numpy.gauss": torch.tensor([float(gauss)], dtype=torch.float64),
        "python.version": torch.tensor([version]),
        "python.words": torch.tensor(python_words),
        # Python keeps the second half of a drawn pair of Gaussians, or None: then the tensor is empty.
        "python.gauss": torch.tensor([g for g in (python_gauss,) if g is not None], dtype=torch.float64),
    }
    if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        tensors |= {f"torch.cuda.{i}": state for i, state in enumerate(torch.cuda.get_rng_state_all())}
    return tensors


def restore_rng(tensors: Mapping[str, Tensor]) -> None:
    """Put every generator back to what `rng_tensors` saw. States of GPUs that are not here are left out.

    Raises:
        CheckpointError: a generator is missing from `tensors`; names them all and changes nothing.
    """
    missing = sorted(rng_tensors().keys() - tensors.keys())
    missing = [name for name in missing if not name.startswith("torch.cuda.")]
    if missing:
        raise CheckpointError(f"The checkpoint's random state lacks {', '.join(missing)}: no exact resume.")
    torch.set_rng_state(tensors["torch.cpu"])
    position, has_gauss = tensors["numpy.position"].tolist()
    words = tensors["numpy.words"].numpy().astype(np.uint32)
    np.random.set_state(("MT19937", words, position, has_gauss, tensors["numpy.gauss"].item()))
    gauss = tensors["python.gauss"].tolist()
    random.setstate((tensors["python.version"].item(), tuple(tensors["python.words"].tolist()), *(gauss or [None])))
    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            if f"torch.cuda.{index}" in tensors:
                torch.cuda.set_rng_state(tensors[f"torch.cuda.{index}"], index)
