"""Arithmetic on convolutions, attention, experts: folders computed with, loaded again, against their own updates."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lorica
from lorica.errors import AdapterError
from lorica.interop.low_rank import read_low_rank
from lorica.interop.pair_layouts import EMBEDDING, MATRIX, Layout, layout_of
from lorica.methods.lora_conv import LoraConv
from lorica.methods.lora_kinds import LoraAdapter
from lorica.methods.lora_weights import LoraWeights
from lorica.recipes.adapter import combine_adapters, convert, scale

from .small_models import randomise
from .test_peft_zoo import MOE, moe


class Kinds(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(30, 6)
        self.plane = nn.Conv2d(4, 6, 3)
        self.grouped = nn.Conv1d(4, 8, 3, groups=2)
        self.attention = nn.MultiheadAttention(12, 2)
        self.own = Own()


class Own(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stack = nn.Parameter(torch.randn(3, 5, 7))
        self.matrix = nn.Parameter(torch.randn(5, 7))


def kinds() -> nn.Module:
    torch.manual_seed(0)
    return Kinds()


NAMES = ("table", "plane", "grouped", "attention", "own")


def saved(folder: Path, seed: int, rank: int = 4, targets: Any = NAMES, **options: Any) -> nn.Module:
    model = lorica.adapt(kinds(), lorica.LoRA(rank=rank, alpha=3, targets=targets, **options))
    for _ in range(seed):
        randomise(lorica.trainable_parameters(model).values())
    lorica.save_adapter(model, folder)
    return model


def updates(model: nn.Module) -> dict[str, Tensor]:
    """Each weight's update, dense; of a grouped convolution B A by group."""
    found: dict[str, Tensor] = {}
    for name, adapter in lorica.adapters(model).items():
        if isinstance(adapter, LoraWeights):
            found |= {f"{name}.{key}": adapter.delta_weight(key).detach() for key in adapter.sites}
        elif isinstance(adapter, LoraConv):
            groups = adapter.base.groups
            a, b = (half.detach().flatten(1).chunk(groups) for half in (adapter.lora_a, adapter.lora_b))
            found[name] = adapter.scale * torch.stack([y @ x for x, y in zip(a, b, strict=True)])
        else:
            assert isinstance(adapter, LoraAdapter)
            found[name] = adapter.delta_weight()
    return found


def check(folder: Path, wanted: dict[str, Tensor], tolerance: float = 1e-5) -> None:
    got = updates(lorica.load_adapter(kinds(), folder))
    assert got.keys() == wanted.keys()
    for name, update in wanted.items():
        torch.testing.assert_close(got[name], update, rtol=tolerance, atol=tolerance)


def test_every_kind_is_scaled_concatenated_and_cut(tmp_path: Path) -> None:
    first = updates(saved(tmp_path / "a", 1))
    second = updates(saved(tmp_path / "b", 2, rank=2))
    scale(tmp_path / "a", -0.5, tmp_path / "scaled")
    check(tmp_path / "scaled", {name: -0.5 * x for name, x in first.items()})
    sources = [f"{tmp_path / 'a'}=2", f"{tmp_path / 'b'}=-1"]
    wanted = {name: 2 * x - second[name] for name, x in first.items()}
    assert combine_adapters(sources, tmp_path / "both", "cat").rank == 6
    check(tmp_path / "both", wanted)
    with pytest.raises(AdapterError, match=r"grouped: a convolution with groups cannot be given another rank"):
        combine_adapters(sources, tmp_path / "cut", "svd", rank=2)


@pytest.mark.parametrize("how", ["svd", "linear", "ties", "dare"])
def test_the_other_ways_work_on_the_flat_update(how: Any, tmp_path: Path) -> None:
    targets = ("plane", "own", "attention")
    first, second = (updates(saved(tmp_path / name, i, targets=targets)) for i, name in enumerate("ab", 1))
    sources = [str(tmp_path / "a"), str(tmp_path / "b")]
    # At full rank and density nothing is lost, and all but `linear` and `ties` are the sum.
    wanted = {name: x + second[name] for name, x in first.items()}
    computed = combine_adapters(sources, tmp_path / "out", how, rank=12, density=1.0)
    got = updates(lorica.load_adapter(kinds(), tmp_path / "out"))
    assert got.keys() == wanted.keys()
    if how in ("svd", "dare"):
        check(tmp_path / "out", wanted, 1e-4)
        assert computed.error < 1e-5


def test_cutting_a_convolution_is_the_svd_of_its_flat_kernel(tmp_path: Path) -> None:
    update = updates(saved(tmp_path / "a", 1, targets="plane"))["plane"][0]
    convert(tmp_path / "a", tmp_path / "cut", rank=2)
    u, s, vh = torch.linalg.svd(update.double(), full_matrices=False)
    check(tmp_path / "cut", {"plane": ((u[:, :2] * s[:2]) @ vh[:2]).float()[None]})


def test_experts_are_cut_one_by_one(tmp_path: Path) -> None:
    model = lorica.adapt(moe("qwen3-moe"), lorica.LoRA(rank=4, targets=("experts", "q_proj")))
    randomise(lorica.trainable_parameters(model).values())
    lorica.save_adapter(model, tmp_path / "a")
    assert convert(tmp_path / "a", tmp_path / "cut", rank=3).rank == 3
    name, num_experts = "model.layers.1.mlp.experts", MOE["qwen3-moe"].num_experts
    found = lorica.adapters(lorica.load_adapter(moe("qwen3-moe"), tmp_path / "cut"))[name]
    before = lorica.adapters(model)[name]
    assert isinstance(found, LoraWeights) and isinstance(before, LoraWeights)
    for key in ("gate_up_proj", "down_proj"):
        u, s, vh = torch.linalg.svd(before.delta_weight(key).double(), full_matrices=False)
        wanted = (u[..., :3] * s[..., None, :3]) @ vh[..., :3, :]
        assert len(wanted) == num_experts
        torch.testing.assert_close(found.delta_weight(key).double(), wanted, rtol=1e-5, atol=1e-5)


def test_what_only_one_has_is_kept_by_its_kind(tmp_path: Path) -> None:
    first = updates(saved(tmp_path / "a", 1, targets=("plane", "own")))
    second = updates(saved(tmp_path / "b", 2, targets=("attention", "table")))
    combine_adapters([str(tmp_path / "a"), str(tmp_path / "b")], tmp_path / "both", "cat")
    check(tmp_path / "both", first | second)


def test_experts_of_unlike_ranks_and_doras_are_refused(tmp_path: Path) -> None:
    saved(tmp_path / "a", 1, targets="own", rank_pattern={r"own\.stack": 2}, target_parameters=("stack", "matrix"))
    with pytest.raises(AdapterError, match="its parameters differ in rank or alpha"):
        read_low_rank(tmp_path / "a")
    model = lorica.adapt(kinds(), lorica.DoRA(rank=2, targets="plane"))
    lorica.save_adapter(model, tmp_path / "b")
    with pytest.raises(AdapterError, match="peft_type is DoRA"):
        read_low_rank(tmp_path / "b")
    saved(tmp_path / "c", 1, targets="plane", lora_bias=True)
    with pytest.raises(AdapterError, match=r"plane\.lora_B\.bias is no tensor of LoRA's pairs"):
        read_low_rank(tmp_path / "c")


@pytest.mark.parametrize("layout", [Layout(), Layout(num_experts=3), Layout(kernel=(3, 2)), Layout(MATRIX, (3,), 2)])
def test_joining_is_splitting_backwards(layout: Layout) -> None:
    taps = (1,) * len(layout.kernel)
    a = torch.randn(4 * layout.num_experts, 5, *layout.kernel)
    b = torch.randn(8, 4 * layout.num_experts // layout.num_groups, *taps)
    pairs = layout.split(a, b)
    assert len(pairs) == len(layout.part_names("x")) == layout.num_parts
    assert all(torch.equal(x, y) for x, y in zip(layout.join(pairs), (a, b), strict=True))
    assert layout_of(a, b, MATRIX, 4, is_stack=layout.num_experts > 1) == layout


@pytest.mark.parametrize(
    ("a", "b", "names"),
    [
        ((4, 5), (8, 3), MATRIX),
        ((4, 5), (8, 2), MATRIX),
        ((4, 5, 3), (8, 4, 3), MATRIX),
        ((4, 5, 3), (8, 4), MATRIX),
        ((4, 5, 3), (7, 2, 1), MATRIX),
        ((4, 5, 3), (8, 4, 1), EMBEDDING),
        ((4,), (8,), MATRIX),
        ((3, 5), (8, 3), MATRIX),
    ],
)
def test_shapes_that_are_no_pair_have_no_layout(a: tuple[int, ...], b: tuple[int, ...], names: tuple[str, str]) -> None:
    assert layout_of(torch.zeros(a), torch.zeros(b), names, 4, is_stack=False) is None


def test_parts_have_names_of_their_own() -> None:
    assert Layout().part_names("x") == ["x"]
    assert Layout(num_experts=2).part_names("mlp.experts") == ["mlp.experts[0]", "mlp.experts[1]"]
