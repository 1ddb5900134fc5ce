"""Habits of other libraries, each answered by one line that translates it."""

from __future__ import annotations

import pytest
import torch

import implicitdl
from implicitdl import DEQ, ArgumentError, ImplicitModel, fixed_point


@pytest.mark.parametrize(
    ("keyword", "here"),
    [
        ("f_solver", r"solver=Anderson\(\)"),
        ("b_solver", r"ImplicitAdjoint\(solver=Anderson\(\)\)"),
        ("z0", "x0"),
        ("tol", "rtol"),
        ("f_tol", "rtol"),
        ("max_iter", "max_steps"),
        ("f_max_iter", "max_steps"),
        ("mitr", "max_steps"),
    ],
)
def test_keywords(keyword, here):
    with pytest.raises(TypeError, match=f"{keyword}.*{here}"):
        fixed_point(torch.cos, torch.zeros(2, 3), **{keyword: 1})
    with pytest.raises(TypeError, match=f"{keyword}.*{here}"):
        DEQ(torch.cos, **{keyword: 1})


@pytest.mark.parametrize("door", [DEQ, lambda f, **o: fixed_point(f, torch.zeros(2, 3), **o)])
def test_a_typo_is_a_type_error(door):
    with pytest.raises(TypeError, match="unexpected keyword argument 'solvr'"):
        door(torch.cos, solvr=1)


def test_names():
    with pytest.raises(AttributeError, match=r"get_deq.*DEQ\(f, solver=Anderson\(\)\)"):
        _ = implicitdl.get_deq
    with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
        _ = implicitdl.nothing


def test_a_function_given_to_the_layer_is_given_to_its_maker():
    with pytest.raises(ArgumentError, match=r"deq\(f, z0\) is DEQ\(f\)\(u\)"):
        DEQ(lambda x, u: 0.5 * x + u)(lambda z: 0.5 * z, torch.zeros(2, 3))


def test_a_function_of_the_state_alone_and_a_keyword_for_the_start():
    u = torch.ones(2, 3)
    with pytest.raises(ArgumentError, match=r"state and args, 2 in all.*fixed_point\(f, x0\)"):
        DEQ(lambda z: 0.5 * z + u)(u)
    with pytest.raises(TypeError, match="z0 is x0"):
        fixed_point(lambda z: 0.5 * z + u, z0=u)


def test_a_type_error_of_fs_own_is_not_put_into_other_words():
    def f(x, u):
        raise TypeError("f's own")

    u = torch.ones(2, 3)
    with pytest.raises(TypeError, match="f's own"):
        fixed_point(f, u, u)


def test_vectors_in_two_batch_dimensions_are_told_how_to_be_rows():
    with pytest.raises(ArgumentError, match=r"u.flatten\(0, 1\) .*ImplicitRNN"):
        ImplicitModel(6, 3, 8)(torch.zeros(2, 5, 6))


def test_an_empty_batch_is_told_to_have_a_sample():
    with pytest.raises(ArgumentError, match="at least one sample"):
        ImplicitModel(6, 3, 8)(torch.zeros(0, 6))
