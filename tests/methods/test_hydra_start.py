"""`init: components` against float64 gradients of the dense weights, what it leaves alone, and what it brings."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.pytorch_utils import Conv1D

import lorica
from lorica.errors import ConfigError, DivergedError
from lorica.methods.gates import normalized_mutual_information
from lorica.methods.hydra import HydraLoRA
from lorica.methods.hydra_linear import HydraLinear, cancelling
from lorica.methods.lora import LoRA
from lorica.quant.loading import dequantize
from tests.interop.small_models import IDS, gpt2, llama, outputs

Batches = list[tuple[dict[str, Tensor], Tensor, int]]
NUM, GRID = 3, 2.0**-10


def loss_fn(model: nn.Module, inputs: Mapping[str, Any], targets: Tensor) -> Tensor:
    logits = model(**inputs).logits.flatten(0, 1)
    return F.cross_entropy(logits, targets.flatten(), ignore_index=-100, reduction="sum")


def task(component: int, rows: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Ids and targets [rows, 12] of one task: six tokens of its own alphabet, answered each by its own other one."""
    first = 10 + 16 * component
    answers = first + torch.randperm(16, generator=torch.Generator().manual_seed(component))
    asked = torch.randint(first, first + 16, (rows, 6), generator=generator)
    ids = torch.cat([asked, answers[asked - first]], 1)
    targets = torch.full_like(ids, -100)
    targets[:, 5:-1] = ids[:, 6:]
    return ids, targets


def make_batches(seed: int = 0, rows: tuple[int, ...] = (4, 4, 4)) -> Batches:
    """Two batches of each component, of other sizes for each, in turns."""
    generator = torch.Generator().manual_seed(seed)
    made = [(task(c, n, generator), c) for _ in range(2) for c, n in enumerate(rows)]
    return [({"input_ids": ids}, targets, c) for (ids, targets), c in made]


def adapted(model: Any, batches: Batches | None = None, **fields: Any) -> Any:
    """`model` with heads that started from `batches`, the pairs being drawn with seed 1."""
    torch.manual_seed(1)
    options = HydraLoRA(**{"rank": 4, "alpha": 6, "num_heads": NUM, "init": "components", **fields})
    return lorica.adapt(model, options, loss_fn, make_batches() if batches is None else batches)


def layers(model: Any) -> dict[str, HydraLinear]:
    return {name: a for name, a in lorica.adapters(model).items() if isinstance(a, HydraLinear)}


def dense_gradients(model: Any, batches: Batches) -> dict[str, Tensor]:
    """G_c of each linear layer, [N, out, in] in float64."""
    model, found = without_dropout(model).double().requires_grad_(), {}
    modules = {name: m for name, m in model.named_modules() if isinstance(m, nn.Linear | Conv1D)}
    for component in range(NUM):
        model.zero_grad()
        sum(loss_fn(model, inputs, targets) for inputs, targets, c in batches if c == component).backward()
        for name, module in modules.items():
            gradient = module.weight.grad.t() if isinstance(module, Conv1D) else module.weight.grad
            found.setdefault(name, []).append(gradient.clone())
    return {name: torch.stack(parts) for name, parts in found.items()}


def without_dropout(model: Any) -> Any:
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    return model


def expected_heads(gradients: Tensor, lora_a: Tensor) -> Tensor:
    """-(D - mean D) with D = G A^T of unit rms, as a whole of rms 0.02."""
    d = gradients @ lora_a.double().t()
    d = d / d.square().mean((1, 2), keepdim=True).sqrt()
    d = d.mean(0) - d
    return 0.02 * d / d.square().mean().sqrt()


def check_heads(model: Any, gradients: Mapping[str, Tensor], cosine: float = 0.998) -> None:
    for name, layer in layers(model).items():
        got, want = layer.heads().detach().double(), expected_heads(gradients[name], layer.lora_a.detach())
        assert torch.cosine_similarity(got.flatten(1), want.flatten(1)).min() > cosine, name
        assert got.square().mean().sqrt() == pytest.approx(0.02, rel=0.02)
        assert got.sum(0).abs().max() == 0 and layer.router is not None and layer.router.abs().max() == 0


@pytest.mark.parametrize("make", [llama, gpt2])
@pytest.mark.parametrize("fields", [{}, {"router_input": "ax", "dropout": 0.3, "balance_loss": 0.1, "rslora": True}])
def test_heads_start_from_the_gradients_of_the_dense_weights(make: Any, fields: dict[str, Any]) -> None:
    """To a value on the grid; a larger component, and a loss that is a sum, weigh no more."""
    batches = make_batches(rows=(2, 9, 4))
    model = adapted(without_dropout(make()), batches, **fields)
    gradients = dense_gradients(make(), batches)
    check_heads(model, gradients)
    for name, layer in layers(model).items():
        want = expected_heads(gradients[name], layer.lora_a.detach())
        # The last head takes the rounding of the others.
        assert (layer.heads()[:-1] - want[:-1]).abs().max() <= 0.51 * GRID
        assert (layer.heads()[-1] - want[-1]).abs().max() <= 1.02 * GRID


def test_over_nf4_over_bfloat16_with_checkpointing_and_by_sequence() -> None:
    batches = make_batches()
    exact = dense_gradients(llama(), batches)
    model = llama().train()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    check_heads(adapted(model, batches, routing="sequence"), exact)
    check_heads(adapted(llama().bfloat16(), batches), exact, cosine=0.95)
    quantised = adapted(lorica.quantize(llama(), "nf4"), batches)
    check_heads(quantised, dense_gradients(dequantize(lorica.quantize(llama(), "nf4")), batches))


def test_padding_counts_for_nothing() -> None:
    batches = make_batches()
    wide = [
        (
            {"input_ids": F.pad(i["input_ids"], (0, 4)), "attention_mask": F.pad(torch.ones_like(t), (0, 4))},
            F.pad(t, (0, 4), value=-100),
            c,
        )
        for i, t, c in batches
    ]
    plain, padded = (layers(adapted(llama(), b)) for b in (batches, wide))
    for name, layer in plain.items():
        torch.testing.assert_close(layer.lora_b, padded[name].lora_b, atol=1.1 * 2 * GRID, rtol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_output_is_the_bases_up_to_rounding(dtype: torch.dtype) -> None:
    model = adapted(llama().to(dtype))
    assert all(layer.lora_b.abs().max() > 0.02 for layer in layers(model).values())
    want = outputs(llama().to(dtype)).float()
    # bfloat16: as far as one of its last places may lie, added up over two blocks.
    tolerance = 1e-6 if dtype is torch.float32 else 4 * 2.0**-8 * float(want.abs().max())
    torch.testing.assert_close(outputs(model).float(), want, atol=tolerance, rtol=0)


def test_everything_but_the_heads_and_the_router_is_as_it_was() -> None:
    model = llama().train()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    adapted(model, targets=("q_proj", "down_proj"), modules_to_save=("norm",))
    state = torch.random.get_rng_state()
    zero = llama()
    torch.manual_seed(1)
    lorica.adapt(zero, HydraLoRA(rank=4, num_heads=NUM, targets=("q_proj", "down_proj")))
    # A start draws nothing.
    assert torch.equal(torch.random.get_rng_state(), state)
    assert all(torch.equal(layer.lora_a, layers(zero)[name].lora_a) for name, layer in layers(model).items())
    trained = lorica.trainable_parameters(model)
    assert {name.rpartition(".")[2] for name in trained} == {"lora_a", "lora_b", "router", "weight"}
    assert all(p.grad is None for p in model.parameters())
    assert model.training and all(module.training for module in model.modules())
    assert not any(module._forward_pre_hooks for module in model.modules())
    plain = dict(lorica.detach(model).named_parameters())
    assert all(torch.equal(plain[name], value) for name, value in before.items())


def test_symmetry_is_broken_towards_the_components() -> None:
    """The loss of component c falls fastest with the gate of head c: with s G_c A^T / N as each head's gradient, its
    product with B_i is least for i = c, by Cauchy and Schwarz. So does the router's gradient, which is not zero.
    """
    batches = make_batches(seed=3)
    model = adapted(llama(), batches)
    # Rows that the start has seen.
    for component in range(NUM):
        model.zero_grad()
        for inputs, targets, label in batches:
            if label == component:
                loss_fn(model, inputs, targets).backward()
        for name, layer in layers(model).items():
            assert layer.lora_b.grad is not None and layer.router is not None and layer.router.grad is not None
            slopes = (layer.heads() * layer.lora_b.grad.view(-1, NUM, layer.rank).transpose(0, 1)).sum((1, 2))
            assert int(slopes.argmin()) == component, name
            assert layer.router.grad.abs().max() > 0
            assert (layer.heads()[0] - layer.heads()[1]).abs().max() > 0.01


def test_a_layer_that_no_row_reaches_starts_as_with_zero() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.used, self.unused = nn.Linear(6, 5), nn.Linear(6, 5)

        def forward(self, x: Tensor) -> Tensor:
            return self.used(x) if x is not None else self.unused(x)

    torch.manual_seed(0)
    batches = [({"x": torch.randn(7, 6)}, torch.randn(7, 5), c) for c in (0, 1)]
    model = lorica.adapt(
        Two(),
        HydraLoRA(rank=2, num_heads=2, init="components", targets="used|unused"),
        lambda model, inputs, targets: (model(**inputs) - targets).square().sum(),
        batches,
    )
    found = layers(model)
    assert found["used"].lora_b.any() and not found["used"].router.any()
    assert not found["unused"].lora_b.any() and found["unused"].router.any()


def test_heads_that_cancel_do_so_in_sixteen_bits() -> None:
    heads = cancelling(torch.randn(5, 40, 8, generator=torch.Generator().manual_seed(0)) + 3)
    assert heads.square().mean().sqrt() == pytest.approx(0.02, rel=0.01)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        assert heads.to(dtype).double().sum(0).abs().max() == 0
    assert not cancelling(torch.randn(1, 4, 2)).any()


def route(init: str, seed: int, steps: int = 6) -> float:
    """Agreement of the top head with the component on new rows, the mean over layers, after a few steps."""
    model = llama()
    torch.manual_seed(seed)
    options = HydraLoRA(rank=4, alpha=8, num_heads=NUM, init=init)  # type: ignore[arg-type]
    lorica.adapt(model, options, loss_fn, make_batches(seed, (16, 16, 16)) if init == "components" else None)
    optimizer = torch.optim.AdamW(lorica.trainable_parameters(model).values(), lr=2e-3, weight_decay=0.0)
    generator = torch.Generator().manual_seed(100 + seed)
    for _ in range(steps):
        parts = [task(c, 4, generator) for c in range(NUM)]
        ids, targets = (torch.cat(tensors) for tensors in zip(*parts, strict=True))
        optimizer.zero_grad()
        (loss_fn(model, {"input_ids": ids}, targets) / (targets != -100).sum()).backward()
        optimizer.step()
    held_out = torch.cat([task(c, 16, generator)[0] for c in range(NUM)])
    labels = torch.arange(NUM).repeat_interleave(16 * held_out.shape[1])
    tables: list[Tensor] = []
    for layer in layers(model).values():
        layer.watch = lambda gates: tables.append(F.one_hot(gates.argmax(1), NUM).t() @ F.one_hot(labels, NUM))
    outputs(model, held_out)
    return sum(normalized_mutual_information(table.double()) or 0.0 for table in tables) / len(tables)


def test_routing_follows_planted_components_sooner_than_from_other_starts() -> None:
    """Sooner and not further: after forty steps at five times the learning rate all three have come as far."""
    for seed in range(3):
        zero, random, components = (route(init, seed) for init in ("zero", "random", "components"))
        assert components > 1.1 * max(zero, random), (seed, zero, random, components)


def test_what_cannot_start_is_refused_and_the_model_is_the_base_again() -> None:
    for batches, match in (
        ([batch[:2] for batch in make_batches()], "inputs, targets, component"),
        ([batch for batch in make_batches() if batch[2] != 1], "num_heads is 3, .* components 0, 2; .* from 0 to 2"),
        ([], "starts from data"),
    ):
        model = llama()
        with pytest.raises(ConfigError, match=match):
            adapted(model, batches)  # type: ignore[arg-type]
        assert torch.equal(outputs(model), outputs(llama()))
    broken = llama()
    with torch.no_grad():
        broken.lm_head.weight[20] = torch.nan
    with pytest.raises(DivergedError, match="not finite on rows of component 0"):
        adapted(broken)
    assert not lorica.adapters(broken)
    for fields, match in (({"gate": "frozen"}, "needs equal gates"), ({"gate": "uniform"}, "has but their mean")):
        with pytest.raises(ConfigError, match=match):
            HydraLoRA(init="components", **fields)  # type: ignore[arg-type]


def test_one_head_starts_from_nothing_and_labelled_batches_fit_other_starts() -> None:
    assert HydraLoRA(num_heads=1, init="components").num_start_batches == 0
    model = lorica.adapt(llama(), HydraLoRA(num_heads=1, init="components"))
    assert torch.equal(outputs(model, IDS), outputs(llama(), IDS))
    for init in ("eva", "lora_ga"):
        found = []
        for cut in (2, 3):
            torch.manual_seed(0)
            batches = [batch[:cut] for batch in make_batches()]
            found.append(lorica.adapt(llama(), LoRA(rank=3, init=init), loss_fn, batches))  # type: ignore[arg-type]
        assert torch.equal(*(torch.cat([a.lora_a for a in lorica.adapters(m).values()], 1)[0] for m in found))
