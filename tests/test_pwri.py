"""Files of the original PowerInfer: written, read back, compared with its own."""

import numpy as np
import pytest
import tiny
from conftest import random_predictors
from powerinfer.convert.converter import plan_conversion, write_conversion
from powerinfer.convert.pwri import PwriPolicy, encode_original
from powerinfer.quantize.policy import parse_type
from powerinfer.runtime.errors import ModelError
from powerinfer.runtime.formats import GGMLType, decode
from powerinfer.runtime.gguf import GGUFFile

import powerinfer


def export(folder, target, outtype, predictors=None):
    policy = PwriPolicy(parse_type(outtype))
    write_conversion(plan_conversion(folder, predictors, policy, dense=False, is_pwri=True), target)
    return target


@pytest.mark.parametrize("outtype", ["f16", "q4_0"])
def test_same_tensors_as_the_original(outtype, samples, tmp_path):
    """Names, types, shapes and every byte, quantised ones included."""
    path = export(samples / "hf", tmp_path / "x.gguf", outtype, samples / "pred")
    ours, theirs = GGUFFile(path), GGUFFile(samples / f"sample.{outtype}.powerinfer.gguf")
    assert (ours.magic, ours.version) == (theirs.magic, theirs.version) == ("PWRI", 3)
    assert set(ours.tensors) == set(theirs.tensors)
    for name, tensor in theirs.tensors.items():
        mine = ours.tensors[name]
        assert (mine.type, mine.shape) == (tensor.type, tensor.shape), name
        assert np.array_equal(mine.data, tensor.data), name
    for key, value in theirs.metadata.items():
        if not key.startswith("tokenizer."):
            assert np.array_equal(ours.metadata[key].value, value.value), key


@pytest.mark.parametrize("name", ["mha", "bamboo", "falcon7", "falcon40", "opt"])
def test_exported_files_run(name, tiny_checkpoint, tmp_path):
    """Without the keys of ours that the original does not write."""
    predictors = random_predictors(tiny.MODELS[name], tmp_path / "p", 32)
    path = export(tiny_checkpoint(name), tmp_path / "x.gguf", "f16", predictors)
    from test_engine import rewrite

    if name == "opt":  # the original wants the rows of the table of positions here
        file = GGUFFile(path)
        rows = file.tensors["position_embd.weight"].shape[0]
        assert file.metadata["opt.context_length"].value == rows == 256 + 2
    drop = [k for k in GGUFFile(path).metadata if k.startswith("powerinfer.ffn")]
    bare = rewrite(path, tmp_path / "bare.gguf", dict.fromkeys(drop))
    with powerinfer.open(path) as a, powerinfer.open(bare) as b:
        assert a.mode == b.mode == "predicted"
        ids = tiny.token_ids()
        assert np.array_equal(a.logits(ids), b.logits(ids))


def test_what_the_original_cannot_express(tiny_checkpoint, tmp_path):
    for name, message in (
        ("prosparse", "no llama model with the activation 'fatrelu'"),
        ("relu2", "no llama model with the activation 'relu2'"),
    ):
        with pytest.raises(ModelError, match=message):
            export(tiny_checkpoint(name), tmp_path / "x.gguf", "f16")
    with pytest.raises(ModelError, match="f16 and q4_0 only"):
        PwriPolicy(GGMLType.Q8_0)
    with pytest.raises(ModelError, match="exclude --dense"):
        plan_conversion(
            tiny_checkpoint("mha"), None, PwriPolicy(GGMLType.F16), dense=True, is_pwri=True
        )


def test_q6_k_is_close_and_survives_odd_rows():
    rng = np.random.default_rng(9)
    x = rng.standard_normal((6, 512)).astype(np.float32)
    x[1] = 0
    x[2, 100:140] = 0
    x[3] *= 1e-20
    x[4, ::2] *= 1e-3
    back = decode(GGMLType.Q6_K, encode_original(GGMLType.Q6_K, x))
    assert not back[1].any()
    for i in (0, 2, 4):
        assert np.abs(back[i] - x[i]).max() < 0.04 * np.abs(x[i]).max()
