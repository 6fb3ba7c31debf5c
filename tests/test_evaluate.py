"""Running a region at small sizes: shapes that are worked out again, and values that stay what they were."""

import math

import pytest
import torch
import torch.nn.functional as F

from graphfuse.evaluate import FACTORS, CannotEvaluate, evaluate, fingerprint, roots, small_sizes, small_view
from graphfuse.replay import record
from graphfuse.shadow import LEAF

CPU = torch.device("cpu")


def shadow_of(fn, *inputs, dynamic=False):
    """The shadow of the one graph that `fn` is."""
    shadows = []

    def backend(graph_module, example_inputs):
        shadows.append(record(graph_module, example_inputs))
        return graph_module.forward

    torch.compile(fn, backend=backend, fullgraph=True, dynamic=dynamic)(*inputs)
    (shadow,) = shadows
    return shadow


def output_of(shadow):
    (output,) = (node for node in shadow.graph_module.graph.nodes if node.op == "output")
    return shadow.value_of[output.args[0][0]]


@pytest.mark.parametrize(
    ("full", "expected"),
    [
        (set(), {}),
        ({1, 2, 4}, {1: 1, 2: 2, 4: 4}),
        ({2, 4096, 8192}, {2: 2, 4096: 3, 8192: 6}),
        ({100, 200, 20000}, {100: 3, 200: 5, 20000: 15}),
        ({16, 256}, {16: 3, 256: 9}),
    ],
    ids=str,
)
def test_small_sizes(full, expected):
    assert small_sizes(full) == expected


@pytest.mark.parametrize(
    ("full", "cut", "expected"),
    [
        ({2, 4095, 4096, 8190}, {4095: 4096}, {2: 2, 4095: 4, 4096: 5, 8190: 8}),
        ({6, 7, 8, 9}, {6: 9, 7: 9, 8: 9}, {6: 4, 7: 5, 8: 6, 9: 7}),
        ({5, 6, 100}, {5: 6}, {5: 4, 6: 5, 100: 3}),
        ({4, 4095, 4096}, {4095: 4096}, {4: 4, 4095: 6, 4096: 7}),
        ({12, 16, 4096, 65536}, {12: 16}, {12: 3, 16: 7, 4096: 5, 65536: 35}),
    ],
    ids=str,
)
def test_small_sizes_keep_the_difference_of_what_is_cut(full, cut, expected):
    assert small_sizes(full, cut) == expected


def test_small_sizes_leave_alone_what_there_is_no_factor_for():
    primes = [101, 103, 107, 109, 113, 127, 131]
    small = small_sizes(primes)
    assert [small[p] for p in primes[: len(FACTORS)]] == list(FACTORS)
    assert [small[p] for p in primes[len(FACTORS) :]] == primes[len(FACTORS) :]


@pytest.mark.parametrize(
    ("full_in", "small_in", "full_out", "expected"),
    [
        ((8, 64), (3, 64), (8, 64), [3, 64]),
        ((2, 4096, 64), (2, 3, 64), (8192, 64), [6, 64]),
        ((8192, 64), (6, 64), (2, 4096, 64), [2, 3, 64]),
        ((2, 4096, 64), (2, 3, 64), (2, 4096, 4, 16), [2, 3, 4, 16]),
        ((2, 4096, 4, 16), (2, 3, 4, 16), (2, 4096, 64), [2, 3, 64]),
        ((2, 4096), (2, 3), (8192,), [6]),
        ((2, 4096, 64), (2, 3, 64), (2, 4096, 1, 64), [2, 3, 1, 64]),
        ((2, 1, 64), (2, 1, 64), (2, 64), [2, 64]),
        ((8192,), (6,), (8192, 1, 1), [6, 1, 1]),
        ((1, 1), (1, 1), (), []),
        ((), (), (1, 1), [1, 1]),
        ((4096, 32), (3, 32), (4096, 2, 16), [3, 2, 16]),
    ],
    ids=str,
)
def test_small_view(full_in, small_in, full_out, expected):
    small = small_view(full_in, small_in, full_out)
    assert small == expected
    assert math.prod(small) == math.prod(small_in)


def test_small_view_needs_as_many_elements():
    with pytest.raises(CannotEvaluate, match=r"view: expected \(6,\) to factor into \(4,\)"):
        small_view((6,), (3,), (4,))


def run(shadow, known, *, exact=True, sizes=None):
    output = output_of(shadow)
    values = shadow.cone([output], known)
    return evaluate(values, known, exact=exact, device=CPU, sizes=sizes or {})[output]


def leaves(shadow):
    return [value for value in shadow.values if value.op is LEAF]


def test_runs_literal_sizes_at_others():
    def attention_layout(x):
        return x.view(2, 64, -1, 8).transpose(1, 2).expand(2, 4, 64, 8).reshape(8, 64, 8)[:, :-1]

    shadow = shadow_of(attention_layout, torch.randn(2, 64, 8))
    (leaf,) = leaves(shadow)
    x = torch.randn(2, 3, 8, dtype=torch.float64)
    expected = x.view(2, 3, 1, 8).transpose(1, 2).expand(2, 4, 3, 8).reshape(8, 3, 8)[:, :-1]
    assert torch.equal(run(shadow, {leaf: x}, sizes={64: 3}), expected)


def test_runs_in_float64_whatever_the_graph_casts_to():
    shadow = shadow_of(lambda x: (x.to(torch.bfloat16) * 3).float().exp(), torch.randn(4))
    (leaf,) = leaves(shadow)
    x = torch.randn(4, dtype=torch.float64)
    assert torch.equal(run(shadow, {leaf: x}), (x * 3).exp())
    rounded = run(shadow, {leaf: x.float()}, exact=False)
    assert torch.equal(rounded, (x.float().to(torch.bfloat16) * 3).float().exp())


@pytest.mark.parametrize("requires_grad", [False, True])
def test_keeps_values_from_before_an_in_place_operation(requires_grad):
    """Each value of the shadow is one state of a tensor."""

    def fn(x):
        y = x * 1
        z = y + 1
        y.mul_(2)
        return y * z

    shadow = shadow_of(fn, torch.randn(4))
    product = next(value for value in shadow.values if value.op is torch.ops.aten.mul_.Tensor)
    before = product.args[0]
    known = {before: torch.randn(4, dtype=torch.float64, requires_grad=requires_grad)}
    original = known[before].detach().clone()
    result = run(shadow, known)
    torch.testing.assert_close(result.detach(), original * 2 * (original + 1))
    assert torch.equal(known[before].detach(), original)


def test_needs_every_leaf():
    shadow = shadow_of(lambda x, y: x + y, torch.randn(4), torch.randn(4))
    first, _ = leaves(shadow)
    with pytest.raises(CannotEvaluate, match="expected a computed value, got a leaf"):
        run(shadow, {first: torch.randn(4)})


def test_draws_no_random_numbers():
    shadow = shadow_of(lambda x: F.dropout(x, 0.5), torch.randn(4))
    with pytest.raises(CannotEvaluate, match="expected no random numbers"):
        run(shadow, {leaves(shadow)[0]: torch.randn(4)})


def test_roots_lead_through_rearrangements_only():
    shadow = shadow_of(lambda x: (x * 2).view(2, 2).t().contiguous(), torch.randn(4))
    chain = roots(output_of(shadow))
    assert chain[-1].op is torch.ops.aten.mul.Tensor
    assert chain[0] is output_of(shadow)


def norm(x, eps=1e-5):
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps)


def test_fingerprints_tell_regions_apart():
    """Equal regions share a proof; another number, shape, dtype or layout is another region."""

    def print_of(fn, x):
        torch._dynamo.reset()
        shadow = shadow_of(fn, x)
        starts = leaves(shadow)
        return fingerprint(shadow.cone([output_of(shadow)], starts), starts)

    x = torch.randn(4, 8)
    same = print_of(norm, x)
    assert same == print_of(lambda y: y * torch.rsqrt(y.pow(2).mean(-1, keepdim=True) + 1e-5), x)
    others = [
        print_of(lambda y: norm(y, 1e-6), x),
        print_of(norm, torch.randn(4, 16)),
        print_of(norm, x.bfloat16()),
        print_of(norm, torch.randn(8, 4).t()),
        print_of(norm, torch.randn(4, 8, requires_grad=True)),
    ]
    assert same not in others
    assert len(set(others)) == len(others)
    assert hash(same) is not None
