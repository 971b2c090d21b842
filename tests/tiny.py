"""Tiny random checkpoints of every architecture, the same wherever they are made.

Used by the tests, which never need torch, and by make_golden.py, which lets transformers compute
the golden logits of the very same weights. Weights are whole numbers of fp16, so that one golden
serves the f32 and the f16 file.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.numpy

N_VOCAB = 384
N_TOKENS = 48  # tokens in a test text; goldens hold the logits of the last 32
FIRST_GOLDEN = 16
N_GREEDY = 64  # tokens written greedily after the first 8


@dataclass(frozen=True)
class Tiny:
    """One tiny model; `extra` goes into its config.json."""

    n_embd: int = 64
    n_ff: int = 96
    n_layer: int = 2
    n_head: int = 4
    n_head_kv: int = 4
    head_dim: int = 16
    is_tied: bool = False
    has_biases: bool = False
    activation: str = "relu"
    architecture: str = "LlamaForCausalLM"
    extra: dict[str, Any] = field(default_factory=dict)

    def config(self) -> dict[str, Any]:
        common = {
            "architectures": [self.architecture],
            "hidden_size": self.n_embd,
            "num_hidden_layers": self.n_layer,
            "num_attention_heads": self.n_head,
            "vocab_size": N_VOCAB,
            "max_position_embeddings": 256,
            "bos_token_id": 1,
            "eos_token_id": 2,
        }
        if self.architecture == "FalconForCausalLM":
            return common | {
                "model_type": "falcon",
                "num_kv_heads": self.n_head_kv,
                "ffn_hidden_size": self.n_ff,
                "activation": self.activation,
                "bias": False,
                "alibi": False,
                **self.extra,
            }
        if self.architecture == "OPTForCausalLM":
            return common | {
                "model_type": "opt",
                "ffn_dim": self.n_ff,
                "activation_function": self.activation,
                "word_embed_proj_dim": self.n_embd,
                "pad_token_id": 0,
                **self.extra,
            }
        return {
            "architectures": [self.architecture],
            "model_type": "llama",
            "hidden_size": self.n_embd,
            "intermediate_size": self.n_ff,
            "num_hidden_layers": self.n_layer,
            "num_attention_heads": self.n_head,
            "num_key_value_heads": self.n_head_kv,
            "head_dim": self.head_dim,
            "hidden_act": self.activation,
            "vocab_size": N_VOCAB,
            "max_position_embeddings": 256,
            "rms_norm_eps": 1e-5,
            "rope_theta": 10000.0,
            "tie_word_embeddings": self.is_tied,
            "attention_bias": self.has_biases,
            "mlp_bias": self.has_biases,
            "bos_token_id": 1,
            "eos_token_id": 2,
            **self.extra,
        }

    def tensors(self) -> dict[str, np.ndarray]:
        """Return the checkpoint's tensors as float16, from a fixed seed."""
        w = _Random(self.n_embd)
        q_dim, kv_dim = self.n_head * self.head_dim, self.n_head_kv * self.head_dim
        # A tied head sees the embedding again: a large one would just repeat the last token.
        if self.architecture == "FalconForCausalLM":
            w.matrix("transformer.word_embeddings", N_VOCAB, self.n_embd)
            for i in range(self.n_layer):
                p = f"transformer.h.{i}."
                two = self.extra.get("new_decoder_architecture")
                for name in ("ln_attn", "ln_mlp") if two else ("input_layernorm",):
                    w.norm(p + name, bias=True)
                w.matrix(p + "self_attention.query_key_value", q_dim + 2 * kv_dim, self.n_embd, 2.0)
                w.matrix(p + "self_attention.dense", self.n_embd, q_dim)
                w.matrix(p + "mlp.dense_h_to_4h", self.n_ff, self.n_embd)
                w.matrix(p + "mlp.dense_4h_to_h", self.n_embd, self.n_ff)
            w.norm("transformer.ln_f", bias=True)
            return w.tensors
        if self.architecture == "OPTForCausalLM":
            w.matrix("model.decoder.embed_tokens", N_VOCAB, self.n_embd)
            w.matrix("model.decoder.embed_positions", 256 + 2, self.n_embd)
            for i in range(self.n_layer):
                p = f"model.decoder.layers.{i}."
                for name in ("q_proj", "k_proj", "v_proj", "out_proj"):
                    w.matrix(p + "self_attn." + name, self.n_embd, self.n_embd, 1.5, bias=True)
                w.norm(p + "self_attn_layer_norm", bias=True)
                w.matrix(p + "fc1", self.n_ff, self.n_embd, bias=True)
                w.matrix(p + "fc2", self.n_embd, self.n_ff, bias=True)
                w.norm(p + "final_layer_norm", bias=True)
            w.norm("model.decoder.final_layer_norm", bias=True)
            return w.tensors
        w.matrix("model.embed_tokens", N_VOCAB, self.n_embd, 1.0 if self.is_tied else 8.0)
        for i in range(self.n_layer):
            p, bias = f"model.layers.{i}.", self.has_biases
            w.norm(p + "input_layernorm")
            w.matrix(p + "self_attn.q_proj", q_dim, self.n_embd, 2.0, bias)
            w.matrix(p + "self_attn.k_proj", kv_dim, self.n_embd, 2.0, bias)
            w.matrix(p + "self_attn.v_proj", kv_dim, self.n_embd, 1.0, bias)
            w.matrix(p + "self_attn.o_proj", self.n_embd, q_dim, 1.0, bias)
            w.norm(p + "post_attention_layernorm")
            w.matrix(p + "mlp.gate_proj", self.n_ff, self.n_embd, 1.0, bias)
            w.matrix(p + "mlp.up_proj", self.n_ff, self.n_embd, 1.0, bias)
            w.matrix(p + "mlp.down_proj", self.n_embd, self.n_ff, 1.0, bias)
        w.norm("model.norm")
        if not self.is_tied:
            w.matrix("lm_head", N_VOCAB, self.n_embd, 2.0)
        return w.tensors


class _Random:
    """Draws the tensors of one model in a fixed order."""

    def __init__(self, n_embd: int) -> None:
        self._rng = np.random.default_rng(20)
        self._n_embd = n_embd
        self.tensors: dict[str, np.ndarray] = {}

    def matrix(
        self, name: str, rows: int, cols: int, scale: float = 1.0, bias: bool = False
    ) -> None:
        x = self._rng.standard_normal((rows, cols)) * scale / np.sqrt(cols)
        self.tensors[f"{name}.weight"] = x.astype(np.float16)
        if bias:
            self._bias(name, rows)

    def norm(self, name: str, bias: bool = False) -> None:
        x = 1 + 0.1 * self._rng.standard_normal(self._n_embd)
        self.tensors[f"{name}.weight"] = x.astype(np.float16)
        if bias:
            self._bias(name, self._n_embd)

    def _bias(self, name: str, n: int) -> None:
        self.tensors[f"{name}.bias"] = (self._rng.standard_normal(n) * 0.2).astype(np.float16)


_LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 50000.0,
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
MODELS = {
    "mha": Tiny(),
    "gqa": Tiny(n_embd=96, n_ff=160, n_head=3, n_head_kv=1, head_dim=32),
    "tied": Tiny(n_ff=224, n_head_kv=2, is_tied=True),
    "bias": Tiny(has_biases=True, extra={"rope_scaling": {"type": "linear", "factor": 2.0}}),
    "llama3": Tiny(n_head=2, n_head_kv=1, head_dim=48, extra={"rope_parameters": _LLAMA3}),
    "swiglu": Tiny(activation="silu"),
    "relu2": Tiny(activation="relu2"),
    "prosparse": Tiny(
        activation="fatrelu",
        architecture="SparseLlamaForCausalLM",
        extra={"hidden_act_param": 0.3},
    ),
    "bamboo": Tiny(n_head_kv=2, architecture="BambooForCausalLM"),
    "falcon7": Tiny(
        n_ff=160, n_head_kv=1, architecture="FalconForCausalLM", extra={"multi_query": True}
    ),
    "falcon40": Tiny(
        n_embd=96,
        n_ff=160,
        n_head=6,
        n_head_kv=2,
        architecture="FalconForCausalLM",
        extra={"new_decoder_architecture": True},
    ),
    "falcon_mha": Tiny(n_ff=160, architecture="FalconForCausalLM", extra={"multi_query": False}),
    "falcon_gelu": Tiny(n_ff=160, n_head_kv=1, activation="gelu", architecture="FalconForCausalLM"),
    "opt": Tiny(n_ff=160, architecture="OPTForCausalLM"),
}
# Not compared with transformers: rows of 256, for the formats that need them.
WIDE = Tiny(n_embd=256, n_ff=512, n_head=4, n_head_kv=2, head_dim=64)
# Nor this: rows that are no multiple of what threads share them by.
BROAD = Tiny(n_embd=1088, n_ff=640, n_head=4, n_head_kv=2, head_dim=64)
DENSE = ("swiglu", "falcon_gelu")  # activations that never fall silent


def token_ids() -> list[int]:
    """Return the fixed tokens that golden logits are for: BOS, then anything but control."""
    rng = np.random.default_rng(21)
    return [1, *rng.integers(3, N_VOCAB, N_TOKENS - 1).tolist()]


def write_checkpoint(model: Tiny, folder: Path) -> Path:
    """Write config.json and model.safetensors (no tokenizer) into `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(model.config()))
    safetensors.numpy.save_file(model.tensors(), folder / "model.safetensors")
    return folder
