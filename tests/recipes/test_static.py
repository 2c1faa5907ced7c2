"""`lorica adapter static`: a HydraLoRA run as plain LoRA, and what is said of the difference."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import lorica
from lorica.cli import main
from lorica.config import RunConfig
from lorica.errors import AdapterError, ConfigError
from lorica.methods.hydra import HydraLoRA
from lorica.methods.hydra_static import to_lora
from lorica.models.load import load_model
from lorica.recipes.opening import open_model
from lorica.recipes.static import static_merge


@pytest.fixture(scope="module")
def run(make_config: Callable[..., RunConfig], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A short run whose adapter is then made large enough to be seen."""
    folder = tmp_path_factory.mktemp("runs") / "hydra"
    options = HydraLoRA(rank=4, num_heads=3, targets=("q_proj", "down_proj"), modules_to_save=("norm",))
    lorica.train(make_config(folder, max_steps=2, data={"eval": None}).model_copy(update={"method": options}))
    model, _, _ = open_model(folder)
    torch.manual_seed(0)
    for name, parameter in lorica.trainable_parameters(model).items():
        if "norm" not in name:
            nn.init.normal_(parameter, std=0.2)
    lorica.save_adapter(model, folder / "adapter")
    return folder


@pytest.mark.parametrize("stacked", [False, True])
def test_the_command_writes_lora_and_measures_it(
    run: Path, rows: Path, tiny_base: Path, tmp_path: Path, stacked: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    output, few = tmp_path / "lora", tmp_path / "few.jsonl"
    lines = rows.read_text().splitlines(keepends=True)[:9]
    few.write_text("".join(lines))
    words = ["adapter", "static", str(run), "--rows", str(few), "--output", str(output), "--json"]
    assert main([*words, *(["--stacked"] if stacked else [])]) == 0
    result = json.loads(capsys.readouterr().out)
    assert (result["num_calibration_rows"], result["num_held_out_rows"]) == (5, 4)
    config = json.loads((output / "adapter_config.json").read_text())
    assert (config["peft_type"], config["r"], config["lora_alpha"]) == ("LORA", *([12, 12] if stacked else [4, 4]))
    assert all(sum(gates) == pytest.approx(1, abs=1e-5) and len(gates) == 3 for gates in result["gates"].values())

    routed, tokenizer, _ = open_model(run)
    static = lorica.load_adapter(load_model(tiny_base, dtype="float32", device="cpu"), output).eval()
    base = load_model(tiny_base, dtype="float32", device="cpu").eval()
    total, of_means, of_base, same, count = 0.0, 0.0, 0.0, 0, 0
    texts = [json.loads(line) for line in lines]
    turns = [(("user", row["prompt"]), ("assistant", row["response"])) for row in texts]
    messages = [[{"role": role, "content": content} for role, content in row] for row in turns]
    tokens = [torch.tensor([tokenizer.apply_chat_template(row, return_dict=False)]) for row in messages]
    means = to_lora(routed, {name: torch.tensor(gates) for name, gates in result["gates"].items()})
    for ids in tokens[1::2]:
        with torch.no_grad():
            p, q, m, b = (F.log_softmax(model(ids).logits[0].double(), -1) for model in (routed, static, means, base))
        total += float(F.kl_div(q, p, log_target=True, reduction="sum"))
        of_means += float(F.kl_div(m, p, log_target=True, reduction="sum"))
        of_base += float(F.kl_div(b, p, log_target=True, reduction="sum"))
        same += int((p.argmax(-1) == q.argmax(-1)).sum())
        count += ids.shape[1]
    assert result["num_tokens"] == count and math.isclose(result["top1"], same / count, abs_tol=1e-6)
    assert result["kl"] == pytest.approx(total / count, rel=0.03) and total > 0
    assert result["kl_of_means"] == pytest.approx(of_means / count, rel=0.03) and of_means != total
    # The norm that was trained stays in both, so the base is further away than it alone tells.
    assert result["kl_of_base"] == pytest.approx(of_base / count, rel=0.05)


def test_bad_input_leaves_nothing(run: Path, rows: Path, finished: Path, tmp_path: Path) -> None:
    one = tmp_path / "one.jsonl"
    one.write_text(rows.read_text().splitlines()[0] + "\n")
    with pytest.raises(ConfigError, match="two"):
        static_merge(run, tmp_path / "out", str(one))
    with pytest.raises(AdapterError, match="no HydraLoRA"):
        static_merge(finished, tmp_path / "out", str(rows))
    assert not (tmp_path / "out").exists()
    with pytest.raises(ConfigError, match="not empty"):
        static_merge(run, tmp_path, str(rows))
