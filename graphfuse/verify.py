"""`optimize(model, verify=True)`: the first batch, in eager and compiled, side by side.

Both are compared with eager in a wider dtype (float64 for a float32 model, float32 for a half one), so that what counts
is eager's own error and not a tolerance. Outputs and gradients are taken without touching `.grad`; random numbers,
buffers and training flags are put back after every run, and the batch then runs once more, for real.

Memory: a copy of the model in the wider dtype, and twice its gradients in it, while the first batch runs.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_map

from graphfuse.errors import VerificationError

FACTOR = 2.0  # error of the compiled model over eager's: roundings differ, and so does luck
WORST_FACTOR = 4.0  # the same for the worst of many parameters
PART = 1 << 24  # elements that are compared at a time

Results = dict[str, Tensor]


@dataclass(frozen=True)
class Figure:
    """Errors against the wider dtype, relative to its norm."""

    name: str
    eager: float
    compiled: float
    limit: float

    @property
    def passes(self) -> bool:
        return self.compiled <= self.limit  # NaN does not


class Verified:
    """The compiled call of a module, which compares its first batch with eager and is then out of the way."""

    def __init__(self, model: nn.Module, compiled: Callable[..., Any]) -> None:
        self.model, self.compiled = model, compiled

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        figures, mode = verify(self.model, self.compiled, args, kwargs)
        show(figures, mode)
        wrong = next((figure for figure in figures if not figure.passes), None)
        if wrong is not None:
            raise VerificationError(
                f"{wrong.name}: expected a relative error of at most {wrong.limit:.1e} (eager has {wrong.eager:.1e}),"
                f" got {wrong.compiled:.1e}"
            )
        self.model._compiled_call_impl = self.compiled
        return self.compiled(*args, **kwargs)


def verify(
    model: nn.Module, compiled: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> tuple[list[Figure], str]:
    """Compare one batch, and leave everything as it was.

    Returns:
        The figures, and what was compared in words: "training, against eager in float64".
    """
    keep = _State(model)
    theirs, is_random = _run(keep, model._call_impl, args, kwargs)
    words = "training" if model.training else "evaluation"
    if is_random:  # dropout: compiled code draws other numbers
        words = "evaluation, as training draws random numbers"
        theirs, _ = _run(keep, model._call_impl, args, kwargs, evaluation=True)
    theirs = {name: tensor.cpu() for name, tensor in theirs.items()}
    ours, _ = _run(keep, compiled, args, kwargs, evaluation=is_random)
    ours = {name: tensor.cpu() for name, tensor in ours.items()}
    wide = _wide(model)
    twin = copy.deepcopy(model).to(wide)
    with torch.autocast("cpu", enabled=False), torch.autocast("cuda", enabled=False):
        widened = tree_map(lambda leaf: _widen(leaf, wide), (args, dict(kwargs)))
        truth, _ = _run(_State(twin), twin._call_impl, *widened, evaluation=is_random)
    del twin
    keep.restore()
    figures = list(_figures(truth, theirs, ours, _narrowest(model)))
    return figures, f"{words}, against eager in {str(wide).removeprefix('torch.')}"


class _State:
    """What a forward pass may change besides its outputs: random numbers, buffers, training flags."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.training = {module: module.training for module in model.modules()}
        self.buffers = [
            (module, name, buffer, None if buffer is None else buffer.detach().clone())
            for module in model.modules()
            for name, buffer in module._buffers.items()
        ]
        self.cpu = torch.random.get_rng_state()
        self.cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []

    def restore(self) -> None:
        for module, was_training in self.training.items():
            module.training = was_training
        for module, name, buffer, content in self.buffers:
            module._buffers[name] = buffer
            if buffer is not None and content is not None and not _same(buffer, content):
                with torch.no_grad():
                    buffer.copy_(content)
        torch.random.set_rng_state(self.cpu)
        if self.cuda:
            torch.cuda.set_rng_state_all(self.cuda)

    def has_drawn(self) -> bool:
        """Whether random numbers were drawn since."""
        if not torch.equal(self.cpu, torch.random.get_rng_state()):
            return True
        now = torch.cuda.get_rng_state_all() if self.cuda else []
        return any(not torch.equal(a, b) for a, b in zip(self.cuda, now, strict=True))


def _same(a: Tensor, b: Tensor) -> bool:
    return a.is_meta or torch.equal(a, b)


def _run(
    keep: _State,
    call: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    *,
    evaluation: bool = False,
) -> tuple[Results, bool]:
    """Outputs and gradients of one call, by name; and whether it drew random numbers."""
    keep.restore()
    if evaluation:
        keep.model.eval()
    args, kwargs = tree_map(_own, (args, dict(kwargs)))
    outputs = _named_outputs(call(*args, **kwargs))
    is_random = keep.has_drawn()
    results = {name: tensor.detach().clone() for name, tensor in outputs.items()}
    parameters = {name: p for name, p in keep.model.named_parameters() if p.requires_grad}
    ends = [tensor for tensor in _ends(outputs) if tensor.requires_grad]
    if parameters and ends and torch.is_grad_enabled():
        generator = torch.Generator().manual_seed(0)
        upstream = [torch.randn(t.shape, generator=generator).to(t) if t.dim() else torch.ones_like(t) for t in ends]
        grads = torch.autograd.grad(ends, list(parameters.values()), upstream, allow_unused=True)
        found = zip(parameters, grads, strict=True)
        results |= {f"gradient of {name}": grad for name, grad in found if grad is not None}
    keep.restore()
    return results, is_random


def _own(leaf: Any) -> Any:
    """A copy that a forward pass may change: of a tensor, or of an object such as a cache of keys and values."""
    if isinstance(leaf, Tensor):
        return leaf.detach().clone().requires_grad_(leaf.requires_grad)
    return copy.deepcopy(leaf)


def _widen(leaf: Any, dtype: torch.dtype) -> Any:
    return leaf.to(dtype) if isinstance(leaf, Tensor) and leaf.is_floating_point() else leaf


def _named_outputs(output: Any) -> Results:
    """The floating tensors among the outputs; those of a mapping by their keys."""
    if isinstance(output, Mapping):
        pairs = [(str(key), value) for key, value in output.items()]
    else:
        pairs = [("output", output)]
    found: Results = {}
    for name, value in pairs:
        leaves = [leaf for leaf in tree_flatten(value)[0] if isinstance(leaf, Tensor) and leaf.is_floating_point()]
        found |= {name if len(leaves) == 1 else f"{name} {k}": leaf for k, leaf in enumerate(leaves)}
    return found


def _ends(outputs: Results) -> list[Tensor]:
    """Where gradients start: the loss, if there is one, else everything."""
    losses = [tensor for tensor in outputs.values() if tensor.dim() == 0]
    return losses[:1] or list(outputs.values())


def _wide(model: nn.Module) -> torch.dtype:
    narrow = _narrowest(model)
    return torch.float64 if narrow == torch.float32 else torch.float32 if narrow.itemsize < 4 else narrow


def _narrowest(model: nn.Module) -> torch.dtype:
    dtypes = {p.dtype for p in model.parameters() if p.is_floating_point()} or {torch.get_default_dtype()}
    if torch.is_autocast_enabled("cuda" if torch.cuda.is_available() else "cpu"):
        dtypes.add(torch.get_autocast_dtype("cuda" if torch.cuda.is_available() else "cpu"))
    return max(dtypes, key=lambda dtype: torch.finfo(dtype).eps)


def _figures(truth: Results, theirs: Results, ours: Results, narrow: torch.dtype) -> Iterator[Figure]:
    eps = torch.finfo(narrow).eps
    pairs = {name: (_errors(theirs, truth, name), _errors(ours, truth, name)) for name in truth}
    gradients = {name: pair for name, pair in pairs.items() if name.startswith("gradient of ")}
    for name, ((eager, size), (compiled, _)) in pairs.items():
        if name not in gradients:  # a single number may be right by luck
            floor = 0.25 * eps if truth[name].numel() > 1 else max(0.1 * eps, 8 * torch.finfo(torch.float32).eps)
            yield _figure(name, eager, compiled, size, FACTOR, floor)
    if gradients:
        whole = [math.hypot(*(pair[k][0] for pair in gradients.values())) for k in range(2)]
        size = math.hypot(*(pair[0][1] for pair in gradients.values()))
        yield _figure(f"gradients of {len(gradients)} parameters", whole[0], whole[1], size, FACTOR, 0.25 * eps)
        # A gradient that is rounding noise, such as that of a key's bias, is measured against the others.
        least = 1e-3 * size / math.sqrt(len(gradients))
        worst = max(
            (
                _figure(f"worst, {name}", eager, compiled, max(length, least), WORST_FACTOR, 4 * eps)
                for name, ((eager, length), (compiled, _)) in gradients.items()
            ),
            key=lambda figure: math.inf if math.isnan(figure.compiled) else figure.compiled / figure.limit,
        )
        yield worst


def _figure(name: str, eager: float, compiled: float, size: float, factor: float, floor: float) -> Figure:
    eager, compiled = (error / size if size else error for error in (eager, compiled))
    return Figure(name, eager, compiled, factor * eager + floor)


def _errors(got: Results, truth: Results, name: str) -> tuple[float, float]:
    """The norm of the difference and that of the truth; infinite where something is missing."""
    expected = truth[name].detach().cpu()
    if name not in got or got[name].shape != expected.shape:
        return math.inf, float(expected.double().norm())
    error = size = 0.0
    parts = zip(got[name].reshape(-1).split(PART), expected.reshape(-1).split(PART), strict=True)
    for ours, theirs in parts:
        exact = theirs.double()
        finite = torch.isfinite(exact)
        difference = torch.where(finite, ours.double() - exact, 0.0)
        error += float(difference.square().sum())
        size += float(torch.where(finite, exact, 0.0).square().sum())
    return math.sqrt(error) if not math.isnan(error) else math.nan, math.sqrt(size)


def show(figures: list[Figure], mode: str) -> None:
    """Print the figures."""
    table = Table(box=None, pad_edge=False)
    table.add_column("relative error of")
    for name in ("eager", "compiled", "at most"):
        table.add_column(name, justify="right", no_wrap=True)
    for figure in figures:
        numbers = [f"{number:.1e}" for number in (figure.eager, figure.compiled, figure.limit)]
        table.add_row(figure.name, *numbers, style=None if figure.passes else "red")
    console = Console(highlight=False)
    console.print(f"graphfuse: first batch verified in {mode}", soft_wrap=True)
    console.print(table)
