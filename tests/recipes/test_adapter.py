"""`lorica adapter`: the folders that it writes say what they should, in PEFT's hands too; what does not fit refuses."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import lorica
from lorica.cli import main
from lorica.errors import AdapterError, ConfigError
from lorica.interop.arithmetic import delta
from lorica.interop.low_rank import read_low_rank
from lorica.interop.pair_layouts import EMBEDDING
from lorica.recipes.adapter import combine_adapters, convert, inspect, scale, verify
from lorica.recipes.opening import open_model

NAME = "model.layers.1.mlp.down_proj"
IDS = torch.arange(100, 160).view(2, 30)


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=IDS).logits


@pytest.fixture(scope="module")
def second(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Another adapter of the same base: rsLoRA, ranks of their own, one module that the first has not."""
    model = lorica.load_model(tiny_base, dtype=torch.float32)
    options = lorica.LoRA(
        rank=3, alpha=5, rslora=True, targets=("q_proj", "v_proj"), rank_pattern={"layers.0.self_attn.q_proj": 2}
    )
    lorica.adapt(model, options)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in lorica.trainable_parameters(model).values():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.2)
    return lorica.save_adapter(model, tmp_path_factory.mktemp("adapters") / "second")


def updates(folder: Path) -> dict[str, torch.Tensor]:
    return {name: delta(pair) for name, pair in read_low_rank(folder).pairs.items()}


def test_inspect_measures_against_the_base(finished: Path, tiny_base: Path, capsys: pytest.CaptureFixture[str]) -> None:
    result = inspect(finished, base=str(tiny_base))
    model, _, _ = open_model(finished)
    found = lorica.adapters(model)
    assert {part.name for part in result.parts} == set(found) and result.method == "LORA"
    for part in result.parts:
        adapter: Any = found[part.name]
        change = adapter.delta_weight()
        assert (part.rank, part.scale, part.shape) == (4, 2.0, list(change.shape))
        assert part.norm == pytest.approx(float(change.norm()), rel=1e-4)
        assert part.relative == pytest.approx(float(change.norm() / adapter.weight.norm()), rel=1e-4)
    assert result.num_parameters == sum(adapter.num_parameters() for adapter in found.values())
    assert result.bytes == 4 * result.num_parameters and result.base_fingerprint is not None
    out = capsys.readouterr().out
    assert "model.layers.1.mlp.down_proj" in out and result.base_fingerprint in out


def test_inspect_shows_any_method(tiny_base: Path, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft", reason="needs peft, which writes the folder")
    model = peft.get_peft_model(
        lorica.load_model(tiny_base), peft.LoHaConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM")
    )
    model.save_pretrained(tmp_path)
    result = inspect(tmp_path)
    assert result.method == "LOHA" and len(result.parts) == result.num_tensors == 8
    assert all(part.rank is None for part in result.parts) and result.base_fingerprint is None


def test_verify_measures_what_changes(finished: Path, second: Path, tiny_base: Path) -> None:
    result = verify(finished)
    assert result.max_difference > 1e-3 and result.kl > 0 and result.hashed
    assert (result.num_tensors, result.num_modules) == (10, 5)
    assert verify(second, base=str(tiny_base)).num_modules == 4


def test_verify_refuses_what_changes_nothing(tiny_base: Path, tmp_path: Path) -> None:
    model = lorica.adapt(lorica.load_model(tiny_base), lorica.LoRA(rank=2))
    lorica.save_adapter(model, tmp_path / "untrained")
    assert main(["adapter", "verify", str(tmp_path / "untrained")]) == 1
    with pytest.raises(AdapterError, match="changes no logit"):
        verify(tmp_path / "untrained")


def test_verify_accounts_for_every_tensor(second: Path, tmp_path: Path) -> None:
    shutil.copytree(second, tmp_path / "a")
    file = tmp_path / "a" / "adapter_model.safetensors"
    tensors = load_file(file)
    tensors["base_model.model.model.layers.9.self_attn.q_proj.lora_A.weight"] = torch.ones(3, 32)
    save_file(tensors, file)
    with pytest.raises(AdapterError, match=r"is damaged: its SHA-256"):
        verify(tmp_path / "a")
    (tmp_path / "a" / "lorica.json").unlink()
    with pytest.raises(AdapterError, match=r"layers\.9\.self_attn\.q_proj"):
        verify(tmp_path / "a")


def test_convert_folds_the_scale_and_peft_agrees(second: Path, tiny_base: Path, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft", reason="needs peft, the oracle")
    result = convert(second, tmp_path / "plain")
    assert (result.rank, result.error) == (3, 0.0) and set(result.errors.values()) == {0.0}
    config = json.loads((tmp_path / "plain" / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], config["use_rslora"], config["rank_pattern"]) == (3, 3, False, {})
    ours, _, _ = open_model(second)
    theirs = peft.PeftModel.from_pretrained(lorica.load_model(tiny_base, dtype=torch.float32), tmp_path / "plain")
    torch.testing.assert_close(logits(theirs), logits(ours), rtol=0, atol=1e-5)
    assert verify(tmp_path / "plain").max_difference > 0


def test_convert_cuts_the_rank_and_says_what_it_costs(finished: Path, tmp_path: Path) -> None:
    result = convert(finished, tmp_path / "small", rank=2)
    before, after = updates(finished / "adapter"), updates(tmp_path / "small")
    lost = whole = 0.0
    for name, update in before.items():
        s = torch.linalg.svdvals(update)
        assert result.errors[name] == pytest.approx(float(s[2:].norm() / s.norm()), rel=1e-4)
        assert float((update - after[name]).norm() / update.norm()) == pytest.approx(result.errors[name], rel=1e-4)
        lost, whole = lost + float(s[2:].square().sum()), whole + float(s.square().sum())
    assert result.error == pytest.approx((lost / whole) ** 0.5, rel=1e-4) and result.rank == 2


def test_scale(second: Path, tmp_path: Path) -> None:
    scale(second, -0.5, tmp_path / "half")
    before, after = updates(second), updates(tmp_path / "half")
    for name in before:
        torch.testing.assert_close(after[name], -0.5 * before[name], rtol=0, atol=1e-6)


@pytest.mark.parametrize("how", ["cat", "svd", "ties", "dare"])
def test_combine(how: Any, finished: Path, second: Path, tmp_path: Path) -> None:
    """The union of the modules; a weight with each; loads into the base and changes it."""
    sources = [f"{finished}=0.25", str(second)]
    result = combine_adapters(sources, tmp_path / "both", how, rank=None, density=0.9)
    first, other, both = updates(finished / "adapter"), updates(second), updates(tmp_path / "both")
    assert both.keys() == first.keys() | other.keys() and len(both) == 7
    if how == "cat":
        assert result.error == 0 and result.rank == 7
        for name, update in both.items():
            wanted = 0.25 * first.get(name, torch.zeros(())) + other.get(name, torch.zeros(()))
            torch.testing.assert_close(update, wanted, rtol=0, atol=1e-6)
    assert verify(tmp_path / "both").max_difference > 0


def test_combine_refuses_other_bases(
    finished: Path, second: Path, save_base: Callable[[Any], Path], tmp_path: Path
) -> None:
    shutil.copytree(second, tmp_path / "foreign")
    proof = json.loads((second / "lorica.json").read_text())
    (tmp_path / "foreign" / "lorica.json").write_text(json.dumps({**proof, "base_fingerprint": "0" * 64}))
    with pytest.raises(AdapterError, match="different bases"):
        combine_adapters([str(finished), str(tmp_path / "foreign")], tmp_path / "both", "svd")
    assert not (tmp_path / "both").exists()


def test_linear_needs_equal_ranks(finished: Path, second: Path, tmp_path: Path) -> None:
    with pytest.raises(AdapterError, match="ranks differ"):
        combine_adapters([str(finished), str(second)], tmp_path / "both", "linear")


@pytest.mark.parametrize(
    ("sources", "text"), [(["a"], "two adapters or more"), (["a", "b=much"], "'much' is no weight")]
)
def test_what_cannot_be_combined(sources: list[str], text: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=text):
        combine_adapters(sources, tmp_path / "both", "svd")


def test_nothing_is_overwritten(second: Path, tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("mine")
    for verb in (lambda: convert(second, tmp_path), lambda: scale(second, 2, tmp_path)):
        with pytest.raises(ConfigError, match="exists and is not empty"):
            verb()
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


def test_a_loralib_state_becomes_a_folder(tiny_base: Path, tmp_path: Path) -> None:
    """Its own names, which are the base's; the base says which are embeddings."""
    generator = torch.Generator().manual_seed(0)
    shapes = {"model.layers.0.self_attn.q_proj": (32, 32), "model.embed_tokens": (32, 8192)}
    state = {}
    for name, (out, wide) in shapes.items():
        state[f"{name}.lora_A"] = torch.randn(2, wide, generator=generator)
        state[f"{name}.lora_B"] = torch.randn(out, 2, generator=generator)
    file = tmp_path / "state.safetensors"
    save_file(state, file)
    words = ["adapter", "convert", str(file), "-o", str(tmp_path / "out"), "--base", str(tiny_base), "--alpha", "6"]
    assert main([*words, "--json"]) == 0
    found = read_low_rank(tmp_path / "out")
    assert {name for name, layout in found.layouts.items() if layout.names == EMBEDDING} == {"model.embed_tokens"}
    for name, pair in found.pairs.items():
        wanted = 3.0 * state[f"{name}.lora_B"] @ state[f"{name}.lora_A"]
        torch.testing.assert_close(delta(pair).float(), wanted, rtol=0, atol=1e-4)
    assert verify(tmp_path / "out").num_tensors == 4
    with pytest.raises(ConfigError, match="give --base and --alpha"):
        convert(file, tmp_path / "other")
    save_file({"nowhere.lora_A": torch.ones(1, 2), "nowhere.lora_B": torch.ones(2, 1)}, file)
    with pytest.raises(AdapterError, match="has no layer at nowhere"):
        convert(file, tmp_path / "other", base=str(tiny_base), alpha=6)


def test_loralib_and_the_converted_folder_agree_on_gpt2(save_base: Callable[[Any], Path], tmp_path: Path) -> None:
    """As loralib was made for: q and v of a fused, transposed projection."""
    loralib = pytest.importorskip("loralib", reason="needs loralib, the oracle")
    from transformers import AutoModelForCausalLM, GPT2Config

    base = save_base(GPT2Config(n_embd=32, n_layer=2, n_head=4, vocab_size=8192, n_positions=256))
    model = AutoModelForCausalLM.from_pretrained(base)
    generator = torch.Generator().manual_seed(0)
    for block in model.transformer.h:
        plain = block.attn.c_attn
        merged = loralib.MergedLinear(32, 96, r=2, lora_alpha=6, enable_lora=[True, False, True], fan_in_fan_out=True)
        with torch.no_grad():
            merged.weight.copy_(plain.weight)
            merged.bias.copy_(plain.bias)
            merged.lora_A.copy_(torch.randn(merged.lora_A.shape, generator=generator))
            merged.lora_B.copy_(torch.randn(merged.lora_B.shape, generator=generator))
        block.attn.c_attn = merged
    theirs = logits(model)
    save_file(loralib.lora_state_dict(model), tmp_path / "state.safetensors")
    words = ["adapter", "convert", str(tmp_path / "state.safetensors"), "--base", str(base), "--alpha", "6"]
    assert main([*words, "--enabled", "c_attn=1,0,1", "-o", str(tmp_path / "out")]) == 0
    ours, _, _ = open_model(tmp_path / "out")
    assert float((logits(ours) - logits(open_model(base)[0])).abs().max()) > 0.1
    torch.testing.assert_close(logits(ours), theirs, rtol=0, atol=1e-4)


def test_copies_of_the_base_are_kept(tiny_base: Path, tmp_path: Path) -> None:
    """PEFT saves the embedding beside an adapter on it; it may be a trained one, so it must not get lost."""
    peft = pytest.importorskip("peft", reason="needs peft, which writes the folder")
    config = peft.LoraConfig(r=2, target_modules=["embed_tokens"], init_lora_weights=False, task_type="CAUSAL_LM")
    peft.get_peft_model(lorica.load_model(tiny_base), config).save_pretrained(
        tmp_path / "peft", save_embedding_layers=True
    )
    convert(tmp_path / "peft", tmp_path / "plain")
    scale(tmp_path / "peft", 0.5, tmp_path / "half")
    combine_adapters([str(tmp_path / "peft"), f"{tmp_path / 'half'}=-1"], tmp_path / "both", "svd")
    before = load_file(tmp_path / "peft" / "adapter_model.safetensors")
    for name in ("plain", "half", "both"):
        after = load_file(tmp_path / name / "adapter_model.safetensors")
        copies = [key for key in before if "lora_" not in key]
        assert copies and before.keys() == after.keys()
        assert all(torch.equal(before[key], after[key]) for key in copies)
        assert verify(tmp_path / name, base=str(tiny_base)).num_tensors == len(before)


def test_a_pickle_is_not_read(tmp_path: Path) -> None:
    file = tmp_path / "lora.pt"
    torch.save({"x.lora_A": torch.ones(1)}, file)
    with pytest.raises(AdapterError, match="loading a pickle can run code"):
        convert(file, tmp_path / "out", base="embedded", alpha=1)


def test_the_command_line(finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["adapter", "inspect", str(finished), "--json"]) == 0
    assert len(json.loads(capsys.readouterr().out)["parts"]) == 5
    assert main(["adapter", "scale", str(finished), "0.5", "-o", str(tmp_path / "half"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["error"] == 0
    assert main(["adapter", "scale", str(finished), "-1e-1", "-o", str(tmp_path / "minus"), "--json"]) == 0
    assert float((updates(tmp_path / "minus")[NAME] + 0.1 * updates(finished / "adapter")[NAME]).abs().max()) < 1e-6
    assert main(["adapter", "scale", str(finished), "nan", "-o", str(tmp_path / "nan")]) == 2
    assert main(["adapter", "scale", str(finished), "1", "--ouput", str(tmp_path / "x")]) == 2
    capsys.readouterr()
    words = ["adapter", "combine", str(finished), f"{tmp_path / 'half'}=-2", "--how", "svd", "-o", str(tmp_path / "no")]
    assert main([*words, "--json"]) == 0
    capsys.readouterr()
    # x - 2 (x / 2) = 0
    assert main(["adapter", "verify", str(tmp_path / "no"), "--json"]) == 1
    assert "changes no logit" in json.loads(capsys.readouterr().out)["error"]["message"]
    assert main(["adapter", "convert", "x", "-o", "y", "--enabled", "c_attn=yes"]) == 2
