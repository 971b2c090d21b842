"""elementwise.cu in the simulator against the reference: odd sizes, planted faults."""

import mmap
from functools import cache

import cuda_case
import numpy as np
import pytest
from cuda_case import NOT_PACKED, NOWHERE, Rotation, Step, launch
from cuda_operands import FORMATS, Weights, close_enough, only, pack
from cusim.sim import WAIT, SimError, load, unavailable
from powerinfer.runtime import reference
from powerinfer.runtime.config import POSITION_OFFSET
from powerinfer.runtime.formats import SMALLEST_AMAX

pytestmark = pytest.mark.skipif(bool(unavailable()), reason=unavailable())

TYPES = {"f16": np.float16, "f32": np.float32}
ROOM = 2  # tokens that the grid has beyond those that there are
COLS = {
    "q4_0": (32, 96, 1056),
    "q8_0": (32, 96, 1056),
    "q6_k": (256, 768, 1280),
    "f16": (7, 33, 64, 2500),
    "f32": (7, 33, 64, 2500),
}


@cache
def simulator(check=False):
    return load("elementwise.cu", check=check)


class Case:
    """A kernel's operands on the host. `run` launches it on new copies of them.

    `run` returns {name: array} of what it wrote, of which rows beyond n_tok stay unwritten;
    `expected` is what those before them should be.
    """

    kernel = ""

    def run(self, sim, order_seed=None):
        outputs, fields = self.put(sim)
        grid = self.grid()
        launch(sim, self.kernel, grid, order_seed, **fields)
        return {name: array.numpy() for name, array in outputs.items()}

    def check(self, sim):
        ours, expected = self.run(sim), self.expected()
        assert ours.keys() == expected.keys()
        for name, theirs in expected.items():
            # To the bit: the reference has the same operations in the same order.
            np.testing.assert_array_equal(ours[name][: len(theirs)], theirs, name)
            assert (ours[name][len(theirs) :].view(np.uint8) == 0xFF).all(), name


class Embed(Case):
    def __init__(self, suffix="f16", cols=33, has_table=True, n_tok=3):
        rng = np.random.default_rng(cols)
        self.kernel, self.n_tok, self.cols = f"embed_{suffix}", n_tok, cols
        self.w = Weights(rng, suffix, 50, cols)
        self.tokens, self.positions = np.full((2, n_tok + ROOM), NOWHERE, np.int32)
        self.tokens[:n_tok] = [49, 0, *rng.integers(0, 50, n_tok)][:n_tok]
        self.positions[:n_tok] = [8, 0, *rng.integers(0, 9, n_tok)][:n_tok]
        table = rng.standard_normal((9 + POSITION_OFFSET, cols), np.float32)
        self.table = table if has_table else None

    def grid(self):
        return -(-self.cols // 1024), self.n_tok + ROOM

    def put(self, sim):
        x = sim.empty((self.n_tok + ROOM, self.cols), np.float32, "x")
        return {"x": x}, {
            "counts": sim.array(np.array([self.n_tok, 0], np.int32), "counts"),
            "tokens": sim.array(self.tokens, "tokens"),
            "positions": sim.array(self.positions, "positions"),
            "embd": self.w.matrix(sim),
            "table": None if self.table is None else sim.array(self.table, "table"),
            "offset": POSITION_OFFSET,
            "x": x,
        }

    def expected(self):
        x = self.w.values[self.tokens[: self.n_tok]]
        if self.table is not None:
            x = x + self.table[self.positions[: self.n_tok] + POSITION_OFFSET]
        return {"x": x}


class Norm(Case):
    kernel = "norm_rows"

    def __init__(self, n=96, is_layer=False, has_bias=True, is_picked=False, n_tok=3):
        rng = np.random.default_rng(n)
        self.n, self.is_layer, self.n_tok = n, is_layer, n_tok
        self.x = rng.standard_normal((n_tok + 4, n), np.float32) + np.float32(0.5)
        self.x[0] *= np.float32(1e-3)  # where eps counts
        self.weight, self.bias = rng.standard_normal((2, n), np.float32)
        self.bias = self.bias if has_bias else None
        self.index = None
        if is_picked:
            self.index = np.full(n_tok + ROOM, NOWHERE, np.int32)
            self.index[:n_tok] = [n_tok + 3, 0, 0][:n_tok]

    def grid(self):
        return self.n_tok + ROOM

    def put(self, sim):
        # Where the tokens are those whose logits are wanted, it is the second number that counts.
        counts = sim.array(np.array([NOWHERE, self.n_tok], np.int32), "counts")
        h = sim.empty((self.n_tok + ROOM, self.n), np.float32, "h")
        room, outputs = NOT_PACKED, {"h": h}
        if self.index is None:  # for the CPU, too
            outputs["host_h"] = sim.empty(h.shape, np.float32, "host_h")
        if self.n % 32 == 0:
            room = cuda_case.packed(sim, self.n_tok + ROOM, self.n)
            outputs |= dict(zip("qds", room, strict=True))
        return outputs, {
            "counts": counts.address + 4,
            "index": None if self.index is None else sim.array(self.index, "index"),
            "x": sim.array(self.x, "x"),
            "weight": sim.array(self.weight, "weight"),
            "bias": None if self.bias is None else sim.array(self.bias, "bias"),
            "n": self.n,
            "is_layer": self.is_layer,
            "eps": 1e-5,
            "h": h,
            "host_h": outputs.get("host_h"),
            "packed": room,
        }

    def expected(self):
        rows = np.arange(self.n_tok) if self.index is None else self.index[: self.n_tok]
        x = self.x[rows].astype(np.float64)
        if self.is_layer:
            return {"h": reference.layer_norm(x, self.weight, self.bias, 1e-5)}
        h = reference.rms_norm(x, self.weight, 1e-5)
        return {"h": h if self.bias is None else h + self.bias}

    def check(self, sim):
        """`h` against the reference; `packed` is h rounded, to the bit."""
        ours = self.run(sim)
        h = ours["h"][: self.n_tok]
        close_enough(h, self.expected()["h"], 1e-6)
        assert np.isnan(ours["h"][self.n_tok :]).all()
        np.testing.assert_array_equal(ours.get("host_h", ours["h"]), ours["h"])
        if self.n % 32 == 0:
            for name, theirs in zip("qds", pack(h), strict=True):
                np.testing.assert_array_equal(ours[name][: self.n_tok], theirs)


class Pack(Case):
    kernel = "pack"

    def __init__(self, cols=96, n_tok=3):
        rng = np.random.default_rng(cols)
        self.cols, self.n_tok = cols, n_tok
        self.x = rng.standard_normal((n_tok + ROOM, cols), np.float32)
        # Halves of the scale (127 is the largest): they go to the even neighbour.
        self.x[0, :32] = np.concatenate([[127], np.arange(31) - 15.5])
        if n_tok > 1:
            self.x[1, :32] = 0
        if n_tok > 2:  # too small for a scale, and just not
            self.x[2, :32] = SMALLEST_AMAX / 2
            self.x[2, -32:] = -SMALLEST_AMAX

    def grid(self):
        return -(-self.cols // 256), self.n_tok + ROOM

    def put(self, sim):
        room = cuda_case.packed(sim, self.n_tok + ROOM, self.cols)
        return dict(zip("qds", room, strict=True)), {
            "counts": sim.array(np.array([self.n_tok, 0], np.int32), "counts"),
            "x": sim.array(self.x, "x"),
            "cols": self.cols,
            "packed": room,
        }

    def expected(self):
        return dict(zip("qds", pack(self.x[: self.n_tok]), strict=True))


class Rope(Case):
    """Tokens of several texts; a cache and a q that are wider than what is theirs."""

    def __init__(self, shape=(3, 1, 80), half=16, kind="neox", type_="f16"):
        rng = np.random.default_rng(half)
        self.n_head, self.n_head_kv, self.head_dim = shape
        self.kernel = f"rope_append_{type_}"
        self.step = Step(rng, [(31, 2), (0, 3), (64, 1)], ROOM)
        n = self.step.n_tok_max
        widths = [self.n_head * self.head_dim, *2 * [self.n_head_kv * self.head_dim]]
        self.qkv = [rng.standard_normal((n, w + i + 1), np.float32) for i, w in enumerate(widths)]
        self.rotation = Rotation(rng, self.step, shape, half, kind, TYPES[type_])

    def grid(self):
        return self.n_head + 2 * self.n_head_kv, self.step.n_tok_max

    def put(self, sim):
        q, k, v = (sim.array(x, name) for x, name in zip(self.qkv, "qkv", strict=True))
        rope = self.rotation.on(sim)
        return {"q": q, "k": rope["k_cache"], "v": rope["v_cache"]}, {
            "q": q,
            "k": k,
            "v": v,
            **{f"{name}_stride": x.shape[1] for name, x in zip("qkv", self.qkv, strict=True)},
            "rope": rope,
        }

    def expected(self):
        n = self.step.n_tok
        q, k, v = (
            x[:n, : heads * self.head_dim].reshape(n, heads, self.head_dim)
            for x, heads in zip(self.qkv, (self.n_head, *2 * [self.n_head_kv]), strict=True)
        )
        rotated, k_cache, v_cache = self.rotation.expected(q, k, v)
        all_q = self.qkv[0].copy()
        all_q[:n, : q[0].size] = rotated.reshape(n, -1)
        return {"q": all_q, "k": k_cache, "v": v_cache}


class AddParts(Case):
    kernel = "add_parts"

    def __init__(self, n=300, n_parts=32, has_bias=True, has_other=True, n_tok=3):
        rng = np.random.default_rng(n + n_parts)
        self.n, self.n_parts, self.n_tok = n, n_parts, n_tok
        self.x, self.other = rng.standard_normal((2, n_tok + ROOM, n), np.float32)
        self.other = self.other if has_other else None
        self.parts = rng.standard_normal((n_parts, n_tok + ROOM, n), np.float32)
        self.bias = rng.standard_normal(n, np.float32) if has_bias else None

    def grid(self):
        return -(-self.n // 64), self.n_tok + ROOM

    def put(self, sim):
        x = sim.array(self.x, "x")
        return {"x": x}, {
            "counts": sim.array(np.array([self.n_tok, 0], np.int32), "counts"),
            "x": x,
            "parts": sim.array(self.parts, "parts") if self.n_parts else None,
            "n_parts": self.n_parts,
            "part_stride": self.x.size,
            "bias": None if self.bias is None else sim.array(self.bias, "bias"),
            "other": None if self.other is None else sim.array(self.other, "other"),
            "n": self.n,
        }

    def expected(self):
        x, total = self.x.copy(), np.zeros_like(self.x)
        for part in self.parts:
            total += part
        for part in (self.bias, self.other):
            total += 0 if part is None else part
        x[: self.n_tok] += total[: self.n_tok]
        return {"x": x}


@pytest.mark.parametrize("suffix", FORMATS)
def test_embed(suffix):
    for i, cols in enumerate(COLS[suffix]):
        Embed(suffix, cols, has_table=i % 2 == 0, n_tok=1 + 4 * (i % 2)).check(simulator())


@pytest.mark.parametrize("is_layer", [False, True])
@pytest.mark.parametrize(
    "n", [1, 3, 31, 32, 96, 1000, 1056, 4096, 4101, 4128, 8224, 8197, 16384, 16416]
)
def test_norm(n, is_layer):
    Norm(n, is_layer, has_bias=n % 3 == 0, is_picked=n % 2 == 0).check(simulator())


def test_a_constant_row_has_a_layer_norm():
    case = Norm(96, is_layer=True)
    case.x[1] = 3
    case.check(simulator())


@pytest.mark.parametrize("cols", [32, 224, 256, 288, 4000])
def test_pack(cols):
    for n_tok in (1, 3):
        Pack(cols, n_tok).check(simulator())


@pytest.mark.parametrize("type_", TYPES)
@pytest.mark.parametrize("kind", ["norm", "neox"])
def test_rope_append(kind, type_):
    for shape, half in (
        ((3, 3, 64), 32), ((2, 1, 80), 40), ((3, 1, 80), 16), ((2, 2, 96), 48), ((1, 1, 256), 128),
        ((5, 1, 10), 2), ((2, 1, 130), 0),
    ):  # fmt: skip
        Rope(shape, half, kind, type_).check(simulator())


@pytest.mark.parametrize("n", [1, 100, 256, 1056])
def test_add_parts(n):
    for i, n_parts in enumerate((0, 1, 7, 32)):
        AddParts(n, n_parts, i % 2 == 0, i < 2, n_tok=1 + 2 * (i % 2)).check(simulator())


def beyond_an_int(shape, dtype):
    """Return zeros, more than 2^31 of them; memory is taken only where something is written."""
    size = int(np.prod(shape)) * np.dtype(dtype).itemsize
    no_reserve = getattr(mmap, "MAP_NORESERVE", 0x4000)
    memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | no_reserve)
    return np.frombuffer(memory, dtype).reshape(shape)


def test_indices_beyond_an_int():
    """Rows of a matrix, and pages of a cache, that start 2^31 numbers behind the first."""
    far = 1 << 20
    case = Rope((1, 1, 64), 32)
    case.step.pages[case.step.pages != NOWHERE] += far
    caches = beyond_an_int((2, far + case.step.n_pages, 1, 32, 64), np.float16)
    _, fields = case.put(simulator())
    for name, cache_ in zip(("k_cache", "v_cache"), caches, strict=True):
        fields["rope"][name] = simulator().register(cache_, name)
    launch(simulator(), case.kernel, case.grid(), **fields)
    case.step.pages[case.step.pages != NOWHERE] -= far
    expected = case.expected()
    for name, cache_ in zip("kv", caches, strict=True):
        is_written = expected[name].view(np.uint16) != 0xFFFF
        np.testing.assert_array_equal(cache_[far:], np.where(is_written, expected[name], 0))

    rows = beyond_an_int((far * 16 + 1, 128), np.float16)
    rows[-1] = np.arange(128)
    case = Embed("f16", 128, has_table=False, n_tok=1)
    case.tokens[0] = len(rows) - 1
    outputs, fields = case.put(simulator())
    fields["embd"] = (simulator().register(rows, "embd"), None, *rows.shape)
    launch(simulator(), case.kernel, case.grid(), **fields)
    np.testing.assert_array_equal(outputs["x"].numpy()[0], rows[-1])


EVERY = {
    "embed": Embed,
    "norm": lambda: Norm(1056, is_layer=True, is_picked=True),
    "norm of 1001": lambda: Norm(1001, is_layer=True),
    "norm of 5120": lambda: Norm(5120, is_layer=True),
    "pack": lambda: Pack(288),
    "rope_append": lambda: Rope((3, 2, 80)),
    "add_parts": AddParts,
}


@pytest.mark.parametrize("name", EVERY)
def test_results_do_not_depend_on_the_order_of_blocks_and_threads(name):
    case = EVERY[name]()
    plain, *shuffled = (case.run(simulator(), seed) for seed in (None, 1, 2))
    for other in shuffled:
        for key, value in plain.items():
            assert np.array_equal(value.view(np.uint8), other[key].view(np.uint8))


@pytest.mark.parametrize("name", EVERY)
def test_check_finds_nothing(name):
    EVERY[name]().check(simulator(check=True))


FAULTS = {
    # text, what it becomes, the kind of fault that the check finds
    "a column too many": ("embed", "if (col < n) x[col]", "x[col]", "out of bounds"),
    "a token too many to embed": (
        "embed",
        "if (t >= p.counts[0]) return;\n    const float* table",
        "const float* table",
        "out of bounds",
    ),
    "a token too many to norm": (
        "norm",
        "if (!is_there) return;\n        row",
        "row",
        "out of bounds",
    ),
    "a column too many of a row that is not whole": (
        "norm of 1001",
        "if (!IS_WHOLE && is_any) p.h[at + i + j]",
        "if (!IS_WHOLE) p.h[at + i + j]",
        "out of bounds",
    ),
    "columns too many of a row that is": (
        "norm",
        "i < n ? *(const float4*)",
        "true ? *(const float4*)",
        "out of bounds",
    ),
    "a block beyond the row": ("norm", "/ QK, is_any);", "/ QK);", "race"),
    "sums read before all are there": (
        "norm",
        "= x;\n    __syncthreads();",
        "= x;",
        "uninitialised read",
    ),
    "sums overwritten before all have read them": (
        "norm",
        "    __syncthreads();  // before the next call writes partial\n",
        "",
        "race",
    ),
    "a block too many": ("pack", " || first >= p.cols) return;", ") return;", "race"),
    "every lane says the scale": (
        "pack",
        "if (lane_id() % LANES == 0) {\n        packed.d",
        "{\n        packed.d",
        "race",
    ),
    "a token too many to rotate": (
        "rope_append",
        "(t < n_tok) & (position",
        "(position",
        "out of bounds",
    ),
    "a pair too many": (
        "rope_append",
        "i >= rope.head_dim / 2",
        "i > rope.head_dim / 2",
        "race",
    ),
    "an element too many": ("add_parts", "if (i >= p.n) return;", "", "out of bounds"),
    "a scale where all is zero": ("pack", "amax < SMALLEST_AMAX", "amax < 0", "arithmetic"),
    "pairs of the whole head": (
        "rope_append",
        "is_apart ? i + p.half",
        "is_apart ? i + p.head_dim / 2",
        "race",
    ),
    "k of the first head alone": (
        "rope_append",
        "head - p.n_head - is_v * p.n_head_kv",
        "0",
        "race",
    ),
}


@pytest.mark.parametrize("name", FAULTS)
def test_check_finds_planted_faults(name):
    case, text, becomes, kind = FAULTS[name]
    replace = {text: becomes, **only("f16", "EMBED")}
    sim = load("elementwise.cu", check=True, replace=replace)
    with pytest.raises(SimError) as error:
        EVERY[case]().run(sim)
    assert error.value.kind == kind


@pytest.mark.parametrize("name", EVERY)
def test_every_kernel_waits_for_those_before_it(name):
    with pytest.raises(SimError, match="before it has waited for the kernels before it") as error:
        EVERY[name]().run(load("elementwise.cu", check=True, replace={WAIT: ""}))
    assert error.value.kind == "early"


WRONG = {
    # Faults that break no rule: only a comparison finds them.
    "position without the offset": ("embed", "(p.positions[t] + p.offset)", "p.positions[t]"),
    "a column of f16": (
        "embed",
        "return 8 * unit + 4 * vector;",
        "return 8 * unit + 4 * (1 - vector);",
    ),
    "eps beside the root": ("norm", "(squares) / n + p.eps)", "(squares) / n) + p.eps"),
    "a variance about 0": (
        "norm",
        "i + j < n ? four.x[j] - mean : 0;",
        "i + j < n ? four.x[j] : 0;",
    ),
    "columns beyond the row in its variance": (
        "norm of 1001",
        "i + j < n ? four.x[j] - mean : 0;",
        "four.x[j] - mean;",
    ),
    "index not looked at": ("norm", "row = p.index[t];", ""),
    "the first columns again": (
        "norm of 5120",
        "load_four<IS_WHOLE>(x, k * AT_ONCE + own",
        "load_four<IS_WHOLE>(x, own",
    ),
    "sums of half the warps": (
        "norm of 5120",
        "lane_id() < THREADS / WARP ?",
        "lane_id() < THREADS / WARP / 2 ?",
    ),
    "a bias of other columns": ("norm", "+ four.bias[j]", "+ four.bias[0]"),
    "halves away from zero": (
        "pack",
        "int(rintf(x[i] * inverse))",
        "int(x[i] * inverse + (x[i] < 0 ? -0.5f : 0.5f))",
    ),
    "128 steps": ("pack", "amax / 127;", "amax / 128;"),
    "rotated the other way": ("rope_append", "a = __fsub_rn(", "a = __fadd_rn("),
    "v is rotated": ("rope_append", "i < p.half && !is_v", "i < p.half"),
    "the next slot": (
        "rope_append",
        "position % PAGE) * head_dim",
        "(position + 1) % PAGE) * head_dim",
    ),
    "a part left out": (
        "add_parts",
        "(int s = 0; s < p.n_parts; s++)",
        "(int s = 1; s < p.n_parts; s++)",
    ),
    "the bias of other columns": ("add_parts", "? p.bias[i]", "? p.bias[threadIdx.x]"),
    "the CPU's part of another token": (
        "add_parts",
        "load_fresh(p.other + at)",
        "load_fresh(p.other + i)",
    ),
    "a token too many": ("add_parts", "if (is_there) p.x[at]", "p.x[at]"),
}


@pytest.mark.parametrize("name", WRONG)
def test_comparison_finds_planted_faults(name):
    case, text, becomes = WRONG[name]
    sim = load("elementwise.cu", replace={text: becomes, **only("f16", "EMBED")})
    case = EVERY[case]()
    case.check(simulator())
    with pytest.raises(AssertionError):
        case.check(sim)
