"""A text in the making: Continuation chooses its tokens, TextStream makes text of them."""

from __future__ import annotations

from collections.abc import Sequence

from .formats import F32Array
from .sampling import Sampler
from .tokenizer import StreamDecoder, Tokenizer


class Continuation:
    """Chooses the tokens that follow a prompt, and knows when the text ends.

    `history`: prompt and what was chosen. `finish_reason`: "" while the text goes on, then "eos",
    "length" (`max_tokens` were chosen; -1: no limit) or "context" (`context` tokens are full).
    """

    def __init__(
        self,
        prompt: list[int],
        sampler: Sampler,
        tokenizer: Tokenizer,
        context: int,
        max_tokens: int,
        ignore_eos: bool,
    ) -> None:
        self.history, self.n_prompt = prompt.copy(), len(prompt)
        self.finish_reason = "length" if max_tokens == 0 else ""
        self._sampler, self._tokenizer = sampler, tokenizer
        self._context, self._max_tokens, self._ignore_eos = context, max_tokens, ignore_eos

    def choose(self, logits: F32Array) -> int | None:
        """Return the next token, from the `logits` [n_vocab] after the last one; None at the end.

        ModelError and RequestError as in Sampler.sample.
        """
        token = self._sampler.sample(logits, self.history)
        if self._tokenizer.is_end(token) and not self._ignore_eos:
            self.finish_reason = "eos"
            return None
        self.history.append(token)
        if len(self.history) - self.n_prompt == self._max_tokens:
            self.finish_reason = "length"
        elif len(self.history) > self._context:  # the last one is chosen but cannot be fed
            self.finish_reason = "context"
        return token


class TextStream:
    """Makes text of the tokens after `prompt`, up to the first stop string in it.

    However the tokens cut the text: no piece holds a broken character or the beginning of a stop
    string. `is_stopped`: a stop string was found; nothing comes after it.
    """

    def __init__(self, tokenizer: Tokenizer, prompt: Sequence[int], stop: str | Sequence[str]):
        self._decoder = StreamDecoder(
            tokenizer, at_start=len(prompt) == 1 and prompt[0] == tokenizer.bos
        )
        self._stops = [s for s in ([stop] if isinstance(stop, str) else stop) if s]
        self._held = ""  # text that may turn out to be the beginning of a stop string
        self.is_stopped = False

    def push(self, token: int) -> str:
        """Return the text that is certain after `token`; it may be empty."""
        self._held += self._decoder.push(token)
        # Up to here the text is certain: no stop string begins before, not even one that is longer
        # than what has come of it.
        return self._take(
            len(self._held) - max((_overlap(self._held, s) for s in self._stops), default=0)
        )

    def finish(self) -> str:
        """Return the text that was held back, when no more tokens come."""
        if self.is_stopped:
            return ""
        self._held += self._decoder.finish()
        return self._take(len(self._held))

    def _take(self, certain: int) -> str:
        found = min((i for i in map(self._held.find, self._stops) if i >= 0), default=None)
        if found is not None:
            self.is_stopped = found <= certain
            certain = min(certain, found)
        piece, self._held = self._held[:certain], self._held[certain:]
        return piece


def _overlap(text: str, stop: str) -> int:
    """Return how many characters at the end of `text` may begin `stop`."""
    return next((n for n in range(len(stop) - 1, 0, -1) if text.endswith(stop[:n])), 0)
