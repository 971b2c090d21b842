"""attention.cu in the simulator against the reference: splits, tiles, and faults put into them."""

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from cuda_case import NOT_PACKED, Step, launch, packed
from cusim.sim import WAIT, SimError, Simulator, load, unavailable
from powerinfer.runtime.footprint import attention_blocks, attention_splits
from powerinfer.runtime.formats import round_activations
from powerinfer.runtime.reference import Reference

pytestmark = pytest.mark.skipif(bool(unavailable()), reason=unavailable())

TYPES = {"f16": np.float16, "f32": np.float32}
# n_head, n_head_kv, head_dim: groups of 1, 2, 8, 9, 71; sizes that fill no piece, no lane, no stage
SHAPES = [
    (2, 2, 64), (4, 2, 80), (3, 3, 96), (8, 1, 128), (18, 2, 64), (2, 1, 256), (71, 1, 64),
    (3, 1, 10), (2, 1, 2), (1, 1, 130), (2, 2, 16),
]  # fmt: skip
CONTEXTS = [1, 31, 32, 33, 256, 257, 700]


class Case:
    """Random q and cache for a step. What no token may see is NaN."""

    def __init__(
        self, shape: tuple[int, int, int], type_: str, texts: list[tuple[int, int]], room: int = 0
    ) -> None:
        rng = np.random.default_rng(7)
        self.type_, (self.n_head, self.n_head_kv, self.head_dim) = type_, shape
        self.step = Step(rng, texts, room)
        self.q = rng.standard_normal((self.step.n_tok_max, self.n_head * self.head_dim))
        self.q = self.q.astype(np.float32)
        size = (self.step.n_pages, self.n_head_kv, 32, self.head_dim)
        self.k, self.v = np.full((2, *size), np.nan, TYPES[type_])
        for row, length in enumerate(self.step.lengths):
            pages, slots = self.step.places(row)
            for part in (self.k, self.v):
                part[pages, :, slots] = rng.standard_normal((length, *size[1::2]))

    def expected(self) -> np.ndarray:
        """Return a [n_tok, n_head * head_dim] of the reference."""
        plan: Any = SimpleNamespace(
            config=self,
            step=self.step,
            cache=SimpleNamespace(k=[self.k], v=[self.v]),
            buffers=SimpleNamespace(q=self.q, a=np.zeros_like(self.q)),
        )
        Reference(plan).attend(0)
        return plan.buffers.a[: self.step.n_tok]

    def put(self, sim: Simulator) -> dict[str, Any]:
        """Return what all kernels of attention read."""
        return self.step.on(sim, "counts", "rows", "positions", "pages") | {
            "pages_cols": self.step.pages.shape[1],
            "q": sim.array(self.q, "q"),
            "q_stride": self.q.shape[1],
            "k_cache": sim.array(self.k, "k_cache"),
            "v_cache": sim.array(self.v, "v_cache"),
            "n_head": self.n_head,
            "n_head_kv": self.n_head_kv,
            "head_dim": self.head_dim,
            "scale": self.head_dim**-0.5,
        }

    def new_a(self, sim: Simulator) -> Any:
        return sim.empty(self.q.shape, np.float32, "a")

    def split(
        self,
        sim: Simulator,
        a: Any,
        pack: Any = NOT_PACKED,
        order_seed: int | None = None,
        n_splits: int = 0,
    ) -> None:
        """attend_split; n_splits of 0: as many as an engine has."""
        n_splits = n_splits or attention_splits(self)
        size = (len(self.step.lengths), self.n_head, n_splits)
        blocks = attention_blocks(self)
        tickets = sim.array(np.zeros((size[0], blocks), np.int32), "tickets")
        launch(
            sim,
            f"attend_split_{self.type_}",
            (n_splits, blocks, self.step.n_tok_max),
            order_seed,
            **self.put(sim),
            group=self.n_head // self.n_head_kv,
            sums=sim.empty((*size, self.head_dim), np.float32, "sums"),
            peaks=sim.empty(size, np.float32, "peaks"),
            totals=sim.empty(size, np.float32, "totals"),
            tickets=tickets,
            a=a,
            packed=pack,
        )
        assert not tickets.numpy().any()

    def tile(self, sim: Simulator, a: Any, order_seed: int | None = None) -> None:
        queries = 16 if self.head_dim > 128 else 32
        n = self.step.n_tok_max * self.n_head // self.n_head_kv
        grid = (-(-n // queries), self.n_head_kv)
        launch(sim, f"attend_tile_{self.type_}", grid, order_seed, **self.put(sim), a=a)


def simulator(check: bool = False) -> Simulator:
    return load("attention.cu", check=check)


def compare(ours: np.ndarray, theirs: np.ndarray, relative: float = 1e-5) -> None:
    """Assert equality within `relative` of each token's largest value, and nothing beyond them."""
    n = len(theirs)
    error = np.abs(ours[:n] - theirs).max(axis=1) / np.abs(theirs).max(axis=1)
    assert error.max() < relative
    assert np.isnan(ours[n:]).all()


@pytest.mark.parametrize("type_", TYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_one_token_of_each_text(shape, type_):
    case = Case(shape, type_, [(length - 1, 1) for length in CONTEXTS], room=1)
    sim = simulator()
    a = case.new_a(sim)
    case.split(sim, a)
    compare(a.numpy(), case.expected())


@pytest.mark.parametrize("type_", TYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_chunks_of_several_texts(shape, type_):
    """Chunks that begin and end within pages, tiles and texts; lone tokens are left out."""
    texts = [(0, 1), (0, 33), (31, 3), (300, 1), (32, 9), (255, 2), (5, 1), (29, 40)]
    case = Case(shape, type_, texts, room=5)
    sim = simulator()
    a, alone = case.new_a(sim), case.new_a(sim)
    case.tile(sim, a)
    is_alone = np.repeat([n for _, n in texts], [n for _, n in texts]) == 1
    a, expected = a.numpy(), case.expected()
    assert np.isnan(a[:-5][is_alone]).all()
    compare(np.concatenate([a[:-5][~is_alone], a[-5:]]), expected[~is_alone])
    case.split(sim, alone)
    alone = alone.numpy()
    assert np.isnan(alone[:-5][~is_alone]).all()
    compare(np.concatenate([alone[:-5][is_alone], alone[-5:]]), expected[is_alone])


@pytest.mark.parametrize("n_splits", [1, 2, 7, 32])
@pytest.mark.parametrize("shape", [(2, 2, 64), (4, 1, 80), (7, 1, 16), (1, 1, 18)])
def test_any_number_of_splits(shape, n_splits):
    """Long splits, of which a warp has one chunk after the other; and short ones, many empty."""
    for type_ in TYPES:
        case = Case(shape, type_, [(length - 1, 1) for length in (1, 16, 17, 500, 1100)])
        sim = simulator()
        a = case.new_a(sim)
        case.split(sim, a, n_splits=n_splits)
        compare(a.numpy(), case.expected())


def test_splits_of_a_model():
    """Blocks for all of a GPU, and no more than fit at once: two for each of 132."""
    expected = {(32, 32): 8, (40, 40): 6, (32, 8): 32, (71, 1): 28, (128, 8): 16, (300, 300): 1}
    for (n_head, n_head_kv), n in expected.items():
        assert attention_splits(SimpleNamespace(n_head=n_head, n_head_kv=n_head_kv)) == n


def test_neighbours_do_not_change_a_bit():
    """A token's result is the same in a batch and alone, in any chunk of two or more."""
    sim = simulator()
    shape, texts = (4, 2, 80), [(40, 30), (600, 1), (64, 2), (0, 31)]
    case = Case(shape, "f16", texts)
    whole = case.new_a(sim)
    case.tile(sim, whole)
    case.split(sim, whole)
    first = 0
    for row, (before, new) in enumerate(texts):
        for start in range(0, new, 2):
            # Two tokens at a time (of an odd number: the last three).
            n = new - start if new - start <= 3 else 2
            if start + n > new or (start and new - start == 1):
                continue
            single = Case(shape, "f16", [(before + start, n)])
            single.k, single.v, single.step.n_pages = case.k, case.v, case.step.n_pages
            single.step.pages = case.step.pages[row : row + 1]
            single.q = case.q[first + start : first + start + n]
            a = single.new_a(sim)
            (single.tile if n > 1 else single.split)(sim, a)
            at = first + start
            np.testing.assert_array_equal(a.numpy(), whole.numpy()[at : at + n])
        first += new


def test_blocks_in_any_order():
    """Results do not depend on the order in which blocks and threads happen to run."""
    case = Case((4, 2, 80), "f16", [(0, 20), (300, 9), (299, 1)])
    sim = simulator()
    a, b = case.new_a(sim), case.new_a(sim)
    case.tile(sim, a)
    case.split(sim, a)
    case.tile(sim, b, order_seed=3)
    case.split(sim, b, order_seed=3)
    np.testing.assert_array_equal(a.numpy(), b.numpy())


def test_large_scores():
    """Peaks that grow from page to page, and scores that no exponential can hold."""
    case = Case((2, 1, 64), "f32", [(0, 300), (299, 1)])
    case.q *= 40
    for row, length in enumerate(case.step.lengths):
        pages, slots = case.step.places(row)
        case.k[pages, :, slots] *= np.linspace(0.1, 3, length)[:, None, None]
    sim = simulator()
    a = case.new_a(sim)
    case.tile(sim, a)
    case.split(sim, a)
    # A score of hundreds, rounded, is 1e-5 off, and so is then its exponential.
    compare(a.numpy(), case.expected(), 1e-4)


def test_splits_pack():
    """The rounded copy is what round_activations makes of the same numbers; one split, several."""
    case = Case((5, 1, 64), "f16", [(299, 1), (4, 1)], room=1)
    sim = simulator()
    a, pack = case.new_a(sim), packed(sim, 3, 320)
    case.split(sim, a, pack=pack)
    q, d, s = (part.numpy()[:2] for part in pack)
    ours = (q.reshape(2, -1, 32) * d[..., None]).reshape(2, -1)
    np.testing.assert_array_equal(ours, round_activations(a.numpy()[:2]))
    np.testing.assert_array_equal(s, q.reshape(2, -1, 32).sum(axis=-1, dtype=np.int32))


# -- every access checked ---------------------------------------------------------------------


def checked(sim: Simulator, shape: tuple[int, int, int], type_: str) -> None:
    """Lone tokens and chunks, with every access checked where `sim` does; and compared."""
    case = Case(shape, type_, [(0, 9), (259, 1), (31, 1), (94, 3)], room=1)
    for n_splits in (2, 17):  # long ones; more than are added up at once
        a, pack = case.new_a(sim), NOT_PACKED
        if shape[2] % 32 == 0:
            pack = packed(sim, *a.shape)
        case.split(sim, a, pack=pack, n_splits=n_splits, order_seed=n_splits)
        case.tile(sim, a)
        compare(a.numpy(), case.expected())


@pytest.mark.parametrize("type_", TYPES)
@pytest.mark.parametrize("shape", [(9, 1, 16), (2, 2, 6), (2, 1, 136)])
def test_check_mode_is_clean(shape, type_):
    checked(simulator(check=True), shape, type_)


# name: (text, what it becomes, the kind of fault that the check finds; or else the comparison)
WRONG, UNWRITTEN = "wrong result", "uninitialised read"
FAULTS = {
    "no wait for other kernels": (WAIT, "", "early"),
    "a token too many": ("(t < n_tok) & (position", "(position", "out of bounds"),
    "a row that is not seen is loaded": ("end - 1 - start) * head", "end - start) * head", WRONG),
    "a row that is not seen counts": (
        "start + lane / LANES + r * AT_ONCE < end;",
        "start + lane / LANES + r * AT_ONCE <= end;",
        WRONG,
    ),
    "the page of the chunk before": (
        "if (start + step < end) page = pages[(start + step) / PAGE];",
        "",
        WRONG,
    ),
    "wrong page": ("pages[first / PAGE]", "pages[first / PAGE + 1]", "out of bounds"),
    "wrong page of a chunk": (
        "pages[position / PAGE]",
        "pages[position / PAGE + 1]",
        "out of bounds",
    ),
    "wrong slot": (
        "PAGE + position % PAGE)",
        "PAGE + (position + 1) % PAGE)",
        "out of bounds",
    ),
    "the query is read before it is there": (
        "__syncwarp();  // the query",
        "// the query",
        UNWRITTEN,
    ),
    "shares read before all are there": (
        "    __syncthreads();\n    const int n = unsigned",
        "    const int n = unsigned",
        UNWRITTEN,
    ),
    "sums of the other lanes": ("is_upper * HALF +", "!is_upper * HALF +", WRONG),
    "sums keep their old peak in a warp": ("sums[i] *= factor;", "sums[i] *= 1;", WRONG),
    "a total keeps its old peak": ("        total *= factor;\n", "", WRONG),
    "splits of another length": ("unsigned(position) / span", "unsigned(position) / 16", WRONG),
    "a ticket before all is written": ("__syncthreads();  // all of", "// all of", "race"),
    "no fence before the ticket": ("__threadfence();\n        is_it", "is_it", "race"),
    "no ticket": ("atomicInc((unsigned*)ticket, n - 1) ==", "int(blockIdx.x) ==", UNWRITTEN),
    "no fence after the ticket": ("0 again\n        __threadfence();", "", "race"),
    "no barrier after the ticket": (
        "    __syncthreads();\n    return is_it;",
        "    return is_it;",
        UNWRITTEN,
    ),
    "a ticket that is not given back": (
        "atomicInc((unsigned*)ticket, n - 1)",
        "atomicAdd(ticket, 1)",
        WRONG,
    ),
    "the ticket of all texts": ("sequence * gridDim.y + blockIdx.y", "blockIdx.y", UNWRITTEN),
    "the ticket of all heads": (
        "sequence * gridDim.y + blockIdx.y",
        "sequence * gridDim.y",
        UNWRITTEN,
    ),
    "the weight of another split": ("weight, s + i)", "weight, s + 1 - i)", WRONG),
    "stage read before it is filled": (
        "store_wide(x, &tile.stage[row][PIECE * piece]);\n    }\n    __syncthreads();",
        "store_wide(x, &tile.stage[row][PIECE * piece]);\n    }\n    ",
        UNWRITTEN,
    ),
    "stage overwritten while it is read": (
        "__syncthreads();  // the last one has been read",
        "",
        "race",
    ),
    "a query sees what follows it": ("p.positions[t] + 1 : 0;", "p.positions[t] + 2 : 0;", WRONG),
    "a tile goes on into the next text": (
        "while (next <= last && p.rows[next] == p.rows[t]) next++;",
        "while (next <= last) next++;",
        WRONG,
    ),
    "sums are not scaled to the new peak": (
        "sums[i][s][j] *= factor;",
        "sums[i][s][j] *= 1;",
        WRONG,
    ),
}
ONLY_F16 = {
    f"attend_{kernel}_f32(const attend_{kernel}_args p) {{\n    attend_{kernel}<float>(p);\n}}": (
        f"attend_{kernel}_f32(const attend_{kernel}_args p) {{}}"
    )
    for kernel in ("split", "tile")
}


@pytest.mark.parametrize("name", FAULTS)
def test_faults_are_found(name):
    old, new, kind = FAULTS[name]
    sim = load("attention.cu", check=True, replace={**ONLY_F16, old: new})
    with pytest.raises((SimError, AssertionError)) as error:
        checked(sim, (9, 1, 16), "f16")
    assert getattr(error.value, "kind", WRONG) == kind
