"""The chunk loop of the head: which tokens, how many at a time, the three GEMMs, and the pass between them.

Tokens whose loss has no weight cost nothing: the others are gathered, chunk by chunk, and their gradients scattered
back. That takes one number on the host, how many there are. It travels by an asynchronous copy. In a compiled graph
that is made as soon as the labels are there (`graphfuse.early`), long before the host asks for it. Elsewhere the GPU
makes it when it reaches the op; everything that does not depend on it is launched behind that copy, and only then does
the host wait: the GPU idles for a few launches at most, and the host loses its lead, which it wins back during the
GEMMs. Where these are small, and while a CUDA graph is captured, all tokens go through and the pass skips the rows
without weight.
"""
# Shape letters: N = tokens, H = features of a token, V = classes (vocabulary).

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from graphfuse.kernels._early import UNKNOWN, received, send
from graphfuse.kernels._low_rank import LowRank
from graphfuse.kernels._op import VECTOR_BYTES, compute_dtype
from graphfuse.kernels._rows import put_rows_
from graphfuse.kernels._softmax_grad import (
    NO_TARGET,
    ROW_MULTIPLE,
    Factors,
    Logits,
    TokenLosses,
    softmax_grad_reference,
    softmax_grad_triton,
)
from graphfuse.kernels._weight_grad import HalfSum, WideSum, matmul_into, power_of_two, weight_grad, whole_loads

# 2048 tokens of 128256 bf16 classes: there an H200 takes 1.09 times the three GEMMs, and larger chunks gain nothing.
GPU_LOGITS_BYTES = 2**29
# The weight's gradient is read and written once a chunk, which takes too long beside the multiplications of few rows: a
# step of Gemma 2 on an H200, 8192 x 2304 x 256000, 84.1 ms and 5.51 GiB with 1024 rows, 81.7 and 5.82 with 1664, 80.4
# and 6.01 with 2048. Above 8192 nothing gets faster.
GPU_CHUNK_TOKENS = (1664, 8192)
GPU_CHUNK_MULTIPLE = 128  # rows of a GEMM tile
# The sum of the weight's gradient is rounded once a chunk. Rather than go over so many, a larger buffer for logits.
GPU_MAX_CHUNKS = 16
GPU_WORTH_A_WAIT = 2**40  # multiplications and additions, of 1 to 2 ms, that make 30 us of waiting a detail

CPU_LOGITS_BYTES = 2**25  # about a last-level cache
CPU_CHUNK_TOKENS = (16, 8192)
CPU_CHUNK_MULTIPLE = 16


class Head(NamedTuple):
    """The tensors of a head."""

    hidden: Tensor  # (N, H)
    weight: Tensor  # (V, H)
    bias: Tensor | None  # (V,)
    low_hidden: Tensor | None  # (N, R), with the next the factors of a product that is added
    low_weight: Tensor | None  # (V, R)
    target: Tensor  # (N,), or NO_TARGET
    class_weight: Tensor | None  # (V,)


class Needs(NamedTuple):
    """Which gradients are wanted, in the order in which they are returned."""

    hidden: bool = False
    weight: bool = False
    bias: bool = False
    low_hidden: bool = False
    low_weight: bool = False


class Chunks(NamedTuple):
    """How the tokens go through: how many at a time, 0 to choose; and whether those without weight are left out."""

    size: int = 0
    compact: bool | None = None  # None: if it pays


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


class Kept:
    """The tokens with a factor that is not 0.

    Attributes:
        order: (N,), the numbers of all tokens, those first, otherwise in order.
    """

    def __init__(self, factors: Factors, count: Tensor | None = None) -> None:
        self._is_kept = _is_kept(factors)
        self._count = send(self._is_kept.sum()) if count is None else count
        self.order = self._is_kept.to(torch.uint8).argsort(descending=True, stable=True)

    def count(self) -> int:
        """Return how many they are: here the host waits."""
        count = received(self._count)
        return int(self._is_kept.sum()) if count is None else count


def _is_kept(factors: Factors) -> Tensor:
    first, *others = (factor != 0 for factor in factors.given())
    for other in others:
        first = first | other
    return first


def count_kept(factors: Factors, work: int | None) -> Tensor:
    """Return how many tokens have a factor that is not 0, on its way to the host, or nothing if it will not be asked.

    `work` is as in `keeps`; `None` if it is not known.
    """
    is_asked = keeps(factors, GPU_WORTH_A_WAIT if work is None else work, None)
    return send(_is_kept(factors).sum()) if is_asked else torch.tensor(UNKNOWN)


def keeps(factors: Factors, work: int, compact: bool | None) -> bool:
    """Whether to look for tokens to leave out; `work` counts multiplications and additions."""
    if not factors.given() or compact is False:
        return False
    if compact or not factors.given()[0].is_cuda:
        return True
    return work >= GPU_WORTH_A_WAIT and not torch.cuda.is_current_stream_capturing()


def run_chunks(
    head: Head,
    factors: Factors | None,  # (N,) each, of the tokens' losses in the loss whose gradients are wanted
    options: Logits,
    wanted: tuple[bool, bool, bool],  # of the fields of TokenLosses
    needs: Needs,
    chunks: Chunks,
    grad_dtype: torch.dtype,
    *,
    use_triton: bool,
    count: Tensor | None = None,  # what `count_kept` has found
) -> tuple[TokenLosses, tuple[Tensor, ...]]:
    """Return the tokens' losses, and the gradients, in `grad_dtype`, of their sum times `factors`.

    Without factors all tokens count, and nothing has a gradient. Gradients of an fp32 product that is added are fp32.
    """
    hidden, weight, bias, low_hidden, low_weight, target, class_weight = head
    (all_tokens, features), vocab = hidden.shape, weight.shape[0]
    compute = compute_dtype(hidden.dtype)
    factors = Factors() if factors is None else factors.map(lambda f: f.to(compute).contiguous())
    class_weight = None if class_weight is None else class_weight.to(compute).contiguous()
    work = 2 * (1 + needs.hidden + needs.weight) * all_tokens * features * vocab
    kept = Kept(factors, count) if keeps(factors, work, chunks.compact) else None
    target = target.contiguous() if kept is None else target[kept.order]
    factors = factors if kept is None else factors.map(lambda f: f[kept.order])

    # fp16 has no room for the 1/count of a mean: its chunks hold gradients of everyday size, by a power of two.
    late = None
    if any(needs) and hidden.dtype == torch.float16 and all_tokens:
        late = power_of_two(torch.stack([factor.abs().amax() for factor in factors.given()]).amax())
        factors = factors.map(lambda f: f / late)
    on_cpu = hidden.device.type == "cpu"
    itemsize = compute.itemsize if on_cpu else hidden.dtype.itemsize
    # Every output is a tensor of its own, empty ones too: an op must not return the same one twice.
    grad_hidden = torch.empty_like(hidden, dtype=grad_dtype) if needs.hidden else hidden.new_empty(0, dtype=grad_dtype)
    grad_bias = hidden.new_zeros(vocab if needs.bias else 0, dtype=compute)
    grad_weight: WideSum | HalfSum | None = None
    if needs.weight:
        is_one = all_tokens <= (chunks.size or chunk_tokens(all_tokens, vocab, itemsize, on_cpu=on_cpu))
        sum_dtype = grad_dtype if is_one else compute
        grad_weight = weight_grad(weight, hidden, factors, class_weight, options.scale, sum_dtype, grad_dtype)

    low_rank = LowRank(low_hidden, low_weight, hidden.dtype, compute, (needs.low_hidden, needs.low_weight))

    tokens = all_tokens if kept is None else kept.count()
    chosen = None if kept is None or tokens == all_tokens else kept.order[:tokens]
    if on_cpu:
        check_targets(target[:tokens], vocab, factors.map(lambda f: f[:tokens]))
    size = max(1, min(tokens, chunks.size or chunk_tokens(tokens, vocab, itemsize, on_cpu=on_cpu)))
    losses = TokenLosses(*(hidden.new_empty(tokens, dtype=compute) if want else None for want in wanted))
    softmax_grad = softmax_grad_triton if use_triton else softmax_grad_reference
    buffer = hidden.new_empty(size, _row(weight, bias))
    for start in range(0, tokens, size):
        rows = slice(start, min(start + size, tokens))
        places = rows if chosen is None else chosen[rows]
        x = hidden[places]
        chunk = buffer[: x.shape[0]]
        grad = chunk[:, :vocab] if any(needs) else None
        logits = _linear_into(chunk[:, :vocab], x, weight, bias)
        low_rank.add_to(logits, places)
        at_rows = (losses.map(lambda found: found[rows]), factors.map(lambda f: f[rows]))  # noqa: B023 - called now
        softmax_grad(logits, grad, target[rows], class_weight, options, *at_rows)
        if grad is None:
            continue
        if grad_weight is not None:
            grad_weight.add(grad, x, is_last=rows.stop == tokens)
        if needs.bias:
            grad_bias += grad.sum(0, dtype=compute)
        low_rank.add_grads(grad, places)
        if needs.hidden and chosen is None:
            _hidden_grad_into(grad_hidden[rows], grad, weight)
        elif needs.hidden and chosen is not None:  # what was gathered for this chunk is room for its gradient
            own = x if x.dtype == grad_dtype else x.new_empty(x.shape, dtype=grad_dtype)
            _hidden_grad_into(own, grad, weight)
            put_rows_(grad_hidden, chosen[rows], own)

    if kept is not None and chosen is not None:
        losses = losses.map(lambda found: found.new_zeros(all_tokens).index_copy_(0, chosen, found))
        if needs.hidden:
            grad_hidden.index_fill_(0, kept.order[tokens:], 0)
    total = hidden.new_empty(0, dtype=grad_dtype) if grad_weight is None else grad_weight.total()
    low_grads = [hidden.new_empty(0, dtype=compute) if grad is None else grad for grad in low_rank.grads()]
    grads = [grad_hidden, total, grad_bias, *low_grads]
    if late is not None:
        grads = [grad.mul_(late) for grad in grads]
    low_dtype = grad_dtype if low_hidden is None else torch.promote_types(grad_dtype, low_hidden.dtype)
    dtypes = [grad_dtype] * 3 + [low_dtype] * 2
    return losses, tuple(grad.to(dtype) for grad, dtype in zip(grads, dtypes, strict=True))


def _row(weight: Tensor, bias: Tensor | None) -> int:
    """How many logits a row has room for: with a bias no more than there are, see `_linear_into`."""
    vocab = weight.shape[0]
    is_dense = bias is not None and weight.is_cuda and vocab * weight.element_size() % VECTOR_BYTES == 0
    return vocab if is_dense else -(-vocab // ROW_MULTIPLE) * ROW_MULTIPLE


def _linear_into(logits: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Write the logits, rounded once.

    With a bias cuBLAS's fast kernels do so only where rows follow each other without gaps; elsewhere they round the
    product before they add the bias to it. So there the product is not cut, and taken as slow as it is.
    """
    if bias is not None:
        return torch.addmm(bias, x, weight.t(), out=logits)
    for classes in whole_loads(weight.shape[0], weight):
        torch.mm(x, weight[classes].t(), out=logits[:, classes])
    return logits


def _hidden_grad_into(out: Tensor, grad: Tensor, weight: Tensor) -> None:
    """Write the gradient of the hidden states, rounded once: cuBLAS rounds what it adds to a sum in half precision."""
    first, *others = whole_loads(weight.shape[0], weight)
    total = torch.empty_like(out, dtype=compute_dtype(out)) if others else out
    matmul_into(total, grad[:, first], weight[first])
    for classes in others:
        matmul_into(total, grad[:, classes], weight[classes], accumulate=True)
    if total is not out:
        out.copy_(total)


def check_targets(target: Tensor, vocab: int, factors: Factors) -> None:
    """Raise IndexError for a class that there is not, in a row whose nll has a factor."""
    wrong = ((target < 0) | (target >= vocab)) & (target != NO_TARGET)
    if factors.given():
        wrong &= False if factors.nll is None else factors.nll != 0
    if wrong.any():
        raise IndexError(f"target: expected classes in [0, {vocab}), got {int(target[wrong][0])}")
