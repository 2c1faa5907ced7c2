"""Low-rank arithmetic against dense float64 algebra written out, the papers' rules worked by hand, and PEFT."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import lorica
from lorica.errors import AdapterError, ConfigError
from lorica.interop.arithmetic import (
    LowRank,
    combine,
    concatenate,
    dare,
    delta,
    factor,
    fold,
    norm,
    pad,
    relative_error,
    ties,
    truncate,
)
from lorica.interop.low_rank import read_low_rank, write_low_rank


def pair(rank: int, seed: int, *, scale: float = 1.0, size: tuple[int, int] = (12, 20)) -> LowRank:
    generator = torch.Generator().manual_seed(seed)
    return LowRank(
        torch.randn(rank, size[1], generator=generator), torch.randn(size[0], rank, generator=generator), scale
    )


def dense(x: LowRank) -> Tensor:
    return x.scale * x.b.double() @ x.a.double()


def close(ours: Tensor, theirs: Tensor, tolerance: float = 1e-5) -> None:
    torch.testing.assert_close(ours.double(), theirs.double(), rtol=0, atol=tolerance)


@pytest.mark.parametrize("rank", [1, 5, 12, 16])
def test_norm_needs_no_dense_update(rank: int) -> None:
    """Rank 16 is more than the update's 12 rows."""
    x = pair(rank, 0, scale=-0.7)
    assert norm(x) == pytest.approx(float(dense(x).norm()), rel=1e-12)
    close(delta(x), dense(x), 1e-12)


def test_folding_and_padding_change_nothing() -> None:
    x = pair(3, 0, scale=2.5)
    close(dense(pad(fold(x), 5)), dense(x))
    assert pad(fold(x), 5).rank == 5 and fold(x).scale == 1.0 and torch.equal(fold(x).a, x.a)


@pytest.mark.parametrize("rank", [1, 3, 6])
def test_truncation_is_the_nearest_and_says_how_near(rank: int) -> None:
    x = pair(8, 1, scale=0.5)
    u, s, vh = torch.linalg.svd(dense(x), full_matrices=False)
    cut = truncate(x, rank)
    close(dense(cut.pair), u[:, :rank] * s[:rank] @ vh[:rank])
    assert cut.error == pytest.approx(float((dense(x) - dense(cut.pair)).norm()), rel=1e-5)
    assert cut.norm == pytest.approx(float(dense(x).norm())) and cut.pair.rank == rank
    assert relative_error([cut, cut]) == pytest.approx(cut.error / cut.norm)


def test_a_lower_rank_keeps_its_factors() -> None:
    x = pair(3, 1, scale=0.5)
    cut = truncate(x, 8)
    assert cut.error == 0 and torch.equal(cut.pair.a, x.a) and torch.equal(cut.pair.b, x.b * 0.5)


def test_an_update_of_zero_has_no_error() -> None:
    x = pair(3, 1)
    cut = truncate(x._replace(b=torch.zeros_like(x.b)), 2)
    assert relative_error([cut]) == 0 and not bool(torch.isnan(cut.pair.a).any())


def test_ties_by_hand() -> None:
    """Of four values each keeps the two largest: [4, -3, 0, 0], [-1, -5, 0, 0] and [0, 2, 0, 6]. Signs of the sums 3,
    -6, 0 and 6; means of those that agree, after weighting: 4, (-3 - 10) / 2, 0 and 6.
    """
    updates = [torch.tensor([[4.0, -3, 1, 0.5]]), torch.tensor([[-1.0, -5, 0.1, 0]]), torch.tensor([[0.5, 2, 0, 6]])]
    close(ties(updates, [1, 2, 1], 0.5), torch.tensor([[4.0, -6.5, 0, 6]]), 0)


def test_dare_keeps_the_mean() -> None:
    updates = [torch.full((200, 200), 3.0), torch.full((200, 200), -1.0)]
    merged = dare(updates, [1, 0.5], 0.25, torch.Generator().manual_seed(0))
    # Each entry is kept or not, and then 4 times as large.
    assert set(merged.unique().tolist()) == {0.0, 12.0, -2.0, 10.0}
    # Variance of an entry (9 + 0.25) * (1 / 0.25 - 1) = 27.75, over 40,000 entries.
    assert float(merged.mean()) == pytest.approx(2.5, abs=4 * (27.75 / 40_000) ** 0.5)


def test_dare_is_seeded() -> None:
    adapters = [{"x": pair(2, 0)}, {"x": pair(2, 1)}]
    first, again, other = (combine(adapters, [1, 1], "dare", seed=seed)["x"].pair.a for seed in (0, 0, 1))
    assert torch.equal(first, again) and not torch.equal(first, other)


@pytest.mark.parametrize("how", ["cat", "svd", "ties", "dare"])
def test_what_only_one_has_stays(how: Any) -> None:
    x, y = pair(2, 0, scale=3.0), pair(2, 1)
    result = combine([{"x": x}, {"y": y}], [0.5, 2], how, density=1.0)
    close(dense(result["x"].pair), 0.5 * dense(x))
    close(dense(result["y"].pair), 2 * dense(y))


def test_cat_is_exact_and_linear_says_that_it_is_not() -> None:
    x, y = pair(3, 0, scale=2.0), pair(3, 1, scale=0.5)
    exact = 0.3 * dense(x) - dense(y)
    cat, linear = (combine([{"x": x}, {"x": y}], [0.3, -1.0], how)["x"] for how in ("cat", "linear"))
    close(dense(cat.pair), exact)
    assert cat.pair.rank == 6 and cat.error == 0
    assert linear.pair.rank == 3
    assert linear.error == pytest.approx(float((dense(linear.pair) - exact).norm()), rel=1e-5)


@pytest.mark.parametrize("how", ["linear", "cat", "svd", "ties", "dare"])
def test_a_rank_is_kept_to(how: Any) -> None:
    adapters = [{"x": pair(4, 0)}, {"x": pair(4, 1)}]
    assert combine(adapters, [1, 1], how, rank=2)["x"].pair.rank == 2


def test_faults() -> None:
    x = pair(2, 0)
    with pytest.raises(AdapterError, match="other shapes at x"):
        combine([{"x": x}, {"x": pair(2, 0, size=(12, 8))}], [1, 1], "svd")
    with pytest.raises(AdapterError, match="ranks differ at x"):
        combine([{"x": x}, {"x": pair(3, 0)}], [1, 1], "linear")
    with pytest.raises(ConfigError, match="density is 0"):
        combine([{"x": x}], [1], "ties", density=0)
    with pytest.raises(ConfigError, match="expected linear, cat"):
        combine([{"x": x}], [1], "sum")  # type: ignore[arg-type]


def test_factoring_a_dense_update() -> None:
    x = pair(3, 2)
    found = factor(dense(x), 3)
    close(dense(found.pair), dense(x))
    assert found.error < 1e-6
    close(dense(concatenate([x, found.pair], [1, -1])), torch.zeros(12, 20))


TYPES = {"linear": "linear", "cat": "cat", "svd": "svd", "ties": "ties_svd", "dare": "dare_linear_svd"}


@pytest.mark.parametrize("how", TYPES)
def test_peft_combines_alike(how: Any, tiny_llama: Any, tmp_path: Path) -> None:
    """Linear layers and an embedding, rsLoRA beside plain LoRA, a negative weight."""
    peft = pytest.importorskip("peft", reason="needs peft, the oracle")
    targets = ["q_proj", "down_proj", "embed_tokens"]
    configs = [
        peft.LoraConfig(r=4, lora_alpha=8, target_modules=targets),
        peft.LoraConfig(r=4, lora_alpha=6, use_rslora=True, target_modules=targets),
    ]
    model = peft.get_peft_model(tiny_llama(), configs[0], adapter_name="first")
    model.add_adapter("second", configs[1])
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)
    model.save_pretrained(tmp_path, save_embedding_layers=False)
    found = [read_low_rank(tmp_path / name) for name in ("first", "second")]
    weights = [0.7, -0.4] if how != "ties" else [0.7, 0.4]
    # PEFT draws from the global generator, module by module; it drops nothing at density 1.
    density = 1.0 if how == "dare" else 0.4
    model.add_weighted_adapter(["first", "second"], weights, "both", TYPES[how], density=density)
    ours = combine([adapter.pairs for adapter in found], weights, how, density=density)
    model.save_pretrained(tmp_path, selected_adapters=["both"], save_embedding_layers=False)
    theirs = read_low_rank(tmp_path / "both").pairs
    assert ours.keys() == theirs.keys() and len(ours) == 5
    for name in ours:
        close(dense(ours[name].pair), dense(theirs[name]), 1e-5)


def test_peft_drops_what_we_drop(tiny_llama: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the same masks in the same order, DARE is the same."""
    peft = pytest.importorskip("peft", reason="needs peft, the oracle")
    config = peft.LoraConfig(r=4, lora_alpha=8, target_modules=r".*layers\.0\.mlp\.down_proj", init_lora_weights=False)
    model = peft.get_peft_model(tiny_llama(), config, adapter_name="first")
    model.add_adapter("second", config)
    drawn = torch.Generator()
    monkeypatch.setattr(torch, "bernoulli", lambda p, generator=None: (torch.rand(p.shape, generator=drawn) < p).to(p))
    drawn.manual_seed(11)
    model.add_weighted_adapter(["first", "second"], [1.0, 0.5], "both", "dare_linear_svd", density=0.3)
    model.save_pretrained(tmp_path)
    first, second, both = (read_low_rank(tmp_path / name).pairs for name in ("first", "second", "both"))
    drawn.manual_seed(11)
    ours = combine([first, second], [1.0, 0.5], "dare", density=0.3)
    (name,) = ours
    close(dense(ours[name].pair), dense(both[name]))
    assert ours[name].error > 0.1


def saved(tiny_llama: Any, folder: Path, **options: Any) -> Any:
    """An adapter folder of random weights, and the adapted model."""
    model = lorica.adapt(tiny_llama(), lorica.LoRA(**{"rank": 4, "alpha": 8, **options}))
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in lorica.trainable_parameters(model).values():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.2)
    lorica.save_adapter(model, folder)
    return model


def test_a_written_folder_is_plain_and_computes_the_same(tiny_llama: Any, tmp_path: Path) -> None:
    """Ranks and alphas of their own, rsLoRA, an embedding."""
    patterns = {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"down_proj": 3.0}, "rslora": True}
    model = saved(tiny_llama, tmp_path / "a", targets=("q_proj", "down_proj", "embed_tokens"), **patterns)
    assert write_low_rank(tmp_path / "b", read_low_rank(tmp_path / "a")) == 4
    again = read_low_rank(tmp_path / "b")
    assert again.config["r"] == again.config["lora_alpha"] == 4
    assert not again.config["use_rslora"] and not again.config["rank_pattern"] and not again.config["alpha_pattern"]
    assert again.base_fingerprint == read_low_rank(tmp_path / "a").base_fingerprint is not None
    ids = torch.arange(4, 24).view(2, 10)
    loaded = lorica.load_adapter(tiny_llama(), tmp_path / "b")
    close(loaded.eval()(ids).logits, model.eval()(ids).logits)


def test_every_tensor_is_accounted_for(tiny_llama: Any, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    saved(tiny_llama, tmp_path / "a", targets="q_proj")
    (tmp_path / "a" / "lorica.json").unlink()
    file = tmp_path / "a" / "adapter_model.safetensors"
    tensors = load_file(file)
    first = sorted(tensors)[0]
    tensors["base_model.model.other.weight"] = torch.ones(2)
    tensors[first] = tensors[first] * float("nan")
    del tensors[sorted(tensors)[1]]
    save_file(tensors, file)
    with pytest.raises(AdapterError) as error:
        read_low_rank(tmp_path / "a")
    for fault in ("other.weight is no tensor of LoRA", f"{first} holds NaN", "is no pair"):
        assert fault in str(error.value)
