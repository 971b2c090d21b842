"""Placements: against exact solutions, never over the budget, and what the command says."""

import dataclasses
import json

import numpy as np
import pytest
from powerinfer.runtime.config import RunOptions
from powerinfer.runtime.engine import Engine
from powerinfer.runtime.errors import ModelError
from powerinfer.runtime.footprint import (
    DOWN_SPLITS,
    LayerSizes,
    ModelSizes,
    device_bytes,
    model_sizes,
    workspace,
    workspace_bytes,
)
from powerinfer.runtime.formats import GGMLType
from powerinfer.runtime.gguf import Value, ValueType
from powerinfer.runtime.plan import ENOUGH, Rates, place, plan
from powerinfer.runtime.step import Buffers
from powerinfer.runtime.traffic import traffic
from powerinfer.runtime.weights import load_model
from powerinfer.tools import synth
from scipy.optimize import Bounds, LinearConstraint, milp
from test_cli import last_line, run

GIB = 1 << 30
CARD = Rates(gpu=1008e9, cpu=60e9, link=20e-6)
TOKENS = 32  # in the cache of the random models


# -- what is to be found, by other means ----------------------------------------------------------


def random_model(rng):
    """A few layers with a few blocks each, alike or not; one in seven is not stored hot-first."""
    layers, alike = [], rng.random() < 0.3
    for _ in range(rng.integers(1, 6)):
        if alike and layers:
            layers.append(layers[0])
            continue
        n = int(rng.integers(1, 13))
        step = n if rng.random() < 0.15 else 1
        slots = np.arange(0, n + 1, step)
        block = 256 * int(rng.integers(1, 4000))
        firing = np.sort(rng.random(n) ** rng.uniform(0.3, 6))[::-1]
        total = np.concatenate([[0], np.cumsum(firing)])[slots]
        wider = rng.choice([1.0, 1.0, 1.9])  # a format that takes more bytes on the device
        attention, predictor = int(rng.integers(1, 10**6)), int(rng.integers(0, 10**5))
        layers.append(
            LayerSizes(
                step=step,
                n_blocks=n,
                dense=256 * int(rng.integers(1, 6000)),
                cache=256 * int(rng.integers(1, 3000)),
                hot=slots * block,
                hot_read=total * block * 0.9,
                cold_read=(total[-1] - total) * block * 0.9 / wider,
                served=total * 64,
                attention_read=attention,
                predictor_read=predictor,
                host_read=int((attention + predictor) / wider),
            )
        )
    return ModelSizes(
        name="random",
        mode="predicted",
        context=2 * TOKENS,
        is_parallel=bool(rng.integers(2)),
        is_profiled=True,
        layers=tuple(layers),
        cache_row=int(rng.integers(1, 10000)),
        head=256 * int(rng.integers(1, 2000)),
        head_read=10**5,
        host_head_read=10**5,
        embedding=256 * int(rng.integers(0, 200)),
        workspace=25600,
        graphs=2560,
        windows=256 * int(rng.integers(0, 200)),
    )


def random_case(seed):
    """A model, rates, and a budget between nothing and more than everything."""
    rng = np.random.default_rng(seed)
    m, gpu = random_model(rng), 10 ** rng.uniform(10, 12)
    rates = Rates(gpu, gpu / 10 ** rng.uniform(0.3, 2), rng.choice([0, 1e-6, 5e-6, 20e-6]))
    return m, rates, int(everything(m) * rng.uniform(0, 1.2))


def everything(m):
    layers = sum(la.dense + la.cache + int(la.hot[-1]) for la in m.layers)
    return layers + m.head + m.workspace + m.graphs


def layer_seconds(m, layer, rates, tokens, s, all_gpu):
    """Seconds of a layer on the GPU; all_gpu: the GPU takes as if it had all of the FFN."""
    attention = (layer.attention_read + tokens * m.cache_row) / rates.gpu
    predictor = layer.predictor_read / rates.gpu
    hot = layer.hot_read[-1 if all_gpu else s] / rates.gpu
    cold = layer.cold_read[s] / rates.cpu + rates.link if s + 1 < len(layer.hot) else 0
    if m.is_parallel:
        return predictor + max(attention + hot, cold)
    return attention + predictor + max(hot, cold)


def outside_seconds(m, rates, tokens, k):
    """Seconds of the head, and of the layers from k on on the CPU."""
    layers = sum(la.host_read + tokens * m.cache_row + la.cold_read[0] for la in m.layers[k:])
    if not k:
        return (layers + m.host_head_read) / rates.cpu
    return layers / rates.cpu + rates.link * (k < len(m.layers)) + m.head_read / rates.gpu


def seconds(m, rates, placement, tokens, all_gpu):
    """T of a placement, from its slots alone."""
    k = placement.gpu_layers
    inside = sum(
        layer_seconds(m, layer, rates, tokens, here.slots // layer.step, all_gpu)
        for layer, here in zip(m.layers[:k], placement.layers, strict=False)
    )
    return inside + outside_seconds(m, rates, tokens, k)


def least_seconds(m, rates, budget, all_gpu):
    """The optimum, by integer programs: one option of each layer on the GPU, for each count."""
    found = [outside_seconds(m, rates, TOKENS, 0)]
    for k in range(1, len(m.layers) + 1):
        layers = m.layers[:k]
        room = budget - m.head - m.workspace - m.graphs - sum(la.dense + la.cache for la in layers)
        costs = [
            [layer_seconds(m, la, rates, TOKENS, s, all_gpu) for s in range(len(la.hot))]
            for la in layers
        ]
        outside = outside_seconds(m, rates, TOKENS, k)
        if k == len(m.layers) and sum(la.hot[-1] for la in layers) <= room:
            found.append(outside + sum(cost[-1] for cost in costs))
        room -= m.windows
        if room < 0:
            continue
        cost, size = np.concatenate(costs), np.concatenate([la.hot for la in layers])
        chosen = np.zeros((k, len(cost)))
        for row, end, n in zip(chosen, np.cumsum([len(c) for c in costs]), costs, strict=True):
            row[end - len(n) : end] = 1
        solved = milp(
            cost / cost.max(),
            integrality=np.ones(len(cost)),
            bounds=Bounds(0, 1),
            constraints=[
                LinearConstraint(chosen, 1, 1),
                LinearConstraint(size / max(room, 1), -np.inf, 1),
            ],
            options={"mip_rel_gap": 0},
        )
        assert solved.success
        found.append(outside + float(cost @ np.round(solved.x)))
    return min(found)


def relaxed_seconds(m, rates, budget, tokens):
    """Below the optimum: layers may also be between two options (the lower hull of each)."""
    found = [outside_seconds(m, rates, tokens, 0)]
    room = budget - m.head - m.workspace - m.graphs - m.windows
    inside, edges = 0.0, []
    for k, layer in enumerate(m.layers, 1):
        room -= layer.dense + layer.cache
        if room < 0:
            break
        options = range(len(layer.hot))
        cost = np.array([layer_seconds(m, layer, rates, tokens, s, True) for s in options])
        inside, at = inside + cost[0], 0
        while at + 1 < len(cost):
            slopes = (cost[at] - cost[at + 1 :]) / (layer.hot[at + 1 :] - layer.hot[at])
            end = at + 1 + int(slopes.argmax())
            edges.append((slopes.max(), int(layer.hot[end] - layer.hot[at])))
            at = end
        total, left = inside + outside_seconds(m, rates, tokens, k), room
        for slope, size in sorted(edges, reverse=True):
            total -= slope * min(size, left)
            left -= min(size, left)
            if not left:
                break
        found.append(total)
    return min(found)


# -- placements -----------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(120))
def test_against_integer_programs(seed):
    m, rates, budget = random_case(seed)
    found = plan(m, rates, budget, TOKENS)
    assert seconds(m, rates, found, TOKENS, True) <= 1.01 * least_seconds(m, rates, budget, True)
    # The module's promise for T itself, where the CPU might make a layer faster than the GPU alone.
    share = (
        rates.cpu
        / rates.gpu
        * max(la.hot_read[-1] / la.cold_read[0] if la.cold_read[0] else 1 for la in m.layers)
    )
    best = least_seconds(m, rates, budget, False)
    assert seconds(m, rates, found, TOKENS, False) <= 1.01 * (1 + share) * best


@pytest.mark.parametrize("name", ["7b", "70b", "falcon-40b"])
def test_real_sizes_against_the_relaxed_problem(name):
    base, rng = model_sizes(synth.imagine(name), "predicted", 4096), np.random.default_rng(1)
    layers = []
    for layer in base.layers:  # each with a skew of its own
        firing = np.diff(layer.served) / 64
        firing = np.clip(firing ** rng.uniform(0.5, 2) * rng.uniform(0.5, 1.5), 0, 1)
        total = np.concatenate([[0], np.cumsum(64 * firing)])
        total *= layer.hot_read[-1] / layer.served[-1]
        layers.append(dataclasses.replace(layer, hot_read=total, cold_read=total[-1] - total))
    m = dataclasses.replace(base, layers=tuple(layers))
    for share in (0.2, 0.6, 0.97):
        budget = int(share * everything(m))
        found = plan(m, CARD, budget)
        best = relaxed_seconds(m, CARD, budget, 2048)
        assert best <= seconds(m, CARD, found, 2048, True) * (1 + 1e-9)
        assert seconds(m, CARD, found, 2048, True) <= 1.01 * best
        assert ENOUGH * budget <= found.used <= budget


def recount(m, p):
    """The bytes of a placement, from its slots alone."""
    if not p.gpu_layers:
        return 0
    total = m.head + m.workspace + m.graphs + p.bytes["embedding"]
    for layer, here in zip(m.layers[: p.gpu_layers], p.layers, strict=False):
        total += layer.dense + layer.cache + int(layer.hot[here.slots // layer.step])
    return total + (0 if p.is_everything else m.windows)


@pytest.mark.parametrize("first", range(0, 400, 50))
def test_budgets_are_kept_and_used(first):
    for seed in range(first, first + 50):
        m, rates, budget = random_case(seed)
        p = plan(m, rates, budget, TOKENS)
        assert p.used == recount(m, p) <= budget == p.budget
        assert [la.on_gpu for la in p.layers] == sorted(la.on_gpu for la in p.layers)[::-1]
        if p.is_everything or (p.gpu_layers and p.used >= ENOUGH * budget):
            assert p.note == ""
            continue
        # Then there is a reason, and it is true.
        left, k = budget - p.used, p.gpu_layers
        steps = [
            int(la.hot[here.slots // la.step + 1] - la.hot[here.slots // la.step])
            for la, here in zip(m.layers[:k], p.layers, strict=False)
            if here.slots < here.n_blocks
        ]
        need = m.layers[k].dense + m.layers[k].cache if k < len(m.layers) else 0
        if "not make it faster" in p.note:
            assert not steps
            slower = place(m, rates, [la.slots for la in p.layers[:k]] + [0], TOKENS)
            assert slower.used <= budget + (m.windows if k else 0)
        elif "block of neurons" in p.note:
            assert steps and min(steps) > left and f"{min(steps) / 2**20:.1f} MiB" in p.note
        elif k:
            assert "the next layer takes" in p.note and not steps and need > left
        else:
            need += m.head + m.workspace + m.graphs + m.windows
            assert p.note.startswith("CPU only: one layer") and need > budget


@pytest.mark.parametrize("seed", range(40))
def test_more_budget_is_never_worse(seed):
    m, rates, _ = random_case(seed)
    best, best_bound = np.inf, np.inf
    slack = 1.01 * (1 + 2 * rates.cpu / rates.gpu)  # 2: formats may be wider on the device
    for budget in np.linspace(0, 1.1 * everything(m), 60).astype(int):
        p = plan(m, rates, int(budget), TOKENS)
        now = seconds(m, rates, p, TOKENS, True)
        assert now <= 1.01 * best and p.bound.seconds <= slack * best_bound
        best, best_bound = min(best, now), min(best_bound, p.bound.seconds)


@pytest.mark.parametrize("name", ["7b", "falcon-40b"])
def test_more_budget_is_never_worse_for_real_sizes(name):
    m, best = model_sizes(synth.imagine(name), "predicted", 4096), np.inf
    for share in np.linspace(0, 1.05, 25):
        p = plan(m, CARD, int(share * everything(m)))
        assert p.bound.seconds <= 1.035 * best  # falcon's CPU may help out: the module says why
        assert seconds(m, CARD, p, 2048, True) <= 1.01 * best
        best = min(best, seconds(m, CARD, p, 2048, True))


@pytest.mark.parametrize("name", ["7b", "falcon-40b"])
def test_budgets_that_some_layers_just_fit(name):
    """What is left for neurons is then a small part of what fewer layers would leave."""
    m = model_sizes(synth.imagine(name), "predicted", 1024)
    own = [layer.dense + layer.cache for layer in m.layers]
    for taken in m.head + m.workspace + m.graphs + m.windows + np.cumsum(own):
        for more in (0, 1 << 20):
            p = plan(m, CARD, int(taken) + more)
            assert p.used == recount(m, p) <= taken + more


@pytest.mark.parametrize("seed", range(20))
def test_bound_is_the_formula(seed):
    m, rates, budget = random_case(seed)
    p = plan(m, rates, budget, TOKENS)
    assert p.bound.seconds == pytest.approx(seconds(m, rates, p, TOKENS, False), rel=1e-9)
    assert p.bound.tokens_per_second == pytest.approx(1 / p.bound.seconds)
    for tokens in (0, 77.5, 3 * TOKENS):  # of the same placement
        at = p.bound_at(tokens).seconds
        assert at == pytest.approx(seconds(m, rates, p, tokens, False), rel=1e-9)


def test_bound_by_hand():
    """One layer, numbers that can be followed: 1 GB/s and 0.1 GB/s, a link of 1 ms."""
    layer = LayerSizes(
        step=1,
        n_blocks=4,
        dense=2560,
        cache=2560,
        hot=np.arange(5) * 2560,
        hot_read=np.array([0, 4e6, 6e6, 7e6, 8e6]),
        cold_read=np.array([8e6, 4e6, 2e6, 1e6, 0]),
        served=np.array([0, 40, 60, 70, 80.0]),
        attention_read=3_000_000,
        predictor_read=1_000_000,
        host_read=4_000_000,
    )
    m = dataclasses.replace(
        random_model(np.random.default_rng(0)),
        layers=(layer, layer),
        cache_row=10_000,
        head_read=5_000_000,
        is_parallel=False,
    )
    rates = Rates(1e9, 1e8, 1e-3)
    one = place(m, rates, [2], tokens=200)  # 2 MB of cache in each layer
    # 3 + 1 + 2 + max(6, 20 + 1) ms; on the CPU 40 + 20 + 80 ms, and 1 to get there; head 5
    assert one.bound.seconds == pytest.approx(1e-3 * (6 + 21 + 140 + 1 + 5))
    assert one.bound.waiting == pytest.approx(15e-3) and one.bound.hot == pytest.approx(6e-3)
    assert one.served == pytest.approx(60 / 160) and one.layers[0].served == pytest.approx(0.75)
    both = place(m, rates, [2, 4], tokens=200)
    assert both.bound.seconds == pytest.approx(1e-3 * (6 + 21 + 6 + 8 + 5))
    falcon = dataclasses.replace(m, is_parallel=True)
    # The CPU starts beside attention: 1 + max(3 + 2 + 6, 21), then 1 + 3 + 2 + 8
    assert place(falcon, rates, [2, 4], 200).bound.seconds == pytest.approx(1e-3 * (22 + 14 + 5))
    assert place(m, rates, [], 200).bound.attention == 0


def test_slots_are_a_prefix():
    m = model_sizes(synth.imagine("tiny"), "predicted", 64)
    p = place(m, CARD, [3, 22], 0)
    table = p.layers[0].slot_table()
    assert table.dtype == np.int32 and table.tolist() == [0, 1, 2, *[-1] * 19]
    assert p.layers[1].slot_table().tolist() == list(range(22))
    assert not p.is_everything and place(m, CARD, [22, 22], 0).is_everything


def test_dense_parts_that_do_not_fit():
    m = model_sizes(synth.imagine("7b"), "predicted", 4096)
    own = m.layers[0].dense + m.layers[0].cache
    least = m.head + m.workspace + m.graphs + m.windows
    p = plan(m, CARD, least + 10 * own + 1000)
    assert p.gpu_layers == 10 and [la.on_gpu for la in p.layers] == [True] * 10 + [False] * 22
    assert p.layers[10].dense == p.layers[10].slots == 0 and p.bound.host_layers > 0
    assert plan(m, CARD, least + own).gpu_layers == 1
    none = plan(m, CARD, least + own - 1)
    assert none.gpu_layers == none.used == 0 and none.bytes == {}
    assert none.note.startswith("CPU only: one layer with the head and buffers takes")
    assert plan(m, CARD, 0).bound == none.bound


def test_a_gpu_that_does_not_help():
    m = model_sizes(synth.imagine("7b"), "predicted", 512)
    p = plan(m, Rates(gpu=10e9, cpu=60e9, link=20e-6), 16 * GIB)
    assert p.gpu_layers == 0 and "would not make it faster" in p.note


def test_everything_and_then_the_embedding():
    m = model_sizes(synth.imagine("small"), "predicted", 512)
    exactly = plan(m, CARD, everything(m))
    assert exactly.is_everything and exactly.used == everything(m) and exactly.served == 1
    assert exactly.bytes["embedding"] == exactly.bytes["windows"] == exactly.bound.waiting == 0
    assert not plan(m, CARD, everything(m) - 1).is_everything
    more = plan(m, CARD, everything(m) + m.embedding)
    assert more.bytes["embedding"] == m.embedding and more.used == more.budget


# -- sizes ----------------------------------------------------------------------------------------


def padded(n):
    return -(-n // 256) * 256


def test_bytes_on_the_device():
    assert device_bytes(GGMLType.Q4_0, 10, 96) == padded(10 * 48) + padded(10 * 6)
    assert device_bytes(GGMLType.Q8_0, 10, 96) == padded(960) + padded(10 * 6)
    assert device_bytes(GGMLType.Q5_0, 10, 96) == device_bytes(GGMLType.Q8_0, 10, 96)
    assert device_bytes(GGMLType.Q6_K, 3, 512) == padded(3 * 2 * 192) + padded(3 * 2 * 20)
    assert device_bytes(GGMLType.F16, 3, 7) == padded(42)
    for type_ in (GGMLType.F32, GGMLType.BF16, GGMLType.Q4_1, GGMLType.Q5_1, GGMLType.Q4_K):
        assert device_bytes(type_, 3, 256) == padded(3 * 256 * 4)


FAMILIES = [(name, "q4_0", True) for name in ("gqa", "bias", "bamboo", "falcon7", "opt")]
FAMILIES += [("mha", "f32", False), ("tied", "q5_1", False), ("swiglu", "q8_0", False)]


@pytest.mark.parametrize(("name", "outtype", "predictors"), FAMILIES)
def test_every_tensor_is_counted_once(name, outtype, predictors, tiny_gguf):
    """From the names in the file: everything on the GPU is every tensor but the tables."""
    model = load_model(tiny_gguf(name, outtype, predictors))
    c, mode = model.config, "predicted" if predictors else "dense"
    m = model_sizes(model, mode, 64)
    blocks = -(-c.n_ff // 64)

    def on_device(t):
        rows, cols = t.rows, t.cols
        is_neurons = any(part in t.name for part in ("ffn_gate", "ffn_up", "ffn_down_t"))
        if is_neurons and len(t.shape) == 2:
            rows = 64 * blocks
        if c.arch == "falcon" and "attn_norm." in t.name:  # falcon7 has one, which serves both
            return 2 * device_bytes(t.type, rows, cols)
        if "attn_qkv" not in t.name:
            return device_bytes(t.type, rows, cols)
        parts = (c.n_head, c.n_head_kv, c.n_head_kv)
        return sum(device_bytes(t.type, n * c.head_dim, cols) for n in parts)

    tensors = [t for t in model.file.tensors.values() if t.name != "rope_freqs.weight"]
    tables = c.n_layer * 2 * padded(4 * blocks)
    cache = c.n_layer * 2 * padded(64 * c.n_head_kv * c.head_dim * 2)
    total = everything(m) - m.workspace - m.graphs + m.embedding
    assert total == sum(map(on_device, tensors)) + tables + cache
    assert [la.cache for la in m.layers] == [cache // c.n_layer] * c.n_layer


def test_files_in_the_original_order(tiny_gguf):
    """They do not say who is hot: layers are there as a whole or not at all."""
    model = load_model(tiny_gguf("gqa", "f16", True))
    m = model_sizes(model, "predicted", 64)
    assert not m.is_profiled and [la.step for la in m.layers] == [3, 3]
    assert all(len(la.hot) == 2 for la in m.layers)
    rates = Rates(1e12, 1e10, 0)
    for budget in np.linspace(0, everything(m), 30).astype(int):
        p = plan(m, rates, int(budget))
        assert all(la.slots in (0, 3) for la in p.layers)
    m = dataclasses.replace(m, windows=0)  # these are larger than such a layer
    p = plan(m, rates, everything(m) - 1)
    assert [la.slots for la in p.layers] == [3, 0]
    assert p.served == 0.5 and p.layers[1].slot_table().tolist() == [-1] * 3


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Shape -> q4_0 file with random weights."""
    folder = tmp_path_factory.mktemp("plan")
    for name in ("tiny", "tiny-falcon"):
        synth.write_synthetic(name, folder / f"{name}.gguf")
    return {name: folder / f"{name}.gguf" for name in ("tiny", "tiny-falcon")}


@pytest.mark.parametrize("mode", ["predicted", "exact", "dense"])
@pytest.mark.parametrize("name", ["tiny", "tiny-falcon"])
def test_expected_reads_are_those_of_a_run(name, mode, files):
    ids = np.random.default_rng(0).integers(3, 512, 64).tolist()
    with Engine(files[name], RunOptions(mode=mode, context=64, backend="numpy")) as engine:
        counts = engine.read(ids)
        measured = traffic(engine.weights, mode, counts)
    m = model_sizes(load_model(files[name]), mode, 64)
    ffn = measured.decider + measured.up + measured.down
    assert sum(la.cold_read[0] for la in m.layers) == pytest.approx(ffn, rel=0.08)
    assert sum(la.hot_read[-1] for la in m.layers) == pytest.approx(ffn, rel=0.08)
    dense = sum(la.attention_read + la.predictor_read for la in m.layers)
    tensors = load_model(files[name]).file.tensors.items()
    norms = sum(t.nbytes for key, t in tensors if "blk." in key and "norm" in key)
    assert dense == measured.attention + measured.predictor + norms
    if mode == "dense":
        assert sum(la.cold_read[0] for la in m.layers) == pytest.approx(ffn, rel=1e-9)


def test_formats_that_are_wider_on_the_device(wide_gguf):
    """The CPU reads a file's bytes, the GPU its own."""
    m = model_sizes(load_model(wide_gguf("q5_0")), "exact", 64)
    for layer in m.layers:
        assert layer.hot_read[-1] / layer.cold_read[0] == pytest.approx(34 / 22)
        assert layer.hot_read[0] == layer.cold_read[-1] == 0


def test_shapes_are_planned_like_their_files(files):
    for name, path in files.items():
        real = model_sizes(load_model(path), "predicted", 64)
        imagined = model_sizes(synth.imagine(name), "predicted", 64)
        for a, b in zip(real.layers, imagined.layers, strict=True):
            for field in dataclasses.fields(LayerSizes):
                assert np.array_equal(getattr(a, field.name), getattr(b, field.name))
        assert dataclasses.replace(real, layers=()).__dict__ == (
            dataclasses.replace(imagined, layers=()).__dict__
        )


def test_predicted_share_of_the_calibration_record(files):
    model = load_model(files["tiny"])

    def read(predicted, firing):
        for name, values in (("predicted_share", predicted), ("firing_share", firing)):
            key = f"powerinfer.calibration.{name}"
            model.file.metadata[key] = Value(ValueType.ARRAY, np.array(values), ValueType.FLOAT32)
        return model_sizes(model, "predicted", 64).layers

    row = model.weights.layers[0].decider.nbytes / 1408
    firing = model.file.tensors["blk.0.ffn_freq"].numpy().astype(np.float64)
    first, second = read([0.3, 0.2], [0.1, 0.1])
    rows = [np.minimum(firing * factor, 1).sum() + 2 * firing.sum() for factor in (3, 2)]
    assert first.cold_read[0] == pytest.approx(rows[0] * row)
    assert second.cold_read[0] == pytest.approx(rows[1] * row)
    assert first.hot_read[5] == pytest.approx(
        (np.minimum(firing * 3, 1) + 2 * firing)[:320].sum() * row
    )
    for bad in ([0.1], [0.1, np.nan], [0.1, 1.5]):
        with pytest.raises(ModelError, match="predicted_share is not 2 numbers from 0 to 1"):
            read(bad, [0.1, 0.1])


def test_workspace_has_the_buffers_of_a_pass(files):
    model = load_model(files["tiny"])
    c, w = model.config, model.weights
    arrays = workspace(w, c, "predicted", n_tok=48, n_out=8, n_seq=2, context=300)
    for name, array in vars(Buffers(c, 48, 8)).items():
        if name not in ("q", "truth"):  # q is part of qkv; audits are the CPU's
            shape = arrays["counted" if name == "counts" else name]
            assert np.empty(shape[1], shape[0]).nbytes == array.nbytes, name
    assert arrays["qkv"][1] == (48, (c.n_head + 2 * c.n_head_kv) * c.head_dim)
    assert arrays["pages"][1] == (2, 10) and arrays["rope"][1] == (300, 2, 32)
    assert arrays["down_parts"][1] == (48, 512) and arrays["attention_sums"][1] == (2, 8, 32, 64)
    total = sum(padded(np.empty(shape, kind).nbytes) for kind, shape in arrays.values())
    assert workspace_bytes(arrays) == total
    one = workspace(w, c, "exact", n_tok=1, n_out=8, n_seq=1, context=300)
    assert one["down_parts"][1] == (DOWN_SPLITS, 512) and one["attention_sums"][1][0] == 1
    assert one["scores"][1] == (1, 0) and one["hidden_q"][1] == (1, 0)


# -- the command ----------------------------------------------------------------------------------

RATES = ("--gpu-bandwidth", 1000, "--cpu-bandwidth", 20, "--link-us", 1)


def test_text(capfd, files):
    model = files["tiny"]
    code, out, err = run(capfd, "plan", "-m", model, "--vram-budget", 0.25, "-c", 64, *RATES)
    assert code == 0 and err == ""
    lines = out.splitlines()
    assert "synthetic-tiny" in lines[0] and "predicted mode, context 64" in lines[0]
    assert lines[2].split()[:2] == ["0-1", "GPU"] and "22 of 22, 100.0% of" in lines[2]
    assert "everything is on the GPU" in out and "GPU 1000 GB/s (given)" in out
    budget = 0.25 * 0.9 * 23 / 256  # a part of the neurons
    code, out, _ = run(capfd, "plan", "-m", model, "--vram-budget", budget, "-c", 64, *RATES)
    assert code == 0 and "t/s with 32 tokens in the cache" in out and "as the file says" in out
    code, out, _ = run(capfd, "plan", "-m", model, "--vram-budget", 0, "-c", 64, *RATES)
    assert code == 0 and "CPU only: one layer" in out and "0.0 of 0.0 MiB" in out


def test_json(capfd, files):
    args = ("plan", "-m", files["tiny-falcon"], "-c", 64, "--json", *RATES)
    m = model_sizes(load_model(files["tiny-falcon"]), "exact", 64, f32_cache=True, n_tok=64)
    budget = m.head + m.workspace + m.graphs + m.windows
    budget += sum(la.dense + la.cache + int(la.hot[7]) for la in m.layers)
    options = ("--vram-budget", budget / GIB, "--exact", "--kv-type", "f32", "--at", 64)
    code, out, _ = run(capfd, *args, *options)
    found = json.loads(out)
    assert code == 0 and found["mode"] == "exact" and found["budget"] == budget
    assert found["used"] == sum(found["bytes"].values()) <= budget
    assert [la["slots"] for la in found["layers"]] == [7, 7]
    again = place(m, Rates(1e12, 2e10, 1e-6), [7, 7], 64)
    assert found["bound"]["seconds"] == pytest.approx(again.bound.seconds)
    assert sum(found["bound"]["parts"].values()) == pytest.approx(again.bound.seconds)
    assert found["one_gib_more"]["tokens_per_second"] > found["bound"]["tokens_per_second"]
    assert found["served"] == pytest.approx(again.served)


@pytest.mark.parametrize(
    ("shape", "budget", "layers"), [("70b", 8, 80), ("falcon-40b", 24, 60), ("7b", 4, 32)]
)
def test_published_shapes(shape, budget, layers, capfd):
    args = ("plan", "--shape", shape, "--vram-budget", budget, "-c", 2048, "--json", *RATES)
    code, out, _ = run(capfd, *args)
    found = json.loads(out)
    assert code == 0 and len(found["layers"]) == layers
    assert 0.95 * budget * GIB <= found["used"] <= budget * GIB or found["is_everything"]


def test_a_file_that_was_not_profiled(capfd, tiny_gguf):
    model = tiny_gguf("gqa", "f16", True)
    code, out, _ = run(capfd, "plan", "-m", model, "--vram-budget", 1, *RATES)
    assert code == 0 and "not stored hot-first" in out and "assumed: 10% of the neurons" in out


def test_measured_bandwidth(capfd, files):
    code, out, err = run(capfd, "plan", "-m", files["tiny"], "--vram-budget", 1)
    assert code == 0 and "measuring" in err
    assert "GB/s (measured)" in out and "GPU 500 GB/s (assumed), CPU" in out


def test_usage_errors(capfd, files, tiny_gguf, tmp_path):
    model = ("-m", files["tiny"], "--vram-budget", 1)
    for args, message in (
        (("--vram-budget", 1), "one of the arguments -m/--model --shape is required"),
        (("-m", "x.gguf"), "--vram-budget"),
        ((*model, "--shape", "7b"), "not allowed with"),
        (("--shape", "3b", "--vram-budget", 1), "invalid choice"),
        ((*model, "--type", "q8_0"), "--type goes with --shape"),
        (("-m", "x.gguf", "--vram-budget", -1), "vram_budget is -1"),
        (("-m", "x.gguf", "--vram-budget", "nan"), "vram_budget is nan"),
        ((*model, "--gpu-bandwidth", 0), "0 is not above 0"),
        ((*model, "--cpu-bandwidth", "inf"), "inf is not above 0"),
        ((*model, "--link-us", -1), "-1 is not at least 0"),
        ((*model, "--gpu-bandwidth", "1e308"), "1e308 is not above 0, and at most a million"),
        (("-m", "x.gguf", "--vram-budget", "1e12"), "it must be 0 to 1000000 GiB"),
        ((*model, "-c", 64, "--at", 65), "--at 65 is more than the context of 64"),
    ):
        code, out, err = run(capfd, "plan", *args)
        assert code == 2 and out == "" and message in last_line(err), args
    for path, option, message in (
        (tmp_path / "none.gguf", (), "No such file"),
        (tiny_gguf("swiglu", "q8_0"), ("--exact",), "can only run with --dense"),
    ):
        code, out, err = run(capfd, "plan", "-m", path, "--vram-budget", 1, *RATES, *option)
        assert code == 1 and out == "" and err.count("\n") == 1 and message in err
