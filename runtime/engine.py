"""The engine: an open model that reads prompts and writes text."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass
from typing import Any

import numpy as np

from .backend import Backend, Plan
from .cache import KVCache, Sequence
from .config import SPARSE_ACTIVATIONS, Mode, ModelConfig, RunOptions, model_config
from .errors import ModelError, RequestError
from .formats import F32Array, GGMLType
from .gguf import GGUFFile
from .model import forward
from .reference import Reference
from .sampling import Sampler, SamplingOptions
from .step import Buffers, Step, rope_table
from .tokenizer import StreamDecoder, load_tokenizer
from .weights import Weights, load_weights

DEFAULT_CONTEXT = 4096
N_OUT = 32  # tokens whose logits are computed at once


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


class Engine:
    """An open model.

    `notify` is told, in a few words, of anything that takes long. Errors: OSError and
    FileFormatError for the file, ModelError for a model that cannot run, RequestError for
    options that do not fit it.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        options: RunOptions | None = None,
        notify: Callable[[str], Any] = lambda _: None,
    ) -> None:
        started = time.perf_counter()
        self.options = options or RunOptions()
        self.file = GGUFFile(path)
        self.config = model_config(self.file)
        self.weights = load_weights(self.file, self.config)
        self.tokenizer = load_tokenizer(self.file)
        if self.tokenizer.n_vocab != self.config.n_vocab:
            raise ModelError(
                f"{self.file.path}: {self.tokenizer.n_vocab} tokens in the vocabulary, "
                f"{self.config.n_vocab} in the embedding"
            )
        self.context = _choose_context(self.config, self.options)
        self.mode = _choose_mode(self.file, self.config, self.weights, self.options)
        self._plan = self._make_plan()
        self._ops = _make_backend(self._plan, self.options, notify)
        self.backend = self._ops.name
        self.timings = Timings(load_s=time.perf_counter() - started)
        self.finish_reason = ""  # of the last generate(): "eos", "stop", "length", "context"

    def _make_plan(self) -> Plan:
        c = self.config
        chunk = max(1, min(self.options.chunk, self.context))
        f32 = self.options.kv_type == "f32" or (
            self.options.kv_type == "auto" and self.weights.layers[0].wq.type is GGMLType.F32
        )
        factors = self.weights.rope_factors
        override = self.options.sparse_threshold
        return Plan(
            config=c,
            weights=self.weights,
            cache=KVCache(c, self.context, np.float32 if f32 else np.float16),
            step=Step(chunk, n_seq_max=1, context=self.context, n_out_max=N_OUT),
            buffers=Buffers(c, chunk, N_OUT),
            rope=rope_table(c, self.context, None if factors is None else factors.numpy()),
            mode=self.mode,
            thresholds=tuple(
                c.threshold(il) if override is None else override for il in range(c.n_layer)
            ),
        )

    def close(self) -> None:
        """Stop the threads and free the memory of this engine."""
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

    def _feed(self, sequence: Sequence, ids: SequenceOf[int]) -> None:
        """Run one chunk of new tokens (at most options.chunk) through the layers."""
        self._plan.cache.extend(sequence, len(ids))
        self._plan.step.fill([(sequence, ids)])
        forward(self._plan, self._ops)

    def _logits(self, outputs: SequenceOf[int]) -> F32Array:
        """Return the logits [n_out, n_vocab] of tokens of the last chunk: a view, soon reused."""
        self._plan.step.want(outputs)
        self._ops.head()
        return self._plan.buffers.logits[: len(outputs)]

    def _check(self, ids: SequenceOf[int]) -> None:
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

    def logits(self, ids: SequenceOf[int]) -> F32Array:
        """Return the logits after every token: float32 [len(ids), n_vocab].

        RequestError for ids outside the vocabulary or more of them than the context holds.
        """
        self._check(ids)
        out = np.empty((len(ids), self.config.n_vocab), np.float32)
        sequence = Sequence()
        chunk = len(self._plan.step.tokens)
        try:
            for start in range(0, len(ids), chunk):
                part = ids[start : start + chunk]
                self._feed(sequence, part)
                for i in range(0, len(part), N_OUT):
                    wanted = range(i, min(i + N_OUT, len(part)))
                    out[start + i : start + i + len(wanted)] = self._logits(wanted)
        finally:
            self._plan.cache.release(sequence)
        return out

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
        self._check(prompt)
        if not prompt:
            raise RequestError("the prompt is empty: there is nothing to start from")
        sampler = Sampler(SamplingOptions(**sampling), self.config.n_vocab)
        return self._generate(list(prompt), max_tokens, ignore_eos, sampler)

    def _generate(
        self, history: list[int], max_tokens: int, ignore_eos: bool, sampler: Sampler
    ) -> Iterator[int]:
        t = self.timings = Timings(load_s=self.timings.load_s)
        self._plan.buffers.counts[:] = 0
        self.finish_reason = "length"
        sequence, chunk = Sequence(), len(self._plan.step.tokens)
        clock = time.perf_counter()
        try:
            for start in range(0, len(history), chunk):
                part = history[start : start + chunk]
                self._feed(sequence, part)
                t.prompt_tokens += len(part)
                t.prompt_s = time.perf_counter() - clock
            if max_tokens == 0:
                return
            logits = self._logits([len(part) - 1])[0]
            t.prompt_s = time.perf_counter() - clock
            while True:
                token = sampler.sample(logits, history)
                if self.tokenizer.is_end(token) and not ignore_eos:
                    self.finish_reason = "eos"
                    return
                history.append(token)
                t.decode_tokens += 1
                yield token
                if t.decode_tokens == max_tokens:
                    return
                if sequence.length == self.context:
                    self.finish_reason = "context"
                    return
                clock = time.perf_counter()
                self._feed(sequence, [token])
                logits = self._logits([0])[0]
                t.decode_s += time.perf_counter() - clock
        finally:
            self._plan.cache.release(sequence)
            self._note_shares(t)

    def _note_shares(self, t: Timings) -> None:
        tokens, rows, fired = self._plan.buffers.counts.sum(axis=0).tolist()
        if tokens:
            t.rows_share = rows / tokens / self.config.n_ff
            t.fired_share = fired / tokens / self.config.n_ff

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
        ids = list(prompt) if not isinstance(prompt, str) else self.tokenize(prompt)
        if prompt == "":
            ids = [self.tokenizer.bos]  # something to start from, whatever the model wants
        stops = [stop] if isinstance(stop, str) else list(stop)
        tokens = self.generate_tokens(ids, max_tokens, ignore_eos, **sampling)
        at_start = prompt == "" or ids == [self.tokenizer.bos]
        return self._stream(
            tokens, StreamDecoder(self.tokenizer, at_start), [s for s in stops if s]
        )

    def _stream(
        self, tokens: Iterator[int], decoder: StreamDecoder, stops: list[str]
    ) -> Iterator[str]:
        held = ""  # text that may turn out to be the beginning of a stop string
        for token in tokens:
            held += decoder.push(token)
            found = [i for i in (held.find(s) for s in stops) if i >= 0]
            if found:
                tokens.close()  # type: ignore[attr-defined]  # it is a generator
                self.finish_reason = "stop"
                if held[: min(found)]:
                    yield held[: min(found)]
                return
            keep = max((_overlap(held, s) for s in stops), default=0)
            if len(held) > keep:
                yield held[: len(held) - keep]
                held = held[len(held) - keep :]
        held += decoder.finish()
        if held:
            yield held


def _overlap(text: str, stop: str) -> int:
    """Return how many characters at the end of `text` may begin `stop`."""
    return next((n for n in range(len(stop) - 1, 0, -1) if text.endswith(stop[:n])), 0)


def _choose_context(config: ModelConfig, options: RunOptions) -> int:
    if config.traits.rope == "none" and (options.context or 0) > config.n_ctx_train:
        raise RequestError(
            f"a context of {options.context} tokens is not possible: this model has learned "
            f"positions for {config.n_ctx_train}"
        )
    return options.context or min(config.n_ctx_train, DEFAULT_CONTEXT)


def _choose_mode(
    file: GGUFFile, config: ModelConfig, weights: Weights, options: RunOptions
) -> Mode:
    """Return the mode asked for, or the best that the model allows."""
    is_sparse = config.activation in SPARSE_ACTIVATIONS and weights.is_transposed
    if options.mode is None:
        if not is_sparse:
            return "dense"
        return "predicted" if weights.has_predictors else "exact"
    if options.mode == "dense":
        return "dense"
    if not is_sparse:
        raise RequestError(
            f"{file.path} is a dense model (activation {config.activation}, "
            f"{'transposed' if weights.is_transposed else 'standard'} down projection): "
            "it can only run with --dense"
        )
    if options.mode == "predicted" and not weights.has_predictors:
        raise RequestError(f"{file.path} has no predictors; use --exact")
    return options.mode


def _make_backend(plan: Plan, options: RunOptions, notify: Callable[[str], Any]) -> Backend:
    if options.backend == "numpy":
        return Reference(plan)
    from .cpu import CPU  # numba takes half a second to import

    return CPU(plan, options.threads, notify)
