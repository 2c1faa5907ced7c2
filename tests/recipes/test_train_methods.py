"""The methods beside LoRA through the recipes: train, resume, checkpointed activations, plan, merge."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import lorica
from lorica.config import RunConfig, load_config
from lorica.errors import NotMergeableError
from lorica.methods.adalora import AdaLoRA
from lorica.methods.attach import in_front
from lorica.methods.bottleneck import Bottleneck
from lorica.methods.full import FullFineTuning
from lorica.methods.hydra import HydraLoRA
from lorica.methods.method import MethodOptions
from lorica.methods.prefix import PrefixTuning
from lorica.methods.ptuning import PTuning
from lorica.models.load import load_model
from lorica.recipes.merge import merge
from lorica.recipes.opening import open_model
from lorica.recipes.plan import plan
from lorica.training.checkpoint import find_checkpoints, read_checkpoint
from lorica.training.metrics import read_metrics
from lorica.training.rehearsal import rehearse

Config = Callable[..., RunConfig]
METHODS: dict[str, MethodOptions] = {
    "bottleneck": Bottleneck(size=8),
    "full": FullFineTuning(),
    "hydra": HydraLoRA(rank=4, num_heads=3, routing="sequence", balance_loss=0.01, dropout=0.1),
    "prefix": PrefixTuning(num_virtual_tokens=8),
    "ptuning": PTuning(num_virtual_tokens=8, encoder="lstm"),
}
NOT_MERGEABLE = {
    "bottleneck": "not linear",
    "hydra": "depend on the input",
    "prefix": "keys and values",
    "ptuning": "in front of the text",
}


@pytest.fixture(scope="module", params=METHODS)
def name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def configure(make_config: Config, name: str) -> Config:
    def configure(folder: Path, **train: Any) -> RunConfig:
        return make_config(folder, **{"max_steps": 8, "lr": 2e-2, **train}).model_copy(update={"method": METHODS[name]})

    return configure


@pytest.fixture(scope="module")
def straight(configure: Config, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "straight"
    result = lorica.train(configure(folder))
    assert (result.status, result.read_back_difference) == ("finished", 0.0)
    return folder


def losses(folder: Path) -> list[float]:
    return [row["loss"] for row in read_metrics(folder / "metrics.jsonl") if "loss" in row]


def test_it_learns_and_leaves_the_base_alone(straight: Path, tiny_base: Path) -> None:
    assert losses(straight)[-1] < losses(straight)[0] - 0.05
    model, _, _ = open_model(straight)
    base = load_model(tiny_base, dtype="float32", device="cpu")
    ids, virtual = torch.arange(40, 60)[None], torch.tensor(in_front(model)[0], dtype=torch.int64)
    adapted = model(torch.cat([virtual[None], ids], 1)).logits[:, len(virtual) :]
    assert not torch.allclose(adapted, base(ids).logits, atol=1e-2)
    assert torch.equal(lorica.detach(model)(ids).logits, base(ids).logits)


def test_paused_and_resumed_is_the_same_run(configure: Config, straight: Path, tmp_path: Path) -> None:
    config = configure(tmp_path / "run")
    assert lorica.train(config, stop_at=4).status == "paused"
    assert lorica.train(config, resume="auto").status == "finished"
    assert losses(tmp_path / "run") == losses(straight)
    ours, theirs = (read_checkpoint(find_checkpoints(f / "checkpoints")[-1]) for f in (tmp_path / "run", straight))
    for stem in ("trainable", "optimizer"):
        assert ours.tensors[stem].keys() == theirs.tensors[stem].keys()
        assert all(torch.equal(tensor, theirs.tensors[stem][key]) for key, tensor in ours.tensors[stem].items())
    weights = "adapter/adapter_model.safetensors"
    assert (tmp_path / "run" / weights).read_bytes() == (straight / weights).read_bytes()


def test_checkpointed_activations_change_nothing(configure: Config, straight: Path, tmp_path: Path) -> None:
    lorica.train(configure(tmp_path / "run", activation_checkpointing=True))
    assert losses(tmp_path / "run") == pytest.approx(losses(straight), rel=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_rehearsal_counts_what_there_is(name: str, tiny_llama: Callable[..., Any], dtype: torch.dtype) -> None:
    model = tiny_llama(tie_word_embeddings=True)
    base_bytes = sum(p.numel() for p in model.parameters()) * dtype.itemsize
    buffer_bytes = sum(b.numel() * b.element_size() for b in model.buffers())
    for checkpointing in (False, True):
        found = rehearse(
            model.config,
            METHODS[name],
            dtype=dtype,
            lengths=[16, 16, 7],
            num_micro_batches=2,
            activation_checkpointing=checkpointing,
        )
        trained = lorica.trainable_parameters(lorica.adapt(tiny_llama(tie_word_embeddings=True), METHODS[name]))
        num_trained = sum(p.numel() for p in trained.values())
        assert found.num_trainable == num_trained and found.parts.weights == base_bytes + buffer_bytes
        assert found.parts.adapter == found.parts.gradients == 4 * num_trained
        assert found.parts.optimizer == 8 * num_trained + 4 * len(trained)


def test_it_is_planned_by_its_name(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    lines = ["model.base=embedded", "data.train=/nowhere", f"method.name={name}", "data.max_length=64"]
    report = plan(load_config(None, [*lines, "train.batch_tokens=128", "train.threads=1"]).config)
    model = lorica.adapt(lorica.load_model("embedded"), type(METHODS[name])())
    assert report.trainable_parameters == sum(p.numel() for p in lorica.trainable_parameters(model).values())
    assert "activations" in capsys.readouterr().out


def test_what_can_be_merged_is_a_plain_model(name: str, straight: Path, tmp_path: Path) -> None:
    if name in NOT_MERGEABLE:
        with pytest.raises(NotMergeableError, match=NOT_MERGEABLE[name]):
            merge(straight, tmp_path / "merged")
        return
    merge(straight, tmp_path / "merged")
    plain = load_model(tmp_path / "merged", dtype="float32", device="cpu")
    assert plain.lm_head.weight is plain.model.embed_tokens.weight
    model, _, _ = open_model(straight)
    ids = torch.arange(40, 60)[None]
    assert torch.equal(plain(ids).logits, model(ids).logits)


def test_a_method_with_a_memory_of_its_own_resumes_bit_for_bit(make_config: Config, tmp_path: Path) -> None:
    options = AdaLoRA(rank=4, target_rank=2, interval=2, final=0.4)

    def config(folder: str) -> RunConfig:
        return make_config(tmp_path / folder, max_steps=10).model_copy(update={"method": options})

    lorica.train(config("straight"))
    assert lorica.train(config("resumed"), stop_at=5).status == "paused"
    lorica.train(config("resumed"), resume="auto")
    adapters = [(tmp_path / folder / "adapter" / "adapter_model.safetensors") for folder in ("straight", "resumed")]
    assert adapters[0].read_bytes() == adapters[1].read_bytes()
    ranks = [int(t.count_nonzero()) for name, t in load_file(adapters[0]).items() if name.endswith("lora_E")]
    assert sum(ranks) == 2 * len(ranks), "the importance that was measured before the pause decided"
