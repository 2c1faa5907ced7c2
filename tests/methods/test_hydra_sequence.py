"""Gates of a sample so far: against plain loops, over packed, padded and cached batches."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import (
    AutoModelForSeq2SeqLM,
    BertConfig,
    BertModel,
    GPT2Config,
    GPT2LMHeadModel,
    MistralConfig,
    MistralForCausalLM,
    T5Config,
)
from transformers.cache_utils import DynamicCache

import lorica
from lorica.data.packing import Batch
from lorica.errors import ConfigError, TargetError
from lorica.evaluate.generation import generate
from lorica.methods.hydra import HydraLoRA
from lorica.methods.hydra_sequence import PastGates, running_mean
from lorica.models.load import equip

IDS = torch.randint(4, 64, (3, 10), generator=torch.Generator().manual_seed(5))


def adapted(model: Any, **fields: Any) -> Any:
    torch.manual_seed(0)
    lorica.adapt(model.eval(), HydraLoRA(**{"rank": 4, "num_heads": 3, "routing": "sequence", **fields}))
    for parameter in lorica.trainable_parameters(model).values():
        nn.init.normal_(parameter, std=0.3)
    return model


@pytest.fixture
def model(tiny_llama: Any) -> Any:
    return adapted(tiny_llama())


def gpt2() -> Any:
    torch.manual_seed(0)
    return GPT2LMHeadModel(GPT2Config(n_embd=32, n_layer=2, n_head=4, vocab_size=64, bos_token_id=0, eos_token_id=2))


def mistral() -> Any:
    """Every layer with a window of four tokens."""
    torch.manual_seed(0)
    shape = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    return MistralForCausalLM(MistralConfig(**shape, num_key_value_heads=2, vocab_size=64, sliding_window=4))


def packed(samples: list[Tensor]) -> dict[str, Any]:
    """One row with borders and positions that restart."""
    lengths = [len(ids) for ids in samples]
    borders = torch.tensor([0, *lengths]).cumsum(0).int()
    return {
        "input_ids": torch.cat(samples)[None],
        "position_ids": torch.cat([torch.arange(n) for n in lengths])[None],
        "cu_seq_lens_q": borders, "cu_seq_lens_k": borders,
        "max_length_q": max(lengths), "max_length_k": max(lengths),
    }  # fmt: skip


def test_the_mean_is_that_of_a_loop() -> None:
    logits = torch.randn(2, 6, 3, generator=torch.Generator().manual_seed(0))
    want = torch.stack([logits[:, : t + 1].mean(1) for t in range(6)], 1)
    torch.testing.assert_close(running_mean(logits), want)


def test_a_layer_gates_by_the_mean_input_so_far(model: Any) -> None:
    inputs: list[Tensor] = []
    seen: list[Tensor] = []
    layer = lorica.adapters(model)["model.layers.1.mlp.down_proj"]
    layer.base.register_forward_pre_hook(lambda _, args: inputs.append(args[0].view(3, 10, -1)))
    layer.watch = seen.append
    model(IDS)
    (x,) = inputs
    for t in range(10):
        want = (x[:, : t + 1].double().mean(1) @ layer.router.double().T).softmax(-1)
        torch.testing.assert_close(seen[0].view(3, 10, -1)[:, t].double(), want, rtol=1e-4, atol=1e-5)


def test_it_is_not_the_gate_of_the_token_alone(tiny_llama: Any, model: Any) -> None:
    by_token = adapted(tiny_llama(), routing="token")
    a, b = model(IDS).logits, by_token(IDS).logits
    # At the first token the two are the same.
    torch.testing.assert_close(a[:, 0], b[:, 0])
    assert (a[:, 3:] - b[:, 3:]).abs().max() > 1e-2


@pytest.mark.parametrize("with_borders", [True, False])
def test_packed_samples_are_as_alone(tiny_llama: Any, with_borders: bool) -> None:
    model = adapted(equip(tiny_llama()))
    samples = [IDS[0, :4], IDS[1], IDS[2, :7], torch.tensor([5])]
    inputs = packed(samples)
    if not with_borders:
        model.set_attn_implementation("sdpa")
        inputs = {"input_ids": inputs["input_ids"], "position_ids": inputs["position_ids"], "use_cache": False}
    logits = model(**inputs).logits[0].split([len(ids) for ids in samples])
    for ids, got in zip(samples, logits, strict=True):
        torch.testing.assert_close(got, model(ids[None]).logits[0], rtol=1e-4, atol=1e-5)


def test_in_a_packed_row_no_later_token_changes_an_earlier_output(tiny_llama: Any) -> None:
    model = adapted(equip(tiny_llama()))
    samples = [IDS[0, :6], IDS[1, :5], IDS[2]]
    changed = [samples[0], torch.cat([samples[1][:3], samples[1][3:] - 1]), samples[2].flip(0)]
    before, after = (model(**packed(s)).logits[0] for s in (samples, changed))
    assert torch.equal(before[:9], after[:9])
    assert (before[9:] - after[9:]).abs().max() > 1e-2


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_counts_for_nothing(model: Any, side: str) -> None:
    lengths = [10, 4, 7]
    ids, mask = torch.full((3, 10), 3), torch.zeros(3, 10, dtype=torch.long)
    for row, length in enumerate(lengths):
        at = slice(10 - length, 10) if side == "left" else slice(0, length)
        ids[row, at], mask[row, at] = IDS[row, :length], 1
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    logits = model(input_ids=ids, attention_mask=mask, position_ids=positions).logits
    for row, length in enumerate(lengths):
        alone = model(IDS[row : row + 1, :length]).logits[0]
        torch.testing.assert_close(logits[row][mask[row].bool()], alone, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("routing", ["token", "sequence"])
@pytest.mark.parametrize("make", ["llama", "gpt2", "mistral"])
def test_a_kv_cache_gives_what_the_whole_forward_gives(tiny_llama: Any, make: str, routing: str) -> None:
    model = adapted({"llama": tiny_llama, "gpt2": gpt2, "mistral": mistral}[make](), routing=routing)
    want = model(IDS).logits
    for cuts in ([10], [4, 3, 1, 1, 1], [1] * 10):
        cache, got = DynamicCache(config=model.config), []
        for piece in IDS.split(cuts, 1):
            got.append(model(input_ids=piece, past_key_values=cache, use_cache=True).logits)
        torch.testing.assert_close(torch.cat(got, 1), want, rtol=1e-4, atol=1e-5)
    # A cache that the model makes itself.
    first = model(IDS[:, :6], use_cache=True)
    rest = model(IDS[:, 6:], past_key_values=first.past_key_values).logits
    torch.testing.assert_close(rest, want[:, 6:], rtol=1e-4, atol=1e-5)


class _NoTokenizer:
    pad_token_id = 3


@pytest.mark.parametrize("routing", ["token", "sequence"])
def test_batched_generation_is_that_of_the_whole_forward(tiny_llama: Any, routing: str) -> None:
    model = adapted(tiny_llama(), routing=routing)
    prompts = [IDS[0].tolist(), IDS[1, :3].tolist(), IDS[2, :6].tolist()]
    got = generate(model, _NoTokenizer(), prompts, max_new_tokens=6, stop_ids=[], batch_size=3)  # type: ignore[arg-type]
    for prompt, answer in zip(prompts, got, strict=True):
        ids = list(prompt)
        for _ in range(6):
            ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
        assert ids[len(prompt) :] == answer


def test_beams_take_their_gates_along(tiny_llama: Any) -> None:
    model = adapted(tiny_llama())
    output = model.generate(
        IDS[:2], attention_mask=torch.ones_like(IDS[:2]), max_new_tokens=6, num_beams=3, do_sample=False,
        num_return_sequences=3, return_dict_in_generate=True, output_scores=True, eos_token_id=None, pad_token_id=3,
        length_penalty=0.0,
    )  # fmt: skip
    # A beam's score is the log-probability of its tokens, which a plain forward gives too.
    logits = model(output.sequences).logits.log_softmax(-1)
    taken = logits[:, :-1].gather(2, output.sequences[:, 1:, None])[..., 0]
    torch.testing.assert_close(output.sequences_scores, taken[:, 9:].sum(1), rtol=1e-4, atol=1e-4)


def test_what_a_cache_does_to_its_rows_is_done_to_the_sums() -> None:
    past = PastGates()
    past.add("a", torch.arange(12.0).view(2, 3, 2), None)
    assert past.sums["a"].tolist() == [[6, 9, 3], [24, 27, 3]]
    past.batch_repeat_interleave(2)
    past.reorder_cache(torch.tensor([0, 2, 3, 1]))
    assert past.sums["a"][:, 0].tolist() == [6, 24, 24, 6]
    with pytest.raises(ConfigError, match="assisted"):
        past.crop(1)
    past.reset()
    assert not past.sums


def test_a_cache_of_tokens_that_nobody_saw_is_refused(tiny_llama: Any, model: Any) -> None:
    foreign = tiny_llama().eval()(IDS, use_cache=True).past_key_values
    with pytest.raises(ConfigError, match="empty cache"):
        model(IDS, past_key_values=foreign)


@pytest.mark.parametrize("packs", [True, False])
def test_training_is_the_same_under_activation_checkpointing(tiny_llama: Any, packs: bool) -> None:
    def gradients(checkpoints: bool) -> dict[str, Tensor]:
        model = adapted(equip(tiny_llama())).train()
        if checkpoints:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        samples = [IDS[0, :4], IDS[1], IDS[2, :7]]
        inputs = packed(samples) if packs else {"input_ids": IDS}
        model(**inputs, use_cache=False).logits.square().mean().backward()
        return {name: p.grad for name, p in lorica.trainable_parameters(model).items()}

    want, got = gradients(False), gradients(True)
    for name in want:
        torch.testing.assert_close(got[name], want[name], msg=name)


def test_an_encoder_may_gate_by_sequence_too() -> None:
    torch.manual_seed(0)
    config = BertConfig(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, vocab_size=64)
    model = adapted(BertModel(config), targets=r"encoder\..*(query|value|dense)")
    mask = torch.ones_like(IDS)
    padded = F.pad(IDS, (0, 3)), F.pad(mask, (0, 3))
    want = model(input_ids=IDS, attention_mask=mask).last_hidden_state
    got = model(input_ids=padded[0], attention_mask=padded[1]).last_hidden_state[:, :10]
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)


def test_a_plain_module_takes_its_last_but_one_dimension_for_a_sample() -> None:
    model = adapted(nn.Sequential(nn.Linear(6, 5)))
    x = torch.randn(2, 4, 6)
    for row in x:
        for t in range(4):
            torch.testing.assert_close(model(x[:, : t + 1])[:, t], model(x)[:, t])
        torch.testing.assert_close(model(row[None])[0], model(row))


def test_layers_that_see_other_rows_are_refused(model: Any) -> None:
    model(IDS)
    with pytest.raises(ConfigError, match=r"7 rows.*3 rows of 10 tokens.*routing token"):
        lorica.adapters(model)["model.layers.0.mlp.up_proj"](torch.randn(7, 32))


def test_masks_that_are_no_rows_of_tokens_are_refused(model: Any) -> None:
    with pytest.raises(ConfigError, match="attention_mask"):
        model(IDS, attention_mask=torch.ones(3, 1, 10, 10))


def test_encoder_decoders_are_refused() -> None:
    torch.manual_seed(0)
    shape = {"d_model": 32, "d_ff": 48, "num_layers": 1, "num_heads": 4, "d_kv": 8, "vocab_size": 64}
    t5 = AutoModelForSeq2SeqLM.from_config(T5Config(**shape, decoder_start_token_id=0))
    with pytest.raises(TargetError, match="encoder-decoder"):
        lorica.adapt(t5, HydraLoRA(routing="sequence"))
    assert not lorica.adapters(t5)
    model = lorica.adapt(t5, HydraLoRA(rank=2, balance_loss=0.1)).train()
    model(input_ids=IDS, decoder_input_ids=IDS)
    assert all(a.auxiliary_loss() is not None for a in lorica.adapters(model).values())


def test_saved_and_read_back(tiny_llama: Any, model: Any, tmp_path: Any) -> None:
    lorica.save_adapter(model, tmp_path / "a")
    again = lorica.load_adapter(tiny_llama().eval(), tmp_path / "a")
    assert torch.equal(again(IDS).logits, model(IDS).logits)


def test_gradients_of_a_packed_row_are_the_sum_of_its_samples(tiny_llama: Any) -> None:
    def gradients(batches: list[dict[str, Any]]) -> dict[str, Tensor]:
        model = adapted(equip(tiny_llama()))
        for inputs in batches:
            model(**inputs, use_cache=False).logits.square().sum().backward()
        return {name: p.grad for name, p in lorica.trainable_parameters(model).items()}

    samples = [IDS[0, :4], IDS[1], IDS[2, :7]]
    together = gradients([packed(samples)])
    alone = gradients([{"input_ids": ids[None]} for ids in samples])
    for name in alone:
        torch.testing.assert_close(together[name], alone[name], rtol=1e-3, atol=1e-3, msg=name)


def test_a_batch_has_what_is_read() -> None:
    """The names by which training hands the borders over."""
    batch = Batch(IDS[:1], IDS[:1], IDS[:1], torch.tensor([0, 4, 10], dtype=torch.int32), None, 6, 2, 10, 10)
    assert {"cu_seq_lens_q", "position_ids", "input_ids"} <= batch.model_inputs().keys()
