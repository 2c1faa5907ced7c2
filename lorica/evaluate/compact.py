"""A model that will only be read: weights that 16 bits hold exactly are stored so, and nothing else changes.

Nearly every published checkpoint is bfloat16. A CPU without arithmetic for it gets the model in float32, so each
decoded token reads four bytes for weights that hold two bytes of information. `compact` takes those two back:
activations stay float32, and products widen the weight, in registers where there are few rows (kernels/rows.py), in
parts that fit the caches where there are many. Of few rows every sum is of the same numbers in the same order, so
results are the same bit for bit; of many a library may take a part's sums in another order.

It is decided weight by weight, by looking at the numbers: what was trained or merged in float32 is not exact and stays
as it is. A table that is the output head too is one tensor for both, and what is looked up in it is widened.
transformers' Conv1D (GPT-2), whose weight is [in, out], has it written to memory as [out, in], in which order few rows
are multiplied fast.

What it gives up: a product of many rows, as for a prompt, widens its weights first; and merging must come before, since
what is added to a weight of 16 bits is rounded.
"""

from __future__ import annotations

import copy
import ctypes
import sys
from collections.abc import Mapping
from typing import TypeVar, cast

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D as PlainConv1D

from lorica.kernels import rows
from lorica.kernels.linear import Conv1D, Linear
from lorica.methods.attach import adapters

Model = TypeVar("Model", bound=PreTrainedModel)

_CHUNK = 1 << 22
"""Elements that are compared at once."""
_IDS = (3, 1, 4, 1, 5, 9, 2)


class Embedding(nn.Embedding):
    """An embedding with a table of 16 bits, which gives float32.

    What a subclass does to the rows, as Gemma's, which scales them, is done to the wide ones.
    """

    def __init__(self, layer: nn.Embedding, table: nn.Parameter) -> None:
        super().__init__(layer.num_embeddings, layer.embedding_dim, layer.padding_idx, device="meta")
        self.weight = table
        self.train(layer.training)
        # In a tuple, so that it is no module of the model.
        self._then = () if type(layer) is nn.Embedding else (_without_table(layer),)

    def forward(self, input: Tensor) -> Tensor:
        found = F.embedding(input, self.weight).float()
        for then in self._then:
            places = torch.arange(input.numel(), device=input.device).view(input.shape)
            found = functional_call(then, {"weight": found.view(-1, found.shape[-1])}, (places,))
        return found


def _without_table(layer: nn.Embedding) -> nn.Embedding:
    plain = copy.copy(layer)
    plain._parameters = {"weight": nn.Parameter(torch.empty(0), requires_grad=False)}
    plain.padding_idx = None
    return plain


def compact(model: Model) -> Model:
    """Store what can be stored in 16 bits so, in place, and return `model`, which is in evaluation mode: for generating
    and measuring alone.

    Only frozen float32 weights of linear layers and embeddings on the CPU, one after the other, so memory falls. Does
    nothing where kernels cannot be compiled, since then few rows would be multiplied by a weight widened each time.
    """
    is_wide = any(p.dtype is torch.float32 and p.ndim == 2 for p in model.parameters())
    if not is_wide or model.device.type != "cpu" or rows.compiled() is None:
        return model
    for name, module in list(model.named_modules()):
        if type(module) is PlainConv1D and module.weight.is_cpu:
            model.set_submodule(name, Conv1D(module))
    before = _logits(model)
    narrowed = _narrow_all(model)
    limit = 1e-5 * float(before.nan_to_num().abs().max())
    if narrowed and not torch.allclose(_logits(model), before, rtol=0, atol=limit, equal_nan=True):
        # It looks at the dtype of a weight, as T5 does, which rounds activations to it.
        wide: dict[int, nn.Parameter] = {}
        for module in narrowed:
            weight = cast(Tensor, module.weight)
            if id(weight) not in wide:
                wide[id(weight)] = _frozen(weight.float())
            module._parameters["weight"] = wide[id(weight)]
    _give_back()
    return model


def _give_back() -> None:
    """To the system, what glibc keeps of freed memory that lies between other tensors."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
    if trim is not None:
        trim(0)


def _narrow_all(model: nn.Module) -> list[nn.Module]:
    """The modules whose weights are held in 16 bits now; one that shares its weight with another is named once."""
    left = {id(m) for a in adapters(model).values() if not a.leaves_base for m in a.base.modules()}
    names = {id(module): name for name, module in model.named_modules()}
    holders: dict[nn.Parameter, list[tuple[str, nn.Module]]] = {}
    for module in model.modules():
        for key, parameter in module._parameters.items():
            if parameter is not None:
                holders.setdefault(parameter, []).append((key, module))
    narrowed: list[nn.Module] = []
    # The smallest first: what they give back is more than the largest needs while it exists twice. Taken out one by
    # one, or none would be given back.
    queue = sorted(holders.items(), key=lambda item: -item[0].numel())
    holders.clear()
    while queue:
        parameter, found = queue.pop()
        if not all(key == "weight" and id(m) not in left and _reads_narrow(m, parameter) for key, m in found):
            continue
        narrow = _narrow(parameter)
        tables = {id(m): Embedding(m, narrow) for _, m in found if isinstance(m, nn.Embedding) and narrow is not None}
        if narrow is None or not all(_same_rows(m, tables[id(m)]) for _, m in found if isinstance(m, nn.Embedding)):
            continue
        for _, module in found:
            if id(module) in tables:
                model.set_submodule(names[id(module)], tables[id(module)])
            else:
                module._parameters["weight"] = narrow
            narrowed.append(tables.get(id(module), module))
    return narrowed


def _reads_narrow(module: nn.Module, weight: nn.Parameter) -> bool:
    """Whether `module` is of a kind that computes the same with this weight in 16 bits."""
    is_table = isinstance(module, nn.Embedding) and module.max_norm is None
    is_wide = weight.dtype is torch.float32 and weight.is_cpu and weight.ndim == 2 and not weight.requires_grad
    return is_wide and (is_table or type(module) in (Linear, Conv1D))


def _narrow(weight: Tensor) -> nn.Parameter | None:
    """`weight` in bfloat16 or float16, where that is exact; laid out in memory as it is."""
    for dtype in (torch.bfloat16, torch.float16):
        found = torch.empty_like(weight, dtype=dtype)
        # Neither split copies, whichever of the two ways the matrix lies in memory.
        wide, narrow = (t if t.is_contiguous() else t.t() for t in (weight.detach(), found))
        step = max(1, _CHUNK // wide.shape[1])
        parts = zip(torch.split(wide, step), torch.split(narrow, step), strict=True)
        if all(torch.equal(part, to.copy_(part).float()) for part, to in parts):
            return _frozen(found)
    return None


def _frozen(weight: Tensor) -> nn.Parameter:
    return nn.Parameter(weight, requires_grad=False)


def _same_rows(layer: nn.Embedding, table: Embedding) -> bool:
    ids = torch.tensor(_IDS) % layer.num_embeddings
    try:
        return torch.equal(layer(ids), table(ids))
    except Exception:
        # It takes other arguments, or looks up other rows than these: not only a table.
        return False


@torch.inference_mode()
def _logits(model: PreTrainedModel) -> Tensor:
    ids = torch.tensor([_IDS]) % model.get_input_embeddings().weight.shape[0]
    inputs: Mapping[str, Tensor] = {"input_ids": ids}
    if model.config.is_encoder_decoder:
        inputs = {**inputs, "decoder_input_ids": ids}
    found: Tensor = model(**inputs, use_cache=False).logits
    return found
