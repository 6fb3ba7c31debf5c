"""How the examples measure memory."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType

import torch
from torch.profiler import ProfilerActivity, profile


class Peak:
    """The most memory that torch allocates at once inside `with`, beyond what was there before: `Peak.bytes`."""

    bytes = 0

    def __enter__(self) -> Peak:
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()
            self.before = torch.cuda.memory_allocated()
        else:
            self.profile = profile(activities=[ProfilerActivity.CPU], profile_memory=True)
            with quiet_stderr():
                self.profile.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if torch.cuda.is_available():
            self.bytes = torch.cuda.max_memory_allocated() - self.before
            return
        with quiet_stderr():
            self.profile.stop()
        with tempfile.TemporaryDirectory() as folder:
            trace = Path(folder) / "trace.json"
            self.profile.export_chrome_trace(str(trace))
            events = json.loads(trace.read_text())["traceEvents"]
        self.bytes = max(event["args"]["Total Allocated"] for event in events if event["name"] == "[memory]")


@contextmanager
def quiet_stderr() -> Iterator[None]:
    """Drop what native code writes there: the profiler announces its start and its end."""
    stderr = os.dup(2)
    with open(os.devnull, "w") as nowhere:
        os.dup2(nowhere.fileno(), 2)
    try:
        yield
    finally:
        os.dup2(stderr, 2)
        os.close(stderr)
