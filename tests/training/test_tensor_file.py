"""Files are read and written as the safetensors library does it, and never more than a part is in memory."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from lorica.errors import CheckpointError
from lorica.training import tensor_file
from lorica.training.tensor_file import Layout, PartedTensors, TensorFile, layout_of, part_of, write_tensor_file


def make_tensors() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {
        "bytes": torch.randint(0, 256, (7, 3), generator=generator, dtype=torch.uint8),
        "matrix": torch.randn(5, 11, generator=generator),
        "half": torch.randn(3, 3, generator=generator).to(torch.bfloat16),
        "scalar": torch.tensor(2.5),
        "empty": torch.empty(0, 4),
        "long": torch.arange(13),
        "yes": torch.tensor([True, False, True]),
        "transposed": torch.randn(4, 6, generator=generator).T,
    }


class Counting(PartedTensors):
    """Tensors that note how much of them is asked for at once."""

    def __init__(self, tensors: dict[str, Tensor]) -> None:
        self.tensors, self.asked = tensors, list[int]()

    def layout(self, name: str) -> Layout:
        return layout_of(self.tensors, name)

    def part(self, name: str, begin: int, end: int) -> Tensor:
        self.asked.append(end - begin)
        return part_of(self.tensors, name, begin, end)

    def __iter__(self) -> Iterator[str]:
        return iter(self.tensors)

    def __len__(self) -> int:
        return len(self.tensors)


@pytest.mark.parametrize("part", [4, 1 << 18])
def test_what_is_written_is_what_the_library_reads(tmp_path: Path, part: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tensor_file, "PART", part)
    tensors = make_tensors()
    counting = Counting(tensors)
    write_tensor_file(tmp_path / "file", counting)
    found = load_file(tmp_path / "file")
    assert found.keys() == tensors.keys()
    assert all(
        torch.equal(found[name], tensor) and found[name].dtype == tensor.dtype for name, tensor in tensors.items()
    )
    assert max(counting.asked) <= part


def test_what_the_library_writes_is_read_whole_and_in_parts(tmp_path: Path) -> None:
    tensors = {name: tensor.contiguous() for name, tensor in make_tensors().items()}
    save_file(tensors, tmp_path / "file", metadata={"format": "pt"})
    found = TensorFile(tmp_path / "file")
    (tmp_path / "file").unlink()
    assert found.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert layout_of(found, name) == (tensor.shape, tensor.dtype)
        assert layout_of(found, name).num_bytes == tensor.nbytes
        assert torch.equal(found[name], tensor)
        for begin in range(tensor.numel()):
            assert torch.equal(part_of(found, name, begin, tensor.numel()), tensor.flatten()[begin:])


def test_files_that_are_none_or_cut_short_are_refused(tmp_path: Path) -> None:
    (tmp_path / "none").write_bytes(b"no such thing as a header in here")
    (tmp_path / "empty").touch()
    for name in ("none", "empty"):
        with pytest.raises(CheckpointError, match="is no safetensors file"):
            TensorFile(tmp_path / name)
    write_tensor_file(tmp_path / "short", {"a": torch.ones(100)})
    found = TensorFile(tmp_path / "short")
    with (tmp_path / "short").open("r+b") as file:
        file.truncate(200)
    with pytest.raises(CheckpointError, match=r"short is cut short: it ends at byte 200"):
        found["a"]
