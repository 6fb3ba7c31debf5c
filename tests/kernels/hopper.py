"""Compile kernels for an H100 or H200 on a machine that has none.

    python tests/kernels/hopper.py            a line of JSON for each kernel of each case of `graphfuse bench kernels`

Triton is given a driver that names the GPU, takes what is compiled and launches nothing. So what runs is the launch
code of every op, Triton's own compiler and NVIDIA's assembler; only numbers do not come out. Needs an environment
without TRITON_INTERPRET.
"""

from __future__ import annotations

import json
import math
import re
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.backends.driver import DriverBase
from triton.runtime.driver import driver

# Features, heads of queries, dtype and mask of attention of one query over 8 heads of keys.
SPLIT = [
    (64, 32, torch.bfloat16, "keys"),
    (128, 32, torch.bfloat16, "keys"),
    (128, 8, torch.bfloat16, "none"),
    (256, 32, torch.bfloat16, "keys"),
    (128, 512, torch.bfloat16, "heads"),
    (128, 32, torch.float32, "keys"),
]
SHARED_MEMORY = 232448  # bytes that a block of an H200 may have
MULTIPROCESSORS = 132


def _resources(binary: bytes) -> dict[str, int]:
    """Registers of a thread, and bytes that they spill."""
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(binary)
        file.flush()
        dump = subprocess.run([tool, "--dump-resource-usage", file.name], check=True, capture_output=True, text=True)
    text = dump.stdout
    found = re.search(r"REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", text)
    assert found is not None, text
    return {"registers": int(found[1]), "spilled": int(found[2]) + int(found[3])}


class Hopper(DriverBase):
    """A driver of a GPU that is not there."""

    def __init__(self) -> None:
        self.utils = self
        self.compiled: list[dict[str, Any]] = []
        self.binaries: set[bytes] = set()
        self.launched: list[tuple[str, int]] = []  # each kernel, and the bytes of the tensors that it was given

    @classmethod
    def is_active(cls) -> bool:
        return True

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")

    def get_benchmarker(self) -> None:
        return None

    def map_python_to_cpp_type(self, name: str) -> str:
        return name

    def get_device_properties(self, device: int) -> dict[str, int]:
        return {"max_shared_mem": SHARED_MEMORY}

    def load_binary(self, name: str, binary: bytes, shared: int, device: int) -> tuple[Any, ...]:
        self.binaries.add(binary)
        resources = _resources(binary)
        self.compiled.append({"kernel": name, "shared": shared, **resources})
        return None, None, resources["registers"], resources["spilled"], 1024

    def launcher_cls(self, source: Any, metadata: Any) -> Any:
        """What Triton calls in the place of a launch."""

        def launch(*args: Any) -> None:
            sizes = {t.data_ptr(): t.numel() * t.element_size() for t in args if isinstance(t, torch.Tensor)}
            self.launched.append((metadata.name, sum(sizes.values())))

        return launch


def pretend() -> Hopper:
    """Have kernels compiled and launched for a GPU that is not there, of tensors on the CPU."""
    from graphfuse.kernels import (
        _half_product,
        _norm_rope_launch,
        _op,
        _parts,
        _scale,
        _softmax_grad_parts,
        _split_attention_kernel,
        layer_norm,
        rms_norm,
    )

    hopper = Hopper()
    driver.set_active(hopper)
    _op.launches = lambda *operands: _op.compute_dtype(*operands) == torch.float32
    counting = [_half_product, _norm_rope_launch, _scale, _softmax_grad_parts, _split_attention_kernel]
    for module in (*counting, layer_norm, rms_norm):
        module.num_sms = lambda _: MULTIPROCESSORS
    _parts.can_overlap = lambda _: True
    return hopper


def _rotate_pairs() -> None:
    """Queries and keys, forward and backward: what a compiled graph makes of them."""
    from graphfuse.kernels import _pairs

    def heads(count: int) -> torch.Tensor:
        return torch.empty(4, 4096, count * 128, dtype=torch.bfloat16).unflatten(-1, (count, 128)).transpose(1, 2)

    q, k = heads(32), heads(8)
    weight, table = torch.empty(128, dtype=torch.bfloat16), torch.empty(4, 1, 4096, 128, dtype=torch.bfloat16)
    shared = (table, table, 1e-6, 1.0, 0.0, "inside")
    rotation = ("half", "half", "half", False, 0)
    _pairs._rope(q, k, table, table, *rotation, torch.bfloat16)
    _pairs._rope_backward(q, q.stride(), k, k.stride(), table, table, *rotation, torch.bfloat16)
    dtypes = (torch.bfloat16, torch.bfloat16)
    _pairs._norm_rope(q, weight, k, weight, *shared, *dtypes, *rotation, -1, torch.bfloat16)
    _pairs._norm_rope_backward(q, q, weight, k, k, weight, *shared, *rotation, -1, True)


def _read_once() -> None:
    """The pass over logits whose rows are held in registers."""
    from graphfuse.kernels._softmax_grad import Factors, Logits, TokenLosses, softmax_grad_triton

    target, ones = torch.empty(16, dtype=torch.int64), torch.empty(16)
    for vocab in (128256, 49155):
        rows = torch.empty(16, -(-vocab // 64) * 64, dtype=torch.bfloat16)[:, :vocab]
        softmax_grad_triton(rows, rows, target, None, Logits(), TokenLosses(ones), Factors(ones))


def _add_product() -> None:
    """The product added to a sum of half precision, for Hopper alone."""
    from graphfuse.kernels._half_product_hopper import add_product

    grad, x = torch.empty(192, 1000, dtype=torch.bfloat16), torch.empty(192, 320, dtype=torch.bfloat16)
    total, scale = torch.empty(1000, 320, dtype=torch.float16), torch.empty(320)
    for is_last in (False, True):
        add_product(total, grad, x, scale, MULTIPROCESSORS, is_first=not is_last, is_last=is_last)


def _split_keys(features: int, heads: int, dtype: torch.dtype, kind: str) -> None:
    """One query over a cache."""
    from graphfuse.kernels.grouped_attention import grouped_attention

    sizes = (1, heads, 1, features), (1, 8, 4112, features), (1, 8, 4112, features)
    masks = {"none": None, "keys": (1, 1, 1, 4112), "heads": (1, heads, 1, 4112)}
    mask = None if masks[kind] is None else torch.empty(masks[kind], dtype=torch.bool)
    grouped_attention(*(torch.empty(size, dtype=dtype) for size in sizes), mask, scale=0.1, kernel="split")


def main() -> None:
    """Run every case of the benchmark, forward and backward, and print what was compiled for it."""
    from graphfuse import ops
    from graphfuse.bench import cases

    hopper = pretend()
    cases.DEVICE = "cpu"
    # Memory that nobody writes to is never there.
    cases._random = lambda *shape, grad=True: torch.empty(shape, dtype=torch.bfloat16).requires_grad_(grad)
    for case in cases.CASES:
        hopper.compiled.clear()
        hopper.launched.clear()
        problem = case.build()
        results = problem.functions["graphfuse"](*problem.inputs)
        results = results if isinstance(results, tuple) else (results,)
        inputs = [tensor for tensor in problem.inputs if tensor.requires_grad]
        torch.autograd.grad(results, inputs, [torch.empty_like(result) for result in results])
        if case.op == "glu silu":
            options = ("silu", 1.0, math.inf, math.inf, 0.0)
            torch.ops.graphfuse.glu_backward_(results[0].detach(), None, *(t.detach() for t in inputs), *options, True)
        row = {"case": f"{case.op} {case.size}", "launched": hopper.launched, "compiled": hopper.compiled}
        print(json.dumps(row), flush=True)
    hopper.compiled.clear()
    hopper.launched.clear()
    _rotate_pairs()
    print(json.dumps({"case": "pairs 4x4096x(32+8)x128", "launched": hopper.launched, "compiled": hopper.compiled}))
    hopper.compiled.clear()
    hopper.launched.clear()
    _read_once()
    print(
        json.dumps({"case": "logits, one read", "launched": hopper.launched, "compiled": hopper.compiled}), flush=True
    )
    hopper.compiled.clear()
    hopper.launched.clear()
    _add_product()
    print(json.dumps({"case": "product added", "launched": hopper.launched, "compiled": hopper.compiled}))
    for features, heads, dtype, kind in SPLIT:
        hopper.compiled.clear()
        hopper.launched.clear()
        _split_keys(features, heads, dtype, kind)
        case = f"split keys {features} features, {heads} heads, {dtype}, mask of {kind}"
        print(json.dumps({"case": case, "launched": hopper.launched, "compiled": hopper.compiled}), flush=True)
    binaries: set[bytes] = set()
    new = []
    for tokens in (6, 64, 4096):  # a proof's, and two lengths
        hopper.binaries.clear()
        x, weight, table = (torch.empty(n, dtype=torch.bfloat16) for n in ((2, tokens, 8, 128), 1024, (1, tokens, 128)))
        ops.rms_norm(x.flatten(2), weight)
        ops.rope(x, table[:, :, None], table[:, :, None])
        ops.glu(x, x)
        new.append(len(hopper.binaries - binaries))
        binaries |= hopper.binaries
    print(json.dumps({"new for each number of tokens": new}))


if __name__ == "__main__":
    main()
