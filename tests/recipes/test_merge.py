"""`lorica merge`: the merged folder against the adapted model, loaded by transformers alone."""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

import lorica
from lorica.config import RunConfig, dump_yaml, load_config
from lorica.errors import AdapterError, ConfigError
from lorica.methods.lora_kinds import LoraEmbedding, LoraLinear
from lorica.models.load import base_fingerprint
from lorica.recipes import merge as recipe
from lorica.recipes.merge import merge
from lorica.recipes.opening import open_model

IDS = torch.arange(100, 160).view(2, 30)


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=IDS).logits


def test_transformers_loads_what_was_merged(finished: Path, tmp_path: Path) -> None:
    """Reliability case 20, with an adapter on one side of a tied pair: the embedding, and not the head."""
    result = merge(finished, tmp_path / "merged")
    adapted, tokenizer, _ = open_model(finished)
    plain = AutoModelForCausalLM.from_pretrained(
        tmp_path / "merged", local_files_only=True, attn_implementation="eager"
    )
    difference = float((logits(plain) - logits(adapted)).abs().max())
    found = result.agreement
    assert difference < 1e-4 and found.max_difference < 1e-4
    assert float((logits(adapted) - logits(open_model(finished, base_only=True)[0])).abs().max()) > 0.1
    assert (found.top1, found.num_tokens) == (1.0, 128) and abs(found.kl) < 1e-6
    assert type(plain).__name__ == "LlamaForCausalLM"
    assert not [name for name, _ in plain.named_modules() if "lora" in name or "base" in name]
    # The pair is no pair any more, and whoever loads the folder must not tie it again.
    assert plain.config.tie_word_embeddings is False
    assert not torch.equal(plain.lm_head.weight, plain.model.embed_tokens.weight)
    assert torch.equal(plain.lm_head.weight, adapted.lm_head.weight)
    again = AutoTokenizer.from_pretrained(tmp_path / "merged", local_files_only=True)
    assert again.chat_template == tokenizer.chat_template
    assert again("What is 1 plus 2?").input_ids == tokenizer("What is 1 plus 2?").input_ids


def test_the_folder_knows_nothing_of_us(finished: Path, tmp_path: Path) -> None:
    merge(finished, tmp_path / "merged")
    assert {path.name for path in (tmp_path / "merged").iterdir()} == {
        "chat_template.jinja",
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    }
    config = json.loads((tmp_path / "merged" / "config.json").read_text())
    assert "lorica" not in json.dumps(config) and config["dtype"] == "float32"
    assert not [name for name in load_file(tmp_path / "merged" / "model.safetensors") if "lora" in name]


def test_merging_by_hand_gives_the_same_weights(finished: Path, tiny_base: Path, tmp_path: Path) -> None:
    """W + s B A in float64."""
    merge(finished, tmp_path / "merged")
    merged = load_file(tmp_path / "merged" / "model.safetensors")
    base = load_file(tiny_base / "model.safetensors")
    adapter = {k: v.double() for k, v in load_file(finished / "adapter" / "adapter_model.safetensors").items()}
    scale = 8.0 / 4
    for name, weight in base.items():
        module = f"base_model.model.{name.removesuffix('.weight')}"
        expected = weight.double()
        if f"{module}.lora_A.weight" in adapter:
            expected = expected + scale * adapter[f"{module}.lora_B.weight"] @ adapter[f"{module}.lora_A.weight"]
        if f"{module}.lora_embedding_A" in adapter:
            expected = (
                expected + scale * (adapter[f"{module}.lora_embedding_B"] @ adapter[f"{module}.lora_embedding_A"]).T
            )
        torch.testing.assert_close(merged[name].double(), expected, rtol=1e-6, atol=1e-7)
    assert merged.keys() - base.keys() == {"lm_head.weight"}


def test_a_merged_folder_is_a_base(finished: Path, make_config: Callable[..., RunConfig], tmp_path: Path) -> None:
    merge(finished, tmp_path / "merged")
    result = lorica.train(make_config(tmp_path / "run", base=tmp_path / "merged", max_steps=2))
    assert result.steps == 2
    merge(tmp_path / "run", tmp_path / "twice")
    model, _, _ = open_model(tmp_path / "run")
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "twice", local_files_only=True)
    torch.testing.assert_close(logits(plain), logits(model), rtol=0, atol=1e-4)


def test_an_adapter_folder_is_merged_as_its_run(finished: Path, tmp_path: Path) -> None:
    merge(finished, tmp_path / "run")
    # Away from its run the adapter only names its base.
    shutil.copytree(finished / "adapter", tmp_path / "alone")
    merge(tmp_path / "alone", tmp_path / "adapter")
    ours, theirs = (load_file(tmp_path / name / "model.safetensors") for name in ("run", "adapter"))
    assert ours.keys() == theirs.keys() and all(torch.equal(tensor, theirs[name]) for name, tensor in ours.items())


def test_detaching_gives_the_base_back(finished: Path, tiny_base: Path) -> None:
    """Reliability case 20."""
    adapted, _, _ = open_model(finished)
    fingerprint = base_fingerprint(adapted)
    plain, base = lorica.detach(adapted), lorica.load_model(tiny_base, dtype="float32", device="cpu")
    assert base_fingerprint(plain) == base_fingerprint(base) == fingerprint
    assert plain.state_dict().keys() == base.state_dict().keys()
    assert all(torch.equal(tensor, base.state_dict()[name]) for name, tensor in plain.state_dict().items())
    assert plain.lm_head.weight is plain.model.embed_tokens.weight
    assert torch.equal(logits(plain), logits(base))


def test_a_16_bit_base_stays_one(finished: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(finished, run)
    (run / "config.yaml").write_text(dump_yaml(load_config(run, ["model.dtype=bfloat16"]).config))
    found = merge(run, tmp_path / "merged").agreement
    assert {t.dtype for t in load_file(tmp_path / "merged" / "model.safetensors").values()} == {torch.bfloat16}
    assert 0 < found.max_difference < 0.06 * found.largest_logit and found.kept > 0.9


def test_what_does_not_agree_is_not_merged(finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    original = recipe.load_model

    def spoiled(*arguments: Any, **options: Any) -> Any:
        model = original(*arguments, **options)
        with torch.no_grad():
            model.lm_head.weight[7] += 1.0
        return model

    monkeypatch.setattr(recipe, "load_model", spoiled)
    with pytest.raises(AdapterError, match=r"Not merged: read back, the logits differ by "):
        merge(finished, tmp_path / "merged")
    assert list(tmp_path.iterdir()) == []


def test_a_lost_change_of_the_embedding_is_noticed(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of 8192 tokens few were trained: random ones alone would not show it."""
    monkeypatch.setattr(LoraEmbedding, "merged", lambda self: self.base)
    with pytest.raises(AdapterError, match="Not merged"):
        merge(finished, tmp_path / "merged")
    assert list(tmp_path.iterdir()) == []


def test_nan_is_no_agreement() -> None:
    ours = torch.zeros(1, 2, 3)
    theirs = ours.clone()
    theirs[0, 1, 2] = float("nan")
    assert recipe.agreement(ours, ours, ours, torch.float32).holds
    assert not recipe.agreement(ours, theirs, ours, torch.float32).holds
    assert not recipe.agreement(ours, theirs, theirs, torch.bfloat16).holds


def test_agreement_is_measured_by_the_formula() -> None:
    """Against the definition in float64."""
    torch.manual_seed(0)
    ours = torch.randn(2, 3, 5)
    theirs, base = ours + 0.01 * torch.randn(2, 3, 5), torch.randn(2, 3, 5)

    def kl(a: torch.Tensor, b: torch.Tensor) -> float:
        p, q = a.double().softmax(-1), b.double().softmax(-1)
        return float((p * (p / q).log()).sum(-1).mean())

    found = recipe.agreement(ours, theirs, base, torch.bfloat16)
    assert found.kl == pytest.approx(kl(ours, theirs), rel=1e-2)
    assert found.kept == pytest.approx(1 - kl(ours, theirs) / kl(ours, base), rel=1e-4)


def test_a_merge_that_did_nothing_is_refused_in_16_bit_too(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tmp_path / "run"
    shutil.copytree(finished, run)
    (run / "config.yaml").write_text(dump_yaml(load_config(run, ["model.dtype=bfloat16"]).config))
    for kind in (LoraLinear, LoraEmbedding):
        monkeypatch.setattr(kind, "merged", lambda self: self.base)
    with pytest.raises(AdapterError, match="0% of what the adapter changes is kept"):
        merge(run, tmp_path / "merged")


@pytest.mark.parametrize("kind", ["file", "folder"])
def test_nothing_is_overwritten(finished: Path, tmp_path: Path, kind: str) -> None:
    output = tmp_path / "merged"
    if kind == "file":
        output.write_text("mine")
    else:
        output.mkdir()
        (output / "mine.txt").write_text("mine")
    with pytest.raises(ConfigError, match="exists and is not empty") as caught:
        merge(finished, output)
    assert caught.value.exit_code == 2
    assert (output if kind == "file" else output / "mine.txt").read_text() == "mine"


def test_an_output_that_cannot_be_created_is_refused_first(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any) -> None:
        raise AssertionError("the model was opened")

    monkeypatch.setattr(recipe, "open_model", refuse)
    (tmp_path / "file").write_text("mine")
    long, new = tmp_path / ("x" * 300), tmp_path / "new"
    for output, reason in (
        (tmp_path / "file" / "deep", f"{tmp_path / 'file'}: Not a directory"),
        (long, "File name too"),
    ):
        with pytest.raises(ConfigError, match=rf"{output} cannot be created: .*{reason}.*\. Choose another --output\."):
            merge(finished, output)

    def forbidden(*_: object, **__: object) -> str:
        raise PermissionError(13, "Permission denied")

    # The tests may run as root, which may write anywhere.
    monkeypatch.setattr(tempfile, "mkdtemp", forbidden)
    with pytest.raises(ConfigError, match=rf"{new} cannot be created: {tmp_path}: Permission denied\. Choose"):
        merge(finished, new)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_an_empty_folder_may_be_the_output(finished: Path, tmp_path: Path) -> None:
    (tmp_path / "merged").mkdir()
    merge(finished, tmp_path / "merged")
    assert (tmp_path / "merged" / "config.json").is_file()


def test_what_has_no_adapter(tiny_base: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="has no adapter to merge"):
        merge(tiny_base, tmp_path / "merged")
    assert list(tmp_path.iterdir()) == []
