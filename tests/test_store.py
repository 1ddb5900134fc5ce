"""Checkpoints on disk: whole at any moment, never a pickle, and every refusal worded."""

from __future__ import annotations

import errno
import json
import os
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from implicitdl._internal import errors, store

SOURCE = Path(errors.__file__).parents[1]


def old() -> tuple[dict[str, torch.Tensor], dict]:
    return {"A": torch.zeros(3, 3), "b": torch.zeros(3)}, {"kind": "model", "n": 3}


def new() -> tuple[dict[str, torch.Tensor], dict]:
    return {"A": torch.ones(4, 4), "b": torch.ones(4)}, {"kind": "model", "n": 4}


def same(folder: Path, checkpoint: tuple[dict[str, torch.Tensor], dict]) -> bool:
    tensors, meta = store.load(folder)
    return (
        meta == checkpoint[1]
        and tensors.keys() == checkpoint[0].keys()
        and all(torch.equal(tensors[name], value) for name, value in checkpoint[0].items())
    )


DTYPES = [
    torch.float64,
    torch.float32,
    torch.bfloat16,
    torch.float16,
    torch.int64,
    torch.int32,
    torch.uint8,
    torch.bool,
    torch.complex64,
]


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_tensor_comes_back_bit_for_bit(tmp_path, dtype):
    shapes = [(), (0,), (3,), (2, 0, 4), (2, 3, 4)]
    given = {f"x{i}": (10 * torch.randn(shape)).to(dtype) for i, shape in enumerate(shapes)}
    store.save(tmp_path / "c", given, {})
    tensors, meta = store.load(tmp_path / "c")
    assert meta == {}
    assert tensors.keys() == given.keys()
    for name, tensor in given.items():
        assert tensors[name].dtype == dtype
        assert tensors[name].shape == tensor.shape
        assert torch.equal(tensors[name], tensor)


LEAVES = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text()
JSON = LEAVES | st.deferred(lambda: st.lists(JSON, max_size=4) | st.dictionaries(st.text(), JSON, max_size=4))


@given(value=JSON)
def test_meta_comes_back(tmp_path_factory, value):
    folder = tmp_path_factory.mktemp("c")
    store.save(folder, {}, {"value": value})
    assert store.load(folder) == ({}, {"value": value})


def test_nan_signs_and_infinities_in_tensors(tmp_path):
    tensor = torch.tensor([float("nan"), float("inf"), -0.0, 5e-324], dtype=torch.float64)
    store.save(tmp_path, {"x": tensor}, {})
    found = store.load(tmp_path)[0]["x"]
    assert torch.equal(found.view(torch.int64), tensor.view(torch.int64))


def test_views_ties_transposes_and_parameters(tmp_path):
    base = torch.arange(12.0).reshape(3, 4)
    tied = torch.nn.Parameter(torch.randn(3))
    store.save(tmp_path, {"view": base[1:, ::2], "t": base.T, "tied1": tied, "tied2": tied}, {})
    tensors, _ = store.load(tmp_path)
    assert torch.equal(tensors["view"], base[1:, ::2])
    assert torch.equal(tensors["t"], base.T)
    assert torch.equal(tensors["tied1"], tied.detach())
    assert torch.equal(tensors["tied2"], tied.detach())


def test_loaded_tensors_can_be_written_to(tmp_path):
    store.save(tmp_path, {"x": torch.zeros(2)}, {})
    tensors, _ = store.load(tmp_path)
    tensors["x"].add_(1)
    assert torch.equal(store.load(tmp_path)[0]["x"], torch.zeros(2))


def test_the_layout_is_the_one_of_save_pretrained(tmp_path):
    store.save(tmp_path / "c", *old())
    assert sorted(os.listdir(tmp_path / "c")) == ["config.json", "model.safetensors"]
    assert os.listdir(tmp_path) == ["c"]
    config = json.loads((tmp_path / "c" / "config.json").read_text())
    assert config["n"] == 3
    assert config["kind"] == "model"


def test_saving_leaves_other_files_alone_and_no_temporary(tmp_path):
    (tmp_path / "README.md").write_text("mine")
    store.save(tmp_path, *old())
    store.save(tmp_path, *new())
    assert sorted(os.listdir(tmp_path)) == ["README.md", "config.json", "model.safetensors"]
    assert same(tmp_path, new())


def test_the_same_checkpoint_is_the_same_bytes(tmp_path):
    store.save(tmp_path / "1", *old())
    store.save(tmp_path / "2", *old())
    for name in ("config.json", "model.safetensors"):
        assert (tmp_path / "1" / name).read_bytes() == (tmp_path / "2" / name).read_bytes()


def refused(folder: Path, **options) -> str:
    with pytest.raises(store.CheckpointError) as caught:
        store.load(folder, **options)
    text = str(caught.value)
    assert "\n" not in text
    assert text.startswith(f"checkpoint '{folder}': expected ")
    return text


def test_missing_folder(tmp_path):
    assert "got nothing there" in refused(tmp_path / "nowhere")


def test_folder_without_a_checkpoint(tmp_path):
    assert "got no model.safetensors in it" in refused(tmp_path)


def test_a_file_in_place_of_the_folder(tmp_path):
    store.save(tmp_path, *old())
    assert "Give the folder that the file is in" in refused(tmp_path / "model.safetensors")


@pytest.mark.parametrize("keep", [0, 4, 60, -1])
def test_truncated_tensors(tmp_path, keep):
    store.save(tmp_path, *old())
    path = tmp_path / "model.safetensors"
    path.write_bytes(path.read_bytes()[:keep])
    text = refused(tmp_path)
    assert "a whole model.safetensors" in text
    assert "truncated or damaged" in text


def test_truncated_config(tmp_path):
    store.save(tmp_path, *old())
    path = tmp_path / "config.json"
    path.write_bytes(path.read_bytes()[:-20])
    assert "a whole config.json, got one that cannot be read (" in refused(tmp_path)


def test_missing_config(tmp_path):
    store.save(tmp_path, *old())
    (tmp_path / "config.json").unlink()
    assert "config.json beside model.safetensors, got none" in refused(tmp_path)


def test_config_of_another_library(tmp_path):
    store.save(tmp_path, *old())
    (tmp_path / "config.json").write_text("{}")
    assert "Another library wrote it" in refused(tmp_path)


def test_a_flipped_bit(tmp_path):
    store.save(tmp_path, *old())
    path = tmp_path / "model.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    assert "or one is damaged" in refused(tmp_path)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_a_pair_of_two_saves(tmp_path, name):
    store.save(tmp_path / "1", *old())
    store.save(tmp_path / "2", *new())
    (tmp_path / "1" / name).write_bytes((tmp_path / "2" / name).read_bytes())
    assert "The two files come from different saves" in refused(tmp_path / "1")


def test_format_of_a_later_version(tmp_path):
    store.save(tmp_path, *old())
    path = tmp_path / "config.json"
    path.write_text(path.read_text().replace('"format": 2', '"format": 3'))
    assert "expected format 2, got format 3. Update implicitdl" in refused(tmp_path)


def test_another_kind(tmp_path):
    store.save(tmp_path, *old())
    assert "a checkpoint of kind 'training', got 'model'" in refused(tmp_path, kind="training")


class Bomb:
    """Its pickle creates the file that it names, when it is loaded."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return (open, (str(self.path), "w"))


@pytest.mark.parametrize(("name", "writer"), [
    ("model.pt", "torch.save"), ("pytorch_model.bin", "torch.save"), ("weights.pkl", "pickle"),
    ("model.safetensors", "torch.save"), ("model.safetensors", "pickle"), ("odd", "torch.save"), ("odd", "pickle"),
])  # fmt: skip
def test_a_pickle_is_named_and_never_loaded(tmp_path, name, writer):
    trap = tmp_path / "ran"
    path = tmp_path / name
    write = {"torch.save": torch.save, "pickle": lambda value, to: to.write_bytes(pickle.dumps(value))}
    write[writer]({"A": Bomb(trap)}, path)
    text = refused(path)
    assert f"got the pickle {name}" in text
    assert "torch.load(path, weights_only=True)" in text
    assert "model.save_pretrained(folder)" in text
    assert not trap.exists()


@pytest.mark.parametrize("name", ["model.pt", "pytorch_model.bin", "model.safetensors"])
def test_a_folder_with_a_pickle_in_it(tmp_path, name):
    torch.save({"A": torch.zeros(2)}, tmp_path / name)
    assert f"got the pickle {name}" in refused(tmp_path)


def not_saved(folder: Path, *checkpoint) -> str:
    with pytest.raises(store.CheckpointError) as caught:
        store.save(folder, *checkpoint)
    text = str(caught.value)
    assert "\n" not in text
    assert text.startswith(f"checkpoint '{folder}': expected ")
    return text


@pytest.mark.parametrize(
    ("tensor", "words"),
    [(torch.eye(3).to_sparse(), "dense tensors"), (torch.empty(2, device="meta"), "'x' on the meta device")],
)
def test_tensors_that_are_not_dense(tmp_path, tensor, words):
    assert words in not_saved(tmp_path / "c", {"x": tensor}, {})
    assert not (tmp_path / "c").exists()


def test_a_dtype_without_a_name_in_safetensors(tmp_path):
    text = not_saved(tmp_path / "c", {"x": torch.zeros(2, dtype=torch.complex128)}, {})
    assert "got torch.complex128" in text


@pytest.mark.parametrize("value", [float("nan"), torch.relu, {1, 2}])
def test_meta_that_json_cannot_hold(tmp_path, value):
    assert "settings that JSON can hold" in not_saved(tmp_path / "c", {}, {"x": value})
    assert not (tmp_path / "c").exists()


@pytest.mark.parametrize("place", ["c", "c/d/e"])
def test_a_file_where_the_folder_should_be(tmp_path, place):
    (tmp_path / "c").write_text("mine")
    assert "A file is in the way" in not_saved(tmp_path / place, *old())
    assert (tmp_path / "c").read_text() == "mine"


REFUSALS = [
    (errno.ENOSPC, "room on the disk", "Free some space"),
    (errno.EDQUOT, "room on the disk", "Free some space"),
    (errno.EROFS, "a folder that can be written", "choose another folder"),
    (errno.EACCES, "a folder that can be written", "choose another folder"),
    (errno.EIO, "a folder that can be written", "What was saved there before is unchanged"),
]


@pytest.mark.parametrize(("function", "call", "code", "expected", "do"), [
    *(("fsync", 1, *refusal) for refusal in REFUSALS),
    ("fsync", 2, *REFUSALS[0]), ("replace", 1, *REFUSALS[2]), ("replace", 2, *REFUSALS[4]),
])  # fmt: skip
def test_the_system_refuses(tmp_path, monkeypatch, function, call, code, expected, do):
    """The call-th fsync or rename fails: what is there is whole, and the next save finds a clean folder."""
    folder = tmp_path / "c"
    store.save(folder, *old())
    real, calls = getattr(os, function), []

    def refusing(*arguments):
        calls.append(arguments)
        if len(calls) == call:
            raise OSError(code, os.strerror(code))
        return real(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(os, function, refusing)
        text = not_saved(folder, *new())
    assert f"expected {expected}, got {os.strerror(code)}." in text
    assert do in text
    # The second rename comes after the commit: from then on the new one is there.
    committed = (function, call) == ("replace", 2)
    assert same(folder, (old, new)[committed]())
    assert ("config.json.new" in os.listdir(folder)) == committed
    assert "model.safetensors.new" not in os.listdir(folder)
    store.save(folder, *old())
    assert same(folder, old())
    assert sorted(os.listdir(folder)) == ["config.json", "model.safetensors"]


def test_a_full_disk_at_the_first_save_leaves_nothing(tmp_path, monkeypatch):
    def full(handle):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    assert "No space left on device" in not_saved(tmp_path / "c", *old())
    assert os.listdir(tmp_path) == []


def test_write_file_is_atomic_and_worded(tmp_path, monkeypatch):
    path = tmp_path / "metrics.csv"
    store.write_file(path, b"old")

    def full(handle):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(store.CheckpointError, match="room on the disk"):
        store.write_file(path, b"new")
    assert path.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["metrics.csv"]


def test_exists(tmp_path):
    assert not store.exists(tmp_path)
    assert not store.exists(tmp_path / "nowhere")
    store.save(tmp_path, *old())
    assert store.exists(tmp_path)


# Each attempt is a forked process that ends, without any cleaning up, at its k-th call to the system; a write
# that is cut has written half. `chain` lists the k of attempts made one after another in the same folder.
CRASHES = """
import os, shutil, sys, torch
from implicitdl._internal import store

folder = sys.argv[1]
state = lambda i: ({"A": torch.full((3, 3), float(i)), "b": torch.zeros(i + 1)}, {"kind": "model", "i": i})

def crash_at(k):
    left = [k]
    def cut(function, half=None):
        def call(*arguments):
            left[0] -= 1
            if left[0] == 0:
                if half:
                    half(*arguments)
                os._exit(9)
            return function(*arguments)
        return call
    real = store._write
    def half(path, data):
        with open(path, "wb") as file:
            file.write(data[: len(data) // 2])
    store._write = cut(real, half)
    os.replace, os.fsync, os.unlink = cut(os.replace), cut(os.fsync), cut(os.unlink)

os.fsync = lambda handle: None  # counted all the same: what was written outlives a process, if not a power cut

def attempt(i, k):
    child = os.fork()
    if child == 0:
        crash_at(k)
        store.save(folder, *state(i))
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])

def whole(allowed):
    tensors, meta = store.load(folder)
    i = meta["i"]
    assert i in allowed, (i, allowed)
    assert all(torch.equal(tensors[name], value) for name, value in state(i)[0].items()), (i, tensors)
    return i

def chain(ks):
    shutil.rmtree(folder, ignore_errors=True)
    store.save(folder, *state(0))
    now, finished = 0, True
    for i, k in enumerate(ks, start=1):
        code = attempt(i, k)
        assert code in (0, 9), code
        finished = code == 0
        now = whole({i} if finished else {now, i})
    store.save(folder, *state(9))
    whole({9})
    assert sorted(os.listdir(folder)) == ["config.json", "model.safetensors"], os.listdir(folder)
    return finished

steps = 1
while not chain([steps]):
    steps += 1
assert steps > 7, steps  # two writes with their fsyncs, two renames, two fsyncs of the folder
for first in range(1, steps):
    for second in range(1 + first % 3, steps + 3, 3):
        chain([first, second])
for k in range(1, steps, 2):
    chain([k, k + 1, k, k + 1])
print("whole after", steps, "steps")
"""


def test_whole_after_a_kill_at_any_step(tmp_path):
    """Every step of a save, a third of the pairs of steps of two saves in a row, and chains of four."""
    environment = {**os.environ, "PYTHONPATH": str(SOURCE), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", CRASHES, str(tmp_path / "c")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    assert "whole after" in done.stdout
