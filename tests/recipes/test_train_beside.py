"""Modules and tokens that are trained beside an adapter, through the recipes: train, resume, plan, merge."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import lorica
from lorica.config import RunConfig, load_config
from lorica.methods.lora import LoRA
from lorica.methods.method import MethodOptions
from lorica.models.load import load_model
from lorica.recipes.merge import merge
from lorica.recipes.opening import open_model
from lorica.training.metrics import read_metrics
from lorica.training.rehearsal import rehearse

Config = Callable[..., RunConfig]
BESIDE: dict[str, Any] = {"modules_to_save": (".*norm",), "trainable_tokens": tuple(range(40, 60))}
OPTIONS: dict[str, MethodOptions] = {
    "lora": LoRA(rank=4, alpha=8.0, dropout=0.1, **BESIDE),
    "a tied embedding": LoRA(rank=4, modules_to_save=("lm_head",)),
}
IDS = torch.arange(40, 60)[None]


@pytest.fixture(scope="module", params=OPTIONS)
def name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def straight(make_config: Config, name: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "straight"
    result = lorica.train(make_config(folder, max_steps=6).model_copy(update={"method": OPTIONS[name]}))
    assert (result.status, result.read_back_difference) == ("finished", 0.0)
    return folder


def test_it_is_trained_and_the_base_is_not(straight: Path, tiny_base: Path) -> None:
    losses = [row["loss"] for row in read_metrics(straight / "metrics.jsonl") if "loss" in row]
    assert losses[-1] < losses[0]
    base = load_model(tiny_base, dtype="float32", device="cpu")
    model, _, _ = open_model(straight)
    beside = {name: adapter for name, adapter in lorica.adapters(model).items() if adapter.is_beside}
    assert {"model.embed_tokens", "lm_head"} <= beside.keys()
    for name, adapter in beside.items():
        for key, parameter in adapter.merged().named_parameters() if name != "lm_head" else ():
            assert not torch.equal(parameter, base.get_submodule(name).get_parameter(key)), f"{name}.{key}"
    assert torch.equal(lorica.detach(model)(IDS).logits, base(IDS).logits)


def test_paused_and_resumed_is_the_same_run(make_config: Config, name: str, straight: Path, tmp_path: Path) -> None:
    config = make_config(tmp_path / "run", max_steps=6).model_copy(update={"method": OPTIONS[name]})
    assert lorica.train(config, stop_at=3).status == "paused"
    assert lorica.train(config, resume="auto").status == "finished"
    weights = "adapter/adapter_model.safetensors"
    assert (tmp_path / "run" / weights).read_bytes() == (straight / weights).read_bytes()


def test_a_rehearsal_counts_it(name: str, tiny_llama: Callable[..., Any]) -> None:
    model = tiny_llama(tie_word_embeddings=True)
    options = replace(OPTIONS[name], trainable_tokens=OPTIONS[name].trainable_tokens[:5] and (3, 5, 9))
    found = rehearse(model.config, options, dtype=torch.float32, lengths=[16, 7], num_micro_batches=2)
    trained = lorica.trainable_parameters(lorica.adapt(model, options))
    assert found.num_trainable == sum(p.numel() for p in trained.values())
    assert found.parts.adapter == found.parts.gradients == 4 * found.num_trainable


def test_merged_it_is_a_plain_tied_model(straight: Path, tmp_path: Path) -> None:
    merge(straight, tmp_path / "merged")
    plain = load_model(tmp_path / "merged", dtype="float32", device="cpu")
    assert plain.lm_head.weight is plain.model.embed_tokens.weight
    model, _, _ = open_model(straight)
    torch.testing.assert_close(plain(IDS).logits, model(IDS).logits, atol=1e-5, rtol=1e-5)


def test_the_options_come_from_a_file(tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    text = "  modules_to_save: [lm_head, model.norm]\n  trainable_tokens: {embed_tokens: [7, 5]}\n"
    file.write_text(f"model: {{base: embedded}}\nmethod:\n{text}data: {{train: rows.jsonl}}\n", encoding="utf-8")
    resolved = load_config(file)
    assert resolved.config.method.modules_to_save == ("lm_head", "model.norm")
    assert resolved.config.method.trainable_tokens == {"embed_tokens": (7, 5)}
    file.write_text(resolved.dump_yaml(), encoding="utf-8")
    assert load_config(file).config == resolved.config
    assert load_config(file, ["method.trainable_tokens=[7]"]).config.method.trainable_tokens == (7,)


def test_a_folder_holds_the_rows_alone(make_config: Config, tmp_path: Path) -> None:
    method = LoRA(rank=2, targets="q_proj", trainable_tokens=(40, 41))
    lorica.train(make_config(tmp_path / "run", max_steps=1, eval_every=9).model_copy(update={"method": method}))
    shapes = {key: list(t.shape) for key, t in load_file(tmp_path / "run/adapter/adapter_model.safetensors").items()}
    rows = {key: shape for key, shape in shapes.items() if "lora" not in key}
    assert rows == {"base_model.model.model.embed_tokens.token_adapter.trainable_tokens_delta": [2, 32]}
