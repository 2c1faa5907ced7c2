"""Experts in 4 bits against models of the dequantised weights, against bitsandbytes, and from and to disk."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    GptOssConfig,
    GraniteMoeConfig,
    JetMoeConfig,
    Llama4TextConfig,
    MixtralConfig,
    PretrainedConfig,
    Qwen3MoeConfig,
)
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts

import lorica
from lorica.errors import ModelError, NotMergeableError
from lorica.methods.requantize import merge_requantized
from lorica.models.load import base_fingerprint
from lorica.quant.blockwise import dequantize, quantize
from lorica.quant.experts import QuantizedExperts, own_experts
from lorica.quant.linear import format_of, layers, num_parameters
from lorica.training.rehearsal import rehearse

IDS = torch.arange(3, 43).view(2, 20)
SMALL: dict[str, Any] = {
    "hidden_size": 32, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 4,
    "num_key_value_heads": 2, "num_experts_per_tok": 2, "vocab_size": 64,
}  # fmt: skip
CONFIGS: dict[str, PretrainedConfig] = {
    "mixtral": MixtralConfig(**SMALL, num_local_experts=4),
    "qwen3-moe": Qwen3MoeConfig(**SMALL, num_experts=4, moe_intermediate_size=24, head_dim=8),
    # Transposed, with biases.
    "gpt-oss": GptOssConfig(**SMALL, num_local_experts=4, head_dim=8),
    "granite-moe": GraniteMoeConfig(**SMALL, num_local_experts=4),
    # Without transformers' interface: a loop of linear products, and one batched product.
    "jetmoe": JetMoeConfig(**{**SMALL, "num_key_value_heads": 4}, num_local_experts=4, kv_channels=16),
    "llama4": Llama4TextConfig(**SMALL, num_local_experts=4, head_dim=8, intermediate_size_mlp=24),
}
IMPLEMENTED = ("mixtral", "qwen3-moe", "gpt-oss", "granite-moe")
GATE, DOWN = "model.layers.0.mlp.experts.{}.gate_proj.weight", "model.layers.0.mlp.experts.down_proj"
TARGETS = {"jetmoe": ["kv_proj", "input_linear", "output_linear"]}


def moe(name: str) -> Any:
    torch.manual_seed(0)
    # A copy, since a quantised model says so in its configuration.
    model = AutoModelForCausalLM.from_config(copy.deepcopy(CONFIGS[name]), dtype=torch.float32).eval()
    for parameter in experts_of(model).values():
        nn.init.normal_(parameter, std=0.2)
    return model


def experts_of(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name: p for name, p in model.named_parameters() if p.dim() == 3}


def dense(name: str, double_quant: bool = True) -> Any:
    """The plain model in float64 with every weight that is quantised replaced by the numbers that its codes mean."""
    model, quantised = moe(name), lorica.quantize(moe(name), double_quant=double_quant)
    for key, held in layers(quantised):
        parameter = model.get_parameter(held.name_in_state(key))
        parameter.data = dequantize(quantize(parameter.data, "nf4", 64, double_quant))
    if name in IMPLEMENTED:
        # The one of them that takes float64.
        model.set_experts_implementation("eager")
    return model.double()


def options(name: str) -> lorica.LoRA:
    return lorica.LoRA(rank=4, targets=TARGETS.get(name, ["q_proj", "experts"]))


def trained(model: Any, method: lorica.LoRA) -> Any:
    torch.manual_seed(1)
    lorica.adapt(model, method)
    for parameter in lorica.trainable_parameters(model).values():
        parameter.data += 0.05 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(2))
    return model


def logits_and_gradient(model: Any) -> tuple[Tensor, Tensor]:
    """Logits, and the gradient at the embedded input."""
    x = model.get_input_embeddings()(IDS).detach().requires_grad_()
    logits = model(inputs_embeds=x).logits
    logits.square().mean().backward()
    assert x.grad is not None
    return logits.detach().double(), x.grad.double()


def check_equal(model: Any, expected: Any) -> None:
    for ours, exact in zip(logits_and_gradient(model), logits_and_gradient(expected), strict=True):
        torch.testing.assert_close(ours, exact, rtol=1e-4, atol=2e-6)


@pytest.mark.parametrize("double_quant", [False, True])
def test_the_parts_are_bitsandbytes_own(double_quant: bool) -> None:
    parametrize = pytest.importorskip("bitsandbytes.nn.parametrize")
    ours, theirs = Qwen3MoeExperts(CONFIGS["qwen3-moe"]), Qwen3MoeExperts(CONFIGS["qwen3-moe"])
    for parameter in ours.parameters():
        nn.init.normal_(parameter)
    theirs.load_state_dict(ours.state_dict())
    with torch.compiler.set_stance("force_eager"):
        for name in ("gate_up_proj", "down_proj"):
            parametrize.replace_parameter_4bit(theirs, name, double_quant, "nf4", 64)
        lorica.quantize(nn.Sequential(ours), double_quant=double_quant)
        for name, held in own_experts(ours).items():
            assert torch.equal(held.dense(), getattr(theirs, name))
    mine, expected = ours.state_dict(), theirs.state_dict()
    assert mine.keys() == expected.keys()
    assert all(torch.equal(mine[key], expected[key]) for key in mine if "quant_state" not in key)


@pytest.mark.parametrize("implementation", ["eager", "grouped_mm", "batched_mm"])
@pytest.mark.parametrize("name", IMPLEMENTED)
def test_every_implementation_computes_with_the_dequantised_weights(name: str, implementation: str) -> None:
    model = lorica.quantize(moe(name))
    assert len(own_experts(model.get_submodule(next(iter(experts_of(moe(name)))).rpartition(".")[0]))) == 2
    model.set_experts_implementation(implementation)
    check_equal(model, dense(name))


@pytest.mark.parametrize("name", ["jetmoe", "llama4"])
def test_so_do_modules_with_a_forward_of_their_own(name: str) -> None:
    model = lorica.quantize(moe(name), double_quant=False)
    assert {key for key, held in layers(model) if isinstance(held, QuantizedExperts)} == experts_of(moe(name)).keys()
    check_equal(model, dense(name, double_quant=False))


@pytest.mark.parametrize("scheme", ["nf4", "int8"])
@pytest.mark.parametrize("sizes", [(32, 24), (5, 7)], ids=["whole blocks", "blocks of two experts"])
def test_it_is_read_as_a_tensor(scheme: str, sizes: tuple[int, int]) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(Own(sizes))
    want = dequantize(quantize(model[0].weight.data, scheme, 64, True))
    held = own_experts(lorica.quantize(model, scheme)[0])["weight"]
    x, ids = torch.randn(3, sizes[1]), torch.tensor([2, 0, 2])
    turned, whole = torch.randn(3, sizes[0]), torch.randn(3, 2, sizes[1])
    found = {
        "one": (held[1].dense(), want[1]),
        "linear": (nn.functional.linear(x, held[1], turned), nn.functional.linear(x, want[1], turned)),
        "matmul": (turned @ held[-1], turned @ want[-1]),
        "left": (held[0] @ x.mT, want[0] @ x.mT),
        "bmm": (torch.bmm(whole, held.transpose(1, 2)), torch.bmm(whole, want.transpose(1, 2))),
        "gathered": (torch.bmm(held[ids], whole.mT), torch.bmm(want[ids], whole.mT)),
        "expanded": (turned[:, None] @ held[ids], turned[:, None] @ want[ids]),
        "broadcast": (x @ held.mT, x @ want.mT),
        "all else": (torch.einsum("eoi,ei->eo", held, x), torch.einsum("eoi,ei->eo", want, x)),
        "slice": (held[:2], want[:2]),
    }
    for name, (ours, exact) in found.items():
        torch.testing.assert_close(ours, exact, rtol=1e-5, atol=1e-5, msg=name)
    assert held.shape == (3, *sizes) and held[ids].mT.shape == (3, *sizes[::-1]) and len(list(held)) == 3


class Own(nn.Module):
    """Experts for the name alone."""

    def __init__(self, sizes: tuple[int, int]) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(3, *sizes))


Own.__name__ = "OwnExperts"


@pytest.mark.parametrize("implementation", ["eager", "grouped_mm", "batched_mm", "lora"])
def test_no_weight_is_kept_for_backward_and_only_experts_with_rows_are_read(
    implementation: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = Qwen3MoeConfig(hidden_size=64, moe_intermediate_size=64, num_experts=4)
    config._experts_implementation = "eager" if implementation == "lora" else implementation
    module = nn.Sequential(Qwen3MoeExperts(config))
    for parameter in module.parameters():
        nn.init.normal_(parameter)
    lorica.quantize(module)
    read, product = set(), QuantizedExperts.product

    def spy(self: QuantizedExperts, x: Tensor, index: int, turned: bool) -> Tensor:
        read.add(index)
        return product(self, x, index, turned)

    monkeypatch.setattr(QuantizedExperts, "product", spy)
    monkeypatch.setattr(QuantizedExperts, "dense", lambda self: pytest.fail("the whole is dequantised"))
    if implementation == "lora":
        lorica.adapt(module, lorica.LoRA(rank=1, targets="0"))
    kept: list[Tensor] = []
    index, x = torch.tensor([[0, 2], [2, 0], [0, 2]]), torch.randn(3, 64, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        y = module[0](x, index, torch.rand(3, 2))
    y.sum().backward()
    assert x.grad is not None and x.grad.any()
    # A matrix has 4,096 elements or twice as many; six rows of 128 are the most of an activation.
    assert kept and max(t.untyped_storage().nbytes() for t in kept) <= 4 * 6 * 128
    assert read == {0, 2}


@pytest.mark.parametrize("name", CONFIGS)
def test_lora_over_them_is_lora_over_the_dequantised(name: str, tmp_path: Path) -> None:
    model, plain = lorica.quantize(moe(name)), dense(name)
    bare = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    trained(model, options(name))
    trained(plain, options(name)).double()
    check_equal(model, plain)
    ours, theirs = lorica.trainable_parameters(model), lorica.trainable_parameters(plain)
    assert ours.keys() == theirs.keys() and any("experts" in key or "linear" in key for key in ours)
    for key, parameter in ours.items():
        assert parameter.grad is not None and theirs[key].grad is not None
        torch.testing.assert_close(parameter.grad.double(), theirs[key].grad, rtol=1e-3, atol=1e-6)
    want = model(IDS).logits
    with pytest.raises(NotMergeableError, match=r"is quantised \(nf4, double_quant\)"):
        lorica.merge(model)
    lorica.save_adapter(model, tmp_path)
    assert torch.equal(lorica.load_adapter(lorica.quantize(moe(name)), tmp_path)(IDS).logits, want)
    original = lorica.load_adapter(moe(name), tmp_path)
    torch.testing.assert_close(lorica.merge(original)(IDS).logits, original(IDS).logits, rtol=1e-4, atol=1e-5)
    state = lorica.detach(model).state_dict()
    assert state.keys() == bare.keys() and all(torch.equal(state[key], bare[key]) for key in state)


@pytest.mark.parametrize("name", ["qwen3-moe", "gpt-oss", "jetmoe"])
def test_merging_into_them_is_quantising_again(name: str) -> None:
    model, adapters = lorica.quantize(moe(name)), trained(moe(name), options(name))
    trained(model, options(name))
    merged, drift = merge_requantized(model)
    deltas = {
        f"{key}.{parameter}": adapter.delta_weight(parameter).detach()
        for key, adapter in lorica.adapters(adapters).items()
        if not key.endswith(("q_proj", "kv_proj"))
        for parameter in adapter.sites
    }
    found = {key: held for key, held in layers(merged) if isinstance(held, QuantizedExperts)}
    assert deltas.keys() == found.keys() == experts_of(moe(name)).keys()
    for key, delta in deltas.items():
        exact = dequantize(quantize(moe(name).get_parameter(key).data, "nf4", 64, True)) + delta
        torch.testing.assert_close(found[key].dense(), dequantize(quantize(exact, "nf4", 64, True)))
        assert found[key].origin is None
    assert 0 < drift.error < drift.change < drift.weight
    again = lorica.quantize(moe(name))
    again.load_state_dict(merged.state_dict())
    assert torch.equal(again(IDS).logits, merged(IDS).logits)


def test_they_count_as_what_they_stand_for_and_can_be_left_out() -> None:
    plain, model = moe("qwen3-moe"), lorica.quantize(moe("qwen3-moe"))
    assert num_parameters(model) == num_parameters(plain) and format_of(model) == "nf4, double_quant"
    assert base_fingerprint(model) == base_fingerprint(plain)
    assert base_fingerprint(lorica.adapt(model, options("qwen3-moe"))) == base_fingerprint(plain)
    other = moe("qwen3-moe")
    other.model.layers[0].mlp.experts.down_proj.data[0, 0, 0] += 1
    assert base_fingerprint(lorica.quantize(other)) != base_fingerprint(plain)
    some = lorica.quantize(moe("qwen3-moe"), skip=("gate_up_proj",))
    assert own_experts(some.model.layers[0].mlp.experts).keys() == {"down_proj"}
    assert not own_experts(lorica.quantize(moe("qwen3-moe"), skip=("experts",)).model.layers[0].mlp.experts)


@pytest.mark.parametrize("double_quant", [False, True])
@pytest.mark.parametrize("name", CONFIGS)
def test_they_stream_in_and_are_saved_as_they_are(name: str, double_quant: bool, tmp_path: Path) -> None:
    moe(name).save_pretrained(tmp_path / "base")
    model, expected = (
        lorica.load_model(tmp_path / "base", dtype="float32", device="cpu", quant="nf4", double_quant=double_quant),
        lorica.quantize(moe(name), double_quant=double_quant),
    )
    assert base_fingerprint(model) == base_fingerprint(moe(name))
    expected.save_pretrained(tmp_path / "from memory")
    model.save_pretrained(tmp_path / "from disk")
    want = expected.state_dict()
    for folder in (None, "from memory", "from disk"):
        again = model if folder is None else lorica.load_model(tmp_path / folder, dtype="float32", device="cpu")
        state = again.state_dict()
        assert state.keys() == want.keys() and all(torch.equal(state[key], want[key]) for key in want), folder


def test_a_rehearsal_counts_the_bytes_that_there_are() -> None:
    model = lorica.quantize(moe("qwen3-moe"))
    found = rehearse(
        CONFIGS["qwen3-moe"], options("qwen3-moe"), dtype=torch.float32, lengths=[20, 20], quant="nf4", padded=True
    )
    tensors = (*model.parameters(), *model.buffers())
    assert found.parts.weights == sum(t.numel() * t.element_size() for t in tensors)
    assert found.num_parameters == num_parameters(lorica.adapt(model, options("qwen3-moe")))


def test_what_is_left_out_stays_so_on_disk(tmp_path: Path) -> None:
    model = lorica.quantize(moe("mixtral"), skip=("lm_head", "down_proj"))
    model.save_pretrained(tmp_path)
    again = lorica.load_model(tmp_path, dtype="float32", device="cpu")
    assert own_experts(again.model.layers[0].mlp.experts).keys() == {"gate_up_proj"}
    torch.testing.assert_close(again(IDS).logits, model(IDS).logits, rtol=1e-5, atol=1e-5)


def changed(folder: Path, name: str, change: Callable[[dict[str, Tensor]], Any]) -> Path:
    moe(name).save_pretrained(folder)
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.mark.parametrize(
    ("name", "change", "words"),
    [
        ("qwen3-moe", lambda t: t.pop(GATE.format(3)), r"gate_up_proj: the checkpoint has 3 of .*gate_proj.*; 4 are"),
        ("qwen3-moe", lambda t: t[GATE.format(2)].fill_(torch.nan), r"gate_up_proj: expert 2: .*NaN"),
        (
            "qwen3-moe",
            lambda t: [t.pop(GATE.format(i)) for i in range(4)],
            r"experts\.\*\.up_proj\.weight cannot be merged",
        ),
        (
            "gpt-oss",
            lambda t: t.pop(DOWN),
            r"lacks 1 of the model's weights: .*\.experts\.down_proj",
        ),
        ("gpt-oss", lambda t: t.update({DOWN: torch.zeros(3, 24, 32)}), r"down_proj: .*\[3, 24, 32\] .*\[4, 24, 32\]"),
    ],
)
def test_a_checkpoint_whose_experts_are_wrong_is_refused(
    name: str, change: Callable[[dict[str, Tensor]], Any], words: str, tmp_path: Path
) -> None:
    with pytest.raises(ModelError, match=words):
        lorica.load_model(changed(tmp_path, name, change), quant="nf4", device="cpu")
