"""Imports go one way through the house, and heavy ones happen only where they are needed."""

import ast
import subprocess
import sys

import pytest
from conftest import ROOT

ORDER = ["runtime", "quantize", "convert", "predictors", "tools", "powerinfer"]


def imported_packages(path):
    """Yield the top folders that a file imports by relative or absolute names."""
    depth = len(path.relative_to(ROOT).parts) - 1
    if path.relative_to(ROOT).parts[0] == "powerinfer":
        depth -= 1  # powerinfer/ is itself the top package
    for node in ast.walk(ast.parse(path.read_text())):
        names = []
        if isinstance(node, ast.ImportFrom) and node.level > depth and node.module:
            names = [node.module]
        elif isinstance(node, ast.ImportFrom) and not node.level and node.module:
            names = [node.module.removeprefix("powerinfer.")] if "powerinfer" in node.module else []
        elif isinstance(node, ast.Import):
            names = [
                a.name.removeprefix("powerinfer.") for a in node.names if "powerinfer." in a.name
            ]
        yield from (name.split(".")[0] for name in names)


@pytest.mark.parametrize("folder", ORDER)
def test_imports_go_one_way(folder):
    for path in (ROOT / folder).rglob("*.py"):
        for other in imported_packages(path):
            if other in ORDER:
                assert ORDER.index(other) <= ORDER.index(folder), f"{path} imports {other}"


def test_the_check_sees_imports():
    found = set(imported_packages(ROOT / "convert" / "converter.py"))
    assert {"quantize", "runtime"} <= found
    assert "tools" in set(imported_packages(ROOT / "powerinfer" / "commands" / "inspect.py"))


def test_opening_the_front_door_is_cheap():
    heavy = "numba", "torch", "gguf", "sentencepiece", "google.protobuf", "tqdm"
    script = f"import sys, powerinfer.__main__; print([m for m in {heavy!r} if m in sys.modules])"
    out = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"
