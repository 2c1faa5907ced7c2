"""Inputs of checkpointed layers that wait elsewhere: the same gradients, less memory, errors that say what to do."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM, GPT2Config, T5Config

from lorica.errors import ConfigError, DoesNotFitError, LoricaError
from lorica.methods.attach import adapt, trainable_parameters
from lorica.methods.lora import LoRA
from lorica.models.load import equip
from lorica.training import offload
from lorica.training.ledger import Ledger
from lorica.training.offload import Checkpointing, FileStore, HostStore, StillStore, Store, checkpoint_layers
from lorica.training.rehearsal import rehearse
from tests.training.lazy_streams import LazyStream

LAYERS, TOKENS, HIDDEN = 6, 40, 32
INPUT_BYTES = TOKENS * HIDDEN * 4
MODELS = ("llama", "gpt2", "t5")


def make(kind: str, dropout: float = 0.0) -> Any:
    torch.manual_seed(0)
    shared: dict[str, Any] = {"vocab_size": 64, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2}
    if kind == "gpt2":
        rates = dict.fromkeys(("embd_pdrop", "attn_pdrop", "resid_pdrop"), dropout)
        return AutoModelForCausalLM.from_config(GPT2Config(n_embd=32, n_layer=3, n_head=4, **shared, **rates))
    sizes = {
        "d_model": 32,
        "d_kv": 8,
        "d_ff": 48,
        "num_layers": 3,
        "num_heads": 4,
        "dropout_rate": dropout,
        "decoder_start_token_id": 0,
    }
    return AutoModelForSeq2SeqLM.from_config(T5Config(**sizes, **shared))


def backward(model: Any, tokens: int = TOKENS, seed: int = 1) -> None:
    torch.manual_seed(seed)
    ids = torch.randint(3, 64, (1, tokens))
    model(input_ids=ids, labels=ids, use_cache=False).loss.backward()


@pytest.fixture
def llama(tiny_llama: Callable[..., Any]) -> Callable[..., Any]:
    return lambda dropout=0.0: equip(tiny_llama(num_hidden_layers=LAYERS, attention_dropout=dropout))


@pytest.fixture
def store(llama: Callable[..., Any], tmp_path: Path) -> tuple[Any, Store]:
    model = llama().train()
    made = checkpoint_layers(model, "offload", tmp_path)
    assert isinstance(made, FileStore)
    return model, made


@pytest.mark.parametrize("adapted", [False, True])
@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("kind", MODELS)
def test_gradients_are_those_of_plain_checkpointing_bit_for_bit(
    kind: str, dropout: float, adapted: bool, llama: Callable[..., Any], tmp_path: Path
) -> None:
    def gradients(how: Checkpointing) -> list[Tensor]:
        model = (llama(dropout) if kind == "llama" else make(kind, dropout)).train()
        if adapted:
            # At the start B is zero, and A would have no gradient.
            for parameter in trainable_parameters(adapt(model, LoRA(rank=2, dropout=dropout))).values():
                torch.nn.init.normal_(parameter, std=0.1)
        checkpoint_layers(model, how, tmp_path)
        for step, tokens in enumerate((TOKENS, 2 * TOKENS, 16)):
            backward(model, tokens, seed=step)
        return [p.grad for p in model.parameters() if p.grad is not None]

    kept, again, elsewhere = gradients(False), gradients(True), gradients("offload")
    assert len(again) == len(elsewhere) > 0 and all(map(torch.equal, again, elsewhere))
    assert all(torch.allclose(a, b, rtol=1e-4, atol=1e-5) for a, b in zip(kept, again, strict=True))


def test_bfloat16_travels_too(llama: Callable[..., Any], tmp_path: Path) -> None:
    def gradients(how: Checkpointing) -> list[Tensor]:
        model = llama().bfloat16().train()
        checkpoint_layers(model, how, tmp_path)
        backward(model)
        return [p.grad for p in model.parameters()]

    assert all(map(torch.equal, gradients(True), gradients("offload")))


def test_all_inputs_but_the_last_leave_memory(llama: Callable[..., Any], tmp_path: Path) -> None:
    def kept_bytes(how: Checkpointing) -> int:
        model = llama().train()
        checkpoint_layers(model, how, tmp_path)
        ids = torch.ones(1, TOKENS, dtype=torch.int64)
        with Ledger() as ledger:
            held = {ledger.add(t) for t in (ids, *model.parameters(), *model.buffers())}
            loss = model(input_ids=ids, labels=ids, use_cache=False).loss
            return loss.nbytes + sum(ledger.sizes[number] for number in ledger.alive() - held)

    # The thread may still have a hand on the last but one.
    saved = kept_bytes(True) - kept_bytes("offload")
    assert (LAYERS - 2) * INPUT_BYTES <= saved <= (LAYERS - 1) * INPUT_BYTES


def test_the_file_is_as_long_as_the_longest_batch(store: tuple[Any, Store], tmp_path: Path) -> None:
    model, made = store
    for tokens in (TOKENS, 3 * TOKENS, 16):
        backward(model, tokens)
        # Nothing is left behind, so the next batch begins at the file's start.
        assert not made._waiting and made._moving is None
    assert made.num_bytes == 3 * LAYERS * INPUT_BYTES == made._file._num_bytes
    assert os.listdir(tmp_path) == []


def test_a_forward_pass_without_a_backward_leaves_no_trace(store: tuple[Any, Store]) -> None:
    model, made = store
    ids = torch.ones(1, TOKENS, dtype=torch.int64)
    model(input_ids=ids, use_cache=False)
    with torch.no_grad():
        model(input_ids=ids, use_cache=False)
    model.eval()(input_ids=ids, use_cache=False)
    backward(model.train())
    # The first one's last input may have been on its way when the second began.
    assert made.num_bytes == LAYERS * INPUT_BYTES and not made._waiting


def test_a_graph_may_be_gone_through_twice(store: tuple[Any, Store]) -> None:
    model, _ = store
    ids = torch.arange(TOKENS)[None] % 64
    loss = model(input_ids=ids, labels=ids, use_cache=False).loss
    first, second = (torch.autograd.grad(loss, model.lm_head.weight, retain_graph=True)[0] for _ in range(2))
    inner = [torch.autograd.grad(loss, model.model.layers[0].mlp.up_proj.weight, retain_graph=True)[0] for _ in "ab"]
    assert torch.equal(first, second) and torch.equal(*inner)


def test_an_input_that_is_written_to_is_noticed() -> None:
    made = StillStore(torch.device("cpu"))
    x = torch.zeros(4)
    kept = made.put(x)
    x.add_(1)
    with pytest.raises(AssertionError, match="was written to"):
        made.get(kept)


def test_a_full_disk_is_refused_and_says_what_to_do(store: tuple[Any, Store], monkeypatch: pytest.MonkeyPatch) -> None:
    """Also in the middle of a run, at a batch that is longer than those before it."""
    model, made = store
    backward(model)
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: SimpleNamespace(free=INPUT_BYTES))
    backward(model)
    with pytest.raises(
        DoesNotFitError, match=r"layers keep needs .* bytes of disk.*activation_checkpointing=true"
    ) as e:
        backward(model, 4 * TOKENS)
    assert e.value.exit_code == 4
    del e
    monkeypatch.undo()
    backward(model, 4 * TOKENS)
    assert made.num_bytes == 4 * LAYERS * INPUT_BYTES


@pytest.mark.parametrize("call", ["pwritev", "preadv"])
def test_a_disk_that_fails_is_named(store: tuple[Any, Store], call: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """From the thread through forward and, for reading, through autograd's engine."""

    def fail(*_: object) -> int:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(os, call, fail)
    with pytest.raises(LoricaError, match=r"layers keep .*Input/output error.*Resume from the last checkpoint"):
        backward(store[0])


def test_a_folder_that_cannot_be_written_to_is_refused(llama: Callable[..., Any], tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    model = llama().train()
    checkpoint_layers(model, "offload", tmp_path / "file" / "run")
    with pytest.raises(ConfigError, match=r"cannot be paged to .*file/run.*train\.output"):
        backward(model)


def test_a_model_that_cannot_is_refused(tiny_llama: Callable[..., Any]) -> None:
    model = tiny_llama()
    model.supports_gradient_checkpointing = False
    with pytest.raises(ConfigError, match=r"activation_checkpointing: LlamaForCausalLM cannot"):
        checkpoint_layers(model, True)
    assert checkpoint_layers(model, False) is None


def test_a_rehearsal_counts_them_as_elsewhere(tiny_llama: Callable[..., Any]) -> None:
    config = tiny_llama(num_hidden_layers=LAYERS).config
    again, elsewhere = (
        rehearse(config, LoRA(rank=2), dtype=torch.float32, lengths=[128] * 8, activation_checkpointing=how)
        for how in (True, "offload")
    )
    each = 8 * 128 * HIDDEN * 4
    assert (again.offloaded_bytes, elsewhere.offloaded_bytes) == (0, LAYERS * each)
    kept = [found.moments["forward"].activations for found in (again, elsewhere)]
    # But for one that is on its way, if it is when most is needed.
    assert (LAYERS - 1) * each <= kept[0] - kept[1]
    # Two are there at once in backward, and then also gradients of the layers above.
    assert again.live_bytes - elsewhere.live_bytes >= (LAYERS - 2) * each - again.parts.adapter
    # Products are the same ones.
    assert sum(o.flops * n for o, n in again.work.items()) == sum(o.flops * n for o, n in elsewhere.work.items())


def test_copies_of_a_gpu_wait_for_what_they_need(monkeypatch: pytest.MonkeyPatch) -> None:
    """On streams that do nothing before they must: a wait too few takes what is not made yet, or gives garbage."""
    mine = LazyStream()
    now = [mine]

    @contextmanager
    def inside(stream: LazyStream) -> Iterator[None]:
        now.append(stream)
        yield
        now.pop()

    def copy(out: Tensor, source: Tensor) -> None:
        # `data` does not count what is written: on a GPU that counts when it is ordered.
        now[-1].enqueue(lambda: out.data.copy_(source))

    monkeypatch.setattr(torch.cuda, "Stream", LazyStream)
    monkeypatch.setattr(torch.cuda, "stream", inside)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: mine)
    monkeypatch.setattr(offload, "copy_later", copy)
    monkeypatch.setattr(offload, "_pinned", lambda tensor: torch.full_like(tensor, -1.0))
    made = HostStore(torch.device("cpu"))
    # A layer's input lives where that of the layer before the last one did.
    memory, found = [torch.zeros(8), torch.zeros(8)], torch.empty(7, 8)
    for _ in range(2):
        waiting = []
        for number in range(7):
            slot = memory[number % 2]
            mine.enqueue(lambda slot=slot, number=number: slot.data.fill_(number))
            waiting.append(made.put(slot))
        found.fill_(-2.0)
        for number in reversed(range(7)):
            tensor = made.get(waiting.pop())
            mine.enqueue(lambda number=number, tensor=tensor: found[number].copy_(tensor))
            # The memory is another tensor's from now on.
            mine.enqueue(lambda tensor=tensor: tensor.data.fill_(-3.0))
        mine.synchronize()
        assert found.tolist() == [[float(number)] * 8 for number in range(7)]
    assert made._moving is None and not made._waiting
