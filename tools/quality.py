"""What each format costs in quality, on the demo model and its held-out text.

    python -m powerinfer.tools.quality

Prints a table: size, perplexity, mean KL divergence from the f16 file and share of tokens with
the same most likely successor, over the first 20 texts of 512 tokens.
"""

from __future__ import annotations

import tempfile
from importlib.resources import as_file, files
from pathlib import Path

import numpy as np

from ..convert.converter import plan_conversion, write_conversion
from ..quantize.encoder import quantize_file
from ..quantize.policy import Policy, parse_type
from ..runtime.engine import Engine
from ..runtime.formats import F32Array

N_TEXTS, LENGTH = 20, 512


def log_softmax(logits: F32Array) -> np.ndarray:
    """Return log probabilities in float64 [n_tok, n_vocab]."""
    x = logits.astype(np.float64)
    x -= x.max(axis=-1, keepdims=True)
    return x - np.log(np.exp(x).sum(axis=-1, keepdims=True))


def measure(path: Path, texts: list[list[int]], base: list[np.ndarray] | None) -> list[np.ndarray]:
    """Print a row of the table; return the log probabilities of every text as float32."""
    with Engine(path) as engine:
        ours = [log_softmax(engine.logits(text)).astype(np.float32) for text in texts]
    chosen = [p[np.arange(len(t) - 1), t[1:]] for p, t in zip(ours, texts, strict=True)]
    perplexity = np.exp(-np.mean(np.concatenate(chosen), dtype=np.float64))
    pairs = list(zip(base or ours, ours, strict=True))
    kl = np.mean([(np.exp(p) * (p - q)).sum(axis=-1).mean(dtype=np.float64) for p, q in pairs])
    same = np.mean([(p.argmax(axis=-1) == q.argmax(axis=-1)).mean() for p, q in pairs])
    size = path.stat().st_size / 2**20
    print(f"| {path.stem} | {size:.2f} | {perplexity:.3f} | {kl:.1e} | {same:.1%} |", flush=True)
    return ours


def main() -> None:
    print("| type | MiB | perplexity | KL from f16 | same top token |\n|---|---|---|---|---|")
    with (
        as_file(files(__package__) / "demo") as demo,
        tempfile.TemporaryDirectory() as folder,
    ):
        f16 = Path(folder) / "f16.gguf"
        write_conversion(plan_conversion(demo, None, Policy(parse_type("f16")), False), f16)
        with Engine(f16) as engine:
            ids = engine.tokenize((demo / "heldout.txt").read_text("utf-8"))
        texts = [ids[i * LENGTH : (i + 1) * LENGTH] for i in range(N_TEXTS)]
        base = measure(f16, texts, None)
        for name in ("q8_0", "q5_1", "q5_0", "q4_1", "q4_0"):
            path = Path(folder) / f"{name}.gguf"
            quantize_file(f16, path, Policy(parse_type(name)))
            measure(path, texts, base)


if __name__ == "__main__":
    main()
