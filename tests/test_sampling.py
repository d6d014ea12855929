"""Sampling by row: the right distribution, from each row's own stream."""

from typing import Any

import pytest
import tiny
import torch
from torch import Tensor

from polyprompt.config import PromptTuningConfig
from polyprompt.errors import ConfigError
from polyprompt.sampling import Sampling

ROWS = 4000
LOGITS_V = torch.tensor([2.0, 1.0, 0.5, 0.0, -1.0])


def frequencies(**keys: Any) -> Tensor:
    """How often each piece is drawn, one draw for each of many seeds."""
    (draw,) = Sampling(range(ROWS), **keys).processors(ROWS, 1)
    return draw(torch.zeros(ROWS, 0), LOGITS_V.expand(ROWS, -1)).argmax(dim=1).bincount(minlength=5) / ROWS


@pytest.mark.parametrize(
    ("keys", "expected"),
    [
        ({}, LOGITS_V.softmax(-1)),
        ({"temperature": 0.5}, (2 * LOGITS_V).softmax(-1)),
        ({"top_k": 2}, torch.cat([LOGITS_V[:2].softmax(-1), torch.zeros(3)])),
        # The first two have 0.77 of the probability, the first alone 0.56.
        ({"top_p": 0.7}, torch.cat([LOGITS_V[:2].softmax(-1), torch.zeros(3)])),
        ({"top_p": 0.5}, torch.tensor([1.0, 0, 0, 0, 0])),
        ({"top_p": 1.0, "top_k": 9}, LOGITS_V.softmax(-1)),
    ],
)
def test_draws_follow_the_softmax(keys: dict[str, Any], expected: Tensor) -> None:
    # Four standard deviations of a share of one half.
    torch.testing.assert_close(frequencies(**keys), expected, atol=4 * 0.5 / ROWS**0.5, rtol=0)


def test_the_order_of_pieces_does_not_matter_to_top_p() -> None:
    (draw,) = Sampling([3] * 5, top_p=0.5).processors(5, 1)
    rolled = torch.stack([LOGITS_V.roll(shift) for shift in range(5)])
    assert draw(torch.zeros(5, 0), rolled).argmax(dim=1).tolist() == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("family", ["t5", "gpt2"])
def test_a_seed_decides_its_row_and_torchs_stream_is_untouched(family: str) -> None:
    model, (input_ids, mask, _, task) = tiny.model(PromptTuningConfig(length=3), family), tiny.batch()
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)

    def made(seeds: list[int], **keys: Any) -> Tensor:
        return model.generate(input_ids, mask, task, max_new_tokens=5, sampling=Sampling(seeds, **keys))

    one, again, other = made([1, 2, 3, 4, 5, 6]), made([1, 2, 3, 4, 5, 6]), made([1, 2, 3, 4, 5, 9])
    assert torch.equal(torch.rand(3), expected)
    assert torch.equal(one, again)
    assert torch.equal(one[:5, 0], other[:5, 0])
    assert not torch.equal(one[5, :2], other[5, :2])
    greedy = model.generate(input_ids, mask, task, max_new_tokens=5)
    assert torch.equal(made([7] * 6, top_k=1), greedy)
    assert not torch.equal(one, greedy)


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"temperature": 0.0}, r"temperature=0.0 must be above 0"),
        ({"top_k": 0}, r"top_k=0 must be at least 1"),
        ({"top_p": 1.5}, r"top_p=1.5 must be in \(0, 1\]"),
    ],
)
def test_values_out_of_range_are_refused(keys: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Sampling([1], **keys)


def test_seeds_and_beams_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ConfigError, match="2 seeds for 3 rows"):
        Sampling([1, 2]).processors(3, 1)
    with pytest.raises(ConfigError, match="num_beams=3 must be 1"):
        Sampling([1, 2]).processors(2, 3)
