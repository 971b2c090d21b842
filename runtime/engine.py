"""The engine: an open model that reads prompts and writes text."""

from __future__ import annotations

import contextlib
import operator
import os
import time
from collections.abc import Callable, Iterator
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass
from typing import Any

import numpy as np

from .adapt import Adapter
from .backend import Backend, Plan, Residency
from .cache import PAGE, KVCache, Sequence
from .config import SPARSE_ACTIVATIONS, Mode, ModelConfig, RunOptions
from .errors import ModelError, RequestError
from .formats import F32Array, GGMLType
from .locks import Lock
from .model import Watcher, forward
from .reference import Reference
from .sampling import Sampler, SamplingOptions
from .scheduler import Request, Scheduler
from .step import COUNTS, Buffers, Step, rope_table
from .text import Continuation, TextStream
from .tokenizer import load_tokenizer
from .traffic import Traffic, traffic
from .weights import Model, Weights, load_model

DEFAULT_CONTEXT = 4096
N_OUT = 32  # tokens whose logits are computed at once
Counts = np.ndarray[tuple[int, int], np.dtype[np.int64]]  # [n_layer, COUNTS]


@dataclass
class Timings:
    """What the last generate() took; times in seconds."""

    load_s: float = 0.0
    prompt_tokens: int = 0
    prompt_s: float = 0.0
    decode_tokens: int = 0
    decode_s: float = 0.0
    rows_share: float = 0.0  # of the decider's rows that were computed, mean over tokens, layers
    fired_share: float = 0.0  # of the neurons that fired
    traffic: Traffic | None = None  # of a token, at decode


class Engine:
    """An open model: a file, or what load_model made of one.

    `notify` is told, in a few words, of anything that takes long. Errors: OSError and
    FileFormatError for the file, ModelError for a model that cannot run, RequestError for
    options that do not fit it.
    """

    def __init__(
        self,
        model: str | os.PathLike[str] | Model,
        options: RunOptions | None = None,
        notify: Callable[[str], Any] = lambda _: None,
    ) -> None:
        started = time.perf_counter()
        self.options = options or RunOptions()
        if not isinstance(model, Model):
            model = load_model(model, load=not self.options.mmap, lock=self.options.mlock)
        self.file, self.config, self.weights = model.file, model.config, model.weights
        self.tokenizer = load_tokenizer(self.file)
        if self.tokenizer.n_vocab != self.config.n_vocab:
            raise ModelError(
                f"{self.file.path}: {self.tokenizer.n_vocab} tokens in the vocabulary, "
                f"{self.config.n_vocab} in the embedding"
            )
        self.context = choose_context(self.config, self.options)
        self.mode = choose_mode(model, self.options)
        self._plan = self._make_plan()
        self._ops = _make_backend(model, self._plan, self.options, notify)
        self.backend = self._ops.name
        plan, ops = self._plan, self._ops  # not self: an engine that nobody has any more is gone
        self._decode = ops.capture(lambda: forward(plan, ops))
        # Step and buffers serve one forward pass at a time, whoever asks for it.
        self._lock = Lock()
        self._is_closed = False
        self.watcher: Watcher | None = None
        self.timings = Timings(load_s=time.perf_counter() - started)
        self.finish_reason = ""  # "eos", "stop", "length", "context" or "cancelled"

    def _make_plan(self) -> Plan:
        c = self.config
        n_seq, pages = self.options.sequences, -(-self.context // PAGE)  # whole ones for each
        chunk = max(n_seq, min(self.options.chunk, self.context))
        f32 = has_f32_cache(self.weights, self.options)
        factors = self.weights.rope_factors
        override = self.options.sparse_threshold
        return Plan(
            config=c,
            weights=self.weights,
            cache=KVCache(c, n_seq * pages * PAGE, np.float32 if f32 else np.float16),
            step=Step(
                chunk,
                n_seq_max=n_seq,
                context=self.context,
                n_out_max=N_OUT,
                thresholds=[
                    c.threshold(il) if override is None else override for il in range(c.n_layer)
                ],
            ),
            buffers=Buffers(c, chunk, N_OUT),
            rope=rope_table(c, self.context, None if factors is None else factors.numpy()),
            mode=self.mode,
        )

    def close(self) -> None:
        """Stop the threads of this engine; whatever is asked of it then is a RequestError."""
        with self._lock:
            self._is_closed = True
            self._ops.close()

    def __enter__(self) -> Engine:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # -- text ---------------------------------------------------------------------------------

    def tokenize(self, text: str, add_bos: bool | None = None) -> list[int]:
        """Return the token ids of `text`, with BOS where the model wants it."""
        return self.tokenizer.encode(text, add_bos)

    def detokenize(self, ids: SequenceOf[int]) -> str:
        """Return the text of `ids`."""
        return self.tokenizer.decode(ids)

    # -- running ------------------------------------------------------------------------------

    @property
    def chunk(self) -> int:
        """Most tokens in one forward pass."""
        return len(self._plan.step.tokens)

    def adapter(self) -> Adapter | None:
        """Return what moves the thresholds of a new sequence; None where nothing is to move.

        Only thresholds that were calibrated for a recall are moved: a file's own, unless the
        options replace them.
        """
        o = self.options
        if not o.adapt or self.mode != "predicted" or o.sparse_threshold is not None:
            return None
        if self.config.target_recall is None:
            return None
        return Adapter(self.config, self.weights, self._plan.step.file_thresholds)

    def feed(
        self,
        chunks: SequenceOf[tuple[Sequence, SequenceOf[int]]],
        outputs: SequenceOf[int],
        counts: Counts,
        adapter: Adapter | None = None,
        residency: Residency | None = None,
    ) -> F32Array:
        """Run new tokens of some sequences (at most `chunk` tokens) through the model.

        Returns the logits [n_out, n_vocab] of the tokens in `outputs`, counted over all chunks;
        adds what the FFNs computed to `counts`. `adapter`, `residency`: of the first sequence.
        RequestError, and nothing has changed, where a sequence would be longer than the context, or
        all of them than the cache.
        """
        plan = self._plan
        for sequence, ids in chunks:
            if sequence.length + len(ids) > self.context:
                raise RequestError(f"the context of {self.context} tokens is full")
        out = np.empty((len(outputs), self.config.n_vocab), np.float32)
        with self._lock:
            if self._is_closed:
                raise RequestError("the engine is closed")
            plan.cache.extend([(sequence, len(ids)) for sequence, ids in chunks])
            plan.step.fill(chunks)
            plan.buffers.counts[:] = 0
            watchers: list[Watcher] = [] if self.watcher is None else [self.watcher]
            sequence, ids = chunks[0]
            if adapter is not None and adapter.prepare(sequence.length - len(ids), len(ids)):
                watchers.append(adapter)
            self._ops.use(residency)
            if plan.step.n_tok == 1 and not watchers:
                self._decode()
            else:
                forward(plan, self._ops, watchers)
            for i in range(0, len(outputs), N_OUT):
                part = outputs[i : i + N_OUT]
                plan.step.want(part)
                self._ops.head()
                self._ops.finish()
                out[i : i + len(part)] = plan.buffers.logits[: len(part)]
            self._ops.finish()
            counts += plan.buffers.counts
        return out

    def bound(self) -> float | None:
        """Return the tokens per second of the last generate() if nothing took time but reading.

        Reads the model's bytes (at most 512 MiB) a few times to see how fast that goes. None where
        nothing was written, or the backend does not know.
        """
        read = self.timings.traffic
        tokens = self.timings.prompt_tokens + self.timings.decode_tokens / 2
        return None if read is None else self.bound_of(read.total, tokens)

    def cache_bytes(self, length: float) -> float:
        """Return the bytes of K and V that a token reads whose text has `length` tokens."""
        return self._plan.cache.bytes_of(length)

    def bound_of(self, nbytes: float, tokens: float) -> float | None:
        """Return bound() for tokens that read so many bytes, with so many tokens in the cache."""
        return self._ops.bound(self.file.data, nbytes, tokens) or None

    def no_counts(self) -> Counts:
        """Return zeros for feed() to add to."""
        return np.zeros((self.config.n_layer, len(COUNTS)), np.int64)

    def _begin(self, adapter: Adapter | None) -> Sequence:
        return Sequence(thresholds=None if adapter is None else adapter.thresholds)

    def release(self, sequence: Sequence) -> None:
        """Give the memory of a sequence back."""
        with self._lock:
            self._plan.cache.release(sequence)

    def _check(self, tokens: SequenceOf[int]) -> list[int]:
        """Return token ids as plain integers that the model knows, and no more than fit."""
        ids = [operator.index(token) for token in tokens]
        if len(ids) > self.context:
            raise RequestError(
                f"the prompt has {len(ids)} tokens, the context {self.context}; "
                "raise it with -c / context= or shorten the prompt"
            )
        for token in ids:
            if not 0 <= token < self.config.n_vocab:
                raise RequestError(
                    f"token {token} is outside the vocabulary of {self.config.n_vocab}"
                )
        return ids

    def logits(self, ids: SequenceOf[int]) -> F32Array:
        """Return the logits after every token: float32 [len(ids), n_vocab].

        RequestError for ids outside the vocabulary or more of them than the context holds.
        """
        ids = self._check(ids)
        out = np.empty((len(ids), self.config.n_vocab), np.float32)
        self.read(ids, out)
        return out

    @contextlib.contextmanager
    def watched(self, watcher: Watcher | None) -> Iterator[None]:
        """Let a watcher see every FFN while the block runs."""
        self.watcher = watcher
        try:
            yield
        finally:
            self.watcher = None

    def read(
        self,
        ids: SequenceOf[int],
        logits: F32Array | None = None,
        adapter: Adapter | None = None,
    ) -> Counts:
        """Run a text through the model and return what its FFNs computed.

        int64 [n_layer, COUNTS], summed over the tokens. The logits of every token go to `logits`
        [len(ids), n_vocab] where given. With an `adapter`, token by token, as if they were
        generated. RequestError as in logits().
        """
        ids, counts = self._check(ids), self.no_counts()
        sequence, chunk = self._begin(adapter), self.chunk if adapter is None else 1
        try:
            for start in range(0, len(ids), chunk):
                part = ids[start : start + chunk]
                wanted = range(len(part) if logits is not None else 0)
                out = self.feed([(sequence, part)], wanted, counts, adapter)
                if logits is not None:
                    logits[start : start + len(part)] = out
                if adapter is not None:
                    adapter.settle()
        finally:
            self.release(sequence)
        return counts

    def continuation(
        self,
        prompt: str | SequenceOf[int],
        max_tokens: int = -1,
        ignore_eos: bool = False,
        **sampling: Any,
    ) -> Continuation:
        """Return what chooses the tokens after `prompt`: options and errors as in generate()."""
        if isinstance(prompt, str):
            # Something to start from, whatever the model wants.
            prompt = self.tokenize(prompt) if prompt else [self.tokenizer.bos]
        ids = self._check(prompt)
        if not ids:
            raise RequestError("the prompt is empty: there is nothing to start from")
        sampler = Sampler(SamplingOptions(**sampling), self.config.n_vocab)
        return Continuation(ids, sampler, self.tokenizer, self.context, max_tokens, ignore_eos)

    def generate_tokens(
        self,
        prompt: SequenceOf[int],
        max_tokens: int = -1,
        ignore_eos: bool = False,
        **sampling: Any,
    ) -> Iterator[int]:
        """Yield the tokens that follow `prompt`; `sampling` are fields of SamplingOptions.

        Ends after `max_tokens` (-1: no limit), at an end token, or when the context is full;
        `finish_reason` says which. RequestError when the prompt is empty or too long.
        """
        return self._generate(self.continuation(prompt, max_tokens, ignore_eos, **sampling))

    def _generate(self, text: Continuation) -> Iterator[int]:
        t = Timings(load_s=self.timings.load_s)
        counts, decode_counts = self.no_counts(), self.no_counts()
        adapter = self.adapter()
        residency = self._ops.residency() if self.options.adapt else None
        followers = [x for x in (adapter, residency) if x is not None]
        sequence, prompt = self._begin(adapter), text.history.copy()
        try:
            for start in range(0, len(prompt), self.chunk):
                part = prompt[start : start + self.chunk]
                is_last = start + self.chunk >= len(prompt) and not text.finish_reason
                clock = time.perf_counter()
                outputs = [len(part) - 1] if is_last else []
                logits = self.feed([(sequence, part)], outputs, counts, adapter, residency)
                t.prompt_tokens += len(part)
                t.prompt_s += time.perf_counter() - clock
            for follower in followers:
                follower.settle()  # not before: how the prompt was cut must not matter
            while not text.finish_reason:
                token = text.choose(logits[0])
                if token is None:
                    return
                t.decode_tokens += 1
                yield token
                if text.finish_reason:
                    return
                clock = time.perf_counter()
                logits = self.feed([(sequence, [token])], [0], decode_counts, adapter, residency)
                for follower in followers:
                    follower.settle()
                t.decode_s += time.perf_counter() - clock
        finally:
            self.release(sequence)
            tokens, rows, _, fired = (counts + decode_counts).sum(axis=0).tolist()
            if tokens:
                t.rows_share = rows / tokens / self.config.n_ff
                t.fired_share = fired / tokens / self.config.n_ff
            if decode_counts.any():
                t.traffic = traffic(self.weights, self.mode, decode_counts)
            self.timings, self.finish_reason = t, text.finish_reason or "cancelled"

    def generate(
        self,
        prompt: str | SequenceOf[int],
        max_tokens: int = -1,
        stop: str | SequenceOf[str] = (),
        ignore_eos: bool = False,
        **sampling: Any,
    ) -> Iterator[str]:
        """Yield the text that follows `prompt`, piece by piece, never a broken character.

        `prompt`: text, or token ids used as they are. `stop`: the text ends before the first
        of these strings. `sampling`: temperature, top_k, top_p, min_p, repeat_penalty,
        presence_penalty, frequency_penalty, penalty_last_n, seed, logit_bias. RequestError as
        in generate_tokens.
        """
        text = self.continuation(prompt, max_tokens, ignore_eos, **sampling)
        stream = TextStream(self.tokenizer, text.history, stop)
        return self._stream(self._generate(text), stream)

    def _stream(self, tokens: Iterator[int], stream: TextStream) -> Iterator[str]:
        for token in tokens:
            piece = stream.push(token)
            if stream.is_stopped:
                tokens.close()  # type: ignore[attr-defined]  # it is a generator
                break
            if piece:
                yield piece
        else:
            piece = stream.finish()
        if stream.is_stopped:
            self.finish_reason = "stop"
        if piece:
            yield piece

    def generate_many(
        self,
        prompts: SequenceOf[str | SequenceOf[int]],
        max_tokens: int = -1,
        stop: str | SequenceOf[str] = (),
        ignore_eos: bool = False,
        seed: int | None = None,
        **sampling: Any,
    ) -> Iterator[tuple[int, str]]:
        """Yield (number of the prompt, piece of the text that follows it), as they come.

        options.sequences texts are written at the same time, all frozen: thresholds stay the
        file's. Options and errors as in generate(), but prompt i draws with `seed` + i.
        """
        if isinstance(prompts, str):
            raise RequestError("generate_many needs a list of prompts, not one text")
        scheduler = Scheduler(self)
        requests = [
            scheduler.submit(
                prompt,
                max_tokens,
                stop,
                ignore_eos,
                seed=None if seed is None else seed + i,
                **sampling,
            )
            for i, prompt in enumerate(prompts)
        ]
        return self._write(scheduler, requests)

    def _write(self, scheduler: Scheduler, requests: list[Request]) -> Iterator[tuple[int, str]]:
        try:
            while not scheduler.is_idle:
                for request, piece in scheduler.step():
                    if request.error is not None:
                        raise request.error
                    if piece:
                        yield request.index, piece
        finally:
            for request in requests:
                scheduler.cancel(request)


def has_f32_cache(weights: Weights, options: RunOptions) -> bool:
    """Return whether the KV cache is float32; else it is float16."""
    is_f32 = weights.layers[0].wq.type is GGMLType.F32
    return options.kv_type == "f32" or (options.kv_type == "auto" and is_f32)


def choose_context(config: ModelConfig, options: RunOptions) -> int:
    """Return the context asked for, or the trained one up to DEFAULT_CONTEXT. RequestError."""
    if config.traits.rope == "none" and (options.context or 0) > config.n_ctx_train:
        raise RequestError(
            f"a context of {options.context} tokens is not possible: this model has learned "
            f"positions for {config.n_ctx_train}"
        )
    return options.context or min(config.n_ctx_train, DEFAULT_CONTEXT)


def is_sparse(model: Model) -> bool:
    """Return whether a model can leave neurons out: exact and predicted mode."""
    return model.config.activation in SPARSE_ACTIVATIONS and model.weights.is_transposed


def choose_mode(model: Model, options: RunOptions) -> Mode:
    """Return the mode asked for, or the best that the model allows."""
    path, weights = model.file.path, model.weights
    if options.mode is None:
        if not is_sparse(model):
            return "dense"
        return "predicted" if weights.has_predictors else "exact"
    if options.mode == "dense":
        return "dense"
    if not is_sparse(model):
        raise RequestError(
            f"{path} is a dense model (activation {model.config.activation}, "
            f"{'transposed' if weights.is_transposed else 'standard'} down projection): "
            "it can only run with --dense"
        )
    if options.mode == "predicted" and not weights.has_predictors:
        raise RequestError(f"{path} has no predictors; use --exact")
    return options.mode


def _make_backend(
    model: Model, plan: Plan, options: RunOptions, notify: Callable[[str], Any]
) -> Backend:
    if options.backend == "numpy":
        return Reference(plan)
    from .cpu import isa  # numba takes half a second to import

    isa.use(options.isa)
    from .cpu.operators import CPU
    from .cuda.choose import open_gpu

    return open_gpu(model, plan, options, notify) or CPU(plan, options.threads, notify)
