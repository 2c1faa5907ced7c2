"""Folders of prompts and prefixes go both ways between PEFT and us and give equal logits."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForSequenceClassification, BertConfig, LlamaConfig, RobertaConfig

import lorica
from lorica.data.layouts import classes
from lorica.data.tokenized import TokenizedDataset
from lorica.errors import AdapterError
from lorica.evaluate.classification import class_logits
from lorica.methods.attach import in_front
from lorica.methods.method import MethodOptions
from lorica.methods.prefix import PrefixTuning
from lorica.methods.prompt import PromptTuning
from lorica.methods.ptuning import PTuning
from lorica.methods.ptuning_v2 import PTuningV2
from lorica.models.tasks import start_position

from .small_models import IDS, SMALL, bert, gpt2, llama, qwen3, randomise

peft = pytest.importorskip("peft", reason="needs peft, the oracle")

N = 5
MAKERS = [llama, qwen3, gpt2]
METHODS: dict[str, MethodOptions] = {
    "prompt": PromptTuning(num_virtual_tokens=N),
    "ptuning mlp": PTuning(num_virtual_tokens=N),
    "ptuning lstm": PTuning(num_virtual_tokens=N, encoder="lstm", encoder_hidden_size=12),
    "prefix": PrefixTuning(num_virtual_tokens=N, encoder_hidden_size=12),
    "ptuning_v2": PTuningV2(num_virtual_tokens=N),
}
# PEFT's configurations and the classes of ours that read their folders.
CONFIGS: dict[str, tuple[str, dict[str, Any], type[MethodOptions]]] = {
    "prompt tuning": ("PromptTuningConfig", {}, PromptTuning),
    "p-tuning, mlp": ("PromptEncoderConfig", {"encoder_hidden_size": 12}, PromptTuning),
    "p-tuning, lstm": (
        "PromptEncoderConfig", {"encoder_hidden_size": 12, "encoder_reparameterization_type": "LSTM"}, PromptTuning
    ),
    "prefix tuning": ("PrefixTuningConfig", {}, PTuningV2),
    "prefix tuning, projected": ("PrefixTuningConfig", {"prefix_projection": True}, PTuningV2),
}  # fmt: skip


def ours(model: Any, ids: Tensor = IDS) -> Tensor:
    """Logits at `ids`, behind what the model's method wants there."""
    virtual, offset = in_front(model)
    before = torch.tensor(virtual, dtype=ids.dtype).expand(len(ids), -1)
    whole = torch.cat([before, ids], 1)
    with torch.no_grad():
        return model(whole, position_ids=(torch.arange(whole.shape[1]) + offset).expand_as(whole)).logits[
            :, len(virtual) :
        ]


def theirs(model: Any, ids: Tensor = IDS) -> Tensor:
    with torch.no_grad():
        return model(ids, attention_mask=torch.ones_like(ids)).logits[:, -ids.shape[1] :]


@pytest.mark.parametrize("make", MAKERS)
@pytest.mark.parametrize("method", METHODS)
def test_peft_loads_what_we_save(method: str, make: Callable[[], Any], tmp_path: Path) -> None:
    model = lorica.adapt(make(), METHODS[method])
    randomise(lorica.trainable_parameters(model).values())
    want = ours(model)
    lorica.save_adapter(model, tmp_path)
    assert list(load_file(tmp_path / "adapter_model.safetensors")) == ["prompt_embeddings"]
    got = theirs(peft.PeftModel.from_pretrained(make(), tmp_path).eval())
    assert (want - ours(make())).abs().max() > 1e-2
    torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-5)
    assert torch.equal(ours(lorica.load_adapter(make(), tmp_path)), want)


@pytest.mark.parametrize("make", MAKERS)
@pytest.mark.parametrize("name", CONFIGS)
def test_we_load_what_peft_saves(name: str, make: Callable[[], Any], tmp_path: Path) -> None:
    kind, fields, plain = CONFIGS[name]
    config = getattr(peft, kind)(task_type="CAUSAL_LM", num_virtual_tokens=N, **fields)
    torch.manual_seed(3)
    model = peft.get_peft_model(make(), config).eval()
    randomise(p for p in model.parameters() if p.requires_grad)
    want = theirs(model)
    model.save_pretrained(tmp_path)
    loaded = lorica.load_adapter(make(), tmp_path)
    assert type(next(iter(lorica.adapters(loaded).values())).options) is plain
    torch.testing.assert_close(ours(loaded), want, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("method", ["prompt", "ptuning mlp", "ptuning_v2"])
def test_a_bert_goes_both_ways(method: str, tmp_path: Path) -> None:
    model = lorica.adapt(bert(), METHODS[method])
    randomise(lorica.trainable_parameters(model).values())
    virtual, offset = in_front(model)
    whole = torch.cat([torch.tensor(virtual, dtype=IDS.dtype).expand(2, -1), IDS], 1)
    positions = (torch.arange(whole.shape[1]) + offset).expand_as(whole)
    with torch.no_grad():
        want = model(whole, position_ids=positions).last_hidden_state
    lorica.save_adapter(model, tmp_path / "ours")
    other = peft.PeftModelForFeatureExtraction.from_pretrained(bert(), tmp_path / "ours").eval()
    with torch.no_grad():
        got = other(IDS, attention_mask=torch.ones_like(IDS)).last_hidden_state
    torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-5)
    other.save_pretrained(tmp_path / "theirs")
    again = lorica.load_adapter(bert(), tmp_path / "theirs")
    with torch.no_grad():
        assert torch.equal(again(whole, position_ids=positions).last_hidden_state, want)


def classifier() -> Any:
    torch.manual_seed(0)
    config = BertConfig(**SMALL, pad_token_id=0, num_labels=3)
    return AutoModelForSequenceClassification.from_config(config, dtype=torch.float32).eval()


def test_a_head_trained_beside_a_prompt_goes_both_ways(tmp_path: Path) -> None:
    options = PromptTuning(num_virtual_tokens=N, modules_to_save=("classifier",))
    model = lorica.adapt(classifier(), options)
    randomise(lorica.trainable_parameters(model).values())
    whole = torch.cat([torch.arange(64, 64 + N).expand(2, -1), IDS], 1)
    with torch.no_grad():
        want = model(whole).logits
    lorica.save_adapter(model, tmp_path / "ours")
    other = peft.PeftModel.from_pretrained(classifier(), tmp_path / "ours").eval()
    with torch.no_grad():
        got = other(IDS, attention_mask=torch.ones_like(IDS)).logits
    torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-5)
    other.save_pretrained(tmp_path / "theirs")
    for folder in ("ours", "theirs"):
        with torch.no_grad():
            again = lorica.load_adapter(classifier(), tmp_path / folder)(whole).logits
        torch.testing.assert_close(again, want, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("config", [BertConfig, RobertaConfig, LlamaConfig])
@pytest.mark.parametrize("method", ["prompt", "ptuning_v2"])
def test_a_classifier_s_batches_are_what_peft_reads(method: str, config: Any, tmp_path: Path) -> None:
    def make() -> Any:
        torch.manual_seed(0)
        whole = config(**SMALL, pad_token_id=1, num_labels=3, initializer_range=0.2)
        return AutoModelForSequenceClassification.from_config(whole, dtype=torch.float32).eval()

    head = "score" if config is LlamaConfig else "classifier"
    model = lorica.adapt(make(), replace(METHODS[method], modules_to_save=(head,)))
    randomise(lorica.trainable_parameters(model).values())
    samples = [(ids.numpy(), np.array([-100] * (len(ids) - 1) + [0])) for ids in (IDS[0], IDS[1, :6])]
    dataset = TokenizedDataset.from_samples(samples).behind(*in_front(model))
    layout = classes(pad_id=1, token_types=False, start=start_position(model.config))
    got = class_logits(model, [layout.make(dataset, np.arange(2))])
    lorica.save_adapter(model, tmp_path)
    other = peft.PeftModel.from_pretrained(make(), tmp_path).eval()
    with torch.no_grad():
        want = [other(ids, attention_mask=torch.ones_like(ids)).logits for ids in (IDS[:1], IDS[1:, :6])]
    torch.testing.assert_close(got, torch.cat(want), atol=1e-5, rtol=1e-5)


def broken(folder: Path, **changes: Any) -> Path:
    """A folder of `ptuning_v2` without our proof, with other fields or another `tensor`."""
    lorica.save_adapter(lorica.adapt(llama(), METHODS["ptuning_v2"]), folder)
    (folder / "lorica.json").unlink()
    tensors = load_file(folder / "adapter_model.safetensors")
    if "tensor" in changes:
        tensors["prompt_embeddings"] = changes.pop("tensor")
    if "beside" in changes:
        tensors[changes.pop("beside")] = torch.zeros(N, 32)
    save_file(tensors, folder / "adapter_model.safetensors")
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps({**config, **changes}))
    return folder


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"tensor": torch.zeros(N, 63)}, r"is \[5, 63\], expected \[5, 64\]"),
        ({"tensor": torch.zeros(N + 1, 64)}, r"is \[6, 64\], expected \[5, 64\]"),
        ({"tensor": torch.zeros(N)}, r"is \[5\], expected"),
        ({"tensor": torch.full((N, 64), torch.nan)}, "NaN"),
        ({"num_virtual_tokens": "many"}, "invalid literal"),
        ({"num_virtual_tokens": 10**9}, "num_virtual_tokens"),
        ({"num_transformer_submodules": 2}, "encoder-decoders"),
        ({"peft_type": "LORA", "r": 4}, "prompt_embeddings belongs to no module"),
        ({"peft_type": "CARTRIDGE"}, "can be loaded"),
        ({"beside": "base_model.lm_head.prompt_embeddings"}, "lm_head"),
        ({"beside": "base_model.model.layers.0.self_attn.prompt_embeddings"}, "beside prompt_embeddings"),
    ],
)
def test_a_folder_that_does_not_fit_is_refused_and_the_model_left_alone(
    changes: dict[str, Any], words: str, tmp_path: Path
) -> None:
    model = llama()
    with pytest.raises(AdapterError, match=words):
        lorica.load_adapter(model, broken(tmp_path / "adapter", **changes))
    assert not lorica.adapters(model)
