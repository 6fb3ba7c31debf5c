"""The number of tokens that count, found before the head needs it."""

import pytest
import torch

from graphfuse.kernels import _early
from graphfuse.kernels._head_ops import NO_TARGET  # and registers the ops

TOKENS, FEATURES, VOCAB = 40, 16, 77
NEEDS = [True, True, False, False, False]


def arguments(device):
    hidden, weight = torch.randn(TOKENS, FEATURES, device=device), torch.randn(VOCAB, FEATURES, device=device)
    target = torch.randint(VOCAB, (TOKENS,), device=device)
    target[::3] = NO_TARGET
    factor = (target != NO_TARGET).float() / 7
    head = (hidden, weight, None, None, None, target, None)
    return head, (factor, None, None, None)


def head(device, kept, compact=True):
    given, factors = arguments(device)
    return torch.ops.graphfuse.linear_cross_entropy(*given, *factors, 1.0, 0.0, 8, compact, NEEDS, kept=kept)


@pytest.mark.parametrize("work", [None, 2**50])
def test_counts(work, device):
    _, factors = arguments(device)
    lse = torch.zeros(TOKENS, device=device)
    lse[0] = 1.0
    for given, more in ((factors, 0), ((factors[0], None, lse, None), 1)):
        count = torch.ops.graphfuse.count_kept(*given, work)
        assert count.device.type == "cpu"
        assert _early.received(count) == int((factors[0] != 0).sum()) + more


def test_the_head_takes_the_count_that_is_given(device):
    torch.manual_seed(0)
    own = head(device, None)
    _, factors = arguments(device)
    torch.manual_seed(0)
    given = head(device, torch.ops.graphfuse.count_kept(*factors, None))
    torch.testing.assert_close(given, own, rtol=0, atol=0)


def test_the_head_counts_itself_what_has_not_come(device):
    """A copy that somebody made of the number before it was there."""
    torch.manual_seed(0)
    own = head(device, None)
    torch.manual_seed(0)
    torch.testing.assert_close(head(device, torch.tensor(_early.UNKNOWN)), own, rtol=0, atol=0)


def test_opcheck(device):
    given, factors = arguments(device)
    count = torch.ops.graphfuse.count_kept(*factors, None)
    torch.library.opcheck(torch.ops.graphfuse.count_kept.default, (*factors, None))
    head_ = torch.ops.graphfuse.linear_cross_entropy.default
    torch.library.opcheck(head_, (*given, *factors, 1.0, 0.0, 8, True, NEEDS), {"kept": count})


@pytest.mark.gpu
def test_sending_does_not_wait():
    number = torch.ones((), dtype=torch.int64, device="cuda")
    _early.received(_early.send(number))  # pinned memory is there from now on
    torch.cuda._sleep(200_000_000)
    before = torch.cuda.Event()
    before.record()
    sent = _early.send(number + 4)
    assert not before.query()
    assert _early.received(sent) == 5
    assert before.query()


@pytest.mark.gpu
def test_small_heads_are_not_counted():
    _, factors = arguments("cuda")
    assert _early.received(torch.ops.graphfuse.count_kept(*factors, 1000)) is None
