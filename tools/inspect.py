"""What is in a model file, as data and as text."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np

from ..runtime.errors import shown
from ..runtime.formats import GGMLType
from ..runtime.gguf import GGUFFile, Tensor, Value, ValueType

SHOWN = 4  # elements of an array that are shown


def describe(file: GGUFFile) -> dict[str, Any]:
    """Return keys, tensors and sparsity data of a file, ready for JSON."""
    return {
        "file": str(file.path),
        "format": file.magic,
        "version": file.version,
        "bytes": file.size,
        "keys": {key: _describe_value(value) for key, value in file.metadata.items()},
        "tensors": [_describe_tensor(t) for t in file.tensors.values()],
        "types": _by_type(file),
        "sparsity": _sparsity(file),
    }


def _describe_value(value: Value) -> dict[str, Any]:
    if value.type is not ValueType.ARRAY:
        return {"type": value.type.name, "value": _json(value.value)}
    assert value.element is not None
    first = value.value[:SHOWN]
    first = first if isinstance(first, list) else first.tolist()
    return {
        "type": f"{value.element.name}[{len(value.value)}]",
        "first": [_json(x) for x in first],
    }


def _json(value: Any) -> Any:
    """Return a value that JSON can hold: it has no NaN and no infinity."""
    return str(value) if isinstance(value, float) and not np.isfinite(value) else value


def _describe_tensor(tensor: Tensor) -> dict[str, Any]:
    return {
        "name": tensor.name,
        "type": tensor.type.name,
        "shape": list(tensor.shape),
        "bytes": tensor.nbytes,
    }


def _by_type(file: GGUFFile) -> dict[str, dict[str, int]]:
    counts = Counter(t.type.name for t in file.tensors.values())
    return {
        name: {
            "tensors": n,
            "bytes": sum(t.nbytes for t in file.tensors.values() if t.type.name == name),
        }
        for name, n in counts.items()
    }


def _sparsity(file: GGUFFile) -> dict[str, Any]:
    """Return what the file says about which neurons fire."""
    predictors = {
        n: t for n, t in file.tensors.items() if n.endswith((".fc1.weight", ".fc2.weight"))
    }
    ranks = [t.shape[0] for n, t in predictors.items() if n.endswith(".fc1.weight")]
    frequencies = [
        t for n, t in file.tensors.items() if n.endswith(".ffn_freq") and t.type is GGMLType.F32
    ]
    return {
        "transposed_down": any(n.endswith("ffn_down_t.weight") for n in file.tensors),
        "neuron_order": file.get_str("powerinfer.neuron_order", "original"),
        "predictor_layers": len(ranks),
        "predictor_ranks": sorted(set(ranks)),
        "predictor_bytes": sum(t.nbytes for t in predictors.values()),
        "firing_share": [_json(float(t.float32().mean())) for t in frequencies],
    }


def render(description: dict[str, Any]) -> str:
    """Return a description as text for people."""
    d = description
    lines = [
        f"{d['file']}: {d['format']} v{d['version']}, {d['bytes'] / 2**20:.1f} MiB",
        "",
        "keys",
    ]
    for key, value in d["keys"].items():
        content = value.get("value", value.get("first"))
        lines.append(f"  {shown(key)[1:-1]:<44} {value['type']:<14} {shown(content)}")
    lines += ["", "tensors"]
    for t in d["tensors"]:
        shape = " x ".join(str(n) for n in t["shape"])
        name, size = shown(t["name"])[1:-1], t["bytes"] / 2**20
        lines.append(f"  {name:<32} {t['type']:<6} {shape:<16} {size:10.2f} MiB")
    lines += ["", "types"]
    for name, total in d["types"].items():
        lines.append(
            f"  {name:<6} {total['tensors']:>5} tensors {total['bytes'] / 2**20:12.2f} MiB"
        )
    s = d["sparsity"]
    lines += ["", "sparsity"]
    lines.append(f"  down projection: {'transposed' if s['transposed_down'] else 'standard'}")
    lines.append(f"  neuron order:    {s['neuron_order']}")
    if s["predictor_layers"]:
        ranks = ", ".join(str(r) for r in s["predictor_ranks"])
        size = s["predictor_bytes"] / 2**20
        lines.append(
            f"  predictors:      {s['predictor_layers']} layers, rank {ranks}, {size:.2f} MiB"
        )
    else:
        lines.append("  predictors:      none")
    if s["firing_share"]:
        shares = " ".join(f"{float(x):.3f}" for x in s["firing_share"])
        lines.append(f"  firing share:    {shares}")
    return "\n".join(lines)
