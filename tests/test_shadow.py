"""The shadow: what nodes run, in single-assignment form, without a trace in the graph or its shapes."""

import pytest
import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from graphfuse.match import is_last, narrows, number, scalar, strip, unrounded
from graphfuse.replay import record
from graphfuse.shadow import LEAF, hint, is_nested

aten = torch.ops.aten


def shadows_of(fn, *inputs, dynamic=False, fullgraph=True):
    shadows = []

    def backend(graph_module, example_inputs):
        before = str(graph_module.graph)
        shadows.append(record(graph_module, example_inputs))
        assert str(graph_module.graph) == before
        return graph_module.forward

    torch.compile(fn, backend=backend, fullgraph=fullgraph, dynamic=dynamic)(*inputs)
    return shadows


def shadow_of(fn, *inputs, **kwargs):
    (shadow,) = shadows_of(fn, *inputs, **kwargs)
    return shadow


def ops(shadow):
    return [str(value.op) for value in shadow.values if value.op is not LEAF]


def only(shadow, op):
    (value,) = (value for value in shadow.values if value.op is op)
    return value


@pytest.mark.parametrize("spelling", [lambda x: x**2, lambda x: x.pow(2), lambda x: torch.pow(x, 2)])
def test_sees_one_operation_for_many_spellings(spelling):
    assert ops(shadow_of(spelling, torch.randn(4))) == ["aten.pow.Tensor_Scalar"]


def test_opens_what_is_made_of_others():
    shadow = shadow_of(lambda x: F.rms_norm(x, (4,)), torch.randn(2, 4, requires_grad=True))
    assert {"aten.pow.Tensor_Scalar", "aten.mean.dim", "aten.rsqrt.default"} <= set(ops(shadow))


def test_opens_composites_in_inference_mode_too():
    with torch.inference_mode():
        shadow = shadow_of(lambda x, w: F.linear(x.reshape(-1, 4), w), torch.randn(2, 3, 4), torch.randn(5, 4))
    assert "aten.mm.default" in ops(shadow)


def test_sees_the_casts_of_autocast():
    weight = torch.randn(5, 4, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        shadow = shadow_of(lambda x, w: F.linear(x, w) + F.linear(x, w), torch.randn(3, 4), weight)
    products = [value for value in shadow.values if value.op is aten.mm.default]
    assert all(product.dtype == torch.bfloat16 for product in products)
    inner = [value for value in shadow.values if value.op is LEAF]
    assert len(inner) == 2, "expected no value from nowhere: autocast keeps casts of weights"


def test_leaves_autocast_as_it_was():
    def fn(x):
        with torch.autocast("cpu", torch.bfloat16):
            return x @ x

    assert ops(shadow_of(fn, torch.randn(4, 4))).count("aten._to_copy.default") >= 1
    assert not torch.is_autocast_enabled("cpu")
    assert torch.is_autocast_cache_enabled()


def test_replays_a_checkpoint_in_the_modes_around_it():
    def fn(x, w):
        with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
            return checkpoint(F.linear, x, w, use_reentrant=False)

    (body,) = shadow_of(fn, torch.randn(3, 4), torch.randn(5, 4)).bodies
    product = only(body, aten.mm.default)
    assert product.dtype == torch.bfloat16
    assert not product.grad_mode
    assert not torch.is_autocast_enabled("cpu")


def test_knows_nothing_of_what_a_checkpoint_has_changed():
    def write(x, mask):
        mask[0, 1] = True
        return x * 2

    def f(x):
        mask = torch.ones(4, 4, dtype=torch.bool).tril()
        y = checkpoint(write, x, mask, use_reentrant=False)
        return F.scaled_dot_product_attention(y, y, y, attn_mask=mask)

    x = torch.randn(1, 2, 4, 8, requires_grad=True)
    compiled = torch.compile(f, backend="graphfuse", options={"inner": "eager", "strict": True})
    torch.testing.assert_close(compiled(x), f(x))


def test_leaves_out_a_region_that_runs_in_several_modes():
    @torch.compiler.nested_compile_region
    def region(x, w):
        return F.linear(x, w)

    def fn(x, w, dtypes):
        for dtype in dtypes:
            with torch.autocast("cpu", dtype):
                x = region(x.float(), w)
        return x

    one, two = (torch.bfloat16, torch.bfloat16), (torch.bfloat16, torch.float16)
    for dtypes, count in ((one, 1), (two, 0)):
        torch._dynamo.reset()
        shadow = shadow_of(fn, torch.randn(3, 4), torch.randn(4, 4), dtypes)
        nested = [node for node in shadow.graph_module.graph.nodes if is_nested(node)]
        assert (len(nested), len(shadow.bodies)) == (2, count)


def test_gives_a_changed_tensor_a_new_value():
    def fn(x):
        y = x + 1
        z = y * 2
        y.add_(3)
        return y * z

    shadow = shadow_of(fn, torch.randn(4))
    add, product = only(shadow, aten.add.Tensor), only(shadow, aten.add_.Tensor)
    first, last = (value for value in shadow.values if value.op is aten.mul.Tensor)
    assert first.args[0] is add
    assert last.args[0] is product
    assert product.args[0] is add


def test_knows_nothing_of_a_view_whose_base_was_changed():
    def fn(x):
        y = x + 1
        row = y[0]
        y.mul_(2)
        return row + 1

    shadow = shadow_of(fn, torch.randn(4, 4))
    last = [value for value in shadow.values if value.op is aten.add.Tensor][-1]
    assert last.args[0].op is LEAF
    assert shadow.mutations


def test_marks_what_escapes():
    def fn(x):
        y = x + 1
        return y, (y * 2).sin()

    shadow = shadow_of(fn, torch.randn(4))
    y, sine = only(shadow, aten.add.Tensor), only(shadow, aten.sin.default)
    assert {y, sine} <= shadow.escaping
    assert shadow.sole_user(y) is None
    assert shadow.sole_user(only(shadow, aten.mul.Tensor)) is sine


def test_does_not_count_what_autograd_keeps_as_a_use():
    shadow = shadow_of(lambda x: torch.rsqrt(x + 1) * 2, torch.randn(4, requires_grad=True))
    assert shadow.sole_user(only(shadow, aten.rsqrt.default)).op is aten.mul.Tensor


def test_cone_lies_between_leaves_and_outputs():
    shadow = shadow_of(lambda x, y: ((x + y).sin() * x).cos(), torch.randn(4), torch.randn(4))
    sine, cosine = only(shadow, aten.sin.default), only(shadow, aten.cos.default)
    cone = shadow.cone([cosine], [sine])
    assert sine not in cone
    assert [value.index for value in cone] == sorted(value.index for value in cone)
    assert {aten.mul.Tensor, aten.cos.default} <= {value.op for value in cone}
    assert aten.add.Tensor not in {value.op for value in cone}


def test_records_grad_mode():
    def fn(x):
        with torch.no_grad():
            y = x.sin()
        return y * x

    shadow = shadow_of(fn, torch.randn(4, requires_grad=True))
    assert not only(shadow, aten.sin.default).grad_mode
    assert only(shadow, aten.mul.Tensor).grad_mode
    assert torch.is_grad_enabled()


def test_records_the_bodies_of_checkpoints():
    def fn(x):
        return checkpoint(lambda x: x.sin().cos(), x, use_reentrant=False) + 1

    shadow = shadow_of(fn, torch.randn(4, requires_grad=True))
    (body,) = shadow.bodies
    assert ops(body)[:1] == ["aten.sin.default"]
    assert "aten.sin.default" not in ops(shadow)


class Doubled(torch.autograd.Function):
    """Somebody's hand-written kernel."""

    @staticmethod
    def forward(ctx, x):
        return x * 2

    @staticmethod
    def backward(ctx, gradient):
        return gradient * 2


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # Dynamo does
def test_leaves_the_insides_of_autograd_functions_alone():
    shadow = shadow_of(lambda x: Doubled.apply(x) + 1, torch.randn(4, requires_grad=True))
    assert shadow.bodies == []
    assert "aten.mul.Tensor" not in ops(shadow)


def test_adds_no_guard_and_no_symbol():
    """Replaying a graph of symbols must not pin them."""
    graphs = []

    def backend(graph_module, example_inputs):
        graphs.append(graph_module)
        record(graph_module, example_inputs)
        return graph_module.forward

    def fn(x, eps):
        return x.reshape(-1) * torch.rsqrt(x.pow(2).mean() + eps)

    compiled = torch.compile(fn, backend=backend, fullgraph=True, dynamic=True)
    for length, eps in [(5, 1e-5), (8, 1e-3), (13, 0.1)]:
        compiled(torch.randn(3, length), eps)
    assert len(graphs) == 1


def test_hints_stand_for_symbols():
    shadow = shadow_of(lambda x: x * x.shape[0], torch.randn(6, 4), dynamic=True)
    value = only(shadow, aten.mul.Tensor)
    assert value.shape == (6, 4)
    assert hint(value.tensor.shape[0]) == 6
    assert number(value.args[1]) == 6.0


def test_reads_numbers_and_casts():
    def fn(x):
        half = x.to(torch.bfloat16)
        wide = half.float()
        return wide.clone() * torch.tensor(2.0), x.sum(-1)

    shadow = shadow_of(fn, torch.randn(3, 4))
    half, wide = (value for value in shadow.values if value.op is aten._to_copy.default)
    assert (narrows(half), narrows(wide)) == (True, False)
    copy = only(shadow, aten.mul.Tensor).args[0]
    assert strip(copy) is half.args[0]
    assert unrounded(copy) is half
    assert [scalar(True), number("x"), number(3)] == [None, None, 3.0]
    total = only(shadow, aten.sum.dim_IntList)
    assert is_last(total.args[1], total.args[0])
    assert not is_last([0, 1], total.args[0])
    assert not is_last(None, total.args[0])
