from __future__ import annotations

import random

import numpy as np
import pytest
import torch

from lorica.errors import CheckpointError
from lorica.training.rng import restore_rng, rng_tensors


def draw() -> list[float]:
    # One Gaussian each leaves the second of its pair waiting in numpy and Python: a state that is easily forgotten.
    return [
        torch.rand(()).item(),
        float(np.random.normal()),
        random.gauss(0, 1),
        random.random(),
        float(np.random.rand()),
    ]


@pytest.mark.parametrize("drawn_before", [0, 1, 2])
def test_every_generator_continues_where_it_stood(drawn_before: int) -> None:
    torch.manual_seed(1)
    np.random.seed(1)
    random.seed(1)
    for _ in range(drawn_before):
        draw()
    saved = {name: tensor.clone() for name, tensor in rng_tensors().items()}
    expected = [draw() for _ in range(3)]
    restore_rng(saved)
    assert [draw() for _ in range(3)] == expected


def test_a_missing_generator_is_an_error_that_names_it() -> None:
    saved = rng_tensors()
    del saved["numpy.words"], saved["torch.cpu"]
    before = torch.get_rng_state()
    with pytest.raises(CheckpointError, match=r"numpy\.words, torch\.cpu"):
        restore_rng(saved)
    assert torch.equal(before, torch.get_rng_state())
