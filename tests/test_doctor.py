"""What doctor sees, and what it says of a machine where something is off."""

import json
import os

from powerinfer.tools import doctor
from test_cli import run


def test_text_and_json(capfd):
    code, out, _ = run(capfd, "doctor")
    assert code == 0
    names = [line.split("  ")[0] for line in out.splitlines()]
    for name in (
        "system",
        "kernels",
        "CPU",
        "cores",
        "memory",
        "kernel cache",
        "memory read",
        "GPU",
    ):
        assert name in names
    code, out, _ = run(capfd, "doctor", "--json", "--quick")
    found = {f["name"]: f for f in json.loads(out)}
    assert code == 0 and "memory read" not in found
    assert found["extra plot"]["value"].startswith("pictures")


def test_problems_are_named(monkeypatch, tmp_path):
    monkeypatch.setattr(os, "getloadavg", lambda: (7.5, 0, 0), raising=False)
    assert "keep 7.5 of 2 cores busy" in doctor._load(2)
    monkeypatch.setattr(os, "getloadavg", lambda: (0.1, 0, 0), raising=False)
    assert doctor._load(2) == ""
    assert "empty" in doctor._cache(tmp_path / "none", 0).value
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    assert "cannot be written" in doctor._cache(tmp_path, 0).problem
    text = doctor.as_text([doctor.Finding("a", "b"), doctor.Finding("c", "d", "e is broken")])
    assert text.splitlines()[-2:] == [f"{'':<14} ! e is broken", "1 to look at (!)"]


def test_missing_extra(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    found = {f.name: f.value for f in doctor.examine(bandwidth=False)}
    assert 'pip install "powerinfer-python[train]"' in found["extra train"]
