"""What a model weighs: bytes on the device, and bytes that a token reads, layer by layer.

Everything on the device is a piece of one slab, each array and each plane of a matrix on its own,
and what is counted here is what they occupy there, padding included. Neurons go there in blocks.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from .cache import PAGE
from .config import Mode, ModelConfig
from .cuda.device import ALIGNMENT, aligned
from .errors import ModelError
from .formats import QK, GGMLType
from .gguf import GGUFFile, Tensor, ValueType
from .step import COUNTS
from .weights import Layer, Model, Weights

BLOCK = 64  # neurons that are moved to the device, and back, together
# Without a profile in the file: what ReLU models of this kind do (ProSparse, PowerInfer).
FIRING, PREDICTED = 0.10, 0.13  # shares of the neurons

# Device type -> weights in a block, bytes of it in each plane (quants; scales).
_PLANES: dict[GGMLType, tuple[int, tuple[int, ...]]] = {
    GGMLType.Q4_0: (32, (16, 2)),
    GGMLType.Q8_0: (32, (32, 2)),
    GGMLType.Q6_K: (256, (192, 20)),  # 16 scales, d, and 2 bytes that align the next block
    GGMLType.F16: (1, (2,)),
    GGMLType.F32: (1, (4,)),
}

# The GPU's own needs; estimates until they are measured on one.
CONTEXT_BYTES = 400 << 20  # the CUDA context: not ours to place, so outside of the budget
GRAPH_BYTES = 256 << 10  # of captured graphs, for each layer
WINDOW = 16 << 20  # bytes of a window for streaming cold neurons; there are two
DOWN_SPLITS = 32  # common.cuh, N_SPLITS
ATTENTION_HEADS, ATTENTION_BLOCKS = 8, 256  # attention.cu: of a block; blocks for one token


def device_type(type_: GGMLType) -> GGMLType:
    """Return what a tensor of a file is on the device: exactly the same numbers."""
    if type_ is GGMLType.Q5_0:
        return GGMLType.Q8_0
    return type_ if type_ in _PLANES else GGMLType.F32


def planes(type_: GGMLType, rows: int, cols: int) -> tuple[int, ...]:
    """Return the bytes of each plane of a matrix on the device, without padding."""
    block, sizes = _PLANES[device_type(type_)]
    return tuple(rows * cols // block * size for size in sizes)


def device_bytes(type_: GGMLType, rows: int, cols: int) -> int:
    """Return the bytes that a matrix takes on the slab."""
    return sum(aligned(n) for n in planes(type_, rows, cols))


def attention_blocks(c: ModelConfig) -> int:
    """Return in how many blocks the heads of a token on its own are, in a split (attention.cu)."""
    return c.n_head_kv * -(-c.n_head // c.n_head_kv // ATTENTION_HEADS)


def attention_splits(c: ModelConfig) -> int:
    """Return into how many parts at most the context of a token on its own is cut (attention.cu).

    They follow from the model alone, so that nothing else changes the order of its sums.
    """
    return min(max(ATTENTION_BLOCKS // attention_blocks(c), 1), 32)


def neuron_tensors(layer: Layer) -> list[Tensor]:
    """Return the matrices whose rows are neurons, which may be on either side."""
    tensors = (layer.decider, layer.up, layer.down_t, layer.down)
    return [tensor for tensor in tensors if tensor is not None]


def predictor_tensors(layer: Layer) -> list[Tensor]:
    """Return the tensors of the predictor."""
    return [t for t in (layer.fc1, layer.fc2, layer.fc2_bias) if t is not None]


def neuron_bytes(layer: Layer, n_blocks: int) -> int:
    """Return what blocks of neurons take on the slab, without a standard down."""
    return int(_neuron_bytes(layer, np.array([n_blocks]))[0])


def window_bytes(layer: Layer, n_blocks: int) -> int:
    """Return what a window takes for blocks of neurons to pass through: they and their numbers."""
    return neuron_bytes(layer, n_blocks) + aligned(4 * n_blocks)


def _neuron_bytes(layer: Layer, n_blocks: np.ndarray) -> np.ndarray:
    """Return neuron_bytes() of several numbers of blocks."""
    total = np.zeros(len(n_blocks), np.int64)
    for tensor in neuron_tensors(layer):
        if tensor is not layer.down:
            for n in planes(tensor.type, BLOCK, tensor.cols):
                total += -(-n_blocks * n // ALIGNMENT) * ALIGNMENT
    return total


def attention_tensors(layer: Layer) -> list[Tensor]:
    """Return all other tensors: attention, norms, biases of the FFN (for all neurons at once).

    A norm that serves both attention and FFN (Falcon) is there twice, as on the device.
    """
    others = {id(t) for t in (*neuron_tensors(layer), *predictor_tensors(layer))}
    return [t for t in vars(layer).values() if t is not None and id(t) not in others]


def workspace(
    w: Weights, c: ModelConfig, mode: Mode, n_tok: int, n_out: int, n_seq: int, context: int
) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Return the arrays on the device beside weights and cache: name -> (dtype, shape).

    They are Step, Buffers and what kernels hand to each other, for passes of up to `n_tok` tokens
    of `n_seq` texts in contexts of `context`, and `n_out` logits at a time.
    """
    is_predicted = mode == "predicted"
    ranks = (layer.fc1.rows for layer in w.layers if layer.fc1 is not None and is_predicted)
    rank, q_dim, kv_dim = max(ranks, default=0), c.n_head * c.head_dim, c.n_head_kv * c.head_dim
    split = (n_seq, c.n_head, attention_splits(c))  # of a text that has one token in a pass
    neurons = -(-c.n_ff // BLOCK) * BLOCK
    arrays: dict[str, tuple[str, tuple[int, ...]]] = {
        "step": ("i4", (2 + 3 * n_tok + n_out,)),
        "pages": ("i4", (n_seq, -(-context // PAGE))),
        "thresholds": ("f4", (n_seq, c.n_layer)),
        "rope": ("f4", (context, 2, c.rope_dim // 2)),
        "x": ("f4", (n_tok, c.n_embd)),
        "normed": ("f4", (n_tok, c.n_embd)),  # what q, k, v are made of; and the logits
        "qkv": ("f4", (n_tok, q_dim + 2 * kv_dim)),
        "attention_sums": ("f4", (*split, c.head_dim)),
        "attention_peaks": ("f4", split),
        "attention_totals": ("f4", split),
        "attention_tickets": ("i4", (n_seq, attention_blocks(c))),
        "a": ("f4", (n_tok, q_dim)),
        "h": ("f4", (n_tok, c.n_embd)),
        "hidden": ("f4", (n_tok, rank)),  # of the predictor
        "scores": ("f4", (n_tok, c.n_ff if is_predicted else 0)),
        "mask": ("u1", (n_tok, c.n_ff)),
        "list": ("i4", (n_tok, c.n_ff)),  # of the resident neurons
        "listed": ("i4", (n_tok,)),  # how many
        "every_slot": ("i4", (neurons // BLOCK,)),  # zeros: a table of slots that lacks none
        "act": ("f4", (n_tok, neurons)),
        # How often neurons of a block have been predicted.
        "heat": ("u4", (c.n_layer if is_predicted else 0, neurons // BLOCK)),
        "fired": ("u1", (n_tok, c.n_ff)),
        "down_parts": ("f4", (max(DOWN_SPLITS, n_tok), c.n_embd)),
        "logits": ("f4", (n_out, c.n_vocab)),
        "counted": ("i8", (c.n_layer, len(COUNTS))),
    }
    # What weights in integers meet: int8, a scale and a sum for each block of 32.
    cols = {"normed": c.n_embd, "a": q_dim, "h": c.n_embd, "hidden": rank}
    if is_predicted and c.predictor_input == "residual":
        cols["x"] = c.n_embd
    if not all(layer.down is None for layer in w.layers):
        cols["act"] = c.n_ff
    for name, n in cols.items():
        blocks = -(-n // QK)
        arrays |= {
            f"{name}_q": ("i1", (n_tok, n)),
            f"{name}_d": ("f4", (n_tok, blocks)),
            f"{name}_s": ("i4", (n_tok, blocks)),
        }
    return arrays


def workspace_bytes(arrays: dict[str, tuple[str, tuple[int, ...]]]) -> int:
    """Return the bytes of workspace() on the slab."""
    sizes = (np.dtype(kind).itemsize * int(np.prod(shape)) for kind, shape in arrays.values())
    return sum(map(aligned, sizes))


@dataclass(frozen=True, eq=False)
class LayerSizes:
    """One layer; arrays have an element for 0, 1, ... all steps of neurons on the device.

    A step is `step` blocks: one where neurons are stored hot-first, else all of them.
    """

    step: int
    n_blocks: int
    dense: int  # bytes on the device: all but neurons and cache, tables of slots and blocks too
    cache: int  # bytes on the device: K and V
    hot: np.ndarray  # int64: bytes on the device of the first steps
    hot_read: np.ndarray  # float64: what a token reads of these, on average, on the device
    cold_read: np.ndarray  # float64: what it reads of the others, on the host
    served: np.ndarray  # float64: firing neurons among the first steps, on average
    attention_read: int  # bytes that a token reads on the device
    predictor_read: int
    host_read: int  # the two, on the host


@dataclass(frozen=True, eq=False)
class ModelSizes:
    """All that a placement depends on, but the machine; bytes."""

    name: str
    mode: Mode
    context: int  # tokens of each text
    is_parallel: bool  # attention and FFN of a layer do not wait for each other
    is_profiled: bool  # whether the file says who fires; else FIRING and PREDICTED are assumed
    layers: tuple[LayerSizes, ...]
    cache_row: int  # of a layer's cache, for each token in it
    head: int  # output and norm
    head_read: int
    host_head_read: int
    embedding: int  # of tokens, unless the output is the same, and of positions
    workspace: int
    graphs: int
    windows: int  # for streaming cold rows; not needed where there are none


def model_sizes(
    model: Model,
    mode: Mode,
    context: int,
    f32_cache: bool = False,
    n_seq: int = 1,
    n_tok: int = 512,
    n_out: int = 32,
) -> ModelSizes:
    """Measure a model that is to run with `n_seq` texts of `context` tokens, `n_tok` in a pass.

    ModelError for a calibration record that makes no sense.
    """
    c, w = model.config, model.weights
    factors = _predicted_per_firing(model.file, c.n_layer)
    tables = [model.file.tensors.get(f"blk.{il}.ffn_freq") for il in range(c.n_layer)]
    cache_row = 2 * c.n_head_kv * c.head_dim * (4 if f32_cache else 2)
    cache = 2 * aligned(n_seq * -(-context // PAGE) * PAGE * cache_row // 2)
    layers = []
    for layer, table, factor in zip(w.layers, tables, factors, strict=True):
        firing = np.full(c.n_ff, FIRING) if table is None else table.numpy().astype(np.float64)
        is_sorted = table is not None and c.neuron_order == "hot-first"
        layers.append(_layer_sizes(c, layer, mode, cache, firing, factor, is_sorted))
    head = [t for t in (w.output, w.output_norm, w.output_norm_bias) if t is not None]
    embedding = 0 if w.embd is w.output else device_bytes(w.embd.type, w.embd.rows, w.embd.cols)
    if w.positions is not None:
        embedding += device_bytes(GGMLType.F32, w.positions.rows, w.positions.cols)
    # A quarter of a layer at most, but room for a block of neurons.
    window = max(min(WINDOW, int(la.hot[-1]) // 4) for la in layers)
    window = max(window, *(window_bytes(layer, 1) for layer in w.layers))
    return ModelSizes(
        name=c.name,
        mode=mode,
        context=context,
        is_parallel=c.traits.is_parallel,
        is_profiled=all(table is not None for table in tables),
        layers=tuple(layers),
        cache_row=cache_row,
        head=_allocated(head),
        head_read=_read(head),
        host_head_read=sum(t.nbytes for t in head),
        embedding=embedding,
        workspace=workspace_bytes(workspace(w, c, mode, n_tok, n_out, n_seq, context)),
        graphs=c.n_layer * GRAPH_BYTES,
        windows=2 * aligned(window),
    )


def _layer_sizes(
    c: ModelConfig,
    layer: Layer,
    mode: Mode,
    cache: int,
    firing: np.ndarray,
    factor: float,
    is_sorted: bool,
) -> LayerSizes:
    """Measure a layer whose neurons fire with these probabilities [n_ff]."""
    attention = attention_tensors(layer)
    predictor = predictor_tensors(layer) if mode == "predicted" else []
    n_blocks = -(-c.n_ff // BLOCK)
    step = 1 if is_sorted and layer.down_t is not None else n_blocks
    slots = np.arange(0, n_blocks + 1, step, dtype=np.int64)
    first = np.minimum(slots * BLOCK, c.n_ff)  # neurons in the first steps
    hot = _neuron_bytes(layer, slots)
    on_device, on_host = np.zeros(c.n_ff), np.zeros(c.n_ff)  # bytes read of a neuron
    for tensor, share in _shares(c, layer, mode, firing, factor):
        if tensor is layer.down:
            hot[1:] += device_bytes(tensor.type, tensor.rows, tensor.cols)
        on_device += share * (sum(planes(tensor.type, tensor.rows, tensor.cols)) / c.n_ff)
        on_host += share * (tensor.nbytes / c.n_ff)

    def total(x: np.ndarray) -> np.ndarray:
        return np.concatenate([[0.0], np.cumsum(x)])[first]

    return LayerSizes(
        step=step,
        n_blocks=n_blocks,
        dense=_allocated(attention + predictor) + 2 * aligned(4 * n_blocks),
        cache=cache,
        hot=hot,
        hot_read=total(on_device),
        cold_read=total(on_host)[-1] - total(on_host),
        served=total(firing),
        attention_read=_read(attention),
        predictor_read=_read(predictor),
        host_read=sum(t.nbytes for t in attention + predictor),
    )


def _shares(
    c: ModelConfig, layer: Layer, mode: Mode, firing: np.ndarray, factor: float
) -> list[tuple[Tensor, np.ndarray]]:
    """Return how likely a token reads each neuron's part [n_ff] of neuron_tensors().

    The decider's row is read where the neuron is predicted (exact: always), the others' where the
    decider fires. With drelu that is more often than the neuron does, which is what the file says:
    taken for as often as it is predicted.
    """
    every = np.ones(c.n_ff)
    predicted = np.minimum(firing * factor, 1.0)
    decider = predicted if mode == "predicted" else every
    up = predicted if c.activation == "drelu" else firing
    if mode == "dense":
        up = firing = every
    parts = (
        (layer.decider, decider),
        (layer.up, up),
        (layer.down_t, firing),
        (layer.down, firing),
    )
    return [(tensor, share) for tensor, share in parts if tensor is not None]


def _allocated(tensors: Sequence[Tensor]) -> int:
    return sum(device_bytes(t.type, t.rows, t.cols) for t in tensors)


def _read(tensors: Sequence[Tensor]) -> int:
    return sum(sum(planes(t.type, t.rows, t.cols)) for t in tensors)


def _predicted_per_firing(file: GGUFFile, n_layer: int) -> list[float]:
    """Return how many neurons of each layer are predicted for one that fires."""
    predicted, fires = (
        calibrated_share(file, name, n_layer) for name in ("predicted_share", "firing_share")
    )
    default = PREDICTED / FIRING
    if predicted is None or fires is None:
        return [default] * n_layer
    pairs = zip(predicted.tolist(), fires.tolist(), strict=True)
    return [p / f if p and f else default for p, f in pairs]


def calibrated_share(file: GGUFFile, name: str, n_layer: int) -> np.ndarray | None:
    """Return an array of the calibration record, a share for each layer; None: not recorded.

    ModelError if it is something else.
    """
    key = f"powerinfer.calibration.{name}"
    values = file.get_array(key, [ValueType.FLOAT32, ValueType.FLOAT64])
    if values is None:
        return None
    # The comparisons are false for NaN too.
    if len(values) != n_layer or not ((values >= 0) & (values <= 1)).all():
        raise ModelError(f"{file.path}: {key} is not {n_layer} numbers from 0 to 1")
    return np.asarray(values, np.float64)
