"""The built-in demo model: converted and quantised once into the user's cache directory."""

from __future__ import annotations

import hashlib
from importlib.resources import as_file, files
from pathlib import Path

from .. import __version__
from ..convert.converter import plan_conversion, write_conversion
from ..quantize.policy import Policy
from ..runtime.formats import GGMLType
from ..runtime.paths import cache_dir


def demo_model() -> Path:
    """Return the path of the demo model as q4_0, making it first where it is not there yet.

    The name carries a hash of the checkpoint and this program's version, so that neither an
    older program nor an older checkpoint leaves a stale model behind.
    """
    with as_file(files(__package__) / "demo") as folder:
        digest = hashlib.sha256(__version__.encode())
        digest.update((folder / "model.safetensors").read_bytes())
        target = cache_dir() / f"demo-{digest.hexdigest()[:12]}.q4_0.gguf"
        if not target.exists():
            target.parent.mkdir(parents=True, exist_ok=True)
            conversion = plan_conversion(folder, None, Policy(GGMLType.Q4_0), dense=False)
            write_conversion(conversion, target)
    return target
