"""The levels of each scheme against bitsandbytes and the OCP specification; their error on a normal distribution."""

from __future__ import annotations

import pytest
import torch

from lorica.errors import ConfigError
from lorica.quant.blockwise import dequantize, quantize
from lorica.quant.codebooks import SCHEMES, bits, codebook


def test_the_levels_are_bitsandbytes() -> None:
    functional = pytest.importorskip("bitsandbytes.functional")
    assert codebook("nf4").equal(functional.get_4bit_type("nf4", device="cpu"))
    assert codebook("fp4").equal(functional.get_4bit_type("fp4", device="cpu"))
    assert codebook("dynamic").equal(functional.create_dynamic_map(signed=True))


def test_e2m1_is_the_float_that_its_bits_spell() -> None:
    """OCP Microscaling Formats 1.0, section 5.3.3: a sign, 2 bits of exponent with bias 1, 1 of mantissa."""
    for code, level in enumerate((codebook("e2m1") * 6).tolist()):
        sign, exponent, mantissa = code >> 3, code >> 1 & 3, code & 1
        magnitude = 2.0 ** (exponent - 1) * (1 + mantissa / 2) if exponent else mantissa / 2
        assert level == pytest.approx((-1) ** sign * magnitude, abs=1e-6)


def test_integers_are_evenly_spaced() -> None:
    assert [round(level * 7) for level in codebook("int4").tolist()] == list(range(-8, 8))
    assert [round(level * 127) for level in codebook("int8").tolist()] == list(range(-128, 128))


@pytest.mark.parametrize(
    ("scheme", "error"), [("nf4", 0.00845), ("e2m1", 0.01117), ("int4", 0.01160), ("fp4", 0.01487)]
)
def test_the_error_on_a_normal_distribution(scheme: str, error: float) -> None:
    x = torch.randn(2**20, generator=torch.Generator().manual_seed(0))
    for double_quant in (False, True):
        restored = dequantize(quantize(x, scheme, double_quant=double_quant))
        assert float((restored - x).square().mean()) == pytest.approx(error, rel=0.01)


def test_schemes() -> None:
    assert list(SCHEMES) == sorted(SCHEMES) and [bits(scheme) for scheme in SCHEMES] == [8, 4, 4, 4, 8, 4]
    for scheme in SCHEMES:
        assert codebook(scheme).dtype is torch.float32 and codebook(scheme, torch.device("meta")).is_meta
    with pytest.raises(ConfigError, match="no quantisation scheme 'nf5'; there are dynamic, e2m1, fp4"):
        codebook("nf5")
