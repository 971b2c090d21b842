"""Which tensor gets which type."""

from __future__ import annotations

from dataclasses import dataclass

from ..runtime.errors import RequestError
from ..runtime.formats import BLOCK_SIZES, GGMLType

# What `quantize` and `convert` can write, by the names users type.
TARGETS = {
    t.name.lower(): t
    for t in (
        GGMLType.F32,
        GGMLType.F16,
        GGMLType.BF16,
        GGMLType.Q8_0,
        GGMLType.Q5_1,
        GGMLType.Q5_0,
        GGMLType.Q4_1,
        GGMLType.Q4_0,
    )
}
# Under these, tensors that suffer most keep 8 bits.
_SMALL = (GGMLType.Q5_1, GGMLType.Q5_0, GGMLType.Q4_1, GGMLType.Q4_0)

# general.file_type of llama.cpp (llama_ftype)
FILE_TYPES = {
    GGMLType.F32: 0,
    GGMLType.F16: 1,
    GGMLType.Q4_0: 2,
    GGMLType.Q4_1: 3,
    GGMLType.Q8_0: 7,
    GGMLType.Q5_0: 8,
    GGMLType.Q5_1: 9,
    GGMLType.BF16: 32,
}

_PLAIN = ("_norm.weight", "_norm_2.weight", ".bias", ".ffn_freq", "position_embd.weight")


@dataclass(frozen=True)
class Policy:
    """A target type and what deviates from it; None means the default of the table below.

    | tensors                                   | type                              |
    |-------------------------------------------|-----------------------------------|
    | norms, biases, rope factors, other 1-D    | f32                           |
    | position_embd                             | f32                           |
    | ffn_freq, ffn_perm and integers           | as they are                   |
    | output, token_embd                        | q8_0 under q4 and q5, else target  |
    | predictors fc1, fc2                       | q8_0 under q4 and q5, else target  |
    | all other matrices                        | target                        |
    | rows that are not whole blocks            | f16                           |
    """

    target: GGMLType
    output_type: GGMLType | None = None
    predictor_type: GGMLType | None = None

    def type_of(self, name: str, type_: GGMLType, shape: tuple[int, ...]) -> GGMLType:
        """Return the type that tensor `name` (now `type_`) is to have in the new file."""
        if type_ in (GGMLType.I8, GGMLType.I16, GGMLType.I32, GGMLType.I64, GGMLType.F64):
            return type_
        if len(shape) == 1 or name.endswith(_PLAIN):
            return GGMLType.F32
        careful = GGMLType.Q8_0 if self.target in _SMALL else self.target
        if name in ("output.weight", "token_embd.weight"):
            wanted = self.output_type or careful
        elif name.endswith((".fc1.weight", ".fc2.weight")):
            wanted = self.predictor_type or careful
        else:
            wanted = self.target
        return GGMLType.F16 if shape[-1] % BLOCK_SIZES[wanted][0] else wanted


def parse_type(name: str) -> GGMLType:
    """Return the type that a user means by `name`, in any case; RequestError if there is none."""
    try:
        return TARGETS[name.lower()]
    except KeyError:
        raise RequestError(f"unknown type {name!r}; choose from {', '.join(TARGETS)}") from None
