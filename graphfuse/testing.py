"""How a kernel is judged, for our own tests and for pattern authors.

A tolerance is never a number picked by hand: it is the error that the eager code makes in the same dtype.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

SLACK = 1.1  # our error may be a tenth above eager's
FEW_ULPS = 4  # of the dtype the arithmetic is done in: another order of the same sum


def assert_no_worse(
    fn: Callable[..., Any],
    reference: Callable[..., Any],
    inputs: Sequence[Any],
    kwargs: Mapping[str, Any] | None = None,
    *,
    slack: float = SLACK,
    ulps: float = FEW_ULPS,
) -> None:
    """Assert that `fn` is at least as close to the truth as `reference` is in the dtype of the inputs.

    Three runs on the same inputs: the truth is `reference` in float64, eager is `reference` as it is, ours is `fn`.

        max |ours - truth|   <=  slack * max |eager - truth|  + ulps, element by element
        mean |ours - truth|  <=  slack * mean |eager - truth| + ulps

    where ulps stands for `ulps` float32 units in the last place (float64 for float64 inputs) plus one of the output's
    dtype, which in the mean over n elements shrinks by sqrt(n): eager may be lucky once, not n times.
    Tensor outputs are compared one by one, and so are the gradients of every input that requires one, for one random
    gradient of the outputs.

    Args:
        fn: What is tested.
        reference: The same function in torch ops; must compute in float64 when its inputs are float64.
        inputs: Positional arguments of both. For the truth, floating tensors and floating `torch.dtype` arguments
            become float64. Tensors that require grad have their gradients compared.
        kwargs: Keyword arguments of both, treated likewise.
        slack: Factor on eager's error.
        ulps: Units in the last place of float32 allowed beyond it.

    Raises:
        AssertionError: An output differs in shape, dtype or device, is not finite where eager is, or is worse.
    """
    arguments = (tuple(inputs), dict(kwargs or {}))
    truth = _run(reference, tree_map(_to_float64, arguments))
    eager = _run(reference, tree_map(_own, arguments))
    ours = _run(fn, tree_map(_own, arguments))
    assert ours.keys() == eager.keys(), f"outputs: expected {[*eager]}, got {[*ours]}"
    exact = torch.float64 if any(_is(leaf, torch.float64) for leaf in tree_leaves(arguments)) else torch.float32
    for name in eager:
        _compare(name, ours[name], eager[name], truth[name], slack, ulps * torch.finfo(exact).eps)


def _run(fn: Callable[..., Any], arguments: tuple[tuple[Any, ...], dict[str, Any]]) -> dict[str, Tensor]:
    """Return the outputs of a call, and the gradients of its inputs, by name."""
    args, kwargs = arguments
    outputs = [leaf for leaf in tree_leaves(fn(*args, **kwargs)) if isinstance(leaf, Tensor)]
    named = {f"output {i}": output.detach() for i, output in enumerate(outputs)}
    wanted = {f"gradient of input {i}": leaf for i, leaf in enumerate(tree_leaves(arguments)) if _needs_grad(leaf)}
    differentiable = [output for output in outputs if output.requires_grad]
    if not wanted or not differentiable:
        return named
    gradients = torch.autograd.grad(
        differentiable,
        list(wanted.values()),
        [_random_like(output, seed) for seed, output in enumerate(differentiable)],
        allow_unused=True,
    )
    return named | {name: grad for name, grad in zip(wanted, gradients, strict=True) if grad is not None}


def _compare(name: str, ours: Tensor, eager: Tensor, truth: Tensor, slack: float, rounding: float) -> None:
    """Assert that one tensor is no worse than eager's; `rounding` is relative."""
    for what in ("shape", "dtype", "device"):
        expected, got = getattr(eager, what), getattr(ours, what)
        assert got == expected, f"{name}: expected {what} {expected}, got {got}"
    if not eager.is_floating_point():
        assert torch.equal(ours, eager), f"{name}: expected the integers of eager, got others"
        return

    out_ulp = torch.finfo(eager.dtype).eps
    finite = truth.isfinite() & eager.isfinite()
    # Where the truth is inf or nan, so are we. Where only eager overflows, we may do better.
    same = torch.isclose(ours.double(), truth.double(), equal_nan=True) | truth.isfinite()
    assert same.all(), f"{name}: expected {truth[~same][0]} at {_first(~same)}, got {ours[~same][0]}"
    astray = finite & ~ours.isfinite()
    assert not astray.any(), f"{name}: expected {eager[astray][0]} at {_first(astray)}, got {ours[astray][0]}"
    if not finite.any():
        return

    size = truth[finite].double().abs()
    our_error = (ours.double() - truth.double())[finite].abs()
    eager_error = (eager.double() - truth.double())[finite].abs()
    tiny = torch.finfo(eager.dtype).smallest_normal * out_ulp

    # A cancelled element carries the rounding of the terms it came from: judge it by the typical size.
    typical = size.square().mean().sqrt()
    allowed = slack * eager_error.max() + rounding * size.maximum(typical) + out_ulp * size + tiny
    worst = int((our_error - allowed).argmax())
    assert our_error[worst] <= allowed[worst], (
        f"{name}: expected an error of at most {allowed[worst]:.3g} (eager's largest is {eager_error.max():.3g}), "
        f"got {our_error[worst]:.3g} at {tuple(finite.nonzero()[worst].tolist())}"
    )
    allowed_mean = slack * eager_error.mean() + (rounding + out_ulp / size.numel() ** 0.5) * typical + tiny
    assert our_error.mean() <= allowed_mean, (
        f"{name}: expected a mean error of at most {allowed_mean:.3g} (eager's is {eager_error.mean():.3g}), "
        f"got {our_error.mean():.3g}"
    )


def _own(leaf: Any) -> Any:
    """Return a tensor of the same layout that shares neither memory nor graph with the caller's."""
    if not isinstance(leaf, Tensor):
        return leaf
    return _like_layout(leaf, leaf.dtype)


def _to_float64(leaf: Any) -> Any:
    if isinstance(leaf, torch.dtype) and leaf.is_floating_point:
        return torch.float64
    if not isinstance(leaf, Tensor):
        return leaf
    return _like_layout(leaf, torch.float64 if leaf.is_floating_point() else leaf.dtype)


def _like_layout(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """Copy with the strides as they are, overlapping ones (expanded dims) included."""
    span = 1 + sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    memory = torch.empty(0 if tensor.numel() == 0 else span, dtype=dtype, device=tensor.device)
    if tensor.numel():
        memory.copy_(tensor.detach().as_strided((span,), (1,)))
    return memory.as_strided(tensor.shape, tensor.stride()).detach().requires_grad_(tensor.requires_grad)


def _needs_grad(leaf: Any) -> bool:
    return isinstance(leaf, Tensor) and leaf.requires_grad


def _is(leaf: Any, dtype: torch.dtype) -> bool:
    return isinstance(leaf, Tensor) and leaf.dtype == dtype


def _random_like(output: Tensor, seed: int) -> Tensor:
    """Return a gradient that all three runs share: random, and exact in the output's dtype."""
    generator = torch.Generator().manual_seed(seed)
    eighths = torch.randint(-16, 17, output.shape, generator=generator) / 8
    return eighths.to(device=output.device, dtype=output.dtype)


def _first(mask: Tensor) -> tuple[int, ...]:
    return tuple(mask.nonzero()[0].tolist())
