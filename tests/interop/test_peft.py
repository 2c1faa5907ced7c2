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

import lorica
from lorica.errors import AdapterError
from lorica.interop.folder import CONFIG, PROOF, WEIGHTS

from .small_models import bert, check_exchange, check_peft_reads_ours, gpt2, llama, outputs, qwen3, randomise

peft = pytest.importorskip("peft", reason="needs peft, the oracle")

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


@pytest.mark.parametrize("case", CASES)
def test_peft_loads_what_we_save(case: str, tmp_path: Path) -> None:
    make, options = CASES[case]
    check_peft_reads_ours(make, lorica.LoRA(rank=8, alpha=16, **options), tmp_path / "adapter", scale=0.1)


@pytest.mark.parametrize("case", CASES)
def test_we_load_what_peft_saves(case: str, tmp_path: Path) -> None:
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
    check_exchange(make, config, tmp_path, scale=0.1)


def saved(folder: Path, make: Callable[[], Any] = llama) -> Path:
    model = lorica.adapt(make(), lorica.LoRA(rank=4))
    randomise(lorica.trainable_parameters(model).values())
    return lorica.save_adapter(model, folder / "adapter")


def test_round_trip_is_bit_exact(tmp_path: Path) -> None:
    model = lorica.adapt(llama(), lorica.LoRA(rank=4, alpha=7, rslora=True))
    randomise(lorica.trainable_parameters(model).values())
    again = lorica.load_adapter(llama(), lorica.save_adapter(model, tmp_path / "a"))
    assert torch.equal(outputs(again), outputs(model))
    # Saving over an adapter folder replaces it; what was loaded saves to the same tensors.
    lorica.save_adapter(again, tmp_path / "b")
    first, second = load_file(tmp_path / "a" / WEIGHTS), load_file(tmp_path / "b" / WEIGHTS)
    assert first.keys() == second.keys() and all(torch.equal(first[key], second[key]) for key in first)


def test_another_base_is_refused_by_its_weights(tmp_path: Path) -> None:
    folder = saved(tmp_path)
    other = llama()
    randomise(other.parameters())
    with pytest.raises(AdapterError, match="another base"):
        lorica.load_adapter(other, folder)
    assert not lorica.adapters(other)


def test_the_same_base_in_another_dtype_is_accepted(tmp_path: Path) -> None:
    lorica.load_adapter(llama().to(torch.bfloat16), saved(tmp_path))


def edit_config(folder: Path, **changes: Any) -> None:
    (folder / PROOF).unlink()
    config = json.loads((folder / CONFIG).read_text())
    (folder / CONFIG).write_text(json.dumps({**config, **changes}))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"use_dora": True}, "lora_magnitude_vector is missing"),
        ({"bias": "some", "alora_invocation_tokens": [1]}, "alora_invocation_tokens.*bias"),
        ({"modules_to_save": ["lm_head"]}, "lm_head.weight is missing"),
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
    model = llama()
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
        (lambda t: t.update({"base_model.model.vision.embed_tokens.weight": torch.ones(2)}), "belongs to no module"),
        (lambda t: t.update({KEY.replace("lora_A", "base_layer"): torch.ones(32, 32)}), "is not the base's"),
        (lambda t: t.clear(), "no adapter's tensor"),
    ],
)
def test_weights_that_do_not_fit_are_refused(change: Any, words: str, tmp_path: Path) -> None:
    folder = saved(tmp_path)
    edit_weights(folder, change)
    model = llama()
    before = outputs(model)
    with pytest.raises(AdapterError, match=f"(?s){words}"):
        lorica.load_adapter(model, folder)
    assert not lorica.adapters(model) and torch.equal(outputs(model), before)


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
        lorica.load_adapter(llama(), folder)


def test_pickled_adapters_are_refused(tmp_path: Path) -> None:
    folder = saved(tmp_path)
    (folder / WEIGHTS).rename(folder / "adapter_model.bin")
    with pytest.raises(AdapterError, match="pickle"):
        lorica.load_adapter(llama(), folder)


def test_saving_refuses_what_it_should(tmp_path: Path) -> None:
    with pytest.raises(AdapterError, match="no adapters"):
        lorica.save_adapter(llama(), tmp_path / "a")
    model = lorica.adapt(llama(), lorica.LoRA(rank=4))
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "thesis.txt").write_text("years of work")
    with pytest.raises(AdapterError, match="no adapter folder"):
        lorica.save_adapter(model, tmp_path / "b")
    next(iter(lorica.trainable_parameters(model).values())).data[0, 0] = float("inf")
    with pytest.raises(AdapterError, match="NaN or infinity"):
        lorica.save_adapter(model, tmp_path / "c")
    assert not (tmp_path / "c").exists() and [p.name for p in tmp_path.iterdir()] == ["b"]
