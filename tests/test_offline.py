"""Reliability case 40: with local paths the network is never touched, and nothing is written outside the run folder."""

from __future__ import annotations

import json
import socket
from pathlib import Path
from typing import Any

import pytest
import torch

import lorica
from lorica.config import DataConfig, EvalConfig, ModelConfig, RunConfig, TrainConfig
from lorica.errors import ModelError
from lorica.methods.lora import LoRA
from lorica.recipes.evaluate import evaluate
from lorica.recipes.export import export
from lorica.recipes.generate import generate
from lorica.recipes.merge import merge
from lorica.recipes.plan import plan


@pytest.fixture
def attempts(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[object]:
    """Every use of the network, which also fails; nothing else tells the libraries that there is none."""
    seen: list[object] = []

    def refuse(*arguments: Any, **options: Any) -> Any:
        seen.append(arguments[-1:])
        raise OSError("the network is cut off in this test")

    for name in ("connect", "connect_ex", "sendto"):
        monkeypatch.setattr(socket.socket, name, refuse)
    for name in ("getaddrinfo", "gethostbyname", "create_connection"):
        monkeypatch.setattr(socket, name, refuse)
    import huggingface_hub.constants

    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    return seen


def test_the_whole_road_without_a_network(
    base: Path, tmp_path: Path, attempts: list[object], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    threads = torch.get_num_threads()
    rows = tmp_path / "rows.jsonl"
    lines = [{"prompt": f"What is {n} plus 1?", "response": f"It is {n + 1}."} for n in range(20)]
    rows.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    config = RunConfig(
        model=ModelConfig(base=str(base), device="cpu"),
        method=LoRA(rank=2),
        data=DataConfig(train="rows.jsonl", eval=0.2, max_length=64),
        train=TrainConfig(output="run", batch_tokens=256, max_steps=2, threads=1),
        eval=EvalConfig(max_new_tokens=2),
    )
    assert plan(config).fits
    lorica.train(config)
    evaluate("run")
    assert generate("run", prompt="What is 1 plus 1?", max_new_tokens=2)
    merge("run", "merged")
    export("run", "peft")
    assert generate("merged", prompt="What is 1 plus 1?", max_new_tokens=2)
    torch.set_num_threads(threads)
    assert attempts == []
    assert {path.name for path in tmp_path.iterdir()} == {"merged", "peft", "rows.jsonl", "run"}


def test_the_network_is_really_cut_off(attempts: list[object], monkeypatch: pytest.MonkeyPatch) -> None:
    """A hub id does need it, and says so; else the test above would prove nothing."""
    # Between two attempts.
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    with pytest.raises(ModelError):
        lorica.load_model("lorica-tests/there-is-no-such-model")
    assert attempts
