"""Fixtures: small models in every format, made once for all tests."""

from __future__ import annotations

import signal
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import sentencepiece

sys.path.insert(0, str(Path(__file__).parent))
import tiny
import torchfile
from powerinfer.convert.converter import plan_conversion, write_conversion
from powerinfer.predictors.measure import log_softmax
from powerinfer.quantize.encoder import quantize_file
from powerinfer.quantize.policy import TARGETS, Policy, parse_type
from powerinfer.runtime.formats import BLOCK_SIZES, GGMLType, decode, encode
from powerinfer.runtime.gguf import GGUFFile
from powerinfer.runtime.gguf_writer import GGUFWriter

# Background jobs of shells, and what they start, ignore Ctrl-C; the tests about it must not.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

ROOT = Path(__file__).parent.parent
DEMO = ROOT / "tools" / "demo"
WRITABLE = tuple(TARGETS.values())
GOLDEN = Path(__file__).parent / "golden"

MakeModel = Callable[..., Path]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The tests that compile all kernels for another path first, while the rest compile theirs."""
    items.sort(key=lambda item: "test_lesser_paths" not in item.name)


def convert(
    folder: Path, target: Path, outtype: str, predictors: Path | None = None, dense: bool = False
) -> Path:
    """Convert a checkpoint; the one way in which tests make files."""
    conversion = plan_conversion(folder, predictors, Policy(parse_type(outtype)), dense)
    write_conversion(conversion, target)
    return target


def kl(p_logits: np.ndarray, q_logits: np.ndarray) -> float:
    """Return the mean KL divergence (nats) of q from p over tokens [n_tok, n_vocab]."""
    p, q = log_softmax(p_logits), log_softmax(q_logits)
    return float((np.exp(p) * (p - q)).sum(axis=-1).mean())


def train_tokenizer(folder: Path) -> Path:
    """Train a SentencePiece model of the tiny models' vocabulary size; return tokenizer.model."""
    sentencepiece.SentencePieceTrainer.train(
        input=str(DEMO / "heldout.txt"),
        model_prefix=str(folder / "tokenizer"),
        model_type="bpe",
        vocab_size=tiny.N_VOCAB,
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        minloglevel=2,
    )
    return folder / "tokenizer.model"


@pytest.fixture(scope="session")
def small_tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tokenizer of all tiny models."""
    return train_tokenizer(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture(scope="session")
def tiny_checkpoint(
    tmp_path_factory: pytest.TempPathFactory, small_tokenizer: Path
) -> Callable[[str], Path]:
    """name -> folder with a whole Hugging Face checkpoint. Do not change what is in it."""
    made: dict[str, Path] = {}

    def make(name: str) -> Path:
        if name not in made:
            folder = tiny.write_checkpoint(tiny.MODELS[name], tmp_path_factory.mktemp(name))
            (folder / "tokenizer.model").write_bytes(small_tokenizer.read_bytes())
            made[name] = folder
        return made[name]

    return make


def random_predictors(model: tiny.Tiny, folder: Path, rank: int) -> Path:
    """Write predictors of no merit in PowerInfer's layout; about half the neurons pass."""
    rng = np.random.default_rng(22)
    for i in range(model.n_layer):
        fc1 = rng.standard_normal((rank, model.n_embd)).astype(np.float16)
        fc2 = rng.standard_normal((model.n_ff, rank)).astype(np.float16)
        torchfile.write_tensors(folder / f"model_{i}.pt", {"fc1.weight": fc1, "fc2.weight": fc2})
    (folder / "config.json").write_text('{"sparse_threshold": 0.5}')
    return folder


@pytest.fixture(scope="session")
def tiny_gguf(
    tmp_path_factory: pytest.TempPathFactory, tiny_checkpoint: Callable[[str], Path]
) -> MakeModel:
    """(name, outtype, predictors=False) -> GGUF file of a tiny model."""
    made: dict[tuple[str, str, bool], Path] = {}

    def make(name: str, outtype: str, predictors: bool = False) -> Path:
        key = (name, outtype, predictors)
        if key not in made:
            folder = tmp_path_factory.mktemp(f"{name}-{outtype}")
            model = tiny.MODELS[name]
            made[key] = convert(
                tiny_checkpoint(name),
                folder / f"{name}.gguf",
                outtype,
                random_predictors(model, folder / "predictors", 40) if predictors else None,
                dense=name in tiny.DENSE,
            )
        return made[key]

    return make


@pytest.fixture(scope="session")
def broad_gguf(
    tmp_path_factory: pytest.TempPathFactory, small_tokenizer: Path
) -> Callable[[str], Path]:
    """Type name -> GGUF file of a tiny model whose rows are cut into pieces: tiny.BROAD."""
    folder = tmp_path_factory.mktemp("broad")
    checkpoint = tiny.write_checkpoint(tiny.BROAD, folder / "checkpoint")
    (checkpoint / "tokenizer.model").write_bytes(small_tokenizer.read_bytes())
    predictors = random_predictors(tiny.BROAD, folder / "predictors", 64)
    return lambda name: convert(checkpoint, folder / f"{name}.gguf", name, predictors)


def random_blocks(type_: GGMLType, rows: int, cols: int, rng: np.random.Generator) -> np.ndarray:
    """Random bytes of a format, with scales that make weights of a common size."""
    block, size = BLOCK_SIZES[type_]
    raw = rng.integers(0, 256, (rows, cols // block, size)).astype(np.uint8)
    at = {GGMLType.Q6_K: [208]}.get(type_, [0, 2])
    for i in at:
        scale = (rng.standard_normal((rows, cols // block, 1)) * 0.01).astype(np.float16)
        raw[..., i : i + 2] = scale.view(np.uint8)
    return raw.reshape(rows, -1)


@pytest.fixture(scope="session")
def wide_gguf(
    tmp_path_factory: pytest.TempPathFactory, small_tokenizer: Path
) -> Callable[[str], Path]:
    """Type name -> GGUF file of a tiny model with rows of 256, all matrices of that type.

    K-quants cannot be written by us: their matrices are random blocks, scaled to work.
    """
    folder = tmp_path_factory.mktemp("wide")
    checkpoint = tiny.write_checkpoint(tiny.WIDE, folder / "checkpoint")
    (checkpoint / "tokenizer.model").write_bytes(small_tokenizer.read_bytes())
    predictors = random_predictors(tiny.WIDE, folder / "predictors", 256)
    base = convert(checkpoint, folder / "base.gguf", "f32", predictors)

    def make(name: str) -> Path:
        target, type_ = folder / f"{name}.gguf", GGMLType[name.upper()]
        if target.exists():
            return target
        source, rng = GGUFFile(base), np.random.default_rng(23)
        with GGUFWriter(target, "llama") as writer:
            for key, value in source.metadata.items():
                if key != "general.architecture":
                    writer.add(key, value)
            types = {
                t.name: type_ if len(t.shape) == 2 else t.type for t in source.tensors.values()
            }
            for t in source.tensors.values():
                writer.declare(t.name, types[t.name], t.shape)
            for t in source.tensors.values():
                if len(t.shape) == 1:
                    writer.write(t.name, t.data)
                elif type_ in WRITABLE:
                    writer.write(t.name, encode(type_, t.float32()))
                else:
                    raw = random_blocks(type_, t.rows, t.cols, rng)
                    blocks = raw.reshape(-1, BLOCK_SIZES[type_][1])
                    # Matrices of the size that the model was made with.
                    wanted = np.abs(t.float32()).mean() / np.abs(decode(type_, raw)).mean()
                    for at in {GGMLType.Q6_K: [208]}.get(type_, [0, 2]):
                        scale = blocks[:, at : at + 2].copy().view(np.float16) * np.float16(wanted)
                        blocks[:, at : at + 2] = scale.view(np.uint8)
                    writer.write(t.name, blocks)
        return target

    return make


@pytest.fixture(scope="session")
def demo_gguf(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """outtype -> GGUF file of the demo model."""
    folder = tmp_path_factory.mktemp("demo")

    def make(outtype: str) -> Path:
        target = folder / f"demo.{outtype}.gguf"
        if not target.exists():
            if outtype in ("f32", "f16"):
                convert(DEMO, target, outtype)
            else:
                quantize_file(make("f16"), target, Policy(parse_type(outtype)))
        return target

    return make


@pytest.fixture(scope="session")
def heldout_ids() -> list[int]:
    """The demo's held-out text as tokens, with BOS."""
    sp = sentencepiece.SentencePieceProcessor(model_file=str(DEMO / "tokenizer.model"))
    return [sp.bos_id(), *sp.encode((DEMO / "heldout.txt").read_text("utf-8"))]


@pytest.fixture(scope="session")
def samples() -> Path:
    """Files made by the original PowerInfer's tools; they are not part of this repository."""
    folder = ROOT.parent / "shared" / "samples" / "pwri"
    if not folder.exists():
        pytest.skip("needs the original's sample files in ../shared/samples/pwri")
    return folder


@pytest.fixture(scope="session")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A text file of 4000 characters."""
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text((DEMO / "heldout.txt").read_text("utf-8")[:4000], encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def model(tiny_gguf, tmp_path_factory):
    """(name, type, predictors, keys) -> a tiny model stored hot-first."""
    from cuda_engine import hot_first

    made = {}

    def make(name, outtype, predictors=True, **keys):
        key = (name, outtype, predictors, *keys)
        if key not in made:
            path = tmp_path_factory.mktemp("hybrid") / f"{name}.{outtype}.gguf"
            source = tiny_gguf(name, outtype, predictors)
            made[key] = hot_first(source, path, tiny.MODELS[name], **keys)
        return made[key]

    return make
