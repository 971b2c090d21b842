"""What FFNs see and do, on disk: right, used again, never taken for whole when it is not."""

import numpy as np
import pytest
from powerinfer.predictors.capture import capture, fingerprint
from powerinfer.runtime.engine import Engine
from powerinfer.runtime.errors import RequestError
from powerinfer.runtime.gguf import GGUFFile
from truth import EXACT, TEXTS, captured, kept, truth


@pytest.mark.parametrize("name", ["mha", "bias", "bamboo", "prosparse", "relu2", "falcon7", "opt"])
def test_capture(name, tiny_gguf, tmp_path):
    path = tiny_gguf(name, "f32")
    data = captured(path, tmp_path)
    with Engine(path, EXACT) as engine:
        keep = kept(engine, TEXTS)
        for il, found in enumerate(data):
            h = keep["h", il]
            layer = truth(engine, il, h)
            down = engine.weights.layers[il].down_t.float32()
            effects = np.abs(layer.act) * np.linalg.norm(down, axis=1) * layer.fires
            fired = found.fired(slice(None))
            assert len(found) == 4 * 61 and found.n_ff == engine.config.n_ff
            assert np.array_equal(found.inputs, h.astype(np.float16))
            assert np.array_equal(found.x(slice(3, 9)), h[3:9].astype(np.float16))
            assert np.array_equal(fired[layer.sure], layer.fires[layer.sure])
            assert layer.slack < 20
            rows = np.array([7, 0, 243, 100])
            close = {"rtol": 2e-3, "atol": 1e-4}  # float16
            assert np.allclose(found.effect(rows), effects[rows], **close)
            learn, check = found.split(36)
            assert (len(learn), len(check)) == (244 - 36, 36)
            assert np.allclose(check.effect(np.array([5, 1])), effects[[213, 209]], **close)
            assert np.array_equal(check.fired(slice(2)), fired[208:210])
            assert np.array_equal(learn.x(slice(207, None)), found.x(slice(207, 208)))


def test_a_capture_is_used_again(tiny_gguf, tmp_path, monkeypatch):
    """For the same model and text only."""
    calls = []
    plain = Engine.read
    monkeypatch.setattr(Engine, "read", lambda *args: calls.append(1) or plain(*args))

    def texts_run(name, texts, outtype="f32"):
        calls.clear()
        data = captured(tiny_gguf(name, outtype), tmp_path, texts)
        assert sum(map(len, texts)) == len(data[0])
        return len(calls)

    assert texts_run("mha", TEXTS) == 4
    assert texts_run("mha", TEXTS) == 0
    other = [TEXTS[0], [*TEXTS[1][:-1], 9 if TEXTS[1][-1] != 9 else 10]]
    assert texts_run("mha", other) == 2 and texts_run("mha", other) == 0
    assert texts_run("bias", other) == 2
    assert texts_run("mha", other) == 2
    assert texts_run("mha", other, "q8_0") == 2
    for damaged in (b"", b'{"fingerprint"', b"[]", b"\xff"):  # the disk was full
        (tmp_path / "capture.json").write_bytes(damaged)
        assert texts_run("mha", other, "q8_0") == 2


def test_a_fingerprint_is_of_all_matrices(demo_gguf, tmp_path):
    """A change of attention alone, far behind the header."""
    source, changed = demo_gguf("f16"), tmp_path / "changed.gguf"
    raw = bytearray(source.read_bytes())
    at = raw.find(GGUFFile(source).tensors["blk.1.attn_q.weight"].data.tobytes())
    assert at > 1 << 20
    raw[at] ^= 1
    changed.write_bytes(raw)
    with Engine(source, EXACT) as a, Engine(changed, EXACT) as b:
        found = fingerprint(a, TEXTS)
        assert found == fingerprint(a, TEXTS) and fingerprint(b, TEXTS) != found
        assert fingerprint(a, TEXTS[:3]) != found


def test_an_interrupted_capture_is_not_taken_for_a_whole_one(tiny_gguf, tmp_path):
    path = tiny_gguf("mha", "f32")
    whole, folder = tmp_path / "whole", tmp_path / "cut"
    whole.mkdir(), folder.mkdir()
    expected = captured(path, whole)
    captured(path, folder)

    def stop(_):
        raise KeyboardInterrupt

    with Engine(path, EXACT) as engine:
        for texts in (TEXTS[::-1], TEXTS):  # of another text, in place of the finished one; its own
            with pytest.raises(KeyboardInterrupt):
                capture(engine, texts, folder, stop)
            assert engine.watcher is None
            done = []
            found = capture(engine, TEXTS, folder, done.append)
            assert len(done) == 4
            for a, b in zip(found, expected, strict=True):
                for name in ("inputs", "bits", "effects", "ends"):
                    assert np.array_equal(getattr(a, name), getattr(b, name))
            (folder / "capture.json").unlink()


def test_capture_without_room(tiny_gguf, tmp_path, monkeypatch):
    free = type("Usage", (), {"free": 1000})
    monkeypatch.setattr("shutil.disk_usage", lambda _: free)
    with pytest.raises(RequestError, match="take fewer tokens"):
        captured(tiny_gguf("mha", "f32"), tmp_path)
