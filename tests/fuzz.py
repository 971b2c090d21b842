"""Fuzz target: mutations of a small model file, opened and run, for as long as told.

    python tests/fuzz.py --seconds 60        (or: make fuzz SECONDS=60)

Every mutation must end in a model that opens or in one PowerInferError, within a second of CPU
and 512 MB above the start. Of every ten files (--run-every) one is also run, if it is accepted,
on the CPU and as reference. The first input that does anything else is kept as fuzz-failure.gguf,
with its seed, and ends the run.
"""

from __future__ import annotations

import argparse
import faulthandler
import random
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
import numpy as np
import tiny
from attacks.mutate import mutate
from conftest import convert, random_predictors, train_tokenizer
from powerinfer.runtime.config import RunOptions, model_config
from powerinfer.runtime.engine import Engine
from powerinfer.runtime.errors import PowerInferError
from powerinfer.runtime.gguf import GGUFFile
from powerinfer.runtime.tokenizer import load_tokenizer
from powerinfer.runtime.weights import load_weights

MODEL = tiny.Tiny(n_embd=32, n_ff=64, n_layer=1, n_head=2, n_head_kv=1, head_dim=16)


def small_model(folder: Path) -> Path:
    """Make a model file of a few ten thousand bytes, with a predictor."""
    checkpoint = tiny.write_checkpoint(MODEL, folder / "m")
    train_tokenizer(checkpoint)
    predictors = random_predictors(MODEL, folder / "p", 32)
    return convert(checkpoint, folder / "base.gguf", "q8_0", predictors)


def attempt(path: Path, run: bool) -> bool:
    """Open a file as `infer` does; return whether it was accepted."""
    try:
        file = GGUFFile(path)
        load_weights(file, model_config(file))
        load_tokenizer(file)
        if run:
            for backend in ("cpu", "numpy"):
                options = RunOptions(backend=backend, threads=1, context=8, chunk=4)
                with Engine(path, options) as engine, np.errstate(all="ignore"):
                    engine.logits([1, 2, 3])
        return True
    except PowerInferError as error:
        assert "\n" not in str(error) and len(str(error)) < 2000
        return False


def memory() -> int:
    """Return the most memory this process has had, in bytes."""
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--count", type=int, default=1 << 62)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--run-every", type=int, default=10)
    args = parser.parse_args()
    faulthandler.enable()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        base = small_model(folder)
        raw, head = base.read_bytes(), GGUFFile(base).data_offset
        assert attempt(base, run=True)
        path, started, start_memory = folder / "x.gguf", time.monotonic(), memory()
        accepted = slowest = tried = 0
        while tried < args.count and time.monotonic() - started < args.seconds:
            seed = args.seed + tried
            mutant = mutate(raw, random.Random(seed), head)
            path.unlink(missing_ok=True)  # the old map stays as it was
            path.write_bytes(mutant)
            clock = time.process_time()  # the machine may be busy with other things
            try:
                accepted += attempt(path, run=seed % args.run_every == 0)
                took = time.process_time() - clock
                assert took < 1, f"{took:.1f} s"
                assert memory() < start_memory + (512 << 20), "memory"
            except BaseException as error:
                Path("fuzz-failure.gguf").write_bytes(mutant)
                print(f"seed {seed}: {type(error).__name__}: {error} (fuzz-failure.gguf)")
                raise
            tried, slowest = tried + 1, max(slowest, took)
    grown = (memory() - start_memory) / 2**20
    print(f"{tried} mutations, {accepted} accepted, slowest {slowest:.3f} s, +{grown:.0f} MiB")
    return 0


if __name__ == "__main__":
    sys.exit(main())
