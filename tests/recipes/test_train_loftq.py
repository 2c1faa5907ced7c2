"""Runs that start from the quantisation error: they begin nearer to the 16-bit base, go on bit for bit, and are opened,
merged, exported and planned over the codes that they were trained over, or refused.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import lorica
from lorica.config import RunConfig, dump_yaml, load_config
from lorica.errors import AdapterError, ConfigError
from lorica.interop.folder import read_proof
from lorica.models.load import load_model
from lorica.quant.linear import format_of
from lorica.recipes import report
from lorica.recipes import sweep as sweeping
from lorica.recipes.adapter import combine_adapters, convert, inspect, scale, verify
from lorica.recipes.export import export
from lorica.recipes.generate import generate
from lorica.recipes.merge import merge
from lorica.recipes.opening import open_model
from lorica.recipes.plan import plan
from lorica.recipes.rehearsing import look_around, rehearse_run
from lorica.recipes.sweep import sweep
from lorica.training.checkpoint import find_checkpoints, read_checkpoint
from lorica.training.metrics import read_metrics

Config = Callable[..., RunConfig]
IDS = torch.arange(40, 60)[None]


@pytest.fixture(scope="module")
def configure(make_config: Config) -> Config:
    def configure(folder: Path, init: str = "loftq", quant: str | None = "nf4", **more: Any) -> RunConfig:
        config = make_config(folder, method={"rank": 16}, **{"max_steps": 6, **more})
        model = config.model.model_copy(update={"quant": quant})
        return config.model_copy(update={"method": replace(config.method, init=init), "model": model})

    return configure


@pytest.fixture(scope="module")
def straight(configure: Config, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "straight"
    result = lorica.train(configure(folder))
    assert (result.status, result.read_back_difference) == ("finished", 0.0)
    return folder


@pytest.fixture
def alone(straight: Path, tmp_path: Path) -> Path:
    """The adapter's folder, away from its run."""
    return Path(shutil.copytree(straight / "adapter", tmp_path / "alone"))


def losses(folder: Path) -> list[float]:
    return [row["loss"] for row in read_metrics(folder / "metrics.jsonl") if "loss" in row]


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        result: torch.Tensor = model.eval()(input_ids=IDS).logits
    return result


def test_it_begins_nearer_to_the_16_bit_base_and_learns(configure: Config, straight: Path, tmp_path: Path) -> None:
    firsts = {}
    for name, init, quant in (("plain", "kaiming", "nf4"), ("original", "kaiming", None)):
        lorica.train(configure(tmp_path / name, init, quant, max_steps=1, data={"eval": None}))
        firsts[name] = losses(tmp_path / name)[0]
    lorica.train(configure(tmp_path / "loftq", max_steps=1, data={"eval": None}))
    began = losses(tmp_path / "loftq")[0]
    assert abs(began - firsts["original"]) < 0.5 * abs(firsts["plain"] - firsts["original"])
    assert losses(straight)[-1] < losses(straight)[0]


def test_paused_and_resumed_is_the_same_run(configure: Config, straight: Path, tmp_path: Path) -> None:
    config = configure(tmp_path / "run")
    assert lorica.train(config, stop_at=3).status == "paused"
    assert lorica.train(config, resume="auto").status == "finished"
    assert losses(tmp_path / "run") == losses(straight)
    ours, theirs = (read_checkpoint(find_checkpoints(f / "checkpoints")[-1]) for f in (tmp_path / "run", straight))
    for stem in ("trainable", "optimizer"):
        assert all(torch.equal(tensor, theirs.tensors[stem][key]) for key, tensor in ours.tensors[stem].items())
    weights = "adapter/adapter_model.safetensors"
    assert (tmp_path / "run" / weights).read_bytes() == (straight / weights).read_bytes()


def test_it_is_planned_without_a_decomposition(
    configure: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("something was decomposed")

    monkeypatch.setattr(torch.linalg, "eigh", refuse)
    found = [
        rehearse_run(config, look_around(config, require_data=False)[0])
        for config in (configure(tmp_path / "run", init) for init in ("kaiming", "loftq"))
    ]
    assert found[0].num_trainable == found[1].num_trainable
    assert found[0].parts.weights == found[1].parts.weights and found[0].parts.adapter == found[1].parts.adapter
    # The largest of the weights that are decomposed is of 32 x 48.
    assert found[1].loading - found[0].loading == 20 * 32 * 48


def test_what_it_cannot_start_from_is_refused_early(configure: Config, tiny_base: Path, tmp_path: Path) -> None:
    lines = [f"model.base={tiny_base}", "data.train=/nowhere"]
    with pytest.raises(ConfigError, match=r"method\.init: loftq starts from what quantising takes away.*set nf4 there"):
        load_config(None, [*lines, "method.init=loftq"])
    with pytest.raises(ConfigError, match=r"method\.init: must be one of"):
        load_config(None, [*lines, "model.quant=nf4", "method.name=prompt", "method.init=loftq"])
    load_model(tiny_base, dtype="float32", device="cpu", quant="nf4").save_pretrained(tmp_path / "base")
    for file in tiny_base.glob("*token*"):
        shutil.copy(file, tmp_path / "base" / file.name)
    config = configure(tmp_path / "run", base=tmp_path / "base")
    for start in (plan, lorica.train):
        with pytest.raises(
            ConfigError, match=r"A base that is stored quantised does not hold it: let model\.base name"
        ):
            start(config)
    assert not (tmp_path / "run" / "adapter").exists()


def test_it_is_opened_over_its_codes_or_refused(straight: Path, alone: Path, tmp_path: Path) -> None:
    ours = logits(open_model(straight)[0])
    # The folder says what it needs where no run does.
    model, _, _ = open_model(alone)
    assert format_of(model) == "nf4, double_quant" and torch.equal(logits(model), ours)
    assert len(generate(alone, prompt="What is 1 plus 2?", max_new_tokens=2)) == 1
    for override in ("model.quant=null", "model.double_quant=false"):
        with pytest.raises(AdapterError, match=r"so it fits the base in nf4, double_quant alone, and this one is n"):
            open_model(alone, [override])
    with pytest.raises(ConfigError, match=r"method\.init: loftq starts"):
        open_model(straight, ["model.quant=null"])
    with pytest.raises(AdapterError, match="this one is nf4"):
        open_model(straight, ["model.double_quant=false"])


@pytest.mark.parametrize("which", ["straight", "alone"])
def test_it_is_merged_into_what_the_codes_stand_for(
    which: str, request: pytest.FixtureRequest, straight: Path, tiny_base: Path, tmp_path: Path
) -> None:
    result = merge(request.getfixturevalue(which), tmp_path / "merged")
    assert result.drift is None and result.agreement.holds and result.agreement.kl < 1e-6
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", attn_implementation="eager")
    assert format_of(plain) is None and "quant" not in (tmp_path / "merged" / "config.json").read_text()
    adapted, _, _ = open_model(straight)
    torch.testing.assert_close(logits(plain), logits(adapted), rtol=1e-4, atol=1e-4)
    # Not into the original, which the adapter would change by what was never taken from it.
    found = load_file(straight / "adapter" / "adapter_model.safetensors")
    merged, original = (load_file(folder / "model.safetensors") for folder in (tmp_path / "merged", tiny_base))
    name = "model.layers.0.mlp.up_proj"
    lora_a, lora_b = (found[f"base_model.model.{name}.lora_{half}.weight"].double() for half in "AB")
    quantised = dict(lorica.detach(adapted).named_modules())[name].weight.double()
    update = 8.0 / 16 * lora_b @ lora_a
    torch.testing.assert_close(merged[f"{name}.weight"].double(), quantised + update, rtol=1e-5, atol=1e-6)
    wrong = original[f"{name}.weight"].double() + update
    assert (wrong - merged[f"{name}.weight"].double()).norm() > 0.5 * (quantised - original[f"{name}.weight"]).norm()


def test_on_request_it_is_merged_into_codes(straight: Path, tmp_path: Path) -> None:
    result = merge(straight, tmp_path / "merged", ["model.quant=nf4"])
    assert result.drift is not None and result.drift.error > 0
    assert format_of(load_model(tmp_path / "merged", device="cpu")) == "nf4, double_quant"
    with pytest.raises(ConfigError, match=r"method\.init: loftq starts"):
        merge(straight, tmp_path / "null", ["model.quant=null"])
    assert not (tmp_path / "null").exists()


def test_an_export_says_where_it_belongs(
    straight: Path, alone: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    export(straight, tmp_path / "peft")
    assert "right over the base in nf4, double_quant alone" in capsys.readouterr().err
    assert read_proof(tmp_path / "peft") == read_proof(alone) and read_proof(alone).base_quant == "nf4, double_quant"
    assert torch.equal(logits(open_model(tmp_path / "peft")[0]), logits(open_model(straight)[0]))


def test_arithmetic_is_for_what_was_learned(alone: Path, tmp_path: Path) -> None:
    assert inspect(alone).base_quant == "nf4, double_quant"
    assert verify(alone).max_difference > 0
    with pytest.raises(AdapterError, match="cannot be scaled or combined"):
        scale(alone, 0.5, tmp_path / "half")
    with pytest.raises(AdapterError, match="cannot be scaled or combined"):
        combine_adapters([f"{alone}=0.5", f"{alone}=0.5"], tmp_path / "mean", "linear")
    assert {path.name for path in tmp_path.iterdir()} == {"alone"}
    # The same update in another form is as bound to its base.
    convert(alone, tmp_path / "folded")
    torch.testing.assert_close(
        logits(open_model(tmp_path / "folded")[0]), logits(open_model(alone)[0]), rtol=1e-4, atol=1e-4
    )
    with pytest.raises(AdapterError, match="this one is not quantised"):
        open_model(tmp_path / "folded", ["model.quant=null"])


def test_arms_of_a_sweep_each_start_from_their_own(
    configure: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Drawing takes longer than training here.
    for part, name in ((report, "draw_curves"), (sweeping, "draw_sweep")):
        monkeypatch.setattr(part, name, lambda found, file: file.write_bytes(b""))
    (tmp_path / "run.yaml").write_text(dump_yaml(configure(tmp_path / "run", max_steps=2, eval_every=2)))
    result = sweep(tmp_path / "run.yaml", ["method.rank=2,16"], halving=False)
    ranks = {(load_config(arm.folder).config.method.rank, arm.status) for arm in result.arms}
    assert ranks == {(2, "finished"), (16, "finished")}
    # Each load kept what its own rank asked for.
    assert len({arm.eval_loss for arm in result.arms}) == 2
