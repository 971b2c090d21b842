"""Opening models and writing text."""

import itertools
import os
import signal
import threading
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import numpy as np
import pytest
import tiny
from powerinfer.runtime.cache import KVCache, Sequence
from powerinfer.runtime.config import model_config
from powerinfer.runtime.engine import Engine
from powerinfer.runtime.errors import FileFormatError, ModelError, PowerInferError, RequestError
from powerinfer.runtime.gguf import GGUFFile, Value, ValueType
from powerinfer.runtime.gguf_writer import GGUFWriter
from powerinfer.runtime.step import Step
from test_gguf import write

import powerinfer


@pytest.fixture(scope="module")
def llm(demo_gguf):
    with powerinfer.open(demo_gguf("q4_0"), threads=2) as engine:
        yield engine


def test_readme_example(llm):
    ids = llm.tokenize("In the beginning")
    assert llm.detokenize(ids) == "In the beginning"
    x = llm.logits(ids)
    assert x.shape == (len(ids), 4096) and x.dtype == np.float32
    text = "".join(llm.generate("In the beginning", max_tokens=24, temperature=0))
    assert text.startswith(" ") and len(text.split()) > 8
    assert llm.finish_reason in ("length", "eos")


def test_generation_is_greedy_over_logits(llm):
    ids = llm.tokenize("And God said")
    tokens = list(llm.generate_tokens(ids, max_tokens=12, temperature=0, ignore_eos=True))
    assert llm.logits(ids + tokens)[len(ids) - 1 : -1].argmax(axis=-1).tolist() == tokens


def test_pieces_join_to_the_text(llm):
    options = {"max_tokens": 40, "temperature": 1.2, "seed": 5, "top_k": 0, "ignore_eos": True}
    prompt = llm.tokenize("And it came to pass")
    tokens = list(llm.generate_tokens(prompt, **options))
    text = "".join(llm.generate("And it came to pass", **options))
    whole = llm.detokenize(prompt + tokens)
    assert whole == "And it came to pass" + text


def test_runs_repeat(llm):
    options = {"max_tokens": 20, "seed": 11}
    first = list(llm.generate("And the LORD", **options))
    assert list(llm.generate("And the LORD", **options)) == first
    assert list(llm.generate("And the LORD", max_tokens=20, seed=12)) != first


def test_empty_prompt_starts_from_bos(llm):
    text = "".join(llm.generate("", max_tokens=8, temperature=0))
    assert text and not text.startswith(" ")
    with pytest.raises(RequestError, match="prompt is empty"):
        llm.generate_tokens([])


def test_stop_strings(llm):
    options = {"max_tokens": 60, "temperature": 0, "ignore_eos": True}
    whole = "".join(llm.generate("And God said", **options))
    stop = whole[20:24]
    at = whole.index(stop)
    pieces = list(llm.generate("And God said", stop=stop, **options))
    assert "".join(pieces) == whole[:at] and llm.finish_reason == "stop"
    never = "".join(llm.generate("And God said", stop=["\x00never", ""], **options))
    assert never == whole and llm.finish_reason == "length"
    # Text that may be the beginning of a stop string is held back, then given out.
    almost = list(llm.generate("And God said", stop=stop[:3] + "\x00", **options))
    assert "".join(almost) == whole


def test_limits(llm):
    assert list(llm.generate("x", max_tokens=0)) == []
    assert llm.timings.prompt_tokens == 3 and llm.finish_reason == "length"
    assert len(list(llm.generate_tokens([1, 5], max_tokens=7, ignore_eos=True))) == 7


def test_context_ends_the_text(demo_gguf):
    with powerinfer.open(demo_gguf("q4_0"), context=40) as llm:
        tokens = list(llm.generate_tokens([1] * 10, ignore_eos=True, seed=0))
        # The last token is chosen but not fed: prompt and continuation are one more than fits.
        assert len(tokens) == 31 and llm.finish_reason == "context"
        assert len(list(llm.generate_tokens([1] * 40, ignore_eos=True))) == 1
        with pytest.raises(RequestError, match=r"prompt has 41 tokens, the context 40"):
            llm.generate_tokens([1] * 41)
        with pytest.raises(RequestError, match="prompt has 41 tokens"):
            llm.logits([1] * 41)
        # Nothing of all that is left in the cache.
        assert len(llm._plan.cache._free) == llm._plan.cache.n_pages


def test_abandoned_generation_gives_its_pages_back(llm):
    pieces = llm.generate("And God", max_tokens=30, ignore_eos=True)
    next(pieces)
    pieces.close()
    assert len(llm._plan.cache._free) == llm._plan.cache.n_pages
    assert llm.timings.decode_tokens >= 1


def test_bad_requests(llm):
    for ids in ([4096], [-1]):
        with pytest.raises(RequestError, match="outside the vocabulary of 4096"):
            llm.logits(ids)
    with pytest.raises(RequestError, match="top_p is 2"):
        llm.generate("x", top_p=2)
    with pytest.raises(TypeError, match="temprature"):
        llm.generate("x", temprature=1)
    assert llm.logits([]).shape == (0, 4096)


def test_options(demo_gguf, tiny_gguf):
    path = demo_gguf("q4_0")
    with pytest.raises(RequestError, match="exclude each other"):
        powerinfer.open(path, exact=True, dense=True)
    with pytest.raises(TypeError, match="treads"):
        powerinfer.open(path, treads=2)
    for name, value in (
        ("context", -1),
        ("threads", 0),
        ("backend", "rocm"),
        ("gpu", -1),
        ("kv_type", "q8_0"),
        ("mode", "sparse"),
        ("chunk", 0),
        ("vram_budget", -1.0),
        ("sparse_threshold", float("nan")),
    ):
        with pytest.raises(RequestError, match=f"^{name} is {value!r}; it must be"):
            powerinfer.open(path, **{name: value})
    with pytest.raises(RequestError, match="no predictors"):
        powerinfer.open(path, mode="predicted")
    with pytest.raises(RequestError, match="can only run with --dense"):
        powerinfer.open(tiny_gguf("swiglu", "f16"), exact=True)
    with powerinfer.open(tiny_gguf("mha", "f16", True)) as llm:
        assert llm.mode == "predicted" and llm.context == 256
    with powerinfer.open(path, context=2000, backend="numpy") as llm:
        assert llm.context == 2000 and llm.mode == "exact" and llm.backend == "numpy"


def test_shares_are_measured(tiny_gguf):
    with powerinfer.open(tiny_gguf("mha", "f32", True), backend="cpu") as llm:
        list(llm.generate_tokens(tiny.token_ids(), max_tokens=4, ignore_eos=True))
        ours = llm.timings
    with powerinfer.open(tiny_gguf("mha", "f32", True), backend="numpy") as llm:
        list(llm.generate_tokens(tiny.token_ids(), max_tokens=4, ignore_eos=True))
        theirs = llm.timings
    assert 0.2 < ours.fired_share < ours.rows_share < 0.9
    # Sampling draws different tokens without a seed; the prompt of 48 dominates.
    assert abs(ours.rows_share - theirs.rows_share) < 0.05


def test_threads_share_an_engine(demo_gguf):
    """Generations that run at once, in threads of the caller's, do not disturb each other."""
    with powerinfer.open(demo_gguf("q4_0"), threads=2) as llm:
        prompts = ["And God said", "In the beginning", "The king", "A song of"]
        options = {"max_tokens": 30, "temperature": 0, "ignore_eos": True}

        def write(prompt):
            return "".join(llm.generate(prompt, **options))

        alone = [write(prompt) for prompt in prompts]
        with ThreadPoolExecutor(4) as pool:
            for _ in range(3):
                assert list(pool.map(write, prompts)) == alone
        # Interleaved in one thread, too.
        streams = [llm.generate(prompt, **options) for prompt in prompts]
        rounds = list(itertools.zip_longest(*streams, fillvalue=""))
        assert ["".join(r[i] for r in rounds) for i in range(len(prompts))] == alone


def test_closed_engine(demo_gguf):
    llm = powerinfer.open(demo_gguf("q4_0"))
    pieces = llm.generate("And", ignore_eos=True)
    next(pieces)
    llm.close()
    llm.close()
    for ask in (lambda: next(pieces), lambda: llm.logits([1]), lambda: list(llm.generate("x"))):
        with pytest.raises(RequestError, match="closed"):
            ask()


def test_numpy_ids(llm):
    ids = llm.tokenize("And God said")
    options = {"max_tokens": 5, "temperature": 0}
    expected = list(llm.generate(ids, **options))
    assert list(llm.generate(np.array(ids), **options)) == expected
    assert np.array_equal(llm.logits(np.array(ids)), llm.logits(ids))
    with pytest.raises(TypeError):
        llm.logits([1.5])


def test_the_first_stop_string_in_the_text_wins(llm):
    """Not the first one that is complete: the result must not depend on where tokens end."""
    options = {"max_tokens": 60, "temperature": 0, "ignore_eos": True}
    whole = "".join(llm.generate("And God said", **options))
    rng = np.random.default_rng(8)
    for _ in range(40):
        starts, sizes = rng.integers(0, len(whole) - 12, 2), rng.integers(1, 12, 2)
        stops = [whole[a : a + n] for a, n in zip(starts, sizes, strict=True)]
        text = "".join(llm.generate("And God said", stop=stops, **options))
        assert text == whole[: min(whole.index(s) for s in stops)], stops
        assert llm.finish_reason == "stop"


# -- files that are whole but wrong -----------------------------------------------------------


def rewrite(source, target, keys=None, drop=(), reshape=None):
    """Copy a model file with keys replaced (None: removed), tensors dropped or cut short."""
    file = GGUFFile(source)
    metadata = file.metadata | (keys or {})
    with GGUFWriter(target, metadata["general.architecture"].value) as writer:
        for key, value in metadata.items():
            if key != "general.architecture" and value is not None:
                writer.add(key, value)
        kept = {n: t for n, t in file.tensors.items() if n not in drop}
        rows = {n: (reshape or {}).get(n, t.shape[0]) for n, t in kept.items()}
        for name, t in kept.items():
            writer.declare(name, t.type, (rows[name], *t.shape[1:]))
        for name, t in kept.items():
            data = t.data if len(t.shape) == 2 else t.data.reshape(t.shape[0], -1)
            writer.write(name, data[: rows[name]])
    return target


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"drop": ["blk.1.ffn_up.weight"]}, "lacks the tensor blk.1.ffn_up.weight"),
        ({"drop": ["token_embd.weight"]}, "no tensor token_embd.weight"),
        ({"drop": ["blk.0.ffn_down_t.weight"]}, "lacks the tensor blk.0.ffn_down.weight"),
        ({"drop": ["blk.0.fc2.weight"]}, "lacks the tensor blk.0.fc2.weight"),
        ({"reshape": {"blk.0.ffn_up.weight": 95}}, r"ffn_up.weight is \[95, 64\], not \[96, 64\]"),
        ({"reshape": {"blk.0.fc1.weight": 32}}, r"fc2.weight is \[96, 64\], not \[96, 32\]"),
        ({"reshape": {"output_norm.weight": 32}}, r"output_norm.weight is \[32\], not \[64\]"),
        ({"reshape": {"token_embd.weight": 300}}, r"output.weight is \[384, 64\], not \[300, 64\]"),
        ({"keys": {"general.architecture": Value(ValueType.STRING, "bert")}}, "'bert'; supported"),
        ({"keys": {"llama.block_count": None}}, "lacks the key 'llama.block_count'"),
        ({"keys": {"llama.block_count": Value(ValueType.UINT32, 0)}}, "block_count' is 0"),
        ({"keys": {"llama.block_count": Value(ValueType.UINT32, 3)}}, "lacks the tensor blk.2"),
        ({"keys": {"llama.embedding_length": Value(ValueType.FLOAT32, 64.0)}}, "not an integer"),
        ({"keys": {"llama.attention.head_count_kv": Value(ValueType.UINT32, 3)}}, "do not share"),
        ({"keys": {"llama.rope.dimension_count": Value(ValueType.UINT32, 3)}}, "make no sense"),
        ({"keys": {"llama.rope.dimension_count": Value(ValueType.UINT32, 18)}}, "is 18, outside"),
        ({"keys": {"llama.rope.freq_base": Value(ValueType.FLOAT32, float("nan"))}}, "is nan"),
        ({"keys": {"llama.rope.scaling.type": Value(ValueType.STRING, "yarn")}}, "scaling 'yarn'"),
        ({"keys": {"powerinfer.ffn_activation": Value(ValueType.STRING, "x")}}, "activation 'x'"),
        ({"keys": {"powerinfer.predictor_input": Value(ValueType.STRING, "x")}}, "_input 'x'"),
        ({"keys": {"powerinfer.neuron_order": Value(ValueType.STRING, "x")}}, "_order 'x'"),
        ({"keys": {"tokenizer.ggml.model": None}}, "has no tokenizer"),
    ],
)
def test_wrong_models(change, message, tiny_gguf, tmp_path):
    path = rewrite(tiny_gguf("mha", "f16", True), tmp_path / "x.gguf", **change)
    with pytest.raises(PowerInferError, match=message) as caught:
        powerinfer.open(path)
    assert isinstance(caught.value, FileFormatError | ModelError)


def test_layer_thresholds(tiny_gguf, tmp_path):
    source = tiny_gguf("mha", "f32", True)

    def thresholds(*values):
        data = np.array(values, np.float32)
        return {"powerinfer.layer_thresholds": Value(ValueType.ARRAY, data, ValueType.FLOAT32)}

    with pytest.raises(ModelError, match="has 3 layer thresholds, 2 layers"):
        powerinfer.open(rewrite(source, tmp_path / "x.gguf", thresholds(1, 2, 3)))
    with powerinfer.open(rewrite(source, tmp_path / "x.gguf", thresholds(-1e9, 1e9))) as llm:
        llm.logits(tiny.token_ids())
        counts = llm._plan.buffers.counts
        assert counts[0, 1] == 96 * counts[0, 0] and counts[1, 1] == 0


def test_not_a_model(tmp_path):
    path = write(tmp_path / "x.gguf")
    with pytest.raises(FileFormatError, match=r"lacks the key 'llama\.embedding_length'"):
        powerinfer.open(path)


# -- pages and steps --------------------------------------------------------------------------


def test_pages(tiny_gguf):
    config = model_config(GGUFFile(tiny_gguf("mha", "f16")))
    cache = KVCache(config, 100, np.float16)
    assert cache.k.shape == (2, 4, 4, 32, 16)
    a, b = Sequence(), Sequence()
    cache.extend([(a, 33)])
    cache.extend([(b, 32)])
    assert len(a.pages) == 2 and len(b.pages) == 1 and not set(a.pages) & set(b.pages)
    for more in ([(b, 33)], [(a, 32), (b, 1)]):  # no page for one; for both
        with pytest.raises(RequestError, match="KV cache is full"):
            cache.extend(more)
        assert (a.length, b.length) == (33, 32) and len(a.pages) == 2
    cache.release(a)
    cache.extend([(b, 90)])
    assert len(b.pages) == 4 and a == Sequence()


def test_feeding_is_checked(tiny_gguf):
    """Before anything is changed."""
    with powerinfer.open(tiny_gguf("mha", "f16"), context=33, sequences=2) as llm:
        a, b, counts = Sequence(), Sequence(), llm.no_counts()
        llm.feed([(a, [3] * 32)], [], counts)
        llm.feed([(a, [3])], [0], counts)
        with pytest.raises(RequestError, match="context of 33 tokens is full"):
            llm.feed([(b, [3] * 5), (a, [3])], [0], counts)
        assert (a.length, b.length, counts[0, 0]) == (33, 0, 33)


def test_a_text_that_is_given_up(llm):
    pieces = llm.generate("And", max_tokens=20, temperature=0)
    next(pieces)
    pieces.close()
    assert llm.finish_reason == "cancelled"


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_fork_while_a_thread_is_generating(tiny_gguf):
    """Whatever that thread holds in the parent, the child can use the engine."""
    ids = tiny.token_ids()
    with powerinfer.open(tiny_gguf("mha", "f16"), threads=2, sequences=8) as llm:
        right, is_over = llm.logits(ids), threading.Event()

        def generate():
            while not is_over.is_set():
                list(llm.generate_tokens(ids[:8], max_tokens=20, ignore_eos=True))

        thread = threading.Thread(target=generate)
        thread.start()
        try:
            for _ in range(8):
                child = os.fork()
                if child == 0:
                    signal.alarm(20)
                    os._exit(0 if np.array_equal(llm.logits(ids), right) else 1)
                assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
        finally:
            is_over.set()
            thread.join()


def test_step_takes_several_sequences():
    step = Step(8, n_seq_max=2, context=64, n_out_max=4)
    a, b = Sequence([3], 2), Sequence([1, 0], 34)
    step.fill([(a, [7, 8]), (b, [9])])
    step.want([1, 2])
    assert step.n_tok == 3 and step.n_out == 2
    assert step.tokens[:3].tolist() == [7, 8, 9]
    assert step.positions[:3].tolist() == [0, 1, 33]
    assert step.rows[:3].tolist() == [0, 0, 1]
    assert step.pages.tolist() == [[3, 0], [1, 0]]


def test_engine_is_what_open_returns(demo_gguf):
    with powerinfer.open(str(demo_gguf("q4_0"))) as llm:
        assert isinstance(llm, Engine)


def test_memory_of_our_own_and_locked(tiny_gguf, monkeypatch):
    path = tiny_gguf("mha", "q8_0")
    ids = tiny.token_ids()
    with powerinfer.open(path) as mapped:
        wanted = mapped.logits(ids)
    for options in ({"mmap": False}, {"mlock": True}, {"mmap": False, "mlock": True}):
        with powerinfer.open(path, **options) as llm:
            assert np.array_equal(llm.logits(ids), wanted)


def test_memory_that_may_not_be_locked(tiny_gguf, monkeypatch):
    monkeypatch.setattr("ctypes.CDLL", lambda *_, **__: SimpleNamespace(mlock=lambda *_: -1))
    with pytest.raises(OSError, match=r"does not allow to lock .* MiB"):
        powerinfer.open(tiny_gguf("mha", "q8_0"), mlock=True, backend="numpy")
