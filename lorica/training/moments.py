"""What AdamW's moments are in memory and in a checkpoint: plain numbers, or codes of 8 bits with a magnitude a block.

In 8 bits a moment is `<name>`, its codes, and `<name>_absmax`. The blocks have 256 elements and the levels are the
dynamic map (Dettmers et al. 2021, arXiv 2110.02861), with a sign for the mean of the gradients and without one, which
leaves a bit more for the fraction, for that of their squares. Blocks, codes and the size below which a parameter keeps
32 bits are those of bitsandbytes; the paper's blocks are longer.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from lorica.kernels.ops import dequantize_8bit, quantize_8bit
from lorica.quant.codebooks import codebook
from lorica.training.pages import Page, make_fields
from lorica.training.tensor_file import layout_of, part_of

MOMENTS = ("exp_avg", "exp_avg_sq")

ABSMAX = "_absmax"
"""What follows a moment's name in that of its blocks' magnitudes."""

BLOCK = 256

SMALLEST_8_BIT = 4096
"""Elements from which on a parameter's moments take 8 bits."""


def unsigned_dynamic_map() -> Tensor:
    """The 256 levels, float32, sorted: 0, 1 and twice as many in each decade from 1e-6 to 1 as in the one below it."""
    levels = [torch.tensor([0.0, 1.0])]
    for exponent in range(7):
        edges = torch.linspace(0.1, 1, 2 ** (exponent + 1) + 1)
        levels.append((edges[:-1] + edges[1:]) / 2 * 10.0 ** (exponent - 6))
    return torch.cat(levels).sort().values


# Made at once: made by the first who asks, they would be fake tensors if that is a rehearsal.
_MAPS = {"exp_avg": codebook("dynamic"), "exp_avg_sq": unsigned_dynamic_map()}


def num_blocks(num_elements: int) -> int:
    """Blocks that hold so many elements."""
    return -(-num_elements // BLOCK)


def encode(moment: str, values: Tensor) -> dict[str, Tensor]:
    """The arrays, codes uint8 [n] and absmax float32 [num_blocks(n)], of a moment's values, float32 [n]."""
    codes, absmax = quantize_8bit(values, _MAPS[moment].to(values.device), BLOCK)
    return {moment: codes, moment + ABSMAX: absmax}


def decode(moment: str, codes: Tensor, absmax: Tensor) -> Tensor:
    """The values, float32 [n], of what `encode` gave."""
    values: Tensor = dequantize_8bit(codes, absmax, _MAPS[moment].to(codes.device), BLOCK, torch.float32)
    return values


def cut(parameter: nn.Parameter, elements: int, bits: int) -> list[Page]:
    """The pages of a parameter's moments, of so many elements each, a multiple of `BLOCK`."""
    in_8_bits = bits == 8 and parameter.numel() >= SMALLEST_8_BIT and parameter.dtype == torch.float32
    pages = []
    for begin in range(0, max(1, parameter.numel()), elements):
        end = min(begin + elements, parameter.numel())
        arrays: dict[str, tuple[torch.dtype, int]] = {}
        for moment in MOMENTS:
            arrays[moment] = (torch.uint8 if in_8_bits else parameter.dtype, end - begin)
            if in_8_bits:
                arrays[moment + ABSMAX] = (torch.float32, num_blocks(end - begin))
        pages.append(Page(parameter, begin, end, make_fields(arrays)))
    return pages


def is_coded(page: Page) -> bool:
    """Whether a page's moments take 8 bits."""
    return MOMENTS[0] + ABSMAX in page.fields


def opened(page: Page, buffer: Tensor, moment: str) -> Tensor:
    """A moment to work on, of a page with its bytes: in place, or decoded."""
    values = page.fields[moment].of(buffer)
    return decode(moment, values, page.fields[moment + ABSMAX].of(buffer)) if is_coded(page) else values


def close(page: Page, buffer: Tensor, moment: str, values: Tensor) -> None:
    """Put back what was decoded and worked on."""
    if is_coded(page):
        for key, part in encode(moment, values).items():
            page.fields[key].of(buffer).copy_(part)


def saved_arrays(page: Page, moment: str, tensors: Mapping[str, Tensor], parameter: str) -> dict[str, Tensor]:
    """What a page holds of a moment, from a checkpoint of either number of bits."""
    name = f"{parameter}.{moment}"
    if is_coded(page) and layout_of(tensors, name).dtype == torch.uint8:
        # The very codes: to code what was decoded would lose a little, since the map has no -1.
        absmax = part_of(tensors, name + ABSMAX, page.begin // BLOCK, num_blocks(page.end))
        return {moment: part_of(tensors, name, page.begin, page.end), moment + ABSMAX: absmax}
    values = saved_moment(tensors, parameter, moment, page.begin, page.end)
    return encode(moment, values.float()) if is_coded(page) else {moment: values}


def saved_moment(tensors: Mapping[str, Tensor], parameter: str, moment: str, begin: int, end: int) -> Tensor:
    """Elements `begin`, a multiple of `BLOCK`, to `end` of a moment in a checkpoint: 1-D, decoded if it has 8 bits."""
    name = f"{parameter}.{moment}"
    values = part_of(tensors, name, begin, end)
    if values.is_floating_point():
        return values
    return decode(moment, values, part_of(tensors, name + ABSMAX, begin // BLOCK, num_blocks(end)))
