"""Small seeded models, and the questions that every exchange with PEFT asks of them."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModel, AutoModelForCausalLM, BertConfig, GPT2Config, LlamaConfig, Qwen3Config

import lorica
from lorica.methods.method import MethodOptions

IDS = torch.randint(3, 64, (2, 9), generator=torch.Generator().manual_seed(5))
SMALL: dict[str, Any] = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 64,
}  # fmt: skip


def llama() -> Any:
    return _causal(LlamaConfig(**SMALL, num_key_value_heads=2))


def qwen3() -> Any:
    return _causal(Qwen3Config(**SMALL, num_key_value_heads=2, head_dim=8, tie_word_embeddings=True))


def gpt2() -> Any:
    return _causal(GPT2Config(n_embd=32, n_layer=2, n_head=4, vocab_size=64, bos_token_id=0, eos_token_id=2))


def bert() -> Any:
    torch.manual_seed(0)
    return AutoModel.from_config(BertConfig(**SMALL, pad_token_id=0), dtype=torch.float32).eval()


def _causal(config: Any) -> Any:
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()


def outputs(model: Any, ids: Tensor = IDS) -> Tensor:
    """Logits, or the last hidden states of a model without a head."""
    with torch.no_grad():
        result = model(ids)
    return result.logits if "logits" in result else result.last_hidden_state


def randomise(parameters: Iterable[nn.Parameter], scale: float = 0.2) -> None:
    """Add seeded noise, the same for the same shapes in the same order."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in parameters:
            parameter.add_(torch.randn(parameter.shape, generator=generator) * scale)


def check_peft_reads_ours(
    make: Callable[[], Any],
    options: MethodOptions,
    folder: Path,
    scale: float = 0.2,
    run: Callable[[Any], Tensor] = outputs,
) -> None:
    """What we save of an adapter with random weights gives PEFT, and us again, the same outputs."""
    model = lorica.adapt(make(), options)
    randomise(lorica.trainable_parameters(model).values(), scale)
    ours = run(model)
    lorica.save_adapter(model, folder)
    assert (ours - run(make())).abs().max() > 1e-2
    torch.testing.assert_close(run(read_by_peft(make, folder)), ours, atol=1e-5, rtol=1e-5)
    assert torch.equal(run(lorica.load_adapter(make(), folder)), ours)


def read_by_peft(make: Callable[[], Any], folder: Path) -> Any:
    """PEFT's model with the adapter in `folder`; a field that PEFT does not know fails."""
    import peft

    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="Unexpected keyword arguments")
        return peft.PeftModel.from_pretrained(make(), folder).eval()


def check_exchange(
    make: Callable[[], Any],
    config: Any,
    folder: Path,
    scale: float = 0.2,
    run: Callable[[Any], Tensor] = outputs,
) -> Any:
    """What PEFT saves gives us the same outputs, and what we save of that gives them to PEFT; the loaded model."""
    import peft

    theirs = peft.get_peft_model(make(), config).eval()
    randomise((p for p in theirs.parameters() if p.requires_grad), scale)
    want = run(theirs)
    theirs.save_pretrained(folder / "theirs")
    assert (want - run(make())).abs().max() > 1e-2
    model = lorica.load_adapter(make(), folder / "theirs")
    torch.testing.assert_close(run(model), want, atol=1e-5, rtol=1e-5)
    lorica.save_adapter(model, folder / "ours")
    torch.testing.assert_close(run(read_by_peft(make, folder / "ours")), want, atol=1e-5, rtol=1e-5)
    return model
