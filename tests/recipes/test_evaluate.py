"""`lorica eval` on a run folder made by hand: its figures against transformers' logits and answers decoded by hand."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import lorica
from lorica.assets.handbook import write_handbook
from lorica.config import DataConfig, EvalConfig, ModelConfig, RunConfig, TrainConfig, dump_yaml
from lorica.errors import AdapterError, ConfigError, DataError
from lorica.evaluate import text_metrics
from lorica.recipes import evaluate as recipe
from lorica.recipes.evaluate import evaluate
from lorica.recipes.opening import find_source, open_model

# ChatML, which the embedded base's own template writes.
TURNS = "<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n"


def prompt_text(row: dict[str, Any]) -> str:
    return TURNS.format(row["prompt"])


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run whose adapter is random: enough to tell it from its base."""
    folder = tmp_path_factory.mktemp("runs") / "first"
    folder.mkdir()
    files = write_handbook(folder / "data")
    rows = [json.loads(line) for path in (files.facts_eval, files.records_eval) for line in path.open()]
    held_out = folder / "data" / "held_out.jsonl"
    held_out.write_text("".join(json.dumps(row) + "\n" for row in rows[:6] + rows[-6:]), encoding="utf-8")
    config = RunConfig(
        model=ModelConfig(base="embedded", dtype="float32", device="cpu"),
        data=DataConfig(train=str(files.sums_eval), eval=str(held_out)),
        train=TrainConfig(output=str(folder), batch_tokens=1024),
        eval=EvalConfig(max_new_tokens=6, batch_size=4),
    )
    (folder / "config.yaml").write_text(dump_yaml(config), encoding="utf-8")
    model = lorica.adapt(lorica.load_model("embedded", dtype="float32", device="cpu"), lorica.LoRA(rank=2))
    torch.manual_seed(0)
    for adapter in lorica.adapters(model).values():
        torch.nn.init.normal_(adapter.lora_b, std=0.02)  # type: ignore[arg-type]
    lorica.save_adapter(model, folder / "adapter")
    return folder


@pytest.fixture(scope="module")
def opened(run: Path) -> Iterator[tuple[Any, Any, list[dict[str, Any]]]]:
    """The adapted model, the tokenizer and the held-out rows."""
    model, tokenizer, _ = open_model(run)
    yield model, tokenizer, [json.loads(line) for line in (run / "data" / "held_out.jsonl").open()]


def summed_loss(model: Any, tokenizer: Any, row: dict[str, Any]) -> tuple[float, int]:
    """-ln p of the response and its end token, from the model's logits in one unpacked sample."""
    prompt = tokenizer(prompt_text(row)).input_ids
    answer = tokenizer(row["response"] + "<|im_end|>").input_ids
    with torch.no_grad():
        log_p = model(input_ids=torch.tensor([prompt + answer])).logits[0].double().log_softmax(-1)
    return -sum(float(log_p[len(prompt) + t - 1, token]) for t, token in enumerate(answer)), len(answer)


def greedy(model: Any, tokenizer: Any, row: dict[str, Any], num: int) -> str:
    ids = tokenizer(prompt_text(row)).input_ids
    new: list[int] = []
    for _ in range(num):
        with torch.no_grad():
            token = int(model(input_ids=torch.tensor([ids + new])).logits[0, -1].argmax())
        if token == tokenizer.eos_token_id:
            break
        new.append(token)
    return str(tokenizer.decode(new, skip_special_tokens=True))


def test_figures_equal_those_by_hand(
    run: Path, opened: tuple[Any, Any, list[dict[str, Any]]], capsys: pytest.CaptureFixture[str]
) -> None:
    model, tokenizer, rows = opened
    report = evaluate(run)
    assert (report.all.num_samples, report.all.num_generated) == (12, 12)
    assert set(report.tasks) == {"facts", "records"}

    adapted = [summed_loss(model, tokenizer, row) for row in rows]
    answers = [greedy(model, tokenizer, row, 6) for row in rows]
    plain = open_model(run, base_only=True)[0]
    based = [summed_loss(plain, tokenizer, row) for row in rows]
    for scores, losses in ((report.all.adapter, adapted), (report.all.base, based)):
        total, tokens = (sum(column) for column in zip(*losses, strict=True))
        assert scores is not None
        assert scores.loss == pytest.approx(total / tokens, rel=1e-5)
        assert report.all.num_tokens == tokens
    facts = report.tasks["facts"]
    assert facts.num_samples == 6
    total, tokens = (sum(column) for column in zip(*adapted[:6], strict=True))
    assert facts.adapter.loss == pytest.approx(total / tokens, rel=1e-5)

    assert [sample.adapter for sample in report.samples] == answers
    expected = text_metrics.score(answers, [row.get("references", [row["response"]]) for row in rows])
    assert {name: getattr(report.all.adapter, name) for name in expected} == pytest.approx(expected)

    written = json.loads((run / "evaluation.json").read_text(encoding="utf-8"))
    assert written["all"]["adapter"]["loss"] == report.all.adapter.loss
    assert [sample["adapter"] for sample in written["samples"]] == answers
    out = capsys.readouterr().out
    for word in ("facts", "records", "base", "adapter", "BLEU", f"{report.all.adapter.loss:.3f}"):
        assert word in out


def test_less_can_be_asked_for(run: Path) -> None:
    report = evaluate(run, base=False, generate=False)
    assert report.all.base is None and report.all.adapter.bleu is None and report.samples == []
    report = evaluate(run, ["eval.max_new_tokens=2"], max_samples=4, base=False)
    assert report.all.num_samples == 12 and report.all.num_generated == 4
    assert {sample.task for sample in report.samples} == {"facts", "records"}


def test_rows_without_room_for_an_answer_are_named_and_the_rest_is_scored(
    run: Path,
    opened: tuple[Any, Any, list[dict[str, Any]]],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """The context is 2048: after the longest prompts it has one token less than is asked for."""
    _, tokenizer, rows = opened
    lengths = [len(tokenizer(prompt_text(row)).input_ids) for row in rows]
    longest = max(lengths)
    left = {f"held_out.jsonl:{index + 1}": row["task"] for index, row in enumerate(rows) if lengths[index] == longest}
    # Nobody waits for two thousand tokens.
    monkeypatch.setattr(recipe, "generate_ids", lambda model, tokenizer, prompts, **_: prompts)
    report = evaluate(run, [f"eval.max_new_tokens={2048 - longest + 1}"])
    assert [(row.origin, row.num_prompt_tokens) for row in report.unanswered] == [(origin, longest) for origin in left]
    assert (report.all.num_samples, report.all.num_generated) == (12, 12 - len(left))
    assert {task: part.num_unanswered for task, part in report.tasks.items()} == {
        task: list(left.values()).count(task) for task in ("facts", "records")
    }
    assert {sample.origin for sample in report.samples} == {f"held_out.jsonl:{n}" for n in range(1, 13)} - left.keys()
    out = capsys.readouterr().out
    assert "unanswered" in out and f"{len(left)} of the rows, the longest prompt of {longest} tokens" in out
    assert all(f"{origin} ({longest} tokens)" in out for origin in left)
    written = json.loads((run / "evaluation.json").read_text(encoding="utf-8"))
    assert written["all"]["num_unanswered"] == len(left) == len(written["unanswered"])


def test_other_rows(run: Path) -> None:
    records = run / "data" / "records_eval.jsonl"
    report = evaluate(run, data=str(records), base=False, generate=False)
    assert (report.data, report.all.num_samples) == (str(records), 40)
    report = evaluate(run, split="train", base=False, generate=False)
    assert report.all.num_samples == 60 and set(report.tasks) == {"sums"}


def test_a_fraction_of_the_training_rows_is_the_evaluation_data(run: Path) -> None:
    report = evaluate(run, ["data.eval=0.1"], base=False, generate=False)
    assert report.all.num_samples == 6


def test_what_is_no_run_is_refused(run: Path, base: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no run folder"):
        evaluate(base)
    with pytest.raises(ConfigError, match="no evaluation data"):
        evaluate(run, ["data.eval=null"])
    with pytest.raises(ConfigError, match="expected eval or train"):
        evaluate(run, split="test")
    with pytest.raises(DataError, match=r"held_out.jsonl:\d+ has \d+ tokens.*lower max_new_tokens"):
        evaluate(run, ["eval.max_new_tokens=2040"])
    (tmp_path / "config.yaml").write_text((run / "config.yaml").read_text(encoding="utf-8"), encoding="utf-8")
    with pytest.raises(AdapterError, match="has not finished"):
        evaluate(tmp_path)


def test_a_run_yaml_stands_for_its_output_folder(run: Path, tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text((run / "config.yaml").read_text(encoding="utf-8"), encoding="utf-8")
    assert evaluate(file, base=False, generate=False).run == str(run)


def test_sources(run: Path, base: Path, tmp_path: Path) -> None:
    assert find_source(run).adapter == run / "adapter" == find_source(run / "adapter").adapter
    assert find_source(run / "adapter").config is not None
    assert find_source("embedded").adapter is None
    assert find_source(base).model.base == str(base)
    # Away from its run, an adapter folder knows its base by name alone.
    alone = tmp_path / "alone"
    alone.mkdir()
    for file in (run / "adapter").iterdir():
        (alone / file.name).write_bytes(file.read_bytes())
    source = find_source(alone)
    assert source.config is None and Path(source.model.base) == base.resolve()
    config = json.loads((alone / "adapter_config.json").read_text(encoding="utf-8"))
    config["base_model_name_or_path"] = None
    (alone / "adapter_config.json").write_text(json.dumps(config), encoding="utf-8")
    with pytest.raises(AdapterError, match="base_model_name_or_path is None"):
        find_source(alone)
    assert find_source(alone, [f"model.base={base}"]).model.base == str(base)


def test_an_opened_adapter_differs_from_its_base(run: Path, opened: tuple[Any, Any, list[dict[str, Any]]]) -> None:
    plain, tokenizer, _ = open_model(run, base_only=True)
    ids = torch.tensor([tokenizer("Who heads the Foundry?").input_ids])
    with torch.no_grad():
        assert not torch.equal(opened[0](input_ids=ids).logits, plain(input_ids=ids).logits)
    assert lorica.adapters(plain) == {} and len(lorica.adapters(opened[0])) == 56
    assert not opened[0].training
