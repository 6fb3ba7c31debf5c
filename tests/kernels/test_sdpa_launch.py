"""Which layouts cuDNN's attention is given as they are."""

import warnings

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from graphfuse.kernels._sdpa_launch import _heads_within_tokens

B, S, H, D = 2, 5, 3, 8
TOKENS = {
    "dense": (lambda: torch.zeros(B, S, H, D), True),
    "packed": (lambda: torch.zeros(B, S, 3 * H * D)[..., H * D : 2 * H * D].unflatten(-1, (H, D)), True),
    "one head": (lambda: torch.zeros(B, S, 3 * D)[..., None, D : 2 * D], True),
    "one sequence": (lambda: torch.zeros(1, S, H, D), True),
    "heads outside": (lambda: torch.zeros(B, H, S, D).transpose(1, 2), False),
    "features outside": (lambda: torch.zeros(B, S, D, H).mT, False),
    "expanded": (lambda: torch.zeros(B, S, 1, D).expand(B, S, H, D), False),
    "one number": (lambda: torch.zeros(()).expand(B, S, H, D), False),
    "misaligned": (lambda: torch.zeros(B * S * H * D + 1)[1:].view(B, S, H, D), False),
    "misaligned tokens": (lambda: torch.zeros(B, S, H * D + 1)[..., : H * D].unflatten(-1, (H, D)), False),
}


@pytest.mark.parametrize(("tokens", "stays"), TOKENS.values(), ids=TOKENS)
@pytest.mark.parametrize("is_fake", [False, True])
def test_states_stay_if_their_dims_are_in_order(tokens, stays, is_fake):
    with FakeTensorMode() if is_fake else torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("error")
        states = tokens().transpose(1, 2)
        assert (_heads_within_tokens(states, gaps=True) is states) == stays
        copied = _heads_within_tokens(states)
    assert copied.shape == states.shape
    assert copied.transpose(1, 2).is_contiguous()
