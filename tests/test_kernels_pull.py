"""The compiled cotangents of A and b against torch's operations."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from implicitdl.kernels import build, loops
from implicitdl.kernels.loops import pull
from kernel_paths import threads

pytestmark = [
    pytest.mark.compiled,
    pytest.mark.skipif(build.library(torch.float64) is None, reason="no C compiler"),
]

DTYPES = st.sampled_from([torch.float32, torch.float64])


def drawn(batch: int, n: int, dtype: torch.dtype, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(seed)
    v, x = torch.randn(batch, n, dtype=dtype), torch.randn(batch, n, dtype=dtype)
    return v, (torch.rand(batch, n) > 0.5).to(dtype), x


def close(ours: Tensor, theirs: Tensor, batch: int) -> bool:
    """To rounding of a sum of ``batch`` terms of about 1."""
    return torch.allclose(ours, theirs, rtol=0, atol=40 * batch * torch.finfo(ours.dtype).eps)


class TestValues:
    @given(st.integers(1, 40), st.integers(1, 70), DTYPES, st.integers(0, 9), st.sampled_from([1, 2, 3]))
    def test_are_torchs(self, batch, n, dtype, seed, count):
        v, slope, x = drawn(batch, n, dtype, seed)
        with threads(count):
            product, w = pull(v, slope, x, None, None, 0.0)
        assert torch.equal(w, v * slope)
        assert close(product, w.t() @ x, batch)

    @pytest.mark.float64
    @given(st.integers(1, 40), st.integers(1, 70), DTYPES, st.integers(0, 9), st.sampled_from([1, 2, 3]))
    def test_through_the_scaling_of_rows(self, batch, n, dtype, seed, count):
        v, slope, x = drawn(batch, n, dtype, seed)
        # Inside, outside, and a row of zeros.
        source = torch.randn(n, n, dtype=dtype) * torch.linspace(0, 4, n, dtype=dtype)[:, None] / n
        _, scale = loops.scale_rows(source, 0.9)
        with threads(count):
            product, w = pull(v, slope, x, source, scale, 0.9)
            expected = loops.scale_rows_vjp(source, scale, w.t() @ x, 0.9)
        assert close(product, expected, 4 * batch)

    def test_of_tensors_that_do_not_lie_together(self):
        v, slope, x = drawn(6, 20, torch.float64, 0)
        apart = [torch.stack((t, torch.full_like(t, torch.nan)), dim=-1)[..., 0] for t in (v, slope, x)]
        for ours, theirs in zip(pull(*apart, None, None, 0.0), pull(v, slope, x, None, None, 0.0), strict=True):
            assert torch.equal(ours, theirs)

    def test_a_cotangent_that_is_not_finite_is_seen_where_it_counts(self):
        v, slope, x = drawn(6, 20, torch.float64, 0)
        v[2, 3] = torch.nan
        product, w = pull(v, slope, x, None, None, 0.0)
        assert product[3].isnan().all()
        assert product.isnan().sum() == 20
        assert w.isnan().sum() == 1


class TestItIsLeftToTorch:
    def test_where_its_product_is_the_faster(self):
        v, slope, x = drawn(300, 100, torch.float32, 0)
        assert pull(v, slope, x, None, None, 0.0) is None

    def test_where_the_numbers_are_not_in_memory(self):
        v, slope, x = drawn(3, 4, torch.float64, 0)
        assert pull(torch.complex(x, v).conj().imag, slope, x, None, None, 0.0) is None
        assert pull(v.to("meta"), slope, x, None, None, 0.0) is None
        assert pull(v, slope, x.float(), None, None, 0.0) is None

    def test_in_half_precision(self):
        v, slope, x = drawn(3, 4, torch.float32, 0)
        assert pull(v.bfloat16(), slope.bfloat16(), x.bfloat16(), None, None, 0.0) is None

    def test_without_memory(self, monkeypatch):
        class Empty:
            def pull(self, *arguments):
                return 0

        monkeypatch.setattr(loops, "loops", lambda dtype: Empty())
        assert pull(*drawn(3, 4, torch.float64, 0), None, None, 0.0) is None
