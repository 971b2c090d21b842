"""What each format costs in quality, on the demo model and its held-out text.

    python -m powerinfer.tools.quality

Prints a table: size, perplexity, mean KL divergence from the f16 file and share of tokens with
the same most likely successor (predictors.measure), over 20 windows of 512 tokens.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

from ..convert.converter import plan_conversion, write_conversion
from ..predictors.measure import measure
from ..predictors.text import read_text, windows
from ..quantize.encoder import quantize_file
from ..quantize.policy import Policy, parse_type
from ..runtime.engine import Engine
from .demo_model import demo_folder

N_TOKENS, LENGTH = 20 * 512, 512


def main() -> None:
    demo = demo_folder()
    print("| type | MiB | perplexity | KL from f16 | same top token |\n|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as folder:
        f16 = Path(folder) / "f16.gguf"
        write_conversion(plan_conversion(demo, None, Policy(parse_type("f16")), False), f16)
        with Engine(f16) as base:
            texts = windows(base, read_text(demo / "heldout.txt"), LENGTH, N_TOKENS)
            for name in ("f16", "q8_0", "q5_1", "q5_0", "q4_1", "q4_0"):
                path = Path(folder) / f"{name}.gguf"
                if path != f16:
                    quantize_file(f16, path, Policy(parse_type(name)))
                with Engine(path) as engine:
                    quality = measure(engine, texts, base)
                assert quality.divergence is not None
                print(
                    f"| {name} | {path.stat().st_size / 2**20:.2f} "
                    f"| {quality.perplexity.mean:.3f} | {quality.divergence.kl.mean:.1e} "
                    f"| {quality.divergence.same_top.mean:.1%} |",
                    flush=True,
                )


if __name__ == "__main__":
    main()
