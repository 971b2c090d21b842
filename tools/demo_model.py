"""The built-in demo model: a file of this package, and how it is made from its checkpoint.

python -m powerinfer.tools.demo_model        (or: make demo-model; needs torch, a quarter hour)
"""

from __future__ import annotations

import shutil
import tempfile
from importlib.resources import files
from pathlib import Path

NAME = "demo.q4_0.gguf"


def demo_folder() -> Path:
    """Return the directory with the demo's checkpoint, texts and finished model."""
    return Path(str(files(__package__) / "demo"))


def demo_model() -> Path:
    """Return the path of the demo model: q4_0, hot-first, with predictors."""
    return demo_folder() / NAME


def build(folder: Path) -> None:
    """Make the model from the checkpoint in `folder` with the commands that users have."""
    from ..__main__ import main as powerinfer

    text = str(folder / "calibration.txt")
    with tempfile.TemporaryDirectory() as name:
        plain, hot, done = (str(Path(name) / f"{word}.gguf") for word in ("plain", "hot", "done"))
        for command in (
            ["convert", str(folder), "--outfile", plain, "--outtype", "q4_0"],
            ["profile", plain, "-f", text, "-n", "100000", "-o", hot],
            [
                "train-predictors",
                hot,
                "-f",
                text,
                "-n",
                "100000",
                "--method",
                "trained",
                "-o",
                done,
            ],
        ):
            if powerinfer(command) != 0:
                raise SystemExit(1)
        shutil.copyfile(done, folder / NAME)


if __name__ == "__main__":
    build(demo_folder())
