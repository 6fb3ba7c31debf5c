"""What a pattern is, and what it answers: a match, or a refusal with its reason."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

from graphfuse.shadow import Shadow, Value, hint

aten = torch.ops.aten

# A sampler draws one input for certification: (shape, dtype, device, generator) -> tensor.
Sampler = Callable[[tuple[int, ...], torch.dtype, torch.device, torch.Generator], Tensor]


@dataclass(frozen=True)
class Choice:
    """What measuring has decided about a match.

    Attributes:
        params: arguments of the replacement, in the place of those of the match.
        variant: what was chosen, in a few words.
        implementation: in which implementation the kernel runs then, and what was measured.
    """

    params: Mapping[str, Any]
    variant: str
    implementation: str


@dataclass(frozen=True, eq=False)
class Match:
    """A region of the shadow that one replacement stands for.

    Attributes:
        pattern: name of the pattern that found it.
        outputs: the values that the replacement returns, in its order.
        inputs: the values that it takes, in its order; the region lies between the two.
        replacement: called with one tensor per input and with `params`; what certification runs and what is traced
            into the graph are this same function.
        params: keyword arguments of `replacement`: numbers, strings, dtypes.
        variant: for people: what kind of the computation this is.
        covers: computation -> how many of it the replacement stands for.
        samplers: input position -> how to draw it for certification, where a normal distribution will not do; of
            several, every one is tried.
        scalable: sizes that the computation does not depend on, besides those of leading dimensions: certification
            may shrink them.
        above_views: certification starts above the views that lead to the inputs, and so with inputs as strided as in
            the graph; not for computations on heads, whose number would then shrink in one input and not in another.
        by_row: whether rows of a result have sizes of their own, and so their errors are relative to each; not where a
            small row is what is left of a difference (in a softmax's gradient), and its error that of the terms.
        site: the value at whose module and line the report finds the match; the first output if `None`.
        waits: whether the host waits for a value from the device, which a CUDA graph cannot capture.
        formula: for people: what is computed, as algebra (`graphfuse.algebra` writes it).
        rounding: for people: in which dtype, and where that is rounded.
        frees: what the region keeps for backward and the replacement need not: "activations", "logits", or "" if
            that is not known.
        choose: measures what only measuring can decide, such as which of several kernels runs at this size; `None`
            where there is nothing to choose, a refusal where the code as it is is the fastest. With `ahead=True` it
            decides nothing, and has started in the background what it would wait for.
        needs_choice: whether only what measuring chooses is worth a rewrite; without a choice the site is left alone.
        implementation: for people: in which implementation the kernel runs, if not in Triton.
        stored: an input that exists in memory for the replacement's sake alone: Inductor would compute it where the
            region reads it.
    """

    pattern: str
    outputs: tuple[Value, ...]
    inputs: tuple[Value, ...]
    replacement: Callable[..., Any]
    params: Mapping[str, Any]
    variant: str
    covers: Mapping[str, int]
    samplers: Mapping[int, Sampler | tuple[Sampler, ...]] = field(default_factory=dict)
    scalable: frozenset[int] = frozenset()
    above_views: bool = True
    by_row: bool = True
    waits: bool = False
    site: Value | None = None
    formula: str = ""
    rounding: str = ""
    frees: Literal["activations", "logits", ""] = "activations"
    choose: Callable[..., Choice | Refusal | None] | None = None
    needs_choice: bool = False
    implementation: str = ""
    stored: Value | None = None

    @property
    def anchor(self) -> Value:
        return self.outputs[0]


@dataclass(frozen=True, eq=False)
class Refusal:
    """Why a site is left as it is: `<what>: expected <...>, got <...>`.

    `hint` is what the author of the model can change so that the site matches, where there is such a thing.
    """

    pattern: str
    anchor: Value
    reason: str
    covers: Mapping[str, int] = field(default_factory=dict)
    hint: str = ""


@dataclass(frozen=True)
class Pattern:
    """What to look for. `find` yields every site of a shadow once, outermost region only.

    `why` says in a few words what its kernel does better than the region. Where the kernel decides on every call which
    way to go, `ways` counts the calls of this process by the way that they took.
    """

    name: str
    find: Callable[[Shadow], Iterator[Match | Refusal]]
    why: str = ""
    ways: Counter[str] = field(default_factory=Counter)


ADD = frozenset({aten.add.Tensor, aten.add_.Tensor, aten.add.Scalar, aten.add_.Scalar})
SUB = frozenset({aten.sub.Tensor, aten.sub_.Tensor, aten.sub.Scalar, aten.sub_.Scalar})
MUL = frozenset({aten.mul.Tensor, aten.mul_.Tensor, aten.mul.Scalar, aten.mul_.Scalar})
DIV = frozenset({aten.div.Tensor, aten.div_.Tensor, aten.div.Scalar, aten.div_.Scalar})
CASTS = frozenset({aten._to_copy.default, torch.ops.prims.convert_element_type.default})

# Operations that change the shape alone.
VIEWS = frozenset({aten.view.default, aten._unsafe_view.default, aten.reshape.default, aten._reshape_alias.default})

# Operations that only move elements: no arithmetic, at most repetition.
INDEXING = VIEWS | frozenset(
    {
        aten.unsqueeze.default,
        aten.squeeze.dim,
        aten.squeeze.dims,
        aten.squeeze.default,
        aten.expand.default,
        aten.alias.default,
        aten.clone.default,
        aten.contiguous.default,
        aten.permute.default,
        aten.transpose.int,
        aten.t.default,
        aten.slice.Tensor,
        aten.select.int,
        aten.split.Tensor,
        aten.split_with_sizes.default,
        aten.chunk.default,
        aten.unbind.int,
        aten.unfold.default,
        aten.lift_fresh.default,
    }
)

IDENTITIES = frozenset({aten.alias.default, aten.clone.default, aten.contiguous.default, aten.lift_fresh.default})


def is_cast(value: Value) -> bool:
    """Whether the value is its operand in another floating dtype (or layout), and nothing else."""
    return value.op in CASTS and value.dtype.is_floating_point


def strip(value: Value) -> Value:
    """The value before casts and copies."""
    while is_cast(value) or value.op in IDENTITIES:
        value = value.args[0]
    return value


def unrounded(value: Value) -> Value:
    """The value before copies, and before casts that lost nothing: what an op that computes in fp32 may read."""
    while value.op in IDENTITIES or (is_cast(value) and not narrows(value)):
        value = value.args[0]
    return value


def unreachable(value: Value, shadow: Shadow) -> Value | None:
    """What keeps a value inside a node from being made again in the graph: that takes casts, copies and whole slices.

    Whether `x[:, :, None]` slices x first is up to torch: it does under some of its tracing modes.
    """
    while value not in shadow.node_of:
        is_whole = value.op is aten.slice.Tensor and value.shape == value.args[0].shape
        if not is_whole and value.op not in CASTS | IDENTITIES:
            return value
        value = value.args[0]
    return None


def narrows(value: Value) -> bool:
    """Whether the value is a cast to a dtype of fewer bits, and so a rounding."""
    return is_cast(value) and value.dtype.itemsize < value.args[0].dtype.itemsize


def number(item: Any) -> float | None:
    """A Python number, a symbolic one by its hint, or `None` for everything else."""
    item = hint(item)
    if isinstance(item, (int, float)) and not isinstance(item, bool):
        return float(item)
    return None


def scalar(item: Any) -> float | None:
    """`number`, or the content of a constant that the graph made from a Python number."""
    if isinstance(item, Value):
        if item.op in CASTS or item.op in IDENTITIES or item.op is aten.detach.default:
            return scalar(item.args[0])
        if item.op is aten.full.default and item.tensor.numel() == 1:
            content = number(item.args[1])
            return None if content is None else torch.tensor(content, dtype=item.dtype).item()
        if item.op is aten.scalar_tensor.default:
            return number(item.args[0])
        return None
    return number(item)


def is_last(dims: Any, value: Value) -> bool:
    """Whether `dims`, as an ATen reduction takes them, name the last dimension and no other."""
    rank = value.tensor.dim()
    named = [dims] if isinstance(dims, int) else list(dims or [])
    return len(named) == 1 and named[0] in (-1, rank - 1)


def argument(value: Value, position: int, name: str, default: Any = None) -> Any:
    """An argument of the value's operation, positional or by name."""
    if len(value.args) > position:
        return value.args[position]
    return value.kwargs.get(name, default)


def short(dtype: torch.dtype) -> str:
    """`bfloat16` rather than `torch.bfloat16`."""
    return str(dtype).removeprefix("torch.")


def rounded(out: torch.dtype, early: torch.dtype | None = None) -> str:
    """Say in words where an op that computes in float32 rounds: at the end, and `early`, before the weight."""
    if out.itemsize >= 8:
        return f"{short(out)} throughout"
    before = early is not None and early.itemsize < 4
    if out.itemsize >= 4 and not before:
        return "float32 throughout"
    places = [f"to {short(early)} before the weight"] if before and early is not None else []
    places.append("at the end" if before and early == out else f"to {short(out)} at the end")
    return "computed in float32, rounded " + " and ".join(places)
