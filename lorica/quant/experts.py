"""The experts of a mixture in codes: 3-D parameters [E, ., .], computed with one expert at a time.

transformers holds all experts of a block in merged parameters, such as `gate_up_proj` [E, 2 I, H] and `down_proj`
[E, H, I]; every model has a forward of its own, and most have the three of transformers' experts interface too. So what
stands in the parameter's place is a module that is read like a tensor: `W[e]`, `W[ids]`, `W.mT`, and torch's products
with it (`__torch_function__`). These dequantise an expert at a time, those alone that have rows, and keep nothing for
backward, which dequantises again. All else is done with the whole, dequantised: right, and not frugal.

Codes, scales and names in a state dict are those of bitsandbytes' `replace_parameter_4bit`: the flattened tensor in
blocks of 64, the codes under the parameter's own name, `gate_up_proj.absmax` and the like beside it. transformers 5.23
quantises no experts with bitsandbytes, and cannot load a model that has them so; only the parts are bitsandbytes'.

What it gives up: experts come one after another, where a grouped product takes them at once; on a GPU the whole is
dequantised for that while every expert has rows. Experts whose matrices are no whole blocks (of a toy) are cut from the
whole. What a model does with its experts beside products costs the whole in 16 bits.
"""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Callable, Collection, Iterable, Mapping
from functools import partial
from itertools import accumulate, pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.nn import functional as F
from torch.utils._pytree import tree_map
from transformers.quantizers.quantizers_utils import should_convert_module

from lorica.errors import ConfigError, ModelError
from lorica.kernels import ops
from lorica.kernels.linear import linear
from lorica.quant.blockwise import Quantized, dequantize, quantize, quantize_scales
from lorica.quant.codebooks import bits, codebook
from lorica.quant.weight import QuantizedWeight, fingerprint_of, frozen, sampled

_MATMULS = ("matmul", "__matmul__", "mm", "bmm")
_GROUPED = ("grouped_mm", "_grouped_mm")


class QuantizedExperts(QuantizedWeight):
    """A parameter [E, ., .] in codes, in the place and under the name of the parameter."""

    def name_in_state(self, name: str) -> str:
        return name

    @property
    def device(self) -> torch.device:
        return self.codes.device

    @property
    def mT(self) -> Matrices:
        return Matrices(self).mT

    def dim(self) -> int:
        return len(self.shape)

    def transpose(self, dim0: int, dim1: int) -> Any:
        return Matrices(self).transpose(dim0, dim1)

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, index: Any) -> Any:
        return Matrices(self)[index]

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        args, kwargs = tree_map(lambda v: Matrices(v) if isinstance(v, cls) else v, (args, kwargs or {}))
        return Matrices.__torch_function__(func, types, args, kwargs)

    @property
    def is_aligned(self) -> bool:
        """Whether no block has elements of two experts."""
        return self.shape[1:].numel() % self.blocksize == 0

    def expert(self, index: int) -> Quantized:
        """The matrix of one expert, its codes a view. The blocks are aligned."""
        whole, shape = self.quantized, self.shape[1:]
        codes = whole.codes.view(len(self), -1)[index].view(shape if bits(self.scheme) == 8 else (-1, 1))
        num_blocks = shape.numel() // self.blocksize
        scales = whole.scales(index * num_blocks, (index + 1) * num_blocks)
        return Quantized(codes, scales, shape, self.dtype, self.scheme, self.blocksize)

    def matrix(self, index: int) -> Tensor:
        """The matrix of one expert, dequantised."""
        return dequantize(self.expert(index)) if self.is_aligned else self.dense()[index]

    def product(self, x: Tensor, index: int, turned: bool) -> Tensor:
        """x W^T, or x W where it is `turned`, W the matrix of one expert: x [..., in]. Without a derivative."""
        if not self.is_aligned:
            matrix = self.matrix(index)
            return linear(x, matrix.mT if turned else matrix)
        part, levels = self.expert(index), codebook(self.scheme, x.device)
        if bits(self.scheme) == 4:
            run = ops.linear_4bit_input_grad if turned else ops.linear_4bit
        else:
            run = ops.linear_8bit_input_grad if turned else ops.linear_8bit
        y: Tensor = run(x, part.codes, part.absmax, levels, self.blocksize, self.shape[2 if turned else 1])
        return y

    def take_experts(self, matrices: Iterable[Tensor]) -> None:
        """As `take` of a plain tensor that comes an expert at a time, [., .] each. The blocks are aligned.

        Raises:
            ModelError: there are more or fewer than this has, or one has another shape.
            ConfigError: one cannot be quantised.
        """
        size, places, samples, count = self.shape[1:].numel(), sampled(self.shape.numel()), [], 0
        double_quant, held = self.nested_absmax is not None, None
        for matrix in matrices:
            self.check_shape((max(len(self), count + 1), *matrix.shape))
            try:
                made = quantize(matrix, self.scheme, self.blocksize)
            except ConfigError as error:
                raise ConfigError(f"expert {count}: {error}") from None
            if held is None:
                codes = torch.empty(self.codes.numel(), dtype=torch.uint8, device=matrix.device)
                held = codes.view(len(self), -1), made.absmax.new_empty(len(self), made.absmax.numel())
            held[0][count], held[1][count] = made.codes.view(-1), made.absmax
            # The sampled elements of the whole that lie in this expert.
            first = -(-count * size // places.step) * places.step - count * size
            # A view would keep the matrix.
            samples.append(matrix.detach().reshape(-1)[first : places.stop - count * size : places.step].clone())
            count += 1
        if held is None or count != len(self):
            raise ModelError(f"{count} experts stand where {len(self)} are expected")
        absmax = held[1].view(-1)
        scales, nested = quantize_scales(absmax) if double_quant else (absmax, None)
        codes = held[0].reshape(self.shape if bits(self.scheme) == 8 else (-1, 1))
        self.origin = fingerprint_of(self.shape, torch.cat(samples))
        self.hold(Quantized(codes, scales, self.shape, self.dtype, self.scheme, self.blocksize, nested))

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        destination |= {prefix[:-1] + key.removeprefix("weight"): part for key, part in self.stored().items()}

    def _load_from_state_dict(
        self,
        state_dict: Mapping[str, Tensor],
        prefix: str,
        local_metadata: Any,
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        mine = {f"weight.{key.removeprefix(prefix)}": t.to(self.device) for key, t in state_dict.items()}
        if _CODES not in mine:
            missing_keys.append(prefix[:-1])
            return
        try:
            self.take({"weight": mine.pop(_CODES), **mine})
        except ModelError as error:
            error_msgs.append(f"{prefix[:-1]}: {error}")

    def extra_repr(self) -> str:
        return f"{list(self.shape)}, {self.scheme}, double_quant={self.nested_absmax is not None}"


_CODES = "weight.codes"


class Matrices:
    """Matrices of `experts`, as torch's functions take tensors: all [E, ., .], those that `index` [S] names [S, ., .],
    or one [., .]; each the other way round where they are `transposed`.
    """

    def __init__(self, experts: QuantizedExperts, index: int | Tensor | None = None, transposed: bool = False) -> None:
        self.experts, self.index, self.transposed = experts, index, transposed
        self.dtype, self.device = experts.dtype, experts.device

    @property
    def shape(self) -> torch.Size:
        num, *matrix = self.experts.shape
        front = [num] if self.index is None else [] if isinstance(self.index, int) else [len(self.index)]
        return torch.Size((*front, *(matrix[::-1] if self.transposed else matrix)))

    @property
    def mT(self) -> Matrices:
        return Matrices(self.experts, self.index, not self.transposed)

    def dim(self) -> int:
        return len(self.shape)

    def __len__(self) -> int:
        return self.shape[0]

    def t(self) -> Any:
        return self.transpose(0, 1)

    def transpose(self, dim0: int, dim1: int) -> Any:
        last = {self.dim() - 1, self.dim() - 2}
        return self.mT if {dim0 % self.dim(), dim1 % self.dim()} == last else self.dense().transpose(dim0, dim1)

    def __getitem__(self, index: Any) -> Any:
        ids = index if isinstance(index, Tensor) and index.dtype in (torch.int64, torch.int32) else None
        if self.index is not None or not (isinstance(index, int) or (ids is not None and ids.dim() < 2)):
            return self.dense()[index]
        if ids is not None and ids.dim() == 1:
            return Matrices(self.experts, ids, self.transposed)
        # An IndexError ends an iteration.
        return Matrices(self.experts, range(len(self))[int(index)], self.transposed)

    def __matmul__(self, other: Tensor) -> Tensor:
        return torch.matmul(self, other)  # type: ignore[arg-type]

    def dense(self) -> Tensor:
        """The matrices as a tensor."""
        one = isinstance(self.index, int)
        found = self.experts.matrix(self.index) if one else self.experts.dense()  # type: ignore[arg-type]
        found = found[self.index] if isinstance(self.index, Tensor) else found
        return found.mT if self.transposed else found

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        made = _as_product(func.__name__, args, kwargs)
        if made is not None:
            return made
        args, kwargs = tree_map(lambda v: v.dense() if isinstance(v, cls) else v, (args, kwargs))
        return func(*args, **kwargs)


def _as_product(name: str, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Tensor | None:
    """What a function of torch does where it is a product with matrices; None where it is none that is known."""
    if name == "linear" and isinstance(args[0], Tensor) and isinstance(args[1], Matrices):
        bias = kwargs.get("bias", args[2] if len(args) > 2 else None)
        y = _matmul(args[0], args[1].mT)
        return y if bias is None else y + bias
    if name in _MATMULS and not kwargs and isinstance(args[1], Matrices):
        return _matmul(args[0], args[1])
    if name in _MATMULS and not kwargs and args[1].dim() > 1:
        return _matmul(args[1].mT, args[0].mT).mT
    if name in _GROUPED and isinstance(args[1], Matrices) and args[1].index is None and kwargs.get("offs") is not None:
        return grouped_product(args[0], args[1].experts, kwargs["offs"], not args[1].transposed)
    return None


def _matmul(x: Tensor, matrices: Matrices) -> Tensor:
    experts, index, turned = matrices.experts, matrices.index, not matrices.transposed
    if isinstance(index, int):
        forth, back = (partial(experts.product, index=index, turned=t) for t in (turned, not turned))
        y: Tensor = _Product.apply(x, forth, back)  # type: ignore[no-untyped-call]
        return y
    if x.dim() != 3 or len(x) != len(matrices):
        return x @ matrices.dense()
    index = torch.arange(len(experts), device=x.device) if index is None else index
    ascending, order = index.sort()
    bounds = torch.arange(1, len(experts) + 1, device=x.device, dtype=index.dtype)
    ends = torch.searchsorted(ascending, bounds, out_int32=True) * x.shape[1]
    y = grouped_product(x[order].flatten(0, 1), experts, ends, turned).view(len(x), x.shape[1], -1)
    return torch.empty_like(y).index_copy(0, order, y)


def grouped_product(rows: Tensor, experts: QuantizedExperts, ends: Tensor, turned: bool = False) -> Tensor:
    """W_e x, or W_e^T x where it is `turned`, for rows x [S, in] from ends[e - 1] to ends[e]: ends [E] int32; [S, out].

    Differentiable in `rows`; nothing but `ends` is kept for that. Rows behind the last end give zeros.
    """
    forth, back = (partial(_grouped, experts=experts, ends=ends, turned=t) for t in (turned, not turned))
    y: Tensor = _Product.apply(rows, forth, back)  # type: ignore[no-untyped-call]
    return y


def _grouped(rows: Tensor, experts: QuantizedExperts, ends: Tensor, turned: bool) -> Tensor:
    sizes = group_sizes(ends, len(rows))
    # The kernel takes rows of whole 16 bytes.
    if rows.device.type != "cpu" and all(sizes) and all(n * rows.itemsize % 16 == 0 for n in experts.shape[1:]):
        whole = dequantize(experts.quantized, rows.dtype)
        return F.grouped_mm(rows, whole if turned else whole.mT, offs=ends)
    y = rows.new_zeros(len(rows), experts.shape[2 if turned else 1])
    for index, (begin, end) in enumerate(pairwise(accumulate(sizes, initial=0))):
        if end > begin:
            y[begin:end] = experts.product(rows[begin:end], index, turned)
    return y


def group_sizes(ends: Tensor, num_rows: int) -> list[int]:
    """How many rows each expert has: ends [E]."""
    if isinstance(ends, FakeTensor):
        # A rehearsal's tensors hold no numbers; rows shared out evenly take the same memory.
        share, rest = divmod(num_rows, len(ends))
        return [share + (i < rest) for i in range(len(ends))]
    return [stop - start for start, stop in pairwise([0, *ends.tolist()])]


class _Product(torch.autograd.Function):
    """A product that is linear in x, by two functions: itself, and its gradient's. It keeps nothing."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, forth: Callable[[Tensor], Tensor], back: Callable[[Tensor], Tensor]) -> Tensor:
        ctx.back = back
        return forth(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        return ctx.back(grads[0]), None, None


def expert_parameters(model: nn.Module, skip: Collection[str] = ()) -> dict[str, nn.Parameter]:
    """The 3-D parameters of experts that can be quantised, by name; `skip` as in `linear.quantizable`.

    transformers' classes that hold them, and no others that have 3-D parameters, are called experts.
    """
    return {
        f"{name}.{key}": parameter
        for name, module in model.named_modules()
        if name and "Experts" in type(module).__name__
        for key, parameter in module._parameters.items()
        if parameter is not None and parameter.dim() == 3 and parameter.is_floating_point()
        if should_convert_module(name, list(skip)) and should_convert_module(f"{name}.{key}", list(skip))
    }


def empty_experts(parameter: Tensor, scheme: str, double_quant: bool) -> QuantizedExperts:
    """What is to hold `parameter` [E, ., .], on its device and without contents."""
    dtype, device = parameter.dtype, parameter.device
    return QuantizedExperts(parameter.shape, scheme=scheme, double_quant=double_quant, dtype=dtype, device=device)


def put_experts(model: nn.Module, name: str, experts: QuantizedExperts) -> None:
    """Put `experts` in the place of the parameter of `model` called `name`."""
    owner, _, key = name.rpartition(".")
    module = model.get_submodule(owner)
    del module._parameters[key]
    module.add_module(key, experts)
    # A module's own state has no name without a dot behind the module's.
    module.register_load_state_dict_pre_hook(partial(_rename_codes, key))  # type: ignore[no-untyped-call]


def _rename_codes(key: str, module: nn.Module, state_dict: dict[str, Tensor], prefix: str, *rest: Any) -> None:
    if f"{prefix}{key}" in state_dict:
        state_dict[f"{prefix}{key}.codes"] = state_dict.pop(f"{prefix}{key}")


def own_experts(module: nn.Module) -> dict[str, QuantizedExperts]:
    """The quantised parameters of `module` itself, by name."""
    return {name: child for name, child in module._modules.items() if isinstance(child, QuantizedExperts)}


def parameter_of(module: nn.Module, name: str) -> Any:
    """The parameter of `module` called `name`, or what stands in its place if it is quantised."""
    return own_experts(module).get(name) or module.get_parameter(name)


def tensor_of(module: nn.Module, name: str) -> Tensor:
    """The parameter of `module` called `name`, dequantised if need be."""
    found = parameter_of(module, name)
    dense: Tensor = found.dense() if isinstance(found, QuantizedExperts) else found
    return dense


def put_plain(module: nn.Module, name: str, parameter: nn.Parameter) -> None:
    """Give `module` itself a plain parameter in the place of its quantised one called `name`."""
    del module._modules[name]
    hooks: Mapping[int, Any] = module._load_state_dict_pre_hooks
    module._load_state_dict_pre_hooks = OrderedDict((k, h) for k, h in hooks.items() if not _renames(h.hook, name))
    module._parameters[name] = parameter


def _renames(hook: Any, name: str) -> bool:
    return isinstance(hook, partial) and hook.func is _rename_codes and hook.args == (name,)


def with_room(module: nn.Module, names: Iterable[str]) -> nn.Module:
    """A copy of `module` with parameters without memory in the places of those of `names` that are quantised."""
    made = copy.copy(module)
    made._modules, made._parameters = dict(module._modules), dict(module._parameters)
    for name in own_experts(module).keys() & set(names):
        held = own_experts(module)[name]
        put_plain(made, name, frozen(torch.empty(held.shape, dtype=held.dtype, device="meta")))
    return made
