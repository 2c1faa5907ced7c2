"""`lorica export`: the folder in PEFT's hands."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

import lorica
from lorica.config import RunConfig
from lorica.errors import AdapterError, ConfigError
from lorica.recipes import export as recipe
from lorica.recipes.export import export
from lorica.recipes.merge import merge
from lorica.recipes.opening import open_model

IDS = torch.arange(100, 160).view(2, 30)


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=IDS).logits


def peft_logits(base: Path, adapter: Path) -> torch.Tensor:
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32, local_files_only=True)
    return logits(PeftModel.from_pretrained(model, str(adapter)))


@pytest.mark.filterwarnings("ignore:.*tie_word_embeddings")
def test_peft_computes_what_we_compute(finished: Path, tiny_base: Path, tmp_path: Path) -> None:
    """Reliability case 22: linear layers and an embedding."""
    result = export(finished, tmp_path / "peft")
    adapted, tokenizer, _ = open_model(finished)
    torch.testing.assert_close(peft_logits(tiny_base, tmp_path / "peft"), logits(adapted), rtol=0, atol=1e-4)
    assert result.max_difference == 0.0 and result.format == "peft"
    assert result.files == sorted(path.name for path in (tmp_path / "peft").iterdir())
    assert {"adapter_config.json", "adapter_model.safetensors", "tokenizer.json"} <= set(result.files)
    again = AutoTokenizer.from_pretrained(tmp_path / "peft", local_files_only=True)
    assert again.chat_template == tokenizer.chat_template


@pytest.mark.parametrize("shape", ["gpt2", "qwen3"])
def test_other_shapes_of_base(
    make_config: Callable[..., RunConfig], save_base: Callable[[Any], Path], tmp_path: Path, shape: str
) -> None:
    """GPT-2's weights are stored transposed; Qwen3's heads are not hidden / heads wide."""
    from transformers import GPT2Config, Qwen3Config

    configs = {
        "gpt2": GPT2Config(n_embd=32, n_layer=2, n_head=4, vocab_size=8192, n_positions=256),
        "qwen3": Qwen3Config(
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=16,
            vocab_size=8192,
        ),
    }
    base = save_base(configs[shape])
    lorica.train(make_config(tmp_path / "run", base=base, max_steps=4, lr=0.05))
    export(tmp_path / "run", tmp_path / "peft")
    adapted, _, _ = open_model(tmp_path / "run")
    plain, _, _ = open_model(base)
    assert float((logits(adapted) - logits(plain)).abs().max()) > 1e-2
    torch.testing.assert_close(peft_logits(base, tmp_path / "peft"), logits(adapted), rtol=0, atol=1e-4)


@pytest.mark.filterwarnings("ignore:.*tie_word_embeddings")
def test_every_option_of_the_method_reaches_peft(
    make_config: Callable[..., RunConfig], tiny_base: Path, tmp_path: Path
) -> None:
    """Ranks and alphas of their own, the scale of rsLoRA, and the head of a tied pair."""
    method = {
        "targets": ("q_proj", "layers.1.mlp.down_proj", "lm_head"),
        "rslora": True,
        "init": "gaussian",
        "rank_pattern": {"layers.0.self_attn.q_proj": 2, "lm_head": 3},
        "alpha_pattern": {"down_proj": 3.0},
    }
    lorica.train(make_config(tmp_path / "run", method=method, max_steps=4, lr=0.05))
    export(tmp_path / "run", tmp_path / "peft")
    merge(tmp_path / "run", tmp_path / "merged")
    adapted, _, _ = open_model(tmp_path / "run")
    assert sorted(a.rank for a in lorica.adapters(adapted).values()) == [2, 3, 4, 4]  # type: ignore[attr-defined]
    torch.testing.assert_close(peft_logits(tiny_base, tmp_path / "peft"), logits(adapted), rtol=0, atol=1e-4)
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", local_files_only=True)
    torch.testing.assert_close(logits(merged), logits(adapted), rtol=0, atol=1e-4)


def test_an_exported_adapter_opens_again_without_its_run(finished: Path, tmp_path: Path) -> None:
    export(finished, tmp_path / "peft")
    ours, _, renderer = open_model(tmp_path / "peft")
    theirs, _, own = open_model(finished)
    assert torch.equal(logits(ours), logits(theirs)) and renderer.template == own.template


def test_what_does_not_read_back_leaves_nothing(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = recipe.load_adapter

    def spoiled(model: Any, folder: Path) -> Any:
        original(model, folder)
        with torch.no_grad():
            next(iter(lorica.adapters(model).values())).lora_b += 1.0  # type: ignore[operator]
        return model

    monkeypatch.setattr(recipe, "load_adapter", spoiled)
    with pytest.raises(AdapterError, match="Not exported: read back"):
        export(finished, tmp_path / "peft")
    assert list(tmp_path.iterdir()) == []


def test_nothing_is_overwritten(finished: Path, tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("mine")
    with pytest.raises(ConfigError, match="exists and is not empty"):
        export(finished, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


def test_what_has_no_adapter(tiny_base: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="has no adapter to export"):
        export(tiny_base, tmp_path / "peft")


def test_an_unknown_format(finished: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="expected peft"):
        export(finished, tmp_path / "peft", "gguf")
