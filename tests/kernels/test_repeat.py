"""Calls of ops that are made again: of the same kernels on other tensors, and only where nothing else is done."""

import ctypes

import pytest
import torch

from graphfuse.kernels import _repeat
from graphfuse.kernels._repeat import current, repeated

pytestmark = pytest.mark.usefixtures("counts_as_gpu")

launches = []


def kernel(x, y, z, stream, out, source, other, count, factor):
    """Out = factor * source + other, of addresses."""
    launches.append((x, y, z, stream))
    given = [(ctypes.c_float * count).from_address(address) for address in (source, other)]
    (ctypes.c_float * count).from_address(out)[:] = [factor * a + b for a, b in zip(*given, strict=True)]


def launch(out, source, other, factor):
    addresses = [tensor.data_ptr() for tensor in (out, source, other)]
    values = [*addresses, source.numel(), factor]
    kernel(4, 1, 1, 7, *values)
    if current.recorder is not None:
        current.recorder.launched(kernel, (4, 1, 1), values, [out, source, other, None, None])


class Op:
    """Counts how often its Python runs."""

    def __init__(self, function, schema="op(Tensor x, Tensor other, float factor) -> Tensor"):
        self.function, self.ran = function, 0
        self.call = repeated(self.run, torch._C.parse_schema(schema))

    def run(self, *args):
        self.ran += 1
        return self.function(*args)


def two_steps(x, other, factor):
    between, out = torch.empty_like(x), x.new_empty(x.shape)
    launch(between, x, other, factor)
    launch(out, between, other, 1.0)
    return out


def check(op, expected, *sizes, times=5, ran=2, views=False):
    results = []
    for _ in range(times):
        given = [torch.randn(size) for size in sizes]
        found = op.call(*given, 3.0)
        torch.testing.assert_close(found, expected(*given))
        assert views or not found._is_view()  # which could not be changed in place under autograd
        results.append((found, given))
    for found, given in results:  # nothing was written over
        torch.testing.assert_close(found, expected(*given))
    assert op.ran == ran


def test_third_call_launches_alone():
    op = Op(two_steps)
    check(op, lambda x, other: 3 * x + 2 * other, (2, 5), (2, 5))
    assert launches[-1] == (4, 1, 1, 7)


def test_other_kinds_are_other_calls():
    op = Op(two_steps)
    check(op, lambda x, other: 3 * x + 2 * other, (2, 5), (2, 5))
    check(op, lambda x, other: 3 * x + 2 * other, (5, 2), (5, 2), ran=4)
    x, other = torch.randn(2, 5), torch.randn(2, 5)
    torch.testing.assert_close(op.call(x, other, 4.0), 4 * x + 2 * other)
    assert op.ran == 5
    x = torch.randn(11)[1:].view(2, 5)  # less aligned
    torch.testing.assert_close(op.call(x, other, 3.0), 3 * x + 2 * other)
    assert op.ran == 6


def test_parts_of_what_is_given_and_made():
    def halves(packed, other, factor):
        both = packed.new_empty(2, *other.shape)
        launch(both[1], packed[1], other, factor)
        launch(both[0], both[1], other, 1.0)
        return both[0], both[1], both

    def expected(packed, other):
        second = 3 * packed[1] + other
        return second + other, second, torch.stack((second + other, second))

    check(Op(halves), expected, (2, 5), (5,), views=True)


def test_optional_tensors_and_lists():
    def strided(x, other, stride, factor):
        out = torch.empty_strided(x.shape, stride)
        launch(out, x, x if other is None else other, factor)
        return out

    op = Op(strided, "op(Tensor x, Tensor? other, SymInt[] stride, float factor) -> Tensor")
    for stride in ([2, 1], [1, 2]):
        for _ in range(4):
            x, other = torch.randn(2, 2), torch.randn(2, 2)
            found = op.call(x, other, stride, 3.0)
            assert found.stride() == tuple(stride)
            torch.testing.assert_close(found.as_strided((2, 2), (2, 1)), 3 * x + other)
            torch.testing.assert_close(op.call(x, None, stride, 2.0).as_strided((2, 2), (2, 1)), 3 * x)
    assert op.ran == 8


def test_changes_in_place():
    def doubled(x, other, factor):
        launch(x, x, other, factor)

    op = Op(doubled)
    for _ in range(4):
        x, other = torch.randn(3), torch.randn(3)
        expected = 3 * x + other
        assert op.call(x, other, 3.0) is None
        torch.testing.assert_close(x, expected)
    assert op.ran == 2


def test_empty_results_are_several_tensors():
    def with_nothing(x, other, factor):
        out = torch.empty_like(x)
        launch(out, x, other, factor)
        return out, x.new_empty(0), x.new_empty(0)

    op = Op(with_nothing)
    for _ in range(4):
        x, other = torch.randn(3), torch.randn(3)
        out, *nothing = op.call(x, other, 3.0)
        torch.testing.assert_close(out, 3 * x + other)
        assert [tensor.numel() for tensor in nothing] == [0, 0]
        assert nothing[0] is not nothing[1]
    assert op.ran == 2


def computes(x, other, factor):
    out = torch.empty_like(x)
    launch(out, x, other + 0, factor)
    return out


def copies(x, other, factor):
    out = torch.empty_like(x)
    launch(out, x.mT.contiguous().mT.contiguous(), other, factor)
    return out


def fills(x, other, factor):
    out = torch.zeros_like(x)
    launch(out, x, other, factor)
    return out


def asks(x, other, factor):
    out = torch.empty_like(x)
    launch(out, x, other, factor if bool((x < torch.inf).all()) else 0.0)
    return out


def returns_what_it_was_given(x, other, factor):
    launch(x, x, other, factor)
    return x


@pytest.mark.parametrize("function", [computes, copies, fills, asks])
def test_what_does_more_runs_as_it_is(function):
    check(Op(function), lambda x, other: 3 * x + other, (2, 5), (2, 5), ran=5)


def test_returned_arguments_are_not_made_again():
    op = Op(returns_what_it_was_given)
    for _ in range(4):
        x, other = torch.randn(3), torch.randn(3)
        assert op.call(x, other, 3.0) is x
    assert op.ran == 4


def test_one_tensor_in_two_places_says_nothing_of_two():
    op = Op(two_steps)
    for _ in range(3):
        x = torch.randn(4)
        torch.testing.assert_close(op.call(x, x, 3.0), 5 * x)
    assert op.ran == 3
    x, other = torch.randn(4), torch.randn(4)
    torch.testing.assert_close(op.call(x, other, 3.0), 3 * x + 2 * other)


def test_parts_of_one_tensor_are_told_apart():
    """Gate and up of one projection lie in one storage; the next ones may not."""
    op = Op(two_steps)
    for _ in range(3):
        x, other = torch.randn(2, 40)
        torch.testing.assert_close(op.call(x, other, 3.0), 3 * x + 2 * other)
    x, other = torch.randn(40), torch.randn(40)
    torch.testing.assert_close(op.call(x, other, 3.0), 3 * x + 2 * other)
    assert op.ran == 2

    def of_a_part(x, other, factor):
        out = torch.empty_like(x)
        launch(out, x.view(2, 2)[1:].expand(2, 2), other, factor)  # which of the two it is cut out of is not known
        return out

    op = Op(of_a_part)
    for _ in range(3):
        op.call(*torch.randn(2, 4), 3.0)
    assert op.ran == 3


def test_ops_within_ops_are_part_of_the_call():
    inner = Op(two_steps)
    outer = Op(inner.call)
    check(outer, lambda x, other: 3 * x + 2 * other, (3,), (3,))


def test_other_classes_of_tensors_run_as_they_are():
    op = Op(lambda x, factor: x * factor, "op(Tensor x, float factor) -> Tensor")
    x = torch.randn(3).as_subclass(type("Tensor", (torch.Tensor,), {}))
    for _ in range(4):
        assert type(op.call(x, 2.0)) is type(x)
    assert op.ran == 4


def test_keeps_no_more_than_so_many(monkeypatch):
    monkeypatch.setattr(_repeat, "MAX_KINDS", 4)
    op = Op(two_steps)
    for size in range(1, 9):
        check(op, lambda x, other: 3 * x + 2 * other, (size,), (size,), ran=2)
        op.ran = 0
    assert len(_repeat._known[-1]) <= 4
    check(op, lambda x, other: 3 * x + 2 * other, (8,), (8,), ran=0)  # the newest are kept


def test_records_what_comes_back_often_enough(monkeypatch):
    monkeypatch.setattr(_repeat, "RECORDED", 8)
    check(Op(two_steps), lambda x, other: 3 * x + 2 * other, (3,), (3,), times=12, ran=8)


def test_takes_the_device_of_the_first_tensor_that_there_is(monkeypatch):
    monkeypatch.setattr(_repeat, "_index", lambda tensor: tensor.dim() - 1)
    devices = []
    monkeypatch.setattr(_repeat, "_may_repeat", lambda index: devices.append(index) or True)

    def optional(x, other, factor):
        out = torch.empty_like(other)
        launch(out, other if x is None else x, other, factor)
        return out

    op = Op(optional, "op(Tensor? x, Tensor other, float factor) -> Tensor")
    for _ in range(4):
        other = torch.randn(2, 3)
        torch.testing.assert_close(op.call(None, other, 3.0), 4 * other)
    assert op.ran == 2
    assert devices == [1] * 4
    for _ in range(3):  # on two devices
        op.call(torch.randn(6), torch.randn(2, 3), 3.0)
    assert op.ran == 5
    assert devices == [1] * 4


def test_tensors_beside_each_other_are_of_another_kind():
    """As the interleaved halves of a projection, which a kernel reads in one load each."""

    def interleaved(x, other, factor):
        out = torch.empty(len(x))
        is_paired = other.data_ptr() - x.data_ptr() == 4
        launch(out, x, other, factor if is_paired else -factor)
        return out

    op = Op(interleaved)
    apart = [torch.randn(4)[0::4], torch.randn(8)[4::4]]
    for _ in range(4):
        packed = torch.randn(2)
        x, other = packed[0::2], packed[1::2]
        torch.testing.assert_close(op.call(x, other, 3.0), 3 * x + other)
        torch.testing.assert_close(op.call(*apart, 3.0), -3 * apart[0] + apart[1])
    assert op.ran == 4


def test_memory_that_is_to_be_filled_is(monkeypatch):
    monkeypatch.undo()
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    before = torch.are_deterministic_algorithms_enabled()
    try:
        torch.use_deterministic_algorithms(True)
        assert not _repeat._may_repeat(0)
        torch.use_deterministic_algorithms(False)
        assert _repeat._may_repeat(0)
        assert not _repeat._may_repeat(1)
    finally:
        torch.use_deterministic_algorithms(before)


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_what_is_on_no_gpu_runs_as_it_is(monkeypatch, device):
    monkeypatch.undo()
    monkeypatch.setattr(torch.cuda, "current_device", lambda: pytest.fail("there is none"))
    op = Op(lambda x, factor: x * factor, "op(Tensor x, float factor) -> Tensor")
    for _ in range(3):
        op.call(torch.ones(2, device=device), 2.0)
    assert op.ran == 3


def test_errors_of_a_call_that_is_listened_to():
    def fails(x, other, factor):
        raise ValueError("no such thing")

    op = Op(fails)
    for _ in range(3):
        with pytest.raises(ValueError, match="no such thing"):
            op.call(torch.randn(3), torch.randn(3), 1.0)
    assert current.recorder is None
