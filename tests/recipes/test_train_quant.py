"""Runs over a base in NF4: every method learns, pauses and goes on bit for bit, is planned, opened and merged."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import lorica
from lorica.config import RunConfig, dump_yaml, load_config
from lorica.errors import CheckpointError, NotMergeableError, TargetError
from lorica.kernels import build, cpu, cpu_attention
from lorica.methods.method import method_options
from lorica.models.load import load_config as load_config_of
from lorica.models.load import load_model
from lorica.quant.linear import format_of, layers
from lorica.recipes.evaluate import evaluate
from lorica.recipes.export import export
from lorica.recipes.generate import generate
from lorica.recipes.merge import merge
from lorica.recipes.opening import open_model
from lorica.recipes.rehearsing import look_around, rehearse_run
from lorica.recipes.sweep import sweep
from lorica.training.checkpoint import find_checkpoints, read_checkpoint
from lorica.training.metrics import read_metrics
from lorica.training.rehearsal import rehearse

Config = Callable[..., RunConfig]
METHODS: dict[str, dict[str, Any]] = {
    "adalora": {"rank": 4, "target_rank": 2, "interval": 2, "final": 0.4},
    "bottleneck": {"size": 8},
    "dora": {"rank": 4},
    "ia3": {},
    "lora": {"rank": 4, "alpha": 8.0, "dropout": 0.1},
    "prefix": {"num_virtual_tokens": 4},
    "prompt": {"num_virtual_tokens": 4},
    "vera": {"rank": 16},
}


@pytest.fixture(scope="module")
def configure(make_config: Config) -> Config:
    def configure(folder: Path, name: str = "lora", quant: str | None = "nf4", **train: Any) -> RunConfig:
        config = make_config(folder, **{"max_steps": 6, "lr": 2e-2, **train})
        model = config.model.model_copy(update={"quant": quant})
        return config.model_copy(update={"method": method_options(name)(**METHODS[name]), "model": model})

    return configure


@pytest.fixture(scope="module")
def straight(configure: Config, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "straight"
    result = lorica.train(configure(folder, max_steps=12))
    assert (result.status, result.read_back_difference) == ("finished", 0.0)
    return folder


def losses(folder: Path) -> list[float]:
    return [row["loss"] for row in read_metrics(folder / "metrics.jsonl") if "loss" in row]


@pytest.mark.parametrize("name", METHODS)
def test_every_method_learns(name: str, configure: Config, tmp_path: Path) -> None:
    result = lorica.train(configure(tmp_path, name, max_steps=4, save_every=4))
    assert (result.status, result.read_back_difference) == ("finished", 0.0)
    assert losses(tmp_path)[-1] < losses(tmp_path)[0]


def test_it_learns_as_over_the_weights_themselves(configure: Config, straight: Path, tmp_path: Path) -> None:
    lorica.train(configure(tmp_path, quant=None, max_steps=12))
    assert losses(straight) != losses(tmp_path)
    assert losses(straight) == pytest.approx(losses(tmp_path), rel=0.01), "4 bits of a weight are nearly all of it"


def test_paused_and_resumed_is_the_same_run(configure: Config, straight: Path, tmp_path: Path) -> None:
    config = configure(tmp_path / "run", max_steps=12)
    assert lorica.train(config, stop_at=5).status == "paused"
    assert lorica.train(config, resume="auto").status == "finished"
    assert losses(tmp_path / "run") == losses(straight)
    ours, theirs = (read_checkpoint(find_checkpoints(f / "checkpoints")[-1]) for f in (tmp_path / "run", straight))
    for stem in ("trainable", "optimizer"):
        assert all(torch.equal(tensor, theirs.tensors[stem][key]) for key, tensor in ours.tensors[stem].items())


def test_checkpointed_activations_change_nothing(configure: Config, straight: Path, tmp_path: Path) -> None:
    lorica.train(configure(tmp_path / "run", max_steps=12, activation_checkpointing=True))
    assert losses(tmp_path / "run") == pytest.approx(losses(straight), rel=1e-6)


def test_another_quantisation_is_another_run(configure: Config, straight: Path, tmp_path: Path) -> None:
    first = find_checkpoints(straight / "checkpoints")[0]
    with pytest.raises(CheckpointError, match=r"model\.quant: 'nf4, double_quant' in the checkpoint, None now"):
        lorica.train(configure(tmp_path / "run", quant=None, max_steps=12), resume=first)


def test_full_fine_tuning_says_why_not(configure: Config, tmp_path: Path) -> None:
    config = configure(tmp_path / "run").model_copy(update={"method": lorica.FullFineTuning()})
    with pytest.raises(TargetError, match="no floating-point weights"):
        lorica.train(config)


def test_it_is_opened_and_generates_as_it_was_trained(straight: Path) -> None:
    model, _, _ = open_model(straight)
    assert format_of(model) == "nf4, double_quant"
    assert len(generate(straight, prompt="What is 1 plus 2?", max_new_tokens=4)) == 1


def test_it_is_evaluated_over_the_weights_that_it_was_trained_over(straight: Path) -> None:
    report = evaluate(straight, generate=False).all
    trained = min(row["eval_loss"] for row in read_metrics(straight / "metrics.jsonl") if "eval_loss" in row)
    assert report.adapter.loss == pytest.approx(trained, rel=1e-5)
    assert report.base is not None and report.adapter.loss < report.base.loss - 0.01


def test_it_is_merged_into_the_original(straight: Path, tiny_base: Path, tmp_path: Path) -> None:
    merge(straight, tmp_path / "merged")
    plain, original = (load_model(f, dtype="float32", device="cpu") for f in (tmp_path / "merged", tiny_base))
    adapted = lorica.load_adapter(original, straight / "adapter")
    ids = torch.arange(40, 60)[None]
    assert not list(layers(plain))
    torch.testing.assert_close(plain(ids).logits, adapted(ids).logits, rtol=1e-4, atol=1e-4)


def test_on_request_it_is_merged_into_quantised_weights_and_what_is_lost_is_said(
    straight: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    result = merge(straight, tmp_path / "merged", ["model.quant=nf4"])
    plain = load_model(tmp_path / "merged", dtype="float32", device="cpu")
    assert format_of(plain) == "nf4, double_quant"
    model, _, _ = open_model(straight)
    ids = torch.arange(40, 60)[None]
    difference = (plain(ids).logits - model(ids).logits).abs().max()
    assert 0 < difference < 0.5
    assert result.drift is not None and result.agreement.kl > 0
    assert 0 < result.drift.error < result.drift.weight
    assert "quantised again" in capsys.readouterr().err


def test_a_base_that_was_saved_quantised_is_trained_too(
    configure: Config, straight: Path, tiny_base: Path, tmp_path: Path
) -> None:
    model = load_model(tiny_base, dtype="float32", device="cpu", quant="nf4")
    model.save_pretrained(tmp_path / "base")
    for file in tiny_base.glob("*token*"):
        (tmp_path / "base" / file.name).write_bytes(file.read_bytes())
    lorica.train(configure(tmp_path / "saved", quant=None, base=str(tmp_path / "base"), max_steps=12))
    assert losses(tmp_path / "saved") == losses(straight)
    found = rehearse(load_config_of(tmp_path / "base"), lorica.LoRA(rank=4), dtype=torch.float32, lengths=[64])
    assert found.parts.weights == sum(t.numel() * t.element_size() for t in (*model.parameters(), *model.buffers()))
    with pytest.raises(NotMergeableError, match="load that without quant"):
        merge(tmp_path / "saved", tmp_path / "merged")
    assert not (tmp_path / "merged").exists()


def test_fp4_goes_the_whole_way_from_its_configuration(configure: Config, tmp_path: Path) -> None:
    file, run = tmp_path / "run.yaml", tmp_path / "run"
    file.write_text(dump_yaml(configure(run, quant="fp4", max_steps=4)))
    setting, _ = look_around(load_config(file).config, require_data=True)
    assert lorica.train(file).read_back_difference == 0.0
    model, _, _ = open_model(run)
    assert format_of(model) == "fp4, double_quant" and losses(run)[-1] < losses(run)[0]
    planned = [rehearse_run(configure(run, quant=scheme), setting).parts.weights for scheme in ("fp4", "nf4", None)]
    assert planned[0] == planned[1] < planned[2]
    report = evaluate(run, generate=False).all
    assert report.base is not None and report.adapter.loss < report.base.loss
    merge(run, tmp_path / "merged", ["model.quant=fp4"])
    assert format_of(load_model(tmp_path / "merged", dtype="float32", device="cpu")) == "fp4, double_quant"


def test_a_base_that_was_saved_in_fp4_serves_every_verb(configure: Config, tiny_base: Path, tmp_path: Path) -> None:
    base, run = tmp_path / "base", tmp_path / "run"
    load_model(tiny_base, dtype="float32", device="cpu", quant="fp4", double_quant=False).save_pretrained(base)
    for file in tiny_base.glob("*token*"):
        (base / file.name).write_bytes(file.read_bytes())
    lorica.train(configure(run, quant=None, base=str(base)))
    again = configure(tmp_path / "again", quant=None, base=str(base))
    assert lorica.train(again, stop_at=4).status == "paused"
    lorica.train(again, resume="auto")
    assert losses(tmp_path / "again") == losses(run) and losses(run)[-1] < losses(run)[0]
    report = evaluate(run, generate=False).all
    assert report.base is not None and report.adapter.loss < report.base.loss
    assert len(generate(run, prompt="What is 1 plus 2?", max_new_tokens=2)) == 1
    assert export(run, tmp_path / "export").max_difference == 0.0
    assert format_of(open_model(tmp_path / "export")[0]) == "fp4"
    with pytest.raises(NotMergeableError, match="load that without quant"):
        merge(run, tmp_path / "merged")


def test_a_sweep_tries_the_base_in_4_bits_too(configure: Config, tmp_path: Path) -> None:
    config = configure(tmp_path / "run", quant=None, max_steps=4)
    (tmp_path / "run.yaml").write_text(dump_yaml(config))
    found = sweep(
        tmp_path / "run.yaml", ["model.quant=null,nf4", "model.double_quant=false"], output=tmp_path / "sweep"
    )
    arms = {arm.values["model.quant"]: arm for arm in found.arms}
    assert [arm.status for arm in arms.values()] == ["finished", "finished"]
    assert {quant: format_of(open_model(arm.folder)[0]) for quant, arm in arms.items()} == {None: None, "nf4": "nf4"}
    assert arms[None].eval_loss != arms["nf4"].eval_loss
    best = load_config(tmp_path / "sweep" / "best.yaml").config.model
    assert arms[best.quant].name == found.best


@pytest.fixture
def no_compiler(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """All is computed as on a machine without a compiler, until the test ends."""
    caches = (build.library, cpu.compiled, cpu_attention.compiled)
    monkeypatch.setenv("LORICA_KERNELS", "reference")
    for function in caches:
        function.cache_clear()
    yield
    for function in caches:
        function.cache_clear()


def test_a_machine_without_a_compiler_goes_on_with_it_and_uses_it(
    no_compiler: None, configure: Config, straight: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    first = find_checkpoints(straight / "checkpoints")[0]
    lorica.train(configure(run, max_steps=12), resume=first)
    assert cpu.compiled() is None and cpu_attention.compiled() is None
    done = losses(run)
    assert 0 < len(done) < 12
    assert done == pytest.approx(losses(straight)[-len(done) :], rel=1e-4)
    ours, theirs = (evaluate(folder, base=False, generate=False).all.adapter.loss for folder in (run, straight))
    assert ours == pytest.approx(theirs, rel=1e-4)
    assert len(generate(run, prompt="What is 1 plus 2?", max_new_tokens=2)) == 1
    assert export(run, tmp_path / "export").max_difference == 0.0
    merge(run, tmp_path / "merged")
    assert format_of(load_model(tmp_path / "merged")) is None
    merge(run, tmp_path / "quantised", ["model.quant=nf4"])
    assert format_of(load_model(tmp_path / "quantised")) == "nf4, double_quant"


@pytest.mark.parametrize("double_quant", [False, True])
def test_a_rehearsal_counts_the_bytes_that_there_are(double_quant: bool, tiny_base: Path) -> None:
    model = load_model(tiny_base, dtype="bfloat16", device="cpu", quant="nf4", double_quant=double_quant)
    found = rehearse(
        load_model(tiny_base).config,
        lorica.LoRA(rank=4),
        dtype=torch.bfloat16,
        lengths=[64, 64],
        quant="nf4",
        double_quant=double_quant,
    )
    tensors = (*model.parameters(), *model.buffers())
    assert found.parts.weights == sum(t.numel() * t.element_size() for t in tensors)
    assert found.num_parameters == sum(p.numel() for p in load_model(tiny_base).parameters()) + found.num_trainable


def test_it_is_planned_as_run_yaml_says(tiny_base: Path) -> None:
    lines = [f"model.base={tiny_base}", "data.train=/nowhere", "train.batch_tokens=1024", "model.device=cpu"]
    configs = [load_config(None, [*lines, *more]).config for more in ([], ["model.quant=nf4"])]
    plain, quantised = (rehearse_run(config, look_around(config, require_data=False)[0]) for config in configs)
    assert quantised.parts.weights < plain.parts.weights and quantised.num_parameters == plain.num_parameters
    # The same products, the dequantised weight beside them.
    flops = [sum(op.flops * n for op, n in r.work.items() if "matmul" in op.kind) for r in (plain, quantised)]
    assert flops[0] == flops[1]
