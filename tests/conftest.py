"""Fixtures that every test may use: the embedded base, tiny random models, and the shared data where it is at hand."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("GOMP_SPINCOUNT", "20000")
# Triton decides this when it is first imported: without a GPU, where it is installed at all, kernels are interpreted.
os.environ.setdefault("TRITON_INTERPRET", "0" if os.path.exists("/dev/nvidiactl") else "1")

import pytest

REPOSITORY = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="session")
def base() -> Path:
    """The folder of the embedded 8M-parameter base model."""
    return REPOSITORY / "lorica" / "assets" / "base"


@pytest.fixture(scope="session")
def shared() -> Path:
    """Real data beside the checkout; tests that need it skip where it is missing."""
    folder = REPOSITORY.parent / "shared"
    if not (folder / "data").is_dir():
        pytest.skip("needs ../shared/data, which is not beside this checkout")
    return folder


@pytest.fixture
def tiny_llama() -> Callable[..., Any]:
    """Factory of a random Llama: 2 layers, hidden 32, vocabulary 64, float32, seeded."""

    def make(**changes: Any) -> Any:
        import torch
        from transformers import AutoModelForCausalLM, LlamaConfig

        shape: dict[str, Any] = {
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "vocab_size": 64,
            "max_position_embeddings": 128,
            "bos_token_id": 0,
            "eos_token_id": 2,
            "pad_token_id": 3,
        }
        torch.manual_seed(0)
        return AutoModelForCausalLM.from_config(LlamaConfig(**{**shape, **changes}), dtype=torch.float32).eval()

    return make
