"""EVA and LoRA-GA against float64 decompositions of what they never hold, and against PEFT where it does the same."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.pytorch_utils import Conv1D

import lorica
from lorica.errors import AdapterError, ConfigError, DivergedError, TargetError
from lorica.methods import starts
from lorica.methods.lora import LoRA
from lorica.methods.lora_kinds import LoraLinear
from lorica.methods.starts import PrincipalDirections
from tests.interop.small_models import gpt2, llama, outputs


def loss_fn(model: nn.Module, inputs: Mapping[str, Any], targets: Tensor) -> Tensor:
    return F.cross_entropy(model(**inputs).logits.flatten(0, 1), targets.flatten(), ignore_index=-100, reduction="sum")


def make_batches(number: int = 3, rows: int = 2, length: int = 24) -> list[tuple[dict[str, Tensor], Tensor]]:
    generator = torch.Generator().manual_seed(3)
    ids = torch.randint(3, 64, (number, rows, length), generator=generator)
    targets = torch.cat([ids[..., 1:], torch.full((number, rows, 1), -100)], dim=-1)
    return [({"input_ids": i}, t) for i, t in zip(ids, targets, strict=True)]


def layers(model: nn.Module) -> dict[str, LoraLinear]:
    found = lorica.adapters(model)
    assert all(isinstance(adapter, LoraLinear) for adapter in found.values())
    return found  # type: ignore[return-value]


def same_space(a: Tensor, b: Tensor, tolerance: float) -> None:
    """The rows of both span the same space: all cosines of the angles between the two are 1."""
    a, b = (torch.linalg.qr(rows.double().T)[0] for rows in (a, b))
    assert torch.linalg.svdvals(a.T @ b).min() > 1 - tolerance


def test_directions_of_batches_are_those_of_all_rows_together() -> None:
    """Principal components by an eigendecomposition of the covariance, in float64."""
    torch.manual_seed(0)
    rows = torch.randn(300, 20) * torch.arange(20, 0, -1) ** 1.5 + 3 * torch.randn(20)
    found = PrincipalDirections(20)
    for part in rows.split([30, 200, 70]):
        found.add(part)
    values, vectors = torch.linalg.eigh(torch.cov(rows.double().T))
    got = found.first(5).double()
    torch.testing.assert_close((got @ vectors.flip(1)[:, :5]).abs(), torch.eye(5).double(), atol=1e-4, rtol=0)
    torch.testing.assert_close(found.found[:5].double().norm(dim=1) ** 2 / 299, values.flip(0)[:5], rtol=1e-4, atol=0)
    assert found.num_rows == 300


def test_directions_keep_no_more_than_they_need_and_lose_little() -> None:
    torch.manual_seed(0)
    rows = torch.randn(400, 60) * torch.arange(1, 61) ** -1.0
    found = PrincipalDirections(8)
    for part in rows.split(50):
        found.add(part)
    assert found.found.shape == (8, 60)
    same_space(found.first(3), torch.linalg.svd(rows - rows.mean(0))[2][:3], 5e-3)


def inputs_of(model: nn.Module, batches: Any) -> dict[str, Tensor]:
    """What each linear layer reads of all batches, its mean taken off, [tokens, in] in float64."""
    seen: dict[str, list[Tensor]] = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear | Conv1D):
            module.register_forward_pre_hook(lambda _, args, name=name: seen.setdefault(name, []).append(args[0]))
    with torch.no_grad():
        for inputs, _ in batches:
            model(**inputs)
    rows = {name: torch.cat([x.flatten(0, -2) for x in parts]).double() for name, parts in seen.items()}
    return {name: x - x.mean(0) for name, x in rows.items()}


@pytest.mark.parametrize("make", [llama, gpt2])
def test_evas_directions_explain_as_much_of_the_inputs_as_any_can(make: Any) -> None:
    """Theorem 3.1 of the paper: the variance in the rows of A is the greatest there is."""
    model = lorica.adapt(make(), LoRA(rank=4, init="eva"), loss_fn, make_batches())
    assert torch.equal(outputs(model), outputs(make()))
    rows = inputs_of(make(), make_batches())
    for name, layer in layers(model).items():
        lora_a = layer.lora_a.detach()
        torch.testing.assert_close(lora_a @ lora_a.T, torch.eye(4), atol=1e-5, rtol=0)
        explained, best = (rows[name] @ lora_a.double().T).norm() ** 2, torch.linalg.svdvals(rows[name])[:4].norm() ** 2
        assert explained > 0.97 * best, name
        assert not layer.lora_b.any() and layer.lora_a.requires_grad


def test_eva_leaves_padding_out() -> None:
    """Of rank 16 all 32 directions are kept, and nothing is approximate."""
    generator = torch.Generator().manual_seed(3)
    rows = [torch.randint(3, 64, (length,), generator=generator) for length in (30, 17)]
    ids = nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=1)
    mask = nn.utils.rnn.pad_sequence([torch.ones_like(row) for row in rows], batch_first=True)
    padded = [({"input_ids": ids, "attention_mask": mask}, ids)]
    single = [({"input_ids": row[None]}, row[None]) for row in rows]
    options = LoRA(rank=16, init="eva", targets=("q_proj", "k_proj", "up_proj"))
    ours, theirs = (layers(lorica.adapt(llama(), options, loss_fn, batches)) for batches in (padded, single))
    exact = inputs_of(llama(), single)
    for name, layer in ours.items():
        same_space(layer.lora_a.detach(), theirs[name].lora_a.detach(), 1e-4)
        same_space(layer.lora_a.detach(), torch.linalg.svd(exact[name])[2][:16], 1e-4)


def test_eva_is_pefts_where_both_see_the_same_tokens() -> None:
    peft = pytest.importorskip("peft")
    batches, targets = make_batches(number=1, rows=6, length=40), ["k_proj", "up_proj"]
    eva = peft.EvaConfig(rho=1.0, use_label_mask=False)
    config = peft.LoraConfig(r=16, target_modules=targets, init_lora_weights="eva", eva_config=eva)
    theirs = peft.get_peft_model(llama(), config)
    peft.initialize_lora_eva_weights(theirs, [inputs for inputs, _ in batches], show_progress_bar=False)
    model = lorica.adapt(llama(), LoRA(rank=16, init="eva", targets=tuple(targets)), loss_fn, batches)
    for name, layer in layers(model).items():
        other = theirs.get_submodule(f"base_model.model.{name}").lora_A["default"].weight
        same_space(layer.lora_a.detach(), other.detach(), 1e-3)


def without_dropout(model: nn.Module) -> nn.Module:
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    return model


def gradients(model: nn.Module, batches: Any) -> dict[str, Tensor]:
    """Of each linear layer's weight, [out, in], in float64, the loss summed over all batches."""
    model = model.double()
    for inputs, targets in batches:
        loss_fn(model, inputs, targets).backward()
    return {
        name: module.weight.grad.T if isinstance(module, Conv1D) else module.weight.grad
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear | Conv1D)
    }


@pytest.mark.parametrize("make", [llama, gpt2])
def test_lora_gas_first_step_is_the_best_approximation_of_the_gradients(make: Any) -> None:
    """Theorem 3.1 of the paper: G A^T A + B B^T G is G's best approximation of rank 2r, times c^2. Here the gradients'
    spectra are flatter than those of any trained model, and the last directions turn in what is nearly a circle.
    """
    rank, batches = 3, make_batches()
    model = lorica.adapt(without_dropout(make()), LoRA(rank=rank, init="lora_ga", dropout=0.3), loss_fn, batches)
    assert torch.equal(outputs(model), outputs(make()))
    exact = gradients(make(), batches)
    for name, layer in layers(model).items():
        a, b, g = layer.lora_a.detach().double(), layer.lora_b.detach().double(), exact[name]
        factor = g.shape[0] ** 0.25 / 16**0.5
        torch.testing.assert_close(a @ a.T, factor**2 * torch.eye(rank).double(), atol=1e-5, rtol=0)
        torch.testing.assert_close(b.T @ b, factor**2 * torch.eye(rank).double(), atol=1e-5, rtol=0)
        u, s, vh = torch.linalg.svd(g, full_matrices=False)
        best = (u[:, : 2 * rank] * s[: 2 * rank]) @ vh[: 2 * rank]
        step = (g @ a.T @ a + b @ b.T @ g) / factor**2
        assert (step - g).norm() < 1.02 * (best - g).norm(), name
        assert layer.lora_a.requires_grad and layer.lora_b.requires_grad and layer.lora_a.grad is None


def test_more_rounds_find_the_singular_vectors(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(starts, "ROUNDS", 20)
    model = lorica.adapt(llama(), LoRA(rank=3, init="lora_ga"), loss_fn, make_batches())
    exact = gradients(llama(), make_batches())
    for name, layer in layers(model).items():
        u, _, vh = torch.linalg.svd(exact[name], full_matrices=False)
        same_space(layer.lora_a.detach(), vh[:3], 1e-4)
        same_space(layer.lora_b.detach().T, u[:, 3:6].T, 1e-4)


def test_lora_ga_spans_pefts_spaces(monkeypatch: pytest.MonkeyPatch) -> None:
    """PEFT multiplies B by the singular values and writes the base; the spaces of A and B are the paper's for both."""
    # PEFT decomposes the whole gradient.
    monkeypatch.setattr(starts, "ROUNDS", 20)
    peft = pytest.importorskip("peft")
    from peft.tuners.lora.loraga import preprocess_loraga

    batches, base = make_batches(), llama()
    config = peft.LoraConfig(
        r=3, lora_alpha=6, target_modules=["q_proj", "down_proj"], init_lora_weights="lora_ga",
        lora_ga_config=peft.LoraGAConfig(),
    )  # fmt: skip

    def train_step() -> None:
        for inputs, targets in batches:
            loss_fn(base, inputs, targets).backward()

    preprocess_loraga(base, config, train_step)
    theirs = peft.get_peft_model(base, config)
    options = LoRA(rank=3, alpha=6, init="lora_ga", targets=("q_proj", "down_proj"))
    for name, layer in layers(lorica.adapt(llama(), options, loss_fn, batches)).items():
        other = theirs.get_submodule(f"base_model.model.{name}")
        same_space(layer.lora_a.detach(), other.lora_A["default"].weight.detach(), 2e-2)
        same_space(layer.lora_b.detach().T, other.lora_B["default"].weight.detach().T, 2e-2)


def test_lora_gas_batches_may_be_cut_as_one_likes() -> None:
    """The gradient of a sum; and the base's own dropout is drawn alike in all passes."""
    whole = make_batches(number=1, rows=4)
    (inputs, targets) = whole[0]
    cut = [({"input_ids": i[None]}, t[None]) for i, t in zip(inputs["input_ids"], targets, strict=True)]
    found = []
    for batches in (whole, cut):
        torch.manual_seed(0)
        found.append(layers(lorica.adapt(llama(), LoRA(rank=3, init="lora_ga"), loss_fn, batches)))
    for name, layer in found[0].items():
        torch.testing.assert_close(layer.pair(), found[1][name].pair(), atol=1e-3, rtol=1e-3)


def test_a_start_leaves_the_model_as_it_was_but_for_the_pairs() -> None:
    for init in starts.STARTS:
        model = llama().train()
        before = {name: p.detach().clone() for name, p in model.named_parameters()}
        lorica.adapt(model, LoRA(rank=3, init=init, targets=("q_proj", "embed_tokens")), loss_fn, make_batches())
        assert model.training and all(module.training for module in model.modules())
        assert not any(module._forward_pre_hooks for module in model.modules())
        assert sorted(lorica.trainable_parameters(model)) == [
            f"model.{name}.lora_{half}"
            for name in ("embed_tokens", "layers.0.self_attn.q_proj", "layers.1.self_attn.q_proj")
            for half in "ab"
        ]
        plain = dict(lorica.detach(model).named_parameters())
        assert all(torch.equal(plain[name], value) for name, value in before.items())


def test_peft_reads_a_lora_ga_start_as_plain_lora(tmp_path: Any) -> None:
    model = lorica.adapt(llama(), LoRA(rank=3, init="lora_ga"), loss_fn, make_batches())
    ranks = {layer.rank for layer in layers(model).values()}
    assert ranks == {6}
    with torch.no_grad():
        for parameter in lorica.trainable_parameters(model).values():
            parameter += 0.2 * torch.randn_like(parameter)
    ours = outputs(model)
    lorica.save_adapter(model, tmp_path / "adapter")
    peft = pytest.importorskip("peft")
    theirs = outputs(peft.PeftModel.from_pretrained(llama(), tmp_path / "adapter").eval())
    torch.testing.assert_close(theirs, ours, atol=1e-5, rtol=1e-5)
    assert torch.equal(outputs(lorica.load_adapter(llama(), tmp_path / "adapter")), ours)


def test_pefts_own_lora_ga_start_is_refused_for_it_changed_the_base() -> None:
    config = {"peft_type": "LORA", "r": 3, "lora_alpha": 6, "init_lora_weights": "lora_ga"}
    with pytest.raises(AdapterError, match="changed the base; let PEFT convert it"):
        LoRA.from_peft(config, ["q_proj"])
    assert LoRA.from_peft({**config, "init_lora_weights": "eva"}, ["q_proj"]).init == "kaiming"


@pytest.mark.parametrize("init", starts.STARTS)
def test_what_cannot_start_is_refused(init: str) -> None:
    with pytest.raises(ConfigError, match=r"lorica.adapt\(model, options, loss_fn, batches\)"):
        lorica.adapt(llama(), LoRA(init=init))
    with pytest.raises(ConfigError, match="with slices use kaiming"):
        LoRA(init=init, slices={"c_attn": {"sizes": [1, 1, 1], "train": [0]}})
    with pytest.raises(TargetError, match="starts linear layers, and c is a Conv1d"):
        LoRA(rank=1, init=init).wrap(nn.Conv1d(4, 4, 3), "c")
    with pytest.raises(TargetError, match=r"rank \d+ is more than q has"):
        LoRA(rank=13, init=init).wrap(nn.Linear(12, 20), "q")


def test_data_that_does_not_suffice_is_refused_and_the_model_is_the_base_again() -> None:
    few = make_batches(number=1, rows=1, length=4)
    model = llama()
    with pytest.raises(ConfigError, match=r"more tokens than the rank: .*q_proj saw 4"):
        lorica.adapt(model, LoRA(rank=4, init="eva"), loss_fn, few)
    assert not lorica.adapters(model)
    broken = llama()
    broken.get_input_embeddings().weight.data[5] = torch.nan
    with pytest.raises(DivergedError, match=r"what model.layers.0.self_attn.q_proj reads is not finite"):
        lorica.adapt(broken, LoRA(rank=4, init="eva"), loss_fn, make_batches())
    with pytest.raises(ConfigError, match="gets no gradient"):
        lorica.adapt(model, LoRA(rank=4, init="lora_ga"), lambda *a: 0 * loss_fn(*a), few)
    with pytest.raises(DivergedError, match="not finite"):
        lorica.adapt(model, LoRA(rank=4, init="lora_ga"), lambda *a: torch.inf * loss_fn(*a), few)
    assert not lorica.adapters(model)
