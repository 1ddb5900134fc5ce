"""What the library says of the way that its loops go."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from unittest import mock

import pytest
import torch

import implicitdl
from implicitdl.kernels import backend
from implicitdl.kernels.build import BuildError, Kernel

KERNEL = Kernel(mock.Mock(), ("gcc", "-O3", "-fopenmp"), Path("here"))
MISSING = BuildError("no C compiler was found", "Install gcc or clang")


def found(kernels: dict[torch.dtype, Kernel | BuildError]) -> implicitdl.Backend:
    with (
        mock.patch.object(backend, "find", lambda dtype: kernels[dtype]),
        mock.patch.object(backend, "switched_off", return_value=False),
    ):
        return implicitdl.backend()


def test_of_this_machine():
    here = implicitdl.backend()
    assert here.way in ("compiled", "torch")
    assert here.why
    with pytest.raises(dataclasses.FrozenInstanceError):
        here.way = "another"


def test_loops_that_are_there():
    one = found({torch.float32: KERNEL, torch.float64: KERNEL})
    assert (one.way, one.compiler, one.flags, one.cache) == ("compiled", "gcc", ("-O3", "-fopenmp"), "here")
    assert one.dtypes == (torch.float32, torch.float64)
    assert one.activations == (
        "relu", "leaky_relu", "identity", "hardtanh", "tanh", "sigmoid", "softplus", "elu", "silu", "gelu",
    )  # fmt: skip
    assert {"Auto", "Anderson"} <= set(one.solvers)
    assert str(one).splitlines()[0].split() == ["way", "compiled:", "the", "loops", "are", "in", "place"]
    assert "float32, float64" in str(one)


def test_no_compiler():
    one = found({torch.float32: MISSING, torch.float64: MISSING})
    assert (one.way, one.compiler, one.cache, one.dtypes, one.solvers) == ("torch", None, None, (), ())
    assert one.why == "no C compiler was found. Install gcc or clang."


def test_one_precision_only():
    one = found({torch.float32: KERNEL, torch.float64: MISSING})
    assert (one.way, one.dtypes) == ("compiled", (torch.float32,))
    assert "no C compiler" in one.why


def test_no_folder_to_keep_them_in():
    outside = KERNEL._replace(kept=None, outside=BuildError("/x belongs to another user", "Set XDG_CACHE_HOME"))
    one = found({torch.float32: outside, torch.float64: outside})
    assert (one.way, one.cache) == ("compiled", None)
    assert "/x belongs to another user" in one.why


def test_switched_off(monkeypatch):
    monkeypatch.setenv("IMPLICITDL_KERNELS", "0")
    one = implicitdl.backend()
    assert (one.way, one.why) == ("torch", "IMPLICITDL_KERNELS=0 is set")
    assert "none" in str(one)
