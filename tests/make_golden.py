"""Make tests/golden/*.npz with transformers in float32 (development; needs the `dev` extra).

    python tests/make_golden.py

For each tiny model: `ids` [48] fixed tokens, `logits` [32, 384] of the last 32 of them, `greedy`
[64] tokens that follow the first 8, `gaps` [64] between the two best logits at each of them. For
the demo model the same with its first 32 held-out tokens, and logits of the last 16. transformers
has no ProSparse and no Bamboo: those are its Llama with another activation, after the papers.
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path

import numpy as np
import sentencepiece
import torch
import transformers

sys.path.insert(0, str(Path(__file__).parent))
import tiny

HERE = Path(__file__).parent
DEMO = HERE.parent / "tools" / "demo"
PROMPT = 8


class FATReLU(torch.nn.Module):
    """ProSparse (arXiv 2402.13516): x where it is at least a threshold, else 0."""

    def __init__(self, threshold: float) -> None:
        super().__init__()
        self.threshold = threshold

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.where(x >= self.threshold, x, 0.0)


def load(folder: Path) -> torch.nn.Module:
    config = json.loads((folder / "config.json").read_text())
    name = config["architectures"][0]
    classes = {
        "FalconForCausalLM": transformers.FalconForCausalLM,
        "OPTForCausalLM": transformers.OPTForCausalLM,
    }
    options = {}
    if name == "SparseLlamaForCausalLM":
        options = {"hidden_act": "relu"}  # replaced below
    model = classes.get(name, transformers.LlamaForCausalLM).from_pretrained(
        folder, dtype=torch.float32, **options
    )
    if name == "SparseLlamaForCausalLM":
        for layer in model.model.layers:
            layer.mlp.act_fn = FATReLU(config["hidden_act_param"])
    if name == "BambooForCausalLM":  # Bamboo: relu on gate and on up
        for layer in model.model.layers:
            layer.mlp.up_proj.register_forward_hook(lambda _m, _i, y: torch.relu(y))
    return model.eval()


def golden(folder: Path, ids: list[int], first: int) -> dict[str, np.ndarray]:
    model = load(folder)
    with torch.no_grad():
        logits = model(torch.tensor([ids])).logits[0].numpy()
        text, greedy, gaps = ids[:PROMPT], [], []
        for _ in range(tiny.N_GREEDY):
            last = model(torch.tensor([text])).logits[0, -1]
            best = torch.topk(last, 2)
            greedy.append(int(best.indices[0]))
            gaps.append(float(best.values[0] - best.values[1]))
            text = [*text, greedy[-1]]
    return {
        "ids": np.array(ids, np.int32),
        "logits": logits[first:],
        "greedy": np.array(greedy, np.int32),
        "gaps": np.array(gaps, np.float32),
    }


def main() -> None:
    (HERE / "golden").mkdir(exist_ok=True)
    for name, model in tiny.MODELS.items():
        with tempfile.TemporaryDirectory() as folder:
            tiny.write_checkpoint(model, Path(folder))
            data = golden(Path(folder), tiny.token_ids(), tiny.FIRST_GOLDEN)
        np.savez(HERE / "golden" / f"{name}.npz", **data)
        print(name, data["logits"].std(), data["gaps"].min())
    sp = sentencepiece.SentencePieceProcessor(model_file=str(DEMO / "tokenizer.model"))
    ids = [sp.bos_id(), *sp.encode((DEMO / "heldout.txt").read_text("utf-8"))][:32]
    np.savez(HERE / "golden" / "demo.npz", **golden(DEMO, ids, 16))


if __name__ == "__main__":
    main()
