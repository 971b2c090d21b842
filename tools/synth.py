"""Models of published shapes with random weights, for measuring speed where there is no download.

    python -m powerinfer.tools.synth 7b -o 7b.gguf --type q4_0 --verify

What their FFNs do is like a trained ReLU model's: 10 % of the neurons fire for a token, the hottest
26 % of them do 80 % of the firing, and the predictor (rank n_embd / 4) names 13 % with a recall of
0.98. How: all tokens share a mean direction with half the energy of the residual stream, which
attention and FFN, written small, leave as it is. What a neuron's row makes of it is the neuron's
threshold, so that there are no biases and the tensors are those of a real file. The rest of the row
has low rank, which is what the predictor knows, and noise, which is what it misses:

    h    = cos(ANGLE) * mean + sin(ANGLE) * (the token's own)    [n_embd], what the FFN sees
    gate = sqrt(1 - noise^2) * U P + noise * random rows         [n_ff, n_embd]; Falcon: up
    fc1  = [P; -P], fc2 = [U, -U]                                relu(P h) - relu(-P h) = P h
"""

from __future__ import annotations

import argparse
import os
import zlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from math import cos, pi, sin, sqrt, tan
from pathlib import Path
from statistics import NormalDist
from typing import Any

import numpy as np

from ..convert.pwri import encode_original
from ..predictors.measure import RecallWatcher
from ..quantize.encoder import add_file_type, encode_rows, row_chunks
from ..quantize.policy import TARGETS, Policy
from ..runtime.config import ARCHITECTURES, RunOptions, model_config
from ..runtime.engine import Engine
from ..runtime.errors import PowerInferError
from ..runtime.formats import BLOCK_SIZES, F32Array, GGMLType, decode, encode, row_bytes
from ..runtime.gguf import GGUFFile, Metadata, Tensor, Value, ValueType
from ..runtime.gguf_writer import GGUFWriter
from ..runtime.tokenizer import BYTE, CONTROL, NORMAL, SPACE, UNKNOWN
from ..runtime.weights import Model, load_weights

FIRING, SPREAD = 0.10, 1.05  # thresholds are normal; this spread puts 80 % on the hottest 26 %
ENERGY = 0.083  # mean of relu(x)^2 over neurons and tokens, x in standard deviations
ANGLE = pi / 4  # between a token's stream and the mean direction
GAIN = 0.2  # size of what all layers add to the stream, beside the embedding's 1
# With an error of that many of its standard deviations, a score >= -MARGIN of them means 13 % of
# the neurons and a recall of 0.98.
ERROR, MARGIN = 0.14, 0.22


@dataclass(frozen=True)
class Shape:
    """Hyper-parameters of a model, named as in ModelConfig."""

    n_embd: int
    n_ff: int
    n_layer: int
    n_head: int
    n_head_kv: int
    head_dim: int
    n_vocab: int = 32000
    arch: str = "llama"


SHAPES = {
    "tiny": Shape(512, 1408, 2, 8, 8, 64, 512),
    "tiny-falcon": Shape(512, 2048, 2, 8, 2, 64, 512, "falcon"),
    "small": Shape(1024, 2816, 8, 16, 16, 64),
    "1b": Shape(2048, 5504, 16, 16, 16, 128),
    "7b": Shape(4096, 11008, 32, 32, 32, 128),
    "13b": Shape(5120, 13824, 40, 40, 40, 128),
    "70b": Shape(8192, 28672, 80, 64, 8, 128),
    "falcon-40b": Shape(8192, 32768, 60, 128, 8, 64, 65024, "falcon"),
}


def write_synthetic(
    name: str,
    path: str | os.PathLike[str],
    target: GGMLType = GGMLType.Q4_0,
    predictor: GGMLType | None = None,
    head: GGMLType | None = None,
    layers: int | None = None,
    seed: int = 0,
) -> None:
    """Write the model SHAPES[name] with random weights, the same for the same arguments.

    `predictor`: type of fc1 and fc2 (None: `target`); `head`: of the output (None: Q6_K under
    Q4_0, else `target`); `layers`: how many (None: all). U, P of a layer and a chunk of rows per
    core are in memory. OSError for the disk, RequestError for a file that must not be replaced.
    """
    s = SHAPES[name] if layers is None else replace(SHAPES[name], n_layer=layers)
    type_of = _types(target, predictor, head)
    model = _Model(s, seed, _noise(target, predictor or target))
    n_threads = os.cpu_count() or 1
    parts = [tensor_shapes(s, il) for il in range(-1, s.n_layer)]
    with ThreadPoolExecutor(n_threads) as pool, GGUFWriter(path, s.arch) as writer:
        for key, value in _keys(name, s).items():
            writer.add(key, value)
        add_file_type(writer, target)
        for part in parts:
            for tensor, shape in part.items():
                writer.declare(tensor, type_of(tensor, shape), shape)
        for il, part in enumerate(parts, -1):
            model.enter(il)
            for tensor, shape in part.items():
                type_ = type_of(tensor, shape)
                chunks = list(row_chunks(shape[0], shape[1])) if len(shape) > 1 else [slice(0, 1)]
                for i in range(0, len(chunks), n_threads):
                    jobs = [(tensor, type_, shape, rows) for rows in chunks[i : i + n_threads]]
                    for data in pool.map(lambda job: model.encoded(*job), jobs):
                        writer.write(tensor, data)


class ImaginedFile(GGUFFile):
    """What write_synthetic would write, without writing it: only firing frequencies are there."""

    def __init__(self, name: str, target: GGMLType = GGMLType.Q4_0) -> None:
        s, type_of = SHAPES[name], _types(target)
        Metadata.__init__(self, Path(f"synthetic-{name}"), _keys(name, s))
        self.metadata["general.architecture"] = Value.of(s.arch)
        frequencies = _frequencies(_lifts(s)).view(np.uint8)
        self.tensors = {}
        for il in range(-1, s.n_layer):
            for tensor, shape in tensor_shapes(s, il).items():
                if tensor.endswith("ffn_perm"):
                    continue
                type_ = type_of(tensor, shape)
                rows = shape[0] if len(shape) > 1 else 1
                # One byte of memory, seen everywhere.
                data = np.broadcast_to(np.uint8(0), (rows, row_bytes(type_, shape[-1])))
                if tensor.endswith("ffn_freq"):
                    data = frequencies
                self.tensors[tensor] = Tensor(tensor, type_, shape, data)


def imagine(name: str, target: GGMLType = GGMLType.Q4_0) -> Model:
    """Return the model SHAPES[name] without weights; it cannot run."""
    file = ImaginedFile(name, target)
    config = model_config(file)
    return Model(file, config, load_weights(file, config))


def _types(
    target: GGMLType, predictor: GGMLType | None = None, head: GGMLType | None = None
) -> Callable[[str, tuple[int, ...]], GGMLType]:
    """Return what gives a tensor its type, by name and shape; None as in write_synthetic."""
    head = head or (GGMLType.Q6_K if target is GGMLType.Q4_0 else target)
    policy = Policy(target, output_type=target, predictor_type=predictor or target)

    def type_of(tensor: str, shape: tuple[int, ...]) -> GGMLType:
        if tensor == "output.weight":
            return head
        given = GGMLType.I32 if tensor.endswith("ffn_perm") else GGMLType.F32
        return policy.type_of(tensor, given, shape)

    return type_of


def tensor_shapes(s: Shape, il: int) -> dict[str, tuple[int, ...]]:
    """Return name -> shape of the tensors of layer `il`, or (-1) of those outside of layers."""
    is_falcon, vector, wide = s.arch == "falcon", (s.n_embd,), (s.n_ff, s.n_embd)
    q_dim, kv_dim, rank = s.n_head * s.head_dim, s.n_head_kv * s.head_dim, s.n_embd // 4

    def norm(name: str) -> dict[str, tuple[int, ...]]:
        return {f"{name}.{kind}": vector for kind in ("weight", "bias")[: 1 + is_falcon]}

    if il < 0:
        rows = (s.n_vocab, s.n_embd)
        return {"token_embd.weight": rows, **norm("output_norm"), "output.weight": rows}
    heads = {"q": q_dim, "k": kv_dim, "v": kv_dim}
    shapes = {
        **norm("attn_norm"),
        **norm("attn_norm_2" if is_falcon else "ffn_norm"),
        **{
            f"attn_{name}.weight": (n, s.n_embd)
            for name, n in ({"qkv": q_dim + 2 * kv_dim} if is_falcon else heads).items()
        },
        "attn_output.weight": (s.n_embd, q_dim),
        **({} if is_falcon else {"ffn_gate.weight": wide}),
        "ffn_up.weight": wide,
        "ffn_down_t.weight": wide,
        "fc1.weight": (rank, s.n_embd),
        "fc2.weight": (s.n_ff, rank),
        "ffn_perm": (s.n_ff,),
        "ffn_freq": (s.n_ff,),
    }
    return {f"blk.{il}.{name}": shape for name, shape in shapes.items()}


def _lifts(s: Shape) -> F32Array:
    """Return how far the mean lifts each neuron above 0, in standard deviations: [n_ff]."""
    normal, middle = NormalDist(), NormalDist().inv_cdf(FIRING) * sqrt(1 + SPREAD**2)
    hot_first = [normal.inv_cdf(1 - (i + 0.5) / s.n_ff) for i in range(s.n_ff)]
    return np.array([middle + SPREAD * x for x in hot_first], np.float32)


def _frequencies(lifts: F32Array) -> F32Array:
    """Return how often neurons fire that are lifted by so much: [1, n_ff]."""
    return np.array([[NormalDist().cdf(x) for x in lifts.tolist()]], np.float32)


class _Model:
    """Makes the rows of a model's tensors, each chunk from a seed of its own."""

    def __init__(self, s: Shape, seed: int, noise: float) -> None:
        self._s, self._seed, self._noise = s, seed, noise
        # Of length sqrt(n_embd), as h is. Alternating: a layer norm leaves it alone, and a part of
        # a row can be freed of it.
        self._mean = np.resize(np.array([1, -1], np.float32), s.n_embd)
        self._lift = _lifts(s)
        self._freq = _frequencies(self._lift)
        # Encoding Q6_K is slow: its rows are drawn from these blocks.
        blocks = self._rng("q6_k").standard_normal(
            (1024, BLOCK_SIZES[GGMLType.Q6_K][0]), np.float32
        )
        blocks *= np.float32(1 / sqrt(s.n_embd))
        self._blocks = encode_original(GGMLType.Q6_K, self._without_mean(blocks))

    def _rng(self, name: str, first: int = 0) -> np.random.Generator:
        return np.random.default_rng([self._seed, zlib.crc32(name.encode()), first])

    def _without_mean(self, x: F32Array) -> F32Array:
        """Take the mean direction out of rows, or of parts of rows of even length, in place."""
        mean = self._mean[: x.shape[1]]
        x -= (x @ mean / np.float32(x.shape[1]))[:, None] * mean
        return x

    def enter(self, il: int) -> None:
        """Make P [k, n_embd] and U [n_ff, k] of layer il; k = rank / 2, rows of length 1."""
        if il < 0:
            return
        n_embd, k = self._s.n_embd, self._s.n_embd // 8
        rng = self._rng(f"blk.{il}")
        # Every row of P makes cos(ANGLE) of the mean part of h, a row of U its sum times that.
        self._p = self._without_mean(rng.standard_normal((k, n_embd), np.float32))
        self._p *= np.float32(1 / sqrt(n_embd))
        self._p += self._mean / np.float32(n_embd)
        offset = self._lift * np.float32(tan(ANGLE) / k)  # mean of each row of U: [n_ff]
        self._u = rng.standard_normal((self._s.n_ff, k), np.float32)
        self._u -= self._u.mean(axis=1, keepdims=True)
        length = np.linalg.norm(self._u, axis=1)
        self._u *= (np.sqrt(1 - k * offset * offset) / length)[:, None]
        self._u += offset[:, None]

    def encoded(
        self, name: str, type_: GGMLType, shape: tuple[int, ...], rows: slice
    ) -> np.ndarray[Any, Any]:
        """Return rows of a tensor as the file has them."""
        rng, n = self._rng(name, rows.start), rows.stop - rows.start
        if type_ is GGMLType.I32:  # ffn_perm
            return rng.permutation(shape[0]).astype(np.int32)
        if type_ is GGMLType.Q6_K:
            drawn = (n, shape[1] // BLOCK_SIZES[type_][0])
            raw = self._blocks[rng.integers(0, len(self._blocks), drawn)]
            raw[..., -1] ^= rng.integers(0, 2, drawn, np.uint8) << np.uint8(7)  # the scale's sign
            return raw.reshape(n, -1)
        return encode_rows(type_, self._rows(name, (n, shape[-1]), rows, rng), name)

    def _rows(
        self, name: str, shape: tuple[int, int], rows: slice, rng: np.random.Generator
    ) -> F32Array:
        s, kind = self._s, name.removesuffix(".weight").rsplit(".", 1)[-1]
        if kind == "ffn_freq":
            return self._freq
        if "_norm" in name:
            return np.full(shape, 0 if kind == "bias" else 1, np.float32)
        if kind == "fc1":
            return np.concatenate([self._p, -self._p])[rows]
        if kind == "fc2":
            return np.concatenate([self._u[rows], -self._u[rows]], axis=1)
        x = rng.standard_normal(shape, np.float32)
        if kind == "token_embd":
            return x * np.float32(sin(ANGLE)) + self._mean * np.float32(cos(ANGLE))
        # Rows of length 1: what they make of elements of about 1 is about 1.
        x *= np.float32(1 / sqrt(shape[1]))
        if kind == "output":  # or the same few tokens would be the likeliest everywhere
            return self._without_mean(x)
        gain = GAIN / sqrt(2 * s.n_layer)
        if kind == "attn_output":
            x *= np.float32(gain)
        elif kind == "ffn_down_t":  # n_ff activations of about sin(ANGLE) * sqrt(ENERGY)
            x *= np.float32(gain / sin(ANGLE) / sqrt(ENERGY * s.n_ff / s.n_embd))
        elif kind == ("ffn_up" if s.arch == "falcon" else "ffn_gate"):
            x *= np.float32(self._noise)
            x += (self._u[rows] * np.float32(sqrt(1 - self._noise**2))) @ self._p
        return x


def _noise(target: GGMLType, predictor: GGMLType) -> float:
    """Return what the rounding of the decider, fc1 and fc2 to these types leaves of ERROR."""
    x = np.random.default_rng(0).standard_normal((16, 4096), np.float32)

    def variance(type_: GGMLType) -> float:
        return float(np.square(decode(type_, encode(type_, x)) - x).mean())

    return sqrt(max(0.0, ERROR**2 - variance(target) - 2 * variance(predictor)))


def _keys(name: str, s: Shape) -> dict[str, Value]:
    norm = "layer_norm_rms_epsilon" if ARCHITECTURES[s.arch].norm == "rms" else "layer_norm_epsilon"
    hyper: dict[str, int | float] = {
        "vocab_size": s.n_vocab,
        "context_length": 2048,
        "embedding_length": s.n_embd,
        "block_count": s.n_layer,
        "feed_forward_length": s.n_ff,
        "attention.head_count": s.n_head,
        "attention.head_count_kv": s.n_head_kv,
        "attention.key_length": s.head_dim,
        "attention.value_length": s.head_dim,
        f"attention.{norm}": 1e-5,
        "rope.dimension_count": s.head_dim,
        "rope.freq_base": 10000.0,
    }
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256))]
    pieces += [SPACE, *map(chr, range(33, 127))]
    pieces += [f"{SPACE}word{i}" for i in range(s.n_vocab - len(pieces))]
    types = np.full(s.n_vocab, NORMAL, np.int32)
    types[:3], types[3:259] = (UNKNOWN, CONTROL, CONTROL), BYTE
    return {
        "general.name": Value.of(f"synthetic-{name} (random weights)"),
        "general.description": Value.of(
            f"Random weights in the shape of a ReLU model, {name} with {s.n_layer} layers, to "
            "measure speed with: it knows nothing and writes nonsense."
        ),
        **{f"{s.arch}.{key}": Value.of(value) for key, value in hyper.items()},
        "powerinfer.ffn_activation": Value.of("relu"),
        "powerinfer.predictor_input": Value.of("normed"),
        "powerinfer.neuron_order": Value.of("hot-first"),
        "powerinfer.sparse_threshold": Value.of(-MARGIN * sin(ANGLE)),
        "tokenizer.ggml.model": Value.of("llama"),
        "tokenizer.ggml.pre": Value.of("default"),
        "tokenizer.ggml.tokens": Value(ValueType.ARRAY, pieces, ValueType.STRING),
        "tokenizer.ggml.scores": Value.of(-np.arange(s.n_vocab)),
        "tokenizer.ggml.token_type": Value(ValueType.ARRAY, types, ValueType.INT32),
    }


def verify(path: str | os.PathLike[str], tokens: int = 64) -> dict[str, Any]:
    """Run a file on random tokens and return what its FFNs do, a list with a number per layer.

    `fired`, `predicted`: shares of the neurons, for a token; `recall`: share of those firing that
    are predicted; `carriers`: share of the neurons, in the file's order, that do 80 % of the
    firing. `finite`: whether all logits are; `top_tokens`: how many tokens are the likeliest after
    some token. The errors of Engine.
    """
    with Engine(path, RunOptions(mode="predicted", context=tokens)) as engine:
        c = engine.config
        engine.watcher = watcher = RecallWatcher(c.n_layer, c.n_ff)
        logits = engine.logits(np.random.default_rng(1).integers(3, c.n_vocab, tokens).tolist())
    layers = watcher.results()
    totals = np.cumsum(watcher.firing, axis=1)  # [n_layer, n_ff]
    enough = totals >= 0.8 * totals[:, -1:]
    return {
        "fired": [r.firing_share for r in layers],
        "predicted": [r.predicted_share for r in layers],
        "recall": [r.recall for r in layers],
        "carriers": ((enough.argmax(axis=1) + 1) / c.n_ff).tolist(),
        "finite": bool(np.isfinite(logits).all()),
        "top_tokens": len(np.unique(logits.argmax(axis=1))),
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description="Write a model of a published shape with random weights."
    )
    parser.add_argument("shape", choices=SHAPES, metavar="SHAPE", help=", ".join(SHAPES))
    parser.add_argument("-o", "--outfile", type=Path, required=True, metavar="FILE")
    parser.add_argument("--type", choices=TARGETS, default="q4_0", help="default: q4_0")
    parser.add_argument("--predictor-type", choices=TARGETS, help="default: as --type")
    parser.add_argument("--head-type", choices=[*TARGETS, "q6_k"], help="default: q6_k under q4_0")
    parser.add_argument("--layers", type=int, metavar="N", help="only that many layers")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--verify", action="store_true", help="run it and print what its FFNs do")
    args = parser.parse_args()
    if args.seed < 0 or (args.layers is not None and args.layers < 1):
        parser.error("--layers must be at least 1, --seed at least 0")
    given = (args.predictor_type, args.head_type)
    predictor, head = (GGMLType[name.upper()] if name else None for name in given)
    target = TARGETS[args.type]
    try:
        write_synthetic(args.shape, args.outfile, target, predictor, head, args.layers, args.seed)
    except (PowerInferError, OSError) as error:
        parser.exit(1, f"{args.outfile}: {error}\n")
    if args.verify:
        for key, value in verify(args.outfile).items():
            numbers = [f"{x:.3f}" for x in value] if isinstance(value, list) else [value]
            print(f"{key}:", *numbers)


if __name__ == "__main__":
    main()
