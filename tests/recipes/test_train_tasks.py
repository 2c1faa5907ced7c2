"""Classifiers and encoder-decoders through the recipes: train, resume, evaluate, predict, merge, export, plan."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from task_bases import WORDS, make_base, make_tokenizer
from transformers import AutoModelForSeq2SeqLM, AutoModelForSequenceClassification

import lorica
from lorica.config import DataConfig, EvalConfig, ModelConfig, RunConfig, TrainConfig
from lorica.errors import ConfigError, DataError, ModelError
from lorica.evaluate.generation import generate as generate_ids
from lorica.models.load import load_model, load_with_head
from lorica.models.loss import logits_loss, make_loss
from lorica.recipes.classify import ClassificationReport
from lorica.recipes.data import check, preview
from lorica.recipes.evaluate import EvaluationReport, evaluate
from lorica.recipes.export import export
from lorica.recipes.generate import chat, generate
from lorica.recipes.init import init
from lorica.recipes.merge import merge
from lorica.recipes.opening import open_model
from lorica.recipes.plan import plan
from lorica.recipes.train import TrainResult
from lorica.training.metrics import read_metrics
from lorica.training.rehearsal import example_batch

GOOD, BAD = ["good", "fine", "great", "loved", "like"], ["bad", "dull", "poor", "hate"]
CLASSIFIERS, PAIRS = ("bert", "roberta", "llama"), ("t5", "bart")
NUMBERS = WORDS[WORDS.index("zero") : WORDS.index("fourteen") + 1]


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    folder, made = tmp_path_factory.mktemp("bases"), set[str]()

    def base(kind: str) -> Path:
        if kind not in made:
            make_base(kind, folder / kind)
            made.add(kind)
        return folder / kind

    return base


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    folder = tmp_path_factory.mktemp("rows")
    generator = np.random.default_rng(0)
    reviews = []
    for _ in range(120):
        good = bool(generator.random() < 0.6)
        words = generator.choice(["the", "film", "was", "a", "story", "cast", "and", "it"], generator.integers(1, 6))
        text = " ".join([*words, generator.choice(GOOD if good else BAD)])
        reviews.append({"sentence": text, "label": "positive" if good else "negative"})
    sums = [
        {"prompt": f"what is {NUMBERS[i]} plus {NUMBERS[j]}", "response": f"it is {NUMBERS[i + j]}"}
        for i in range(7)
        for j in range(8)
    ]
    for name, content in (("classes", reviews), ("pairs", sums)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in content), encoding="utf-8")
    return lambda kind: folder / ("pairs.jsonl" if kind in PAIRS else "classes.jsonl")


@pytest.fixture(scope="module")
def configure(bases: Callable[[str], Path], rows: Callable[[str], Path]) -> Callable[..., RunConfig]:
    def make(kind: str, output: Path | str, *, task: str = "auto", data: Any = None, **train: Any) -> RunConfig:
        if kind == "llama" and task == "auto":
            task = "classification"
        return RunConfig(
            model=ModelConfig.model_validate({"base": str(bases(kind)), "task": task, "device": "cpu"}),
            method=lorica.LoRA(rank=4, alpha=8.0, dropout=0.1),
            data=DataConfig(**{"train": str(rows(kind)), "eval": 0.2, "max_length": 24, **(data or {})}),
            train=TrainConfig(
                **{
                    "output": str(output), "max_steps": 24, "epochs": 20.0, "lr": 1e-2, "batch_tokens": 256,
                    "eval_every": 8, "save_every": 6, "threads": 1, **train,
                }
            ),
            eval=EvalConfig(max_new_tokens=6),
        )  # fmt: skip

    return make


@pytest.fixture(scope="module", params=(*CLASSIFIERS, *PAIRS))
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def runs(configure: Callable[..., RunConfig], tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """A finished run of each kind, trained when it is first asked for."""
    folder, done = tmp_path_factory.mktemp("runs"), set[str]()

    def run(kind: str) -> Path:
        if kind not in done:
            result = train(configure(kind, folder / kind))
            assert (result.status, result.read_back_difference) == ("finished", 0.0)
            done.add(kind)
        return folder / kind

    return run


def train(config: RunConfig, **how: Any) -> TrainResult:
    result = lorica.train(config, **how)
    assert isinstance(result, TrainResult)
    return result


def losses(folder: Path) -> list[float]:
    return [row["loss"] for row in read_metrics(folder / "metrics.jsonl") if "loss" in row]


def some_ids(kind: str) -> torch.Tensor:
    high = len(make_tokenizer(kind))
    return torch.randint(6, high, (3, 9), generator=torch.Generator().manual_seed(0))


def logits(model: Any, kind: str) -> torch.Tensor:
    """Logits on rows that a padding token stands in too."""
    ids = some_ids(kind)
    inputs: dict[str, Any] = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if kind in PAIRS:
        inputs["decoder_input_ids"] = ids[:, :4]
    with torch.no_grad():
        found: torch.Tensor = model.eval()(**inputs).logits
    return found


def test_it_learns(kind: str, runs: Callable[[str], Path]) -> None:
    found = losses(runs(kind))
    assert sum(found[-4:]) < 0.9 * sum(found[:4])
    evaluations = [row for row in read_metrics(runs(kind) / "metrics.jsonl") if "eval_loss" in row]
    names = {"eval_perplexity"} if kind in PAIRS else {"eval_accuracy", "eval_macro_f1"}
    assert len(evaluations) == 3 and names <= evaluations[0].keys()


@pytest.mark.parametrize("kind", ("bert", "t5"))
def test_paused_and_resumed_is_the_same_run(
    kind: str, runs: Callable[[str], Path], configure: Callable[..., RunConfig], tmp_path: Path
) -> None:
    config = configure(kind, tmp_path / "run")
    assert train(config, stop_at=11).status == "paused"
    assert train(config, resume="auto").status == "finished"
    assert losses(tmp_path / "run") == losses(runs(kind))
    weights = "adapter/adapter_model.safetensors"
    assert (tmp_path / "run" / weights).read_bytes() == (runs(kind) / weights).read_bytes()


def test_transformers_and_peft_read_what_we_write(
    kind: str, runs: Callable[[str], Path], bases: Callable[[str], Path], tmp_path: Path
) -> None:
    peft = pytest.importorskip("peft")
    auto = AutoModelForSeq2SeqLM if kind in PAIRS else AutoModelForSequenceClassification
    ours, _, _ = open_model(runs(kind))
    found = logits(ours, kind)
    more: dict[str, Any] = {} if kind in PAIRS else {"num_labels": 2}
    plain = auto.from_pretrained(bases(kind), **more)
    # As users of PEFT would set it for a model that has no padding token.
    plain.config.pad_token_id = ours.config.pad_token_id
    theirs = peft.PeftModel.from_pretrained(plain, runs(kind) / "adapter")
    assert type(theirs).__name__ == ("PeftModelForSeq2SeqLM" if kind in PAIRS else "PeftModelForSequenceClassification")
    torch.testing.assert_close(logits(theirs, kind), found, atol=1e-5, rtol=1e-5)

    merge(runs(kind), tmp_path / "merged")
    again = auto.from_pretrained(tmp_path / "merged")
    torch.testing.assert_close(logits(again, kind), found, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(logits(load_model(tmp_path / "merged"), kind), found, atol=1e-5, rtol=1e-5)
    if kind not in PAIRS:
        assert again.config.id2label == {0: "negative", 1: "positive"}
    assert export(runs(kind), tmp_path / "exported").max_difference == 0


@pytest.mark.parametrize("kind", CLASSIFIERS)
def test_a_class_and_its_probability_are_those_of_transformers(
    kind: str, runs: Callable[[str], Path], rows: Callable[[str], Path], tmp_path: Path
) -> None:
    report = evaluate(runs(kind))
    assert isinstance(report, ClassificationReport) and report.num_rows == 24 and len(report.classes) == 2
    assert report.adapter.loss is not None and report.majority.loss is not None
    assert report.adapter.loss < report.majority.loss
    assert report.adapter.accuracy == np.mean([sample.predicted == sample.label for sample in report.samples])
    written = json.loads((runs(kind) / "evaluation.json").read_text(encoding="utf-8"))
    assert written["adapter"]["macro_f1"] == report.adapter.macro_f1 and written["majority"]["accuracy"] < 0.8

    merge(runs(kind), tmp_path / "merged")
    model, tokenizer = AutoModelForSequenceClassification.from_pretrained(tmp_path / "merged"), make_tokenizer(kind)
    found = generate(runs(kind), input=rows(kind))
    for one in found[:8]:
        with torch.no_grad():
            (wanted,) = model(**tokenizer(one.text, return_tensors="pt")).logits.softmax(-1)  # type: ignore[union-attr]
        assert model.config.id2label[int(wanted.argmax())] == one.predicted  # type: ignore[union-attr]
        assert float(wanted.max()) == pytest.approx(one.probability, abs=1e-5)  # type: ignore[union-attr]
    merged = generate(tmp_path / "merged", input=rows(kind))
    assert [one.predicted for one in merged] == [one.predicted for one in found]  # type: ignore[union-attr]
    (alone,) = generate(runs(kind) / "adapter", prompt=found[0].text)  # type: ignore[union-attr]
    assert alone.predicted == found[0].predicted  # type: ignore[union-attr]


@pytest.mark.parametrize("kind", PAIRS)
def test_answers_of_a_batch_are_those_of_transformers_alone(kind: str, runs: Callable[[str], Path]) -> None:
    report = evaluate(runs(kind))
    assert isinstance(report, EvaluationReport) and report.all.base is not None
    assert report.all.adapter.loss < report.all.base.loss
    model, tokenizer, renderer = open_model(runs(kind))
    prompts = ["what is two plus two", "what is it", "what is one plus seven and two"]
    ids = [tokenizer(prompt).input_ids for prompt in prompts]
    ours = generate_ids(model, tokenizer, ids, max_new_tokens=6, stop_ids=renderer.stop_ids, batch_size=3)  # type: ignore[union-attr]
    for prompt, answer in zip(ids, ours, strict=True):
        theirs = model.generate(
            input_ids=torch.tensor([prompt]), max_new_tokens=6, do_sample=False, num_beams=1,
            forced_bos_token_id=None, forced_eos_token_id=None,
        )[0].tolist()[1:]  # fmt: skip
        end = theirs.index(tokenizer.eos_token_id) if tokenizer.eos_token_id in theirs else len(theirs)
        assert answer == theirs[:end]
    (told,) = generate(runs(kind), prompt=prompts[0], max_new_tokens=6)
    assert told.response == tokenizer.decode(ours[0], skip_special_tokens=True)  # type: ignore[union-attr]


@pytest.mark.parametrize("kind", (*CLASSIFIERS, *PAIRS))
def test_the_loss_is_that_of_transformers(kind: str, bases: Callable[[str], Path]) -> None:
    labels = () if kind in PAIRS else ("a", "b", "c")
    task = "classification" if kind == "llama" else "auto"
    model = load_model(bases(kind), task=task, labels=labels)
    loss_fn, ids = make_loss(model), some_ids(kind)
    mask = torch.ones_like(ids)
    mask[1, 6:] = 0
    ids[1, 6:] = model.config.pad_token_id
    inputs = {"input_ids": ids, "attention_mask": mask}
    if kind not in PAIRS:
        targets = torch.tensor([2, 0, 1])
        ours, theirs = loss_fn(model, inputs, targets), model(**inputs, labels=targets).loss * 3
    else:
        assert loss_fn is not logits_loss, "the head is known, so no whole logits are made"
        targets = torch.tensor([[7, 8, 9], [8, -100, -100], [9, 7, -100]])
        inputs["decoder_input_ids"] = torch.tensor([[0, 7, 8], [0, 8, 0], [0, 9, 7]])
        ours, theirs = loss_fn(model, inputs, targets), model(**inputs, labels=targets).loss * 6
        torch.testing.assert_close(logits_loss(model, inputs, targets), theirs)
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
    parameter = model.get_input_embeddings().weight
    grads = [torch.autograd.grad(loss, parameter)[0] for loss in (ours, theirs)]
    torch.testing.assert_close(*grads, rtol=1e-4, atol=1e-5)


def test_a_new_head_is_seeded_and_an_own_one_is_kept(
    bases: Callable[[str], Path], runs: Callable[[str], Path], tmp_path: Path
) -> None:
    first, names = load_with_head(bases("bert"), labels=("a", "b"), seed=1)
    assert names == ("classifier", "bert.pooler.dense"), "the checkpoint has no pooling layer either"
    same, other = (load_model(bases("bert"), labels=("a", "b"), seed=seed) for seed in (1, 2))
    assert torch.equal(first.classifier.weight, same.classifier.weight)
    assert torch.equal(first.bert.pooler.dense.weight, same.bert.pooler.dense.weight)
    assert not torch.equal(first.classifier.weight, other.classifier.weight)
    assert lorica.models.load.base_fingerprint(first, names) == lorica.models.load.base_fingerprint(other, names)

    merge(runs("bert"), tmp_path / "merged")
    kept, names = load_with_head(tmp_path / "merged")
    assert kept.config.id2label == {0: "negative", 1: "positive"} and names == ("classifier",)
    renamed = load_model(tmp_path / "merged", labels=("negative", "neutral"))
    assert not torch.equal(renamed.classifier.weight, kept.classifier.weight), "a head for other classes is new"
    assert load_model(tmp_path / "merged", labels=("x", "y", "z")).config.num_labels == 3
    with pytest.raises(ModelError, match="needs the names of its classes"):
        load_model(bases("bert"))


@pytest.mark.parametrize("kind", ("bert", "t5"))
def test_a_plan_counts_what_training_counts(
    kind: str, configure: Callable[..., RunConfig], runs: Callable[[str], Path], tmp_path: Path
) -> None:
    report = plan(configure(kind, tmp_path / "run"))
    result = json.loads((runs(kind) / "result.json").read_text(encoding="utf-8"))
    # The plan reads no weights, so it cannot know that this checkpoint lacks its pooling layer, and adapts it.
    pooling = 32 * 32 + 32 - 4 * (32 + 32) if kind == "bert" else 0
    assert report.trainable_parameters + pooling == result["trainable_parameters"]
    assert report.steps == result["steps"]
    assert any("padded" in line for line in report.assumptions) == (kind == "t5")


def test_rehearsed_batches_have_the_shape_of_their_task() -> None:
    from lorica.models.tasks import CLASSIFICATION, SEQ2SEQ

    rows_of = example_batch([5, 3], task=CLASSIFICATION, padded=True)
    assert rows_of.targets.shape == (2,) and rows_of.input_ids.shape == (2, 5)
    packed = example_batch([5, 3], task=CLASSIFICATION)
    assert packed.targets.shape == (2,) and packed.input_ids.shape == (1, 64)
    both = example_batch([6, 4], trained_fraction=0.5, task=SEQ2SEQ)
    assert both.input_ids.shape == both.targets.shape == (2, 3) and both.num_targets == 5


def test_rows_are_shown_and_counted_with_their_classes(
    bases: Callable[[str], Path], rows: Callable[[str], Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    target = str(rows("bert"))
    overrides = [f"model.base={bases('bert')}"]
    found = check(target, overrides)
    assert found.refusal is None and found.train.format == "classification"
    assert sum(found.train.num_rows_by_label.values()) == 120 and set(found.train.num_rows_by_label) == {
        "negative",
        "positive",
    }
    (sample,) = preview(target, overrides, rows=1)
    assert sample.label in ("negative", "positive") and sample.num_trained_tokens == 0
    assert f"its class, {sample.label}, learned" in capsys.readouterr().out
    for kind, task in (("bert", "auto"), ("llama", "classification")):
        made = init(tmp_path / kind, data=target, base=str(bases(kind)))
        text = made.path.read_text(encoding="utf-8")
        assert f"task: {task} " in text and "format: classification" in text and "loss_on" not in text
        assert lorica.recipes.data.check(str(made.path)).refusal is None


@pytest.mark.parametrize(
    ("kind", "values", "error", "message"),
    [
        ("bert", {"task": "causal"}, ModelError, r"reads in both directions.*model\.task=classification"),
        ("bert", {"task": "seq2seq"}, ModelError, "cannot be trained for model.task=seq2seq; try classification"),
        ("t5", {"task": "classification"}, ModelError, "try seq2seq"),
        ("llama", {"task": "causal"}, DataError, r"do not fit model\.task=causal.*task=class.*data\.format=text"),
        ("bert", {"data": {"loss_on": "all"}}, ConfigError, r"data\.loss_on = all means nothing for model\.task=class"),
        ("t5", {"data": {"loss_on": "assistant"}}, ConfigError, "means nothing for model.task=seq2seq"),
        ("bert", {"data": {"train": "chat"}}, DataError, r"no format fits the columns prompt.*text and label"),
        ("t5", {"data": {"train": "classes"}}, DataError, r"do not fit model\.task=seq2seq"),
        ("bert", {"data": {"train": "one"}}, DataError, "all have the label 'same'"),
        ("bert", {"data": {"eval": "other"}}, DataError, r"other\.jsonl:1: the label 'unheard' is none of the"),
        ("roberta", {"data": {"train": "long", "max_length": 60}}, DataError, r"takes 38\. Set data\.max_length=38"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_said(
    configure: Callable[..., RunConfig], rows: Callable[[str], Path], tmp_path: Path,
    kind: str, values: dict[str, Any], error: type[Exception], message: str,
) -> None:  # fmt: skip
    files = {
        "chat": rows("t5").read_text(encoding="utf-8"),
        "classes": rows("bert").read_text(encoding="utf-8"),
        "one": '{"text": "a film", "label": "same"}\n{"text": "the cast", "label": "same"}\n',
        "other": '{"text": "a film", "label": "unheard"}\n',
        "long": json.dumps({"text": "film " * 37, "label": 0}) + '\n{"text": "good", "label": 1}\n' * 3,
    }
    data = dict(values.get("data", {}))
    for key in ("train", "eval"):
        if data.get(key) in files:
            file = tmp_path / f"{data[key]}.jsonl"
            file.write_text(files[data[key]], encoding="utf-8")
            data[key] = str(file)
    config = configure(kind, tmp_path / "run", **{**values, "data": data})
    with pytest.raises(error, match=f"(?s){message}"):
        lorica.train(config)
    assert not (tmp_path / "run" / "config.yaml").exists()


def test_a_classifier_answers_nothing(runs: Callable[[str], Path]) -> None:
    with pytest.raises(ConfigError, match="A classifier answers nothing"):
        chat(runs("bert"))


def test_texts_that_cannot_be_classified_are_named(runs: Callable[[str], Path], tmp_path: Path) -> None:
    file = tmp_path / "texts.txt"
    file.write_text("good\n" + "film " * 30 + "\n", encoding="utf-8")
    with pytest.raises(DataError, match=r"texts\.txt:2: 32 tokens; data\.max_length is 24"):
        generate(runs("bert"), input=file)
    file.write_text("good\n\nhate\n", encoding="utf-8")
    assert [one.origin for one in generate(runs("bert"), input=file)] == ["texts.txt:1", "texts.txt:3"]  # type: ignore[union-attr]
