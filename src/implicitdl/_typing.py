"""Shape aliases of the one alphabet: input u, state x, output y, cotangent g."""

from __future__ import annotations

from jaxtyping import Bool, Float, Int
from torch import Tensor

Rows = Float[Tensor, "batch d"]
PerSample = Float[Tensor, " batch"]
PerSampleBool = Bool[Tensor, " batch"]
PerSampleInt = Int[Tensor, " batch"]
Matrix = Float[Tensor, "rows columns"]
