"""Hyper-parameters of a checkpoint: config.json, read through an architecture's names."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..runtime.config import DENSE_ACTIVATIONS, SPARSE_ACTIVATIONS
from ..runtime.errors import ModelError, shown
from .architectures import FALCON, Architecture

FATRELU_THRESHOLD = 0.01  # ProSparse's, where the config does not say


@dataclass(frozen=True)
class Hyper:
    """What a checkpoint is, under the field's standard names."""

    n_embd: int
    n_ff: int
    n_layer: int
    n_head: int
    n_head_kv: int
    head_dim: int
    n_ctx: int
    n_vocab: int
    eps: float
    is_tied: bool
    activation: str
    activation_threshold: float | None  # of fatrelu
    warnings: tuple[str, ...]


def read_hyper(
    folder: Path,
    name: str,
    architecture: Architecture,
    config: dict[str, Any],
    dense: bool,
    activation: str | None,
    has_predictors: bool,
) -> Hyper:
    """Read and check the hyper-parameters of the checkpoint in `folder`.

    `name`: the architecture's name in config.json; `activation`: what the user says, over what
    the config says. ModelError names the parameter that is wrong.
    """
    where = f"{folder}/config.json"

    def value_of(key: str) -> tuple[str, Any]:
        names = architecture.keys.get(key, ())
        for candidate in names:
            if config.get(candidate) is not None:
                return candidate, config[candidate]
        return (names[0] if names else key), None

    def number(key: str, default: int | None = None, high: int = 1 << 20) -> int:
        name, value = value_of(key)
        value = default if value is None else value
        if not isinstance(value, int) or isinstance(value, bool) or not 0 < value <= high:
            raise ModelError(f"{where}: {name} is {shown(value)}")
        return value

    n_embd, n_head = number("n_embd"), number("n_head", high=1 << 14)
    n_head_kv = number("n_head_kv", n_head)
    if architecture is FALCON and not config.get("new_decoder_architecture"):
        # The 7B kind says it in another way, and may carry a number that does not count.
        n_head_kv = 1 if config.get("multi_query", True) else n_head
    head_dim = number("head_dim", n_embd // n_head, high=1 << 14)
    if n_head % n_head_kv or (architecture.gguf != "opt" and head_dim % 2):
        raise ModelError(f"{where}: the numbers of heads make no sense")
    eps_name, eps = value_of("eps")
    eps = (1e-6 if eps_name == "rms_norm_eps" else 1e-5) if eps is None else eps
    if not isinstance(eps, float) or not 0 < eps < 1:
        raise ModelError(f"{where}: {eps_name} is {shown(eps)}")

    n_ctx = number("n_ctx", 2048, high=1 << 30)
    window = config.get("sliding_window")
    warnings = []
    if isinstance(window, int) and 0 < window < n_ctx and config.get("use_sliding_window", True):
        # Within the window it makes no difference; beyond, attention would have to forget.
        warnings.append(f"context limited to the sliding window of {window} tokens")
        n_ctx = window
    chosen, assumed = _activation(folder, name, architecture, config, activation, has_predictors)
    if assumed:
        warnings.append(f"{where} names no activation: assuming {chosen}")
    if chosen not in SPARSE_ACTIVATIONS and not dense:
        raise ModelError(
            f"{folder} uses the activation {chosen!r}: its neurons never fall silent, so there "
            "is no sparsity to use; convert it with --dense to run it as an ordinary model"
        )
    threshold = None
    if chosen == "fatrelu":
        threshold = config.get("hidden_act_param", FATRELU_THRESHOLD)
        if not isinstance(threshold, float) or not 0 < threshold < float("inf"):
            raise ModelError(f"{where}: hidden_act_param is {shown(threshold)}")
    return Hyper(
        n_embd=n_embd,
        n_ff=number("n_ff", 4 * n_embd if architecture is FALCON else None, high=1 << 22),
        n_layer=number("n_layer", high=1 << 14),
        n_head=n_head,
        n_head_kv=n_head_kv,
        head_dim=head_dim,
        n_ctx=n_ctx,
        n_vocab=number("n_vocab", high=1 << 24),
        eps=eps,
        is_tied=bool(config.get("tie_word_embeddings", architecture.is_tied)),
        activation=chosen,
        activation_threshold=threshold,
        warnings=tuple(warnings),
    )


def _activation(
    folder: Path,
    name: str,
    architecture: Architecture,
    config: dict[str, Any],
    override: str | None,
    has_predictors: bool,
) -> tuple[str, bool]:
    """Return the FFN activation, and whether it is only assumed."""
    value = config.get(architecture.activation_key)
    activation = override or value or architecture.default_activation
    assumed = False
    if activation is None:
        if not has_predictors:
            raise ModelError(
                f"{folder}/config.json does not say which activation the model has: add "
                "--activation relu if it is a ReLU model (or --activation gelu --dense)"
            )
        activation, assumed = "relu", True  # nobody trains predictors for anything else
    activation = str(activation)
    if name == "BambooForCausalLM" and activation == "relu":
        activation = "drelu"
    if activation not in SPARSE_ACTIVATIONS + DENSE_ACTIVATIONS:
        raise ModelError(
            f"{folder} uses the activation {shown(activation)}, which is not supported"
        )
    return activation, assumed
