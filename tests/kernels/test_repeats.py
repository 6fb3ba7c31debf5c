"""Ops on a GPU: every call of a kind, the first, the one that is recorded and those made again, computes the same."""

import pytest
import torch

import graphfuse
from graphfuse import ops
from graphfuse.kernels import _repeat
from graphfuse.kernels.grouped_attention import grouped_attention

pytestmark = pytest.mark.gpu

CALLS = _repeat.RECORDED + 3

TOKENS, HEADS, FEATURES, WIDTH = 6, 4, 64, 256


def randn(*shape):
    return torch.randn(shape, device="cuda", dtype=torch.bfloat16)


def heads():
    return randn(2, TOKENS, HEADS, FEATURES).transpose(1, 2)


def table():
    return randn(1, 1, TOKENS, FEATURES)


def halves(width):
    return randn(2, TOKENS, 2 * width).chunk(2, -1)


# What is called, what it is given, of which it has gradients, and how many recordings there are at least.
CASES = {
    "rms_norm": (ops.rms_norm, lambda: (randn(2, TOKENS, WIDTH), randn(WIDTH)), (0, 1), 2),
    "rms_norm, strided": (ops.rms_norm, lambda: (heads(), randn(FEATURES)), (0, 1), 2),
    "add_rms_norm": (
        ops.add_rms_norm,
        lambda: (randn(2, TOKENS, WIDTH), randn(2, TOKENS, WIDTH), randn(WIDTH)),
        (0, 1, 2),
        2,
    ),
    "layer_norm": (ops.layer_norm, lambda: (randn(2, TOKENS, WIDTH), randn(WIDTH), randn(WIDTH)), (0, 1, 2), 2),
    "rope": (ops.rope, lambda: (heads(), table(), table()), (0,), 2),
    "norm_rope": (ops.norm_rope, lambda: (heads(), randn(FEATURES), table(), table()), (0, 1), 2),
    "glu": (ops.glu, lambda: (randn(2, TOKENS, WIDTH), randn(2, TOKENS, WIDTH)), (0, 1), 2),
    "glu, packed": (ops.glu, lambda: halves(WIDTH), (0, 1), 2),
    "cross_entropy": (
        ops.cross_entropy,
        lambda: (randn(TOKENS, WIDTH), torch.randint(WIDTH, (TOKENS,), device="cuda")),
        (0,),
        2,
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_repeats(case, recordings):
    op, inputs, wanted, count = CASES[case]
    for _ in range(CALLS):
        given = [x.detach().requires_grad_(k in wanted) for k, x in enumerate(inputs())]
        # The same by what is not recorded: in float64, where no kernel runs.
        wide = [
            (x.detach().double() if x.is_floating_point() else x).requires_grad_(k in wanted)
            for k, x in enumerate(given)
        ]
        results, truth = (r if isinstance(r, tuple) else (r,) for r in (op(*given), op(*wide)))
        upstream = [torch.randn_like(result) for result in results]
        grads = torch.autograd.grad(results, [given[k] for k in wanted], upstream)
        exact = torch.autograd.grad(truth, [wide[k] for k in wanted], [u.double() for u in upstream])
        for found, right in zip((*results, *grads), (*(t.detach() for t in truth), *exact), strict=True):
            torch.testing.assert_close(found.double(), right, rtol=3e-2, atol=3e-2 * float(right.abs().max()))
    assert recordings() >= count


def test_repeats_split_attention(recordings):
    for _ in range(CALLS):
        q, k, v = randn(1, 8, 1, 64), randn(1, 2, 600, 64), randn(1, 2, 600, 64)
        seen = torch.rand(1, 1, 1, 600, device="cuda") < 0.5
        found = grouped_attention(q, k, v, seen, scale=0.1, kernel="split")
        right = grouped_attention(*(x.double() for x in (q, k, v)), seen, scale=0.1, kernel="split")
        torch.testing.assert_close(found.double(), right, rtol=2e-2, atol=2e-2)
    assert recordings() == 1


@pytest.mark.parametrize("mode", [None, "reduce-overhead"])
def test_repeats_in_compiled_models(mode, recordings):
    """A step after the other, its parameters changed between: what is made again reads what is there now."""
    from graphfuse.bench.matching import Decoder

    torch.manual_seed(0)
    model = Decoder(2).to(device="cuda", dtype=torch.bfloat16)
    twin = Decoder(2).to(device="cuda", dtype=torch.bfloat16)
    twin.load_state_dict(model.state_dict())
    graphfuse.optimize(model, strict=True, mode=mode)
    for _ in range(CALLS):
        tokens = torch.randint(512, (2, 64), device="cuda")
        losses = []
        for one in (model, twin):
            loss = one(tokens)
            loss.backward()
            losses.append(loss.item())
        assert losses[0] == pytest.approx(losses[1], rel=2e-2)
        for p, other in zip(model.parameters(), twin.parameters(), strict=True):
            apart = (p.grad.float() - other.grad.float()).norm() / other.grad.float().norm().clamp(min=1e-6)
            assert float(apart) < 0.1
            with torch.no_grad():
                p.sub_(0.05 * other.grad)
                other.copy_(p)
            p.grad = other.grad = None
    if mode is None:  # a CUDA graph takes the place of most calls
        assert recordings() > 4
