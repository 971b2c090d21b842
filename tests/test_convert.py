"""The converter: what it writes, what it refuses, and how much memory it takes."""

import json
import os
import shutil
import subprocess
import sys

import numpy as np
import pytest
import safetensors.numpy
import sentencepiece
import tiny
import torchfile
from conftest import DEMO, convert, random_predictors
from powerinfer.runtime.errors import FileFormatError, ModelError
from powerinfer.runtime.formats import GGMLType
from powerinfer.runtime.gguf import GGUFFile

import powerinfer


@pytest.fixture
def checkpoint(tmp_path, small_tokenizer):
    """A whole tiny checkpoint that a test may break."""
    folder = tiny.write_checkpoint(tiny.MODELS["mha"], tmp_path / "model")
    (folder / "tokenizer.model").write_bytes(small_tokenizer.read_bytes())
    return folder


def edit_config(folder, **changes):
    path = folder / "config.json"
    config = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({k: v for k, v in config.items() if v is not ...}))


def edit_tensors(folder, change):
    path = folder / "model.safetensors"
    tensors = safetensors.numpy.load_file(path)
    change(tensors)
    path.unlink()
    safetensors.numpy.save_file(tensors, path)


def refused(folder, message, error=ModelError, **options):
    target = folder.parent / "out.gguf"
    with pytest.raises(error, match=message) as caught:
        convert(folder, target, "f16", **options)
    assert "\n" not in str(caught.value)
    assert not target.exists() and not list(folder.parent.glob(".out*"))


def test_tensors_and_keys(checkpoint, tmp_path):
    file = GGUFFile(convert(checkpoint, tmp_path / "x.gguf", "f16"))
    source = tiny.MODELS["mha"].tensors()
    down = file.tensors["blk.1.ffn_down_t.weight"]
    assert np.array_equal(down.numpy(), source["model.layers.1.mlp.down_proj.weight"].T)
    assert file.tensors["blk.0.attn_norm.weight"].type is GGMLType.F32
    # Hugging Face keeps the two halves of a head apart, GGUF interleaves them.
    q = source["model.layers.0.self_attn.q_proj.weight"]
    permuted = file.tensors["blk.0.attn_q.weight"].numpy()
    assert np.array_equal(permuted[0:16:2], q[0:8]) and np.array_equal(permuted[1:16:2], q[8:16])
    assert file.get_str("general.architecture") == "llama"
    assert file.get_str("powerinfer.ffn_activation") == "relu"
    assert file.get_str("powerinfer.neuron_order") == "original"
    assert file.get_int("llama.rope.dimension_count") == 16
    assert file.get_int("general.file_type") == 1


def test_same_tensors_as_the_original_converter(samples, tmp_path):
    """hf/ and pred/ beside the original's F16 file give the same tensors, bit for bit."""
    target = convert(samples / "hf", tmp_path / "x.gguf", "f16", samples / "pred")
    ours, theirs = GGUFFile(target), GGUFFile(samples / "sample.f16.powerinfer.gguf")
    assert set(ours.tensors) == set(theirs.tensors)
    for name, tensor in theirs.tensors.items():
        assert ours.tensors[name].type is tensor.type and ours.tensors[name].shape == tensor.shape
        assert np.array_equal(ours.tensors[name].data, tensor.data), name
    threshold = "powerinfer.sparse_threshold"
    assert ours.get_float(threshold) == theirs.get_float(threshold) == -0.25


@pytest.mark.parametrize("outtype", ["f32", "bf16", "q8_0", "q4_0"])
def test_outtypes_hold_the_same_weights(outtype, checkpoint, tmp_path):
    file = GGUFFile(convert(checkpoint, tmp_path / "x.gguf", outtype))
    exact = tiny.MODELS["mha"].tensors()["model.layers.0.mlp.up_proj.weight"].astype(np.float32)
    tensor = file.tensors["blk.0.ffn_up.weight"]
    assert tensor.type.name.lower() == outtype
    error = np.abs(tensor.float32() - exact).max() / np.abs(exact).max()
    assert error <= {"f32": 0, "bf16": 2**-8, "q8_0": 0.01, "q4_0": 0.15}[outtype]


def test_bin_and_sharded_checkpoints_give_the_same_file(checkpoint, tmp_path):
    want = convert(checkpoint, tmp_path / "a.gguf", "f16").read_bytes()
    tensors = tiny.MODELS["mha"].tensors()
    (checkpoint / "model.safetensors").unlink()
    torchfile.write_tensors(checkpoint / "pytorch_model.bin", tensors)
    assert convert(checkpoint, tmp_path / "b.gguf", "f16").read_bytes() == want
    (checkpoint / "pytorch_model.bin").unlink()

    shards = {}
    for i, name in enumerate(tensors):
        shards.setdefault(f"model-{i % 3}.safetensors", {})[name] = tensors[name]
    for file, part in shards.items():
        safetensors.numpy.save_file(part, checkpoint / file)
    index = {"weight_map": {name: f for f, part in shards.items() for name in part}}
    (checkpoint / "model.safetensors.index.json").write_text(json.dumps(index))
    assert convert(checkpoint, tmp_path / "c.gguf", "f16").read_bytes() == want


def test_rope_theta_in_both_spellings(checkpoint, tmp_path):
    for i, change in enumerate(
        (
            {"rope_theta": 5e5},
            {"rope_theta": ..., "rope_parameters": {"rope_theta": 5e5, "rope_type": "default"}},
        )
    ):
        edit_config(checkpoint, **change)
        file = GGUFFile(convert(checkpoint, tmp_path / f"{i}.gguf", "f16"))
        assert file.get_float("llama.rope.freq_base") == 5e5


def test_dense_keeps_the_standard_layout(tiny_checkpoint, tmp_path):
    """A SwiGLU Llama as llama.cpp knows it: its names, its shapes, no key that it would miss."""
    folder = tiny_checkpoint("swiglu")
    refused_target = tmp_path / "no.gguf"
    with pytest.raises(ModelError, match=r"'silu'.*never fall silent.*--dense"):
        convert(folder, refused_target, "f16")
    file = GGUFFile(convert(folder, tmp_path / "x.gguf", "f16", dense=True))
    down = tiny.MODELS["swiglu"].tensors()["model.layers.0.mlp.down_proj.weight"]
    assert np.array_equal(file.tensors["blk.0.ffn_down.weight"].numpy(), down)
    assert not any("ffn_down_t" in name for name in file.tensors)
    import gguf

    known = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, 2).mapping.values()
    names = {name for _, name in known}
    assert {n.removesuffix(".weight") for n in file.tensors} <= names
    with powerinfer.open(tmp_path / "x.gguf") as llm:
        assert llm.mode == "dense"


def test_tied_head_is_not_written_twice(tiny_checkpoint, tmp_path):
    file = GGUFFile(convert(tiny_checkpoint("tied"), tmp_path / "x.gguf", "f16"))
    assert "output.weight" not in file.tensors


def test_chat_template_is_kept(checkpoint, tmp_path):
    template = "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}{% endfor %}"
    settings = {"chat_template": template, "add_bos_token": False}
    (checkpoint / "tokenizer_config.json").write_text(json.dumps(settings))
    file = GGUFFile(convert(checkpoint, tmp_path / "x.gguf", "f16"))
    assert file.get_str("tokenizer.chat_template") == template
    assert file.get_bool("tokenizer.ggml.add_bos_token", True) is False


def test_vocabulary(checkpoint, tmp_path):
    (checkpoint / "added_tokens.json").write_text('{"<tool>": 384, "<end>": 385}')
    edit_config(checkpoint, vocab_size=400)

    def grow(tensors):
        for name in ("model.embed_tokens.weight", "lm_head.weight"):
            tensors[name] = np.concatenate([tensors[name], tensors[name][:16]])

    edit_tensors(checkpoint, grow)
    with powerinfer.open(convert(checkpoint, tmp_path / "x.gguf", "f16")) as llm:
        assert llm.tokenizer.n_vocab == 400
        assert 384 in llm.tokenize("a<tool>b")
        assert llm.detokenize(llm.tokenize("a<tool>b<end>")) == "a<tool>b<end>"
        assert llm.detokenize([399]) == ""


# -- refusals ---------------------------------------------------------------------------------


def test_refused_configs(checkpoint):
    cases = [
        ({"architectures": ["GPT2LMHeadModel"]}, "'GPT2LMHeadModel'; supported: LlamaForCausalLM"),
        ({"architectures": []}, r"holds a '\?'"),
        ({"hidden_act": "tanh"}, "'tanh', which is not supported"),
        ({"hidden_act": "gelu"}, "'gelu'.*never fall silent.*--dense"),
        ({"hidden_size": "64"}, "hidden_size is '64'"),
        ({"hidden_size": -64}, "hidden_size is -64"),
        ({"hidden_size": True}, "hidden_size is True"),
        ({"num_hidden_layers": ...}, "num_hidden_layers is None"),
        ({"num_key_value_heads": 3}, "numbers of heads"),
        ({"rms_norm_eps": 0.0}, "rms_norm_eps is 0"),
        ({"rope_scaling": {"type": "yarn", "factor": 4}}, "rope scaling 'yarn'"),
        ({"intermediate_size": 64}, r"gate_proj.weight is \[96, 64\], not \[64, 64\]"),
        ({"num_hidden_layers": 3}, "lacks the tensor model.layers.2"),
        ({"num_hidden_layers": 1}, "not known: model.layers.1"),
        ({"vocab_size": 300}, r"is \[384, 64\], not \[300, 64\]"),
    ]
    before = (checkpoint / "config.json").read_text()
    for change, message in cases:
        edit_config(checkpoint, **change)
        refused(checkpoint, message)
        (checkpoint / "config.json").write_text(before)
    (checkpoint / "config.json").write_text("not json")
    refused(checkpoint, "not valid JSON", FileFormatError)
    (checkpoint / "config.json").unlink()
    refused(checkpoint, "config.json", FileNotFoundError)
    refused(checkpoint.parent / "nothing", "not a directory", FileNotFoundError)


def test_refused_rope_and_names(checkpoint):
    linear, llama3 = {"type": "linear"}, {"rope_type": "llama3", "factor": 2}
    cases = [
        ({"architectures": 5}, "holds a"),
        ({"architectures": {"a": 1}}, "holds a"),
        ({"architectures": [["LlamaForCausalLM"]]}, "holds a"),
        ({"num_hidden_layers": 2**31 - 1}, "num_hidden_layers is 2147483647"),
        ({"max_position_embeddings": 2**31}, "max_position_embeddings is"),
        ({"rope_scaling": "linear"}, "rope scaling is 'linear'"),
        ({"rope_scaling": [1]}, r"rope scaling is \[1\]"),
        ({"rope_scaling": linear}, "factor is None"),
        ({"rope_scaling": linear | {"factor": "x"}}, "factor is 'x'"),
        ({"rope_scaling": linear | {"factor": 0}}, "factor is 0"),
        ({"rope_scaling": llama3}, "original_max_position_embeddings is None"),
        ({"rope_theta": None}, "rope_theta is None"),
        ({"rope_theta": -5}, "rope_theta is -5"),
        ({"rope_theta": 10**400}, "rope_theta is 1000"),
        ({"rope_theta": float("inf")}, "rope_theta is inf"),
    ]
    before = (checkpoint / "config.json").read_text()
    for change, message in cases:
        edit_config(checkpoint, **change)
        refused(checkpoint, message)
        (checkpoint / "config.json").write_text(before)
    (checkpoint / "config.json").write_text('{"a": ' + "1" * 5000 + "}")
    refused(checkpoint, "not valid JSON", FileFormatError)


def test_refused_variants(tmp_path, tiny_checkpoint):
    cases = [
        ("falcon7", {"alibi": True}, "falcon-rw"),
        ("falcon7", {"parallel_attn": False}, "without parallel attention"),
        ("falcon7", {"bias": True}, "falcon-rw"),
        ("falcon7", {"activation": "gelu"}, "'gelu'.*--dense"),
        ("falcon7", {"activation": ...}, "--activation relu"),
        ("opt", {"word_embed_proj_dim": 32}, "OPT-350m"),
        ("opt", {"do_layer_norm_before": False}, "OPT-350m"),
        ("opt", {"layer_norm_elementwise_affine": False}, "Galactica"),
        ("bamboo", {"mamba_n_heads": 3}, "IBM's Bamboo"),
        ("prosparse", {"hidden_act_param": -1.0}, "hidden_act_param is -1"),
    ]
    for i, (name, change, message) in enumerate(cases):
        folder = tmp_path / str(i) / "m"
        shutil.copytree(tiny_checkpoint(name), folder)
        edit_config(folder, **change)
        refused(folder, message)


def test_falcon_that_does_not_say_its_activation(tmp_path, tiny_checkpoint):
    from powerinfer.convert.converter import plan_conversion
    from powerinfer.quantize.policy import Policy

    folder = tmp_path / "m"
    shutil.copytree(tiny_checkpoint("falcon7"), folder)
    edit_config(folder, activation=...)
    predictors = random_predictors(tiny.MODELS["falcon7"], tmp_path / "p", 32)
    policy = Policy(GGMLType.F16)
    for conversion, n_warnings in (
        (plan_conversion(folder, predictors, policy, False), 1),
        (plan_conversion(folder, None, policy, False, "relu"), 0),
    ):
        assert conversion.keys["powerinfer.ffn_activation"].value == "relu"
        assert len(conversion.warnings) == n_warnings


def test_sliding_window_limits_the_context(checkpoint, tmp_path):
    edit_config(checkpoint, architectures=["MistralForCausalLM"], sliding_window=100)
    with powerinfer.open(convert(checkpoint, tmp_path / "x.gguf", "f16")) as llm:
        assert llm.context == 100


def test_large_vocabularies_do_not_take_long(checkpoint):
    added = {f"<{i}>": 384 + i for i in range(200_000)}
    (checkpoint / "added_tokens.json").write_text(json.dumps(added))
    refused(checkpoint, "has 200384 tokens, the embedding only 384")


def test_texts_that_are_not_unicode(checkpoint, tmp_path):
    (checkpoint / "tokenizer_config.json").write_text('{"chat_template": "\\ud800"}')
    refused(checkpoint, "tokenizer.chat_template would hold text that is not valid Unicode")
    (checkpoint / "tokenizer_config.json").unlink()
    if os.name != "nt":
        odd = tmp_path / os.fsdecode(b"odd\xff")
        try:
            checkpoint.rename(odd)
        except OSError:
            return  # this file system has only Unicode names
        file = GGUFFile(convert(odd, tmp_path / "x.gguf", "f16"))
        assert file.get_str("general.name") == "odd\ufffd"


def test_refused_tensors(checkpoint):
    edit_tensors(checkpoint, lambda t: t.pop("model.norm.weight"))
    refused(checkpoint, "lacks the tensor model.norm.weight")
    edit_tensors(checkpoint, lambda t: t.update({"model.norm.weight": np.ones(3, np.float16)}))
    refused(checkpoint, r"model.norm.weight is \[3\], not \[64\]")
    edit_tensors(checkpoint, lambda t: t.update({"model.norm.weight": np.ones(64, np.float16)}))
    edit_tensors(checkpoint, lambda t: t.update({"model.extra.weight": np.ones(3, np.float16)}))
    refused(checkpoint, "not known: model.extra.weight")


def test_a_missing_layer_part_is_named(checkpoint):
    edit_tensors(checkpoint, lambda t: t.pop("model.layers.1.mlp.up_proj.weight"))
    refused(checkpoint, "lacks the tensor model.layers.1.mlp.up_proj.weight")


def test_refused_tokenizers(checkpoint):
    path = checkpoint / "tokenizer.model"
    good = path.read_bytes()
    for bad in (b"garbage", b"", good[:100]):
        path.write_bytes(bad)
        refused(checkpoint, "tokenizer.model", FileFormatError)
    path.write_bytes((DEMO / "tokenizer.model").read_bytes())
    refused(checkpoint, "has 4096 tokens, the embedding only 384")
    path.unlink()
    refused(checkpoint, "has no tokenizer", FileNotFoundError)


def test_refused_predictors(checkpoint, tmp_path):
    model = tiny.MODELS["mha"]
    folder = random_predictors(model, tmp_path / "predictors", 32)
    good = np.ones((32, 64), np.float32)

    def with_layer_1(fc1, fc2):
        torchfile.write_tensors(folder / "model_1.pt", {"fc1.weight": fc1, "fc2.weight": fc2})

    with_layer_1(good, np.ones((95, 32), np.float32))
    refused(checkpoint, r"model_1.pt does not fit.*\[95, 32\]", predictors=folder)
    with_layer_1(good[:, :60], np.ones((96, 32), np.float32))
    refused(checkpoint, "model_1.pt does not fit", predictors=folder)
    with_layer_1(good, np.full((96, 32), np.nan, np.float32))
    refused(checkpoint, "model_1.pt holds NaN", FileFormatError, predictors=folder)
    torchfile.write_tensors(folder / "model_1.pt", {"fc1.weight": good})
    refused(checkpoint, "lacks fc1.weight or fc2.weight", FileFormatError, predictors=folder)
    (folder / "model_1.pt").unlink()
    refused(checkpoint, "model_1.pt", FileNotFoundError, predictors=folder)
    (folder / "config.json").write_text('{"sparse_threshold": "high"}')
    refused(checkpoint, "sparse_threshold is 'high'", FileFormatError, predictors=folder)
    refused(checkpoint, "not a directory", FileNotFoundError, predictors=folder / "nothing")


def test_an_interrupted_conversion_leaves_nothing(checkpoint, tmp_path):
    from powerinfer.convert.converter import plan_conversion, write_conversion
    from powerinfer.quantize.policy import Policy

    def interrupt(_):
        raise KeyboardInterrupt

    before = set(tmp_path.rglob("*"))
    with pytest.raises(KeyboardInterrupt):
        conversion = plan_conversion(checkpoint, None, Policy(GGMLType.F16), False)
        write_conversion(conversion, tmp_path / "x.gguf", interrupt)
    assert set(tmp_path.rglob("*")) == before


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc/self/status")
@pytest.mark.parametrize("kind", ["safetensors", "bin"])
def test_memory_stays_small(kind, tmp_path):
    """Anonymous memory < 1.5 x the largest tensor + 300 MB, with a checkpoint well above that."""
    n_vocab = n_embd = n_ff = 4096  # 32 MiB as fp16; the whole model half a GiB
    model = tiny.Tiny(n_embd, n_ff, n_layer=4, n_head=2, n_head_kv=2, head_dim=64)
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(model.config() | {"vocab_size": n_vocab}))
    (folder / "tokenizer.model").write_bytes((DEMO / "tokenizer.model").read_bytes())
    tensors = {}
    for name, x in tiny.Tiny(n_layer=4).tensors().items():
        if x.ndim == 1:
            shape = (n_embd,)
        elif "embed" in name or "lm_head" in name:
            shape = (n_vocab, n_embd)
        elif "mlp" in name:
            shape = (n_ff, n_embd)
        else:
            shape = (n_embd, 128) if "o_proj" in name else (128, n_embd)
        tensors[name] = np.zeros(shape, np.float16)
    if kind == "bin":
        torchfile.write_tensors(folder / "pytorch_model.bin", tensors)
    else:
        safetensors.numpy.save_file(tensors, folder / "model.safetensors")
    largest = max(x.nbytes for x in tensors.values())
    total = sum(x.nbytes for x in tensors.values())
    del tensors
    assert total > 3 * largest + (300 << 20)
    script = """
import sys, threading, time
peak = 0
def anonymous():
    for line in open("/proc/self/status"):
        if line.startswith("RssAnon"):
            return int(line.split()[1]) * 1024
def watch():
    global peak
    while True:
        peak = max(peak, anonymous())
        time.sleep(0.002)
threading.Thread(target=watch, daemon=True).start()
from powerinfer.__main__ import run_command
code = run_command("convert", [sys.argv[1], "--outfile", sys.argv[2]], "convert")
print(code, peak)
"""
    out = subprocess.run(
        [sys.executable, "-c", script, str(folder), str(tmp_path / "x.gguf")],
        check=True,
        capture_output=True,
        text=True,
    ).stdout.split()
    assert out[0] == "0"
    assert 0 < int(out[1]) < 1.5 * largest + 300e6


def test_sentencepiece_is_new_enough():
    """Versions before 0.2.1 overflow on hostile models (CVE-2026-1260)."""
    assert tuple(int(n) for n in sentencepiece.__version__.split(".")[:3]) >= (0, 2, 1)
