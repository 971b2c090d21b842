"""What each Hugging Face architecture calls things, as data."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from ..runtime.errors import ModelError
from ..runtime.formats import F32Array

# How a tensor changes on its way into the file. `heads_q` / `heads_k`: rows of each head are
# reordered from Hugging Face's rope (two halves) to GGUF's (pairs). `transpose`: one neuron a row.
Transform = Literal["none", "heads_q", "heads_k", "transpose"]


@dataclass(frozen=True)
class Architecture:
    """Names of one architecture: Hugging Face's tensor name -> (GGUF's, transform).

    `{i}` stands for the layer. Names in `ignored` are buffers that nothing needs.
    """

    gguf: str
    tensors: Mapping[str, tuple[str, Transform]]
    ignored: tuple[str, ...] = ()


_LAYER = "model.layers.{i}."
LLAMA = Architecture(
    gguf="llama",
    tensors={
        "model.embed_tokens.weight": ("token_embd.weight", "none"),
        "model.norm.weight": ("output_norm.weight", "none"),
        "lm_head.weight": ("output.weight", "none"),
        _LAYER + "input_layernorm.weight": ("blk.{i}.attn_norm.weight", "none"),
        _LAYER + "self_attn.q_proj.weight": ("blk.{i}.attn_q.weight", "heads_q"),
        _LAYER + "self_attn.q_proj.bias": ("blk.{i}.attn_q.bias", "heads_q"),
        _LAYER + "self_attn.k_proj.weight": ("blk.{i}.attn_k.weight", "heads_k"),
        _LAYER + "self_attn.k_proj.bias": ("blk.{i}.attn_k.bias", "heads_k"),
        _LAYER + "self_attn.v_proj.weight": ("blk.{i}.attn_v.weight", "none"),
        _LAYER + "self_attn.v_proj.bias": ("blk.{i}.attn_v.bias", "none"),
        _LAYER + "self_attn.o_proj.weight": ("blk.{i}.attn_output.weight", "none"),
        _LAYER + "self_attn.o_proj.bias": ("blk.{i}.attn_output.bias", "none"),
        _LAYER + "post_attention_layernorm.weight": ("blk.{i}.ffn_norm.weight", "none"),
        _LAYER + "mlp.gate_proj.weight": ("blk.{i}.ffn_gate.weight", "none"),
        _LAYER + "mlp.gate_proj.bias": ("blk.{i}.ffn_gate.bias", "none"),
        _LAYER + "mlp.up_proj.weight": ("blk.{i}.ffn_up.weight", "none"),
        _LAYER + "mlp.up_proj.bias": ("blk.{i}.ffn_up.bias", "none"),
        _LAYER + "mlp.down_proj.weight": ("blk.{i}.ffn_down_t.weight", "transpose"),
        _LAYER + "mlp.down_proj.bias": ("blk.{i}.ffn_down_t.bias", "none"),
    },
    ignored=(_LAYER + "self_attn.rotary_emb.inv_freq", "model.rotary_emb.inv_freq"),
)

ARCHITECTURES = {"LlamaForCausalLM": LLAMA}


@dataclass(frozen=True)
class Rope:
    """Rotary parameters of a checkpoint; `factors` divide the frequencies (llama3)."""

    freq_base: float
    linear_factor: float | None
    factors: F32Array | None


def read_rope(config: Mapping[str, Any], head_dim: int) -> Rope:
    """Read rope parameters in both spellings of transformers (4: flat, 5: nested).

    ModelError for a scaling method other than linear and llama3.
    """
    nested = config.get("rope_parameters") or config.get("rope_scaling") or {}
    base = float(nested.get("rope_theta", config.get("rope_theta", 10000.0)))
    kind = nested.get("rope_type", nested.get("type", "default"))
    if kind == "default":
        return Rope(base, None, None)
    if kind == "linear":
        return Rope(base, float(nested["factor"]), None)
    if kind != "llama3":
        raise ModelError(
            f"the checkpoint uses rope scaling {kind!r}; linear and llama3 are supported"
        )
    # As in transformers' _compute_llama3_parameters: low frequencies are slowed down by `factor`,
    # high ones kept, those between blended.
    factor, context = float(nested["factor"]), float(nested["original_max_position_embeddings"])
    low, high = float(nested["low_freq_factor"]), float(nested["high_freq_factor"])
    frequencies = base ** (-np.arange(0, head_dim, 2, dtype=np.float64) / head_dim)
    wavelengths = 2 * math.pi / frequencies
    blend = np.clip((context / wavelengths - low) / (high - low), 0, 1)
    return Rope(base, None, (1 / ((1 - blend) / factor + blend)).astype(np.float32))
