"""gemv.cu and gemm.cu in the simulator against NumPy: odd sizes, every format, planted faults."""

import numpy as np
import pytest
from cuda_case import Rotation, Step, launch, packed
from cuda_operands import FORMATS, NO_TF32, Inputs, Weights, close_enough, only, pack, product
from cusim.sim import WAIT, SimError, load, unavailable

pytestmark = pytest.mark.skipif(bool(unavailable()), reason=unavailable())

STORE, ADD, STORE_RELU = range(3)
GRIDS = {
    "gemv": lambda rows, n_tok: (-(-rows // 8), n_tok),
    "gemm": lambda rows, n_tok: (-(-rows // 64), -(-n_tok // 128)),
}
COLS = {
    "q4_0": (32, 96, 320, 2080),
    "q8_0": (32, 96, 320, 1056),
    "q6_k": (256, 768, 2304),
    "f16": (7, 33, 64, 1100),
    "f32": (7, 33, 64, 520),
}


def simulator(kind, check=False):
    return load(f"{kind}.cu", check=check)


class Product:
    """One launch of y (op) w . x + bias: `run` returns y, `expected` is what it should be."""

    def __init__(self, sim, kind, suffix, rows, cols, n_tok, op=STORE, has_bias=False, seed=0):
        rng = np.random.default_rng(seed)
        self.sim, self.kernel = sim, f"{kind}_{suffix}"
        self.grid, self.n_tok = GRIDS[kind](rows, n_tok), n_tok
        w = Weights(rng, suffix, rows, cols)
        self.x = rng.standard_normal((n_tok, cols), np.float32)
        inputs = Inputs(sim, w.type, self.x)
        bias = rng.standard_normal(rows, np.float32) if has_bias else None
        # Wider than rows: what is beyond them is somebody else's.
        self.before = rng.standard_normal((n_tok, rows + 3), np.float32)
        self.fields = {
            "w": w.matrix(sim),
            **inputs.fields,
            "bias": None if bias is None else sim.array(bias, "bias"),
            "y_stride": rows + 3,
            "op": op,
        }
        if kind == "gemm":
            self.fields["n_tok"] = sim.array(np.array([n_tok], np.int32), "n_tok")
        y = product(inputs.values, w.values) + (0 if bias is None else bias)
        if op == ADD:
            y += self.before[:, :rows]
        self.expected = self.before.astype(np.float64)
        self.expected[:, :rows] = np.maximum(y, 0) if op == STORE_RELU else y

    def run(self, **changed):
        y = self.sim.array(self.before, "y")
        launch(self.sim, self.kernel, self.grid, **{**self.fields, "y": y, **changed})
        return y.numpy()

    def check(self):
        close_enough(self.run(), self.expected)


@pytest.mark.parametrize("suffix", FORMATS)
@pytest.mark.parametrize("kind", GRIDS)
def test_products(kind, suffix):
    seed = 0
    for cols in COLS[suffix]:
        for rows, n_tok in ((1, 1), (7, 3), (65, 1), (130, 33 if kind == "gemm" else 2)):
            seed += 1
            case = Product(
                simulator(kind), kind, suffix, rows, cols, n_tok, seed % 3, seed % 2 == 0, seed
            )
            case.check()


@pytest.mark.parametrize("kind", GRIDS)
def test_a_thousand_rows(kind):
    case = Product(simulator(kind), kind, "q4_0", 1000, 320, 3 if kind == "gemv" else 65)
    case.check()


@pytest.mark.parametrize("suffix", ["q8_0", "f16"])
@pytest.mark.parametrize("n_tok", [1, 3, 8, 9, 17, 31, 32, 33, 64, 65, 96, 127, 128, 129, 130, 512])
def test_gemm_takes_any_number_of_tokens(suffix, n_tok):
    case = Product(simulator("gemm"), "gemm", suffix, 70, 160, n_tok)
    case.check()


@pytest.mark.parametrize("suffix", ["f16", "f32"])
def test_gemm_without_tf32(suffix):
    sim = load("gemm.cu", replace=NO_TF32)
    for n_tok in (3, 70):
        case = Product(sim, "gemm", suffix, 67, 100, n_tok)
        case.check()


@pytest.mark.parametrize("suffix", ["f16", "f32"])
def test_floats_keep_their_precision(suffix):
    """tf32 alone would be wrong by 2^-11; here 2^-20 may be left out, and sums are rounded."""
    case = Product(simulator("gemm"), "gemm", suffix, 64, 64, 40)
    close_enough(case.run(), case.expected, 4e-7)


@pytest.mark.parametrize("suffix", ["q4_0", "q8_0", "q6_k"])
def test_integers_are_summed_in_the_order_of_k(suffix):
    """Exact sums of 32 columns (q6_k: 16) times both scales, one after the other: to the bit."""
    rng, n_tok, cols, rows = np.random.default_rng(5), 34, COLS[suffix][2], 66
    sim, w = simulator("gemm"), Weights(rng, suffix, rows, cols)
    x = rng.standard_normal((n_tok, cols), np.float32)
    q, d, _ = pack(x)
    group = 16 if suffix == "q6_k" else 32
    blocks = w.values.astype(np.float64).reshape(rows, -1, group)
    if suffix == "q6_k":
        raw = w.raw.reshape(rows, -1, 210)
        scales = raw[..., 208:].copy().view(np.float16).astype(np.float32)
        scales = (scales * raw[..., 192:208].view(np.int8)).reshape(rows, -1)
    else:
        raw = w.raw.reshape(rows, cols // 32, -1)
        scales = raw[..., :2].copy().view(np.float16).astype(np.float32)[..., 0]
    whole = np.rint(blocks / np.where(scales, scales, 1)[..., None])
    y = np.zeros((n_tok, rows), np.float32)
    for i in range(cols // group):
        exact = q[:, group * i : group * (i + 1)].astype(np.float64) @ whole[:, i].T
        both = d[:, group * i // 32, None] * scales[:, i]  # as float32
        y = (both.astype(np.longdouble) * exact + y).astype(np.float32)
    case = Product(sim, "gemm", suffix, rows, cols, n_tok)
    got = case.run(w=w.matrix(sim), **Inputs(sim, w.type, x).fields)
    np.testing.assert_array_equal(got[:, :rows], y)


@pytest.mark.parametrize("suffix", FORMATS)
def test_a_token_does_not_depend_on_the_others(suffix):
    sim, cols = simulator("gemm"), COLS[suffix][-1]
    case = Product(sim, "gemm", suffix, 65, cols, 35)
    alone = case.run()
    # The same number of blocks, fewer tokens: the rest of y stays as it was.
    fewer = case.run(n_tok=sim.array(np.array([2], np.int32), "n_tok"))
    assert np.array_equal(fewer[:2], alone[:2])
    assert np.array_equal(fewer[2:], case.before[2:])
    # Other neighbours, other places.
    order = np.random.default_rng(1).permutation(35)
    moved = case.run(**Inputs(sim, FORMATS[suffix], case.x[order]).fields)
    assert np.array_equal(moved[:, :65], alone[order, :65])


def test_results_do_not_depend_on_the_order_of_blocks_and_threads():
    for kind in GRIDS:
        case = Product(simulator(kind), kind, "q4_0", 66, 320, 3)
        y = [case.sim.array(case.before, "y") for _ in range(2)]
        for seed, out in enumerate(y):
            args = {**case.fields, "y": out}
            launch(case.sim, case.kernel, case.grid, order_seed=seed, **args)
        assert np.array_equal(y[0].numpy(), y[1].numpy())


@pytest.mark.parametrize("suffix", FORMATS)
@pytest.mark.parametrize("kind", GRIDS)
def test_check_finds_nothing(kind, suffix):
    cols = COLS[suffix][0] if suffix in ("f16", "f32") else COLS[suffix][1]
    case = Product(simulator(kind, check=True), kind, suffix, 67, cols, 3, ADD, True)
    case.check()


class PackedProduct(Product):
    """The same of one kernel that packs y, too: `run` returns y and what is packed."""

    def __init__(self, sim, suffix, rows, cols, n_tok, op=STORE_RELU, has_bias=True):
        super().__init__(sim, "gemv", suffix, rows, cols, n_tok, op, has_bias)
        self.kernel, self.grid, self.rows = f"gemv_packed_{suffix}", (rows // 32, n_tok), rows

    def run(self, order_seed=None):
        y, room = self.sim.array(self.before, "y"), packed(self.sim, self.n_tok, self.rows)
        product = {**self.fields, "y": y}
        launch(self.sim, self.kernel, self.grid, order_seed, product=product, packed=room)
        return y.numpy(), [part.numpy() for part in room]

    def check(self, order_seed=None):
        """`packed` is the y that there is, rounded, to the bit."""
        y, parts = self.run(order_seed)
        close_enough(y, self.expected)
        for ours, theirs in zip(parts, pack(y[:, : self.rows]), strict=True):
            np.testing.assert_array_equal(ours, theirs)
        return y


@pytest.mark.parametrize("suffix", FORMATS)
def test_packed_products(suffix):
    """y is that of the other kernel to the bit, for whatever order of blocks and threads."""
    for cols, (rows, n_tok) in zip(COLS[suffix], ((32, 1), (96, 3), (1024, 1)), strict=False):
        case = PackedProduct(simulator("gemv"), suffix, rows, cols, n_tok)
        plain = Product(simulator("gemv"), "gemv", suffix, rows, cols, n_tok, STORE_RELU, True)
        for seed in (None, 1):
            assert np.array_equal(case.check(seed), plain.run())


@pytest.mark.parametrize("suffix", FORMATS)
def test_check_finds_nothing_where_it_is_packed(suffix):
    PackedProduct(simulator("gemv", check=True), suffix, 64, COLS[suffix][1], 2, ADD).check()


class RopeProduct(Product):
    """q, k and v of the tokens of several texts, and what rope.cuh does with them."""

    def __init__(self, sim, suffix, cols, shape=(3, 2, 70), half=16, kind="neox", kv="f16"):
        self.heads, self.head_dim = [shape[0], shape[1], shape[1]], shape[2]
        rng, self.rows = np.random.default_rng(half), sum(self.heads) * self.head_dim
        self.step = Step(rng, [(31, 1), (0, 1), (64, 1)], room=2)
        n_tok, has_bias = self.step.n_tok_max, half % 3 == 1
        super().__init__(sim, "gemv", suffix, self.rows, cols, n_tok, has_bias=has_bias)
        self.plain, self.kernel = self.kernel, f"gemv_rope_{suffix}_{kv}"
        type_ = np.float16 if kv == "f16" else np.float32
        self.rotation = Rotation(rng, self.step, shape, half, kind, type_)

    def run(self, order_seed=None):
        """Return y, and the caches of K and V, which begin as bytes 0xFF."""
        y, rope = self.sim.array(self.before, "y"), self.rotation.on(self.sim)
        product = {**self.fields, "y": y}
        launch(self.sim, self.kernel, self.grid, order_seed, product=product, rope=rope)
        return [array.numpy() for array in (y, rope["k_cache"], rope["v_cache"])]

    def check(self, order_seed=None):
        """As the reference rotates, and rounds, what gemv gives: to the bit."""
        n, made = self.step.n_tok, self.sim.array(self.before, "y")
        launch(self.sim, self.plain, self.grid, **self.fields, y=made)
        made = made.numpy()[:n, : self.rows].reshape(n, -1, self.head_dim)
        q, k, v = np.split(made, np.cumsum(self.heads)[:2], axis=1)
        rotated, *caches = self.rotation.expected(q, k, v)
        y = self.before.copy()
        y[:n, : q[0].size] = rotated.reshape(n, -1)
        for ours, theirs in zip(self.run(order_seed), (y, *caches), strict=True):
            assert ours.tobytes() == theirs.tobytes()


@pytest.mark.parametrize("kind", ["norm", "neox"])
@pytest.mark.parametrize("kv", ["f16", "f32"])
@pytest.mark.parametrize("suffix", FORMATS)
def test_products_rotated(suffix, kv, kind):
    for cols, (shape, half) in zip(
        COLS[suffix], (((3, 1, 80), 16), ((2, 2, 32), 16), ((4, 2, 10), 2)), strict=False
    ):
        for seed in (None, 1):
            RopeProduct(simulator("gemv"), suffix, cols, shape, half, kind, kv).check(seed)


@pytest.mark.parametrize("suffix", FORMATS)
def test_check_finds_nothing_where_it_is_rotated(suffix):
    RopeProduct(simulator("gemv", check=True), suffix, COLS[suffix][1]).check()


FAULTS = {
    # (file, format, cols, text, what it becomes): the kind of fault that the check finds
    "no wait for other kernels": (("gemv", "q4_0", 96, WAIT, ""), "early"),
    "no wait of gemm": (("gemm", "q8_0", 96, WAIT, ""), "early"),
    "no wait of gemv_packed": (("gemv_packed", "q4_0", 96, WAIT, ""), "early"),
    "no wait of gemv_rope": (("gemv_rope", "q4_0", 96, WAIT, ""), "early"),
    "a row too many": (
        ("gemv", "q4_0", 96, "rows[r] = min(first + r, p.w.rows - 1)", "rows[r] = first + r"),
        "out of bounds",
    ),
    "a unit too many": (
        ("gemv", "q8_0", 96, "n_units = units<F>(w.cols);", "n_units = units<F>(w.cols) + 1;"),
        "out of bounds",
    ),
    "a result for a row that is not there": (
        ("gemv", "f32", 7, "lane_id() < GEMV_ROWS && mine < p.w.rows", "lane_id() < GEMV_ROWS"),
        "out of bounds",
    ),
    "a weight beyond the row": (
        ("gemm", "f16", 33, "if (8 * unit + i < w.cols) words", "words"),
        "out of bounds",
    ),
    "unaligned rows taken for aligned ones": (
        ("gemv", "f16", 33, "if (w.cols % 8 == 0) return {load_once((", "return {load_once(("),
        "misaligned",
    ),
    "no barrier before the tile is read": (
        ("gemm", "q4_0", 320, "__syncthreads();\n        if (IS_AHEAD", "if (IS_AHEAD"),
        "race",
    ),
    "no barrier before the tile is written again": (
        ("gemm", "q4_0", 320, "__syncthreads();  // what was there before has been read", ""),
        "race",
    ),
    "results over a tile that is still being read": (
        ("gemm", "f32", 33, "sums);\n    }\n    __syncthreads();", "sums);\n    }"),
        "race",
    ),
    "a result for no token": (
        ("gemm", "f16", 33, "return min(n_tok - first_token, TOKENS) *", "return TOKENS *"),
        "out of bounds",
    ),
    "a scale of no token": (
        ("gemm", "q4_0", 96, "has_scale(i) && t < n_tok && block", "has_scale(i) && block"),
        "out of bounds",
    ),
    "a fragment beyond the step": (
        ("gemm", "f32", 33, "rows[row][v + lane_id() / 16]", "rows[row][v + lane_id() / 8]"),
        "uninitialised read",
    ),
    "a token too many": (
        ("gemm", "q8_0", 96, "if (t < n_tok && column < cols) mine", "if (column < cols) mine"),
        "out of bounds",
    ),
    "results read before all are there": (
        ("gemv_packed", "q4_0", 96, "= result;\n    __syncthreads();", "= result;"),
        "uninitialised read",
    ),
    "every lane has a result": (
        ("gemv_packed", "q4_0", 96, "if (lane_id() < GEMV_ROWS) results", "results"),
        "race",
    ),
    "every warp packs": (("gemv_packed", "q4_0", 96, "if (warp_id() > 0) return;", ""), "race"),
    "rows that are another block's": (
        (
            "gemv_packed", "q4_0", 96,
            "(THREADS / WARP) + warp_id()) * GEMV_ROWS",
            "(THREADS / WARP) + warp_id() * 2) * GEMV_ROWS",
        ),
        "race",
    ),
    "a head too many": (
        ("gemv_rope", "q4_0", 96, "if (head >= rope.n_head + 2 * rope.n_head_kv) return;", ""),
        "out of bounds",
    ),
    "every lane rotates": (
        ("gemv_rope", "q4_0", 96, "if (lane_id() == 0) placed.put", "placed.put"),
        "race",
    ),
    "q of the first head": (
        ("gemv_rope", "q4_0", 96, "product.y_stride + first);", "product.y_stride);"),
        "race",
    ),
    "blocks of the first token": (
        ("gemv_packed", "q4_0", 96, "(long long)blockIdx.y * gridDim.x + blockIdx.x", "blockIdx.x"),
        "race",
    ),
}  # fmt: skip


def planted(kind, suffix, cols, text, becomes, check=False, **options):
    """Return a product of a kernel that has a fault."""
    source = kind.split("_")[0]
    replace = {text: becomes, **only(suffix, source.upper())}
    sim = load(f"{source}.cu", check=check, replace=replace)
    if kind == "gemv_packed":
        return PackedProduct(sim, suffix, 96, cols, 2)
    if kind == "gemv_rope":
        return RopeProduct(sim, suffix, cols)
    return Product(sim, kind, suffix, 67, cols, 3, **options)


@pytest.mark.parametrize("name", FAULTS)
def test_check_finds_planted_faults(name):
    where, fault = FAULTS[name]
    case = planted(*where, check=True, op=ADD, has_bias=True)
    with pytest.raises(SimError) as error:
        case.run()
    assert error.value.kind == fault


# Faults that break no rule: only a comparison finds them.
WRONG = {
    "offset of q4_0": ("gemv", "q4_0", 96, "(q[i] & 0x0f0f0f0fu, 8)", "(q[i] & 0x0f0f0f0fu, 7)"),
    "group of q6_k": ("gemm", "q6_k", 256, "16 * (group % 2) + 8 * w.part", "16 * (group % 2)"),
    "scale of a token": (
        "gemm", "q4_0", 96, "token_scales[v / 2][part.token", "token_scales[0][part.token",
    ),
    "half of a fragment": ("gemm", "f16", 64, "c[3], a[2 * h + 1]", "c[3], a[2 * h]"),
    "half of k": ("gemm", "q6_k", 256, "b[j % 2][g])", "b[j % 2][0])"),
    "rows of another fragment": (
        "gemm", "q8_0", 96, "16 * i + lane_id() % 16", "16 * i + lane_id() % 8",
    ),
    "half of a fragment of tokens": ("gemm", "q8_0", 96, "[v + lane_id() / 8 % 2]", "[v]"),
    "what tf32 leaves of a weight": ("gemm", "f32", 520, "if (!F::IS_TF32) mma", "if (false) mma"),
    "what tf32 leaves of a token": (
        "gemm", "f16", 1100, "__float_as_uint(x - high)", "__float_as_uint(0.0f)",
    ),
    "a lane's units": (
        "gemv", "f32", 520,
        "unit = first + i * WARP;\n            if", "unit = first + i;\n            if",
    ),
    "the rows of a warp the other way round": (
        "gemv_packed", "q4_0", 96, "GEMV_ROWS + lane_id()]", "GEMV_ROWS + 1 - lane_id()]",
    ),
    "the rows of a pair side by side": (
        "gemv_rope", "q4_0", 96, "first + pair.second}", "first + pair.first + 1}",
    ),
    "a bias of the first head": (
        "gemv_rope", "q4_0", 96, "product.bias[rows[r]]", "product.bias[rows[r] - first]",
    ),
    "packed before its relu": (
        "gemv_packed", "q4_0", 96,
        "if (p.op == STORE_RELU && sum < 0) sum = 0;\n    if (is_mine) *y = sum;",
        "if (is_mine) *y = p.op == STORE_RELU && sum < 0 ? 0 : sum;",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
def test_comparison_finds_planted_faults(name):
    case = planted(*WRONG[name])
    with pytest.raises(AssertionError):
        case.check()
