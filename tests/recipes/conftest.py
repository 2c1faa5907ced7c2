"""A base so small that a whole run takes a second, rows to train it on, and runs made of them."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from lorica.config import DataConfig, ModelConfig, RunConfig, TrainConfig
from lorica.methods.lora import LoRA

TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja")


@pytest.fixture(autouse=True)
def _threads_come_back() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def save_base(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[Any], Path]:
    """Write a random seeded model of a transformers config into a base folder, with the embedded base's tokenizer."""

    def save(config: Any) -> Path:
        from transformers import AutoModelForCausalLM

        folder = tmp_path_factory.mktemp("bases") / str(config.model_type)
        with torch.random.fork_rng():
            torch.manual_seed(0)
            AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(folder)
        for name in TOKENIZER_FILES:
            shutil.copy(base / name, folder / name)
        return folder

    return save


@pytest.fixture(scope="session")
def tiny_base(save_base: Callable[[Any], Path]) -> Path:
    """A Llama of 2 layers, hidden 32, tied embeddings, float32, with the embedded base's vocabulary of 8192."""
    from transformers import LlamaConfig

    return save_base(
        LlamaConfig(
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            vocab_size=8192,
            max_position_embeddings=512,
            bos_token_id=0,
            eos_token_id=2,
            pad_token_id=3,
            tie_word_embeddings=True,
        )
    )


@pytest.fixture(scope="session")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """64 sums in words."""
    file = tmp_path_factory.mktemp("rows") / "rows.jsonl"
    pairs = [(i, j) for i in range(8) for j in range(8)]
    lines = [{"prompt": f"What is {i} plus {j}?", "response": f"It is {i + j}."} for i, j in pairs]
    file.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return file


@pytest.fixture(scope="session")
def make_config(tiny_base: Path, rows: Path) -> Callable[..., RunConfig]:
    """make_config(output, base=..., method={...}, data={...}, **train): 24 steps on `tiny_base`, one thread."""

    def make(
        output: Path | str,
        *,
        base: Path | str = tiny_base,
        method: dict[str, Any] | None = None,
        data: dict[str, Any] | None = None,
        **train: Any,
    ) -> RunConfig:
        return RunConfig(
            model=ModelConfig(base=str(base), device="cpu", dtype="float32"),
            method=LoRA(**{"rank": 4, "alpha": 8.0, "dropout": 0.1, **(method or {})}),
            data=DataConfig(**{"train": str(rows), "eval": 0.1, "max_length": 64, **(data or {})}),
            train=TrainConfig(
                **{
                    "output": str(output),
                    "epochs": 2.0,
                    "lr": 1e-2,
                    "batch_tokens": 128,
                    "eval_every": 4,
                    "save_every": 3,
                    "threads": 1,
                    **train,
                }
            ),
        )

    return make


@pytest.fixture(scope="session")
def finished(make_config: Callable[..., RunConfig], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run; for reading only."""
    from lorica.recipes.train import train

    folder = tmp_path_factory.mktemp("runs") / "finished"
    # On the embedding too: the base ties it to its head, which is where merging can go wrong.
    train(make_config(folder, method={"targets": ("q_proj", "down_proj", "embed_tokens")}))
    return folder
