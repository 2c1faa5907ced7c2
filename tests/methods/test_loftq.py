"""LoftQ against PEFT's numbers and the theorem of Eckart and Young; and its adapters stay with the quantised base."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

import lorica
from lorica.errors import AdapterError, ConfigError, NotMergeableError, TargetError
from lorica.methods import inits
from lorica.methods.lora import LoRA
from lorica.methods.lora_kinds import LoraLinear
from lorica.models.load import load_model, load_tokenizer
from lorica.quant.linear import QuantizedLinear, format_of, layers
from tests.interop.small_models import IDS, gpt2, llama, outputs, randomise

LOFTQ = LoRA(rank=4, alpha=12, init="loftq")
MODELS: dict[str, Callable[[], Any]] = {"llama": llama, "gpt2": gpt2}


def adapted(model: Any, options: LoRA = LOFTQ, **quant: Any) -> Any:
    return lorica.adapt(lorica.quantize(model, method=options, **quant), options)


def trained(model: Any, options: LoRA = LOFTQ) -> Any:
    model = adapted(model, options)
    randomise(lorica.trainable_parameters(model).values(), 0.05)
    return model


def dense(layer: nn.Module) -> Tensor:
    """The weight [out, in] in float64."""
    weight = layer.weight.detach().double()  # type: ignore[operator]
    return weight.t() if isinstance(layer, Conv1D) else weight


@pytest.mark.parametrize("double_quant", [False, True])
def test_the_product_is_that_of_peft(double_quant: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    bnb = pytest.importorskip("bitsandbytes")
    from peft.utils.loftq_utils import _loftq_init_new

    torch.manual_seed(0)
    layer = nn.Linear(96, 64, bias=False)
    stored = bnb.nn.Params4bit(
        layer.weight.detach().clone(), requires_grad=False, compress_statistics=double_quant, quant_type="nf4"
    ).to("cpu")
    with monkeypatch.context() as patch:
        # It computes on a GPU, and nowhere else.
        to = torch.Tensor.to
        patch.setattr(torch.Tensor, "to", lambda self, *args, device=None, **more: to(self, *args, **more))
        theirs_b, theirs_a = reversed(_loftq_init_new(stored, layer.weight.detach(), num_bits=4, reduced_rank=8))
    model = adapted(nn.Sequential(layer), LoRA(rank=8, alpha=24, init="loftq"), double_quant=double_quant)
    # Theirs has no scale.
    ours = 3.0 * model[0].lora_b.detach() @ model[0].lora_a.detach()
    assert ours.norm() > 0.1
    torch.testing.assert_close(ours, theirs_b @ theirs_a, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("rslora", [False, True])
@pytest.mark.parametrize("make", MODELS.values(), ids=MODELS)
def test_each_layer_is_as_near_to_its_original_as_its_rank_allows(make: Callable[[], Any], rslora: bool) -> None:
    """Eckart and Young: what is left has the error's other singular values. The codes are those without LoftQ."""
    options = LoRA(rank=4, alpha=6, init="loftq", rslora=rslora, rank_pattern={"down_proj|c_proj": 7})
    original, plain, model = make(), lorica.quantize(make()), adapted(make(), options)
    found = {name: a for name, a in lorica.adapters(model).items() if isinstance(a, LoraLinear)}
    assert len(found) == len(list(layers(plain))) > 7
    for name, adapter in found.items():
        weight, quantised = dense(original.get_submodule(name)), dense(plain.get_submodule(name))
        assert torch.equal(dense(adapter.base), quantised) and adapter.mends
        rank, scale = options.rank_and_scale(name)
        assert adapter.lora_a.shape[0] == rank == (7 if "down_proj" in name or "c_proj" in name else 4)
        left = weight - quantised - scale * adapter.lora_b.detach().double() @ adapter.lora_a.detach().double()
        expected = torch.linalg.svdvals(weight - quantised)[rank:]
        torch.testing.assert_close(torch.linalg.svdvals(left)[: len(expected)], expected, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("shape", [(20, 12), (12, 20), (12, 12)])
def test_both_halves_share_the_singular_values(shape: tuple[int, int]) -> None:
    torch.manual_seed(0)
    error = torch.randn(shape)
    lora_a, lora_b = inits.loftq(error, 4, None)
    u, s, vh = torch.linalg.svd(error.double())
    torch.testing.assert_close((lora_b @ lora_a).double(), (u[:, :4] * s[:4]) @ vh[:4], rtol=1e-4, atol=1e-5)
    for gram in (lora_a @ lora_a.T, lora_b.T @ lora_b):
        torch.testing.assert_close(gram.double(), torch.diag(s[:4]), rtol=1e-4, atol=1e-4)
    nothing = inits.loftq(torch.zeros(shape), 4, None)
    assert all(bool(half.isfinite().all()) for half in nothing) and not (nothing[1] @ nothing[0]).any()


def test_few_iterations_find_nearly_all() -> None:
    torch.manual_seed(0)
    error = torch.rand(192, 128) - 0.5
    exact, fast = (inits.loftq(error, 16, niter) for niter in (None, 4))
    left, near = ((error - b @ a).norm() for a, b in (exact, fast))
    assert left <= near < left + 0.1 * (error.norm() - left)
    assert inits.loftq(error[:5], 16, 2)[0].shape == (5, 128), "a rank that there is not is refused later, by name"


def test_a_trained_model_is_nearer_to_its_original() -> None:
    """The embedded base; twice the rank takes away more."""
    text = "Once there was a small town by the sea. Every morning the baker opened his shop and sold his bread. "
    ids = torch.tensor([load_tokenizer("embedded")(4 * text).input_ids[:64]])
    load = partial(load_model, "embedded", dtype="float32", device="cpu")
    with torch.no_grad():
        wanted = load()(ids).logits.double().log_softmax(-1)

    def divergence(model: Any) -> float:
        with torch.no_grad():
            found = model(ids).logits.double().log_softmax(-1)
        return float((wanted.exp() * (wanted - found)).sum(-1).mean())

    kl = [divergence(load(quant="nf4"))]
    for rank in (32, 64):
        options = LoRA(rank=rank, init="loftq", svd_niter=2)
        kl.append(divergence(lorica.adapt(load(quant="nf4", method=options), options)))
    assert kl[2] < kl[1] < 0.85 * kl[0] and kl[2] < 0.6 * kl[0], kl


def test_loading_starts_as_quantising_does(tmp_path: Path) -> None:
    llama().save_pretrained(tmp_path / "base")
    loaded = lorica.adapt(
        load_model(tmp_path / "base", dtype="float32", device="cpu", quant="nf4", method=LOFTQ), LOFTQ
    )
    ours, theirs = lorica.trainable_parameters(loaded), lorica.trainable_parameters(adapted(llama()))
    assert ours.keys() == theirs.keys() and all(torch.equal(p, theirs[name]) for name, p in ours.items())
    # What is kept for the adapters is theirs now.
    assert all(layer.mended is None for _, layer in layers(loaded))


def test_layers_that_no_target_names_are_not_decomposed(tmp_path: Path) -> None:
    options = LoRA(rank=4, init="loftq", targets=("q_proj", "lm_head", "embed_tokens"))
    model = lorica.quantize(llama(), method=options)
    assert {name.rsplit(".", 1)[1] for name, layer in layers(model) if layer.mended is not None} == {"q_proj"}
    found = lorica.adapters(lorica.adapt(model, options))
    assert {name.rsplit(".", 1)[-1]: a.mends for name, a in found.items()} == {
        "q_proj": True, "lm_head": False, "embed_tokens": False,
    }  # fmt: skip
    # In 16 or 32 bits nothing was taken, and nothing is given.
    head = found["lm_head"]
    assert isinstance(head, LoraLinear) and not head.lora_b.any() and head.lora_a.any()
    with pytest.raises(TargetError, match="Nearest names: q_proj"):
        lorica.quantize(llama(), method=LoRA(init="loftq", targets="q_prok"))
    llama().save_pretrained(tmp_path / "base")
    with pytest.raises(TargetError, match="Nearest names: q_proj"):
        load_model(tmp_path / "base", quant="nf4", method=LoRA(init="loftq", targets="q_prok"))


@pytest.mark.parametrize("make", MODELS.values(), ids=MODELS)
def test_a_folder_gives_the_same_outputs_over_the_same_codes_alone(make: Callable[[], Any], tmp_path: Path) -> None:
    model = trained(make())
    ours = outputs(model)
    lorica.save_adapter(model, tmp_path / "adapter")
    fresh = lorica.load_adapter(lorica.quantize(make()), tmp_path / "adapter")
    assert torch.equal(outputs(fresh), ours)
    # What was loaded is saved as what it is.
    lorica.save_adapter(fresh, tmp_path / "again")
    for folder in ("adapter", "again"):
        with pytest.raises(AdapterError, match=r"in nf4, double_quant alone, and this one is not quantised.*quant=nf4"):
            lorica.load_adapter(make(), tmp_path / folder)
        with pytest.raises(AdapterError, match=r"this one is nf4\. Load it .*double_quant=true"):
            lorica.load_adapter(lorica.quantize(make(), double_quant=False), tmp_path / folder)
    # One that started otherwise fits both, as ever.
    lorica.save_adapter(lorica.adapt(lorica.quantize(make()), LoRA(rank=4)), tmp_path / "kaiming")
    lorica.load_adapter(make(), tmp_path / "kaiming")


def test_peft_reads_it_over_bitsandbytes(tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes")
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    llama().save_pretrained(tmp_path / "base")
    model = trained(llama())
    lorica.save_adapter(model, tmp_path / "adapter")
    config = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.float32,
    )
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base", quantization_config=config, dtype=torch.float32)
    theirs = outputs(PeftModel.from_pretrained(base, tmp_path / "adapter").eval())
    torch.testing.assert_close(theirs, outputs(model), rtol=1e-4, atol=1e-4)
    assert (outputs(lorica.quantize(llama())) - outputs(model)).abs().max() > 1e-2


@pytest.mark.parametrize("make", MODELS.values(), ids=MODELS)
def test_it_is_merged_into_what_the_codes_stand_for(make: Callable[[], Any], tmp_path: Path) -> None:
    options = LoRA(rank=4, init="loftq", targets="q_proj|c_fc", alpha=6)
    model = trained(make(), options)
    merged = lorica.merge(model)
    torch.testing.assert_close(outputs(merged), outputs(model), rtol=1e-4, atol=1e-4)
    assert format_of(merged) is None and format_of(model) == "nf4, double_quant", "the adapted model stays as it was"
    assert not hasattr(merged.config, "quantization_config") and hasattr(model.config, "quantization_config")
    original = make()
    for (name, ours), theirs in zip(merged.named_modules(), original.modules(), strict=True):
        assert type(ours) is type(theirs), name
    for name, adapter in lorica.adapters(model).items():
        assert isinstance(adapter, LoraLinear)
        expected = dense(adapter.base) + 1.5 * adapter.lora_b.detach().double() @ adapter.lora_a.detach().double()
        torch.testing.assert_close(dense(merged.get_submodule(name)), expected, rtol=1e-5, atol=1e-6)
    # It is a model like any other.
    merged.save_pretrained(tmp_path / "merged")
    again = type(original).from_pretrained(tmp_path / "merged")
    assert torch.equal(outputs(again.eval()), outputs(merged))


def test_other_starts_are_still_merged_into_the_original_alone() -> None:
    with pytest.raises(NotMergeableError, match="load that without quant"):
        lorica.merge(lorica.adapt(lorica.quantize(llama()), LoRA(rank=4)))


def test_what_was_not_kept_cannot_be_started_from(tmp_path: Path) -> None:
    with pytest.raises(TargetError, match=r"none of the 14 targets is quantised\. Load the base with model\.quant=nf4"):
        lorica.adapt(llama(), LOFTQ)
    with pytest.raises(ConfigError, match=r"what quantising took from model\.layers\.0\.\S+ is not known.*method=opt"):
        lorica.adapt(lorica.quantize(llama()), LOFTQ)
    model = adapted(llama())
    with pytest.raises(ConfigError, match="load it anew"):
        lorica.adapt(lorica.detach(model), LOFTQ)
    lorica.quantize(llama()).save_pretrained(tmp_path / "stored")
    stored = load_model(tmp_path / "stored", dtype="float32", device="cpu", quant="nf4", method=LOFTQ)
    with pytest.raises(ConfigError, match="A base that is stored quantised does not hold it"):
        lorica.adapt(stored, LOFTQ)


def test_another_rank_than_was_kept() -> None:
    model = lorica.quantize(llama(), method=LoRA(rank=6, init="loftq"))
    with pytest.raises(ConfigError, match="was loaded for rank 6, and rank 8 is asked for"):
        lorica.adapt(model, LoRA(rank=8, init="loftq"))
    # Singular vectors come in order: a smaller one is there. The scale is the adapter's own.
    ours, theirs = (lorica.adapters(m) for m in (lorica.adapt(model, LOFTQ), adapted(llama())))
    for name, adapter in ours.items():
        other = theirs[name]
        assert isinstance(adapter, LoraLinear) and isinstance(other, LoraLinear)
        torch.testing.assert_close(adapter.delta_weight(), other.delta_weight(), rtol=1e-4, atol=1e-6)
    with pytest.raises(TargetError, match=r"init loftq: rank 40 is more than \S+ has, \[32, 32\]"):
        adapted(llama(), LoRA(rank=40, init="loftq"))


def test_options_that_it_does_not_go_with() -> None:
    slices = {"q_proj": {"sizes": (1, 1), "train": (0,)}}
    with pytest.raises(ConfigError, match="init loftq starts from a whole weight"):
        LoRA(init="loftq", slices=slices)
    assert LoRA(init="loftq", svd_niter=4).svd_niter == 4


def test_a_restart_keeps_it(tmp_path: Path) -> None:
    model = trained(llama())
    before = outputs(model)
    for adapter in lorica.adapters(model).values():
        assert len(adapter.restart()) == 2 and isinstance(adapter.base, QuantizedLinear)
    torch.testing.assert_close(outputs(model), before, rtol=1e-5, atol=1e-5)
    lorica.save_adapter(model, tmp_path / "adapter")
    again = lorica.load_adapter(lorica.quantize(llama()), tmp_path / "adapter")
    torch.testing.assert_close(outputs(again, IDS), before, rtol=1e-5, atol=1e-5)
