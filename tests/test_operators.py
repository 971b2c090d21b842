"""Every operator of every backend against reference, with the same inputs, on odd sizes."""

import numpy as np
import pytest
import tiny
from conftest import kl
from powerinfer.runtime.cache import PAGE, Sequence
from powerinfer.runtime.config import RunOptions
from powerinfer.runtime.cpu import ffn
from powerinfer.runtime.engine import Engine
from powerinfer.runtime.formats import INTEGER_DOT
from powerinfer.runtime.reference import Reference, activate, layer_norm, rms_norm, rope

TYPES = ["f32", "f16", "bf16", "q8_0", "q4_0"]
OTHERS = ["q4_1", "q5_0", "q5_1", "q4_k", "q5_k", "q6_k"]
MODES = ["exact", "predicted", "dense"]

# A value may be rounded to the other of two steps of int8 where it is as near to the middle between
# them, in steps, and float sums made it: in another order they are off by up to 9e-5 here.
NEAR = 2e-4


class Pair:
    """The same model twice: on the backend under test, and as reference."""

    def __init__(self, path, mode, n_tok, context=64, sequences=1):
        self.engines = []
        for backend in ("cpu", "numpy"):
            options = RunOptions(
                mode=mode,
                backend=backend,
                chunk=n_tok,
                context=context,
                sequences=sequences,
                threads=2,
            )
            engine = Engine(path, options)
            self.engines.append(engine)
        self.ours, self.theirs = (e._plan for e in self.engines)
        self.ops, self.reference = (e._ops for e in self.engines)
        assert isinstance(self.reference, Reference)
        self.unsure = np.zeros(n_tok, bool)  # tokens of the last operator, see check()
        self._matmul, self.reference._matmul = self.reference._matmul, self._noting_matmul

    def _noting_matmul(self, x, w, bias=None):
        if w.type in INTEGER_DOT:
            blocks = x.astype(np.float64).reshape(-1, x.shape[-1] // 32, 32)  # audit has one token
            amax = np.abs(blocks).max(axis=-1, keepdims=True)
            steps = np.abs(blocks) * 127 / np.maximum(amax, 1e-30)
            near = np.abs(steps % 1 - 0.5) < NEAR
            self.unsure[: len(near)] |= near.any(axis=(1, 2))
        return self._matmul(x, w, bias)

    def run(self, operator, *args):
        """Let both run an operator of some layer."""
        self.unsure[:] = False
        for ops in (self.ops, self.reference):
            getattr(ops, operator)(*args)

    def close(self):
        for engine in self.engines:
            engine.close()

    def put(self, **buffers):
        for plan in (self.ours, self.theirs):
            for name, value in buffers.items():
                getattr(plan.buffers, name)[: len(value)] = value

    def sync(self):
        """Let ours go on from reference's state, so that errors do not add up."""
        for name in ("x", "h", "q", "a", "mask"):
            getattr(self.ours.buffers, name)[:] = getattr(self.theirs.buffers, name)
        self.ours.cache.k[:], self.ours.cache.v[:] = self.theirs.cache.k, self.theirs.cache.v


def check(ours, theirs, unsure=False, tolerance=1e-5):
    """Compare [n_tok, n] to 1e-5 of each token's largest value.

    A token that is `unsure` may be off by a step of int8: one of its values lies so near to the
    middle between two that float sums of another order may round it the other way, and so all that
    is multiplied with it. These are some in a hundred; there is no such excuse for the others.
    """
    scale = np.abs(theirs).max(axis=-1) + 1e-30
    error = np.abs(ours - theirs).max(axis=-1) / scale
    assert (error < np.where(unsure, 2e-2, tolerance)).all()


def check_flags(ours, theirs, unsure=False):
    """Compare [n_tok, n], of which a token that is `unsure` may have two that differ."""
    assert (np.count_nonzero(ours != theirs, axis=-1) <= np.where(unsure, 2, 0)).all()


@pytest.mark.parametrize("n_tok", [1, 5, 19])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("type_", TYPES)
@pytest.mark.parametrize("name", ["gqa", "bias"])
def test_operators(name, type_, mode, n_tok, tiny_gguf):
    compare_operators(tiny_gguf(name, type_, True), mode, n_tok)


@pytest.mark.parametrize("n_tok", [1, 5])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("type_", OTHERS + TYPES)
def test_operators_on_every_format(type_, mode, n_tok, wide_gguf):
    compare_operators(wide_gguf(type_), mode, n_tok)


@pytest.mark.parametrize("type_", ["f16", "q8_0", "q4_0"])
def test_threads_share_columns(type_, broad_gguf):
    """With many threads some have the same neurons, and each some of the columns."""
    path, found = broad_gguf(type_), []
    assert ffn._columns.py_func(1088, 2) == 1088 and ffn._columns.py_func(1088, 8) == 512
    for options in ({"threads": 1}, {"threads": 3}, {"threads": 8}, {"backend": "numpy"}):
        with Engine(path, RunOptions(context=64, chunk=1, **options)) as llm:
            found.append(llm.logits(tiny.token_ids()[:12]))
    assert np.array_equal(found[0], found[1]) and np.array_equal(found[0], found[2])
    assert kl(found[3], found[0]) < (5e-3 if type_[0] == "q" else 1e-7)  # of many rows, many edges


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("type_", ["f32", "q4_0", "q5_1"])
@pytest.mark.parametrize("name", ["prosparse", "bamboo", "relu2", "falcon7", "falcon40", "opt"])
def test_operators_of_every_architecture(name, type_, mode, tiny_gguf):
    for n_tok in (1, 5):
        compare_operators(tiny_gguf(name, type_, True), mode, n_tok)


def compare_operators(path, mode, n_tok):
    """A layer step by step, after a few tokens of history."""
    pair = Pair(path, mode, 24)
    ids = tiny.token_ids()[: 4 + n_tok]
    for engine in pair.engines:
        sequence = Sequence()
        engine.feed([(sequence, ids[:4])], [], engine.no_counts())
        plan = engine._plan
        plan.cache.extend([(sequence, n_tok)])
        plan.step.fill([(sequence, ids[4:])])
        plan.step.want(range(n_tok))
        plan.buffers.counts[:] = 0
    n, a, b = n_tok, pair.ours.buffers, pair.theirs.buffers
    unsure = pair.unsure[:n]
    pair.sync()

    pair.run("embed")
    assert np.array_equal(a.x[:n], b.x[:n])

    il = 1
    pair.run("qkv", il)
    check(a.q[:n], b.q[:n], unsure)
    positions = pair.ours.step.positions[:n]
    where = np.array(sequence.pages)[positions // PAGE], slice(None), positions % PAGE
    for ours, theirs in (
        (pair.ours.cache.k, pair.theirs.cache.k),
        (pair.ours.cache.v, pair.theirs.cache.v),
    ):
        tolerance = 1e-5 if ours.dtype == np.float32 else 2e-3  # a step of fp16
        new, expected = (x[il][where].reshape(n, -1).astype(np.float32) for x in (ours, theirs))
        check(new, expected, unsure, tolerance)
        ours[il][where] = theirs[il][where]
        assert np.array_equal(ours, theirs)  # nothing else was written
    pair.sync()
    pair.run("attend", il)
    check(a.a[:n], b.a[:n])
    pair.sync()
    pair.run("out_add", il)
    check(a.x[:n], b.x[:n])
    pair.sync()
    pair.run("ffn_norm", il)
    check(a.h[:n], b.h[:n])
    if mode == "predicted":
        pair.run("predict", il)
        check(a.scores[:n], b.scores[:n], unsure)
        check_flags(a.mask[:n], b.mask[:n], unsure)
        assert 0.05 < b.mask[:n].mean() < 0.95
        a.mask[:] = b.mask
    pair.run("ffn", il)
    check(a.x[:n], b.x[:n], unsure)
    assert a.counts[il, 0] == b.counts[il, 0] == n
    assert a.counts[il, 1] == b.counts[il, 1]
    assert np.abs(a.counts[il, 2:] - b.counts[il, 2:]).max() <= 2 * np.count_nonzero(unsure)
    computed = b.mask[:n] if mode == "predicted" else np.ones_like(b.mask[:n])
    check_flags(a.fired[:n] * computed, b.fired[:n], unsure)
    for plan in (pair.ours, pair.theirs):
        plan.step.audit[0] = n - 1
    pair.run("audit", il)
    check_flags(a.truth, b.truth, unsure[0])
    last = computed[n - 1]
    assert np.array_equal(a.truth * last, a.fired[n - 1] * last)
    a.x[:] = b.x
    pair.run("head")
    check(a.logits[:n], b.logits[:n], unsure)
    pair.close()


@pytest.mark.parametrize("type_", TYPES)
def test_masks_of_none_and_all(type_, tiny_gguf):
    """An empty list of neurons leaves x as it is; a full one is the exact mode."""
    path = tiny_gguf("gqa", type_, True)
    results = {}
    for fill, mode in ((0, "predicted"), (1, "predicted"), (0, "exact")):
        for n_tok in (1, 3):
            pair = Pair(path, mode, 3)
            rng = np.random.default_rng(1)
            x = rng.standard_normal((3, 96)).astype(np.float32)
            pair.put(x=x, mask=np.full((3, 160), fill, np.uint8))
            for plan in (pair.ours, pair.theirs):
                plan.step.counts[0] = n_tok
            pair.run("ffn_norm", 0)
            pair.run("ffn", 0)
            ours, theirs = (p.buffers.x[:n_tok] for p in (pair.ours, pair.theirs))
            results[fill, mode, n_tok] = ours.copy()
            check(ours, theirs, pair.unsure[:n_tok])
            if (fill, mode) == (0, "predicted"):
                assert np.array_equal(ours, x[:n_tok])
            pair.close()
    assert np.array_equal(results[1, "predicted", 1], results[0, "exact", 1])
    # A token's own rows, and all rows with several tokens, are summed in different orders.
    check(results[1, "predicted", 3], results[0, "exact", 3])
    check(results[0, "exact", 1], results[0, "exact", 3][:1])


@pytest.mark.parametrize("mode", ["predicted", "exact", "dense"])
@pytest.mark.parametrize("type_", TYPES)
def test_a_token_depends_on_no_other(type_, mode, tiny_gguf):
    """To the bit the same among 2 tokens or 70, in lists of any length and every kind of tile."""
    plan_ops = Pair(tiny_gguf("gqa", type_, True), mode, 70, context=128)
    plan, ops = plan_ops.ours, plan_ops.ops
    rng = np.random.default_rng(4)
    x, mask = rng.standard_normal((70, 96)).astype(np.float32), rng.random((70, 160)) < 0.2
    seen = {}
    groups = (range(70), range(17), range(16), range(5, 40), range(3, 11), (3, 69), (69, 3, 16))
    for tokens in groups:
        n_tok, b = len(tokens), plan.buffers
        plan.step.counts[0] = n_tok
        b.x[:n_tok] = x[list(tokens)]
        plan.step.positions[:n_tok], plan.step.rows[:n_tok] = tokens, 0
        ops.qkv(0)
        b.a[:n_tok] = b.q[:n_tok]
        ops.out_add(0)
        ops.ffn_norm(0)
        if mode == "predicted":
            ops.predict(0)
            b.mask[:n_tok] = mask[list(tokens)]
        ops.ffn(0)
        for i, token in enumerate(tokens):
            result = (b.x[i].copy(), b.scores[i].copy(), b.fired[i].copy())
            for now, before in zip(result, seen.setdefault(token, result), strict=True):
                assert np.array_equal(now, before), (tokens, token)
    plan_ops.close()


@pytest.mark.parametrize("length", [1, 2, 31, 32, 33, 100])
def test_attention_lengths(length, tiny_gguf):
    """Across page borders, for one token and for the last of a chunk, pages out of order."""
    pair = Pair(tiny_gguf("gqa", "f16"), "exact", 128, context=256)
    rng = np.random.default_rng(2)
    shape = pair.ours.cache.k.shape
    k, v = (rng.standard_normal(shape).astype(np.float16) for _ in range(2))
    q = rng.standard_normal((length, 96)).astype(np.float32) * 2
    pages = rng.permutation(shape[1])
    for plan, ops in ((pair.ours, pair.ops), (pair.theirs, pair.reference)):
        plan.cache.k[:], plan.cache.v[:] = k, v
        plan.buffers.q[:length] = q
        plan.step.counts[0] = length
        plan.step.positions[:length] = np.arange(length)
        plan.step.rows[:length] = 0
        plan.step.pages[0] = pages
        ops.attend(1)
    check(pair.ours.buffers.a[:length], pair.theirs.buffers.a[:length])
    many = pair.ours.buffers.a[length - 1].copy()
    pair.ours.step.counts[0] = 1
    pair.ours.step.positions[0] = length - 1
    pair.ours.buffers.q[0] = q[-1]
    pair.ops.attend(1)
    check(pair.ours.buffers.a[:1], many[None])
    pair.close()


@pytest.mark.parametrize("name", ["gqa", "mha"])
def test_long_contexts_in_parts(name, tiny_gguf):
    """A context of several splits; several texts in one step, alone and with neighbours."""
    lengths = (1000, 300, 256, 257, 3, 40)
    pair = Pair(tiny_gguf(name, "f16"), "exact", 40, context=1024, sequences=6)
    n = pair.ours.buffers.q.shape[1]
    rng = np.random.default_rng(5)
    shape = pair.ours.cache.k.shape
    k, v = (rng.standard_normal(shape).astype(np.float16) for _ in range(2))
    q = rng.standard_normal((40, n)).astype(np.float32) * 2
    # One new token of each text but the fourth and the last, which have 3 and 32.
    new = (1, 1, 1, 3, 1, 32)
    rows = np.repeat(np.arange(6), new)
    positions = np.concatenate(
        [np.arange(end - k, end) for end, k in zip(lengths, new, strict=True)]
    )
    for plan, ops in ((pair.ours, pair.ops), (pair.theirs, pair.reference)):
        plan.cache.k[:], plan.cache.v[:] = k, v
        plan.step.pages[:] = np.arange(shape[1])[: plan.step.pages.size].reshape(6, -1)
        plan.buffers.q[:39] = q[:39]
        plan.step.counts[0] = 39
        plan.step.positions[:39], plan.step.rows[:39] = positions, rows
        ops.attend(1)
    check(pair.ours.buffers.a[:39], pair.theirs.buffers.a[:39])
    together = pair.ours.buffers.a[:39].copy()
    for t in (0, 1, 2, 6):
        pair.ours.step.counts[0] = 1
        pair.ours.step.positions[0], pair.ours.step.rows[0] = positions[t], rows[t]
        pair.ours.buffers.q[0] = q[t]
        pair.ops.attend(1)
        assert np.array_equal(pair.ours.buffers.a[0], together[t])
    pair.close()


def test_attention_survives_large_scores(tiny_gguf):
    pair = Pair(tiny_gguf("gqa", "f32"), "exact", 4)
    for plan, ops in ((pair.ours, pair.ops), (pair.theirs, pair.reference)):
        plan.cache.k[:] = np.random.default_rng(3).standard_normal(plan.cache.k.shape) * 100
        plan.cache.v[:] = 1
        plan.buffers.q[:4] = 100
        plan.step.counts[0] = 4
        plan.step.positions[:4] = np.arange(4)
        ops.attend(0)
    np.testing.assert_allclose(pair.ours.buffers.a[:4], 1, rtol=1e-6)
    check(pair.ours.buffers.a[:4], pair.theirs.buffers.a[:4])
    pair.close()


# -- reference itself, against formulas written another way -----------------------------------


def test_reference_rope_is_a_complex_product():
    rng = np.random.default_rng(4)
    x = rng.standard_normal((3, 2, 8)).astype(np.float32)
    angles = rng.standard_normal((3, 3))  # rope_dim 6: the last two dimensions pass through
    table = np.stack([np.cos(angles), np.sin(angles)], axis=1).astype(np.float32)
    for kind, first, second in (
        ("norm", np.s_[0:6:2], np.s_[1:6:2]),
        ("neox", np.s_[:3], np.s_[3:6]),
    ):
        turned = (x[..., first] + 1j * x[..., second]) * np.exp(1j * angles)[:, None]
        out = rope(x, table, kind)
        np.testing.assert_allclose(out[..., first], turned.real, rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(out[..., second], turned.imag, rtol=1e-5, atol=1e-6)
        assert np.array_equal(out[..., 6:], x[..., 6:])


def test_reference_norm_and_activations():
    x = np.array([[3.0, -4.0]], np.float32)
    np.testing.assert_allclose(
        rms_norm(x, np.array([1, 2], np.float32), 0.0), [[3 / 12.5**0.5, -8 / 12.5**0.5]], rtol=1e-6
    )
    assert activate("relu", x).tolist() == [[3, 0]]
    np.testing.assert_allclose(activate("silu", x), x / (1 + np.exp(-x)), rtol=1e-6)
    np.testing.assert_allclose(activate("gelu", x), [[2.9959502, -0.00012668]], rtol=1e-4)
    assert activate("relu2", x).tolist() == [[9, 0]]
    y = np.array([0.5, 0.49, -1, 2], np.float32)
    assert activate("fatrelu", y, 0.5).tolist() == [0.5, 0, 0, 2]
    shifted = layer_norm(x, np.array([1, 2], np.float32), np.array([5, 6], np.float32), 0.0)
    np.testing.assert_allclose(shifted, [[6, 4]], rtol=1e-6)
    with pytest.raises(ValueError, match="unknown activation"):
        activate("tanh", x)
