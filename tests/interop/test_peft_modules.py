"""What is trained beside an adapter goes both ways between PEFT and us: modules_to_save, trained tokens, ties."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import (
    AutoModelForSequenceClassification,
    DistilBertConfig,
    LlamaConfig,
    RobertaConfig,
    T5Config,
    T5ForConditionalGeneration,
)

import lorica
from lorica.errors import AdapterError
from lorica.interop.folder import CONFIG, PROOF, WEIGHTS
from lorica.methods.adalora import AdaLoRA
from lorica.methods.bottleneck import Bottleneck
from lorica.methods.dora import DoRA
from lorica.methods.full import FullFineTuning
from lorica.methods.ia3 import IA3
from lorica.methods.method import MethodOptions
from lorica.methods.vera import VeRA

from .small_models import IDS, SMALL, llama, outputs, qwen3, randomise

peft = pytest.importorskip("peft", reason="needs peft, the oracle")

Make = Callable[[], Any]


def classifier(config: Any, seed: int = 0) -> Any:
    torch.manual_seed(seed)
    return AutoModelForSequenceClassification.from_config(config, dtype=torch.float32).eval()


def roberta() -> Any:
    # Its head holds two linear layers.
    return classifier(RobertaConfig(**SMALL, pad_token_id=1, max_position_embeddings=40, num_labels=3))


def distilbert() -> Any:
    shape = {"dim": 32, "hidden_dim": 48, "n_layers": 2, "n_heads": 4, "vocab_size": 64}
    return classifier(DistilBertConfig(**shape, pad_token_id=0, num_labels=3))


def llama_classifier() -> Any:
    return classifier(LlamaConfig(**SMALL, num_key_value_heads=2, num_labels=3, pad_token_id=0))


def untied() -> Any:
    model = qwen3()
    model.config.tie_word_embeddings = False
    model.lm_head.weight = nn.Parameter(model.lm_head.weight.detach() * 0.5)
    return model


def t5() -> Any:
    torch.manual_seed(0)
    shape = {"d_model": 16, "d_kv": 4, "d_ff": 24, "num_layers": 1, "num_heads": 2, "vocab_size": 64}
    return T5ForConditionalGeneration(T5Config(**shape, decoder_start_token_id=0)).eval()


def results(model: Any) -> torch.Tensor:
    if getattr(model.config, "is_encoder_decoder", False):
        with torch.no_grad():
            return model(input_ids=IDS, decoder_input_ids=IDS).logits
    return outputs(model)


def load_in_peft(make: Make, folder: Path) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        # That ties are lost if it is not asked for, which is asked for where PEFT can.
        warnings.filterwarnings("ignore", message="Model has `tie_word_embeddings=True`")
        warnings.filterwarnings("ignore", message="Specified to not")
        warnings.filterwarnings("ignore", message="`is_gradient_checkpointing` is deprecated")
        return peft.PeftModel.from_pretrained(make(), folder).eval()


Q = ("q_proj", "query", "q_lin", "q")
OURS: dict[str, tuple[Make, MethodOptions]] = {
    "a head of two layers": (roberta, lorica.LoRA(rank=4, targets="query", modules_to_save="classifier")),
    "a head under all-linear": (llama_classifier, lorica.LoRA(rank=4, modules_to_save="score")),
    "two heads": (distilbert, lorica.LoRA(rank=4, targets="q_lin", modules_to_save=("pre_classifier", "classifier"))),
    "a head beside ia3": (roberta, IA3(modules_to_save="classifier")),
    "a head beside vera": (roberta, VeRA(rank=8, targets="query", modules_to_save="classifier")),
    "a tied embedding": (qwen3, lorica.LoRA(rank=4, modules_to_save="embed_tokens")),
    "a tied head beside ia3": (qwen3, IA3(modules_to_save="lm_head")),
    "an untied head and norms": (untied, lorica.LoRA(rank=4, modules_to_save=("lm_head", "model.norm", "q_norm"))),
    "tokens": (llama, lorica.LoRA(rank=4, trainable_tokens=(60, 3))),
    "tied tokens": (qwen3, lorica.LoRA(rank=4, trainable_tokens=(60, 3))),
    "tied tokens beside adalora": (qwen3, AdaLoRA(rank=4, target_rank=2, trainable_tokens=(60, 3))),
    "tokens of two layers": (untied, DoRA(rank=4, trainable_tokens={"embed_tokens": (60, 3), "lm_head": (5,)})),
    "tokens of an encoder-decoder": (t5, lorica.LoRA(rank=4, targets="q", trainable_tokens=(60, 3))),
    "both": (untied, lorica.LoRA(rank=4, trainable_tokens=(60, 3), modules_to_save="lm_head")),
}


@pytest.mark.parametrize("case", OURS)
def test_peft_loads_what_we_save(case: str, tmp_path: Path) -> None:
    make, options = OURS[case]
    model = lorica.adapt(make(), options)
    randomise(lorica.trainable_parameters(model).values())
    ours = results(model)
    lorica.save_adapter(model, tmp_path)
    theirs = load_in_peft(make, tmp_path)
    assert (ours - results(make())).abs().max() > 1e-2
    torch.testing.assert_close(results(theirs), ours, atol=1e-5, rtol=1e-5)
    again = lorica.load_adapter(make(), tmp_path)
    assert torch.equal(results(again), ours)
    assert lorica.trainable_parameters(again).keys() == lorica.trainable_parameters(model).keys()
    # What was loaded saves to the same folder.
    lorica.save_adapter(again, tmp_path / "again")
    first, second = (json.loads((folder / CONFIG).read_text()) for folder in (tmp_path, tmp_path / "again"))
    for field in ("modules_to_save", "trainable_token_indices", "ensure_weight_tying", "task_type", "target_modules"):
        assert first.get(field) == second.get(field)
    assert (tmp_path / "again" / WEIGHTS).read_bytes() == (tmp_path / WEIGHTS).read_bytes()


def lora(**fields: Any) -> Any:
    return peft.LoraConfig(**{"r": 4, "target_modules": [*Q], **fields})


THEIRS: dict[str, tuple[Make, Any]] = {
    "a head that PEFT adds": (roberta, lora(task_type="SEQ_CLS")),
    "two heads, ia3": (
        distilbert,
        peft.IA3Config(target_modules=["k_lin"], feedforward_modules=[], task_type="SEQ_CLS"),
    ),
    "all biases": (roberta, lora(bias="all")),
    "a decoder's head": (llama_classifier, lora(task_type="SEQ_CLS", modules_to_save=["model.norm"])),
    "an embedding parted from its head": (qwen3, lora(modules_to_save=["embed_tokens"])),
    "a head parted from its embedding": (qwen3, lora(modules_to_save=["lm_head"])),
    "both parted": (qwen3, lora(modules_to_save=["lm_head", "embed_tokens"])),
    "an embedding tied to its head": (qwen3, lora(modules_to_save=["embed_tokens"], ensure_weight_tying=True)),
    "tokens": (llama, lora(trainable_token_indices=[60, 3])),
    "tied tokens": (qwen3, lora(trainable_token_indices=[60, 3])),
    "tokens parted": (qwen3, lora(trainable_token_indices={"embed_tokens": [60, 3], "lm_head": [60]})),
    "tokens of a tied head alone": (qwen3, lora(trainable_token_indices={"lm_head": [60, 3]})),
    "tokens of two layers": (untied, lora(trainable_token_indices={"embed_tokens": [60, 3], "lm_head": [5]})),
}


def train_in_peft(make: Make, config: Any, folder: Path) -> torch.Tensor:
    """What PEFT's model gives after a change of everything that it trains, saved to `folder`."""
    theirs = peft.get_peft_model(make(), config).eval()
    randomise(p for p in theirs.parameters() if p.requires_grad)
    theirs.save_pretrained(folder)
    return results(theirs)


@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`")
@pytest.mark.parametrize("case", THEIRS)
def test_we_load_what_peft_saves(case: str, tmp_path: Path) -> None:
    make, config = THEIRS[case]
    want = train_in_peft(make, config, tmp_path)
    model = lorica.load_adapter(make(), tmp_path)
    torch.testing.assert_close(results(model), want, atol=1e-5, rtol=1e-5)
    merged = lorica.merge(model)
    torch.testing.assert_close(results(merged), want, atol=1e-5, rtol=1e-5)
    # Ours from here on, parted where PEFT parted.
    lorica.save_adapter(model, tmp_path / "ours")
    torch.testing.assert_close(results(load_in_peft(make, tmp_path / "ours")), want, atol=1e-5, rtol=1e-5)
    assert torch.equal(results(lorica.detach(model)), results(make()))


def edited(folder: Path, tensors: dict[str, torch.Tensor], **config: Any) -> Path:
    """The folder with other tensors and fields, and without its proof."""
    (folder / PROOF).unlink(missing_ok=True)
    save_file({**load_file(folder / WEIGHTS), **tensors}, folder / WEIGHTS, metadata={"format": "pt"})
    (folder / CONFIG).write_text(json.dumps({**json.loads((folder / CONFIG).read_text()), **config}))
    return folder


def saved(make: Make, options: MethodOptions, folder: Path) -> Path:
    model = lorica.adapt(make(), options)
    randomise(lorica.trainable_parameters(model).values())
    return lorica.save_adapter(model, folder)


def test_a_weight_that_the_configuration_does_not_name_counts_as_it_does_in_peft(tmp_path: Path) -> None:
    """PEFT writes a resized embedding so, and takes what it finds."""
    folder = edited(
        saved(llama, lorica.LoRA(rank=4), tmp_path), {"base_model.model.lm_head.weight": torch.ones(64, 32)}
    )
    model = lorica.load_adapter(llama(), folder)
    torch.testing.assert_close(results(model), results(peft.PeftModel.from_pretrained(llama(), folder)))
    assert model.lm_head.masters["weight"].eq(1).all()


def test_a_copy_of_the_bases_own_weight_is_passed_over(tmp_path: Path) -> None:
    folder = saved(llama, lorica.LoRA(rank=4), tmp_path)
    edited(folder, {"base_model.model.model.embed_tokens.weight": llama().model.embed_tokens.weight.detach()})
    assert "model.embed_tokens" not in lorica.adapters(lorica.load_adapter(llama(), folder))


HEAD = "base_model.model.classifier.dense.weight"
ROWS = "base_model.model.model.embed_tokens.token_adapter.trainable_tokens_delta"


@pytest.mark.parametrize(
    ("make", "options", "tensors", "config", "words"),
    [
        (roberta, {"modules_to_save": "classifier"}, {HEAD: torch.ones(3, 3)}, {}, r"\[3, 3\], expected \[32, 32\]"),
        (roberta, {"modules_to_save": "classifier"}, {HEAD: torch.full((32, 32), torch.nan)}, {}, "NaN"),
        (roberta, {}, {}, {"modules_to_save": ["classifier"]}, r"classifier\.out_proj\.bias is missing"),
        (llama, {"trainable_tokens": (3, 60)}, {ROWS: torch.ones(3, 32)}, {}, r"\[3, 32\], expected \[2, 32\]"),
        (llama, {"trainable_tokens": (3, 60)}, {}, {"trainable_token_indices": [3, 64]}, "no rows of"),
        (llama, {"trainable_tokens": (3, 60)}, {}, {"trainable_token_indices": None}, "no rows of model.embed_tokens"),
        (llama, {"trainable_tokens": (3, 60)}, {}, {"trainable_token_indices": {"wte": [3, 60]}}, "no rows of"),
        (llama, {}, {ROWS.replace("embed_tokens", "norm"): torch.ones(1, 32)}, {}, r"no rows of model\.norm"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_refused_and_nothing_changed(
    make: Make, options: Any, tensors: Any, config: Any, words: str, tmp_path: Path
) -> None:
    folder = edited(saved(make, lorica.LoRA(rank=4, targets="query|q_proj", **options), tmp_path), tensors, **config)
    model = make()
    with pytest.raises(AdapterError, match=words):
        lorica.load_adapter(model, folder)
    assert not lorica.adapters(model) and torch.equal(results(model), results(make()))


@pytest.mark.parametrize("method", [Bottleneck(size=4, targets="o_proj"), FullFineTuning(targets="norm"), IA3()])
def test_our_own_folders_hold_it_too(method: MethodOptions, tmp_path: Path) -> None:
    """IA3's configuration has no tokens in PEFT, so its folder is ours."""
    options = replace(method, modules_to_save=("lm_head",), trainable_tokens=(60, 3))
    folder = saved(untied, options, tmp_path)
    assert json.loads((folder / CONFIG).read_text())["peft_type"] == f"LORICA_{method.method_name().upper()}"
    model = lorica.load_adapter(untied(), folder)
    found = lorica.adapters(model)
    assert [name for name, adapter in found.items() if adapter.is_beside] == ["model.embed_tokens", "lm_head"]
    assert all(adapter.options.modules_to_save == ("lm_head",) for adapter in found.values())
    reference = lorica.adapt(untied(), options)
    randomise(lorica.trainable_parameters(reference).values())
    assert torch.equal(results(model), results(reference))


NEW = tuple(range(64, 70))


def test_a_new_head_or_row_is_no_other_base(tmp_path: Path) -> None:
    """What the adapter brings may have any value in the base that it is loaded onto."""
    folder = saved(roberta, lorica.LoRA(rank=4, targets="query", modules_to_save="classifier"), tmp_path / "a")
    model = roberta()
    nn.init.ones_(model.classifier.dense.weight)
    again = lorica.load_adapter(model, folder)
    assert torch.equal(results(again), results(lorica.load_adapter(roberta(), folder)))
    model = lorica.detach(again)
    nn.init.ones_(model.roberta.encoder.layer[0].output.dense.weight)
    with pytest.raises(AdapterError, match="another base"):
        lorica.load_adapter(model, folder)

    def resized(seed: int) -> Any:
        model = llama()
        torch.manual_seed(seed)
        model.resize_token_embeddings(70, mean_resizing=False)
        return model

    options = lorica.LoRA(rank=4, trainable_tokens={"embed_tokens": NEW, "lm_head": NEW})
    folder = saved(lambda: resized(0), options, tmp_path / "b")
    first, second = (results(lorica.load_adapter(resized(seed), folder)) for seed in (0, 1))
    assert torch.equal(first, second) and not torch.equal(results(resized(0)), results(resized(1)))


class Custom(nn.Module):
    """No model of transformers: an embedding, a normalisation with running statistics, a head."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.emb = nn.Embedding(64, 8)
        self.lin0 = nn.Linear(8, 8)
        self.norm = nn.BatchNorm1d(8)
        self.lin1 = nn.Linear(8, 64)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.lin0(self.emb(ids)).relu()
        return self.lin1(self.norm(x.transpose(1, 2)).transpose(1, 2))


def test_a_model_of_ones_own_with_running_statistics(tmp_path: Path) -> None:
    tokens = {"emb": [60, 3]}
    theirs = peft.get_peft_model(
        Custom(), lora(target_modules=["lin0"], modules_to_save=["norm", "lin1"], trainable_token_indices=tokens)
    )
    # The statistics move with every batch in training.
    randomise(p for p in theirs.parameters() if p.requires_grad)
    theirs.train()(IDS)
    theirs.eval().save_pretrained(tmp_path / "theirs")
    model = lorica.load_adapter(Custom().eval(), tmp_path / "theirs")
    torch.testing.assert_close(model(IDS), theirs(IDS), atol=1e-5, rtol=1e-5)
    model.train()(IDS)
    model.eval()
    assert model.norm.statistics.num_batches_tracked == 2 and model.norm.base.num_batches_tracked == 0
    torch.testing.assert_close(lorica.merge(model)(IDS), model(IDS), atol=1e-5, rtol=1e-5)
    lorica.save_adapter(model, tmp_path / "ours")
    again = peft.PeftModel.from_pretrained(Custom(), tmp_path / "ours").eval()
    torch.testing.assert_close(again(IDS), model(IDS), atol=1e-5, rtol=1e-5)
    assert torch.equal(lorica.detach(model)(IDS), Custom().eval()(IDS))
