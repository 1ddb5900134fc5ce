"""What a folder says is checked before it is believed: settings, weights, links, names, and who writes to it."""

from __future__ import annotations

import hashlib
import json
import os
import random
import resource
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import safetensors.torch
import torch
from torch import nn
from torch.nn.utils import parametrize, prune

from implicitdl import (
    SHINE,
    Anderson,
    ArgumentError,
    Auto,
    Broyden,
    ImplicitAdjoint,
    ImplicitModel,
    Newton,
    PhantomGradient,
    Picard,
    Unrolled,
)
from implicitdl._internal import errors, store
from implicitdl.activations import TANH, Activation
from implicitdl.constraints import RowProjection, RowScaling, SoftRowScaling, WeightedRowScaling
from implicitdl.nn import DenseEquilibriumClassifier, MonotoneConvClassifier
from implicitdl.nn.pretrained import NotRebuiltError
from implicitdl.training.logger import load_weights, save_weights

SOURCE = Path(errors.__file__).parents[1]
SIZES = {"input_dim": 3, "output_dim": 2, "hidden_dim": 5}
CheckpointError = store.CheckpointError


def signed(folder: Path, config: dict, tensors: dict[str, torch.Tensor] | None = None) -> None:
    """Write what this library could have written: all digests fit, so only the content can be wrong."""
    if tensors is not None:
        (folder / "model.safetensors").write_bytes(safetensors.torch.save(tensors))
    config["sha256"] = hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()
    config["config_sha256"] = store._digest_of(config)
    (folder / "config.json").write_text(json.dumps(config))


def saved(folder: Path, model: nn.Module) -> tuple[dict, dict[str, torch.Tensor]]:
    model.save_pretrained(folder)
    tensors = safetensors.torch.load_file(folder / "model.safetensors")
    return json.loads((folder / "config.json").read_text()), tensors


def refused(kind: type, folder: Path, **own) -> str:
    with pytest.raises(CheckpointError) as caught:
        kind.from_pretrained(folder, **own)
    text = str(caught.value)
    assert "\n" not in text
    assert text.startswith(f"checkpoint '{folder}': expected ")
    return text


# What is read


def test_a_configuration_that_was_edited_is_found(tmp_path):
    ImplicitModel(**SIZES).save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    path.write_text(path.read_text().replace('"activation": "relu"', '"activation": "tanh"'))
    assert "got one that was changed since" in refused(ImplicitModel, tmp_path)


def test_how_a_configuration_is_spaced_and_ordered_does_not_matter(tmp_path):
    built, u = ImplicitModel(**SIZES), torch.randn(4, 3)
    config, _ = saved(tmp_path, built)
    (tmp_path / "config.json").write_text(json.dumps(dict(reversed(config.items()))))
    assert torch.equal(ImplicitModel.from_pretrained(tmp_path)(u), built(u))


def test_the_format_without_a_digest_of_the_configuration(tmp_path):
    config, _ = saved(tmp_path, ImplicitModel(**SIZES))
    del config["config_sha256"]
    (tmp_path / "config.json").write_text(json.dumps(config | {"format": 1}))
    text = refused(ImplicitModel, tmp_path)
    assert "got format 1, whose settings nothing vouches for. Build the model" in text


SETTINGS = {
    "a tolerance that accepts everything": (("solver", "rtol"), 1e12, "rtol strictly between 0 and 1"),
    "a negative tolerance": (("solver", "atol"), -1, "atol ≥ 0"),
    "a text for a number": (("solver", "slow", "growth"), "os.system", "Expected `float`, got `str` - at `$.growth`"),
    "a flag for a number": (("arguments", "hidden_dim"), True, "Expected `int`, got `bool`"),
    "a size beyond the weights": (("arguments", "hidden_dim"), 10**9, "hidden_dim=1000000000"),
    "another size": (("arguments", "hidden_dim"), 4, "(4, 4) float64 for 'A'"),
    "no size": (("arguments", "input_dim"), 0, "input_dim to be a positive integer"),
    "an unknown choice": (("arguments", "on_failure"), "shrug", "Invalid enum value 'shrug'"),
    "an unknown argument": (("arguments", "device"), "cuda", "unknown field `device`"),
    "an unknown setting": (("solver", "speed"), 2, "unknown field `speed`"),
    "an unknown entry": (("hook",), "os.system", "unknown field `hook`"),
    "an unknown class": (("solver", "class"), "os.system", "none for 'os.system'"),
    "a class of another kind": (("solver", "class"), "Unrolled", "none for 'Unrolled'"),
    "a class that is none": (("solver", "class"), ["Picard"], "the name of a class"),
    "an abstract class": (("adjoint", "class"), "Adjoint", "none for 'Adjoint'"),
    "an unknown constraint": (("constraint", "name"), "norm_inf", "none for 'norm_inf'"),
    "an unknown activation": (("activation",), "tanh\ud800", "none for 'tanh\\ud800'"),
    "an unknown dtype": (("arguments", "dtype"), "load", "Invalid enum value 'load'"),
    "another dtype": (("arguments", "dtype"), "float32", "(5, 5) float32 for 'A'"),
    "half precision that the weights have not": (("arguments", "dtype"), "float16", "(5, 5) float16 for 'A'"),
    "a rank without low rank": (("arguments", "rank"), 2, "rank together with is_low_rank"),
    "no flag": (("arguments", "bias"), 1, "Expected `bool`, got `int`"),
    "biases that are not there": (("arguments", "bias"), True, "(5,) float64 for 'b_x'"),
    "κ beyond its set": (("arguments", "kappa"), 1.5, "kappa strictly between 0 and 1"),
}


@pytest.mark.float64
@pytest.mark.parametrize(("path", "value", "words"), SETTINGS.values(), ids=SETTINGS.keys())
def test_settings_are_checked_one_by_one(tmp_path, path, value, words):
    config, _ = saved(tmp_path, ImplicitModel(**SIZES))
    inner = config
    for name in path[:-1]:
        inner = inner[name]
    inner[path[-1]] = value
    signed(tmp_path, config)
    assert words in refused(ImplicitModel, tmp_path)


def test_a_name_that_stands_twice(tmp_path):
    saved(tmp_path, ImplicitModel(**SIZES))
    path = tmp_path / "config.json"
    path.write_text(path.read_text().replace('"bias": false', '"bias": true, "bias": false'))
    assert "'bias' twice" in refused(ImplicitModel, tmp_path)


@pytest.mark.parametrize("text", ["NaN", "Infinity", "-Infinity", "1e999"])
def test_a_number_that_is_not_finite(tmp_path, text):
    saved(tmp_path, ImplicitModel(**SIZES))
    path = tmp_path / "config.json"
    path.write_text(path.read_text().replace('"kappa": 0.99', f'"kappa": {text}'))
    assert f"the number '{text}'" in refused(ImplicitModel, tmp_path)


@pytest.mark.parametrize("depth", [20, 400, 100_000])
def test_settings_in_settings_in_settings(tmp_path, depth):
    config, _ = saved(tmp_path, ImplicitModel(**SIZES))
    plain = json.dumps(config["solver"])
    start = plain[: plain.index('"slow": ') + len('"slow": ')]
    text = json.dumps(config).replace(plain, start * depth + plain + "}" * depth)
    (tmp_path / "config.json").write_text(text)
    sign = [signed, lambda folder, _: None][depth > 400]
    sign(tmp_path, json.loads(text) if depth <= 400 else {})
    assert any(words in refused(ImplicitModel, tmp_path) for words in ("at most 8 deep", "nested too deeply"))


def test_a_size_of_a_thousand_million_takes_no_memory(tmp_path):
    config, tensors = saved(tmp_path, ImplicitModel(**SIZES))
    config["arguments"]["hidden_dim"] = 10**9
    signed(tmp_path, config)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    refused(ImplicitModel, tmp_path)
    # A header may say the same: it is held against the bytes that follow it.
    data = (tmp_path / "model.safetensors").read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    header["A"]["shape"] = [10**9, 10**9]
    text = json.dumps(header).encode()
    (tmp_path / "model.safetensors").write_bytes(len(text).to_bytes(8, "little") + text + data[8 + length :])
    signed(tmp_path, config)
    assert "more numbers in 'A' than bytes" in refused(ImplicitModel, tmp_path)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100_000  # kB


WEIGHTS = {
    "integers": (lambda t: t | {"A": t["A"].long()}, "got (5, 5) int64"),
    "half precision": (lambda t: {name: value.half() for name, value in t.items()}, "(5, 5) float64 for 'A'"),
    "several dtypes": (lambda t: t | {"B": t["B"].float()}, "got (5, 3) float32"),
    "NaN": (lambda t: t | {"C": t["C"] * torch.nan}, "finite weights in 'C', got 10 NaN or infinite of 10"),
    "an infinity": (lambda t: t | {"D": t["D"] / 0}, "finite weights in 'D'"),
    "another shape": (lambda t: t | {"A": t["A"][:4].contiguous()}, "(5, 5) float64 for 'A'"),
    "a missing one": (lambda t: {name: t[name] for name in "ABC"}, "for 'D' of this ImplicitModel, got none"),
    "one too many": (lambda t: t | {"E": t["A"].clone()}, "no tensor for 'E'"),
    "an empty one": (lambda t: t | {"A": t["A"][:0].contiguous()}, "got (0, 5) float64"),
}


@pytest.mark.float64
@pytest.mark.parametrize(("change", "words"), WEIGHTS.values(), ids=WEIGHTS.keys())
def test_weights_are_held_against_the_model(tmp_path, change, words):
    config, tensors = saved(tmp_path, ImplicitModel(**SIZES))
    signed(tmp_path, config, change(tensors))
    assert words in refused(ImplicitModel, tmp_path)


@pytest.mark.float64
def test_the_weights_of_a_constraint_are_held_against_the_state(tmp_path):
    weighted = WeightedRowScaling(weights=torch.arange(1.0, 6.0))
    built, u = ImplicitModel(**SIZES, constraint=weighted), torch.randn(4, 3)
    config, tensors = saved(tmp_path, built)
    assert torch.equal(ImplicitModel.from_pretrained(tmp_path)(u), built(u))
    signed(tmp_path, config, tensors | {"constraint.weights": torch.ones(1)})
    assert "(5,) float64 for 'constraint.weights'" in refused(ImplicitModel, tmp_path)
    signed(tmp_path, config, tensors | {"constraint.weights": -torch.ones(5)})
    assert "positive finite weights" in refused(ImplicitModel, tmp_path)


@pytest.mark.parametrize("kind", [RowScaling, RowProjection, SoftRowScaling])
def test_the_slope_that_a_constraint_was_built_for_comes_back(tmp_path, kind):
    built = ImplicitModel(**SIZES, constraint=kind(kappa=0.5, lipschitz=3.0))
    with torch.no_grad():
        built.A.mul_(100)
    built.save_pretrained(tmp_path)
    u = torch.randn(4, 3)
    for own in ({}, {"constraint": kind}, {"constraint": kind(kappa=0.5, lipschitz=3.0)}):
        assert torch.equal(ImplicitModel.from_pretrained(tmp_path, **own)(u), built(u))


def test_a_class_of_the_users_never_passes_for_one_of_the_librarys(tmp_path):
    class Mine(Picard):
        pass

    Mine.__name__ = Mine.__qualname__ = "Picard"
    ImplicitModel(**SIZES, solver=Mine()).save_pretrained(tmp_path / "solver")
    assert f"got none for '{Mine.__module__}.Picard'" in refused(ImplicitModel, tmp_path / "solver")
    assert ImplicitModel.from_pretrained(tmp_path / "solver", solver=Mine()).solver == Mine()

    relu = Activation("relu", TANH.phi, TANH.dphi, TANH.slope)
    ImplicitModel(**SIZES, activation=relu).save_pretrained(tmp_path / "relu")
    assert "Pass activation=relu of its own" in refused(ImplicitModel, tmp_path / "relu")


SOLVERS = [
    Picard(damping=0.5, rtol=1e-8), Anderson(memory=3), Auto(slow=Broyden(line_search=False)), Newton(dense=True),
    Auto(slow=Auto(slow=Picard(max_steps=9))),
]  # fmt: skip
ADJOINTS = [
    ImplicitAdjoint(order=2, solver=Anderson(atol=1e-9)), PhantomGradient(steps=3, damping=0.5), Unrolled(),
    SHINE(fallback=2.0, refine=Picard(max_steps=4)), SHINE(),
]  # fmt: skip


@pytest.mark.parametrize("solver", SOLVERS)
def test_solvers_come_back_as_they_were(tmp_path, solver):
    ImplicitModel(**SIZES, solver=solver).save_pretrained(tmp_path)
    assert ImplicitModel.from_pretrained(tmp_path).solver == solver


@pytest.mark.parametrize("adjoint", ADJOINTS)
def test_adjoints_come_back_as_they_were(tmp_path, adjoint):
    ImplicitModel(**SIZES, adjoint=adjoint).save_pretrained(tmp_path)
    assert ImplicitModel.from_pretrained(tmp_path).adjoint == adjoint


def test_what_is_given_beside_the_folder_is_checked(tmp_path):
    ImplicitModel(**SIZES).save_pretrained(tmp_path)
    assert "f to be a subclass of ImplicitFunction" in refused(ImplicitModel, tmp_path, f=torch.tanh)
    text = refused(ImplicitModel, tmp_path, solver="anderson")
    assert "solver to be a Solver" in text
    assert "Check what was given beside the folder" in text
    assert "constraint to be a Constraint" in refused(ImplicitModel, tmp_path, constraint=dict)


def test_reading_and_writing_draw_no_random_number_more_than_the_constructor(tmp_path):
    built = ImplicitModel(**SIZES)
    before = torch.get_rng_state()
    built.save_pretrained(tmp_path)
    assert torch.equal(torch.get_rng_state(), before)


# What is written


def not_saved(model: nn.Module, folder: Path, kind: type = CheckpointError) -> str:
    with pytest.raises(kind) as caught:
        model.save_pretrained(folder)
    assert not folder.exists()
    return str(caught.value)


def test_a_model_on_the_meta_device(tmp_path):
    text = not_saved(ImplicitModel(**SIZES, device="meta"), tmp_path / "c")
    assert "expected a model with weights, got one on the meta device. Give it weights first" in text


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_weights_that_are_not_finite_are_not_saved(tmp_path, value):
    built = ImplicitModel(**SIZES)
    with torch.no_grad():
        built.B[0, 0] = value
    assert "finite weights in 'B', got 1 NaN or infinite of 15" in not_saved(built, tmp_path / "c")


def test_a_pruned_model_is_saved_once_it_is_permanent(tmp_path):
    built, u = ImplicitModel(**SIZES), torch.randn(4, 3)
    prune.l1_unstructured(built, "A", amount=0.5)
    text = not_saved(built, tmp_path / "c", NotRebuiltError)
    assert "got a pruned one. Make its weights permanent first: torch.nn.utils.prune.remove" in text
    prune.remove(built, "A")
    built.save_pretrained(tmp_path / "c")
    assert torch.equal(ImplicitModel.from_pretrained(tmp_path / "c")(u), built(u))


def test_a_parametrized_model_is_saved_once_it_is_permanent(tmp_path):
    built, u = DenseEquilibriumClassifier(**SIZES), torch.randn(4, 3)
    parametrize.register_parametrization(built.head, "weight", nn.Tanh(), unsafe=True)
    text = not_saved(built, tmp_path / "c", NotRebuiltError)
    assert "got a parametrized one" in text
    assert "remove_parametrizations" in text
    parametrize.remove_parametrizations(built.head, "weight")
    built.save_pretrained(tmp_path / "c")
    assert torch.equal(DenseEquilibriumClassifier.from_pretrained(tmp_path / "c")(u), built(u))


class Own(ImplicitModel):
    """A model with a constructor of its own, which saved settings do not fit."""

    def __init__(self) -> None:
        super().__init__(**SIZES)


def of_two_dtypes() -> ImplicitModel:
    built = ImplicitModel(**SIZES)
    built.B = nn.Parameter(built.B.detach().float())
    return built


def with_more() -> ImplicitModel:
    built = ImplicitModel(**SIZES)
    built.extra = nn.Linear(2, 2)
    return built


def pruned() -> ImplicitModel:
    return prune.random_unstructured(ImplicitModel(**SIZES), "A", amount=0.5)


@pytest.mark.float64
@pytest.mark.parametrize("make", [Own, of_two_dtypes, with_more, pruned])
def test_a_model_that_its_class_does_not_make_again(tmp_path, make):
    """It is refused by its own way, and a run keeps it by the names of its tensors."""
    built, again = make(), make()
    not_saved(built, tmp_path / "c", NotRebuiltError)
    save_weights(built, tmp_path / "best", {"loss": 1.0})
    load_weights(again, tmp_path / "best")
    assert all(torch.equal(value, again.state_dict()[name]) for name, value in built.state_dict().items())


# Where it is


LONG = "x" * 300


@pytest.mark.parametrize("path", [LONG, f"a/{LONG}/b", "with\0null"])
def test_a_name_that_the_system_does_not_take(tmp_path, path):
    built, where = ImplicitModel(**SIZES), str(tmp_path / "there" / path)
    with pytest.raises(CheckpointError if "\0" not in path else ArgumentError):
        built.save_pretrained(where)
    with pytest.raises(ArgumentError):
        ImplicitModel.from_pretrained(where)
    assert not list(tmp_path.rglob("*.new"))


def test_a_path_that_is_none(tmp_path):
    with pytest.raises(ArgumentError, match="the path of a folder"):
        ImplicitModel.from_pretrained(3)
    with pytest.raises(ArgumentError, match="the path of a folder"):
        ImplicitModel(**SIZES).save_pretrained(None)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_links_are_not_written_through(tmp_path, name):
    target = tmp_path / "mine"
    target.write_text("mine")
    folder = tmp_path / "c"
    folder.mkdir()
    for link in (name, f"{name}.new"):
        (folder / link).symlink_to(target)
    built, u = ImplicitModel(**SIZES), torch.randn(4, 3)
    built.save_pretrained(folder)
    assert target.read_text() == "mine"
    assert not (folder / name).is_symlink()
    assert torch.equal(ImplicitModel.from_pretrained(folder)(u), built(u))


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_links_are_not_read_through(tmp_path, name):
    ImplicitModel(**SIZES).save_pretrained(tmp_path / "c")
    (tmp_path / "c" / name).rename(tmp_path / name)
    (tmp_path / "c" / name).symlink_to(tmp_path / name)
    assert f"{name} to be a file, got a symbolic link" in refused(ImplicitModel, tmp_path / "c")


@pytest.mark.parametrize("name", ["config.json", "config.json.new", "model.safetensors", "model.safetensors.new"])
def test_a_pipe_hangs_nobody(tmp_path, name):
    ImplicitModel(**SIZES).save_pretrained(tmp_path)
    (tmp_path / name).unlink(missing_ok=True)
    os.mkfifo(tmp_path / name)
    ImplicitModel(**SIZES).save_pretrained(tmp_path)
    ImplicitModel.from_pretrained(tmp_path)


def test_a_folder_may_be_reached_by_a_link(tmp_path):
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    ImplicitModel(**SIZES).save_pretrained(tmp_path / "link")
    ImplicitModel.from_pretrained(tmp_path / "link")


def test_figures_are_not_appended_through_a_link(tmp_path):
    (tmp_path / "mine").write_text("mine")
    (tmp_path / "metrics.csv").symlink_to(tmp_path / "mine")
    with pytest.raises(CheckpointError, match="files that are no symbolic links"):
        store.append_to(tmp_path / "metrics.csv", b"row\n")
    assert (tmp_path / "mine").read_text() == "mine"


# Who writes to it


OWNER = """
import sys
from pathlib import Path
from implicitdl._internal import store

with store.owned(Path(sys.argv[1])):
    print("mine", flush=True)
    sys.stdin.read()
"""


@pytest.fixture
def other_owner(tmp_path):
    environment = {**os.environ, "PYTHONPATH": str(SOURCE), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", OWNER, str(tmp_path / "run")]
    with subprocess.Popen(command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as owner:
        assert owner.stdout.readline() == b"mine\n"
        yield owner
        owner.kill()


def owned_by_another(folder: Path) -> None:
    with pytest.raises(CheckpointError, match="got one that another run owns"), store.owned(folder):
        pass


def test_a_folder_has_one_owner_until_that_is_gone(tmp_path, other_owner):
    from test_train import fit

    owned_by_another(tmp_path / "run")
    with pytest.raises(CheckpointError, match="another run owns"):
        store.refuse_owned(tmp_path / "run")
    for resume in (False, True):  # training waits for nobody
        with pytest.raises(CheckpointError, match="another run owns"):
            fit(tmp_path / "run", 1, resume=resume)
    assert os.listdir(tmp_path / "run") == [".lock"]
    other_owner.kill()
    other_owner.wait()
    with store.owned(tmp_path / "run"):
        pass
    assert os.listdir(tmp_path / "run") == []


def test_an_owner_may_own_again_and_another_thread_may_not(tmp_path):
    folder, refusals = tmp_path / "a" / "b", []
    with store.owned(folder):
        with store.owned(folder):
            pass
        thread = threading.Thread(target=lambda: refusals.append(owned_by_another(folder)))
        thread.start()
        thread.join()
        assert os.listdir(folder) == [".lock"]
    assert refusals == [None]
    assert os.listdir(tmp_path) == []


def test_a_lock_is_no_link(tmp_path):
    (tmp_path / ".lock").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(CheckpointError, match="no symbolic links"), store.owned(tmp_path):
        pass
    assert not (tmp_path / "elsewhere").exists()


# Of everything at once: mutated checkpoints


def models() -> list[nn.Module]:
    torch.manual_seed(0)
    return [
        ImplicitModel(**SIZES),
        ImplicitModel(**SIZES, is_low_rank=True, rank=2, bias=True, activation=TANH, solver=Anderson(rtol=1e-8)),
        ImplicitModel(**SIZES, constraint=WeightedRowScaling(weights=torch.rand(5) + 0.5), adjoint=SHINE()),
        DenseEquilibriumClassifier(**SIZES, solver=Broyden()),
        MonotoneConvClassifier(1, 2, channels=2, halvings=1, cells=1).eval(),
    ]


VALUES = [None, True, -1, 0, 10**9, 10**30, 1e12, -1.5, "", "os.system", "NaN", [], {}, [1], {"class": "Picard"}]


def places(entries: dict) -> list[tuple[dict, str]]:
    """Every entry of every object in it."""
    inner = [place for value in entries.values() if isinstance(value, dict) for place in places(value)]
    return [(entries, name) for name in entries] + inner


def change_json(config: dict, chance) -> str:
    """Drop, rename, retype, nest or double one entry; the text."""
    holder, name = chance.choice(places(config))
    kind = chance.choice(["drop", "rename", "value", "nest", "deep", "double"])
    value = holder.pop(name)
    if kind == "rename":
        holder[name + chance.choice(["_", " ", "2"])] = value
    elif kind == "value":
        holder[name] = chance.choice(VALUES)
    elif kind == "nest":
        holder[name] = chance.choice([[value], {name: value}])
    elif kind == "deep":
        for _ in range(chance.choice([10, 300])):
            value = {name: value}
        holder[name] = value
    elif kind == "double":
        holder[name] = value
        text = json.dumps(config)
        return text.replace(f'"{name}":', f'"{name}": {json.dumps(chance.choice(VALUES))}, "{name}":', 1)
    return json.dumps(config)


def change_tensors(tensors: dict[str, torch.Tensor], chance) -> dict[str, torch.Tensor]:
    """Drop, rename, retype, reshape or spoil one tensor."""
    name = chance.choice(sorted(tensors))
    value = tensors.pop(name)
    kind = chance.choice(["drop", "rename", "retype", "reshape", "spoil", "double"])
    if kind == "rename":
        tensors[chance.choice([name + "2", name.lower() + ".x", "A" * 5000, "\n"])] = value
    elif kind == "retype":
        dtype = chance.choice([torch.float16, torch.bfloat16, torch.int32, torch.bool, torch.complex64])
        tensors[name] = value.to(dtype)
    elif kind == "reshape":
        tensors[name] = chance.choice(
            [value.flatten()[:1], value[None], value.flatten()[:0], torch.cat([value[None]] * 2)]
        )
    elif kind == "spoil":
        spoiled = value.double().flatten()
        spoiled[chance.randrange(max(1, len(spoiled)))] = chance.choice([torch.nan, torch.inf, -torch.inf])
        tensors[name] = spoiled.reshape(value.shape)
    elif kind == "double":
        tensors |= {name: value, f"{name}.{name}": value.clone()}
    return {name: value.contiguous() for name, value in tensors.items()}


def change_bytes(data: bytes, chance) -> bytes:
    """Flip, cut, double or insert some."""
    at = chance.randrange(len(data))
    kind = chance.choice(["flip", "head", "cut", "double", "insert", "empty"])
    if kind in ("flip", "head"):
        at = min(at, 20) if kind == "head" else at
        return data[:at] + bytes([data[at] ^ (1 << chance.randrange(8))]) + data[at + 1 :]
    return {"cut": data[:at], "double": data + data, "insert": data[:at] + b"\0\xff{" + data[at:], "empty": b""}[kind]


def mutate(folder: Path, sources: list[Path], own: int, chance) -> bool:
    """Put a mutated checkpoint into a folder; whether its numbers may be others, because its digests say so."""
    files = {name: (sources[own] / name).read_bytes() for name in ("config.json", "model.safetensors")}
    config, tensors = json.loads(files["config.json"]), safetensors.torch.load(files["model.safetensors"])
    name, kind = chance.choice(sorted(files)), chance.choice(["bytes", "json", "swap", "signed json", "signed tensors"])
    if kind == "bytes":
        files[name] = change_bytes(files[name], chance)
    elif kind == "json":
        files["config.json"] = change_json(config, chance).encode()
    elif kind == "swap":
        files[name] = (sources[chance.randrange(len(sources))] / name).read_bytes()
    for name, data in files.items():
        (folder / name).write_bytes(data)
    if kind == "signed json":
        text = change_json(config, chance)
        signed(folder, json.loads(text))
    elif kind == "signed tensors":
        signed(folder, config, change_tensors(tensors, chance))
    return kind == "signed json"


@pytest.mark.parametrize("part", range(5))
def test_a_mutated_checkpoint_is_the_same_or_refused(tmp_path, part):
    """100 of 500: weights come back bit for bit, with the settings too unless they were signed anew."""
    built, refusals = models(), []
    sources = [tmp_path / str(i) for i in range(len(built))]
    for model, folder in zip(built, sources, strict=True):
        model.save_pretrained(folder)
    (tmp_path / "c").mkdir()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for trial in range(100):
        chance = random.Random(100 * part + trial)
        own = chance.randrange(len(built))
        free = mutate(tmp_path / "c", sources, own, chance)
        try:
            read = type(built[own]).from_pretrained(tmp_path / "c")
        except ArgumentError as error:
            refusals.append(str(error))
            continue
        expected = built[own].state_dict()
        assert expected.keys() == read.state_dict().keys()
        assert all(torch.equal(value, expected[name]) for name, value in read.state_dict().items())
        assert free or (read.solver, read.adjoint) == (built[own].solver, built[own].adjoint)
    assert len(refusals) > 70
    assert all("\n" not in text and len(text) < 1000 and ": expected " in text for text in refusals)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200_000  # kB
