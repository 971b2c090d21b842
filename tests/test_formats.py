"""Block formats against gguf.quants, and the rounding of activations."""

import gguf
import numpy as np
import pytest
from conftest import random_blocks
from powerinfer.quantize.encoder import convert_rows
from powerinfer.runtime import formats
from powerinfer.runtime.errors import ModelError
from powerinfer.runtime.formats import GGMLType

BLOCKED = [GGMLType.Q4_0, GGMLType.Q8_0, GGMLType.Q4_1, GGMLType.Q5_0, GGMLType.Q5_1]
K_QUANTS = [GGMLType.Q4_K, GGMLType.Q5_K, GGMLType.Q6_K]


def awkward_rows() -> np.ndarray:
    """Rows on which encoders differ: zeros, ties, halves, overflow, subnormal scales."""
    rng = np.random.default_rng(0)
    x = rng.standard_normal((64, 256)).astype(np.float32)
    x[0] = 0
    x[1] = -0.0
    for i, scale in enumerate([1e6, 1e9, 1e-30, 1e-37, 3e-38, 1e-38, 1e-39, 1e-41, 1e-44]):
        x[2 + i] *= scale
    x[20] = np.round(x[20] * 4) / 4  # halves after scaling
    x[21] = 1
    x[22, ::2], x[22, 1::2] = -1, 1  # ties of magnitude
    x[23] = np.float32(127) * np.where(np.arange(256) % 32 == 0, 1, 0.49999997)
    x[24, 1:] = 0
    return x


def test_sizes_equal_gguf():
    for type_, sizes in formats.BLOCK_SIZES.items():
        expected = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType(int(type_))]
        if type_ is not GGMLType.Q8_1:  # gguf counts its two scales as 32 bits each
            assert sizes == expected, type_
    for type_ in GGMLType:
        assert gguf.GGMLQuantizationType(int(type_)).name == type_.name


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize("type_", [*BLOCKED, GGMLType.BF16, GGMLType.F16])
@pytest.mark.parametrize("source", [GGMLType.F32, GGMLType.F16, GGMLType.BF16])
def test_bytes_equal_gguf(type_, source):
    x = awkward_rows()
    if GGMLType.F16 in (source, type_):  # what is too large for it is refused
        x = np.where(np.abs(x) > 60000, 60000, x)
    data = formats.encode(source, x)
    x = formats.decode(source, data)
    theirs = gguf.quants.quantize(x, gguf.GGMLQuantizationType(int(type_))).view(np.uint8)
    assert np.array_equal(formats.encode(type_, x), theirs)  # the oracle
    assert np.array_equal(convert_rows(source, data, type_, "x"), theirs)  # the kernels
    decoded = gguf.quants.dequantize(
        theirs.view(np.float16) if type_ is GGMLType.F16 else theirs,
        gguf.GGMLQuantizationType(int(type_)),
    )
    with np.errstate(invalid="ignore"):
        assert np.array_equal(formats.decode(type_, theirs), decoded, equal_nan=True)


@pytest.mark.parametrize("type_", K_QUANTS)
def test_k_quants_are_decoded_as_by_gguf(type_):
    raw = random_blocks(type_, 8, 512, np.random.default_rng(1))
    theirs = gguf.quants.dequantize(raw, gguf.GGMLQuantizationType(int(type_)))
    assert np.array_equal(formats.decode(type_, raw), theirs)


@pytest.mark.parametrize("type_", BLOCKED)
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_quantising_refuses_what_is_not_finite(type_, value):
    x = np.ones((4, 64), np.float32)
    x[2, 40] = value
    with pytest.raises(ModelError, match=r"blk\.0\.up.*NaN or infinity"):
        convert_rows(GGMLType.F32, formats.encode(GGMLType.F32, x), type_, "blk.0.up")


def test_bf16_keeps_nan_and_rounds_to_even():
    x = np.array([[np.nan, np.inf, 1.00390625, 1.01171875]], np.float32)  # last two: ties
    back = formats.decode(GGMLType.BF16, formats.encode(GGMLType.BF16, x))
    assert np.isnan(back[0, 0])
    assert back[0, 1:].tolist() == [np.inf, 1.0, 1.015625]


def test_rows_must_be_whole_blocks():
    with pytest.raises(ValueError, match="not a whole number"):
        formats.row_bytes(GGMLType.Q4_0, 33)
    with pytest.raises(ValueError, match="cannot be decoded"):
        formats.decode(GGMLType.Q2_K, np.zeros((1, 84), np.uint8))
    with pytest.raises(ValueError, match="cannot be written"):
        formats.encode(GGMLType.Q2_K, np.zeros((1, 256), np.float32))


def test_round_activations():
    x = np.zeros((2, 40), np.float32)
    x[0, :4] = [127, 0.5, 1.5, -2.5]  # scale 1: halves go to even
    x[1, 32:] = 3.0  # a short last block
    rounded = formats.round_activations(x)
    assert rounded[0, :4].tolist() == [127, 0, 2, -2]
    assert rounded[1, :32].tolist() == [0] * 32
    np.testing.assert_allclose(rounded[1, 32:], 3.0, rtol=1e-7)
