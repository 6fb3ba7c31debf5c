"""What the host takes for a call of an op in code that Inductor generated, by how the op is made.

    python -m tests.kernels.calls        needs a CUDA GPU

As a `custom_op`, through the dispatcher; as graphfuse's ops, whose functions generated code calls by themselves; and as
a `triton_op`, whose kernel Inductor puts into the code.
"""

import statistics
import time

import torch
import triton
import triton.language as tl
from torch.library import custom_op, triton_op, wrap_triton

from graphfuse import inner
from graphfuse.kernels import _op
from graphfuse.kernels._triton import launch

CALLS, REPEATS = 64, 200
ROWS, FEATURES = 64, 1024
CONSTANTS = {"eps": 1e-6, "block": FEATURES, "num_warps": 4}


@triton.jit
def norm_kernel(x_ptr, weight_ptr, y_ptr, x_stride, y_stride, features, eps: tl.constexpr, block: tl.constexpr):
    row, offs = tl.program_id(0).to(tl.int64), tl.arange(0, block)
    mask = offs < features
    x = tl.load(x_ptr + row * x_stride + offs, mask=mask, other=0.0).to(tl.float32)
    weight = tl.load(weight_ptr + offs, mask=mask, other=0.0).to(tl.float32)
    y = x * tl.rsqrt(tl.sum(x * x) / features + eps) * weight
    tl.store(y_ptr + row * y_stride + offs, y.to(y_ptr.dtype.element_ty), mask=mask)


def arguments(x, weight, y):
    return x, weight, y, x.stride(0), y.stride(0), x.shape[1]


@custom_op("graphfuse_calls::dispatched", mutates_args=(), tags=_op.TAGS)
def dispatched(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    y = torch.empty_like(x)
    norm_kernel[(x.shape[0],)](*arguments(x, weight, y), **CONSTANTS)
    return y


@dispatched.register_fake
def _(x, weight):
    return torch.empty_like(x)


@triton_op("graphfuse_calls::inlined", mutates_args={})
def inlined(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    y = torch.empty_like(x)
    wrap_triton(norm_kernel)[(x.shape[0],)](*arguments(x, weight, y), **CONSTANTS)
    return y


def direct(x, weight):
    y = torch.empty_like(x)
    launch(norm_kernel, (x.shape[0],), *arguments(x, weight, y), **CONSTANTS)
    return y


torch.library.define("graphfuse::calls_direct", "(Tensor x, Tensor weight) -> Tensor", tags=_op.TAGS)
_op.implement("calls_direct", direct, repeats=True)
torch.library.register_fake("graphfuse::calls_direct", lambda x, weight: torch.empty_like(x))


def chain(op):
    def calls(x, weights):
        for weight in weights:
            x = op(x, weight)
        return x

    return calls


def main():
    inner._call_directly()
    x = torch.randn(ROWS, FEATURES, device="cuda", dtype=torch.bfloat16)
    weights = [torch.rand(FEATURES, device="cuda", dtype=torch.bfloat16) for _ in range(CALLS)]
    ways = {
        "custom_op": torch.ops.graphfuse_calls.dispatched,
        "graphfuse, called directly": torch.ops.graphfuse.calls_direct.default,
        "triton_op, inlined": torch.ops.graphfuse_calls.inlined,
    }
    compiled = {name: torch.compile(chain(op), fullgraph=True) for name, op in ways.items()}
    took = {name: [] for name in ways}
    with torch.no_grad():
        expected = compiled["custom_op"](x, weights)
        for function in compiled.values():
            torch.testing.assert_close(function(x, weights), expected)
        for _ in range(REPEATS):
            for name, function in compiled.items():
                torch.cuda.synchronize()
                start = time.perf_counter()
                function(x, weights)
                took[name].append((time.perf_counter() - start) / CALLS * 1e6)
    for name, times in took.items():
        print(f"{name:28s} {statistics.median(times):6.2f} us a call (fastest {min(times):.2f})")


if __name__ == "__main__":
    main()
