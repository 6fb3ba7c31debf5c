"""`ops.vocab_parallel_cross_entropy` against the same op in one process."""

import itertools
from unittest import mock

import pytest
import torch
from torch import distributed

from graphfuse import ops
from graphfuse.kernels import _op
from tests.distributed.harness import case

VOCABULARY, CUT, FEATURES = 77, 45, 24  # the second process has fewer classes


def tensors(dtype, shape=(3, 11)):
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(*shape, FEATURES, generator=generator).to(dtype)
    weight = torch.randn(VOCABULARY, FEATURES, generator=generator).to(dtype)
    bias = torch.randn(VOCABULARY, generator=generator).to(dtype)
    target = torch.randint(VOCABULARY, shape, generator=generator)
    target[torch.rand(shape, generator=generator) < 0.3] = -100
    return hidden, weight, bias, target


def results(op, hidden, weight, bias, target, upstream, **options):
    leaves = [t.clone().requires_grad_() for t in (hidden, weight, bias) if t is not None]
    loss = op(leaves[0], leaves[1], target, *leaves[2:], **options)
    loss.backward(upstream if loss.ndim else upstream.sum())
    return [loss.detach(), *(leaf.grad for leaf in leaves)]


def compare(dtype=torch.float32, tolerance=1e-5, *, with_bias=True, shape=(3, 11), mark=-100, **options):
    hidden, weight, bias, target = tensors(dtype, shape)
    target[target == -100] = mark
    bias = bias if with_bias else None
    upstream = torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(
        torch.promote_types(dtype, torch.float32)
    )
    own = slice(CUT) if distributed.get_rank() == 0 else slice(CUT, None)
    options = {"ignore_index": mark, **options}
    expected = results(ops.linear_cross_entropy, hidden, weight, bias, target, upstream, **options)
    expected[2:] = [grad[own] for grad in expected[2:]]
    mine = (hidden, weight[own], None if bias is None else bias[own])
    found = results(ops.vocab_parallel_cross_entropy, *mine, target, upstream, first_class=own.start or 0, **options)
    for ours, alone in zip(found, expected, strict=True):
        scale = float(alone.abs().amax()) if alone.numel() else 1.0
        torch.testing.assert_close(ours, alone, rtol=tolerance, atol=tolerance * scale, equal_nan=True)


@case
def vocab_parallel_is_the_op_of_one_process():
    choices = itertools.product(("mean", "sum", "none"), (None, 5.0), (1.0, 0.4), (0, 4))
    for reduction, softcap, scale, chunk in choices:
        compare(reduction=reduction, softcap=softcap, logit_scale=scale, chunk_size=chunk)
    compare(with_bias=False)
    compare(z_loss=1e-2)
    compare(z_loss=1e-2, reduction="none", softcap=5.0)
    compare(torch.float64, 1e-12, logit_scale=3.0)
    compare(torch.bfloat16, 2e-2)
    compare(mark=7)  # a class that exists
    compare(shape=(0,), reduction="sum")
    compare(shape=(40,), logit_scale=100.0)  # one class takes all


@case
def vocab_parallel_runs_the_kernel():
    with mock.patch.object(_op, "launches", return_value=True):
        compare(shape=(9,), softcap=5.0, logit_scale=0.7, chunk_size=8)
        compare(shape=(5,), reduction="none", z_loss=1e-2)


@case
def vocab_parallel_of_no_token_that_counts():
    hidden, weight, _, target = tensors(torch.float32)
    upstream = torch.ones(target.shape)
    own = {"first_class": VOCABULARY * distributed.get_rank()}
    found = results(
        ops.vocab_parallel_cross_entropy, hidden, weight, None, torch.full_like(target, -100), upstream, **own
    )
    assert found[0].isnan()
    assert not found[1].any()
    assert not found[2].any()


@case
def vocab_parallel_rejects_what_does_not_fit():
    hidden, weight, _, target = tensors(torch.float32)
    first = VOCABULARY * distributed.get_rank()
    rejected = [
        (IndexError, "target: expected classes that one process holds", target + 2 * VOCABULARY + 100, first, {}),
        (IndexError, "target: expected classes that one process holds", target, 0, {}),
        (ValueError, "reduction: expected one of mean, sum, none, got avg", target, first, {"reduction": "avg"}),
        (ValueError, "first_class: expected the number of a class, got -1", target, -1, {}),
        (ValueError, "target: expected shape", target[0], first, {}),
    ]
    for kind, words, labels, start, options in rejected:
        with pytest.raises(kind, match=words):
            ops.vocab_parallel_cross_entropy(hidden, weight, labels, first_class=start, **options)


@case
def vocab_parallel_trains_in_a_compiled_model():
    hidden, weight, _, target = tensors(torch.float32)
    own = slice(CUT) if distributed.get_rank() == 0 else slice(CUT, None)

    def loss(hidden, weight, target):
        return ops.vocab_parallel_cross_entropy(hidden * 2, weight, target, first_class=own.start or 0)

    upstream = torch.ones(target.shape)
    expected = results(loss, hidden, weight[own], None, target, upstream)
    found = results(torch.compile(loss, backend="aot_eager"), hidden, weight[own], None, target, upstream)
    for ours, eager in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, eager)
