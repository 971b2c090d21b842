"""Perplexity, KL divergence, recall, bytes a token; predicted mode against dense and itself."""

import dataclasses
import json
import math

import numpy as np
import pytest
from conftest import kl
from powerinfer.predictors.measure import measure
from powerinfer.predictors.text import read_text, windows
from powerinfer.runtime.cache import KVCache, Sequence
from powerinfer.runtime.config import RunOptions
from powerinfer.runtime.cpu.operators import CPU
from powerinfer.runtime.engine import Engine
from powerinfer.runtime.errors import FileFormatError, RequestError
from powerinfer.runtime.model import forward
from powerinfer.runtime.step import FIRED, Buffers, Step
from powerinfer.runtime.weights import load_model
from test_cli import one_sentence, run
from truth import HELDOUT, kept, random_texts, truth

TEXTS = random_texts(3, 41)
# An architecture each; every activation, with and without biases, with and without a gate.
NAMES = ["mha", "bias", "bamboo", "prosparse", "relu2", "falcon7", "falcon40", "opt"]


def opened(path, mode, **options):
    return Engine(path, RunOptions(mode=mode, threads=2, **options))


# -- texts ------------------------------------------------------------------------------------


class Letters:
    """An engine as far as windows() looks: a token for each letter."""

    context = 100

    def __init__(self, bos):
        self.bos = bos

    def tokenize(self, text, add_bos=None):
        return [*([] if add_bos is False else self.bos), *text.encode()]


@pytest.mark.parametrize("bos", [[], [1]], ids=["", "bos"])
@pytest.mark.parametrize("length", [3, 4, 10, 100])
@pytest.mark.parametrize("n", [3, 9, 10, 11, 99, 100, 101, 237])
def test_windows(n, length, bos):
    """BOS takes the place of a token, as in llama.cpp."""
    text = "".join(chr(32 + i % 90) for i in range(n))
    found = windows(Letters(bos), text, length)
    if n < length:
        assert found == [[*bos, *text.encode()[len(bos) :]]]  # all there is
        return
    assert len(found) == n // length and {len(w) for w in found} == {length}
    assert all(w[: len(bos)] == bos for w in found)
    for i, window in enumerate(found):
        start = i * length
        assert window[len(bos) :] == list(text.encode()[start + len(bos) : start + length])


@pytest.mark.parametrize("bos", [[], [1]], ids=["", "bos"])
@pytest.mark.parametrize("limit", [3, 9, 10, 11, 20, 59, 1000])
def test_windows_up_to_a_limit(limit, bos):
    text = "".join(chr(32 + i % 90) for i in range(237))
    found, all_ = (windows(Letters(bos), text, 10, n) for n in (limit, None))
    assert found == windows(Letters(bos), text[:limit], 10)
    assert len(found) == min(max(limit // 10, 1), len(all_))
    assert sum(map(len, found)) <= limit and len(found[0]) == min(limit, 10)


def test_windows_that_are_not_possible():
    for length in (0, 1, 2, 101):
        with pytest.raises(RequestError, match="3 to 100 are possible"):
            windows(Letters([1]), "some text", length)
    for text, limit in (("x", None), ("xy", None), ("some text", 2)):
        for bos in ([], [1]):
            with pytest.raises(RequestError, match="at least three tokens"):
                windows(Letters(bos), text, 10, limit)
    assert windows(Letters([1]), "xyz", 10) == [[1, 121, 122]]


def test_windows_of_a_model(tiny_gguf):
    with opened(tiny_gguf("mha", "f32"), "exact") as engine:
        text = HELDOUT.read_text("utf-8")[:2000]
        found, ids = windows(engine, text, 64), engine.tokenize(text, add_bos=False)
    assert {(w[0], len(w)) for w in found} == {(1, 64)}
    assert len(found) == len(ids) // 64 > 3
    assert [w[1:] for w in found] == [ids[64 * i + 1 : 64 * i + 64] for i in range(len(found))]


def test_text_files(tmp_path):
    (tmp_path / "good").write_text("Käse", encoding="utf-8")
    assert read_text(tmp_path / "good") == "Käse"
    (tmp_path / "latin").write_bytes("Käse".encode("latin-1"))
    (tmp_path / "empty").write_bytes(b"")
    for name, message in (("latin", "latin is not UTF-8"), ("empty", "empty is empty")):
        with pytest.raises(RequestError, match=message):
            read_text(tmp_path / name)
    with pytest.raises(FileFormatError, match="not a regular file"):
        read_text(tmp_path)
    with pytest.raises(FileNotFoundError):
        read_text(tmp_path / "missing")


# -- quality ----------------------------------------------------------------------------------


def probabilities(logits):
    x = np.exp(logits.astype(np.float64) - logits.max(axis=1, keepdims=True))
    return x / x.sum(axis=1, keepdims=True)


def error(values):
    return np.std(values, ddof=1) / math.sqrt(len(values))


def test_a_model_is_like_itself(tiny_gguf):
    path = tiny_gguf("mha", "f32")
    with opened(path, "exact") as a, opened(path, "exact") as b:
        quality = measure(a, TEXTS, b)
    d = quality.divergence
    assert d.kl.mean == d.kl.error == d.kl_max == d.delta_p_rms == 0
    assert (d.same_top.mean, d.same_top.error, d.log_ratio.mean) == (1, 0, 0)
    assert d.perplexity == quality.perplexity.mean and quality.layers == []


def test_figures(tiny_gguf):
    """Of what follows the middle of each window, each token scored by what came before it."""
    texts = [TEXTS[0], TEXTS[1][:30], TEXTS[2][:2], TEXTS[2][:3]]
    first = [21, 16, 1, 2]  # token that is scored
    paths, done = [tiny_gguf("mha", outtype) for outtype in ("q4_0", "f32")], []
    with opened(paths[0], "exact") as ours, opened(paths[1], "dense") as base:
        quality = measure(ours, texts, base, done.append)
        q, p = (
            np.concatenate(
                [probabilities(e.logits(t)[i - 1 : -1]) for t, i in zip(texts, first, strict=True)]
            )
            for e in (ours, base)
        )
    nexts = [token for t, i in zip(texts, first, strict=True) for token in t[i:]]
    n = np.arange(len(nexts))
    assert done == [41, 30, 2, 3]
    assert quality.tokens == len(nexts) == 20 + 14 + 1 + 1
    nll, nll_base = -np.log(q[n, nexts]), -np.log(p[n, nexts])
    kl = (p * np.log(p / q)).sum(axis=1)
    same, delta = p.argmax(axis=1) == q.argmax(axis=1), q[n, nexts] - p[n, nexts]
    assert quality.perplexity.mean == pytest.approx(math.exp(nll.mean()), rel=1e-9)
    assert quality.perplexity.error == pytest.approx(math.exp(nll.mean()) * error(nll), rel=1e-9)
    d = quality.divergence
    assert d.perplexity == pytest.approx(math.exp(nll_base.mean()), rel=1e-9)
    for found, values in (
        (d.log_ratio, nll - nll_base),
        (d.kl, kl),
        (d.same_top, same),
        (d.delta_p, delta),
    ):
        assert found.mean == pytest.approx(np.mean(values), rel=1e-6)
        assert found.error == pytest.approx(error(values), rel=1e-6)
    assert d.kl.mean > 1e-5 and 0 < d.same_top.mean <= 1
    assert (d.kl_median, d.kl_99, d.kl_max) == pytest.approx(
        (np.median(kl), np.percentile(kl, 99), kl.max()), rel=1e-6
    )
    assert d.delta_p_rms == pytest.approx(math.sqrt(np.mean(delta**2)), rel=1e-6)


def test_a_watcher_is_gone_even_after_an_error(tiny_gguf):
    with opened(tiny_gguf("mha", "f32", True), "predicted") as engine:
        with pytest.raises(RequestError):
            measure(engine, [[1, 5, 7], [1, 10**6]])
        assert engine.watcher is None
        measure(engine, TEXTS[:1])
        assert engine.watcher is None


# -- recall, bytes a token --------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_recall(name, tiny_gguf):
    with opened(tiny_gguf(name, "f32", True), "predicted", chunk=16) as engine:
        keep = kept(engine, TEXTS)
        layers = measure(engine, TEXTS).layers
        assert len(layers) == engine.config.n_layer
        for il, found in enumerate(layers):
            layer = truth(engine, il, keep["h", il])
            fires, mask = layer.fires, keep["mask", il].astype(bool)
            assert 0.1 < fires.mean() < 0.9 and 0.1 < mask.mean() < 0.9
            hits, close = (fires & mask).sum(), 1e-9 + 2 * layer.slack / fires.sum()
            assert found.recall == pytest.approx(hits / fires.sum(), abs=close)
            assert found.precision == pytest.approx(hits / mask.sum(), abs=close)
            assert found.predicted_share == pytest.approx(mask.mean())
            assert found.firing_share == pytest.approx(fires.mean(), abs=close)


def sizes(file, *names):
    return sum(t.nbytes for t in file.tensors.values() if t.name.endswith(names))


ATTENTION = ("attn_q.weight", "attn_k.weight", "attn_v.weight", "attn_qkv.weight")
ATTENTION += ("attn_output.weight",)


@pytest.mark.parametrize("outtype", ["f32", "q4_0"])
@pytest.mark.parametrize("name", [*NAMES, "tied"])
def test_dense_traffic_is_all_matrices(name, outtype, tiny_gguf):
    with opened(tiny_gguf(name, outtype, True), "dense") as engine:
        found, file = measure(engine, TEXTS[:1]).traffic, engine.file
    head = "output.weight" if "output.weight" in file.tensors else "token_embd.weight"
    assert found.head == file.tensors[head].nbytes
    assert found.attention == sizes(file, *ATTENTION)
    assert found.ffn == sizes(file, "ffn_gate.weight", "ffn_up.weight", "ffn_down_t.weight")
    assert found.predictor == 0
    assert found.total == found.head + found.attention + found.ffn


@pytest.mark.parametrize("mode", ["exact", "predicted"])
@pytest.mark.parametrize("name", NAMES)
def test_sparse_traffic_is_rows_that_are_read(name, mode, tiny_gguf):
    """The decider's rows where predicted, up's where the decider fires, down's where both do."""
    with opened(tiny_gguf(name, "f32", True), mode) as engine:
        keep, found, file = kept(engine, TEXTS), measure(engine, TEXTS).traffic, engine.file
        n_tok, row = sum(map(len, TEXTS)), 4 * engine.config.n_embd
        decider = up = down = 0.0
        slack = 1e-6 * row
        for il, layer in enumerate(engine.weights.layers):
            who = truth(engine, il, keep["h", il])
            mask = keep["mask", il].astype(bool)
            mask = mask if mode == "predicted" else np.ones_like(mask)
            decider += mask.sum() * row / n_tok
            up += 0 if layer.up is None else (who.reads_up & mask).sum() * row / n_tok
            down += (who.fires & mask).sum() * row / n_tok
            slack += who.slack * row / n_tok
    assert (found.decider, found.up) == pytest.approx((decider, up), abs=slack)
    assert found.down == pytest.approx(down, abs=slack)
    predictor = sizes(file, "fc1.weight", "fc2.weight") if mode == "predicted" else 0
    assert found.predictor == predictor and found.attention == sizes(file, *ATTENTION)
    assert found.ffn == predictor + found.decider + found.up + found.down


# -- predicted mode ---------------------------------------------------------------------------


def true_masks(ops, il):
    step, b = ops.plan.step, ops.plan.buffers
    for t in range(step.n_tok):
        step.audit[0] = t
        ops.audit(il)
        b.mask[t] = b.truth == FIRED


@pytest.mark.parametrize("backend", ["cpu", "numpy"])
@pytest.mark.parametrize("name", NAMES)
def test_with_the_true_mask_nothing_is_lost(name, backend, tiny_gguf):
    path = tiny_gguf(name, "f32", True)
    options = {"backend": backend, "kv_type": "f32"}
    with opened(path, "predicted", **options) as engine, opened(path, "dense", **options) as base:
        quality = measure(engine, TEXTS, base, masks=true_masks)
        exact = opened(path, "exact", **options)
        assert quality.divergence.kl_max < 1e-6 and quality.divergence.delta_p_rms < 1e-4
        assert all(r.recall == r.precision == 1 for r in quality.layers)
        assert all(r.predicted_share == r.firing_share < 0.9 for r in quality.layers)
        found = measure(exact, TEXTS).traffic
        assert quality.traffic.down == found.down and quality.traffic.decider < found.decider
        assert measure(engine, TEXTS, base).divergence.kl.mean > 1e-4  # the file's own masks
        exact.close()


@pytest.mark.parametrize("outtype", ["f32", "f16", "q4_0"])
@pytest.mark.parametrize("name", ["mha", "bamboo", "falcon7", "opt"])
@pytest.mark.parametrize("predictor_input", ["residual", "normed"])
def test_chunks_change_no_bit(predictor_input, name, outtype, tiny_gguf):
    model = load_model(tiny_gguf(name, outtype, True))
    config = dataclasses.replace(model.config, predictor_input=predictor_input)
    model = dataclasses.replace(model, config=config)
    ids = random_texts(1, 100)[0]
    logits = {}
    for chunk in (1, 7, 64, 512):
        with opened(model, "predicted", chunk=chunk) as engine:
            logits[chunk] = engine.logits(ids)
    for chunk in (7, 64):
        assert np.array_equal(logits[chunk], logits[512])
    assert kl(logits[512], logits[1]) < (5e-4 if outtype == "q4_0" else 1e-4)


class Batch:
    """A plan for two sequences in one step, on the CPU: what Engine makes for one."""

    def __init__(self, path):
        with opened(path, "predicted", context=128, chunk=64) as engine:
            one = engine._plan
        self.plan = dataclasses.replace(
            one,
            cache=KVCache(one.config, 256, one.cache.k.dtype.type),
            step=Step(64, 2, 128, 64, one.step.file_thresholds),
            buffers=Buffers(one.config, 64, 64),
        )
        self.ops = CPU(self.plan, 2)

    def feed(self, *chunks):
        """Run (sequence, ids) of one or two sequences; return the logits of all their tokens."""
        for sequence, ids in chunks:
            self.plan.cache.extend([(sequence, len(ids))])
        self.plan.step.fill(chunks)
        forward(self.plan, self.ops)
        n = self.plan.step.n_tok
        self.plan.step.want(range(n))
        self.ops.head()
        return self.plan.buffers.logits[:n].copy(), self.plan.buffers.mask[:n].copy()


@pytest.mark.parametrize("outtype", ["f16", "q4_0"])
@pytest.mark.parametrize("name", ["mha", "bamboo", "falcon7", "opt"])
def test_batch_mates_change_nothing(name, outtype, tiny_gguf):
    """Prompts, then token by token, and a prompt beside a token; thresholds of their own.

    Not to the bit: a token on its own takes another path than one in a batch.
    """
    batch = Batch(tiny_gguf(name, outtype, True))
    a, b = random_texts(2, 40, seed=3)
    cuts = [(0, 20, 0, 11), (20, 21, 11, 12), (21, 22, 12, 30), (22, 40, 30, 31)]
    low, high = np.array([-9, -6], np.float32), np.array([8, 10], np.float32)
    bound = 5e-4 if outtype == "q4_0" else 1e-4

    def sequences():
        return Sequence(thresholds=low), Sequence(thresholds=high)

    (one, other), alone = sequences(), []
    for first, last, _, _ in cuts:
        alone.append([batch.feed((one, a[first:last]))])
    for i, (_, _, first, last) in enumerate(cuts):
        alone[i].append(batch.feed((other, b[first:last])))
    (one, other), shares = sequences(), []
    for (a0, a1, b0, b1), parts in zip(cuts, alone, strict=True):
        logits, mask = batch.feed((one, a[a0:a1]), (other, b[b0:b1]))
        n = a1 - a0
        assert kl(np.concatenate([part[0] for part in parts]), logits) < bound
        same = mask == np.concatenate([part[1] for part in parts])
        assert same.mean() > (0.98 if outtype == "q4_0" else 0.999)
        shares.append((mask[:n].mean(), mask[n:].mean()))
    assert all(x > y + 0.05 for x, y in shares)  # the thresholds did differ
    batch.ops.close()


# -- the command ------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text(HELDOUT.read_text("utf-8")[:1500], encoding="utf-8")
    return path


def test_perplexity_as_json(capfd, tiny_gguf, text):
    path = tiny_gguf("mha", "q4_0", True)
    code, out, err = run(capfd, "perplexity", "-m", path, "-f", text, "-c", 100, "--json")
    assert code == 0 and "Traceback" not in err
    found = json.loads(out)
    with opened(path, "predicted", context=100) as a, opened(path, "exact", context=100) as b:
        texts = windows(a, text.read_text("utf-8"), 100)
        wanted = dataclasses.asdict(measure(a, texts, b))
    assert found == json.loads(json.dumps(wanted))
    assert found["tokens"] == 49 * len(texts) and found["divergence"]["kl"]["mean"] > 1e-4
    assert len(found["layers"]) == 2 and 0 < found["layers"][1]["recall"] < 1
    assert found["traffic"]["predictor"] > 0


def test_perplexity_of_other_modes(capfd, tiny_gguf, text):
    path = tiny_gguf("mha", "f32", True)  # q4_0's int8 activations may round the other way
    base = ("perplexity", "-m", path, "-f", text, "--json")
    found = {}
    for option in ("", "--exact", "--dense", "--sparse-threshold=-1e9"):
        code, out, _ = run(capfd, *base, *filter(None, [option]))
        assert code == 0
        found[option] = json.loads(out)
    exact, dense = found["--exact"], found["--dense"]
    assert exact["divergence"] is None and exact["layers"] == []
    assert exact["perplexity"]["mean"] == pytest.approx(dense["perplexity"]["mean"], rel=1e-6)
    assert exact["traffic"]["predictor"] == 0 < found[""]["traffic"]["predictor"]
    assert dense["traffic"]["down"] > exact["traffic"]["down"]
    everything = found["--sparse-threshold=-1e9"]
    assert [r["recall"] for r in everything["layers"]] == [1, 1]
    assert everything["divergence"]["kl"]["mean"] < 1e-9
    few = json.loads(run(capfd, *base, "-n", 150, "-c", 64)[1])
    assert few["tokens"] == 2 * 31


def test_perplexity_as_a_table(capfd, tiny_gguf, demo_gguf, text):
    path, base = tiny_gguf("mha", "q4_0", True), tiny_gguf("mha", "f16")
    code, out, _ = run(capfd, "perplexity", "-m", path, "-f", text, "--kl-base", base)
    assert code == 0
    rows = {line[:24].strip(): line[24:].strip() for line in out.splitlines()}
    value = float(rows["perplexity"].split(" ± ")[0])
    assert value > 1 and float(rows["base perplexity"]) > 1
    assert float(rows["KL mean"].split(" ± ")[0]) > 0 and "%" in rows["same top token"]
    total = float(rows["KiB of weights a token"])
    parts = [float(rows[p]) for p in ("attention", "predictor", "decider", "up", "down", "head")]
    assert total == pytest.approx(sum(parts), abs=4)
    lines = out.splitlines()
    at = lines.index("layer  recall  precision  predicted  firing")
    assert len(lines) == at + 3
    assert [line[:5].strip() for line in lines[at + 1 :]] == ["0", "1"]
    assert all(line.count("%") == 4 for line in lines[at + 1 :])
    code, out, _ = run(capfd, "perplexity", "-m", base, "-f", text)
    assert code == 0 and "KL" not in out and "recall" not in out


def test_perplexity_failures(capfd, tiny_gguf, demo_gguf, text, tmp_path):
    model = tiny_gguf("mha", "q4_0", True)
    (tmp_path / "latin").write_bytes(b"K\xe4se")
    (tmp_path / "short").write_text("")
    for args, message in (
        (["--kl-base", demo_gguf("q4_0")], "has another vocabulary"),
        (["--kl-base", tmp_path / "missing.gguf"], "No such file"),
        (["--kl-base", text], "not a GGUF file"),
        (["-f", tmp_path / "latin"], "not UTF-8"),
        (["-f", tmp_path / "short"], "is empty"),
        (["-f", tmp_path], "not a regular file"),
        (["-f", tmp_path / "missing"], "No such file"),
        (["-m", tmp_path / "missing"], "No such file"),
    ):
        result = run(capfd, "perplexity", "-m", model, "-f", text, *args)
        assert message in one_sentence(result, "perplexity"), args
    opt = run(capfd, "perplexity", "-m", tiny_gguf("opt", "f16"), "-f", text, "-c", 1000)
    assert "learned positions for 256" in one_sentence(opt, "perplexity")
    for args, message in (
        (["-m", model], "required: -f"),
        (["-m", model, "-f", text, "-c", 2], "2 is below 3"),
        (["-m", model, "-f", text, "-n", 2], "2 is below 3"),
        (["-m", model, "-f", text, "-n", "x"], "invalid"),
        (["-m", model, "-f", text, "--exact", "--dense"], "not allowed with"),
        (["-m", model, "-f", text, "--sparse-threshold", "nan"], "sparse_threshold is nan"),
    ):
        code, out, err = run(capfd, "perplexity", *args)
        assert (code, out) == (2, "") and message in err, args
