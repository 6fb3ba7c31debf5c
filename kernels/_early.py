"""A number of the device that the host will want later: sent off as soon as it is known, waited for when it is read.

sent = send(count)          the device copies it into pinned memory, behind what it has to do before
...                         the host goes on, and launches whatever does not depend on it
received(sent)              the host waits for that copy alone, not for what was launched since
"""

from __future__ import annotations

import torch
from torch import Tensor

from graphfuse.kernels._ahead import is_fake

UNKNOWN = -1

# By the address of the pinned memory, which lives as long as the number: a compiler hands on the tensor, and no more.
_copied: dict[int, torch.cuda.Event] = {}


def send(number: Tensor) -> Tensor:
    """Start on the way of a non-negative integer, 0-d int64, to the CPU: a tensor to give to `received`.

    The allocator of pinned memory does not give it to anybody else before the copy is made. An event of a tensor that
    is gone stays until its memory is used again.
    """
    if not number.is_cuda or is_fake(number):
        return number
    sent = torch.empty((), dtype=torch.int64, pin_memory=True).fill_(UNKNOWN)
    sent.copy_(number, non_blocking=True)
    event = torch.cuda.Event()
    event.record()
    _copied[sent.data_ptr()] = event
    return sent


def received(sent: Tensor) -> int | None:
    """Wait for the number; `None` if somebody copied the tensor before it was there."""
    event = None if is_fake(sent) else _copied.get(sent.data_ptr())
    if event is not None:
        event.synchronize()
    number = int(sent)
    return None if number == UNKNOWN else number
