"""Tiny random Llama checkpoints, the same wherever they are made.

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
N_TOKENS = 48  # tokens with golden logits
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
    extra: dict[str, Any] = field(default_factory=dict)

    def config(self) -> dict[str, Any]:
        return {
            "architectures": ["LlamaForCausalLM"],
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
        rng = np.random.default_rng(20)
        q_dim, kv_dim = self.n_head * self.head_dim, self.n_head_kv * self.head_dim
        out: dict[str, np.ndarray] = {}

        def matrix(name: str, rows: int, cols: int, scale: float = 1.0) -> None:
            x = rng.standard_normal((rows, cols)) * scale / np.sqrt(cols)
            out[f"{name}.weight"] = x.astype(np.float16)
            if self.has_biases and "layers" in name:
                out[f"{name}.bias"] = (rng.standard_normal(rows) * 0.2).astype(np.float16)

        def norm(name: str) -> None:
            x = 1 + 0.1 * rng.standard_normal(self.n_embd)
            out[f"{name}.weight"] = x.astype(np.float16)

        # A tied head sees the embedding again: a large one would just repeat the last token.
        matrix("model.embed_tokens", N_VOCAB, self.n_embd, 1.0 if self.is_tied else 8.0)
        for i in range(self.n_layer):
            p = f"model.layers.{i}."
            norm(p + "input_layernorm")
            matrix(p + "self_attn.q_proj", q_dim, self.n_embd, 2.0)
            matrix(p + "self_attn.k_proj", kv_dim, self.n_embd, 2.0)
            matrix(p + "self_attn.v_proj", kv_dim, self.n_embd)
            matrix(p + "self_attn.o_proj", self.n_embd, q_dim)
            norm(p + "post_attention_layernorm")
            matrix(p + "mlp.gate_proj", self.n_ff, self.n_embd)
            matrix(p + "mlp.up_proj", self.n_ff, self.n_embd)
            matrix(p + "mlp.down_proj", self.n_embd, self.n_ff)
        norm("model.norm")
        if not self.is_tied:
            matrix("lm_head", N_VOCAB, self.n_embd, 2.0)
        return out


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
}


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
