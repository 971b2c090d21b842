"""Train the built-in demo model: a small ReLU-Llama on the King James Bible, on the CPU.

Development tool (needs torch, transformers, sentencepiece; see the `dev` extra). It writes a
Hugging Face checkpoint (fp16), its SentencePiece tokenizer, a held-out text, a calibration text
and a model card:

    python -m powerinfer.tools.train_demo --out tools/demo

The text is Debian's `bible-kjv-text` package (public domain), printed by its `bible` command;
`--text FILE` takes any text instead, with blank lines between documents.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import re
import subprocess
import time
from pathlib import Path

import numpy as np

SEED = 1611
HELD_OUT_EVERY = 50  # every 50th chapter is held out: about 85 kB
VOCAB_SIZE = 4096
CONTEXT = 512  # tokens, the trained context


def bible_chapters() -> list[str]:
    """Return the chapters of the King James Bible, one verse a line (Debian: bible-kjv-text)."""
    out = subprocess.run(
        ["bible", "-f", "gen1:1-rev22:21"], check=True, capture_output=True, text=True
    ).stdout
    chapters: dict[str, list[str]] = {}
    for line in out.splitlines():
        match = re.match(r"(\w+?\d+):\d+ (.*)", line)
        if match is None:
            raise ValueError(f"not a verse: {line!r}")
        chapters.setdefault(match[1], []).append(match[2].strip())
    return ["\n".join(verses) + "\n" for verses in chapters.values()]


def split_chapters(chapters: list[str]) -> tuple[list[str], list[str]]:
    """Split into (training, held-out) chapters; the split is fixed, not random."""
    held = [c for i, c in enumerate(chapters) if i % HELD_OUT_EVERY == HELD_OUT_EVERY // 2]
    train = [c for i, c in enumerate(chapters) if i % HELD_OUT_EVERY != HELD_OUT_EVERY // 2]
    return train, held


def train_tokenizer(chapters: list[str], out: Path) -> None:
    """Write `tokenizer.model`: BPE with byte fallback, identity normalisation (Llama-2 style)."""
    import sentencepiece as spm

    corpus = out / "corpus.txt"
    corpus.write_text("".join(chapters), encoding="utf-8")
    try:
        spm.SentencePieceTrainer.train(
            input=str(corpus),
            model_prefix=str(out / "tokenizer"),
            model_type="bpe",
            vocab_size=VOCAB_SIZE,
            byte_fallback=True,
            split_digits=True,
            normalization_rule_name="identity",
            remove_extra_whitespaces=False,
            character_coverage=1.0,
            # A repeatable file: one thread, no sentence sampling.
            num_threads=1,
            input_sentence_size=0,
        )
    finally:
        corpus.unlink()
        (out / "tokenizer.vocab").unlink(missing_ok=True)
    # The paths of whoever trained it are nobody else's business.
    from sentencepiece import sentencepiece_model_pb2

    path = out / "tokenizer.model"
    model = sentencepiece_model_pb2.ModelProto.FromString(path.read_bytes())
    model.trainer_spec.ClearField("input")
    model.trainer_spec.ClearField("model_prefix")
    path.write_bytes(model.SerializeToString())


def encode(chapters: list[str], tokenizer: Path) -> np.ndarray:
    """Return one int64 stream: BOS chapter EOS BOS chapter EOS ..."""
    import sentencepiece as spm

    sp = spm.SentencePieceProcessor(model_file=str(tokenizer))
    ids: list[int] = []
    for chapter in chapters:
        ids += [sp.bos_id(), *sp.encode(chapter), sp.eos_id()]
    return np.array(ids, dtype=np.int64)


def train(args: argparse.Namespace) -> None:
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(SEED)
    torch.set_num_threads(args.threads)
    out = Path(args.out)
    out.mkdir(parents=True, exist_ok=True)

    if args.text:
        chapters = [c + "\n" for c in re.split(r"\n\n+", Path(args.text).read_text("utf-8")) if c]
    else:
        chapters = bible_chapters()
    train_chapters, held_chapters = split_chapters(chapters)
    (out / "heldout.txt").write_text("\n".join(held_chapters), encoding="utf-8")
    # For profiling and predictors: text that the model knows, apart from what it is judged by.
    calibration = train_chapters[7::20]
    (out / "calibration.txt").write_text("".join(calibration), encoding="utf-8")
    train_tokenizer(train_chapters, out)
    stream = encode(train_chapters, out / "tokenizer.model")
    held = encode(held_chapters, out / "tokenizer.model")
    print(f"{len(stream)} training tokens, {len(held)} held out", flush=True)

    config = LlamaConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=256,
        intermediate_size=1024,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        hidden_act="relu",
        max_position_embeddings=CONTEXT,
        rms_norm_eps=1e-5,
        rope_theta=10000.0,
        tie_word_embeddings=True,
        bos_token_id=1,
        eos_token_id=2,
    )
    model = LlamaForCausalLM(config)
    n_params = sum(p.numel() for p in model.parameters())
    print(f"{n_params / 1e6:.2f} M parameters", flush=True)

    gates: list[torch.Tensor] = []  # relu(gate) of each layer in this forward pass
    for layer in model.model.layers:
        layer.mlp.act_fn.register_forward_hook(lambda _m, _i, y: gates.append(y))
        for block in (layer.self_attn, layer.mlp):
            # Residual dropout: five million parameters see a million tokens many times.
            block.register_forward_hook(
                lambda m, _i, y: (
                    (torch.nn.functional.dropout(y[0], args.dropout, m.training), *y[1:])
                    if isinstance(y, tuple)
                    else torch.nn.functional.dropout(y, args.dropout, m.training)
                )
            )

    decay = [p for p in model.parameters() if p.dim() == 2]
    no_decay = [p for p in model.parameters() if p.dim() < 2]
    optimizer = torch.optim.AdamW(
        [{"params": decay, "weight_decay": 0.1}, {"params": no_decay, "weight_decay": 0.0}],
        lr=args.lr,
        betas=(0.9, 0.98),
    )

    def learning_rate(step: int) -> float:
        warm = min(1.0, (step + 1) / 100)
        return warm * (0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * step / args.steps)))

    def evaluate() -> tuple[float, list[float]]:
        """Return (held-out loss in nats per token, firing share per layer)."""
        model.eval()
        total, count = 0.0, 0
        fired, seen = [0.0] * config.num_hidden_layers, 0
        with torch.no_grad():
            for start in range(0, len(held) - 1, CONTEXT):
                chunk = torch.from_numpy(held[start : start + CONTEXT + 1])
                gates.clear()
                logits = model(chunk[None, :-1]).logits[0]
                loss = torch.nn.functional.cross_entropy(logits, chunk[1:], reduction="sum")
                total, count = total + loss.item(), count + len(chunk) - 1
                for i, gate in enumerate(gates):
                    fired[i] += (gate > 0).sum().item()
                seen += gates[0].shape[1]
        gates.clear()
        model.train()
        return total / count, [f / seen / config.intermediate_size for f in fired]

    rng = np.random.default_rng(SEED)
    model.train()
    started, running = time.time(), 0.0
    l1_weights = [0.02] * config.num_hidden_layers
    for step in range(args.steps):
        for group in optimizer.param_groups:
            group["lr"] = args.lr * learning_rate(step)
        starts = rng.integers(0, len(stream) - CONTEXT - 1, args.batch)
        rows = torch.from_numpy(np.stack([stream[s : s + CONTEXT + 1] for s in starts]))
        gates.clear()
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=args.bf16):
            logits = model(rows[:, :-1]).logits
        loss = torch.nn.functional.cross_entropy(
            logits.float().flatten(0, 1), rows[:, 1:].flatten()
        )
        # L1 on relu(gate). Its weight per layer follows the share that fires (no hand tuning):
        # it grows while more than the target fires, shrinks while fewer do.
        l1 = sum(w * g.float().mean() for w, g in zip(l1_weights, gates, strict=True))
        optimizer.zero_grad(set_to_none=True)
        (loss + l1).backward()
        if step >= args.steps // 10:
            for i, gate in enumerate(gates):
                share = (gate > 0).float().mean().item()
                l1_weights[i] *= math.exp(0.02 * max(-1.0, min(1.0, share / args.firing - 1)))
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        running += loss.item()
        if (step + 1) % 50 == 0:
            line = f"step {step + 1}: loss {running / 50:.4f}, {time.time() - started:.0f} s"
            if (step + 1) % 200 == 0:
                held_loss, shares = evaluate()
                line += f", held-out {held_loss:.4f}, firing " + " ".join(
                    f"{s:.3f}" for s in shares
                )
                line += ", L1 " + " ".join(f"{w:.3f}" for w in l1_weights)
            print(line, flush=True)
            train_loss, running = running / 50, 0.0
        if (step + 1) % 500 == 0:
            model.save_pretrained(out)

    model.half()  # what is shipped is what is measured
    model.float()
    held_loss, shares = evaluate()
    model.half().save_pretrained(out)
    write_tokenizer_config(out)
    write_card(out, args, n_params, len(stream), len(held), train_loss, held_loss, shares)


def write_tokenizer_config(out: Path) -> None:
    """Write the `tokenizer_config.json` that transformers and our converter expect."""
    (out / "tokenizer_config.json").write_text(
        json.dumps(
            {
                "tokenizer_class": "LlamaTokenizer",
                "add_bos_token": True,
                "add_eos_token": False,
                "bos_token": "<s>",
                "eos_token": "</s>",
                "unk_token": "<unk>",
                "legacy": False,
                "model_max_length": CONTEXT,
            },
            indent=2,
        )
        + "\n",
        encoding="utf-8",
    )


def write_card(
    out: Path,
    args: argparse.Namespace,
    n_params: int,
    n_train: int,
    n_held: int,
    train_loss: float,
    held_loss: float,
    shares: list[float],
) -> None:
    table = "\n".join(f"| {i} | {share:.3f} |" for i, share in enumerate(shares))
    (out / "README.md").write_text(
        f"""# The demo model

A small ReLU-Llama (`LlamaForCausalLM`, `hidden_act: relu`), {n_params / 1e6:.2f} M parameters,
trained from scratch by `tools/train_demo.py`.

- Data: the King James Bible from Debian's `bible-kjv-text` (public domain), one verse a line,
  one document a chapter; {n_train} training tokens. Every {HELD_OUT_EVERY}th chapter is held out
  ({n_held} tokens, `heldout.txt`); every 20th of the others is `calibration.txt`.
- Tokenizer: SentencePiece BPE, {VOCAB_SIZE} pieces, byte fallback, identity normalisation.
- Training: {args.steps} steps of {args.batch} x {CONTEXT} tokens, AdamW, peak learning rate
  {args.lr}, residual dropout {args.dropout}, L1 on relu(gate) steered so that a share of
  {args.firing} fires, seed {SEED}, CPU.
- Training loss {train_loss:.3f} nats a token (with dropout); held-out loss {held_loss:.3f},
  held-out perplexity {math.exp(held_loss):.2f}.
- Licence: MIT, like the rest of this repository. It knows one book and nothing else.
- `demo.q4_0.gguf` is this checkpoint, quantised, hot-first, with predictors: `make demo-model`.

| layer | share of neurons that fire (held-out text) |
|---|---|
{table}
""",
        encoding="utf-8",
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", default="tools/demo")
    parser.add_argument("--text", help="train on this file instead of the Bible")
    parser.add_argument("--steps", type=int, default=1500)
    parser.add_argument("--batch", type=int, default=16, help="sequences of 512 tokens a step")
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--dropout", type=float, default=0.1)
    parser.add_argument("--firing", type=float, default=0.1, help="target share of neurons firing")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--no-bf16", dest="bf16", action="store_false", help="train in float32")
    train(parser.parse_args())


if __name__ == "__main__":
    main()
