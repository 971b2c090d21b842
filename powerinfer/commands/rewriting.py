"""Writing a model file again, as several commands end."""

from __future__ import annotations

from pathlib import Path

from tqdm import tqdm

from ..predictors.order import Changes, rewrite
from ..runtime.gguf import GGUFFile
from .arguments import say


def rewrite_shown(source: Path, target: Path, changes: Changes) -> None:
    """Rewrite a file under a progress bar, and say where it is."""
    total = GGUFFile(source).tensor_bytes
    with tqdm(total=total, unit="B", unit_scale=True, desc="rewriting") as bar:
        rewrite(source, target, changes, bar.update)
    say(f"wrote {target} ({target.stat().st_size / 2**20:.1f} MiB)")
