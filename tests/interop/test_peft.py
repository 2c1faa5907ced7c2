"""PEFT is the oracle: folders go both ways and give equal logits; whatever does not fit refuses before it changes
anything.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModel, AutoModelForCausalLM, BertConfig, GPT2Config, LlamaConfig, Qwen3Config

import lorica
from lorica.errors import AdapterError
from lorica.interop.peft import CONFIG, PROOF, WEIGHTS

peft = pytest.importorskip("peft", reason="needs peft, the oracle")

SMALL: dict[str, Any] = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 64,
}  # fmt: skip


def llama() -> Any:
    return AutoModelForCausalLM.from_config(LlamaConfig(**SMALL, num_key_value_heads=2), dtype=torch.float32)


def qwen3() -> Any:
    config = Qwen3Config(**SMALL, num_key_value_heads=2, head_dim=8, tie_word_embeddings=True)
    return AutoModelForCausalLM.from_config(config, dtype=torch.float32)


def gpt2() -> Any:
    config = GPT2Config(n_embd=32, n_layer=2, n_head=4, vocab_size=64, bos_token_id=0, eos_token_id=2)
    return AutoModelForCausalLM.from_config(config, dtype=torch.float32)


def bert() -> Any:
    return AutoModel.from_config(BertConfig(**SMALL, pad_token_id=0), dtype=torch.float32)


CASES: dict[str, tuple[Callable[[], Any], dict[str, Any]]] = {
    "llama all-linear": (llama, {"targets": "all-linear"}),
    "llama embedding, patterns, rslora": (
        llama,
        {
            "targets": ("q_proj", "embed_tokens", r"layers\.0\.mlp\.down_proj"),
            "rslora": True,
            "rank_pattern": {"q_proj": 4},
            "alpha_pattern": {r"layers\.1\.self_attn\.q_proj": 3.0},
        },
    ),
    "qwen3 attention": (qwen3, {"targets": ("q_proj", "k_proj", "v_proj", "o_proj")}),
    "gpt2 Conv1D": (gpt2, {"targets": ("c_attn", "c_fc", "attn.c_proj")}),
    "bert": (bert, {"targets": ("query", "value", "intermediate.dense", "word_embeddings")}),
}


@pytest.fixture
def ids() -> torch.Tensor:
    return torch.randint(3, 64, (2, 9), generator=torch.Generator().manual_seed(5))


def seeded(make: Callable[[], Any]) -> Any:
    torch.manual_seed(0)
    return make().eval()


def outputs(model: Any, ids: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        result = model(ids)
    return result.logits if "logits" in result else result.last_hidden_state


def randomise(model: Any) -> None:
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in lorica.trainable_parameters(model).values():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)


@pytest.mark.parametrize("case", CASES)
def test_peft_loads_what_we_save(case: str, tmp_path: Path, ids: torch.Tensor) -> None:
    make, options = CASES[case]
    model = lorica.adapt(seeded(make), lorica.LoRA(rank=8, alpha=16, **options))
    randomise(model)
    ours = outputs(model, ids)
    lorica.save_adapter(model, tmp_path / "adapter")
    theirs = outputs(peft.PeftModel.from_pretrained(seeded(make), tmp_path / "adapter").eval(), ids)
    assert (ours - outputs(seeded(make), ids)).abs().max() > 1e-2
    torch.testing.assert_close(theirs, ours, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("case", CASES)
def test_we_load_what_peft_saves(case: str, tmp_path: Path, ids: torch.Tensor) -> None:
    make, options = CASES[case]
    targets = options["targets"]
    config = peft.LoraConfig(
        r=8,
        lora_alpha=16,
        # A single string is a regular expression for PEFT, a list holds names.
        target_modules=targets if isinstance(targets, str) else rf".*({'|'.join(targets)})$",
        use_rslora=options.get("rslora", False),
        rank_pattern=options.get("rank_pattern", {}),
        alpha_pattern=options.get("alpha_pattern", {}),
        fan_in_fan_out=make is gpt2,
    )
    theirs = peft.get_peft_model(seeded(make), config).eval()
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            if "lora_" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)
    want = outputs(theirs, ids)
    theirs.save_pretrained(tmp_path)
    got = outputs(lorica.load_adapter(seeded(make), tmp_path), ids)
    torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-5)


def saved(folder: Path, make: Callable[[], Any] = llama) -> Path:
    model = lorica.adapt(seeded(make), lorica.LoRA(rank=4))
    randomise(model)
    return lorica.save_adapter(model, folder / "adapter")


def test_round_trip_is_bit_exact(tmp_path: Path, ids: torch.Tensor) -> None:
    model = lorica.adapt(seeded(llama), lorica.LoRA(rank=4, alpha=7, rslora=True))
    randomise(model)
    again = lorica.load_adapter(seeded(llama), lorica.save_adapter(model, tmp_path / "a"))
    assert torch.equal(outputs(again, ids), outputs(model, ids))
    # Saving over an adapter folder replaces it; what was loaded saves to the same tensors.
    lorica.save_adapter(again, tmp_path / "b")
    first, second = load_file(tmp_path / "a" / WEIGHTS), load_file(tmp_path / "b" / WEIGHTS)
    assert first.keys() == second.keys() and all(torch.equal(first[key], second[key]) for key in first)


def test_another_base_is_refused_by_its_weights(tmp_path: Path) -> None:
    folder = saved(tmp_path)
    torch.manual_seed(1)
    other = llama()
    other.name_or_path = seeded(llama).name_or_path
    with pytest.raises(AdapterError, match="another base"):
        lorica.load_adapter(other, folder)
    assert not lorica.adapters(other)


def test_the_same_base_in_another_dtype_is_accepted(tmp_path: Path) -> None:
    lorica.load_adapter(seeded(llama).to(torch.bfloat16), saved(tmp_path))


def edit_config(folder: Path, **changes: Any) -> None:
    (folder / PROOF).unlink()
    config = json.loads((folder / CONFIG).read_text())
    (folder / CONFIG).write_text(json.dumps({**config, **changes}))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"use_dora": True}, "lora_magnitude_vector is missing"),
        ({"modules_to_save": ["lm_head"], "bias": "all"}, "bias.*modules_to_save"),
        ({"init_lora_weights": "pissa_niter_4"}, "pissa"),
        ({"peft_type": "XLORA"}, "XLORA"),
        ({"r": 60_000}, "expected \\[60000, 32\\]"),
        ({"r": -1}, "rank is -1"),
        ({"r": "many"}, "many"),
        ({"rank_pattern": {"q_proj": 2}}, "q_proj.*expected \\[2, 32\\]"),
    ],
)
def test_configs_that_mean_something_else_are_refused(changes: dict[str, Any], words: str, tmp_path: Path) -> None:
    folder = saved(tmp_path)
    edit_config(folder, **changes)
    model = seeded(llama)
    with pytest.raises(AdapterError, match=f"(?s){words}"):
        lorica.load_adapter(model, folder)
    assert not lorica.adapters(model)


def edit_weights(folder: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    (folder / PROOF).unlink()
    tensors = load_file(folder / WEIGHTS)
    change(tensors)
    save_file(tensors, folder / WEIGHTS)


KEY = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda t: t.pop(KEY), "q_proj.lora_A.weight is missing"),
        (lambda t: t.update({KEY: torch.zeros(5, 32)}), r"q_proj.*is \[5, 32\], expected \[4, 32\]"),
        (lambda t: t.update({KEY: torch.full((4, 32), float("nan"))}), "NaN"),
        (lambda t: t.update({"surprise": torch.zeros(1)}), "surprise belongs to no module"),
        (
            lambda t: t.update({KEY.replace("layers.0", "layers.7"): torch.zeros(4, 32)}),
            "layers.7.*is a ModuleList, which lora cannot wrap",
        ),
        (lambda t: t.update({"base_model.model.vision.embed_tokens.weight": torch.ones(2)}), "is not the base's"),
        (lambda t: t.clear(), "no adapter's tensor"),
    ],
)
def test_weights_that_do_not_fit_are_refused(change: Any, words: str, tmp_path: Path, ids: torch.Tensor) -> None:
    folder = saved(tmp_path)
    edit_weights(folder, change)
    model = seeded(llama)
    before = outputs(model, ids)
    with pytest.raises(AdapterError, match=f"(?s){words}"):
        lorica.load_adapter(model, folder)
    assert not lorica.adapters(model) and torch.equal(outputs(model, ids), before)


@pytest.mark.parametrize("damage", ["flip", "truncate", "huge header", "overlap", "empty"])
def test_damaged_files_end_in_a_clean_error(damage: str, tmp_path: Path) -> None:
    folder = saved(tmp_path)
    file = folder / WEIGHTS
    data = bytearray(file.read_bytes())
    if damage == "flip":
        data[-1] ^= 1
    else:
        # Without the proof nothing but the format itself stands guard.
        (folder / PROOF).unlink()
    if damage == "truncate":
        data = data[:-100]
    elif damage == "huge header":
        data[:8] = struct.pack("<Q", 1 << 60)
    elif damage == "empty":
        data = bytearray()
    elif damage == "overlap":
        header = {k: {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]} for k in ("a", "b")}
        text = json.dumps(header).encode()
        data = bytearray(struct.pack("<Q", len(text)) + text + bytes(16))
    file.write_bytes(data)
    with pytest.raises(AdapterError, match=r"damaged"):
        lorica.load_adapter(seeded(llama), folder)


def test_pickled_adapters_are_refused(tmp_path: Path) -> None:
    folder = saved(tmp_path)
    (folder / WEIGHTS).rename(folder / "adapter_model.bin")
    with pytest.raises(AdapterError, match="pickle"):
        lorica.load_adapter(seeded(llama), folder)


def test_saving_refuses_what_it_should(tmp_path: Path) -> None:
    with pytest.raises(AdapterError, match="no adapters"):
        lorica.save_adapter(seeded(llama), tmp_path / "a")
    model = lorica.adapt(seeded(llama), lorica.LoRA(rank=4))
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "thesis.txt").write_text("years of work")
    with pytest.raises(AdapterError, match="no adapter folder"):
        lorica.save_adapter(model, tmp_path / "b")
    next(iter(lorica.trainable_parameters(model).values())).data[0, 0] = float("inf")
    with pytest.raises(AdapterError, match="NaN or infinity"):
        lorica.save_adapter(model, tmp_path / "c")
    assert not (tmp_path / "c").exists() and [p.name for p in tmp_path.iterdir()] == ["b"]


def test_a_head_trained_beside_the_adapter_is_not_lost_silently(tmp_path: Path) -> None:
    folder = saved(tmp_path)
    edit_weights(folder, lambda t: t.update({"base_model.model.lm_head.weight": torch.ones(64, 32)}))
    with pytest.raises(AdapterError, match=r"lm_head\.weight is not the base's"):
        lorica.load_adapter(seeded(llama), folder)
