"""The exact gradient sum: which process computes which shard must not show in a single bit."""

import hypothesis.extra.numpy as arrays
import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from polyprompt.workers import Workers

SHARDS = 4


def summed(shards: list[Tensor], groups: list[list[int]]) -> Tensor:
    """What processes that compute these groups of shards, added up in that order, have as the gradient."""
    buffers = []
    for group in groups:
        model = nn.Linear(shards[0].numel(), 1, bias=False)
        workers = Workers(SHARDS, "exact")
        workers.start(model, num_totals=1)
        for number in group:
            model.weight.grad = shards[number][None].clone()
            workers.add_shard(torch.zeros(1, dtype=torch.float64))
        buffers.append(workers._buffer)
    workers._buffer = sum(buffers[1:], buffers[0])  # as all_reduce does
    workers.finish()
    assert model.weight.grad is not None
    return model.weight.grad[0]


#: From the smallest fp32 number to a quarter of the sum's bound, all magnitudes alike.
gradients = st.builds(
    lambda sign, mantissa, exponent: float(np.float32(sign * np.ldexp(mantissa, exponent))),
    st.sampled_from([-1, 1]),
    st.floats(0.5, 1, width=32, exclude_max=True) | st.just(0.5),
    st.integers(-148, -1),
)


@settings(deadline=None)
@given(arrays.arrays(np.float32, (SHARDS, 8), elements=gradients), st.permutations(range(SHARDS)))
def test_the_sum_of_gradients_does_not_depend_on_who_computes_them(gradient_SX: np.ndarray, order: list[int]) -> None:
    shards = list(torch.from_numpy(gradient_SX))
    alone = summed(shards, [list(range(SHARDS))])
    assert torch.equal(summed(shards, [order[:2], order[2:]]), alone)
    assert torch.equal(summed(shards, [order[:1], order[1:3], order[3:]]), alone)
    wanted = torch.from_numpy(gradient_SX.astype(np.longdouble).sum(0).astype(np.float64))
    torch.testing.assert_close(alone.double(), wanted, rtol=2**-24, atol=SHARDS * 2**-53)


def test_a_tiny_gradient_does_not_decide_a_tie() -> None:
    """Met in training: float64 alone rounds the sum up on one process, and down on two."""
    hexes = "0x1.d20f24p-20", "-0x1.2f146cp-19", "-0x1.d12b02p-74", "0x1.2643c6p-23"
    shards = [torch.tensor([float.fromhex(number)]) for number in hexes]
    assert torch.equal(summed(shards, [[0, 1, 2, 3]]), summed(shards, [[0, 2], [1, 3]]))
    a, b, c, d = (shard.double() for shard in shards)
    assert not torch.equal((a + b + c + d).float(), ((a + c) + (b + d)).float())
