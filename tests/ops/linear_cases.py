"""Random linear layers amid poison, and what their products must be."""

import torch


def make(rows, n, k, dtype, seed=0):
    """Rows and a weight, as parts of wider tensors that hold NaN elsewhere."""
    chance = torch.Generator().manual_seed(seed)
    made = []
    for count in (rows, n):
        wide = torch.full((count, k + 5), torch.nan, dtype=dtype)
        wide[:, 2 : k + 2] = torch.randn(count, k, generator=chance).to(dtype)
        made.append(wide[:, 2 : k + 2])
    return made


def check(x, weight, got):
    """Against fp64: to rounding of a sum in fp32, and of the result."""
    want = x.double() @ weight.double().mT
    size = x.double().abs() @ weight.double().abs().mT
    assert (got.shape, got.dtype) == (want.shape, x.dtype)
    rounding = 2**-8 * want.abs() if x.dtype == torch.bfloat16 else 0.0
    # Numbers are summed in as many parts as a vector has lanes.
    assert ((got.double() - want).abs() <= 3e-7 * size + rounding).all()
