"""Loading: the embedded base, what is refused before anything is read, and the fingerprint."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import BertConfig

import lorica
from lorica.errors import ModelError
from lorica.models.load import base_fingerprint, load_config, load_model, load_tokenizer, pick_dtype
from lorica.models.tasks import CAUSAL, choose_task


def test_the_embedded_base_loads_by_name_and_by_folder(base: Path) -> None:
    by_name, by_folder = load_model("embedded", dtype="float32"), load_model(base, dtype=torch.float32)
    ids = torch.arange(10)[None]
    with torch.no_grad():
        assert torch.equal(by_name(ids).logits, by_folder(ids).logits)
    assert by_name.config._attn_implementation == "lorica" and not by_name.training
    assert (
        load_tokenizer("embedded").decode(load_tokenizer(base)("a private handbook").input_ids) == "a private handbook"
    )


def copy_of(base: Path, folder: Path) -> Path:
    return Path(shutil.copytree(base, folder / "base"))


def test_a_missing_folder_is_said_to_be_missing(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="no such folder"):
        load_model(tmp_path / "nothing")
    with pytest.raises(ModelError, match=r"no config\.json"):
        load_model(tmp_path)


@pytest.mark.parametrize("file", ["config.json", "tokenizer_config.json"])
def test_code_in_a_model_folder_is_never_run(file: str, base: Path, tmp_path: Path) -> None:
    folder = copy_of(base, tmp_path)
    content = json.loads((folder / file).read_text())
    (folder / file).write_text(json.dumps({**content, "auto_map": {"AutoModelForCausalLM": "evil.Model"}}))
    (folder / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    for load in (load_model, load_tokenizer, load_config):
        with pytest.raises(ModelError, match="auto_map"):
            load(folder)
    assert not (tmp_path / "ran").exists()


def test_pickled_weights_are_refused(base: Path, tmp_path: Path) -> None:
    folder = copy_of(base, tmp_path)
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(ModelError, match="pickle"):
        load_model(folder)


def test_damaged_files_end_in_a_model_error(base: Path, tmp_path: Path) -> None:
    folder = copy_of(base, tmp_path)
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])
    with pytest.raises(ModelError, match="cannot be loaded"):
        load_model(folder)
    (folder / "config.json").write_text("{")
    with pytest.raises(ModelError, match="not JSON"):
        load_config(folder)


def test_a_model_that_reads_in_both_directions_is_refused(tmp_path: Path) -> None:
    BertConfig(num_hidden_layers=1).save_pretrained(tmp_path)
    with pytest.raises(ModelError, match=r"reads in both directions.*model\.task=classification"):
        load_model(tmp_path, task="causal")
    BertConfig(num_hidden_layers=1, is_decoder=True).save_pretrained(tmp_path)
    assert choose_task("causal", load_config(tmp_path)) is CAUSAL


def test_the_fingerprint_knows_the_weights_and_nothing_else(tiny_llama: Callable[..., Any]) -> None:
    model = tiny_llama()
    plain = base_fingerprint(model)
    assert len(plain) == 64 and base_fingerprint(tiny_llama()) == plain
    assert base_fingerprint(tiny_llama().to(torch.bfloat16)) == plain
    lorica.adapt(model, lorica.LoRA(targets=("q_proj", "embed_tokens")))
    assert base_fingerprint(model) == plain
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[0, 0] += 1
    assert base_fingerprint(model) != plain
    assert base_fingerprint(tiny_llama(num_hidden_layers=1)) != plain


def test_auto_is_the_checkpoints_dtype_where_the_cpu_computes_it(monkeypatch: pytest.MonkeyPatch) -> None:
    config = load_config("embedded")
    cpu = torch.device("cpu")
    for supported, want in ((True, torch.bfloat16), (False, torch.float32)):
        monkeypatch.setattr("lorica.models.load.cpu_computes", lambda dtype, supported=supported: supported)
        assert pick_dtype("auto", config, cpu) is want and pick_dtype(None, config, cpu) is want
    assert pick_dtype("float16", config, cpu) is torch.float16
    with pytest.raises(ModelError, match="int4"):
        pick_dtype("int4", config, cpu)
