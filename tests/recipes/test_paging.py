"""Where moments are paged to: the tiers, the time, the disk; and what plan says of it."""

from __future__ import annotations

import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from lorica.config import RunConfig, load_config
from lorica.errors import DoesNotFitError
from lorica.recipes import fitting, paging
from lorica.recipes.paging import existing_folder, plan_offloading, plan_paging, split_tiers

MIB = 1 << 20


def configuration(folder: Path, *overrides: str) -> RunConfig:
    output = f"train.output={folder}/not/there"
    return load_config(None, ["model.base=b", "data.train=d", output, *overrides]).config


def rehearsed(paged_bytes: int, offloaded_bytes: int = 0) -> Any:
    parts = SimpleNamespace(optimizer=3 * MIB)
    return SimpleNamespace(paged_bytes=paged_bytes, offloaded_bytes=offloaded_bytes, parts=parts)


def test_tiers_of_a_gpu_and_of_a_cpu(tmp_path: Path) -> None:
    config = configuration(tmp_path, "train.optimizer_host_memory=10MiB")
    assert split_tiers(config, torch.device("cuda"), 64 * MIB) == (10 * MIB, 54 * MIB)
    assert split_tiers(config, torch.device("cuda"), 4 * MIB) == (4 * MIB, 0)
    assert split_tiers(config, torch.device("cpu"), 64 * MIB) == (0, 64 * MIB)


def test_the_file_is_timed_beside_the_run_and_leaves_nothing(tmp_path: Path) -> None:
    config = configuration(tmp_path)
    found = plan_paging(config, torch.device("cpu"), rehearsed(80 * MIB))
    assert found is not None and found.folder == str(tmp_path) == str(existing_folder(config))
    assert (found.device_bytes, found.host_bytes, found.file_bytes) == (3 * MIB, 0, 80 * MIB)
    assert found.fits and found.seconds is not None and 0 < found.seconds < 600
    assert list(tmp_path.iterdir()) == []
    assert plan_paging(config, torch.device("cpu"), rehearsed(0)) is None


def test_a_full_disk_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: SimpleNamespace(free=70 * MIB))
    monkeypatch.setattr(paging, "_file_seconds", lambda folder, contents: 0.1)
    found = plan_paging(configuration(tmp_path), torch.device("cpu"), rehearsed(80 * MIB))
    assert found is not None and not found.fits and found.seconds == pytest.approx(1.0)
    with pytest.raises(DoesNotFitError, match=r"80.*MiB of disk.* 70.*MiB"):
        paging.refuse_full_disk(found)


def test_inputs_of_layers_share_the_disk_with_the_moments(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: SimpleNamespace(free=100 * MIB))
    monkeypatch.setattr(paging, "_file_seconds", lambda folder, contents: 0.1)
    config, device, both = configuration(tmp_path), torch.device("cpu"), rehearsed(80 * MIB, 40 * MIB)
    alone = plan_offloading(config, device, both, None)
    assert alone is not None and alone.fits and alone.seconds == pytest.approx(0.5)
    assert (alone.host_bytes, alone.file_bytes, alone.free_bytes) == (0, 40 * MIB, 100 * MIB)
    beside = plan_offloading(config, device, both, plan_paging(config, device, both))
    assert beside is not None and beside.free_bytes == 20 * MIB and not beside.fits
    with pytest.raises(DoesNotFitError, match=r"layers keep needs 40.*MiB of disk.* 20.*MiB.*micro_batch_tokens"):
        paging.refuse_full_disk(beside)
    assert plan_offloading(config, device, rehearsed(80 * MIB), None) is None


def test_inputs_of_layers_on_a_gpu_wait_in_host_memory(tmp_path: Path) -> None:
    found = plan_offloading(configuration(tmp_path), torch.device("cuda"), rehearsed(0, 40 * MIB), None)
    assert found is not None and (found.host_bytes, found.file_bytes) == (40 * MIB, 0) and found.fits


def test_paging_is_not_offered_where_the_disk_is_full(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fitting, "rehearse_run", lambda *_: SimpleNamespace(parts=SimpleNamespace(optimizer=1 << 30)))
    setting: Any = SimpleNamespace(device=torch.device("cpu"))
    for free, expected in ((2 << 30, True), (1 << 29, False)):
        monkeypatch.setattr(shutil, "disk_usage", lambda folder, free=free: SimpleNamespace(free=free))
        assert fitting._can_page(configuration(tmp_path), setting) is expected
