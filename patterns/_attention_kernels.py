"""Which attention kernel a site calls: the one that was measured to be the fastest at its size."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor
from torch.nn import functional

from graphfuse.kernels import _op
from graphfuse.kernels._sdpa_kernel import may_choose
from graphfuse.kernels._sdpa_times import MARGIN, Times, fastest, load
from graphfuse.kernels.grouped_attention import grouped_attention
from graphfuse.match import Choice, Refusal
from graphfuse.policy import ALWAYS
from graphfuse.shadow import Value

NAMES = {
    "flash": "flash attention",
    "cudnn": "cuDNN",
    "efficient": "memory-efficient attention",
    "split": "split keys",
    "rows": "queries as rows",
    "written": "the code as it is",
}
FEW_ROWS, MANY_KEYS = 16, 512  # where keys are split without a measurement: a program's queries, several programs' keys

States = Callable[[], tuple[Tensor, Tensor, Tensor]]


def trains(value: Value, *inputs: Value) -> bool:
    """Whether there will be a backward."""
    return value.grad_mode and any(one.tensor.requires_grad for one in inputs)


def choose_kernel(
    states: States, *, is_causal: bool, trains: bool, ahead: bool = False, **others: Any
) -> Choice | None:
    """The argument `kernel` of attention without a mask that is read; `others` are set along with it."""
    if ahead:
        load(*states(), is_causal=is_causal, trains=trains)
        return None
    found = fastest(*states(), is_causal=is_causal, trains=trains)
    if found is None:
        return None
    return Choice({"kernel": found.fastest, **others}, f"by {NAMES[found.fastest]}", _told(found, trains))


def choose_kernels(states: States, mask: Callable[[], Tensor], *, trains: bool, ahead: bool = False) -> Choice | None:
    """The arguments `causal_kernel` and `masked_kernel` of attention whose mask is looked at on every call."""
    query, key, value = states()
    if ahead:  # of kernels that read a mask, the libraries are the same
        load(query, key, value, is_causal=True, trains=trains)
        return None
    causal = fastest(query, key, value, is_causal=True, trains=trains)
    if causal is None:
        return None
    found = {"causal": causal, "masked": fastest(query, key, value, mask(), is_causal=False, trains=trains)}
    known = {way: times for way, times in found.items() if times is not None}
    params = {f"{way}_kernel": times.fastest if times is not None else "" for way, times in found.items()}
    ways = ", ".join(f"{way} by {NAMES[times.fastest]}" for way, times in known.items())
    return Choice(params, ways, "; ".join(f"{way}, {_told(times, trains)}" for way, times in known.items()))


def _told(found: Times, trains: bool) -> str:
    return f"in PyTorch's {NAMES[found.fastest]}, {_measured(found, trains)}"


def _measured(found: Times, trains: bool = False) -> str:
    times = sorted(found.milliseconds.items(), key=lambda item: item[1])
    what = "forward and backward" if trains else "forward"
    return f"measured {what}: " + ", ".join(f"{NAMES[name]} {ms:.3g} ms" for name, ms in times)


def may_split(query: Value, *others: Value) -> bool:
    """Whether keys can be split: on a GPU, without a gradient."""
    return _op.launches(*(value.tensor for value in (query, *others) if value.dtype.is_floating_point))


def should_split(query: Value, key: Value) -> bool:
    """Whether to split them where nothing can be measured, but may be chosen."""
    is_small = query.shape[1] // key.shape[1] * query.shape[2] <= FEW_ROWS
    return is_small and key.shape[2] >= MANY_KEYS and may_choose()


def choose_way(
    pattern: str,
    anchor: Value,
    states: tuple[Value, Value, Value],
    mask: Value | None,
    *,
    knows_groups: bool,
    scale: float,
    ahead: bool = False,
) -> Choice | Refusal | None:
    """The argument `kernel` of attention of one query for each head, or that the code as it is is faster.

    Args:
        pattern: whose site it is.
        anchor: the attention.
        states: query, key and value, these with as many heads as there are groups.
        mask: if there is one.
        knows_groups: whether the code hands such keys and values over, and does not repeat them.
        scale: set along with the kernel.
        ahead: start nothing, and decide nothing: a kernel of Triton's is not launched in a thread beside others.
    """
    if ahead:
        return None
    query, key, value = states
    ways = {"written": _told_of_groups if knows_groups else _repeated, "rows": _as_rows, "split": _split}
    if query.shape[1] == key.shape[1]:
        del ways["rows"]  # is what is written
    tensors = (query.tensor, key.tensor, value.tensor, None if mask is None else mask.tensor)
    found = fastest(*tensors, is_causal=False, trains=False, ways=ways)
    if found is None:
        splits = {"kernel": "split", "scale": scale}
        why = "in Triton, for few queries of many keys, not measured"
        return Choice(splits, f"by {NAMES['split']}", why) if should_split(query, key) else None
    if found.fastest == "written":
        took = found.milliseconds["written"]
        best = min((ms for name, ms in found.milliseconds.items() if name != "written"), default=float("inf"))
        reason = (
            f"cost: expected less than {took / MARGIN:.3g} ms, as the code as it is takes {took:.3g}, got {best:.3g}"
        )
        return Refusal(pattern, anchor, reason, {pattern: 1}, ALWAYS)
    kernel = "split" if found.fastest == "split" else ""
    where = "in Triton" if kernel else "in PyTorch's own kernel"
    return Choice({"kernel": kernel, "scale": scale}, f"by {NAMES[found.fastest]}", f"{where}, {_measured(found)}")


def _repeated(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    """As code repeats them, so that what is timed is what it would do: copied in the order that expand has."""
    heads = query.shape[1]
    key, value = (
        states.unsqueeze(2).expand(-1, -1, heads // states.shape[1], -1, -1).reshape(-1, heads, *states.shape[2:])
        for states in (key, value)
    )
    return functional.scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=scale)


def _told_of_groups(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    return functional.scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=scale, enable_gqa=True)


def _as_rows(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    return grouped_attention(query, key, value, mask, scale=scale)


def _split(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    return grouped_attention(query, key, value, mask, scale=scale, kernel="split")
