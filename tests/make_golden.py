"""Make tests/golden/*.npz with transformers in float32 (development; needs the `dev` extra).

    python tests/make_golden.py

For each tiny model: `logits` [48, 384] of fixed tokens, `greedy` [64] tokens that follow the
first 8, `gaps` [64] between the two best logits at each of them. For the demo model the same
with its first 24 held-out tokens.
"""

from __future__ import annotations

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


def golden(folder: Path, ids: list[int]) -> dict[str, np.ndarray]:
    model = transformers.LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32)
    model.eval()
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
        "logits": logits,
        "greedy": np.array(greedy, np.int32),
        "gaps": np.array(gaps, np.float32),
    }


def main() -> None:
    (HERE / "golden").mkdir(exist_ok=True)
    for name, model in tiny.MODELS.items():
        with tempfile.TemporaryDirectory() as folder:
            tiny.write_checkpoint(model, Path(folder))
            data = golden(Path(folder), tiny.token_ids())
        np.savez(HERE / "golden" / f"{name}.npz", **data)
        print(name, data["logits"].std(), data["gaps"].min())
    sp = sentencepiece.SentencePieceProcessor(model_file=str(DEMO / "tokenizer.model"))
    ids = [sp.bos_id(), *sp.encode((DEMO / "heldout.txt").read_text("utf-8"))][:24]
    np.savez(HERE / "golden" / "demo.npz", **golden(DEMO, ids))


if __name__ == "__main__":
    main()
