"""`verify`: what every pattern's test asks of a compiled function."""

import contextlib
from collections import Counter
from unittest import mock

import pytest
import torch

import graphfuse
from graphfuse.testing import assert_no_worse

TOLERANCE = 1e-5  # relative to the largest element: fp32, in another order


def run(fn, inputs):
    """The outputs of a call on copies of `inputs`, and a gradient for every input that wants one."""
    own = [x.detach().clone().requires_grad_(x.requires_grad) if isinstance(x, torch.Tensor) else x for x in inputs]
    outputs = fn(*own)
    outputs = [outputs] if isinstance(outputs, torch.Tensor) else list(outputs)
    wanted = [x for x in own if isinstance(x, torch.Tensor) and x.requires_grad]
    ends = [output for output in outputs if output.requires_grad]
    results = [output.detach() for output in outputs]
    if not wanted or not ends:
        return results
    generator = torch.Generator().manual_seed(3)
    upstream = [torch.randn(end.shape, generator=generator).to(end) for end in ends]
    gradients = torch.autograd.grad(ends, wanted, upstream, allow_unused=True)
    return results + [torch.zeros_like(x) if g is None else g for x, g in zip(wanted, gradients, strict=True)]


def assert_equal_to_eager(compiled, fn, inputs):
    for k, (ours, eager) in enumerate(zip(run(compiled, inputs), run(fn, inputs), strict=True)):
        assert ours.shape == eager.shape, k
        assert ours.dtype == eager.dtype, k
        scale = float(eager.nan_to_num().abs().amax()) if eager.numel() else 0.0
        torch.testing.assert_close(ours, eager, rtol=TOLERANCE, atol=TOLERANCE * scale, equal_nan=True)


@pytest.fixture
def agrees():
    """Compare results and gradients of a compiled function with eager's, for what is compiled once and called often."""
    return assert_equal_to_eager


@pytest.fixture
def counts_calls():
    """Count the calls of graphfuse's ops, by name: from generated code, and through the dispatcher."""

    @contextlib.contextmanager
    def counting():
        direct = torch.ops.graphfuse.direct
        spies = {name: mock.Mock(wraps=function) for name, function in vars(direct).items()}
        calls = Counter()
        with mock.patch.multiple(direct, **spies), torch.profiler.profile() as profile:
            yield calls
        calls.update({name: spy.call_count for name, spy in spies.items()})
        calls.update({event.key.removeprefix("graphfuse::"): event.count for event in profile.key_averages()})

    return counting


@pytest.fixture
def verify():
    """Compile a function in one graph, compare results and gradients with eager's, and return the report.

    What is fp32 throughout must agree closely; what rounds to bf16 on the way must be as near to float64 as eager is.
    """

    def verify(fn, inputs, *, dynamic=False, autocast=False, ulps=4.0, inner="eager", **options):
        compiled = graphfuse.optimize(fn, inner=inner, dynamic=dynamic, fullgraph=True, strict=True, **options)

        def ambient():
            return torch.autocast("cpu", torch.bfloat16) if autocast else contextlib.nullcontext()

        def ours(*args):
            with ambient():
                return compiled(*args)

        def theirs(*args):
            with ambient():
                return fn(*args)

        low = any(isinstance(x, torch.Tensor) and x.dtype == torch.bfloat16 for x in inputs)
        if low or autocast:
            # Through a matrix product errors add up at random: the worst of few may be a little worse.
            assert_no_worse(ours, theirs, inputs, ulps=ulps, slack=1.25 if autocast else 1.1)
        else:
            assert_equal_to_eager(ours, theirs, inputs)
        return graphfuse.report(compiled)

    return verify
