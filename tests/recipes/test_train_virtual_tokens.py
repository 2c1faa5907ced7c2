"""Prompts and prefixes through the recipes: trained, measured, asked and counted as any other method."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import lorica
from lorica.config import RunConfig
from lorica.data.layouts import PACKED, padded
from lorica.errors import ConfigError, DataError
from lorica.evaluate.generation import generate, stream, unanswerable
from lorica.evaluate.likelihood import likelihood
from lorica.methods.attach import in_front
from lorica.methods.method import MethodOptions
from lorica.methods.prefix import PrefixTuning
from lorica.methods.prompt import PromptTuning
from lorica.methods.ptuning import PTuning
from lorica.methods.ptuning_v2 import PTuningV2
from lorica.models.load import load_model
from lorica.models.loss import make_loss
from lorica.recipes.adapter import verify
from lorica.recipes.evaluate import evaluate
from lorica.recipes.opening import open_model
from lorica.recipes.preparing import prepare
from lorica.recipes.rehearsing import batch_lengths, look_around
from lorica.training.metrics import read_metrics

Config = Callable[..., RunConfig]
N = 8
METHODS: dict[str, MethodOptions] = {
    "prefix": PrefixTuning(num_virtual_tokens=N),
    "prompt": PromptTuning(num_virtual_tokens=N),
    "ptuning": PTuning(num_virtual_tokens=N),
    "ptuning_v2": PTuningV2(num_virtual_tokens=N),
}


@pytest.fixture(scope="module", params=METHODS)
def name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def config(make_config: Config, name: str, tmp_path_factory: pytest.TempPathFactory) -> RunConfig:
    folder = tmp_path_factory.mktemp("runs") / name
    made = make_config(folder, max_steps=6, lr=3e-2, save_every=6, eval_every=6)
    return made.model_copy(update={"method": METHODS[name]})


@pytest.fixture(scope="module")
def run(config: RunConfig) -> Path:
    result = lorica.train(config)
    assert (result.status, result.read_back_difference) == ("finished", 0.0)
    return Path(config.train.output)


@pytest.fixture(scope="module")
def opened(run: Path) -> tuple[Any, Any, Any]:
    return open_model(run)


def rows_of(config: RunConfig) -> Any:
    dataset = prepare(config).eval
    assert dataset is not None
    return dataset


def test_it_learns_from_virtual_tokens_that_no_one_is_asked_to_predict(run: Path, config: RunConfig) -> None:
    steps = [row for row in read_metrics(run / "metrics.jsonl") if "loss" in row]
    assert steps[-1]["loss"] < steps[0]["loss"] - 0.02
    prepared = prepare(config)
    assert (
        prepared.train.num_trained_tokens == prepared.for_method(config.method, _base(config)).train.num_trained_tokens
    )


def _base(config: RunConfig) -> Any:
    return load_model(config.model.base, dtype="float32", device="cpu").config


def test_packed_rows_are_as_probable_as_padded_ones(opened: Any, config: RunConfig) -> None:
    model, tokenizer, _ = opened
    dataset, loss_fn = rows_of(config).behind(*in_front(model)), make_loss(load_model(config.model.base, device="cpu"))
    scores = [
        likelihood(model, loss_fn, layout.batches(dataset, np.arange(len(dataset)), 100))
        for layout in (PACKED, padded(tokenizer.pad_token_id))
    ]
    assert scores[0].loss == pytest.approx(scores[1].loss, rel=1e-6) and scores[0].num_tokens == scores[1].num_tokens


def by_hand(model: Any, prompt: list[int], count: int) -> list[int]:
    """The most probable answer, token by token, without a cache."""
    virtual, offset = in_front(model)
    ids = [*virtual, *prompt]
    for _ in range(count):
        positions = torch.arange(len(ids))[None] + offset
        with torch.no_grad():
            ids.append(int(model(torch.tensor([ids]), position_ids=positions, use_cache=False).logits[0, -1].argmax()))
    return ids[len(virtual) + len(prompt) :]


def test_answers_in_batches_equal_those_one_by_one_and_without_a_cache(opened: Any) -> None:
    model, tokenizer, _ = opened
    prompts = [[70, 71, 72, 73, 74, 75], [80, 81], [90, 91, 92]]
    greedy: dict[str, Any] = {"max_new_tokens": 5, "stop_ids": ()}
    batched = generate(model, tokenizer, prompts, batch_size=3, **greedy)
    assert batched == [generate(model, tokenizer, [prompt], batch_size=1, **greedy)[0] for prompt in prompts]
    assert batched == [by_hand(model, prompt, 5) for prompt in prompts]
    assert "".join(stream(model, tokenizer, prompts[0], **greedy)) == tokenizer.decode(batched[0])
    drawn = {"temperature": 1.0, "top_p": 0.9, "seed": 3}
    once, again = (generate(model, tokenizer, prompts, batch_size=3, **greedy, **drawn) for _ in range(2))
    assert once == again != batched


def test_eval_measures_the_base_without_them_and_the_adapter_with_them(
    run: Path, config: RunConfig, opened: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    report = evaluate(run, max_samples=2)
    base = load_model(config.model.base, dtype="float32", device="cpu")
    loss_fn, dataset = make_loss(base), rows_of(config)
    order = np.arange(len(dataset))
    plain = likelihood(base, loss_fn, PACKED.batches(dataset, order, 128)).loss
    behind = dataset.behind(*in_front(opened[0]))
    adapted = likelihood(opened[0], loss_fn, PACKED.batches(behind, order, 128)).loss
    assert report.all.base is not None and report.all.base.loss == pytest.approx(plain, rel=1e-6)
    assert report.all.adapter.loss == pytest.approx(adapted, rel=1e-6) and adapted < plain - 0.02
    assert report.all.num_tokens == dataset.num_trained_tokens and report.all.num_generated == 2


def test_the_folder_is_verified(run: Path) -> None:
    found = verify(run / "adapter")
    assert found.num_tensors == 1


def test_they_take_their_share_of_the_context(config: RunConfig, opened: Any, tmp_path: Path, rows: Path) -> None:
    model, _, _ = opened
    assert unanswerable(model, [[5] * (512 - N - 3)], 3) == [] and unanswerable(model, [[5] * (512 - N - 2)], 3) == [0]
    long = tmp_path / "rows.jsonl"
    long.write_text(rows.read_text() + '{"prompt": "%s", "response": "yes"}\n' % ("a b c d " * 60))
    data = config.data.model_copy(update={"train": str(long), "eval": None, "max_length": 510})
    train = config.train.model_copy(update={"output": str(tmp_path / "run")})
    options = type(config.method)(num_virtual_tokens=300)
    with pytest.raises(DataError, match="takes 212 beside 300 virtual ones"):
        lorica.train(config.model_copy(update={"data": data, "train": train, "method": options}))


def test_a_plan_counts_them(config: RunConfig) -> None:
    count = config.method.num_virtual_ids
    setting, _ = look_around(config, require_data=True)
    assert setting.lengths is not None
    assert setting.lengths.tolist() == [length + count for length in prepare(config).train.lengths]
    longest = max(batch_lengths(config, setting))
    assert longest == setting.lengths.max()
    assumed = replace(setting, lengths=None, first_batches=None)
    assert batch_lengths(config, assumed)[0] == config.data.max_length + count


def test_more_of_them_than_the_context_holds_are_refused_by_their_number(config: RunConfig, tmp_path: Path) -> None:
    changed = {"method": replace(config.method, num_virtual_tokens=600)}
    with pytest.raises(ConfigError, match=r"num_virtual_tokens is 600, .* no room"):
        lorica.train(
            config.model_copy(update={**changed, "train": config.train.model_copy(update={"output": str(tmp_path)})})
        )
