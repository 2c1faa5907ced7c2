"""HydraLoRA with its gates at their means: exact where they are constant, and a plain LoRA always."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

import lorica
from lorica.errors import AdapterError
from lorica.methods.hydra import HydraLoRA
from lorica.methods.hydra_static import calibrated, mean_gates, to_lora
from lorica.methods.lora_kinds import LoraLinear

IDS = torch.randint(4, 64, (4, 9), generator=torch.Generator().manual_seed(5))


def adapted(tiny_llama: Any, std: float = 0.3, **fields: Any) -> Any:
    torch.manual_seed(0)
    model = lorica.adapt(tiny_llama().eval(), HydraLoRA(**{"rank": 4, "num_heads": 3, **fields}))
    for parameter in lorica.trainable_parameters(model).values():
        nn.init.normal_(parameter, std=std)
    return model


@pytest.mark.parametrize("routing", ["token", "sequence"])
def test_the_means_are_over_all_tokens_and_leave_padding_out(tiny_llama: Any, routing: str) -> None:
    model = adapted(tiny_llama, routing=routing).train()
    name = "model.layers.1.self_attn.q_proj"
    seen: list[torch.Tensor] = []
    lorica.adapters(model)[name].watch = seen.append
    model(IDS)
    padded = {"input_ids": F.pad(IDS, (0, 5)), "attention_mask": F.pad(torch.ones_like(IDS), (0, 5))}
    for batches in ([{"input_ids": IDS}], [{"input_ids": IDS[:1]}, {"input_ids": IDS[1:]}], [padded]):
        torch.testing.assert_close(mean_gates(model, batches)[name], seen[0].mean(0), rtol=1e-4, atol=1e-5)
    assert model.training and lorica.adapters(model)[name].watch == seen.append and len(seen) == 1


@pytest.mark.parametrize("stacked", [False, True])
def test_a_router_that_reads_nothing_is_lora_exactly(tiny_llama: Any, stacked: bool) -> None:
    model = adapted(tiny_llama, rslora=True, rank_pattern={"v_proj": 2}, alpha_pattern={"k_proj": 5})
    for adapter in lorica.adapters(model).values():
        nn.init.zeros_(adapter.router)
    constants = calibrated(model, [{"input_ids": IDS}])
    for name, found in constants.items():
        rank = lorica.adapters(model)[name].rank
        torch.testing.assert_close(found.mixes, torch.eye(rank).expand(3, -1, -1) / 3, rtol=1e-5, atol=1e-6)
    static = to_lora(model, {name: found.mixes for name, found in constants.items()}, stacked=stacked)
    torch.testing.assert_close(static(IDS).logits, model(IDS).logits, rtol=1e-4, atol=1e-5)
    found = lorica.adapters(static)
    assert all(type(a) is LoraLinear and a.rank == (12 if stacked else 4) and a.scale == 1 for a in found.values())
    torch.testing.assert_close(lorica.merge(static)(IDS).logits, model(IDS).logits, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("routing", ["token", "sequence"])
def test_mixes_are_the_least_squares_of_what_the_heads_give(tiny_llama: Any, routing: str) -> None:
    """B of `numpy.linalg.lstsq` on every token's h and sum_i g_i B_i h, in float64; padding counts for nothing."""
    model = adapted(tiny_llama, routing=routing)
    seen: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}
    hooks = [
        layer.register_forward_hook(lambda a, x, y, name=name: seen.update({name: (x[0], y - a.base(x[0]))}))
        for name, layer in lorica.adapters(model).items()
    ]
    with torch.no_grad():
        model(IDS)
    for hook in hooks:
        hook.remove()
    padded = {"input_ids": F.pad(IDS, (0, 5)), "attention_mask": F.pad(torch.ones_like(IDS), (0, 5))}
    found = calibrated(model, [padded])
    for stacked in (False, True):
        static = lorica.adapters(to_lora(model, {name: c.mixes for name, c in found.items()}, stacked=stacked))
        for name, (x, branch) in seen.items():
            layer = lorica.adapters(model)[name]
            h, want = (x @ layer.lora_a.T).flatten(0, 1).double(), branch.flatten(0, 1).double()
            best = np.linalg.lstsq(h.detach().numpy(), want.detach().numpy())[0]
            x, pair = x.flatten(0, 1), static[name]
            got = (x @ pair.lora_a.T @ pair.lora_b.T * pair.scale).detach().numpy()
            # The prior takes next to nothing of it.
            assert np.abs(got - h.detach().numpy() @ best).max() < 0.02 * np.abs(want.detach().numpy()).max(), name
            of_means = sum(g * (h @ head.T.double()) for g, head in zip(found[name].gates, layer.heads(), strict=True))
            errors = [(torch.as_tensor(y) - want).square().sum() for y in (got, layer.scale * of_means)]
            assert errors[0] < errors[1], name


def test_directions_that_are_never_seen_take_the_mean_gates(tiny_llama: Any) -> None:
    model = adapted(tiny_llama)
    for constants in calibrated(model, [{"input_ids": IDS[:1, :1]}]).values():
        assert constants.mixes.isfinite().all()
        # One token has one h, and four directions.
        torch.testing.assert_close(constants.mixes, constants.gates[:, None, None] * torch.eye(4).expand(3, 4, 4))


def test_given_gates_weight_the_heads(tiny_llama: Any) -> None:
    model = adapted(tiny_llama)
    gates = {name: torch.tensor([0.2, 0.5, 0.3]) for name in lorica.adapters(model)}
    one, other = to_lora(model, gates), to_lora(model, gates, stacked=True)
    for name, adapter in lorica.adapters(model).items():
        want = sum(g * head @ adapter.lora_a for g, head in zip((0.2, 0.5, 0.3), adapter.heads(), strict=True))
        for static in (one, other):
            delta = lorica.adapters(static)[name].delta_weight()
            torch.testing.assert_close(delta, adapter.scale * want.detach(), rtol=1e-4, atol=1e-5)


def test_the_routed_model_stays_as_it_is(tiny_llama: Any) -> None:
    model = adapted(tiny_llama, routing="sequence", modules_to_save=("norm",))
    want = model(IDS).logits
    static = to_lora(model, mean_gates(model, [{"input_ids": IDS}]))
    assert not static.base_model._forward_pre_hooks and model.base_model._forward_pre_hooks
    assert static.lm_head.weight is model.lm_head.weight
    assert (static(IDS).logits - want).abs().max() > 1e-3
    assert torch.equal(model(IDS).logits, want)


def test_peft_loads_it_with_what_was_trained_beside(tiny_llama: Any, tmp_path: Any) -> None:
    import peft

    model = adapted(tiny_llama, std=0.2, modules_to_save=("norm",))
    static = to_lora(model, mean_gates(model, [{"input_ids": IDS}]))
    lorica.save_adapter(static, tmp_path / "lora")
    theirs = peft.PeftModel.from_pretrained(tiny_llama(), tmp_path / "lora").eval()
    torch.testing.assert_close(theirs(IDS).logits, static(IDS).logits, rtol=1e-4, atol=1e-5)


def test_what_is_no_hydra_is_refused(tiny_llama: Any) -> None:
    with pytest.raises(AdapterError, match="no HydraLoRA"):
        to_lora(lorica.adapt(tiny_llama(), lorica.LoRA(rank=2)), {})
    model = adapted(tiny_llama)
    with pytest.raises(AdapterError, match="3 constant gates"):
        to_lora(model, {name: torch.ones(2) for name in lorica.adapters(model)})
    with pytest.raises(AdapterError, match="reach"):
        mean_gates(model, [])
