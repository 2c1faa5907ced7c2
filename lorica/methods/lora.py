"""LoRA: a frozen weight plus a trained low-rank update (Hu et al. 2021, arXiv 2106.09685).

    y = W x + b + s B A x,    A [rank, in],  B [out, rank],  s = alpha / rank   (rsLoRA: alpha / sqrt(rank))

A and B are float32 masters and the product runs in the input's dtype, so a bfloat16 base trains without float32 matrix
products and without losing small updates. The update is added inside the second matrix product (`addmm`), which saves
one pass over y. Dropout acts on x, on the adapter's branch only. Here stand the options and PEFT's fields; the adapters
are in `lora_kinds.py` (linear layers, convolutions, embeddings), `lora_weights.py` (nn.MultiheadAttention, and every
module that reads its weights itself) and `lora_experts.py` (expert tensors).

What it gives up: slices, restarts, pissa, olora and lora_ga are read back from a folder as the plain LoRA that they
were saved as: equal logits, but further training knows neither the blocks nor the start.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BeforeValidator, Field
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from lorica.errors import AdapterError, ConfigError, TargetError
from lorica.methods import inits
from lorica.methods.lora_conv import LoraConv, check_groups
from lorica.methods.lora_experts import LoraExperts, is_experts
from lorica.methods.lora_kinds import LoraEmbedding, LoraLinear
from lorica.methods.lora_weights import LoraAttention, LoraParameters, LoraWeights, matrices, parameter_names
from lorica.methods.low_rank import LowRankOptions, matches, options_from_peft
from lorica.methods.method import Adapter, Names, StartBatches, StartLoss, unsupported_kind
from lorica.methods.selection import resolve_targets
from lorica.methods.starts import STARTS
from lorica.quant.linear import QuantizedLinear
from lorica.quant.weight import Mender

# Fields of PEFT's that change what the adapter computes, with the values that mean "not used".
_UNUSED_BY_PEFT: dict[str, tuple[Any, ...]] = {
    "alora_invocation_tokens": (None,),
    "arrow_config": (None,),
    "bias": ("none", None),
    "layer_replication": (None, []),
    "megatron_config": (None,),
    "modules_to_save": (None, []),
    "monteclora_config": (None,),
    "trainable_token_indices": (None, [], {}),
    "use_bdlora": (False, None),
    "use_dora": (False, None),
    "use_qalora": (False, None),
    "velora_config": (None,),
}
# These change the base's weights when they start, so the folder alone does not say what was trained.
_BASE_CHANGING_INITS = ("pissa", "olora", "loftq", "lora_ga", "corda", "kasa")


def _slices(value: object) -> object:
    if isinstance(value, Mapping) and value.keys() == {"sizes", "train"}:
        sizes, train = value["sizes"], value["train"]
        whole = all(isinstance(v, list | tuple) and v and all(type(n) is int for n in v) for v in (sizes, train))
        if whole and min(sizes) >= 1 and len(set(train)) == len(train) and set(train) <= set(range(len(sizes))):
            return {"sizes": tuple(sizes), "train": tuple(sorted(train))}
    raise ValueError(
        "must be as {sizes: [1, 1, 1], train: [0, 2]}: the slices' relative sizes, and which are trained, from 0"
    )


Slices = Annotated[Mapping[str, tuple[int, ...]], BeforeValidator(_slices)]


@dataclass(frozen=True)
class LoRA(LowRankOptions):
    """Options of LoRA.

    Attributes:
        init: how the pair starts (see `inits.py`); the output is unchanged at the start by all of them but `loftq`.
            `pissa` and `olora` start from the base's weight, `eva` and `lora_ga` from data (see `starts.py`), linear
            layers alone; an embedding keeps its own start. `loftq` starts a quantised layer from what quantising took
            from it, which the base must have been loaded with: `load_model(base, quant="nf4", method=options)`. Other
            layers start as with `kaiming` then.
        init_batches: how many batches of the data `eva` and `lora_ga` look at, of `train.batch_tokens` each.
        svd_niter: iterations of the randomised SVD of `pissa` and `loftq`, None for the exact one.
        bias: `lora_only` trains the biases of the adapted layers too.
        lora_bias: B has a bias, [out], that is scaled as the product is. Merging needs a base with a bias.
        slices: fused projections of which only some slices of the output are trained, by pattern; the first match
            counts. `{"c_attn": {"sizes": [1, 1, 1], "train": [0, 2]}}` is Q and V of thirds; with grouped queries the
            sizes are the numbers of heads, `[32, 8, 8]`. Each trained slice has a pair of `rank` of its own.
        target_parameters: which parameters of a targeted module, where it reads them itself: patterns of their whole
            names, `experts.down_proj`. Empty: all its 3-D tensors, the experts of a MoE block. `all-linear` leaves
            experts out, as PEFT's does, though they hold most weights: name them, `[all-linear, experts]`. Patterns of
            ranks and alphas are compared with the parameter's name there.
    """

    linear_kinds: ClassVar[tuple[type[nn.Module], ...]] = (nn.Linear, Conv1D)
    other_kinds: ClassVar[tuple[type[nn.Module], ...]] = (
        nn.Embedding, nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.MultiheadAttention,
    )  # fmt: skip
    peft_type: ClassVar[str | None] = "LORA"

    can_restart: ClassVar[bool] = True

    init: Annotated[
        Literal["kaiming", "gaussian", "pissa", "olora", "loftq", "eva", "lora_ga"],
        Field(
            description="how the pair starts: at random with lora_b zero, or from the weight's SVD (pissa) or QR "
            "(olora), what model.quant takes from it (loftq), the activations (eva) or the gradient (lora_ga)"
        ),
    ] = "kaiming"
    init_batches: Annotated[
        int, Field(ge=1, le=65536, description="batches of batch_tokens that init eva or lora_ga looks at")
    ] = 8
    svd_niter: Annotated[
        Annotated[int, Field(ge=0, le=4096)] | None,
        Field(description="iterations of a randomised SVD for init pissa or loftq, much faster; null: exact"),
    ] = None
    bias: Annotated[
        Literal["none", "lora_only"], Field(description="lora_only: the biases of the adapted layers are trained too")
    ] = "none"
    lora_bias: Annotated[bool, Field(description="whether lora_b has a bias; merging needs a layer that has one")] = (
        False
    )
    slices: Annotated[
        Mapping[str, Slices],
        Field(description="fused layers to train in part: {name or regex: {sizes: [1, 1, 1], train: [0, 2]}}"),
    ] = field(default_factory=dict)
    target_parameters: Annotated[
        Names,
        Field(description="which parameters of modules such as experts: patterns; empty: all their 3-D tensors"),
    ] = ()

    def __post_init__(self) -> None:
        super().__post_init__()
        faults = []
        if self.slices and self.init not in inits.INITS:
            faults.append(f"init {self.init} starts from a whole weight; with slices use kaiming or gaussian")
        if self.svd_niter is not None and self.init not in ("pissa", "loftq"):
            faults.append(f"svd_niter is {self.svd_niter}, but init {self.init} takes no SVD; pissa and loftq do")
        if faults:
            raise ConfigError("LoRA: " + "; ".join(faults) + ".")

    def takes(self, module: nn.Module) -> bool:
        """Whether `module` is of a kind that can be wrapped, or has expert tensors, or parameters that may be named."""
        return super().takes(module) or bool(matrices(module, 2 if self.target_parameters else 3))

    def to_peft(self, found: Mapping[str, Any], model: nn.Module) -> dict[str, Any]:
        scales = {key: value for name, a in found.items() for key, value in a.ranks_and_scales(name).items()}
        parameters = [p for name, a in found.items() if isinstance(a, LoraWeights) for p in a.target_parameters(name)]
        return {
            **self.peft_scales(scales),
            # PEFT's pissa and olora would change the base again; what is saved is the plain LoRA that ours equals.
            "init_lora_weights": "gaussian" if self.init == "gaussian" else True,
            "fan_in_fan_out": any(isinstance(a.base, Conv1D) for a in found.values()),
            "target_parameters": parameters or None,
            "bias": self.bias,
            "lora_bias": self.lora_bias,
            "use_dora": False,
        }

    @classmethod
    def is_peft(cls, config: Mapping[str, Any]) -> bool:
        # PEFT keeps DoRA under the same type.
        return super().is_peft(config) and not config.get("use_dora")

    @classmethod
    def from_peft(cls, config: Mapping[str, Any], names: Sequence[str]) -> LoRA:
        bias = config.get("bias") or "none"
        check_peft_fields({**config, "bias": "none" if bias in ("all", "lora_only") else bias})
        return cls(
            **options_from_peft(config),
            # Biases of other layers, PEFT's `all`, are parameters trained beside the adapters.
            bias="none" if bias == "none" else "lora_only",
            targets=tuple(re.escape(name) for name in names),
            init="gaussian" if config.get("init_lora_weights") == "gaussian" else "kaiming",
            lora_bias=bool(config.get("lora_bias", False)),
            target_parameters=tuple(
                re.escape(parameter)
                for parameter in config.get("target_parameters") or ()
                # PEFT passes over those that the model has not.
                if _holder(parameter) == "" or any(matches(re.escape(_holder(parameter)), name) for name in names)
            ),
        )

    @property
    def num_start_batches(self) -> int:
        return self.init_batches if self.init in STARTS else 0

    def start(self, model: nn.Module, loss_fn: StartLoss, batches: StartBatches) -> None:
        layers = {name: module for name, module in model.named_modules() if isinstance(module, LoraLinear)}
        STARTS[self.init](model, layers, loss_fn, batches)

    def menders(self, model: nn.Module) -> Mapping[str, Mender]:
        if self.init != "loftq":
            return {}
        ranks = {name: self.rank_and_scale(name)[0] for name in resolve_targets(model, self)}
        return {name: partial(inits.loftq, rank=rank, niter=self.svd_niter) for name, rank in ranks.items()}

    def wrap_all(self, model: nn.Module, names: Sequence[str]) -> dict[str, Adapter]:
        if self.init == "loftq" and not any(isinstance(model.get_submodule(name), QuantizedLinear) for name in names):
            raise TargetError(
                f"init loftq starts from what quantising takes away, and none of the {len(names)} targets is "
                "quantised. Load the base with model.quant=nf4 (quant='nf4'), or take init kaiming."
            )
        idle = [pattern for pattern in self.slices if not any(matches(pattern, name) for name in names)]
        if idle:
            raise TargetError(f"slices: {', '.join(map(repr, idle))} match none of the {len(names)} targets.")
        parameters = [f"{n}.{key}" for n in names for key in parameter_names(model.get_submodule(n))]
        idle = [pattern for pattern in self.target_parameters if not any(matches(pattern, p) for p in parameters)]
        if idle:
            raise TargetError(
                f"target_parameters: {', '.join(map(repr, idle))} match no parameter of the {len(names)} targets; "
                "targets must name the module that holds it."
            )
        return super().wrap_all(model, names)

    def wrap(self, module: nn.Module, name: str) -> Adapter:
        rank, scale = self.rank_and_scale(name)
        if not isinstance(module, nn.Linear | Conv1D) and any(matches(pattern, name) for pattern in self.slices):
            raise TargetError(f"slices: {name} is a {type(module).__name__}; only linear layers have slices.")
        parameters = self._parameters_of(module, name)
        # PEFT's form of a linear layer's own weight is that of the layer.
        is_layer = isinstance(module, nn.Linear) and parameters == ["weight"]
        if isinstance(module, nn.MultiheadAttention) or (parameters and not is_layer):
            return self._wrap_weights(module, name, parameters)
        self._check_kind(module, name, rank)
        if isinstance(module, nn.Embedding):
            return LoraEmbedding(module, self, rank, scale)
        if isinstance(module, nn.Linear | Conv1D):
            return LoraLinear(module, self, rank, scale, self._slices_of(module, name))
        assert isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d)
        return LoraConv(module, self, rank, scale)

    def _wrap_weights(self, module: nn.Module, name: str, parameters: Sequence[str]) -> Adapter:
        faults = []
        if self.init not in inits.INITS:
            faults.append(f"init {self.init} starts a layer")
        if self.lora_bias or self.bias != "none":
            faults.append("bias and lora_bias are those of a layer")
        if faults:
            raise TargetError(f"{'; '.join(faults)}, and {name}, a {type(module).__name__}, reads its weights itself.")
        if isinstance(module, nn.MultiheadAttention):
            return LoraAttention(module, self, name, parameters)
        return (LoraExperts if is_experts(module, parameters) else LoraParameters)(module, self, name, parameters)

    def _parameters_of(self, module: nn.Module, name: str) -> list[str]:
        """The own parameters of `module` that are adapted one by one: the named ones, or the 3-D ones of experts."""
        if not self.target_parameters:
            return [] if super().takes(module) else matrices(module, 3)
        own = parameter_names(module)
        named = [key for key in own if any(matches(pattern, f"{name}.{key}") for pattern in self.target_parameters)]
        if wrong := [key for key in named if key not in matrices(module, 2)]:
            raise TargetError(f"target_parameters: {name}.{wrong[0]} is no matrix, and no stack of matrices.")
        return named

    def _check_kind(self, module: nn.Module, name: str, rank: int) -> None:
        """Refuse what cannot be done with a layer of this kind."""
        if not super().takes(module):
            raise unsupported_kind(module, name, "lora")
        weight: Tensor = module.weight  # type: ignore[assignment]
        if self.lora_bias and isinstance(module, nn.Embedding):
            raise TargetError(f"lora_bias: {name} is an Embedding, which has no bias.")
        # LoRA-GA shares out the singular vectors of twice the rank.
        needed = 2 * rank if self.init == "lora_ga" else rank
        is_started = self.init not in inits.INITS
        if self.init == "loftq":
            is_started = isinstance(module, QuantizedLinear)
        if is_started and needed > min(weight.flatten(1).shape):
            raise TargetError(f"init {self.init}: rank {needed} is more than {name} has, {list(weight.shape)}.")
        if self.init == "loftq" and isinstance(module, QuantizedLinear):
            _check_mended(module, name, rank)
        if self.init in STARTS and not isinstance(module, nn.Linear | Conv1D | nn.Embedding):
            raise TargetError(f"init {self.init} starts linear layers, and {name} is a {type(module).__name__}.")
        if isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d):
            check_groups(module, name, rank)
            if module.groups > 1 and self.init in inits.FROM_WEIGHT:
                raise TargetError(f"init {self.init} takes no convolution of {module.groups} groups, as {name} is.")

    def _slices_of(self, module: nn.Linear | Conv1D, name: str) -> tuple[tuple[int, bool], ...]:
        """(outputs, whether they are trained) of each slice; nothing where the whole is trained."""
        found = next((v for pattern, v in self.slices.items() if matches(pattern, name)), None)
        if found is None:
            return ()
        out_size, parts = module.weight.shape[isinstance(module, Conv1D)], sum(found["sizes"])
        if out_size % parts:
            raise TargetError(f"slices: the {out_size} outputs of {name} cannot be shared out as {found['sizes']}.")
        return tuple((n * out_size // parts, i in found["train"]) for i, n in enumerate(found["sizes"]))


def _check_mended(layer: QuantizedLinear, name: str, rank: int) -> None:
    """Refuse a quantised layer of which the error was not kept, or of too low a rank."""
    if layer.mender is None:
        raise ConfigError(
            f"init loftq: what quantising took from {name} is not known. A base that is stored quantised does not hold "
            "it: let model.base name the 16-bit original, with model.quant=nf4. In Python, load it anew with "
            "lorica.load_model(base, quant='nf4', method=options) each time before it is adapted. Or take init kaiming."
        )
    if layer.mended is not None and layer.mended[0].shape[0] < rank:
        kept = layer.mended[0].shape[0]
        raise ConfigError(f"init loftq: {name} was loaded for rank {kept}, and rank {rank} is asked for. Load it anew.")


def _holder(parameter: str) -> str:
    """The name of the module that holds a parameter."""
    return parameter.rpartition(".")[0]


def check_peft_fields(config: Mapping[str, Any]) -> None:
    """Refuse, with an AdapterError that names all, fields of PEFT's LoRA that change the result and are not ours."""
    faults = [
        f"{key} is {config[key]!r}, which is not supported"
        for key, unused in _UNUSED_BY_PEFT.items()
        if key in config and config[key] not in unused
    ]
    init = config.get("init_lora_weights")
    if isinstance(init, str) and init.lower().startswith(_BASE_CHANGING_INITS):
        faults.append(f"init_lora_weights is {init!r}, which changed the base; let PEFT convert it to plain LoRA")
    if faults:
        raise AdapterError("; ".join(faults) + ".")


OPTIONS = LoRA
