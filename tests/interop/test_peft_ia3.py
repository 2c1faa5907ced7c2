"""IA3 folders go both ways between PEFT and us and give equal logits."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import lorica

from .small_models import bert, check_peft_reads_ours, gpt2, llama, outputs, randomise

peft = pytest.importorskip("peft", reason="needs peft, the oracle")


@pytest.mark.parametrize("make", [llama, gpt2, bert])
def test_peft_loads_what_we_save(make: Callable[[], Any], tmp_path: Path) -> None:
    check_peft_reads_ours(make, lorica.IA3(), tmp_path / "adapter", scale=0.5)


CONFIGS: dict[str, tuple[Callable[[], Any], dict[str, Any]]] = {
    "llama, PEFT's defaults": (llama, {}),
    "gpt2, PEFT's defaults": (gpt2, {"fan_in_fan_out": True}),
    "bert, PEFT's defaults": (bert, {}),
    "an expression": (llama, {"target_modules": ["k_proj", "up_proj"], "feedforward_modules": r".*\.1\..*up_proj"}),
    "no feed-forward layer": (llama, {"target_modules": ["k_proj", "down_proj"], "feedforward_modules": []}),
}


@pytest.mark.parametrize("case", CONFIGS)
def test_we_load_what_peft_saves(case: str, tmp_path: Path) -> None:
    make, fields = CONFIGS[case]
    theirs = peft.get_peft_model(make(), peft.IA3Config(**fields)).eval()
    randomise((p for name, p in theirs.named_parameters() if "ia3_l" in name), scale=0.5)
    want = outputs(theirs)
    theirs.save_pretrained(tmp_path)
    torch.testing.assert_close(outputs(lorica.load_adapter(make(), tmp_path)), want, atol=1e-5, rtol=1e-5)
