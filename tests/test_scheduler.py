"""Several texts written at once."""

import itertools

import numpy as np
import pytest
from powerinfer.runtime.errors import ModelError, RequestError
from powerinfer.runtime.scheduler import Scheduler
from powerinfer.runtime.text import TextStream
from powerinfer.tools.demo_model import demo_folder, demo_model

import powerinfer

PROMPTS = [
    "And God said",
    "In the beginning was the word, and the word was with all of them that were in the house, "
    "and they went out, and came again, and he spoke unto them in the city of the great king",
    "The king",
    "A song of",
    "x",
]
GREEDY = {"temperature": 0, "ignore_eos": True}


@pytest.fixture
def llm():
    """An engine for three texts in 12 pages; whatever is done with it, it ends with all free."""
    with powerinfer.open(
        demo_model(), threads=2, backend="cpu", adapt=False, sequences=3, context=128, chunk=16
    ) as engine:
        yield engine
        assert n_free(engine) == 12


def n_free(engine):
    return len(engine._plan.cache._free)


@pytest.fixture
def script(llm):
    """Tokens of a text, with BOS."""
    return llm.tokenize((demo_folder() / "heldout.txt").read_text("utf-8")[:2000])


@pytest.fixture
def passes(llm, script, monkeypatch):
    """Make the engine write `script`; return the list of what its passes were given.

    Each is [(first position, number of tokens)] of its chunks. The real pass runs, too. What is
    asked of the scheduler's decisions must not hang on which token a model finds likely.
    """
    seen, real = [], llm.feed

    def feed(chunks, outputs, counts):
        seen.append([(sequence.length, len(ids)) for sequence, ids in chunks])
        for sequence, ids in chunks:
            assert list(ids) == script[sequence.length : sequence.length + len(ids)]
        logits = real(chunks, outputs, counts)
        ends = itertools.accumulate(len(ids) for _, ids in chunks)
        after = {end - 1: sequence.length for end, (sequence, _) in zip(ends, chunks, strict=True)}
        logits[:] = -10
        for row, output in zip(logits, outputs, strict=True):
            row[script[after[output]]] = 10
        return logits

    monkeypatch.setattr(llm, "feed", feed)
    return seen


def run(scheduler):
    """Step until all is written; return the texts by request."""
    texts = {}
    while not scheduler.is_idle:
        for request, piece in scheduler.step():
            texts[request] = texts.get(request, "") + piece
    return texts


def join(pieces, n):
    texts = [""] * n
    for i, piece in pieces:
        texts[i] += piece
    return texts


# -- what the model writes ------------------------------------------------------------------------


@pytest.mark.parametrize(("backend", "n_tokens", "n_texts"), [("cpu", 24, 5), ("numpy", 3, 3)])
def test_texts_are_those_of_each_alone(backend, n_tokens, n_texts):
    """More prompts than sequences, one of them longer than a pass.

    A token alone, in a prompt and in a batch is summed in different orders, so near-ties may fall
    differently: each token must be as likely as the likeliest, but for such a difference, after
    the tokens before it, and most texts must be the very same.
    """
    options = {**GREEDY, "max_tokens": n_tokens}
    with powerinfer.open(
        demo_model(), threads=2, backend=backend, adapt=False, sequences=2, context=96, chunk=16
    ) as llm:
        prompts = PROMPTS[:n_texts]
        scheduler = Scheduler(llm)
        requests = [scheduler.submit(prompt, **options) for prompt in prompts]
        texts = run(scheduler)
        assert [len(r.tokens) for r in requests] == [n_tokens] * n_texts
        assert {r.finish_reason for r in requests} == {"length"}
        assert scheduler.counts[0, 0] >= n_texts * n_tokens
        for request, prompt in zip(requests, prompts, strict=True):
            ids = llm.tokenize(prompt)
            assert llm.detokenize(ids + request.tokens) == prompt + texts[request]
            logits = llm.logits(ids + request.tokens)[len(ids) - 1 : -1]
            taken = logits[np.arange(n_tokens), request.tokens]
            assert (logits.max(axis=-1) - taken).max() < 0.1
        alone = ["".join(llm.generate(prompt, **options)) for prompt in prompts]
        same = sum(texts[r] == text for r, text in zip(requests, alone, strict=True))
        assert same > n_texts / 2
        assert n_free(llm) == llm._plan.cache.n_pages


def test_generate_many(llm):
    options = {"max_tokens": 12, "temperature": 1.0, "ignore_eos": True, "seed": 5}
    texts = join(llm.generate_many(PROMPTS, **options), len(PROMPTS))
    assert all(texts) and join(llm.generate_many(PROMPTS, **options), len(PROMPTS)) == texts
    # Prompt i draws with seed + i, and not as its neighbour does.
    twins = join(llm.generate_many([PROMPTS[0]] * 3, **options), 3)
    assert len(set(twins)) == 3
    scheduler = Scheduler(llm)
    for i in range(3):
        scheduler.submit(PROMPTS[0], **{**options, "seed": 5 + i})
    assert list(run(scheduler).values()) == twins
    assert list(llm.generate_many([])) == []


def test_neighbours_do_not_matter(llm):
    """On the CPU not to the bit, as long as a text is never alone in a pass."""
    options = {"max_tokens": 16, "temperature": 0.9, "ignore_eos": True}

    def write(prompts):
        scheduler = Scheduler(llm)
        first = scheduler.submit(PROMPTS[0], seed=3, **options)
        for prompt in prompts:
            scheduler.submit(prompt, seed=4, **(options | {"max_tokens": 40}))
        return run(scheduler)[first]

    assert len({write(mates) for mates in (PROMPTS[1:3], PROMPTS[3:], PROMPTS[2:4])}) == 1


# -- who runs when --------------------------------------------------------------------------------


def test_prompts_fill_the_room_that_decoding_leaves(llm, script, passes):
    scheduler = Scheduler(llm)
    first = scheduler.submit(script[:10], max_tokens=8)
    scheduler.step()
    assert first.tokens == script[10:11] and passes == [[(0, 10)]]
    # A prompt of three passes and one that comes after it: the first text goes on all the time.
    long, short = scheduler.submit(script[:40], max_tokens=3), scheduler.submit(script[:7])
    late = scheduler.submit(script[:20], max_tokens=1)
    for n in range(2, 4):
        scheduler.step()
        assert len(first.tokens) == n and not long.tokens
    scheduler.step()
    assert len(first.tokens) == 4 and len(long.tokens) == 1 and not short.tokens
    scheduler.step()
    assert passes[1:] == [
        [(10, 1), (0, 15)],
        [(11, 1), (15, 15)],
        [(12, 1), (30, 10), (0, 5)],
        [(13, 1), (40, 1), (5, 2)],
    ]
    assert short.tokens == script[7:8] and not late.tokens
    scheduler.step()
    assert long.finish_reason == "length" and len(passes[-1]) == 3
    scheduler.step()  # there is room in the cache for the last one now
    assert passes[-1] == [(15, 1), (8, 1), (0, 14)]
    run(scheduler)
    assert [r.index for r in (first, long, short, late)] == [0, 1, 2, 3]
    assert late.tokens == script[20:21] and late.finish_reason == "length"
    assert short.finish_reason == "context" and len(short.tokens) == 128 + 1 - 7
    assert all(sum(n for _, n in chunks) <= 16 and len(chunks) <= 3 for chunks in passes)


def test_passes_of_one_token():
    """The chunk is never smaller than the texts that run: all of them write in each pass."""
    with powerinfer.open(demo_model(), threads=1, sequences=2, context=40, chunk=1) as llm:
        scheduler = Scheduler(llm)
        requests = [scheduler.submit(p, max_tokens=5, **GREEDY) for p in PROMPTS if len(p) < 20]
        run(scheduler)
        assert [len(r.tokens) for r in requests] == [5] * 4


@pytest.mark.parametrize("seed", range(3))
def test_random_traffic(llm, script, passes, seed):
    rng = np.random.default_rng(seed)
    scheduler, requests, texts = Scheduler(llm), [], {}
    for _ in range(60):
        if rng.random() < 0.3:
            n, limit = int(rng.integers(1, 60)), int(rng.integers(0, 12))
            requests.append((n, limit, scheduler.submit(script[:n], limit)))
        if requests and rng.random() < 0.1:
            scheduler.cancel(rng.choice([r for *_, r in requests[-4:]]))
        before = [len(r.tokens) for _, _, r in requests]
        for request, piece in scheduler.step():
            texts[request] = texts.get(request, "") + piece
        for (_, _, request), had in zip(requests, before, strict=True):
            assert 0 <= len(request.tokens) - had <= 1
            if had and not request.finish_reason:
                assert len(request.tokens) == had + 1
    for request, piece in run(scheduler).items():
        texts[request] = texts.get(request, "") + piece
    assert {r.finish_reason for _, _, r in requests} == {"length", "cancelled"}
    for n, limit, request in requests:
        assert request.tokens == script[n : n + len(request.tokens)]
        if request.finish_reason == "length":
            whole, prompt = (llm.detokenize(script[:k]) for k in (n + limit, n))
            assert len(request.tokens) == limit and prompt + texts[request] == whole


# -- how texts end --------------------------------------------------------------------------------


def test_ends(llm, script, passes):
    script[30] = llm.tokenizer.eos
    scheduler = Scheduler(llm)
    nothing = scheduler.submit(script[:3], max_tokens=0)
    full = scheduler.submit(script[:128])
    ends, goes_on = scheduler.submit(script[:20]), scheduler.submit(script[:20], 20, (), True)
    # An end beside the limit: whichever comes first.
    both = scheduler.submit(script[:20], max_tokens=10)
    assert not scheduler.is_idle
    texts = run(scheduler)
    assert scheduler.is_idle and scheduler.step() == []
    assert set(texts) == {nothing, full, ends, goes_on, both}  # even those without any text
    assert (nothing.finish_reason, nothing.tokens, texts[nothing]) == ("length", [], "")
    # The last token is chosen but not fed: prompt and continuation are one more than fits.
    assert full.finish_reason == "context" and full.tokens == script[128:129]
    assert ends.finish_reason == "eos" and ends.tokens == script[20:30]
    assert goes_on.finish_reason == "length" and goes_on.tokens == script[20:40]
    assert both.finish_reason == "length" and both.tokens == script[20:30]
    with pytest.raises(RequestError, match="prompt has 129 tokens, the context 128"):
        scheduler.submit(script[:129])


def test_stop_strings(llm, script, passes):
    whole = llm.detokenize(script[:60])[len(llm.detokenize(script[:20])) :]
    scheduler, wanted = Scheduler(llm), {}
    for start in range(3, 40, 4):
        stop = whole[start : start + 9]  # longer than a token
        at = whole.index(stop)
        wanted[scheduler.submit(script[:20], 40, stop)] = whole[:at], "stop"
        # In two ways at once; and held back to the end, then given out.
        wanted[scheduler.submit(script[:20], 40, ["\0", stop, whole[at + 2 : at + 4]])] = (
            whole[: min(at, whole.index(whole[at + 2 : at + 4]))],
            "stop",
        )
    wanted[scheduler.submit(script[:20], 40, ["", whole[-5:] + "\0"])] = whole, "length"
    # The limit ends the text with the stop string just complete.
    wanted[scheduler.submit(script[:20], 40, whole[-5:])] = whole[: whole.index(whole[-5:])], "stop"
    texts = run(scheduler)
    assert {r: (texts[r], r.finish_reason) for r in wanted} == wanted


def test_text_streams(llm):
    """However tokens cut characters and stop strings."""
    text = "Ein Käse für 日本, und noch ein Käse"
    ids = llm.tokenize(text)
    for stop, wanted in [
        ((), text),
        ("Käse", "Ein "),
        (["noch", "本, u"], "Ein Käse für 日"),
        ("ein Käse!", text),
        (["ein Käs", "n Käse"], "Ein Käse für 日本, und noch "[:2]),
    ]:
        stream, pieces = TextStream(llm.tokenizer, ids[:1], stop), []
        for token in ids[1:]:
            pieces.append(stream.push(token))
            if stream.is_stopped:
                break
        assert "".join(pieces) + stream.finish() == wanted
        assert stream.is_stopped == (wanted != text) and "\ufffd" not in "".join(pieces)
    stream = TextStream(llm.tokenizer, ids[:1], ())
    cut = llm.tokenize("日")[-3:-1]
    assert [stream.push(token) for token in cut] == ["", ""] and stream.finish() == "\ufffd"


def test_cancel(llm, script, passes):
    scheduler = Scheduler(llm)
    writes, reads, other, waits = (scheduler.submit(script[:n], 20) for n in (9, 100, 5, 8))
    scheduler.step()
    scheduler.step()
    assert len(writes.tokens) == 2 and n_free(llm) == 12 - 2
    scheduler.cancel(writes)
    assert writes.finish_reason == "cancelled" and n_free(llm) == 12 - 1
    scheduler.cancel(waits)
    scheduler.cancel(reads)
    assert n_free(llm) == 12 and writes.tokens == script[9:11]
    texts = run(scheduler)
    assert list(texts) == [other] and other.finish_reason == "length"
    scheduler.cancel(other)
    assert other.finish_reason == "length" and scheduler.is_idle


# -- what goes wrong ------------------------------------------------------------------------------


def test_a_pass_that_fails(llm, script, monkeypatch):
    scheduler = Scheduler(llm)
    requests = [scheduler.submit(script[:40], 20) for _ in range(5)]
    for _ in range(4):
        scheduler.step()
    real = llm.feed

    def fail(*args):
        real(*args)
        raise MemoryError("none left")

    with monkeypatch.context() as patch:
        patch.setattr(llm, "feed", fail)
        assert n_free(llm) < 12
        with pytest.raises(MemoryError, match="none left"):
            scheduler.step()
    assert n_free(llm) == 12
    assert [r.finish_reason for r in requests] == ["cancelled"] * 3 + [""] * 2
    assert isinstance(requests[0].error, MemoryError)
    run(scheduler)  # those that had not begun are not hurt
    assert all(r.finish_reason and r.error is None for r in requests[3:])


def test_a_text_that_fails(llm):
    """Options that leave it no token are its own trouble, and nobody else's."""
    scheduler = Scheduler(llm)
    banned = dict.fromkeys(range(4096), -np.inf)
    good = scheduler.submit("And God", max_tokens=5, **GREEDY)
    bad = scheduler.submit("And God", logit_bias=banned)
    texts = run(scheduler)
    assert len(good.tokens) == 5 and good.finish_reason == "length" and good.error is None
    assert bad.finish_reason == "cancelled" and texts[bad] == "" and not bad.tokens
    assert isinstance(bad.error, RequestError)
    with pytest.raises(RequestError, match="leave no token"):
        list(llm.generate_many(PROMPTS, logit_bias=banned))


def test_damaged_model(llm, monkeypatch):
    real = llm.feed
    monkeypatch.setattr(llm, "feed", lambda *args: real(*args) * np.nan)
    with pytest.raises(ModelError, match="not finite"):
        list(llm.generate_many(PROMPTS))


def test_generate_many_ends_early(llm):
    pieces = llm.generate_many(PROMPTS, ignore_eos=True)
    for _ in range(10):
        next(pieces)
    assert n_free(llm) < 12
    pieces.close()
    assert n_free(llm) == 12
    llm.generate_many(PROMPTS)  # never begun


def test_bad_requests(llm):
    """All of them are found before anything runs."""
    scheduler = Scheduler(llm)
    for prompt, match in (
        ([], "prompt is empty"),
        ([4096], "outside the vocabulary"),
        ([1] * 129, "prompt has 129 tokens"),
    ):
        with pytest.raises(RequestError, match=match):
            scheduler.submit(prompt)
        with pytest.raises(RequestError, match=match):
            llm.generate_many(["x", prompt])
    with pytest.raises(RequestError, match="top_p is 2"):
        scheduler.submit("x", top_p=2)
    with pytest.raises(TypeError, match="temprature"):
        llm.generate_many(["x"], temprature=1)
    with pytest.raises(RequestError, match="list of prompts"):
        llm.generate_many("In the beginning")
    assert scheduler.is_idle
    # The empty text begins at BOS, as in generate().
    scheduler.submit("", max_tokens=6, **GREEDY)
    [text] = run(scheduler).values()
    assert text and not text.startswith(" ")


def test_closed_engine():
    llm = powerinfer.open(demo_model(), threads=1, sequences=2)
    pieces = llm.generate_many(PROMPTS, ignore_eos=True)
    next(pieces)
    llm.close()
    with pytest.raises(RequestError, match="closed"):
        list(pieces)
    assert n_free(llm) == llm._plan.cache.n_pages
