"""A MoE base through the recipes: experts and linear layers planned, trained, read back, merged and inspected."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import lorica
from lorica.config import RunConfig
from lorica.models.load import load_model
from lorica.recipes.adapter import inspect
from lorica.recipes.merge import merge
from lorica.recipes.opening import open_model
from lorica.recipes.plan import plan
from lorica.training.metrics import read_metrics


def test_experts_from_plan_to_merge(
    save_base: Callable[[Any], Path], make_config: Callable[..., RunConfig], tmp_path: Path
) -> None:
    from transformers import Qwen3MoeConfig

    base = save_base(
        Qwen3MoeConfig(
            hidden_size=32, moe_intermediate_size=24, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4,
            num_key_value_heads=2, head_dim=8, num_experts=4, num_experts_per_tok=2, vocab_size=8192,
            max_position_embeddings=512, bos_token_id=0, eos_token_id=2, pad_token_id=3,
        )
    )  # fmt: skip
    method = {"rank": 4, "targets": ["all-linear", "experts"]}
    config = make_config(tmp_path / "run", base=base, method=method, max_steps=8, lr=2e-2)
    # q, k, v and o, and for each of 4 experts a pair for [48, 32] and one for [32, 24].
    attention = 4 * ((32 + 32) + 2 * (32 + 16) + (32 + 32))
    wanted = attention + 4 * 4 * ((48 + 32) + (32 + 24))
    assert plan(config).trainable_parameters == wanted
    result = lorica.train(config)
    assert (result.status, result.read_back_difference) == ("finished", 0.0)
    losses = [row["loss"] for row in read_metrics(tmp_path / "run" / "metrics.jsonl") if "loss" in row]
    assert losses[-1] < losses[0] - 0.05
    merge(tmp_path / "run", tmp_path / "merged")
    plain, (model, _, _) = load_model(tmp_path / "merged", dtype="float32", device="cpu"), open_model(tmp_path / "run")
    ids = torch.arange(40, 60)[None]
    with torch.no_grad():
        torch.testing.assert_close(plain(ids).logits, model(ids).logits, atol=1e-5, rtol=1e-5)
    parts = {part.name: part for part in inspect(tmp_path / "run", base=str(base)).parts}
    assert parts["model.layers.0.mlp.experts[3]"].shape == [32, 24]
    assert parts["model.layers.0.mlp.experts.base_layer[0]"].shape == [48, 32]
    assert sum(part.rank * sum(part.shape) for part in parts.values() if part.rank) == wanted
