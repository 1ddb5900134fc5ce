"""The image sets, their loaders and their failures, and the generators."""

from __future__ import annotations

import gzip
import hashlib
import math
import pickle
import subprocess
import sys
import urllib.error
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import ConcatDataset, DataLoader, Subset

from implicitdl import ArgumentError
from implicitdl._internal.errors import MissingExtraError
from implicitdl.data import (
    NAMES,
    DatasetNotFoundError,
    Images,
    arithmetic,
    cifar_load,
    image_loader,
    import_torchvision,
    load,
    mnist_load,
    spiky,
)
from standins import CHANNELS, FOLDERS, write_idx

SHARED = Path(__file__).resolve().parents[2] / "shared"


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: object, **kwargs: object) -> None:
        raise urllib.error.URLError("Name or service not known")

    monkeypatch.setattr("urllib.request.urlopen", refuse)


@pytest.fixture(scope="module")
def pixels() -> Images:
    return load("digits", 64).train_ds


def rows(images: Images) -> torch.Tensor:
    """Every sample as one sorted row of bytes with its label: what a partition must preserve."""
    flat = torch.cat([images.labels[:, None], images.pixels.flatten(1).long()], 1).numpy()
    return torch.from_numpy(flat[np.lexsort(flat.T)])


def counts(images: Images) -> torch.Tensor:
    return torch.bincount(images.labels, minlength=len(images.classes))


# digits and the splits


def test_digits_are_images_in_the_unit_interval() -> None:
    train_ds, train_dl, valid_ds, valid_dl = load("digits", 50)
    images, labels = next(iter(train_dl))
    assert images.shape == (50, 1, 8, 8)
    assert images.dtype == torch.get_default_dtype()
    assert (images.min(), images.max()) == (0.0, 1.0)
    assert labels.dtype == torch.int64
    assert len(train_ds) + len(valid_ds) == 1797
    assert sum(len(labels) for _, labels in valid_dl) == len(valid_ds) == 360


def test_digits_are_split_as_a_user_of_scikit_learn_would() -> None:
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    source = load_digits()
    _, expected, _, labels = train_test_split(
        source.images, source.target, test_size=0.2, stratify=source.target, random_state=3
    )
    test_ds = load("digits", 64, seed=3).test_ds
    torch.testing.assert_close(test_ds.pixels[:, 0].double(), torch.from_numpy(expected))
    assert test_ds.labels.tolist() == labels.tolist()


@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 2**40), holdout=st.floats(0.02, 0.95))
def test_every_split_is_a_stratified_partition(seed: int, holdout: float) -> None:
    whole, data = load("digits", 64, seed=seed), load("digits", 64, seed=seed, holdout=holdout)
    assert torch.equal(data.test_ds.pixels, whole.test_ds.pixels)
    everything = whole.train_ds, whole.test_ds
    assert (counts(whole.test_ds) - 0.2 * sum(map(counts, everything))).abs().max() <= 1
    held = counts(data.train_ds) + counts(data.valid_ds)
    assert torch.equal(held, counts(whole.train_ds))
    assert (counts(data.valid_ds) - holdout * held).abs().max() <= 2
    both = joined(data.train_ds, data.valid_ds)
    assert torch.equal(rows(both), rows(whole.train_ds))


def joined(first: Images, second: Images) -> Images:
    return Images(torch.cat([first.pixels, second.pixels]), torch.cat([first.labels, second.labels]), first.classes)


def test_without_holdout_validation_is_the_test_set() -> None:
    data = load("digits", 64)
    assert data.valid_ds is data.test_ds


def test_dimensions_are_the_models() -> None:
    data = load("digits", 64)
    assert (data.input_dim, data.output_dim) == (64, 10)


# fetching


@given(data=st.data())
def test_a_fetched_batch_is_the_stack_of_its_samples(pixels: Images, data: st.DataObject) -> None:
    picked = data.draw(st.lists(st.integers(0, len(pixels) - 1), min_size=1, max_size=9))
    (images, labels) = next(iter(image_loader(Subset(pixels, picked), len(picked))))
    singles = [pixels[i] for i in picked]
    assert torch.equal(images, torch.stack([image for image, _ in singles]))
    assert labels.tolist() == [label for _, label in singles]


def shuffled_labels(loader: DataLoader, seed: int) -> list[int]:
    torch.manual_seed(seed)
    return torch.cat([labels for _, labels in loader]).tolist()


def test_the_order_is_a_function_of_the_global_seed() -> None:
    loader = load("digits", 64).train_dl
    first = shuffled_labels(loader, 7)
    torch.rand(5)
    assert shuffled_labels(loader, 7) == first
    assert shuffled_labels(loader, 8) != first
    assert loader.generator is None


def test_the_order_is_that_of_a_plain_loader(pixels: Images) -> None:
    plain = DataLoader(pixels, batch_size=64, shuffle=True)
    assert shuffled_labels(image_loader(pixels, 64, shuffle=True), 3) == shuffled_labels(plain, 3)


@pytest.mark.parametrize("wrap", [lambda ds: ds, lambda ds: Subset(ds, range(len(ds)))])
def test_a_users_own_loader_with_the_default_collate_works(pixels: Images, wrap) -> None:
    for ours, theirs in zip(image_loader(pixels, 100), DataLoader(wrap(pixels), batch_size=100), strict=True):
        assert torch.equal(ours[0], theirs[0])
        assert torch.equal(ours[1], theirs[1])


def test_our_loader_serves_a_dataset_that_fetches_sample_by_sample(pixels: Images) -> None:
    images, labels = next(iter(image_loader(ConcatDataset([pixels]), 5)))
    assert torch.equal(images, torch.stack([pixels[i][0] for i in range(5)]))
    assert torch.equal(labels, pixels.labels[:5])


def test_iterating_a_dataset_ends(pixels: Images) -> None:
    assert sum(1 for _ in pixels) == len(pixels)


def test_dataset_and_collate_travel_to_worker_processes(pixels: Images) -> None:
    loader = image_loader(pixels, 5)
    dataset, collate = pickle.loads(pickle.dumps((loader.dataset, loader.collate_fn)))
    images, _ = collate(dataset.__getitems__([0, 1]))
    assert torch.equal(images[1], pixels[1][0])


def test_accelerate_shards_the_batches_over_processes(pixels: Images) -> None:
    from accelerate.data_loader import prepare_data_loader

    seen = []
    for rank in range(2):
        shard = prepare_data_loader(image_loader(pixels, 100), num_processes=2, process_index=rank)
        batches = [images for images, _ in shard]
        assert batches[0].shape == (100, 1, 8, 8)
        seen.append(batches)
    first_of_each = torch.cat([seen[0][0], seen[1][0]])
    assert torch.equal(first_of_each, pixels.pixels[:200] / 16)


# torchvision's sets


@pytest.mark.parametrize(("fetch", "name"), [(mnist_load, "mnist"), (cifar_load, "cifar10")])
def test_the_seeds_loaders_return_their_four_values(fetch, name: str, root: Path) -> None:
    train_ds, train_dl, valid_ds, valid_dl = fetch(8, root)
    images, labels = next(iter(train_dl))
    assert images.shape == (8, *CHANNELS[name])
    assert images.dtype == torch.get_default_dtype()
    assert labels.dtype == torch.int64
    assert len(valid_ds) == 20 == sum(len(labels) for _, labels in valid_dl)
    assert len(train_ds.classes) == 10


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    ("name", "kind"), [("mnist", "MNIST"), ("fashion-mnist", "FashionMNIST"), ("cifar10", "CIFAR10")]
)
def test_images_are_what_to_tensor_gives(name: str, kind: str, dtype: torch.dtype, root: Path) -> None:
    torch.set_default_dtype(dtype)  # conftest puts it back
    torchvision = import_torchvision()
    ours = load(name, 8, root, download=False)
    for train, images in ((True, ours.train_ds), (False, ours.test_ds)):
        theirs = getattr(torchvision.datasets, kind)(root, train=train, transform=torchvision.transforms.ToTensor())
        assert len(images) == len(theirs)
        for mine, (image, label) in zip(images, theirs, strict=True):
            assert torch.equal(mine[0], image)
            assert mine[1] == label


def test_numpys_warning_of_cifars_old_pickles_is_not_the_users(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cifar = import_torchvision().datasets.CIFAR10
    load_meta = cifar._load_meta

    def as_numpy_2_4_did(self) -> None:
        warnings.warn("dtype(): align should be passed as Python or NumPy boolean", stacklevel=2)
        load_meta(self)

    monkeypatch.setattr(cifar, "_load_meta", as_numpy_2_4_did)
    assert len(load("cifar10", 8, root).train_ds) == 100


def test_the_environment_names_the_folder(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("IMPLICITDL_DATA", str(root))
    assert len(load("mnist", 8).train_ds) == 60


def test_the_argument_wins_over_the_environment(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("IMPLICITDL_DATA", str(root / "elsewhere"))
    assert len(load("mnist", 8, str(root)).train_ds) == 60


@pytest.mark.parametrize("unset", [None, ""])
def test_the_default_folder_is_data(unset: str | None, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("IMPLICITDL_DATA", raising=False)
    if unset is not None:
        monkeypatch.setenv("IMPLICITDL_DATA", unset)
    (root / "cwd").mkdir()
    (root / "cwd" / "data").symlink_to(root)
    monkeypatch.chdir(root / "cwd")
    assert len(load("mnist", 8).train_ds) == 60


def test_real_fashion_mnist(tmp_path: Path) -> None:
    layout = SHARED / "bin" / "fashion-mnist"
    if not layout.exists():
        pytest.skip("the real Fashion-MNIST is not beside this checkout")
    subprocess.run([layout, tmp_path], check=True)
    data = load("fashion-mnist", 100, tmp_path, download=False, holdout=0.1)
    assert (len(data.train_ds), len(data.valid_ds), len(data.test_ds)) == (54_000, 6_000, 10_000)
    assert counts(data.valid_ds).tolist() == [600] * 10
    images, _ = next(iter(data.train_dl))
    # The training set's published mean and deviation of a pixel.
    everything = data.train_ds.pixels.double() / 255
    assert math.isclose(everything.mean(), 0.2860, abs_tol=1e-3)
    assert math.isclose(everything.std(), 0.3530, abs_tol=1e-3)
    assert images.shape == (100, 1, 28, 28)


@pytest.mark.usefixtures("offline")
def test_archives_laid_out_by_hand_are_unpacked_without_a_network(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    resources = []
    for path in sorted((root / FOLDERS["mnist"]).iterdir()):
        archive = path.with_name(f"{path.name}.gz")
        archive.write_bytes(gzip.compress(path.read_bytes()))
        resources.append((archive.name, hashlib.md5(archive.read_bytes(), usedforsecurity=False).hexdigest()))
        path.unlink()
    monkeypatch.setattr(import_torchvision().datasets.MNIST, "resources", resources)
    assert len(load("mnist", 8, root).train_ds) == 60


# failures: one worded line each


def message(error: pytest.ExceptionInfo) -> str:
    text = str(error.value)
    assert "\n" not in text
    return text


@pytest.mark.usefixtures("offline")
@pytest.mark.parametrize("name", list(CHANNELS))
def test_without_a_network_one_line_says_what_to_put_where(name: str, tmp_path: Path) -> None:
    with pytest.raises(DatasetNotFoundError) as error:
        load(name, 8, tmp_path / "new")
    text = message(error)
    first = {"cifar10": "data_batch_1"}.get(name, "train-images-idx3-ubyte")
    assert text.startswith(f"load: expected the files {first}, ")
    assert f"in {tmp_path / 'new' / FOLDERS[name]}, got none of them" in text
    assert "(<urlopen error Name or service not known>)" in text
    assert text.endswith("or name another folder with root, --root or IMPLICITDL_DATA.")
    assert isinstance(error.value, FileNotFoundError)
    assert not (tmp_path / "new").exists()


@pytest.mark.usefixtures("offline")
def test_a_failed_download_keeps_what_was_there(root: Path) -> None:
    (root / FOLDERS["mnist"] / "t10k-labels-idx1-ubyte").unlink()
    with pytest.raises(DatasetNotFoundError, match="expected the files t10k-labels-idx1-ubyte in"):
        mnist_load(8, root)
    assert len(list((root / FOLDERS["mnist"]).iterdir())) == 3


def test_nothing_is_downloaded_unasked(tmp_path: Path) -> None:
    with pytest.raises(DatasetNotFoundError) as error:
        load("cifar10", 8, tmp_path, download=False)
    assert "no download (download=False). Put them there, or cifar-10-python.tar.gz in" in message(error)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("part", ["train-images-idx3", "train-labels-idx1", "t10k-images-idx3"])
def test_truncated_idx_files(part: str, root: Path) -> None:
    path = root / FOLDERS["mnist"] / f"{part}-ubyte"
    whole = path.read_bytes()
    for kept in (0, 3, 10, 16, 25):
        path.write_bytes(whole[:kept])
        with pytest.raises(ArgumentError) as error:
            mnist_load(8, root)
        text = message(error)
        assert text.startswith(f"load: expected whole mnist files in {path.parent}, got one that is truncated"), kept
        assert text.endswith("Delete the folder and load again, or put whole files there."), kept


@pytest.mark.parametrize("file", ["data_batch_3", "test_batch", "batches.meta"])
def test_truncated_cifar_files(file: str, root: Path) -> None:
    path = root / FOLDERS["cifar10"] / file
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(ArgumentError, match=r"expected whole cifar10 files in .*, got one that is truncated"):
        cifar_load(8, root)


@pytest.mark.parametrize("labels", [[0] * 59, [10] * 60])
def test_labels_that_do_not_fit_the_images(labels: list[int], root: Path) -> None:
    write_idx(root / FOLDERS["mnist"] / "train-labels-idx1-ubyte", np.array(labels, dtype=np.uint8))
    with pytest.raises(ArgumentError, match=rf"\(60 images and {len(labels)} labels, {labels[0]} to"):
        mnist_load(8, root)


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (("mnits", 8), f"load: expected name to be one of {', '.join(NAMES)}, got 'mnits'."),
        (("digits", 0), "load: expected batch_size to be a positive integer, got 0."),
        (("digits", 2.5), "load: expected batch_size to be a positive integer, got 2.5."),
        (("mnist", 8, 3), "load: expected root to be a path, got 3."),
    ],
)
def test_bad_arguments(arguments: tuple, text: str) -> None:
    with pytest.raises(ArgumentError) as error:
        load(*arguments)
    assert message(error) == text


@pytest.mark.parametrize("holdout", [-0.1, 1.0, float("nan"), True, "0.1"])
def test_a_holdout_outside_the_unit_interval(holdout: object) -> None:
    with pytest.raises(ArgumentError) as error:
        load("digits", 8, holdout=holdout)
    assert message(error) == f"load: expected 0 ≤ holdout < 1, got {holdout!r}."


@pytest.mark.parametrize("holdout", [0.001, 0.999])
def test_a_holdout_that_empties_a_class(holdout: float) -> None:
    with pytest.raises(ArgumentError) as error:
        load("digits", 8, holdout=holdout)
    assert f"a holdout that leaves every class in both parts, got {holdout}. Choose" in message(error)


@pytest.mark.parametrize("seed", [-1, 0.5, None])
def test_a_bad_seed(seed: object) -> None:
    with pytest.raises(ArgumentError, match="seed to be an integer ≥ 0"):
        load("digits", 8, seed=seed)


def test_a_root_that_is_a_file(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_text("")
    with pytest.raises(ArgumentError) as error:
        load("mnist", 8, path)
    text = f"expected root to be a folder, got the file {path}. Name the folder that holds the datasets."
    assert message(error) == f"load: {text}"


def test_a_loader_needs_a_positive_batch_size(pixels: Images) -> None:
    with pytest.raises(ArgumentError, match="image_loader: expected batch_size"):
        image_loader(pixels, 0)


@pytest.mark.parametrize(
    ("name", "module", "words"),
    [
        ("digits", "sklearn", "sklearn is not installed. Install it with: pip install"),
        (
            "digits",
            "sklearn.datasets",
            "this version of sklearn has no sklearn.datasets. Install it with: pip install -U",
        ),
        ("mnist", "torchvision", "torchvision is not installed. Install it with: pip install"),
    ],
)
def test_a_missing_package_names_its_extra(name: str, module: str, words: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for part in [part for part in sys.modules if part.split(".")[0] == module]:
        monkeypatch.delitem(sys.modules, part)
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(MissingExtraError) as caught:
        load(name, 8)
    assert str(caught.value) == f"{words} 'implicitdl[data]'"


# importing torchvision


def test_torchvision_imports_beside_any_torch_with_warnings_as_errors() -> None:
    code = "\n".join(
        [
            "from implicitdl.data import import_torchvision",
            "module = import_torchvision()",
            "assert import_torchvision() is module",
            "from torchvision import datasets, transforms",
            "assert module.datasets is datasets",
        ]
    )
    done = subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_another_failure_of_torchvision_is_not_hidden(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(module: str, name: str) -> None:
        raise RuntimeError("out of memory")

    monkeypatch.setattr("implicitdl.data.sources.extra", fail)
    with pytest.raises(RuntimeError, match="out of memory"):
        import_torchvision()


# the spiky series


def series(task) -> torch.Tensor:
    """The series behind the windows: the first window, then every target."""
    return torch.cat([task.u_train[0, :, 0], task.y_train[:, 0], task.y_test[:, 0]])


def test_spiky_has_the_papers_sizes() -> None:
    task = spiky()
    assert task.u_train.shape == (5964, 60, 1)
    assert task.y_train.shape == (5964, 1)
    assert task.u_test.shape == (3976, 60, 1)
    assert task.y_test.shape == (3976, 1)
    assert task.u_train.dtype == torch.get_default_dtype()
    assert torch.isfinite(series(task)).all()


def test_spiky_windows_end_where_their_targets_begin() -> None:
    task = spiky(points=400, look_back=5)
    u, y, whole = torch.cat([task.u_train, task.u_test]), torch.cat([task.y_train, task.y_test]), series(task)
    for start in range(len(u)):
        assert torch.equal(u[start, :, 0], whole[start : start + 5])
        assert y[start] == whole[start + 5]


@pytest.mark.float64
def test_spiky_is_a_sine_outside_and_fast_sines_inside_its_stretches() -> None:
    x = torch.linspace(0, 100, 2000)
    fast = 3.5 * sum((f * x).sin() for f in (2, 23, 78, 100))
    whole = series(spiky(points=2000, noise=0.0, spikes=4))
    calm = (whole - x.sin()).abs() < 1e-5
    assert ((whole - fast).abs()[~calm] < 1e-5).all()
    # Four stretches of 107 points, which may overlap and cross the sine.
    assert 90 <= (~calm).sum() <= 428


@pytest.mark.float64
def test_spiky_noise_and_level() -> None:
    x = torch.linspace(0, 100, 10_000)
    calm = series(spiky(spikes=0)) - x.sin()
    assert math.isclose(calm.std(), 0.35, rel_tol=0.03)
    assert math.isclose(calm.mean(), 0.0, abs_tol=0.02)
    flat = series(spiky(level=0, spikes=0)) - x.sin()
    assert flat.abs().max() < 1e-6


def test_spiky_follows_its_seed_alone() -> None:
    torch.manual_seed(0)
    before = torch.get_rng_state()
    first = series(spiky(seed=1))
    assert torch.equal(torch.get_rng_state(), before)
    torch.rand(3)
    assert torch.equal(series(spiky(seed=1)), first)
    assert not torch.equal(series(spiky(seed=2)), first)


@given(points=st.integers(20, 300), look_back=st.integers(1, 19), share=st.floats(0, 0.99))
def test_spiky_splits_every_window(points: int, look_back: int, share: float) -> None:
    task = spiky(points=points, look_back=look_back, test_fraction=share, spike_length=10)
    assert len(task.u_train) >= 1
    assert len(task.u_train) + len(task.u_test) == points - look_back
    assert abs(len(task.u_test) - share * (points - look_back)) <= 1


@pytest.mark.parametrize(
    ("setting", "text"),
    [
        ({"level": -1}, "level to be an integer ≥ 0, got -1"),
        ({"points": 0}, "points to be a positive integer"),
        ({"points": 100}, r"points > max\(look_back=60, spike_length=107\), got 100. Ask for a longer"),
        ({"look_back": 0}, "look_back to be a positive integer"),
        ({"test_fraction": 1.0}, "0 ≤ test_fraction < 1"),
        ({"span": float("inf")}, "span to be a positive finite number"),
        ({"noise": -1.0}, "noise ≥ 0"),
        ({"amplitude": float("nan")}, "amplitude ≥ 0"),
        ({"spikes": -1}, "spikes to be an integer ≥ 0"),
        ({"spike_length": 0}, "spike_length to be a positive integer"),
        ({"seed": -1}, "seed to be an integer ≥ 0"),
    ],
)
def test_spiky_rejects(setting: dict, text: str) -> None:
    with pytest.raises(ArgumentError, match=f"spiky: expected {text}"):
        spiky(**setting)


# arithmetic

OPERATIONS = {
    "add": lambda a, b: a + b,
    "sub": lambda a, b: a - b,
    "mul": lambda a, b: a * b,
    "div": lambda a, b: a / b,
}


@pytest.mark.float64
@given(
    task=st.sampled_from(sorted(OPERATIONS)),
    ends=st.tuples(*[st.lists(st.integers(0, 7), min_size=2, max_size=2, unique=True).map(sorted)] * 2),
    factor=st.floats(0.1, 1e5),
    seed=st.integers(0, 2**31),
)
def test_arithmetic_targets(task: str, ends: tuple, factor: float, seed: int) -> None:
    (n, m), (p, q) = ends
    u, y, u_test, y_test = arithmetic(task, inputs=7, samples=20, factor=factor, slices=((n, m), (p, q)), seed=seed)
    for inputs, targets, half_width in ((u, y, 1.0), (u_test, y_test, factor / 2)):
        assert inputs.shape == (20, 7)
        assert targets.shape == (20, 1)
        assert inputs.abs().max() <= half_width * (1 + 1e-6)
        a, b = inputs[:, n:m].sum(1), inputs[:, p:q].sum(1)
        torch.testing.assert_close(targets[:, 0], OPERATIONS[task](a, b))


def test_arithmetic_has_the_papers_sizes_and_ranges() -> None:
    task = arithmetic(factor=100.0)
    assert task.u_train.shape == task.u_test.shape == (10_000, 50)
    assert task.y_train.shape == task.y_test.shape == (10_000, 1)
    for u, half_width in ((task.u_train, 1.0), (task.u_test, 50.0)):
        assert math.isclose(u.std(), half_width / math.sqrt(3), rel_tol=0.01)
        assert math.isclose(u.max(), half_width, rel_tol=0.01)


def test_a_factor_changes_the_test_set_only() -> None:
    near, far = arithmetic("mul", factor=10.0), arithmetic("mul", factor=1e3)
    assert torch.equal(near.u_train, far.u_train)
    assert torch.equal(near.y_train, far.y_train)
    torch.testing.assert_close(far.u_test, 100 * near.u_test)
    torch.testing.assert_close(far.y_test, 1e4 * near.y_test, rtol=1e-4, atol=1e-2)


@pytest.mark.parametrize("seed", range(5))
def test_drawn_slices_are_two_intervals(seed: int) -> None:
    # "add" is linear in u: its weights are 1 on one interval plus 1 on another.
    task = arithmetic("add", inputs=8, samples=200, seed=seed)
    weights = torch.linalg.lstsq(task.u_train, task.y_train).solution[:, 0]
    torch.testing.assert_close(weights, weights.round(), atol=1e-5, rtol=0)
    assert set(weights.round().int().tolist()) <= {0, 1, 2}
    rises = torch.diff(weights.round(), prepend=torch.zeros(1)).clamp(min=0).sum()
    assert 1 <= rises <= 2


def test_arithmetic_follows_its_seed_and_the_default_dtype() -> None:
    torch.set_default_dtype(torch.float64)  # conftest puts it back
    before = torch.get_rng_state()
    first = arithmetic(samples=10, seed=4)
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(arithmetic(samples=10, seed=4).u_train, first.u_train)
    assert not torch.equal(arithmetic(samples=10, seed=5).u_train, first.u_train)
    assert first.u_train.dtype == first.y_test.dtype == torch.float64
    torch.set_default_dtype(torch.float32)
    single = arithmetic(samples=10, seed=4)
    assert single.u_train.dtype == single.y_test.dtype == torch.float32
    torch.testing.assert_close(single.u_train, first.u_train.float())


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ({"task": "pow"}, "task to be one of add, sub, mul, div, got 'pow'"),
        ({"inputs": 0}, "inputs to be a positive integer"),
        ({"samples": 0}, "samples to be a positive integer"),
        ({"factor": 0.0}, "factor to be a positive finite number"),
        ({"slices": ((0, 10), (40, 51))}, r"slices .* with 0 ≤ n < m ≤ inputs=50"),
        ({"slices": ((3, 3), (0, 1))}, r"slices .* with 0 ≤ n < m ≤ inputs=50"),
        ({"slices": ((0, 1),)}, r"slices .* with 0 ≤ n < m ≤ inputs=50"),
        ({"seed": True}, "seed to be an integer ≥ 0"),
    ],
)
def test_arithmetic_rejects(arguments: dict, text: str) -> None:
    with pytest.raises(ArgumentError, match=f"arithmetic: expected {text}"):
        arithmetic(**arguments)
