from __future__ import annotations

import errno
import json
import os
import resource
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lorica.errors import CheckpointError
from lorica.training import checkpoint as checkpoints
from lorica.training.checkpoint import (
    clean_leftovers,
    discard_after,
    find_checkpoints,
    latest_valid,
    prune,
    read_checkpoint,
    restore_parameters,
    save_checkpoint,
)

from .conftest import in_child, kill_self

FILES = ("manifest.json", "optimizer.safetensors", "rng.safetensors", "state.json", "trainable.safetensors")


def make_tensors(value: float = 1.0) -> dict[str, dict[str, Tensor]]:
    return {
        "trainable": {"a": torch.full((4, 3), value), "half": torch.ones(2, dtype=torch.bfloat16)},
        "optimizer": {"a.step": torch.tensor(value)},
        "rng": {"torch.cpu": torch.arange(9, dtype=torch.uint8)},
    }


def save(folder: Path, step: int, value: float = 1.0) -> Path:
    return save_checkpoint(folder, step, make_tensors(value), {"value": value})


def refuse(warning: str) -> None:
    raise AssertionError(warning)


def steps(folder: Path) -> list[int]:
    return [int(path.name.removeprefix("step-")) for path in find_checkpoints(folder)]


def flip(file: Path, position: int) -> None:
    content = bytearray(file.read_bytes())
    content[position] ^= 0x01
    file.write_bytes(content)


def test_what_was_saved_is_read(tmp_path: Path) -> None:
    path = save(tmp_path / "checkpoints", 50, 2.5)
    found = read_checkpoint(path)
    assert path.name == "step-00000050" and sorted(f.name for f in path.iterdir()) == sorted(FILES)
    assert (found.step, found.state) == (50, {"value": 2.5})
    for stem, named in make_tensors(2.5).items():
        assert found.tensors[stem].keys() == named.keys()
        for name, tensor in named.items():
            assert torch.equal(found.tensors[stem][name], tensor) and found.tensors[stem][name].dtype == tensor.dtype


def test_tensors_of_any_layout_are_saved(tmp_path: Path) -> None:
    tensors = make_tensors() | {"trainable": {"a": nn.Parameter(torch.arange(6.0).reshape(2, 3)).t()}}
    read = read_checkpoint(save_checkpoint(tmp_path, 1, tensors, {}))
    assert torch.equal(read.tensors["trainable"]["a"], torch.arange(6.0).reshape(2, 3).t())


def boundaries(patch: pytest.MonkeyPatch, act: Callable[[int], None]) -> None:
    """Call `act(n)` before and after each operation on the file system that saving does, counting n from 0."""
    count = iter(range(10_000))

    def wrap(owner: Any, name: str) -> None:
        original = getattr(owner, name)

        def wrapped(*arguments: Any, **keywords: Any) -> Any:
            act(next(count))
            result = original(*arguments, **keywords)
            act(next(count))
            return result

        patch.setattr(owner, name, wrapped)

    for owner, names in {
        checkpoints: ("save_file",),
        Path: ("mkdir", "write_text"),
        os: ("fsync", "rename", "unlink", "rmdir"),
    }.items():
        for name in names:
            wrap(owner, name)


@pytest.mark.parametrize("new_step", [20, 10], ids=["next", "replaced"])
def test_killed_at_any_file_boundary_a_whole_checkpoint_is_left(tmp_path: Path, new_step: int) -> None:
    """Reliability case 1, also for a save that replaces the checkpoint of the same step."""
    outcomes = []
    save(tmp_path / "before", 10, 1.0)
    for fatal in range(10_000):
        folder = tmp_path / str(fatal)
        shutil.copytree(tmp_path / "before", folder)

        def work(folder: Path = folder, fatal: int = fatal) -> None:
            boundaries(pytest.MonkeyPatch(), lambda count: kill_self() if count == fatal else None)
            save(folder, new_step, 2.0)

        code = in_child(work)
        interrupted = new_step == 20 and (folder / ".step-00000020.tmp").exists()
        warnings: list[str] = []
        found = latest_valid(folder, warnings.append)
        assert found is not None and not list(folder.glob(".*"))
        outcomes.append(found.state["value"])
        if code == 0:
            break
        assert code == -9
        assert ["Saving step-00000020 in" in warning for warning in warnings] == [True] * interrupted
    # The old one up to the rename, the new one from then on, never neither.
    assert outcomes == sorted(outcomes) and set(outcomes) == {1.0, 2.0}
    assert len(outcomes) > 25


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("where", [0, 0.5, -1])
def test_a_flipped_byte_is_noticed_and_the_file_named(tmp_path: Path, name: str, where: float) -> None:
    """Reliability case 5: an explicit path fails, the automatic choice falls back and says so."""
    save(tmp_path, 10)
    path = save(tmp_path, 20)
    size = (path / name).stat().st_size
    flip(path / name, int(where * size) if where >= 0 else size - 1)
    with pytest.raises(CheckpointError, match=name.replace(".", r"\.")):
        read_checkpoint(path)
    warnings: list[str] = []
    found = latest_valid(tmp_path, warnings.append)
    assert found is not None and found.step == 10
    assert len(warnings) == 1 and name in warnings[0] and "step-00000020" in warnings[0]


@pytest.mark.parametrize("name", FILES)
def test_a_missing_file_is_an_error_that_names_it(tmp_path: Path, name: str) -> None:
    """Reliability case 6."""
    path = save(tmp_path, 10)
    (path / name).unlink()
    with pytest.raises(CheckpointError, match=name):
        read_checkpoint(path)


@pytest.mark.parametrize("stem", ["trainable", "optimizer", "rng"])
def test_a_checkpoint_saved_without_a_part_is_refused(tmp_path: Path, stem: str) -> None:
    tensors = make_tensors()
    del tensors[stem]
    path = save_checkpoint(tmp_path, 10, tensors, {})
    with pytest.raises(CheckpointError, match=f"saved without {stem}"):
        read_checkpoint(path)


def test_every_fault_of_a_checkpoint_is_told_at_once(tmp_path: Path) -> None:
    path = save(tmp_path, 10)
    (path / "rng.safetensors").unlink()
    (path / "state.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"rng\.safetensors is missing; state\.json has 2 bytes"):
        read_checkpoint(path)


def test_what_is_no_checkpoint_is_called_so(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="is no checkpoint"):
        read_checkpoint(tmp_path / "step-00000007")


def test_without_checkpoints_there_is_no_latest(tmp_path: Path) -> None:
    assert latest_valid(tmp_path / "nowhere", refuse) is None


def test_when_all_are_damaged_nothing_starts_anew_in_silence(tmp_path: Path) -> None:
    for step in (10, 20):
        flip(save(tmp_path, step) / "rng.safetensors", -1)
    with pytest.raises(CheckpointError, match="None of the 2 checkpoints"):
        latest_valid(tmp_path, lambda warning: None)


def test_a_full_disk_leaves_the_old_checkpoint_and_nothing_half(tmp_path: Path) -> None:
    """Reliability case 7: the kernel really refuses the bytes, at every size from none to almost all."""
    save(tmp_path, 10)
    largest = max(file.stat().st_size for file in save(tmp_path / "probe", 20, 2.0).iterdir())
    for limit in range(0, largest, 40):

        def work(limit: int = limit) -> None:
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
            with pytest.raises(CheckpointError, match=r"It needs [\d,]+ bytes, [\d,]+ are free"):
                save(tmp_path, 20, 2.0)

        assert in_child(work) == 0, limit
        assert steps(tmp_path) == [10] and not list(tmp_path.glob(".*"))
    assert read_checkpoint(find_checkpoints(tmp_path)[0]).state == {"value": 1.0}


def test_a_disk_that_fills_while_replacing_gives_the_old_one_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save(tmp_path, 10, 1.0)
    original = os.rename

    def rename(source: Path, target: Path) -> None:
        if str(source).endswith(".tmp"):
            raise OSError(errno.ENOSPC, "No space left on device")
        original(source, target)

    monkeypatch.setattr(os, "rename", rename)
    with pytest.raises(CheckpointError, match="No space left on device"):
        save(tmp_path, 10, 2.0)
    assert read_checkpoint(find_checkpoints(tmp_path)[0]).state == {"value": 1.0} and not list(tmp_path.glob(".*"))


def test_leftovers_are_never_taken_for_checkpoints(tmp_path: Path) -> None:
    path = save(tmp_path, 10)
    for name in (".step-00000020.tmp", ".step-00000005.del"):
        shutil.copytree(path, tmp_path / name)
    shutil.copytree(path, tmp_path / ".step-00000030.old")
    assert steps(tmp_path) == [10]
    assert clean_leftovers(tmp_path) == ["step-00000020"]
    assert steps(tmp_path) == [10, 30] and not list(tmp_path.glob(".*"))


def test_pruning_keeps_the_newest_and_the_best(tmp_path: Path) -> None:
    """Reliability case 14."""
    for step in (10, 20, 30, 40, 50):
        save(tmp_path, step)
    prune(tmp_path, keep=2, best=20)
    assert steps(tmp_path) == [20, 40, 50]
    prune(tmp_path, keep=0, best=None)
    assert steps(tmp_path) == [50]


def test_pruning_never_deletes_the_last_valid_one(tmp_path: Path) -> None:
    for step in (10, 20, 30):
        save(tmp_path, step)
    for step in (20, 30):
        flip(tmp_path / f"step-{step:08d}" / "trainable.safetensors", -1)
    prune(tmp_path, keep=2, best=None)
    assert steps(tmp_path) == [10, 20, 30]


def test_a_resumed_run_discards_the_future_of_the_old_one(tmp_path: Path) -> None:
    for step in (10, 20, 30):
        save(tmp_path, step)
    discard_after(tmp_path, 10)
    assert steps(tmp_path) == [10]


def test_restored_parameters_equal_and_misfits_are_listed_without_a_change() -> None:
    parameters = {"a": nn.Parameter(torch.zeros(2, 2)), "b": nn.Parameter(torch.zeros(3))}
    restore_parameters(parameters, {"a": torch.ones(2, 2), "b": torch.ones(3)})
    assert parameters["a"].sum() == 4 and parameters["b"].sum() == 3
    with pytest.raises(CheckpointError) as caught:
        restore_parameters(parameters, {"a": torch.zeros(2, 3), "c": torch.zeros(1)})
    for fault in ("b is missing in the checkpoint", "c is not in the model", "a is torch.float32 [2, 3]"):
        assert fault in str(caught.value)
    assert parameters["a"].sum() == 4


def test_there_is_no_pickle(tmp_path: Path) -> None:
    """Reliability case 15: each file is JSON or safetensors, whose header is JSON too."""
    for file in save(tmp_path, 10).iterdir():
        content = file.read_bytes()
        if file.suffix == ".json":
            json.loads(content)
        else:
            length = int.from_bytes(content[:8], "little")
            assert file.suffix == ".safetensors" and json.loads(content[8 : 8 + length])
