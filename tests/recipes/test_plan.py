"""`lorica plan`: a folder of nothing but config.json, the run's own data, what would fit, and the truth of it all."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from lorica.cli import main
from lorica.config import RunConfig, load_config
from lorica.data.sampler import Order
from lorica.errors import DataError, DoesNotFitError, TargetError
from lorica.recipes.plan import plan
from lorica.recipes.preparing import prepare
from lorica.recipes.rehearsing import look_around, rehearse_run

# Small enough for fractions of a second, large enough that a smaller micro batch shows.
SMALL = ("train.batch_tokens=1024", "data.max_length=256", "model.dtype=bfloat16", "train.threads=1")


@pytest.fixture(autouse=True)
def _hasty(monkeypatch: pytest.MonkeyPatch) -> None:
    # How fast this machine is matters to no test here.
    monkeypatch.setattr("lorica.training.speed._SECONDS_A_RATE", 0.01)


@pytest.fixture
def bare(base: Path, tmp_path: Path) -> Path:
    """A base folder that holds config.json alone: the embedded model's, with two layers."""
    folder = tmp_path / "bare"
    folder.mkdir()
    config = json.loads((base / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 2}))
    return folder


def configuration(base: Path | str, data: Path | str = "/nowhere/rows.jsonl", *overrides: str) -> RunConfig:
    return load_config(None, [f"model.base={base}", f"data.train={data}", *SMALL, *overrides]).config


def rows(path: Path, count: int) -> Path:
    lines = [json.dumps({"prompt": f"Question {i}?", "response": "word " * (5 + i % 7)}) for i in range(count)]
    path.write_text("\n".join(lines) + "\n")
    return path


def test_a_folder_with_nothing_but_its_config(bare: Path, capsys: pytest.CaptureFixture[str]) -> None:
    threads = torch.get_num_threads()
    report = plan(configuration(bare))
    assert sum(part.bytes for part in report.parts) == report.peak_bytes
    assert report.fits and report.alternatives == [] and report.measured is None
    assert report.steps is None and report.seconds is None and report.tokens_per_second > 0
    assert report.micro_batch_tokens == 1024 and report.micro_batches_per_step == 1
    assert any("are assumed" in note for note in report.assumptions)
    out = capsys.readouterr().out
    assert "activations" in out and "tokens/s (estimate)" in out
    assert torch.get_num_threads() == threads


def test_the_run_s_own_data(tmp_path: Path) -> None:
    config = configuration("embedded", rows(tmp_path / "rows.jsonl", 200), "train.epochs=2", "data.eval=null")
    report = plan(config)
    dataset = prepare(config).train
    order = Order(dataset.lengths, seed=0, batch_tokens=1024, epochs=2.0)
    assert report.steps == order.num_steps
    assert report.seconds == pytest.approx(2 * dataset.lengths.sum() / report.tokens_per_second)
    assert 0.9 * 1024 < report.micro_batch_tokens <= 1024 and report.assumptions == []


def test_a_dry_run_wants_the_data(bare: Path) -> None:
    with pytest.raises(DataError):
        plan(configuration("embedded"), require_data=True)


def test_what_would_fit_fits(bare: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = configuration(bare)
    whole = plan(config)
    room = whole.peak_bytes * 9 // 10
    report = plan(config, memory_bytes=whole.process_bytes + room)
    assert not report.fits and report.alternatives
    setting, _ = look_around(config, require_data=False)
    for alternative in report.alternatives:
        changed = configuration(bare, "/nowhere/rows.jsonl", *alternative.overrides)
        assert rehearse_run(changed, setting).peak_bytes == alternative.peak_bytes < room
    first = report.alternatives[0]
    assert first.overrides == ["train.micro_batch_tokens=512"] and first.cost.startswith("same result")
    out = capsys.readouterr().out
    assert "DOES NOT FIT" in out and "train.micro_batch_tokens=512" in out


def test_nothing_fits(bare: Path) -> None:
    with pytest.raises(DoesNotFitError, match=r"The least that was found is .* MiB") as caught:
        plan(configuration(bare), memory_bytes=1 << 20)
    assert caught.value.exit_code == 4 and "train.activation_checkpointing=true" in str(caught.value)
    assert " 0 B are free for it" in str(caught.value), "what is taken already is more than what may be used"


def test_paged_moments_are_told_by_place(bare: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    full = ("method.name=full", "train.optimizer_memory=2MiB", f"train.output={tmp_path / 'run'}")
    report = plan(configuration(bare, "/nowhere/rows.jsonl", *full))
    paging = report.paging
    assert paging is not None and paging.device_bytes <= 2 << 20 and paging.host_bytes == 0
    held = paging.device_bytes + paging.file_bytes
    # The buffers are counted with the device, and each page is rounded up to 64 bytes.
    assert 8 * report.trainable_parameters <= held < 8.2 * report.trainable_parameters + (2 << 20)
    out = " ".join(capsys.readouterr().out.split())
    assert "of disk needed" in out and "go there and back each step, up to" in out


def test_inputs_of_checkpointed_layers_are_told_by_place(
    bare: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = f"train.output={tmp_path / 'run'}"
    report = plan(configuration(bare, "/nowhere/rows.jsonl", "train.activation_checkpointing=offload", output))
    offloading = report.offloading
    # Two layers of 256 in bfloat16.
    assert offloading is not None and offloading.file_bytes == 2 * 1024 * 256 * 2 and report.fits
    assert offloading.host_bytes == 0 and offloading.folder == str(tmp_path) and offloading.seconds > 0
    out = " ".join(capsys.readouterr().out.split())
    assert "Inputs of checkpointed layers: 1.0 MiB wait for backward in a file" in out and "of disk needed" in out


def test_targets_that_match_nothing_come_before_the_rows(bare: Path, tmp_path: Path) -> None:
    (tmp_path / "broken.jsonl").write_text("{no json\n")
    with pytest.raises(TargetError, match="no_such"):
        plan(configuration("embedded", tmp_path / "broken.jsonl", "method.targets=[no_such]"))


def test_a_run_for_a_gpu_that_is_not_here(bare: Path, capsys: pytest.CaptureFixture[str]) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    report = plan(configuration(bare, "/nowhere/rows.jsonl", "model.device=cuda", "model.quant=nf4"))
    assert report.tokens_per_second is None and any("no cuda device here" in note for note in report.assumptions)
    assert "tokens/s" not in capsys.readouterr().out


def test_the_command(bare: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = tmp_path / "run.yaml"
    run.write_text(f"model: {{base: {bare}}}\ndata: {{train: rows.jsonl}}\n")
    assert main(["plan", str(run), *SMALL, "--memory", "64GiB", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["fits"] and report["memory_bytes"] == 64 << 30 and report["dtype"] == "bfloat16"
    assert {part["name"] for part in report["parts"]} >= {"weights", "adapter", "optimizer", "activations"}


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="peak memory cannot be reset on this system")
@pytest.mark.parametrize("checkpointing", ["false", "offload"])
def test_predicted_against_measured(base: Path, checkpointing: str) -> None:
    how = f"train.activation_checkpointing={checkpointing}"
    report = plan(configuration(base, "/nowhere/rows.jsonl", "data.max_length=512", how), measure=True)
    assert report.measured is not None
    assert 0.85 <= report.measured.ratio <= 1.15, report
