"""The chunk loop of `linear_cross_entropy`: how many tokens at a time, the three GEMMs, and the pass between them."""
# Shape letters: N = tokens, H = features of a token, V = classes (vocabulary).

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from graphfuse.kernels._softmax_grad import (
    ROW_MULTIPLE,
    LossOptions,
    softmax_grad_reference,
    softmax_grad_triton,
)

# 2048 tokens of 128256 bf16 classes: there a H200 takes 1.05 times the three GEMMs, and larger chunks gain 1 % more.
GPU_LOGITS_BYTES = 2**29
# Below 1024 rows a GEMM no longer fills the GPU, above 8192 it no longer gets faster.
GPU_CHUNK_TOKENS = (1024, 8192)
GPU_CHUNK_MULTIPLE = 128  # rows of a GEMM tile
# A weight's gradient that is summed in its own dtype is rounded once a chunk. Rather than go over these many chunks, a
# larger buffer for logits: it takes less memory than a sum in fp32.
GPU_MAX_CHUNKS = 16

CPU_LOGITS_BYTES = 2**25  # about a last-level cache
CPU_CHUNK_TOKENS = (16, 8192)
CPU_CHUNK_MULTIPLE = 16


class Needs(NamedTuple):
    """Which gradients are wanted."""

    hidden: bool = False
    weight: bool = False
    bias: bool = False


def chunk_tokens(tokens: int, vocab: int, itemsize: int, *, on_cpu: bool) -> int:
    """Choose how many tokens go through at a time: within the budget for logits, in chunks of equal size."""
    if on_cpu:
        (low, high), multiple = CPU_CHUNK_TOKENS, CPU_CHUNK_MULTIPLE
        chunk = CPU_LOGITS_BYTES // (vocab * itemsize)
    else:
        (low, high), multiple = GPU_CHUNK_TOKENS, GPU_CHUNK_MULTIPLE
        chunk = max(GPU_LOGITS_BYTES // (vocab * itemsize), -(-tokens // GPU_MAX_CHUNKS))
    chunk = min(max(chunk, low), high)
    if tokens <= chunk:
        return max(tokens, 1)
    chunks = -(-tokens // chunk)
    return -(-tokens // (chunks * multiple)) * multiple


def count_tokens(target: Tensor, class_weight: Tensor | None, ignore_index: int, dtype: torch.dtype) -> Tensor:
    """Return what a mean divides by, as a 0-d tensor: the host never learns it."""
    counted = target != ignore_index
    if class_weight is None:
        return counted.sum().to(dtype)
    index = target.clamp(0, class_weight.shape[0] - 1)
    return torch.where(counted, class_weight.to(dtype)[index], 0).sum()


def run_chunks(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    class_weight: Tensor | None,
    scale: Tensor,  # (N,) or (), upstream gradient of each token's loss
    options: LossOptions,
    compute: torch.dtype,
    grad_dtype: torch.dtype,
    chunk_size: int,
    needs: Needs,
    *,
    use_triton: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return each token's loss in `compute`, and the gradients, in `grad_dtype`, of their sum weighted by `scale`."""
    tokens, vocab = hidden.shape[0], weight.shape[0]
    on_cpu = hidden.device.type == "cpu"
    if on_cpu:
        _check_targets(target, vocab, options.ignore_index)
    itemsize = compute.itemsize if on_cpu else hidden.dtype.itemsize
    chunk = max(1, min(tokens, chunk_size or chunk_tokens(tokens, vocab, itemsize, on_cpu=on_cpu)))
    softmax_grad = softmax_grad_triton if use_triton else softmax_grad_reference
    if class_weight is not None:
        class_weight = class_weight.to(compute).contiguous()
    scales = scale.expand(tokens)

    losses = hidden.new_empty(tokens, dtype=compute)
    grad_hidden = torch.empty_like(hidden, dtype=grad_dtype) if needs.hidden else hidden.new_empty(0, dtype=grad_dtype)
    sum_dtype = compute if _sums_wide(weight, compute, -(-tokens // chunk)) else grad_dtype
    grad_weight = torch.empty_like(weight, dtype=sum_dtype) if needs.weight else hidden.new_empty(0, dtype=grad_dtype)
    grad_bias = hidden.new_empty(vocab if needs.bias else 0, dtype=compute)
    if tokens == 0:
        grad_weight.zero_()
        grad_bias.zero_()

    buffer = hidden.new_empty(chunk, -(-vocab // ROW_MULTIPLE) * ROW_MULTIPLE)
    for start in range(0, tokens, chunk):
        rows = slice(start, min(start + chunk, tokens))
        x = hidden[rows]
        logits = buffer[: x.shape[0], :vocab]
        if bias is None:
            torch.mm(x, weight.t(), out=logits)
        else:
            torch.addmm(bias, x, weight.t(), out=logits)
        softmax_grad(logits, target[rows], scales[rows] if any(needs) else None, class_weight, options, losses[rows])
        if needs.weight:
            _matmul_into(grad_weight, logits.t(), x, accumulate=start > 0)
        if needs.bias:
            column = logits.sum(0, dtype=compute)
            grad_bias = grad_bias.add_(column) if start > 0 else column
        if needs.hidden:
            _matmul_into(grad_hidden[rows], logits, weight, accumulate=False)
    return losses, grad_hidden, grad_weight.to(grad_dtype), grad_bias.to(grad_dtype)


def _sums_wide(weight: Tensor, compute: torch.dtype, chunks: int) -> bool:
    """Tell whether chunks of a weight gradient are summed in fp32: always, but where a GPU has no room for it.

    Over 2, 4, 8 and 16 chunks of random logits a sum in bf16 is 1.2, 1.5, 2 and 2.7 times as far from the truth as a
    single product; of peaked logits, whose own rounding weighs more, 1.0, 1.1, 1.2 and 1.4 times.
    """
    fits = weight.device.type == "cpu" or weight.numel() * compute.itemsize <= GPU_LOGITS_BYTES
    return chunks > 1 and (fits or chunks > GPU_MAX_CHUNKS)


def _matmul_into(out: Tensor, a: Tensor, b: Tensor, *, accumulate: bool) -> None:
    """Write a @ b to `out`, or add it; `out` may be wider than the factors."""
    if out.dtype != a.dtype and (not out.is_cuda or torch.version.hip):  # only CUDA multiplies into a wider dtype
        a, b = a.to(out.dtype), b.to(out.dtype)
    wider: dict[str, Any] = {} if out.dtype == a.dtype else {"out_dtype": out.dtype}
    if accumulate:
        torch.addmm(out, a, b, out=out, **wider)
    else:
        torch.mm(a, b, out=out, **wider)


def _check_targets(target: Tensor, vocab: int, ignore_index: int) -> None:
    wrong = target[((target < 0) | (target >= vocab)) & (target != ignore_index)]
    if wrong.numel():
        raise IndexError(f"target: expected classes in [0, {vocab}) or {ignore_index}, got {int(wrong[0])}")
