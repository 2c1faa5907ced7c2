"""HydraLoRA's heads by the components of the rows, through the recipes: counted, kept, resumed, planned, refused."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from planted import mixture

import lorica
from lorica.config import RunConfig, dump_yaml
from lorica.data.components import Components, find_components
from lorica.data.sampler import Order
from lorica.errors import CheckpointError, ConfigError, DataError
from lorica.methods import hydra
from lorica.methods.hydra import HydraLoRA
from lorica.methods.hydra_linear import HydraLinear
from lorica.methods.lora import LoRA
from lorica.recipes import intrinsic
from lorica.recipes.components import hidden_states, text_of
from lorica.recipes.intrinsic import Intrinsic, find_intrinsic, first_rows
from lorica.recipes.opening import open_model
from lorica.recipes.preparing import prepare
from lorica.recipes.rehearsing import look_around, rehearse_run
from lorica.recipes.sweep import sweep
from lorica.training.checkpoint import find_checkpoints, read_checkpoint
from lorica.training.metrics import read_metrics

Config = Callable[..., RunConfig]
WEIGHTS = "adapter/adapter_model.safetensors"


@pytest.fixture(scope="module")
def planted() -> tuple[list[str], list[int]]:
    return mixture({"baking": 48, "birds": 72}, 0)


@pytest.fixture(scope="module")
def mixed(planted: tuple[list[str], list[int]], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Rows of two kinds, the larger one being component 0."""
    file = tmp_path_factory.mktemp("mixed") / "rows.jsonl"
    lines = [{"prompt": text, "response": text.split()[-1]} for text in planted[0]]
    file.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return file


@pytest.fixture(scope="module")
def configure(make_config: Config, mixed: Path) -> Config:
    def make(folder: Path, *, data: dict[str, Any] | None = None, **fields: Any) -> RunConfig:
        train = {key: fields.pop(key) for key in ("max_steps", "activation_checkpointing", "lr") if key in fields}
        method = {"rank": 4, "num_heads": "auto", "targets": ("q_proj", "down_proj"), **fields}
        rows = {"train": str(mixed), "eval": 0.2, "max_length": 256, **(data or {})}
        config = make_config(folder, data=rows, batch_tokens=256, **{"max_steps": 6, "save_every": 3, **train})
        return config.model_copy(update={"method": HydraLoRA(**method)})

    return make


@pytest.fixture(scope="module")
def straight(configure: Config, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of `num_heads: auto`, `init: components`; for reading only."""
    folder = tmp_path_factory.mktemp("runs") / "straight"
    result = lorica.train(configure(folder, init="components", init_batches=2))
    assert (result.status, result.read_back_difference) == ("finished", 0.0)
    return folder


@pytest.fixture(scope="module")
def found(straight: Path) -> str:
    return str(straight / "components.json")


def losses(folder: Path) -> list[float]:
    return [row["loss"] for row in read_metrics(folder / "metrics.jsonl") if "loss" in row]


def test_auto_takes_a_head_for_each_component_of_the_training_rows(
    straight: Path, configure: Config, planted: tuple[list[str], list[int]], tmp_path: Path
) -> None:
    components = Components.from_json((straight / "components.json").read_text(encoding="utf-8"))
    data = prepare(configure(tmp_path))
    truth = dict(zip(*planted, strict=True))
    # The larger topic is number 1 of the planted ones, and the first component.
    wanted = [1 - truth[row.messages[0].content] for row in data.train_examples]
    assert components.num == 2 and components.labels.tolist() == wanted
    layers = [a for a in lorica.adapters(open_model(straight)[0]).values() if isinstance(a, HydraLinear)]
    assert len(layers) == 4 and {layer.num_heads for layer in layers} == {2}
    saved = json.loads((straight / "adapter/adapter_config.json").read_text(encoding="utf-8"))
    assert "auto" not in json.dumps(saved) and "num_heads: auto" in (straight / "config.yaml").read_text()
    assert losses(straight)[-1] < losses(straight)[0]


def test_it_begins_at_the_base(straight: Path, make_config: Config, mixed: Path, tmp_path: Path) -> None:
    data = {"train": str(mixed), "eval": 0.2, "max_length": 256}
    lorica.train(make_config(tmp_path / "run", data=data, batch_tokens=256, max_steps=1))
    assert losses(straight)[0] == pytest.approx(losses(tmp_path / "run")[0], rel=1e-6)


def test_resumed_is_the_same_run_and_neither_looks_nor_starts_again(
    straight: Path, configure: Config, found: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nor does it need the file that its components were read from."""
    shutil.copy(found, tmp_path / "mine.json")
    config = configure(tmp_path / "run", init="components", init_batches=2, components=str(tmp_path / "mine.json"))
    assert lorica.train(config, stop_at=3).status == "paused"
    (tmp_path / "mine.json").unlink()
    for module, name in ((intrinsic, "find_components"), (hydra, "start_from_components")):
        monkeypatch.setattr(module, name, None)
    assert lorica.train(config, resume="auto").status == "finished"
    assert losses(tmp_path / "run") == losses(straight)
    ours, theirs = (read_checkpoint(find_checkpoints(f / "checkpoints")[-1]) for f in (tmp_path / "run", straight))
    for stem in ("trainable", "optimizer"):
        assert all(torch.equal(tensor, theirs.tensors[stem][key]) for key, tensor in ours.tensors[stem].items())
    assert (tmp_path / "run" / WEIGHTS).read_bytes() == (straight / WEIGHTS).read_bytes()
    assert (tmp_path / "run/components.json").read_bytes() == Path(found).read_bytes()
    assert lorica.train(config, resume="auto").status == "nothing to do"


def test_other_components_or_rows_are_another_run(
    straight: Path, configure: Config, mixed: Path, tmp_path: Path
) -> None:
    shutil.copytree(straight, tmp_path / "run")
    config = configure(tmp_path / "run", init="components", init_batches=2)
    fewer = tmp_path / "rows.jsonl"
    fewer.write_text("".join(mixed.read_text(encoding="utf-8").splitlines(keepends=True)[:-1]), encoding="utf-8")
    other = configure(tmp_path / "run", init="components", init_batches=2, data={"train": str(fewer)})
    with pytest.raises(CheckpointError, match=r"data\.train"):
        lorica.train(other, resume="auto")
    saved = tmp_path / "run/components.json"
    content = json.loads(saved.read_text(encoding="utf-8"))
    saved.write_text(json.dumps({**content, "settings": {**content["settings"], "seed": 5}}), encoding="utf-8")
    with pytest.raises(CheckpointError, match=r"components\.sha256"):
        lorica.train(config, resume="auto")


def test_it_is_said_aloud_and_one_component_is_plain_lora(
    configure: Config, found: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = configure(tmp_path / "two", components=found)
    have = find_intrinsic(config, prepare(config))
    assert have is not None and have.eval is not None and (len(have.train), len(have.eval)) == (96, 24)
    said = capsys.readouterr().err
    assert "2 components in 96 rows: 2 heads" in said
    sizes = np.bincount(have.train)
    for component, terms in enumerate(have.components.terms):
        assert f"{component}: {sizes[component]} rows: {', '.join(terms[:6])}" in said

    texts = [text_of(row) for row in prepare(config).train_examples]
    (tmp_path / "one.json").write_text(find_components(texts[:20], num=1, max_components=1).to_json())
    one = configure(tmp_path / "one", components=str(tmp_path / "one.json"), init="components", max_steps=1)
    lorica.train(one)
    assert "1 component in 96 rows: 1 head is plain LoRA" in capsys.readouterr().err
    layers = lorica.adapters(open_model(tmp_path / "one")[0]).values()
    assert {(layer.num_heads, layer.router) for layer in layers} == {(1, None)}


def test_a_start_reads_rows_of_one_component_each_in_the_runs_order(
    configure: Config, found: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = configure(tmp_path / "run", init="components", init_batches=1, components=found)
    seen: list[Any] = []
    start = hydra.start_from_components
    monkeypatch.setattr(hydra, "start_from_components", lambda *args: (seen.extend(args[3]), start(*args)))
    lorica.train(config, stop_at=1)
    have = find_intrinsic(config, data := prepare(config))
    assert have is not None and len(seen) > 2
    order = np.random.default_rng([0, 0]).permutation(len(data.train))
    for component in range(2):
        rows = order[have.train[order] == component]
        ids = np.concatenate([data.train[int(row)][0] for row in rows])
        read = np.concatenate([b[0]["input_ids"].flatten().numpy() for b in seen if b[2] == component])
        assert 256 <= len(read) < 256 + 64 and (read == ids[: len(read)]).all()


def test_rows_that_a_short_run_never_sees_come_behind() -> None:
    labels = np.array([0, 1, 0, 1, 1, 0, -1])
    nothing = np.empty(0)
    two = Components(labels, (3, 3), (), {}, (), (), {}, np.empty((2, 4)), nothing, nothing, nothing, labels)
    have, lengths = Intrinsic(two, labels, None), np.full(7, 10)
    order = Order(lengths, seed=1, batch_tokens=10, epochs=3.0, max_steps=9)
    seen = [int(order.batch(step)[0]) for step in range(7)]
    parts = first_rows(have, order, lengths, 15)
    assert [(rows.tolist(), c) for rows, c in parts] == [([i for i in seen if labels[i] == c][:2], c) for c in (0, 1)]
    short = Order(lengths, seed=1, batch_tokens=10, epochs=1.0, max_steps=1)
    for rows, component in first_rows(have, short, lengths, 1000):
        own = [i for i in range(7) if labels[i] == component]
        assert rows.tolist() == [i for i in seen[:1] if i in own] + [i for i in own if i != seen[0]]
    with pytest.raises(DataError, match="no training row is of component 1 of 2"):
        first_rows(Intrinsic(two, np.zeros(7, np.int64), None), order, lengths, 15)


@pytest.mark.parametrize("data", [{}, {"packing": False}])
def test_it_trains_over_nf4_with_checkpointing_packed_and_padded(
    configure: Config, found: str, tmp_path: Path, data: dict[str, Any]
) -> None:
    config = configure(
        tmp_path / "run", data=data, init="components", components=found, activation_checkpointing=True, max_steps=2
    )
    config = config.model_copy(update={"model": config.model.model_copy(update={"quant": "nf4"})})
    result = lorica.train(config)
    assert (result.status, result.read_back_difference) == ("finished", 0.0)


def test_a_plan_counts_the_components_or_says_what_it_assumes(
    configure: Config, found: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def trained(num: int) -> int:
        """A [4, in], heads [out, 4 num] and router [num, in] of both layers' q_proj and down_proj."""
        return 2 * sum(4 * size + 32 * 4 * num + num * size for size in (32, 48))

    planned = lorica.train(configure(tmp_path / "run", components=found), dry_run=True)
    assert planned.trainable_parameters == trained(2) and not (tmp_path / "run").exists()
    assert "2 components in 96 rows: 2 heads" in capsys.readouterr().err
    missing = {"train": str(tmp_path / "nowhere.jsonl")}
    auto, three = configure(tmp_path / "run", data=missing), configure(tmp_path / "run", num_heads=3, data=missing)
    setting, assumptions = look_around(auto, require_data=False)
    assert rehearse_run(auto, setting).num_trainable == trained(4) and "4 are assumed" in assumptions[-1]
    assert not any("num_heads" in line for line in look_around(three, require_data=False)[1])


def test_a_sweep_of_an_auto_run_finds_its_targets(configure: Config, found: str, tmp_path: Path) -> None:
    config = configure(tmp_path / "run", components=found, max_steps=1)
    (tmp_path / "run.yaml").write_text(dump_yaml(config), encoding="utf-8")
    result = sweep(tmp_path / "run.yaml", ["train.lr=1e-3,1e-2", "train.eval_every=1"], halving=False)
    assert [arm.status for arm in result.arms] == ["finished"] * 2
    assert all((Path(arm.folder) / "components.json").is_file() for arm in result.arms)


def test_methods_that_do_not_ask_get_none(configure: Config, make_config: Config, tmp_path: Path) -> None:
    for method in (LoRA(), HydraLoRA(num_heads=3), HydraLoRA(num_heads=1, init="components")):
        config = make_config(tmp_path).model_copy(update={"method": method})
        assert find_intrinsic(config, None) is None  # type: ignore[arg-type]


def test_a_given_number_of_heads_starts_from_as_many_groups(
    configure: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[int | None] = []
    monkeypatch.setattr(
        intrinsic, "find_components", lambda texts, num: asked.append(num) or find_components(texts[:30], num=1)
    )
    config = configure(tmp_path, num_heads=3, init="components")
    with pytest.raises(ConfigError):
        find_intrinsic(config, prepare(config))
    assert asked == [3]


def test_hidden_features_are_those_of_the_base(configure: Config, tmp_path: Path) -> None:
    config = configure(tmp_path / "run", components=str(tmp_path / "found.json"))
    data = prepare(config)
    texts = [text_of(row) for row in data.train_examples]
    theirs = find_components(texts, features=hidden_states(config), num=2, max_components=2)
    (tmp_path / "found.json").write_text(theirs.to_json(), encoding="utf-8")
    have = find_intrinsic(config, data)
    assert have is not None and have.train.tolist() == theirs.labels.tolist()
    wide = config.model_copy(update={"model": config.model.model_copy(update={"base": "embedded"})})
    with pytest.raises(ConfigError, match="32 features of another base"):
        find_intrinsic(wide, data)


def test_what_cannot_be_is_refused(configure: Config, found: str, tmp_path: Path) -> None:
    data = prepare(configure(tmp_path))
    with pytest.raises(ConfigError, match=r"num_heads is 3, and .*components.json has 2 components.*num_heads=auto"):
        find_intrinsic(configure(tmp_path, num_heads=3, init="components", components=found), data)
    assert find_intrinsic(configure(tmp_path, num_heads=3, components=found), data) is not None
    (tmp_path / "broken.json").write_text("{}", encoding="utf-8")
    for path, match in ((tmp_path / "nothing.json", "No such file"), (tmp_path / "broken.json", "not components")):
        with pytest.raises(DataError, match=match) as error:
            find_intrinsic(configure(tmp_path, components=str(path)), data)
        assert str(path) in str(error.value) and "lorica components" in str(error.value)
