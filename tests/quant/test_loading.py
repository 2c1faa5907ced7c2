"""Loading: a tensor at a time, in the memory that is promised, and to and from transformers with bitsandbytes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    BertConfig,
    BertForMaskedLM,
    BitsAndBytesConfig,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    PretrainedConfig,
    Qwen3MoeConfig,
)

import lorica
from lorica.errors import ConfigError, ModelError
from lorica.models.load import base_fingerprint
from lorica.quant.linear import format_of, layers

IDS = torch.arange(5, 45).view(2, 20)


@pytest.fixture
def saved(tiny_llama: Callable[..., Any], tmp_path: Path) -> Path:
    """A tiny checkpoint in several shards."""
    tiny_llama(attention_bias=True).save_pretrained(tmp_path / "base", max_shard_size="20KB")
    assert len(list((tmp_path / "base").glob("*.safetensors"))) > 2
    return tmp_path / "base"


def load(folder: Path, **settings: Any) -> Any:
    return lorica.load_model(folder, device="cpu", **{"dtype": "float32", **settings})


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        result: Tensor = model(IDS).logits
    return result


@pytest.mark.parametrize("double_quant", [False, True])
def test_it_equals_quantising_afterwards(saved: Path, double_quant: bool) -> None:
    model = load(saved, quant="nf4", double_quant=double_quant)
    expected = lorica.quantize(load(saved), double_quant=double_quant)
    ours, theirs = model.state_dict(), expected.state_dict()
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in ours)
    assert torch.equal(logits(model), logits(expected))
    assert base_fingerprint(model) == base_fingerprint(load(saved))
    assert "lm_head" not in dict(layers(model)) and len(list(layers(model))) == 14


def test_bfloat16_is_quantised_from_bfloat16(saved: Path) -> None:
    model = load(saved, quant="nf4", dtype="bfloat16")
    layer = model.model.layers[0].mlp.up_proj
    assert model.dtype == layer.weight.dtype == layer.quantized.dtype == torch.bfloat16
    assert model.model.layers[0].self_attn.q_proj.bias.dtype == torch.bfloat16
    expected = lorica.quantize(load(saved, dtype="bfloat16"))
    assert torch.equal(layer.weight, expected.model.layers[0].mlp.up_proj.weight)


@pytest.mark.parametrize("scheme", ["nf4", "fp4"])
@pytest.mark.parametrize("double_quant", [False, True])
def test_transformers_with_bitsandbytes_reads_what_is_saved(
    saved: Path, tmp_path: Path, scheme: str, double_quant: bool
) -> None:
    pytest.importorskip("bitsandbytes")
    model = load(saved, quant=scheme, double_quant=double_quant)
    model.save_pretrained(tmp_path / "quantised", max_shard_size="20KB")
    with torch.compiler.set_stance("force_eager"):
        theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "quantised", dtype=torch.float32)
        assert type(theirs.model.layers[0].mlp.up_proj).__name__ == "Linear4bit"
        torch.testing.assert_close(logits(theirs), logits(model), rtol=1e-5, atol=1e-5)
    again = load(tmp_path / "quantised")
    assert format_of(again) == scheme + (", double_quant" if double_quant else "")
    assert torch.equal(logits(again), logits(model))
    again.save_pretrained(tmp_path / "again", max_shard_size="20KB")
    for file in (tmp_path / "quantised").glob("*.safetensors"):
        assert file.read_bytes() == (tmp_path / "again" / file.name).read_bytes()


@pytest.mark.parametrize("double_quant", [False, True])
def test_what_transformers_with_bitsandbytes_saved_is_read_as_it_is(
    saved: Path, tmp_path: Path, double_quant: bool
) -> None:
    pytest.importorskip("bitsandbytes")
    settings = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=double_quant,
        bnb_4bit_compute_dtype=torch.float32,
    )  # fmt: skip
    with torch.compiler.set_stance("force_eager"):
        theirs = AutoModelForCausalLM.from_pretrained(saved, quantization_config=settings, dtype=torch.float32)
        theirs.save_pretrained(tmp_path / "theirs")
        expected = logits(theirs)
    model = load(tmp_path / "theirs")
    torch.testing.assert_close(logits(model), expected, rtol=1e-5, atol=1e-5)
    assert torch.equal(logits(model), logits(load(tmp_path / "theirs", quant="nf4"))), "quant changes nothing then"
    assert torch.equal(logits(model), logits(load(saved, quant="nf4", double_quant=double_quant)))


def test_a_gpt2_and_a_classifier(tmp_path: Path) -> None:
    torch.manual_seed(0)
    gpt2 = GPT2LMHeadModel(GPT2Config(vocab_size=64, n_positions=64, n_embd=32, n_layer=1, n_head=2))
    gpt2.save_pretrained(tmp_path / "gpt2")
    model = load(tmp_path / "gpt2", quant="nf4")
    assert [name.rpartition(".")[2] for name, _ in layers(model)] == ["c_attn", "c_proj", "c_fc", "c_proj"]
    assert base_fingerprint(model) == base_fingerprint(load(tmp_path / "gpt2"))
    assert torch.equal(logits(model), logits(lorica.quantize(load(tmp_path / "gpt2"))))
    shape = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 48}
    BertForMaskedLM(BertConfig(vocab_size=64, **shape)).save_pretrained(tmp_path / "bert")
    model = load(tmp_path / "bert", quant="nf4", labels=("no", "yes"))
    assert len(list(layers(model))) == 6, "neither its head nor its pooling layer, which are new"
    assert logits(model).shape == (2, 2)


def test_faults_are_said(saved: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no quantisation scheme 'nf5'"):
        load(saved, quant="nf5")
    file = next(f for f in saved.glob("*.safetensors") if any("up_proj" in key for key in load_file(f)))
    tensors = load_file(file)
    name = next(key for key in tensors if "up_proj" in key)
    tensors[name][0, 0] = float("inf")
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(ModelError, match=rf"{name.removesuffix('.weight')}.*infinite"):
        load(saved, quant="nf4")
    config = json.loads((saved / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "gptq", "bits": 4}
    (saved / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match="quantised by 'gptq'; NF4 and FP4"):
        load(saved)


UP = "model.layers.1.mlp.up_proj.weight"


def change(folder: Path, what: Callable[[dict[str, Tensor]], Any]) -> None:
    for file in folder.glob("*.safetensors"):
        tensors = load_file(file)
        if UP in tensors:
            what(tensors)
            save_file(tensors, file, metadata={"format": "pt"})


@pytest.mark.parametrize("quant", [None, "nf4"])
def test_a_checkpoint_that_is_not_whole_is_refused(
    quant: str | None, tiny_llama: Callable[..., Any], tmp_path: Path
) -> None:
    tiny_llama().save_pretrained(tmp_path)
    change(tmp_path, lambda tensors: tensors.pop(UP))
    with pytest.raises(ModelError, match=rf"lacks 1 of the model's weights: {UP}\. Is it whole"):
        load(tmp_path, quant=quant)
    change(tmp_path, lambda tensors: tensors.update({UP: torch.zeros(3, 3), "extra": torch.zeros(1)}))
    file = tmp_path / "model.safetensors"
    os.truncate(file, file.stat().st_size - 100)
    with pytest.raises(ModelError, match="file not fully covered"):
        load(tmp_path, quant=quant)


@pytest.mark.parametrize("scheme", ["int8", "e2m1"])
def test_what_no_file_has_a_format_for_is_not_saved(saved: Path, tmp_path: Path, scheme: str) -> None:
    model = lorica.quantize(load(saved), scheme)
    with pytest.raises(ModelError, match=f"quantised to {scheme} cannot be saved"):
        model.save_pretrained(tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_model_with_nothing_to_quantise(tmp_path: Path) -> None:
    """A Llama without layers has a head, which is never quantised."""
    config = LlamaConfig(hidden_size=16, num_hidden_layers=0, num_attention_heads=2, vocab_size=20)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "empty")
    assert load(tmp_path / "empty").config.num_hidden_layers == 0
    with pytest.raises(ModelError, match=r"LlamaForCausalLM holds no weight that could be quantised.*null"):
        load(tmp_path / "empty", quant="nf4")


def test_a_weight_of_another_shape_is_named_and_one_too_many_is_left(saved: Path) -> None:
    change(saved, lambda tensors: tensors.update({"extra": torch.zeros(1)}))
    assert len(list(layers(load(saved, quant="nf4")))) == 14
    change(saved, lambda tensors: tensors.update({UP: torch.zeros(3, 32)}))
    with pytest.raises(ModelError, match=rf"{UP}: a weight of shape \[3, 32\] stands where one of"):
        load(saved, quant="nf4")


@pytest.mark.parametrize(
    ("part", "value", "words"),
    [
        ("", None, f"{UP}: it is not quantised as bitsandbytes does: it has the parts weight.absmax"),
        (".absmax", None, "it is not quantised as bitsandbytes does"),
        (".quant_state.bitsandbytes__nf4", None, "it is not quantised as bitsandbytes does"),
        (".quant_state.bitsandbytes__nf4", torch.zeros(3, dtype=torch.uint8), "bitsandbytes__nf4 is damaged"),
        (".nested_absmax", None, "nested_absmax is missing"),
        (".nested_absmax", torch.zeros(0), "scales of scales have"),
        ("", torch.zeros(9, 1, dtype=torch.uint8), "have .9, "),
        (".quant_map", torch.zeros(16), "its levels are not those of nf4"),
    ],
)
def test_a_quantised_checkpoint_with_damaged_parts_is_refused(
    part: str, value: Tensor | None, words: str, tiny_llama: Callable[..., Any], tmp_path: Path
) -> None:
    lorica.quantize(tiny_llama()).save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    tensors = load_file(file)
    del tensors[f"{UP}{part}"]
    save_file({**tensors, **({} if value is None else {f"{UP}{part}": value})}, file, metadata={"format": "pt"})
    with pytest.raises(ModelError, match=words):
        load(tmp_path)


MEASURE = """
import gc, json, sys
import torch, lorica
from lorica.quant.linear import layers
from lorica.training.metrics import peak_memory_bytes
torch.set_num_threads(1)
lorica.load_model("embedded", quant="nf4", dtype="bfloat16", device="cpu")
gc.collect()
def resident():
    return int(open("/proc/self/statm").read().split()[1]) * 4096
with open("/proc/self/clear_refs", "w") as file:
    file.write("5")
before = resident()
model = lorica.load_model(sys.argv[1], quant="nf4", dtype="bfloat16", device="cpu")
growth = peak_memory_bytes(torch.device("cpu")) - before
final = sum(p.numel() * p.element_size() for p in model.parameters())
largest = max(p.shape.numel() * 2 for _, p in layers(model))
largest = max([largest] + [p.numel() * p.element_size() for p in model.parameters()])
print(json.dumps({"growth": growth, "final": final, "largest": largest}))
"""


LLAMA = LlamaConfig(
    hidden_size=1024, intermediate_size=4096, num_hidden_layers=4, num_attention_heads=8, vocab_size=2048,
    tie_word_embeddings=True, dtype="bfloat16",
)  # fmt: skip
MIXTURE = Qwen3MoeConfig(
    hidden_size=512, moe_intermediate_size=512, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
    head_dim=64, num_experts=16, num_experts_per_tok=2, vocab_size=2048, dtype="bfloat16",
)  # fmt: skip


@pytest.mark.skipif(not os.path.exists("/proc/self/clear_refs"), reason="peaks are reset by the Linux kernel")
@pytest.mark.parametrize("config", [LLAMA, MIXTURE], ids=["layers", "experts"])
def test_loading_never_holds_more_than_the_result_and_one_tensor(config: PretrainedConfig, tmp_path: Path) -> None:
    """138 MB in bfloat16, in several shards, become 38 MB; 55 MB with 32 experts 18 MB, with merges of up to 17 MB."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model = model.to_empty(device="cpu")
    for parameter in model.parameters():
        # A block that repeats is as good as random numbers here, and quicker.
        parameter.data.view(-1)[:] = torch.linspace(-1, 1, 64).repeat(parameter.numel() // 64)
    model.save_pretrained(tmp_path, max_shard_size="25MB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    found = subprocess.run(
        [sys.executable, "-c", MEASURE, str(tmp_path)], capture_output=True, text=True, check=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    measured = json.loads(found.stdout.splitlines()[-1])
    assert measured["growth"] <= (measured["final"] + measured["largest"]) * 1.1, measured
