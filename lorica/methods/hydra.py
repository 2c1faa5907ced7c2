"""HydraLoRA: one A for all, several heads B, and a router that mixes them (Tian et al. 2024, arXiv 2404.19245).

    h = A x,    g = softmax(W_g x / t)  or  softmax(W_g h / t),    y = W x + b + s [B_1 ... B_N] (g (x) h)

A [rank, in], B_i [out, rank], s = alpha / rank. The router W_g is [N, in] as in the authors' code, or [N, rank] as in
their equation 4. All heads are one product of N rank columns, where the authors' code loops over them; the layers
are in `hydra_linear.py`. Gates are a token's own, or those of its sample so far (`hydra_sequence.py`).

With B = 0 and equal gates all heads get the same gradient and stay one LoRA for ever. What breaks the symmetry:

    init zero      the router starts at random, so each token weights the heads a little differently: the authors' way.
                   The output is the base's exactly
    init random    the heads differ, drawn at random with a sum of zero, and the router starts at zero: equal gates, and
                   the output is the base's up to the rounding of one sum
    init components    likewise, but each head starts from the first gradient of its own component of the data, see
                   `hydra_start.py`

What it gives up: gates that depend on the input are no change of weights, so only equal gates or one head can be
merged exactly; everything else by constants that suit some rows best, which `hydra_static.py` finds, and how far that
is from the routed model is measured. Dropout acts on h, once, not on x.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BeforeValidator, Field
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from lorica.errors import AdapterError, ConfigError, TargetError
from lorica.methods.hydra_linear import HydraLinear
from lorica.methods.hydra_sequence import Sequences
from lorica.methods.hydra_start import start_from_components
from lorica.methods.lora import check_peft_fields
from lorica.methods.low_rank import LowRankOptions, options_from_peft
from lorica.methods.method import Adapter, Positive, Probability, StartBatches, StartLoss, unsupported_kind

AUTO, COMPONENTS = "auto", "components"
_MOST_HEADS = 1024


def _num_heads(value: object) -> object:
    if value == AUTO or (type(value) is int and 1 <= value <= _MOST_HEADS):
        return value
    raise ValueError(f"must be auto or a whole number from 1 to {_MOST_HEADS}")


@dataclass(frozen=True)
class HydraLoRA(LowRankOptions):
    """Options of HydraLoRA.

    Attributes:
        dropout: probability of dropping an element of A x.
        num_heads: N; `"auto"` stands for the number of components of the data, which `lorica train` finds.
        router_input: what the router reads, `"x"` or `"ax"` (A x, which makes it in / rank times smaller).
        routing: gates for each `"token"` by itself, or of its `"sequence"` so far: the router's outputs are averaged
            over the sample's tokens up to and with this one, so a later token changes no earlier output.
        gate: whether the router is `"learned"`, `"frozen"` at random, or there is none and the gates are `"uniform"`,
            1 / N each, which is LoRA.
        temperature: what the router's outputs are divided by.
        balance_loss: weight of the load-balance loss of a layer, N sum_i f_i P_i (Switch Transformer, arXiv 2101.03961,
            equation 4): f_i is the share of tokens with head i on top, P_i its mean gate. It is 1 where the load is
            even; 0 turns it off.
        init: how the heads start; see above.
        init_batches: how many batches of each component `components` looks at, of `train.batch_tokens` each.
        components: file that `lorica components` wrote, by which `lorica train` tells the components of the rows apart
            instead of finding them.

    Raises:
        ConfigError: values that contradict each other, all of them.
    """

    linear_kinds: ClassVar[tuple[type[nn.Module], ...]] = (nn.Linear, Conv1D)

    dropout: Annotated[Probability, Field(description="probability of dropping an element of A x")] = 0.0
    num_heads: Annotated[
        int | Literal["auto"],
        BeforeValidator(_num_heads),
        Field(description="heads B for the one A, 1 to 1024; auto: as many as the data has components"),
    ] = 4
    router_input: Annotated[
        Literal["x", "ax"], Field(description="what the router reads: x, or A x, for a much smaller router")
    ] = "x"
    routing: Annotated[
        Literal["token", "sequence"],
        Field(description="gates for each token, or by the mean over its sample up to it (causal)"),
    ] = "token"
    gate: Annotated[
        Literal["learned", "frozen", "uniform"],
        Field(description="whether the router is learned, stays as drawn, or all gates are 1 / num_heads"),
    ] = "learned"
    temperature: Annotated[Positive, Field(description="what the router's outputs are divided by")] = 1.0
    balance_loss: Annotated[
        float, Field(ge=0, description="weight of a loss that keeps the heads' loads even; 0: none")
    ] = 0.0
    init: Annotated[
        Literal["zero", "random", "components"],
        Field(
            description="heads at zero and the router at random; or the router at zero and heads that cancel, drawn at "
            "random or from the first gradients of the components of the data"
        ),
    ] = "zero"
    init_batches: Annotated[
        int, Field(ge=1, le=65536, description="batches of batch_tokens of each component for init components")
    ] = 4
    components: Annotated[
        str | None,
        Field(description="file from `lorica components` that says what the components are; null: found if needed"),
    ] = None

    def __post_init__(self) -> None:
        super().__post_init__()
        faults = []
        if self.balance_loss and self.gate != "learned":
            faults.append(f"balance_loss trains the router, and gate {self.gate} has none that is trained")
        if self.init != "zero" and self.gate == "frozen":
            faults.append(
                f"init {self.init} needs equal gates at the start, and gate frozen has random ones; use init zero"
            )
        if self.init == COMPONENTS and self.gate == "uniform":
            faults.append("init components makes heads that differ, and gate uniform has but their mean; use init zero")
        if faults:
            raise ConfigError("HydraLoRA: " + "; ".join(faults) + ".")

    @property
    def is_routed(self) -> bool:
        """Whether gates differ from token to token."""
        return self.gate != "uniform" and self.num_heads != 1

    @property
    def num_start_batches(self) -> int:
        return self.init_batches if self.init == COMPONENTS and self.num_heads != 1 else 0

    def start(self, model: nn.Module, loss_fn: StartLoss, batches: StartBatches) -> None:
        layers = {name: module for name, module in model.named_modules() if isinstance(module, HydraLinear)}
        start_from_components(model, layers, loss_fn, batches)

    def wrap(self, module: nn.Module, name: str) -> Adapter:
        if not isinstance(module, nn.Linear | Conv1D):
            raise unsupported_kind(module, name, "hydra")
        if self.num_heads == AUTO:
            raise ConfigError(
                "HydraLoRA: num_heads is auto, and nobody has counted the components of the data. `lorica train` does; "
                "elsewhere give a number, as `lorica components` prints it."
            )
        return HydraLinear(module, self, *self.rank_and_scale(name))

    def wrap_all(self, model: nn.Module, names: Sequence[str]) -> dict[str, Adapter]:
        by_sequence = self.is_routed and self.routing == "sequence"
        wrapped = super().wrap_all(model, names)
        if not by_sequence and not self.balance_loss:
            return wrapped
        self._check_places(model, names, "routing sequence" if by_sequence else "balance_loss")
        sequences = Sequences.of(model)
        for name, adapter in wrapped.items():
            assert isinstance(adapter, HydraLinear)
            adapter.name, adapter.sequences = name, sequences
        return wrapped

    def _check_places(self, model: nn.Module, names: Sequence[str], option: str) -> None:
        """Refuse what sees neither whole samples nor each token once."""
        if not isinstance(model, PreTrainedModel):
            return
        head = model.get_output_embeddings()
        if lost := [name for name in names if model.get_submodule(name) is head]:
            raise TargetError(
                f"{option}: {lost[0]} is the output head, which the loss calls on pieces of a batch. Leave it out of "
                "targets, or use routing token without balance_loss."
            )
        if option == "routing sequence" and model.config.is_encoder_decoder:
            raise TargetError(
                f"routing sequence: {type(model).__name__} is an encoder-decoder, whose halves read different tokens. "
                "Use routing token."
            )

    @classmethod
    def is_peft(cls, config: Mapping[str, Any]) -> bool:
        """Whether it is the authors' own configuration; PEFT does not have the method. See `interop/hydra.py`."""
        return config.get("peft_type") == "LORA" and "lora_nums" in config

    @classmethod
    def from_peft(cls, config: Mapping[str, Any], names: Sequence[str]) -> HydraLoRA:
        check_peft_fields(config)
        if config.get("enable_lora") or config.get("fan_in_fan_out"):
            raise AdapterError("enable_lora and fan_in_fan_out are not supported: the authors' code has plain layers.")
        if type(config["lora_nums"]) is not int:
            raise AdapterError(f"lora_nums is {config['lora_nums']!r}; expected a whole number.")
        # What was a probability for x is one for A x here.
        return cls(
            **options_from_peft(config),
            num_heads=config["lora_nums"],
            targets=tuple(re.escape(name) for name in names),
        )


OPTIONS = HydraLoRA
