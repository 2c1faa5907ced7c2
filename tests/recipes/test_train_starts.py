"""Starts from data, LoRA+ and restarts through the recipes: run.yaml to adapter, resumed, planned, refused."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import lorica
from lorica.config import RunConfig, load_config
from lorica.errors import ConfigError
from lorica.methods import lora, starts
from lorica.methods.lora import LoRA
from lorica.models.load import load_model
from lorica.recipes.opening import open_model
from lorica.recipes.rehearsing import look_around, num_restarts
from lorica.training.checkpoint import find_checkpoints, read_checkpoint
from lorica.training.metrics import read_metrics
from lorica.training.rehearsal import rehearse

Config = Callable[..., RunConfig]
CASES: dict[str, tuple[dict[str, Any], dict[str, Any], int]] = {
    "eva": ({"init": "eva", "init_batches": 2}, {}, 4),
    "lora_ga": ({"init": "lora_ga", "init_batches": 2, "lr_ratio": 2.0}, {"activation_checkpointing": True}, 8),
    "restarts": ({}, {"restart_every": 2}, 12),
}


@pytest.fixture(scope="module", params=CASES)
def case(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def configure(make_config: Config, case: str) -> Config:
    method, train, _ = CASES[case]
    small = {"targets": ("q_proj", "down_proj"), **method}
    return lambda folder: make_config(folder, method=small, data={"eval": None}, max_steps=6, save_every=3, **train)


@pytest.fixture(scope="module")
def straight(configure: Config, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "straight"
    result = lorica.train(configure(folder))
    assert (result.status, result.read_back_difference) == ("finished", 0.0)
    return folder


def losses(folder: Path) -> list[float]:
    return [row["loss"] for row in read_metrics(folder / "metrics.jsonl") if "loss" in row]


def test_it_begins_at_the_base_learns_and_leaves_the_base_alone(
    straight: Path, case: str, make_config: Config, tiny_base: Path, tmp_path: Path
) -> None:
    lorica.train(make_config(tmp_path / "run", data={"eval": None}, max_steps=1))
    assert losses(straight)[0] == losses(tmp_path / "run")[0]
    assert losses(straight)[-1] < losses(straight)[0]
    base = load_model(tiny_base, dtype="float32", device="cpu")
    ids = torch.arange(40, 60)[None]
    model = open_model(straight)[0]
    assert torch.equal(lorica.detach(model)(ids).logits, base(ids).logits)
    ranks = {t.shape[0] for key, t in load_file(straight / "adapter/adapter_model.safetensors").items() if "_A" in key}
    assert ranks == {CASES[case][2]}


def test_resumed_is_the_same_run_and_never_starts_again(
    configure: Config, straight: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = configure(tmp_path / "run")
    assert lorica.train(config, stop_at=3).status == "paused"
    monkeypatch.setattr(lora, "STARTS", dict.fromkeys(starts.STARTS))
    assert lorica.train(config, resume="auto").status == "finished"
    assert losses(tmp_path / "run") == losses(straight)
    ours, theirs = (read_checkpoint(find_checkpoints(f / "checkpoints")[-1]) for f in (tmp_path / "run", straight))
    for stem in ("trainable", "optimizer"):
        assert ours.tensors[stem].keys() == theirs.tensors[stem].keys()
        assert all(torch.equal(tensor, theirs.tensors[stem][key]) for key, tensor in ours.tensors[stem].items())
    weights = "adapter/adapter_model.safetensors"
    assert (tmp_path / "run" / weights).read_bytes() == (straight / weights).read_bytes()


def test_the_start_does_not_depend_on_how_steps_are_cut(make_config: Config, tmp_path: Path) -> None:
    method = {"init": "lora_ga", "init_batches": 2, "targets": "q_proj"}
    found = []
    for name, train in (("whole", {}), ("cut", {"micro_batch_tokens": 64})):
        lorica.train(make_config(tmp_path / name, method=method, data={"eval": None}, max_steps=2, **train))
        tensors = read_checkpoint(find_checkpoints(tmp_path / name / "checkpoints")[-1]).tensors["trainable"]
        # Singular vectors have no sign.
        found.append([t.mT @ t if key.endswith("_a") else t @ t.mT for key, t in tensors.items() if "start" in key])
    assert len(found[0]) == 4
    torch.testing.assert_close(*found, atol=1e-2, rtol=0)


@pytest.mark.parametrize("restarts", [0, 3])
def test_a_rehearsal_counts_the_pasts(tiny_llama: Callable[..., Any], restarts: int) -> None:
    model, options = tiny_llama(), LoRA(rank=4)
    found = rehearse(model.config, options, dtype=torch.float32, lengths=[16], num_restarts=restarts)
    base = sum(t.numel() * t.element_size() for t in (*model.parameters(), *model.buffers()))
    trained = sum(p.numel() for p in lorica.trainable_parameters(lorica.adapt(model, options)).values())
    assert found.parts.weights == base + 4 * restarts * trained and found.num_trainable == trained
    assert found.parts.optimizer == 8 * trained + 4 * 28


@pytest.mark.parametrize(("init", "buffers"), [("eva", 0), ("lora_ga", 1)])
def test_a_start_from_data_is_rehearsed_without_it(tiny_llama: Callable[..., Any], init: str, buffers: int) -> None:
    model = tiny_llama()
    found = rehearse(model.config, LoRA(rank=4, init=init), dtype=torch.float32, lengths=[16])
    base = sum(t.numel() * t.element_size() for t in (*model.parameters(), *model.buffers()))
    assert found.parts.weights == base + 4 * buffers * found.num_trainable


def test_a_plan_counts_the_restarts_that_it_knows_of(make_config: Config) -> None:
    known = make_config("runs/x", data={"train": "/nowhere"}, restart_every=3, max_steps=10)
    setting, assumptions = look_around(known, require_data=False)
    assert num_restarts(known, setting) == 3 and "restart" not in " ".join(assumptions)
    unknown = make_config("runs/x", data={"train": "/nowhere"}, restart_every=3)
    setting, assumptions = look_around(unknown, require_data=False)
    assert num_restarts(unknown, setting) == 0 and "no restart is counted" in " ".join(assumptions)


def test_methods_that_cannot_restart_are_refused_before_anything_is_read() -> None:
    lines = ["model.base=/nowhere", "data.train=/nowhere", "train.restart_every=5", "method.name=ia3"]
    with pytest.raises(ConfigError, match=r"train.restart_every: ia3 cannot start anew in a run; .*lora"):
        load_config(None, lines)
