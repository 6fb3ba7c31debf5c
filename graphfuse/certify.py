"""The proof that comes before every rewrite: region and replacement on the same random numbers.

Two questions are asked, of outputs and of gradients:

- in float64, on the CPU: are they the same function?
- in the graph's own dtypes, on its own device, and so with the kernel that will run: is the replacement at least as
  close to the float64 result as the region itself is?

Random numbers settle the first for the analytic functions that regions are made of. Rows of the input have different
scales, so that an eps in the wrong place shows. Equal regions share one proof: 32 equal layers cost as much as one.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.backends import cuda
from torch.utils._python_dispatch import _disable_current_modes
from torch.utils._pytree import tree_map_only

from graphfuse.evaluate import CannotEvaluate, cuts, evaluate, exact_dtype, fingerprint, roots, small_sizes
from graphfuse.match import Match
from graphfuse.shadow import Shadow, Value

EXACT = 1e-9  # relative difference in float64 that still counts as the same function
LARGEST = 1 << 24  # elements of a proof's inputs, where it cannot shrink the batch
NO_WORSE = 1.5  # error of the replacement over that of the region; a proof draws few numbers, so 1.1 would be luck
ARITHMETIC = 2.0 * torch.finfo(torch.float32).eps  # another order of the same float32 operations
FEW = 64  # elements, below which an error is compared with the rounding of the dtype instead
ROWS = (1.0, 1e-3, 30.0)  # scales of successive rows of an input
NOTHING = 1e-12  # size of a row beside that of the largest, below which float64 rounding is all there is


@dataclass(frozen=True)
class Proof:
    """What came out: why the match must not be rewritten, if it must not, and the largest errors seen."""

    reason: str | None = None
    exact: float | None = None
    """Difference between region and replacement in float64, relative to the largest number."""
    region_error: float | None = None
    """Relative error of the region in its own dtypes against float64; `None` if everything is float64."""
    replacement_error: float | None = None
    """The same of the replacement."""


Run = Callable[..., Sequence[Tensor]]  # of a region or a replacement, given what is known of its inputs

_proved: dict[Any, Proof] = {}
_rehearsed: set[Any] = set()


def certify(match: Match, shadow: Shadow) -> str | None:
    """Why `match` must not be rewritten, or `None` if its replacement is proved."""
    return prove(match, shadow).reason


def prove(match: Match, shadow: Shadow) -> Proof:
    """Run region and replacement side by side.

    Proofs are kept for the life of the process, under everything that they depend on.
    """
    if nothing := next((value for value in match.outputs if 0 in value.shape), None):
        return Proof(f"certify: expected numbers to compare, got none in {nothing.node.name}")
    key, trial = _trial(match, shadow)
    if key not in _proved:
        with _by_itself(match.anchor.tensor.device):
            _proved[key] = trial.run()
    return _proved[key]


def rehearse(match: Match, shadow: Shadow, ahead: Callable[[], contextlib.AbstractContextManager[None]]) -> None:
    """Run what a proof will, unless that was done, `ahead` of it: on fake tensors, to have its kernels compiled."""
    key, trial = _trial(match, shadow)
    if key not in _proved and key not in _rehearsed:
        _rehearsed.add(key)
        with _by_itself(match.anchor.tensor.device), ahead():
            trial.rehearse()


def _trial(match: Match, shadow: Shadow) -> tuple[Any, _Trial]:
    """The proof that a match needs, and what it depends on."""
    region = shadow.cone(match.outputs, match.inputs)
    prefix, leaves = _lead_in(match, shadow)
    ends = [*leaves, *prefix, *region]
    key = (
        match.replacement,
        str(sorted(match.params.items())),
        fingerprint([*prefix, *region], leaves),
        tuple(ends.index(value) for value in (*match.inputs, *match.outputs)),
        str(match.anchor.tensor.device),
    )
    return key, _Trial(match, region, prefix, leaves)


@contextlib.contextmanager
def _by_itself(device: torch.device) -> Iterator[None]:
    """Outside all modes of the code that is compiled; beside a GPU, on one processor.

    There the processes that compile kernels keep all processors busy: threads that wait for each other would wait for
    these, and the numbers are few.
    """
    with contextlib.ExitStack() as stack:
        if device.type == "cuda":
            stack.callback(torch.set_num_threads, torch.get_num_threads())
            torch.set_num_threads(1)
        stack.enter_context(_disable_current_modes())
        stack.enter_context(torch.random.fork_rng(devices=[]))
        for device_type in ("cpu", "cuda"):
            stack.enter_context(torch.autocast(device_type, enabled=False))
        stack.enter_context(torch.inference_mode(False))
        yield


@contextlib.contextmanager
def _without_cudnn(region: Sequence[Value]) -> Iterator[None]:
    """Where attention in the region takes another of PyTorch's kernels: cuDNN makes code for every kind of call.

    That takes seconds. The setting is one of all threads, so it is changed for regions alone that attend.
    """
    was_enabled = cuda.cudnn_sdp_enabled()
    attends = any(value.op is torch.ops.aten.scaled_dot_product_attention.default for value in region)
    if attends and cuda.math_sdp_enabled():  # that one takes any call
        cuda.enable_cudnn_sdp(False)
    try:
        yield
    finally:
        cuda.enable_cudnn_sdp(was_enabled)


def proofs() -> int:
    """How many distinct regions were put to the proof."""
    return len(_proved)


def forget() -> None:
    """Drop all proofs (after a kernel was changed in place, as tests do)."""
    _proved.clear()
    _rehearsed.clear()


def _lead_in(match: Match, shadow: Shadow) -> tuple[list[Value], list[Value]]:
    """What rearranges the leaves into the inputs, and those leaves.

    Starting above the views makes the inputs of the proof as strided as those of the graph, and keeps sizes that
    belong together (a flattened batch and its labels) together.
    """
    leaves: list[Value] = []
    for value in match.inputs:
        root = roots(value)[-1] if match.above_views else value
        if root not in leaves:
            leaves.append(root)
    prefix = shadow.cone(match.inputs, leaves)
    return prefix, leaves


class _Trial:
    """One region and one replacement, run side by side."""

    def __init__(self, match: Match, region: list[Value], prefix: list[Value], leaves: list[Value]) -> None:
        self.match, self.region, self.prefix, self.leaves = match, region, prefix, leaves
        self.cuts = cuts([*prefix, *region])
        self.sizes = self._sizes()
        self.exact: float | None = None  # the largest so far, as the next two
        self.region_error: float | None = None
        self.replacement_error: float | None = None

    def _sizes(self) -> dict[int, int]:
        free: set[int] = set(self.match.scalable)
        for leaf in self.leaves:
            free.update(leaf.shape if _counts(leaf) else leaf.shape[:-1])
        values = self.prefix if self.match.above_views else self.region
        later = {size for value in values for size in value.shape[:-1]}
        for size in list(free):  # a flattened batch: its factors appear further on
            free.update(s for s in later if s and size % s == 0 and size // s in later)
        free.update(longer for size, longer in self.cuts.items() if size in free)
        return small_sizes(free, {size: longer for size, longer in self.cuts.items() if size in free})

    def _batch(self) -> set[int]:
        """The sizes of labels and positions, of what is cut from them, and of batches flattened from them."""
        sizes = {size for leaf in self.leaves if _counts(leaf) for size in leaf.shape}
        sizes |= {size for size, longer in self.cuts.items() if longer in sizes}
        return sizes | {a * b for a in sizes for b in sizes}

    def _small(self, leaf: Value) -> tuple[int, ...]:
        shape = leaf.shape
        whole = _counts(leaf) or (shape and shape[-1] in self.match.scalable)
        last = len(shape) if whole else len(shape) - 1
        return tuple(self.sizes.get(s, s) if k < last else s for k, s in enumerate(shape))

    def run(self) -> Proof:
        return Proof(self._reason(), self.exact, self.region_error, self.replacement_error)

    def _reason(self) -> str | None:
        try:
            return self._run()
        except CannotEvaluate as error:
            reason = f"certify: {error}"
        # Rows chosen by number may not exist in a small batch. Try the whole one, if that is not much.
        self.sizes = small_sizes(self.match.scalable - self._batch())
        if sum(math.prod(self._small(leaf)) for leaf in self.leaves) > LARGEST:
            return reason
        try:
            return self._run()
        except CannotEvaluate:
            return reason

    def _run(self) -> str | None:
        device = self.match.anchor.tensor.device
        if device.type not in ("cpu", "cuda"):
            device = torch.device("cpu")
        for case in range(max([1, *(len(s) for s in self.match.samplers.values() if isinstance(s, tuple))])):
            drawn = self._draw(case)
            cpu = torch.device("cpu")
            truth = self._one(self._region, drawn, exact=True, device=cpu)
            ours = self._one(self._replacement, drawn, exact=True, device=cpu)
            reason = self._compare_exact(truth, ours)
            if reason is None and not all(_counts(leaf) or leaf.dtype == torch.float64 for leaf in self.leaves):
                reason = self._compare_real(truth, drawn, device)
            if reason is not None:
                return reason
        return None

    def rehearse(self) -> None:
        """Run the replacement as the proof will on the device, where tensors are fake."""
        self._one(self._replacement, self._draw(0), exact=False, device=self.match.anchor.tensor.device)

    def _draw(self, case: int) -> list[Tensor]:
        """One tensor for each leaf, in its own dtype, on the CPU."""
        generator = torch.Generator().manual_seed(0)
        cpu = torch.device("cpu")
        drawn = []
        above = self.match.above_views
        inputs = [roots(value)[-1] if above else value for value in self.match.inputs]
        samplers = {inputs[i]: sampler for i, sampler in self.match.samplers.items()}
        for leaf in self.leaves:
            shape = self._small(leaf)
            if leaf in samplers:
                sampler = samplers[leaf]
                sampler = sampler[case % len(sampler)] if isinstance(sampler, tuple) else sampler
                small = sampler(shape, leaf.dtype, cpu, generator)
            elif leaf.dtype.is_complex or leaf.dtype.is_floating_point:
                small = torch.randn(shape, generator=generator, dtype=exact_dtype(leaf.dtype)).to(leaf.dtype)
                if small.dim() > 1:  # successive rows at different scales
                    rows = torch.tensor(ROWS, dtype=small.dtype)
                    count = small[..., 0].numel()
                    scale = rows.repeat(-(-count // len(ROWS)))[:count].view(*small.shape[:-1], 1)
                    small = small * scale
            else:
                raise CannotEvaluate(f"{leaf.node.name}: expected a floating dtype, got {leaf.dtype}")
            drawn.append(small)
        return drawn

    def _one(self, run: Run, drawn: Sequence[Tensor], *, exact: bool, device: torch.device) -> list[Tensor]:
        """Outputs and gradients of either."""
        starts = []
        for leaf, tensor in zip(self.leaves, drawn, strict=True):
            dtype = exact_dtype(tensor.dtype) if exact else tensor.dtype
            start = tensor.to(device=device, dtype=dtype, copy=True)
            starts.append(start.requires_grad_(leaf.tensor.requires_grad))
        with torch.set_grad_enabled(all(v.grad_mode for v in self.match.outputs)):
            known = dict(zip(self.leaves, starts, strict=True))
            known = evaluate(self.prefix, known, exact=exact, device=device, sizes=self.sizes)
            outputs = list(run(known, exact=exact, device=device))
            wanted = [start for start in starts if start.requires_grad]
            ends = [(o, v) for o, v in zip(outputs, self.match.outputs, strict=True) if o.requires_grad]
            results = [o.detach() for o in outputs]
            if not wanted or not ends:
                return results
            generator = torch.Generator().manual_seed(1)
            upstream = [torch.randn(o.shape, generator=generator).to(v.dtype).to(o) for o, v in ends]
            grads = torch.autograd.grad([o for o, _ in ends], wanted, upstream, allow_unused=True)
            return results + [torch.zeros_like(s) if g is None else g for g, s in zip(grads, wanted, strict=True)]

    def _region(self, known: dict[Value, Tensor], *, exact: bool, device: torch.device) -> Sequence[Tensor]:
        results = evaluate(self.region, known, exact=exact, device=device, sizes=self.sizes)
        return [results[v] for v in self.match.outputs]

    def _replacement(self, known: dict[Value, Tensor], *, exact: bool, device: torch.device) -> Sequence[Tensor]:
        params = dict(self.match.params)
        if exact:
            params = tree_map_only(torch.dtype, exact_dtype, params)
        try:
            result = self.match.replacement(*(known[v] for v in self.match.inputs), **params)
        except (RuntimeError, ValueError, TypeError, IndexError) as error:
            raise CannotEvaluate(f"expected the replacement to run, got: {error}") from error
        return result if isinstance(result, (tuple, list)) else [result]

    def _coarsest(self) -> float:
        """The rounding of the least precise floating dtype in the region, with room for some of them."""
        dtypes = {v.dtype for v in [*self.leaves, *self.region] if v.dtype.is_floating_point}
        return 2.0 * max(torch.finfo(dtype).eps for dtype in dtypes)

    def _names(self, count: int) -> list[str]:
        outputs = len(self.match.outputs)
        return ["output" if k < outputs else "gradient" for k in range(count)]

    def _compare_exact(self, theirs: Sequence[Tensor], ours: Sequence[Tensor]) -> str | None:
        if len(theirs) != len(ours):
            return f"certify: expected {len(theirs)} outputs and gradients, got {len(ours)}"
        if not all(output.numel() for output in theirs[: len(self.match.outputs)]):
            raise CannotEvaluate("expected numbers to compare, got none in a small batch")
        for name, a, b in zip(self._names(len(theirs)), theirs, ours, strict=True):
            if a.shape != b.shape:
                return f"certify: expected {name} of shape {tuple(a.shape)}, got {tuple(b.shape)}"
            scale = float(a.nan_to_num().abs().amax()) if a.numel() else 0.0
            worst = float((a - b).nan_to_num().abs().amax()) if a.numel() else 0.0
            self.exact = max(self.exact or 0.0, worst / scale if scale else worst)
            if not torch.allclose(a, b, rtol=EXACT, atol=EXACT * scale, equal_nan=True):
                return f"certify: expected the same {name} in float64, got a difference of {worst:.1e}"
        return None

    def _compare_real(self, truth: Sequence[Tensor], drawn: Sequence[Tensor], device: torch.device) -> str | None:
        with _without_cudnn(self.region):
            theirs = self._one(self._region, drawn, exact=False, device=device)
        ours = self._one(self._replacement, drawn, exact=False, device=device)
        for name, t, a, b in zip(self._names(len(truth)), truth, theirs, ours, strict=True):
            if a.dtype != b.dtype:
                return f"certify: expected {name} of dtype {a.dtype}, got {b.dtype}"
            if not t.is_floating_point() or not t.numel():
                continue
            their_error = _error(a, t, by_row=self.match.by_row)
            our_error = _error(b, t, by_row=self.match.by_row)
            self.region_error = max(self.region_error or 0.0, their_error)
            self.replacement_error = max(self.replacement_error or 0.0, our_error)
            floor = 0.5 * torch.finfo(a.dtype).eps + ARITHMETIC
            if t.numel() < FEW:  # so few numbers may be right by luck
                floor = self._coarsest()
            if not our_error <= NO_WORSE * their_error + floor:
                return (
                    f"certify: expected {name} with a relative error of at most {their_error:.1e} in "
                    f"{str(a.dtype).removeprefix('torch.')}, got {our_error:.1e}"
                )
        return None


def _counts(leaf: Value) -> bool:
    """Whether the leaf holds integers (labels, positions), whose last dimension is as free as the others."""
    return not (leaf.dtype.is_floating_point or leaf.dtype.is_complex)


def _error(got: Tensor, truth: Tensor, *, by_row: bool = True) -> float:
    """Root mean square error relative to the size of the truth, row by row or as a whole; where the truth is finite.

    A row that is nothing beside another is zero but for float64's own rounding (what attends to itself alone passes
    no gradient to its score): its error is relative to the largest row, or it would drown those of all others.
    """
    got = got.to(device=truth.device, dtype=torch.float64)
    finite = torch.isfinite(truth)
    difference = torch.where(finite, got - truth, 0.0).nan_to_num(nan=torch.inf)  # an overflow is an error too
    rows = (truth.shape[-1] if by_row else truth.numel()) if truth.dim() else 1
    size = torch.where(finite, truth, 0.0).reshape(-1, rows).norm(dim=-1)
    error = difference.reshape(-1, rows).norm(dim=-1)
    largest = float(size.amax())
    if largest == 0:
        return float(error.amax())
    relative = error / torch.where(size > NOTHING * largest, size, largest)
    return float(relative.square().mean().sqrt())
