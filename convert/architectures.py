"""What each Hugging Face architecture calls things, as data."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np

from ..runtime.errors import ModelError, shown
from ..runtime.formats import F32Array

# How a tensor changes on its way into the file. `heads_q` / `heads_k`: rows of each head are
# reordered from Hugging Face's rope (two halves) to GGUF's (pairs). `groups`: Falcon's fused
# q, k, v, from one group of heads after the other to all q, all k, all v. `transpose`: one neuron
# a row.
Transform = Literal["none", "heads_q", "heads_k", "groups", "transpose"]


@dataclass(frozen=True)
class Architecture:
    """Names of one Hugging Face architecture, as data.

    `tensors`: its tensor name -> (GGUF's, transform), `{i}` stands for the layer; biases and
    names in `optional` may be missing, those in `ignored` are not needed. `keys`: our name of a
    hyper-parameter -> its names in config.json, the first that is there counts. `aliases`: old
    prefixes of tensor names -> today's.
    """

    gguf: str
    tensors: Mapping[str, tuple[str, Transform]]
    keys: Mapping[str, tuple[str, ...]]
    activation_key: str
    default_activation: str | None  # what a config means that names none; None: nobody knows
    is_tied: bool  # unless config.json says otherwise
    ignored: tuple[str, ...] = ()
    optional: tuple[str, ...] = ()
    aliases: Mapping[str, str] = field(default_factory=dict)


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
    keys={
        "n_embd": ("hidden_size",),
        "n_ff": ("intermediate_size",),
        "n_layer": ("num_hidden_layers",),
        "n_head": ("num_attention_heads",),
        "n_head_kv": ("num_key_value_heads",),
        "head_dim": ("head_dim",),
        "n_ctx": ("max_position_embeddings",),
        "n_vocab": ("vocab_size",),
        "eps": ("rms_norm_eps",),
    },
    activation_key="hidden_act",
    default_activation="silu",
    is_tied=False,
    ignored=(_LAYER + "self_attn.rotary_emb.inv_freq", "model.rotary_emb.inv_freq"),
)

_LAYER = "transformer.h.{i}."
FALCON = Architecture(
    gguf="falcon",
    tensors={
        "transformer.word_embeddings.weight": ("token_embd.weight", "none"),
        "transformer.ln_f.weight": ("output_norm.weight", "none"),
        "transformer.ln_f.bias": ("output_norm.bias", "none"),
        "lm_head.weight": ("output.weight", "none"),
        # One norm (7B), or two (40B): GGUF calls the one that feeds the FFN attn_norm.
        _LAYER + "input_layernorm.weight": ("blk.{i}.attn_norm.weight", "none"),
        _LAYER + "input_layernorm.bias": ("blk.{i}.attn_norm.bias", "none"),
        _LAYER + "ln_mlp.weight": ("blk.{i}.attn_norm.weight", "none"),
        _LAYER + "ln_mlp.bias": ("blk.{i}.attn_norm.bias", "none"),
        _LAYER + "ln_attn.weight": ("blk.{i}.attn_norm_2.weight", "none"),
        _LAYER + "ln_attn.bias": ("blk.{i}.attn_norm_2.bias", "none"),
        _LAYER + "self_attention.query_key_value.weight": ("blk.{i}.attn_qkv.weight", "groups"),
        _LAYER + "self_attention.dense.weight": ("blk.{i}.attn_output.weight", "none"),
        _LAYER + "mlp.dense_h_to_4h.weight": ("blk.{i}.ffn_up.weight", "none"),
        _LAYER + "mlp.dense_4h_to_h.weight": ("blk.{i}.ffn_down_t.weight", "transpose"),
    },
    keys={
        "n_embd": ("hidden_size", "n_embed"),
        "n_ff": ("ffn_hidden_size",),
        "n_layer": ("num_hidden_layers", "n_layer"),
        "n_head": ("num_attention_heads", "n_head"),
        "n_head_kv": ("num_kv_heads", "n_head_kv"),
        "n_ctx": ("max_position_embeddings",),
        "n_vocab": ("vocab_size",),
        "eps": ("layer_norm_epsilon",),
    },
    activation_key="activation",
    default_activation=None,  # ReLU-Falcon's config may not say that it is one
    is_tied=True,
    ignored=("transformer.h.{i}.self_attention.rotary_emb.inv_freq",),
    optional=tuple(_LAYER + n + ".weight" for n in ("input_layernorm", "ln_mlp", "ln_attn")),
)

_LAYER = "model.decoder.layers.{i}."
OPT = Architecture(
    gguf="opt",
    tensors={
        "model.decoder.embed_tokens.weight": ("token_embd.weight", "none"),
        "model.decoder.embed_positions.weight": ("position_embd.weight", "none"),
        "model.decoder.final_layer_norm.weight": ("output_norm.weight", "none"),
        "model.decoder.final_layer_norm.bias": ("output_norm.bias", "none"),
        "lm_head.weight": ("output.weight", "none"),
        _LAYER + "self_attn_layer_norm.weight": ("blk.{i}.attn_norm.weight", "none"),
        _LAYER + "self_attn_layer_norm.bias": ("blk.{i}.attn_norm.bias", "none"),
        _LAYER + "self_attn.q_proj.weight": ("blk.{i}.attn_q.weight", "none"),
        _LAYER + "self_attn.q_proj.bias": ("blk.{i}.attn_q.bias", "none"),
        _LAYER + "self_attn.k_proj.weight": ("blk.{i}.attn_k.weight", "none"),
        _LAYER + "self_attn.k_proj.bias": ("blk.{i}.attn_k.bias", "none"),
        _LAYER + "self_attn.v_proj.weight": ("blk.{i}.attn_v.weight", "none"),
        _LAYER + "self_attn.v_proj.bias": ("blk.{i}.attn_v.bias", "none"),
        _LAYER + "self_attn.out_proj.weight": ("blk.{i}.attn_output.weight", "none"),
        _LAYER + "self_attn.out_proj.bias": ("blk.{i}.attn_output.bias", "none"),
        _LAYER + "final_layer_norm.weight": ("blk.{i}.ffn_norm.weight", "none"),
        _LAYER + "final_layer_norm.bias": ("blk.{i}.ffn_norm.bias", "none"),
        _LAYER + "fc1.weight": ("blk.{i}.ffn_up.weight", "none"),
        _LAYER + "fc1.bias": ("blk.{i}.ffn_up.bias", "none"),
        _LAYER + "fc2.weight": ("blk.{i}.ffn_down_t.weight", "transpose"),
        _LAYER + "fc2.bias": ("blk.{i}.ffn_down_t.bias", "none"),
    },
    keys={
        "n_embd": ("hidden_size",),
        "n_ff": ("ffn_dim",),
        "n_layer": ("num_hidden_layers",),
        "n_head": ("num_attention_heads",),
        "n_ctx": ("max_position_embeddings",),
        "n_vocab": ("vocab_size",),
    },
    activation_key="activation_function",
    default_activation="relu",
    is_tied=True,
    aliases={"decoder.": "model.decoder."},
)

ARCHITECTURES = {
    "LlamaForCausalLM": LLAMA,
    "MistralForCausalLM": LLAMA,
    "SparseLlamaForCausalLM": LLAMA,  # ProSparse: fatrelu
    "BambooForCausalLM": LLAMA,  # relu on gate and on up
    "FalconForCausalLM": FALCON,
    "RWForCausalLM": FALCON,  # its name before it was part of transformers
    "OPTForCausalLM": OPT,
}


def check_variant(name: str, config: Mapping[str, Any]) -> None:
    """Refuse by name (ModelError) the variants of these architectures that compute otherwise."""
    if ARCHITECTURES[name] is FALCON:
        if config.get("alibi"):
            raise ModelError("Falcon models with alibi (falcon-rw) are not supported, only rotary")
        if not config.get("new_decoder_architecture") and not config.get("parallel_attn", True):
            raise ModelError("Falcon models without parallel attention are not supported")
        if config.get("bias"):
            raise ModelError("Falcon models with biases (falcon-rw) are not supported")
    if ARCHITECTURES[name] is OPT:
        n_embd = config.get("hidden_size")
        projected = config.get("word_embed_proj_dim") or n_embd
        if projected != n_embd or not config.get("do_layer_norm_before", True):
            raise ModelError("OPT-350m (projected embeddings, norms after) is not supported")
        if not config.get("layer_norm_elementwise_affine", True):
            raise ModelError("OPT models whose norms have no weights (Galactica) are not supported")
        if config.get("_remove_final_layer_norm"):
            raise ModelError("OPT models without a final norm are not supported")
    if name == "BambooForCausalLM" and any(key.startswith("mamba_") for key in config):
        raise ModelError("this is IBM's Bamboo (with Mamba layers), not SJTU's: not supported")


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
    if not isinstance(nested, dict):
        raise ModelError(f"the checkpoint's rope scaling is {shown(nested)}")

    def number(key: str, source: Mapping[str, Any] = nested) -> float:
        value = source.get(key)
        if isinstance(value, int | float) and not isinstance(value, bool) and 1e-6 < value < 1e30:
            return float(value)
        raise ModelError(f"the checkpoint's {key} is {shown(value)}")

    if "rope_theta" in nested:
        base = number("rope_theta")
    else:
        base = number("rope_theta", config) if "rope_theta" in config else 10000.0
    kind = nested.get("rope_type", nested.get("type", "default"))
    if kind == "default":
        return Rope(base, None, None)
    if kind == "linear":
        return Rope(base, number("factor"), None)
    if kind != "llama3":
        raise ModelError(
            f"the checkpoint uses rope scaling {kind!r}; linear and llama3 are supported"
        )
    # As in transformers' _compute_llama3_parameters: low frequencies are slowed down by `factor`,
    # high ones kept, those between blended.
    factor, context = number("factor"), number("original_max_position_embeddings")
    low, high = number("low_freq_factor"), number("high_freq_factor")
    if high <= low:
        raise ModelError(f"the checkpoint's high_freq_factor is {high}, not above {low}")
    frequencies = base ** (-np.arange(0, head_dim, 2, dtype=np.float64) / head_dim)
    wavelengths = 2 * math.pi / frequencies
    blend = np.clip((context / wavelengths - low) / (high - low), 0, 1)
    return Rope(base, None, (1 / ((1 - blend) / factor + blend)).astype(np.float32))
