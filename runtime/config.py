"""ModelConfig: what a model is, from its file's keys. RunOptions: how the user wants it run."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from .errors import ModelError, RequestError, shown
from .gguf import GGUFFile, ValueType

Mode = Literal["exact", "predicted", "dense"]
Isa = Literal["auto", "amx", "avx512vnni", "avx2", "generic"]
BackendName = Literal["auto", "numpy", "cpu", "cuda"]

# FFN activations. Of the first a neuron is exactly silent for most tokens:
#   relu; fatrelu(x) = x if x >= t else 0; drelu = relu(gate) * relu(up); relu2 = relu(x)^2
SPARSE_ACTIVATIONS = ("relu", "fatrelu", "drelu", "relu2")
DENSE_ACTIVATIONS = ("silu", "gelu")


@dataclass(frozen=True)
class Traits:
    """What all models of one GGUF architecture have in common."""

    norm: Literal["rms", "layer"]
    rope: Literal["norm", "neox", "none"]  # which elements of a head turn together
    is_parallel: bool  # attention and FFN both read the layer's input
    activations: tuple[str, str]  # without a key: of sparse files, of dense ones


ARCHITECTURES = {
    "llama": Traits("rms", "norm", False, ("relu", "silu")),
    "bamboo": Traits("rms", "norm", False, ("drelu", "drelu")),
    "falcon": Traits("layer", "neox", True, ("relu", "gelu")),
    "opt": Traits("layer", "none", False, ("relu", "relu")),
}
# Learned positions of OPT start at this row of their table (a leftover of fairseq's padding).
POSITION_OFFSET = 2


@dataclass(frozen=True)
class ModelConfig:
    """Hyper-parameters of a model, under the field's standard names."""

    arch: str
    name: str
    n_vocab: int
    n_embd: int
    n_ff: int
    n_layer: int
    n_head: int
    n_head_kv: int
    head_dim: int
    n_ctx_train: int
    traits: Traits
    norm_eps: float
    rope_dim: int  # leading dimensions of a head that are rotated
    rope_freq_base: float
    rope_linear_factor: float  # positions are divided by it
    activation: str
    activation_threshold: float  # of fatrelu
    sparse_threshold: float  # a neuron is predicted when its score >= this
    layer_thresholds: tuple[float, ...] | None
    predictor_input: Literal["residual", "normed"]
    neuron_order: Literal["original", "hot-first"]
    target_recall: float | None  # what thresholds were calibrated for; None: not known

    def threshold(self, il: int) -> float:
        """Return the predictor threshold of layer `il`."""
        return self.layer_thresholds[il] if self.layer_thresholds else self.sparse_threshold


def model_config(file: GGUFFile) -> ModelConfig:
    """Read a ModelConfig from a model file.

    FileFormatError for missing or absurd keys, ModelError for a model that is not supported.
    """
    arch = file.get_str("general.architecture")
    if arch not in ARCHITECTURES:
        raise ModelError(
            f"{file.path} has the architecture {shown(arch)}; supported: {', '.join(ARCHITECTURES)}"
        )
    n_embd = file.get_int(f"{arch}.embedding_length", low=1, high=1 << 20)
    n_head = file.get_int(f"{arch}.attention.head_count", low=1, high=1 << 14)
    traits = ARCHITECTURES[arch]
    head_dim = file.get_int(f"{arch}.attention.key_length", max(1, n_embd // n_head), 1, 1 << 14)
    n_layer = file.get_int(f"{arch}.block_count", low=1, high=1 << 14)
    embedding = file.tensors.get("token_embd.weight")
    if embedding is None:
        raise ModelError(f"{file.path} has no tensor token_embd.weight: it is not a whole model")

    scaling = file.get_str(f"{arch}.rope.scaling.type", "none")
    if scaling not in ("none", "linear"):
        raise ModelError(f"{file.path} uses rope scaling {shown(scaling)}, which is not supported")

    # Files of the original carry no activation key: they are ReLU models, recognised by the
    # transposed down projection that only such files have.
    is_sparse_file = "blk.0.ffn_down_t.weight" in file.tensors
    default = traits.activations[0 if is_sparse_file else 1]
    activation = file.get_str("powerinfer.ffn_activation", default)
    if activation not in SPARSE_ACTIVATIONS + DENSE_ACTIVATIONS:
        raise ModelError(
            f"{file.path} uses the activation {shown(activation)}, which is not supported"
        )

    thresholds = file.get_array("powerinfer.layer_thresholds", [ValueType.FLOAT32])
    if thresholds is not None and len(thresholds) != n_layer:
        raise ModelError(f"{file.path} has {len(thresholds)} layer thresholds, {n_layer} layers")
    predictor_input = file.get_str("powerinfer.predictor_input", "residual")
    neuron_order = file.get_str("powerinfer.neuron_order", "original")
    if predictor_input not in ("residual", "normed"):
        raise ModelError(
            f"{file.path}: unknown powerinfer.predictor_input {shown(predictor_input)}"
        )
    if neuron_order not in ("original", "hot-first"):
        raise ModelError(f"{file.path}: unknown neuron_order {shown(neuron_order)}")

    config = ModelConfig(
        arch=arch,
        name=file.get_str("general.name", file.path.stem),
        n_vocab=embedding.shape[0],
        n_embd=n_embd,
        n_ff=file.get_int(f"{arch}.feed_forward_length", low=1, high=1 << 22),
        n_layer=n_layer,
        n_head=n_head,
        n_head_kv=file.get_int(f"{arch}.attention.head_count_kv", n_head, 1, 1 << 14),
        head_dim=head_dim,
        n_ctx_train=_trained_context(file, arch),
        traits=traits,
        norm_eps=(
            file.get_float(f"{arch}.attention.layer_norm_rms_epsilon")
            if traits.norm == "rms"
            else file.get_float(f"{arch}.attention.layer_norm_epsilon", 1e-5)
        ),
        rope_dim=(
            0
            if traits.rope == "none"
            else file.get_int(f"{arch}.rope.dimension_count", head_dim, 2, head_dim)
        ),
        rope_freq_base=file.get_float(f"{arch}.rope.freq_base", 10000.0),
        rope_linear_factor=(
            file.get_float(f"{arch}.rope.scaling.factor") if scaling == "linear" else 1.0
        ),
        activation=activation,
        activation_threshold=file.get_float("powerinfer.ffn_activation_threshold", 0.0),
        sparse_threshold=file.get_float("powerinfer.sparse_threshold", 0.0),
        layer_thresholds=None if thresholds is None else tuple(float(t) for t in thresholds),
        predictor_input="normed" if predictor_input == "normed" else "residual",
        neuron_order="hot-first" if neuron_order == "hot-first" else "original",
        target_recall=(
            file.get_float("powerinfer.calibration.target_recall")
            if "powerinfer.calibration.target_recall" in file.metadata
            else None
        ),
    )
    target = config.target_recall
    if target is not None and not 0 < target < 1:
        raise ModelError(f"{file.path}: a target recall of {target:g} is not between 0 and 1")
    if config.n_head % config.n_head_kv:
        raise ModelError(f"{file.path}: {n_head} heads do not share {config.n_head_kv} kv heads")
    if activation == "fatrelu" and config.activation_threshold <= 0:
        raise ModelError(f"{file.path}: fatrelu needs a threshold above 0")
    if config.rope_dim % 2 or not config.rope_freq_base > 0 or not config.rope_linear_factor > 0:
        raise ModelError(f"{file.path}: the rope parameters make no sense")
    return config


def _trained_context(file: GGUFFile, arch: str) -> int:
    context = file.get_int(f"{arch}.context_length", low=1, high=1 << 30)
    positions = file.tensors.get("position_embd.weight")
    if positions is None:
        return context
    # The original counts the table's rows, offset and all, as context.
    return min(context, max(positions.shape[0] - POSITION_OFFSET, 0))


MAX_THREADS = 512
MAX_CONTEXT = 1 << 22
MAX_SEQUENCES = 256
MAX_GPU = 63
MAX_GIB = 10**6  # of GPU memory


@dataclass(frozen=True)
class RunOptions:
    """How to run a model; every command line and `powerinfer.open` fill one of these.

    RequestError for a value that makes no sense.
    """

    threads: int | None = None  # None: one per physical core
    context: int | None = None  # tokens; None: min(trained context, 4096)
    mode: Mode | None = None  # None: predicted if the file has predictors, else exact
    backend: BackendName = "auto"  # auto: cuda if there is a GPU
    kv_type: Literal["auto", "f32", "f16"] = "auto"  # auto: f32 for F32 weights, else f16
    sparse_threshold: float | None = None  # overrides the file's
    vram_budget: float | None = None  # GiB; None: what is free, less a reserve; 0: CPU only
    gpu: int | None = 0  # which one; None: no GPU
    mmap: bool = True  # False: read the file into memory of our own
    mlock: bool = False  # keep the file's pages in memory
    adapt: bool = True  # generate() moves calibrated thresholds with the text (runtime/adapt.py)
    isa: Isa = "auto"  # instructions of the kernels
    sequences: int = 1  # texts that are read or written at the same time
    chunk: int = 512  # most tokens in one forward pass

    def __post_init__(self) -> None:
        def check(name: str, ok: bool, want: str) -> None:
            if not ok:
                raise RequestError(f"{name} is {getattr(self, name)!r}; it must be {want}")

        def whole(value: object, low: int, high: int) -> bool:
            return isinstance(value, int) and low <= value <= high

        threads, context = self.threads, self.context
        check("threads", threads is None or whole(threads, 1, MAX_THREADS), "1 to 512")
        check("context", context is None or whole(context, 1, MAX_CONTEXT), "1 to 4194304")
        modes, types = get_args(Mode), ("auto", "f32", "f16")
        backends = get_args(BackendName)
        check("mode", self.mode is None or self.mode in modes, f"one of {', '.join(modes)}")
        check("backend", self.backend in backends, f"one of {', '.join(backends)}")
        check("kv_type", self.kv_type in types, f"one of {', '.join(types)}")
        threshold, budget = self.sparse_threshold, self.vram_budget
        is_number = isinstance(threshold, int | float) and threshold == threshold
        check("sparse_threshold", threshold is None or is_number, "a number")
        is_size = isinstance(budget, int | float) and 0 <= budget <= MAX_GIB
        check("vram_budget", budget is None or is_size, "0 to 1000000 GiB")
        check(
            "gpu", self.gpu is None or whole(self.gpu, 0, MAX_GPU), "the number of a GPU, or None"
        )
        for name in ("adapt", "mmap", "mlock"):
            check(name, isinstance(getattr(self, name), bool), "True or False")
        isas = get_args(Isa)
        check("isa", self.isa in isas, f"one of {', '.join(isas)}")
        check("sequences", whole(self.sequences, 1, MAX_SEQUENCES), "1 to 256")
        check("chunk", whole(self.chunk, 1, MAX_CONTEXT), "at least 1")
