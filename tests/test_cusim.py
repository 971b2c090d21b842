"""The simulator of the kernels' tests: what CUDA does, it does; and its check finds every fault."""

import os
import re
import struct
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from cusim import sim
from cusim.sim import KINDS, SimError, load, unavailable

pytestmark = pytest.mark.skipif(bool(unavailable()), reason=unavailable())

SOURCES = Path(sim.__file__).parent / "kernels"
# The last is how threads are switched where there is no assembly code for it.
MODES = {"fast": {}, "check": {"check": True}, "setjmp": {"define": ["CUSIM_SETJMP"]}}


@pytest.fixture(params=MODES)
def threads(request):
    return load(SOURCES / "threads.cu", **MODES[request.param])


@pytest.fixture(params=MODES)
def memory(request):
    return load(SOURCES / "memory.cu", **MODES[request.param])


def launch(machine, kernel, grid, block, x, y, n=0, wrong=0, **options):
    """Launch a kernel of test_args and return y, an Array of the device or what it is to hold."""
    if not isinstance(y, sim.Array):
        y = machine.array(np.array(y, np.int32), "y")
    x = machine.array(np.array(x, np.int32), "x")
    machine.launch(
        kernel, grid, block, struct.pack("<QQii", x.address, y.address, n, wrong), **options
    )
    return y.numpy()


def empty(machine, *shape):
    return machine.empty(shape, np.int32, "y")


def numbers(*shape):
    return np.random.default_rng(1).integers(-1000, 1000, shape).astype(np.int32)


# -- threads ----------------------------------------------------------------------------------


@pytest.mark.parametrize("n", [1, 255, 1000])
def test_a_grid_of_sums(threads, n):
    x = numbers(n)
    y = launch(threads, "sums", 4, 256, x, empty(threads, 4), n)
    np.testing.assert_array_equal(y, np.pad(x, (0, 1024 - n)).reshape(4, 256).sum(axis=1))


@pytest.mark.parametrize("block", [1, 32, 33, 100, 1024])
def test_barriers(threads, block):
    x = numbers(block)
    y = launch(threads, "turn", 1, block, x, empty(threads, block), 21)
    np.testing.assert_array_equal(y, np.roll(x, -21))


@pytest.mark.parametrize("n", [1, 31, 32, 77, 300, 1024])
def test_threads_that_leave(threads, n):
    x = numbers(n)
    y = launch(threads, "leave_early", 1, 1024, x, empty(threads, n), n)
    np.testing.assert_array_equal(y, x[::-1])


def test_shuffles(threads):
    x, lane = numbers(32), np.arange(32)
    expected = []
    for width in (32, 8):
        start = lane - lane % width
        own = lambda source, fits: x[np.where(fits, source, lane)]  # noqa: E731
        expected += [
            x[start + 5],
            x[start + 3 * lane % width],
            own(lane ^ 6, True),
            own(lane ^ 16, lane ^ 16 < start + width),  # an earlier group can be reached
            own(lane - 3, lane - 3 >= start),
            own(lane + 3, lane + 3 < start + width),
        ]
    following = np.minimum(lane + 1, 31)
    expected += [2 * x[following] + 1, x[lane ^ 1], np.full(32, x[31].astype(np.int8))]
    y = launch(threads, "shuffles", 1, 32, x, empty(threads, len(expected), 32))
    np.testing.assert_array_equal(y, expected)


@pytest.mark.parametrize("voters", [0, 1, 7, 96])
def test_votes(threads, voters):
    x = (np.random.default_rng(2).permutation(96) < voters).astype(np.int32)
    y = launch(threads, "votes", 1, 96, x, empty(threads, 6, 96))
    by_warp = x.reshape(3, 32)
    ballots = (by_warp.astype(np.uint64) << np.arange(32, dtype=np.uint64)).sum(axis=1)
    for i, votes in enumerate(
        (ballots.astype(np.uint32), by_warp.any(axis=1), by_warp.all(axis=1))
    ):
        np.testing.assert_array_equal(y[i].view(np.uint32), np.repeat(votes, 32))
    assert (y[3] == voters).all()
    assert (y[4] == (voters > 0)).all()
    assert (y[5] == (voters == 96)).all()


@pytest.mark.parametrize("block", [32, 77, 1000])
def test_parts_of_warps(threads, block):
    x, n = numbers(block), 5
    y = launch(threads, "parts", 1, block, x, empty(threads, 3, block), n)
    for warp in np.split(np.arange(block), range(32, block, 32)):
        for part in (warp[:n], warp[n:]):
            assert (y[0, part] == x[part].sum()).all()
            votes = sum(1 << int(t) % 32 for t in part if x[t] % 2)
            assert (y[1, part].view(np.uint32) == votes).all()
            np.testing.assert_array_equal(y[2, part], np.roll(x[part], -1))


def test_registers_outlive_switches(threads):
    x = numbers(128)
    y = launch(threads, "keep", 1, 128, x, empty(threads, 2, 128))
    np.testing.assert_array_equal(y[0], x * (120 + 32) + 4 * 16 + 496 + 8 * 32)
    t = np.arange(128)
    expected = sum((x * i + i)[t ^ 1 << i] for i in range(4))
    np.testing.assert_array_equal(y[1], expected)


@pytest.mark.parametrize(("grid", "block"), [(40, 1), (1, 100), (5, 70)])
def test_order_of_blocks_and_threads(threads, grid, block):
    def order(seed):
        y = np.zeros(1 + grid * block, np.int32)
        return launch(threads, "turns", grid, block, [0], y, order_seed=seed)[1:].tolist()

    plain = list(range(grid * block))
    assert order(None) == plain
    seeds = [order(seed) for seed in (0, 1, 0)]
    assert seeds[0] == seeds[2] != seeds[1] != plain != seeds[0]
    assert sorted(seeds[0]) == plain


def test_launches_follow_each_other(threads):
    """Many launches on the same memory, each of which reads what the last one wrote."""
    x = threads.array(numbers(33), "x")
    before = x.numpy()
    for _ in range(10):
        args = struct.pack("<QQii", x.address, x.address, 1, 0)
        threads.launch("turn", 1, 33, args)
    np.testing.assert_array_equal(x.numpy(), np.roll(before, -10))


# -- memory -----------------------------------------------------------------------------------


def test_atomics(memory):
    x = numbers(300)
    y = np.zeros(8 + 300, np.int32)
    y = launch(memory, "atomics", 1, 300, x, y)
    wanted = [900, -x.sum(), x.max(), min(x.min(), 0), -1, np.bitwise_xor.reduce(x), 600, 906]
    np.testing.assert_array_equal(y[:8], wanted)
    np.testing.assert_array_equal(np.sort(y[8:]), 3 * np.arange(300))


def test_dynamic_shared_memory(memory):
    x = numbers(333)
    y = launch(memory, "scan", 1, 333, x, empty(memory, 333), shared=4 * 333)
    np.testing.assert_array_equal(y, np.cumsum(x))


@pytest.mark.parametrize(
    ("grid", "block"), [((2, 3, 4), (5, 4, 3)), ((1, 1, 7), (1, 2, 33)), ((3,), (2, 2))]
)
def test_three_dimensions(memory, grid, block):
    sizes = [*(*grid, 1, 1)[:3], *(*block, 1, 1)[:3]]
    n = np.prod(sizes)
    y = launch(memory, "indices", grid, block, [0], empty(memory, n, 12))
    gx, gy, gz, bx, by, bz = sizes
    z, y_, x, tz, ty, tx = np.unravel_index(np.arange(n), (gz, gy, gx, bz, by, bx))
    expected = np.stack([x, y_, z, tx, ty, tz, *np.tile(sizes, (n, 1)).T], axis=1)
    np.testing.assert_array_equal(y, expected)


def signed(value, bits=32):
    """Return an integer as two's complement has it."""
    value &= (1 << bits) - 1
    return value - (1 << bits) if value >> (bits - 1) else value


def test_integers(memory):
    rng = np.random.default_rng(3)
    x = rng.integers(-(2**31), 2**31, (2, 64)).astype(np.int32)
    x[:, :4] = [[0, -1, 1, -(2**31)], [0, -1, -1, 2**31 - 1]]

    def parts(value, is_signed):
        return [signed(value >> i, 8) if is_signed else value >> i & 255 for i in range(0, 32, 8)]

    def joined(values):
        return sum((value & 255) << 8 * i for i, value in enumerate(values))

    def bytes_of(u, v, selector):
        both = parts(u, False) + parts(v, False)
        chosen = [(both[s & 7], s & 8) for s in (selector >> 4 * i & 15 for i in range(4))]
        return joined(255 * (byte >> 7) if is_sign else byte for byte, is_sign in chosen)

    def expected(a, b, t):
        u, v = a & 0xFFFFFFFF, b & 0xFFFFFFFF
        pairs = list(zip(parts(u, False), parts(v, False), strict=True))
        pairs_signed = list(zip(parts(u, True), parts(v, True), strict=True))
        yield sum(c * d for c, d in pairs_signed) + 7
        yield sum(c * d for c, d in pairs) + 7
        yield bytes_of(u, v, 0x6385)
        yield bytes_of(u, v, 0xC19F)
        yield joined(c - d for c, d in pairs)
        yield joined(c + d for c, d in pairs)
        yield joined(min(max(c - d, -128), 127) for c, d in pairs_signed)
        yield (v << 32 | u) << 5 >> 32
        yield (v << 32 | u) >> 5
        yield u.bit_count()
        yield 32 - u.bit_length()
        yield (u & -u).bit_length()
        yield int(f"{u:032b}"[::-1], 2)
        yield a * b >> 32
        yield u * v >> 32
        yield min(a, b)
        yield max(a, b)
        yield max(u, v)
        yield (t % 4) ** 2

    columns = [
        [signed(value) for value in expected(int(a), int(b), t)] for t, (a, b) in enumerate(x.T)
    ]
    y = launch(memory, "integers", 1, 64, x, empty(memory, len(columns[0]), 64))
    np.testing.assert_array_equal(y, np.array(columns).T)


def test_floats(memory):
    """Fused, half to even, NaN the lesser of two; integers end where int does."""
    nan, infinity = np.nan, np.inf
    a = np.array([1.5, 2.5, -0.5, 1e10, -1e10, nan, 3, -infinity, 16777217, 0.1], np.float32)
    b = np.array([2, -3, nan, 1e-3, 7, 1, nan, 5, 1.0000001, 10], np.float32)
    y = launch(memory, "floats", 1, 10, np.stack([a, b]).view(np.int32), empty(memory, 10, 10))
    wide = a.astype(np.float64)
    with np.errstate(invalid="ignore"):
        fused = (wide * b - wide).astype(np.float32)
    np.testing.assert_array_equal(y[0].view(np.float32), fused)
    np.testing.assert_array_equal(y[1].view(np.float32), np.fmin(a, b))
    np.testing.assert_array_equal(y[2].view(np.float32), np.fmax(a, b))
    np.testing.assert_array_equal(y[3].view(np.float32), np.rint(a))
    whole = np.clip(np.nan_to_num(wide, nan=0), -(2**31), 2**31 - 1)
    np.testing.assert_array_equal(y[4], np.rint(whole).astype(np.int32))
    np.testing.assert_array_equal(y[5], np.trunc(whole).astype(np.int32))
    np.testing.assert_array_equal(y[6:].reshape(10, 4).view(np.float32), np.stack([a, b] * 2, 1))


def test_nothing_survives_in_shared_memory():
    """Without the check too: what a block finds there is no number that one could go on with."""
    machine = load(SOURCES / "memory.cu")
    for _ in range(2):
        y = launch(machine, "leftovers", 2, 64, numbers(64), empty(machine, 64))
        assert (y == -1).all()


def test_memory_of_the_host(memory):
    """A host array that kernels work on in place."""
    host = np.zeros((5, 12), np.int32)
    y = launch(memory, "indices", 5, 1, [0], memory.register(host, "y"))
    np.testing.assert_array_equal(y, host)
    assert host[:, 0].tolist() == [0, 1, 2, 3, 4]
    with pytest.raises(ValueError, match="contiguous"):
        memory.register(np.zeros((4, 4))[:, ::2])


# -- faults -----------------------------------------------------------------------------------

OUT, UNWRITTEN, RACE, APART, UNALIGNED, ARITHMETIC, ENDLESS, EARLY, LAUNCH, SOURCE = KINDS[1:]
FAULTS = {
    "read_beyond": (OUT, "reads 4 bytes at x + 256 (of 256 bytes)"),
    "write_before": (OUT, "writes 4 bytes at y - 4 (of 256 bytes)"),
    "guard_off_by_one": (OUT, "atomically changes 4 bytes at y + 256"),
    "index_beyond_shared": (OUT, "an index is beyond its array"),
    "beyond_dynamic": (OUT, "writes 4 bytes at shared room + 256"),
    "null_pointer": (OUT, "reads 4 bytes at address 0x0"),
    "global_unwritten": (UNWRITTEN, "reads 4 bytes at y + 0"),
    "shared_unwritten": (UNWRITTEN, "reads 4 bytes at shared s + 0"),
    "shared_of_the_last_block": (UNWRITTEN, "block 1, thread 0"),
    "no_barrier": (RACE, "at shared s + "),
    "no_barrier_before_writing": (RACE, "thread 40"),
    "write_after_reads": (RACE, "thread 31, "),
    "write_of_the_first_reader": (RACE, "at shared s + 0"),
    "no_syncwarp": (RACE, "at shared s + "),
    "shuffle_for_syncwarp": (RACE, "at shared s + "),
    "wrong_slot": (RACE, "block 1, thread 0"),
    "add_without_atomic": (RACE, "thread 1"),
    "add_over_blocks": (RACE, "block 1, thread 0"),
    "read_beside_atomics": (RACE, "atomically changes"),
    "no_barrier_before_a_ticket": (RACE, "at y + "),
    "no_fence_before_a_ticket": (RACE, "at y + "),
    "no_ticket": (RACE, "at y + "),
    "not_the_same_ticket": (RACE, "at y + "),
    "no_fence_after_a_ticket": (RACE, "at y + "),
    "barrier_in_a_branch": (APART, "different __syncthreads"),
    "barrier_beside_shuffle": (APART, "wait in __syncthreads"),
    "shuffle_in_a_branch": (APART, "lanes 80000000 exited"),
    "lanes_in_different_places": (APART, "lanes meet in different places"),
    "not_in_its_own_mask": (APART, "not in its own mask"),
    "source_not_in_the_mask": (APART, "reads lane 16"),
    "misaligned": (UNALIGNED, "reads x + 4 (of 256 bytes), no multiple of 16 bytes"),
    "misaligned_shared": (UNALIGNED, "shared s + 4, no multiple of 8 bytes"),
    "product_too_large": (ARITHMETIC, "product"),
    "sum_too_large": (ARITHMETIC, "sum"),
    "shift_too_far": (ARITHMETIC, "shift"),
    "division_by_zero": (ARITHMETIC, "division by zero"),
    "endless": (ENDLESS, "still runs after 0.2 s"),
}  # fmt: skip
# Blocks of a grid, and numbers in y, where they are not 1 and 64.
BLOCKS = {
    "guard_off_by_one": 2,
    "shared_of_the_last_block": 2,
    "wrong_slot": 2,
    "add_over_blocks": 2,
    "no_barrier_before_a_ticket": 4,
    "no_fence_before_a_ticket": 4,
    "no_ticket": 4,
    "not_the_same_ticket": 4,
    "no_fence_after_a_ticket": 4,
}
SIZES = {"shared_of_the_last_block": 128, "wrong_slot": 128, "no_barrier_before_writing": 256}


def lines(name):
    """Return the numbers of the lines of faults.cu that are marked with the name of a fault."""
    text = (SOURCES / "faults.cu").read_text("utf-8").splitlines()
    marked = re.compile(rf"// {name}(, the other)?( |$)")
    return {bool(m[1]): i for i, line in enumerate(text, 1) if (m := marked.search(line))}


def fault(name, wrong, check=True, **options):
    """Launch a kernel of faults.cu."""
    machine = load(SOURCES / "faults.cu", check=check)
    machine.time_limit = 0.2
    y = empty(machine, SIZES.get(name, 64))
    if name != "global_unwritten":
        y.fill(0)
    shared = 256 if name == "beyond_dynamic" else 0
    blocks = BLOCKS.get(name, 1)
    launch(machine, name, blocks, 64, np.arange(64), y, 64, wrong, shared=shared, **options)


@pytest.mark.parametrize("name", FAULTS)
def test_check_finds(name):
    """Each fault by its kind, its place in memory and its line; and nothing without it."""
    fault(name, wrong=0)
    kind, says = FAULTS[name]
    with pytest.raises(SimError) as error:
        fault(name, wrong=1)
    message = str(error.value)
    assert error.value.kind == kind
    assert message.startswith(f"{kind}: {name}, block ")
    assert says in message
    for line in lines(name).values():
        assert re.search(rf"(faults\.cu:|line ){line}\b", message), (line, message)


@pytest.mark.parametrize("name", [name for name, (kind, _) in FAULTS.items() if kind == RACE])
def test_races_are_found_in_any_order(name):
    """Whichever of the two happens to come first; once more, nothing without the fault."""
    for seed in range(5):
        fault(name, wrong=0, order_seed=seed)
        with pytest.raises(SimError) as error:
            fault(name, wrong=1, order_seed=seed)
        assert error.value.kind == RACE


@pytest.mark.parametrize(
    "name", ["barrier_beside_shuffle", "shuffle_in_a_branch", "not_in_its_own_mask", "endless"]
)
def test_nothing_hangs_without_the_check(name):
    fault(name, wrong=0, check=False)
    with pytest.raises(SimError) as error:
        fault(name, wrong=1, check=False)
    assert error.value.kind == FAULTS[name][0]


@pytest.mark.parametrize("name", ["null_pointer", "division_by_zero"])
def test_nothing_crashes_without_the_check(name):
    with pytest.raises(SimError, match="check mode says where") as error:
        fault(name, wrong=1, check=False)
    assert error.value.kind == FAULTS[name][0]
    fault(name, wrong=0, check=False)


def test_every_kind_of_fault_is_planted():
    planted = {kind for kind, _ in FAULTS.values()}
    # Kernels here do not overlap; in tests of those that do, that is planted, too.
    assert planted | {LAUNCH, SOURCE, EARLY} == set(KINDS[1:])
    assert set(FAULTS) == set(load(SOURCES / "faults.cu").kernels)


def test_freed_memory():
    machine = load(SOURCES / "memory.cu", check=True)
    y = empty(machine, 12)
    launch(machine, "indices", 1, 1, [0], y)
    machine.free(y)
    with pytest.raises(SimError, match="indices, block 0, thread 0") as error:
        launch(machine, "indices", 1, 1, [0], y)
    assert error.value.kind == OUT


def test_launches_do_not_race_with_each_other():
    """What a launch did is over when the next one begins: the same slot by another thread."""
    machine = load(SOURCES / "faults.cu", check=True)
    y = machine.array(np.zeros(64, np.int32), "y")
    for start in range(3):
        launch(machine, "write_before", 1, 64 - start, np.arange(64 + start), y, 64 - start)


@pytest.mark.parametrize(
    ("kernel", "grid", "block", "args", "shared", "says"),
    [
        ("sum", 1, 256, 24, 0, "there is no kernel sum"),
        ("sums", 1, 256, 16, 0, "takes 24 bytes of arguments, not 16"),
        ("sums", 0, 256, 24, 0, "empty grid"),
        ("sums", (1, 1, 0), 256, 24, 0, "empty grid"),
        ("sums", 1, (16, 0), 24, 0, "block"),
        ("sums", (1, 65536), 256, 24, 0, "65535"),
        ("sums", 1, 257, 24, 0, "256 threads at most"),
        ("sums", 1, (16, 17), 24, 0, "256 threads at most"),
        ("sums", 1, 256, 24, 48 << 10, "48 KiB"),
    ],
)
def test_launches_that_cannot_be(kernel, grid, block, args, shared, says):
    machine = load(SOURCES / "threads.cu")
    with pytest.raises(SimError, match=says) as error:
        machine.launch(kernel, grid, block, bytes(args), shared)
    assert error.value.kind == LAUNCH


@pytest.mark.parametrize(
    ("text", "becomes", "says"),
    [
        ("__syncthreads();", "", "is in 8 places"),
        ("no such text", "", "is in 0 places"),
        ("int partial[8];", "int partial[8]", "error"),
        ("turn(const test_args p)", "sums(const test_args p)", "error"),
    ],
)
def test_sources_that_cannot_be(text, becomes, says):
    with pytest.raises(SimError, match=says) as error:
        load(SOURCES / "threads.cu", replace={text: becomes})
    assert error.value.kind == SOURCE


def test_a_file_without_kernels(tmp_path):
    (tmp_path / "none.cu").write_text("__device__ int f() { return 1; }")
    with pytest.raises(SimError, match="no kernel"):
        load(tmp_path / "none.cu")


def test_several_files_are_one_machine():
    machine = load(SOURCES / "threads.cu", SOURCES / "memory.cu", check=True)
    x = launch(machine, "turn", 1, 64, numbers(64), empty(machine, 64), 1)
    y = launch(machine, "scan", 1, 64, x, empty(machine, 64), shared=256)
    np.testing.assert_array_equal(y, np.cumsum(np.roll(numbers(64), -1)))
    with pytest.raises(SimError, match="two kernels have the name"):
        load(SOURCES / "threads.cu", SOURCES / "threads.cu")


def test_processes_that_compile_the_same(tmp_path):
    """Several processes, as tests are run by: one compiles, the others wait for it; all work."""
    text = (
        "from cusim.sim import load\n"
        f"machine = load({str(SOURCES / 'threads.cu')!r}, define=['ANEW'])\n"
        "print(len(machine.kernels))\n"
    )
    environment = os.environ | {
        "XDG_CACHE_HOME": str(tmp_path),
        "PYTHONPATH": os.pathsep.join(sys.path),
    }
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", text], env=environment, stdout=subprocess.PIPE, text=True
        )
        for _ in range(3)
    ]
    said = [process.communicate(timeout=60)[0].strip() for process in processes]
    assert said == [str(len(load(SOURCES / "threads.cu").kernels))] * 3
    made = sorted(path.suffix for path in (tmp_path / "powerinfer-python" / "cusim").iterdir())
    assert made == [".lock", ".so"]
