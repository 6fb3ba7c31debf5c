"""Rows that go where an index says: the gradient of an embedding table, and of hidden states that were gathered.

The gradient of a table is a sum over the tokens that read each of its rows. Inductor adds them up by atomics in a table
in fp32, twice as large, and then makes one in half precision of it: for 128256 x 4096 in bf16, 7.6 GB of traffic and
3 GiB of memory where 1.3 GB and 1 GiB do. Here tokens are sorted and each row is summed in fp32 and written once, in
the same order in every run, which atomics have not. Where the table has another gradient, as that of an output layer
that reads it, too, they are added to that, and no other row is read or written.
"""
# Shape letters: N = tokens, V = rows of the table, H = features.

from __future__ import annotations

import torch
from torch import Tensor

from graphfuse.kernels import _op
from graphfuse.kernels._triton import launch, tl, triton

BLOCK_N, BLOCK_H = 8, 1024  # tokens of a row, and features of it, that a program has at a time


@triton.jit(do_not_specialize_on_alignment=["N", "padding"])
def _sum_rows_kernel(
    grad_ptr,  # [N, H]
    order_ptr,  # [N], where each token stood
    tokens_ptr,  # [N], sorted
    table_ptr,  # [V, H], zeros unless IS_ADDED
    padding,  # a token whose row stays as it is
    N,
    H,
    IS_ADDED: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_H: tl.constexpr,
):
    first = tl.program_id(0)
    token = tl.load(tokens_ptr + first)
    before = tl.load(tokens_ptr + first - 1, mask=first > 0, other=-1)
    # A program for each token: the first of its kind does the work.
    if (token != before) & (token != padding):
        cols = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)[None, :]
        total = tl.zeros((1, BLOCK_H), tl.float32)
        at = first
        found = tl.full((), BLOCK_N, tl.int32)
        while found == BLOCK_N:
            places = at + tl.arange(0, BLOCK_N)[:, None]
            is_same = tl.load(tokens_ptr + places, mask=places < N, other=-1) == token
            rows = tl.load(order_ptr + places, mask=is_same, other=0)
            grad = tl.load(grad_ptr + rows * H + cols, mask=is_same & (cols < H), other=0.0)
            total += tl.sum(grad.to(tl.float32), axis=0)[None, :]
            found = tl.sum(is_same.to(tl.int32))
            at += BLOCK_N
        place = token.to(tl.int64) * H + cols  # can exceed 2**31
        if IS_ADDED:
            total += tl.load(table_ptr + place, mask=cols < H).to(tl.float32)
        tl.store(table_ptr + place, total.to(table_ptr.dtype.element_ty), mask=cols < H)


@triton.jit
def _put_rows_kernel(
    rows_ptr,  # [N, H]
    places_ptr,  # [N]
    out_ptr,  # [V, H]
    H,
    BLOCK_H: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    cols = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)
    values = tl.load(rows_ptr + row * H + cols, mask=cols < H)
    tl.store(out_ptr + tl.load(places_ptr + row) * H + cols, values, mask=cols < H)


def put_rows_(out: Tensor, places: Tensor, rows: Tensor) -> None:
    """Write out[places[i]] = rows[i]: (V, H), (N,) int64 without repetition, (N, H) of the dtype of `out`."""
    if not (_op.launches(out) and out.is_contiguous() and rows.is_contiguous()):
        out[places] = rows
        return
    tokens, features = rows.shape
    block = min(BLOCK_H, triton.next_power_of_2(features))
    launch(
        _put_rows_kernel,
        (tokens, triton.cdiv(features, block)),
        rows,
        places.contiguous(),
        out,
        features,
        BLOCK_H=block,
        num_warps=4,
    )


torch.library.define(
    "graphfuse::embedding_backward",
    "(Tensor grad, Tensor tokens, SymInt rows, SymInt padding, bool scale_by_frequency) -> Tensor",
    tags=_op.TAGS,
)


def _backward(
    grad: Tensor,  # (..., H)
    tokens: Tensor,  # (...), integers
    rows: int,
    padding: int,
    scale_by_frequency: bool,
) -> Tensor:  # (V, H)
    if scale_by_frequency or not _op.launches(grad):
        found: Tensor = torch.ops.aten.embedding_dense_backward(grad, tokens, rows, padding, scale_by_frequency)
        return found
    table = grad.new_zeros(rows, grad.shape[-1])
    _add_rows_(table, grad, tokens, padding, is_added=False)
    return table


def _add_rows_(table: Tensor, grad: Tensor, tokens: Tensor, padding: int, *, is_added: bool) -> None:
    """Launch the kernel."""
    rows, features = table.shape
    # Half the digits, half the passes of the sort.
    ordered, order = tokens.reshape(-1).to(torch.int32 if rows < 2**31 else torch.int64).sort(stable=True)
    block = min(BLOCK_H, triton.next_power_of_2(features))
    if grad.numel():
        launch(
            _sum_rows_kernel,
            (len(ordered), triton.cdiv(features, block)),
            grad.reshape(-1, features).contiguous(),
            order,
            ordered,
            table,
            padding,
            len(ordered),
            features,
            IS_ADDED=is_added,
            BLOCK_N=BLOCK_N,
            BLOCK_H=block,
            num_warps=4,
        )


_op.implement("embedding_backward", _backward)


@torch.library.register_fake("graphfuse::embedding_backward")
def _(grad, tokens, rows, padding, scale_by_frequency):
    return grad.new_empty(rows, grad.shape[-1])


torch.library.define(
    "graphfuse::embedding_backward_",
    "(Tensor(a!) table, Tensor grad, Tensor tokens, SymInt padding) -> ()",
    tags=_op.TAGS,
)


def _backward_(
    table: Tensor,  # (V, H), the gradient is added to it
    grad: Tensor,  # (..., H), of its dtype
    tokens: Tensor,  # (...), integers
    padding: int,
) -> None:
    if _op.launches(grad) and table.is_contiguous():
        _add_rows_(table, grad, tokens, padding, is_added=True)
    else:
        table += torch.ops.aten.embedding_dense_backward(grad, tokens, table.shape[0], padding, False)


_op.implement("embedding_backward_", _backward_)


@torch.library.register_fake("graphfuse::embedding_backward_")
def _(table, grad, tokens, padding):
    return None
