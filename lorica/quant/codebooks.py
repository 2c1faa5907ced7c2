"""The levels that a quantised element can take, by scheme: what stands between a code and a number.

A codebook is scaled to [-1, 1] and multiplied by the absmax of a block. Mean squared error on a normal distribution
with blocks of 64, where the 4-bit types differ most (measured by tests/quant/test_codebooks.py):

    nf4    .0084   quantiles of the normal distribution (QLoRA, arXiv 2305.14314)
    e2m1   .0112   the 4-bit float of the OCP Microscaling formats: 0 .5 1 1.5 2 3 4 6, and a sign
    int4   .0116   -8 ... 7, divided by 7
    fp4    .0149   bitsandbytes' own 4-bit float: 0 .0625 2 3 4 6 8 12, in an order of its own, and a sign

In 8 bits: `int8`, -128 ... 127 divided by 127, and `dynamic`, whose exponent takes as many bits as it needs (8-bit
optimizers, arXiv 2110.02861). Double quantisation stores its scales in the latter, though QLoRA speaks of 8-bit floats.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lorica.errors import ConfigError
from lorica.kernels.nf4 import NF4

_CPU = torch.device("cpu")
_FP4 = (0.0, 0.0625, 8.0, 12.0, 4.0, 6.0, 2.0, 3.0)
_E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)


def _signed(magnitudes: tuple[float, ...]) -> Tensor:
    """The sign is the highest bit of a code."""
    levels = torch.tensor(magnitudes) / max(magnitudes)
    return torch.cat([levels, 0 - levels])


def _dynamic() -> Tensor:
    """For each of 7 exponents (10^-6 ... 1) twice as many evenly spaced fractions of [.1, 1] as for the one below.

    127 levels of either sign, in the middles of the intervals; then 0 and, on the positive side alone, 1.
    """
    positive = []
    for exponent in range(7):
        edges = torch.linspace(0.1, 1, 2**exponent + 1)
        positive.append((edges[:-1] + edges[1:]) / 2 * 10.0 ** (exponent - 6))
    levels = torch.cat(positive)
    return torch.cat([levels, -levels, torch.tensor([0.0, 1.0])]).sort().values


_CODEBOOKS = {
    "dynamic": _dynamic(),
    "e2m1": _signed(_E2M1),
    "fp4": _signed(_FP4),
    "int4": torch.arange(-8, 8) / 7,
    "int8": torch.arange(-128, 128) / 127,
    "nf4": torch.tensor(NF4),
}
_ON_DEVICES: dict[tuple[str, torch.device], Tensor] = {}
SCHEMES = tuple(_CODEBOOKS)
"""The names of all schemes, sorted."""


def codebook(scheme: str, device: torch.device = _CPU) -> Tensor:
    """float32 [16] or [256]: the level of each code. Shared: not to be changed. Raises ConfigError."""
    if scheme not in _CODEBOOKS:
        raise ConfigError(f"no quantisation scheme {scheme!r}; there are {', '.join(SCHEMES)}")
    levels = _CODEBOOKS[scheme]
    if device.type == "cpu":
        return levels
    found = _ON_DEVICES.get((scheme, device))
    if found is None:
        found = levels.to(device)
        if type(found) is Tensor:  # and no fake one, of a rehearsal
            _ON_DEVICES[scheme, device] = found
    return found


def bits(scheme: str) -> int:
    """Bits of a code: 4 or 8. Raises ConfigError."""
    return 4 if len(codebook(scheme)) == 16 else 8
