"""VeRA folders go both ways between PEFT and us and give equal logits."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import lorica
from lorica.errors import AdapterError

from .small_models import check_peft_reads_ours, gpt2, llama, outputs, randomise

peft = pytest.importorskip("peft", reason="needs peft, the oracle")

# Modules of several shapes, so that the shared pair is larger than each.
TARGETS = {llama: ["q_proj", "k_proj", "down_proj"], gpt2: ["c_attn", "mlp.c_proj"]}


@pytest.mark.parametrize("make", TARGETS)
def test_peft_loads_what_we_save(make: Callable[[], Any], tmp_path: Path) -> None:
    check_peft_reads_ours(make, lorica.VeRA(rank=16, seed=7, targets=TARGETS[make]), tmp_path / "adapter", scale=1.0)


def saved_by_peft(make: Callable[[], Any], folder: Path, **fields: Any) -> torch.Tensor:
    config = peft.VeraConfig(
        r=16, projection_prng_key=7, target_modules=TARGETS[make], fan_in_fan_out=make is gpt2, **fields
    )
    theirs = peft.get_peft_model(make(), config).eval()
    randomise((p for name, p in theirs.named_parameters() if "vera_lambda" in name), scale=1.0)
    theirs.save_pretrained(folder)
    return outputs(theirs)


@pytest.mark.parametrize("make", TARGETS)
def test_we_load_what_peft_saves(make: Callable[[], Any], tmp_path: Path) -> None:
    want = saved_by_peft(make, tmp_path, save_projection=False)
    torch.testing.assert_close(outputs(lorica.load_adapter(make(), tmp_path)), want, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"save_projection": True}, "vera_A"),
        ({"save_projection": False, "bias": "vera_only"}, "bias is 'vera_only'"),
    ],
)
def test_what_we_do_not_have_is_refused(fields: dict[str, Any], words: str, tmp_path: Path) -> None:
    saved_by_peft(llama, tmp_path, **fields)
    with pytest.raises(AdapterError, match=words):
        lorica.load_adapter(llama(), tmp_path)
