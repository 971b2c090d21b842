"""Several texts written at once, in shared forward passes: continuous batching.

Texts join and leave between passes. A pass reads the weights once for all its tokens, so that
texts side by side cost little more than one.
"""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Sequence as SequenceOf
from typing import TYPE_CHECKING, Any

from .cache import Sequence
from .errors import PowerInferError
from .formats import F32Array
from .text import Continuation, TextStream

if TYPE_CHECKING:
    from .engine import Engine


class Request:
    """One text that a Scheduler writes.

    `index`: its number, from 0 in the order of submission. `error`: why it could not go on; it is
    "cancelled" then.
    """

    def __init__(self, index: int, continuation: Continuation, stream: TextStream) -> None:
        self.index = index
        self.error: BaseException | None = None
        self.sequence = Sequence()  # no thresholds of its own: the file's, frozen
        self._continuation, self._stream = continuation, stream

    @property
    def finish_reason(self) -> str:
        """Why it ended: "eos", "stop", "length", "context" or "cancelled"; "" before that."""
        return self._continuation.finish_reason

    @property
    def tokens(self) -> list[int]:
        """What has been written so far, without the prompt."""
        return self._continuation.history[self._continuation.n_prompt :]

    @property
    def n_pending(self) -> int:
        """How many tokens have not gone through the model: of the prompt, or the newest."""
        return len(self._continuation.history) - self.sequence.length

    def pending(self, n: int) -> list[int]:
        """Return the first `n` tokens that have not gone through the model."""
        return self._continuation.history[self.sequence.length : self.sequence.length + n]

    def push(self, logits: F32Array) -> str:
        """Choose the next token from its `logits` [n_vocab] and return the text that is certain."""
        token = self._continuation.choose(logits)
        piece = "" if token is None else self._stream.push(token)
        if self.finish_reason:
            piece += self._stream.finish()
        if self._stream.is_stopped:
            self.end("stop")
        return piece

    def end(self, reason: str, error: BaseException | None = None) -> None:
        """Let nothing come after what has been written."""
        self._continuation.finish_reason, self.error = reason, error


class Scheduler:
    """Writes texts on an engine, at most options.sequences at a time; others wait in order.

    It needs the engine's whole KV cache while it is not idle, and is for one thread. `counts`
    [n_layer, COUNTS] is what the FFNs computed in all its passes.
    """

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.counts = engine.no_counts()
        self._numbers = itertools.count()
        self._waiting: deque[Request] = deque()
        self._running: list[Request] = []  # oldest first

    @property
    def is_idle(self) -> bool:
        """Whether no text is being written and none waits."""
        return not self._running and not self._waiting

    def submit(
        self,
        prompt: str | SequenceOf[int],
        max_tokens: int = -1,
        stop: str | SequenceOf[str] = (),
        ignore_eos: bool = False,
        **sampling: Any,
    ) -> Request:
        """Line a text up; options and errors as in Engine.generate."""
        continuation = self.engine.continuation(prompt, max_tokens, ignore_eos, **sampling)
        stream = TextStream(self.engine.tokenizer, continuation.history, stop)
        request = Request(next(self._numbers), continuation, stream)
        self._waiting.append(request)
        return request

    def step(self) -> list[tuple[Request, str]]:
        """Run one forward pass and return the new text of each request that has some or ended.

        Texts being written get one token each, prompts share the room that is left. A request whose
        token cannot be chosen is cancelled, with its `error`; if the pass itself fails, so are all
        that run (not those that wait), and the error is raised.
        """
        pieces = []
        while self._waiting and len(self._running) < self.engine.options.sequences:
            request = self._waiting.popleft()
            if request.finish_reason:  # no token is wanted
                pieces.append((request, ""))
            else:
                self._running.append(request)
        try:
            pieces += self._pass() if self._running else []
        except BaseException as error:
            for request in self._running.copy():
                request.end("cancelled", error)
                self._leave(request)
            raise
        return pieces

    def _pass(self) -> list[tuple[Request, str]]:
        room, n = self.engine.chunk, 0
        requests, chunks, outputs = [], [], []
        # One token each for those that write, and there is room for it: no more texts run than
        # tokens fit in a pass. Then the prompts, first come first served.
        for request in sorted(self._running, key=lambda r: r.n_pending > 1):
            part = request.pending(room - n)
            if not part:
                break
            n += len(part)
            if len(part) == request.n_pending:
                requests.append(request)
                outputs.append(n - 1)
            chunks.append((request.sequence, part))
        logits = self.engine.feed(chunks, outputs, self.counts)
        pieces = []
        for request, row in zip(requests, logits, strict=True):
            try:
                piece = request.push(row)
            except PowerInferError as error:  # of this text's options: the others go on
                request.end("cancelled", error)
                piece = ""
            if request.finish_reason:
                self._leave(request)
            if piece or request.finish_reason:
                pieces.append((request, piece))
        return pieces

    def cancel(self, request: Request) -> None:
        """End a text now, wherever it is; one that has ended stays as it is."""
        if not request.finish_reason:
            request.end("cancelled")
            self._leave(request)

    def _leave(self, request: Request) -> None:
        """Forget a request and give its pages back."""
        for texts in (self._waiting, self._running):
            if request in texts:
                texts.remove(request)
        self.engine.release(request.sequence)
