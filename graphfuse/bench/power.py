"""What a GPU draws, and how fast its clock runs, while something is timed.

Where products keep a card at its limit on power, the clock is what gives: the same kernel takes longer in a step that
leaves it less time to rest. Two variants compare as they would in use; their kernels, only at the same clock.
"""

from __future__ import annotations

import statistics
import threading
from types import TracebackType

import torch

PERIOD = 0.05  # seconds from one look to the next


class Meter:
    """Looks at the GPU every 50 ms, in a thread, until the block ends.

    Attributes:
        clock_mhz: of its multiprocessors, the mean; `None` where nobody can be asked (on a CPU, without nvidia-ml-py).
        watts: what it draws, the mean; the driver averages over up to a second itself.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.clock_mhz: float | None = None
        self.watts: float | None = None
        self._looks: list[tuple[float, float]] = []
        self._is_over = threading.Event()
        self._thread = threading.Thread(target=self._look, daemon=True)

    def __enter__(self) -> Meter:
        if self.device.type == "cuda":
            self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._is_over.set()
        if self._thread.ident is not None:
            self._thread.join()
        if self._looks:
            clocks, watts = zip(*self._looks, strict=True)
            self.clock_mhz, self.watts = statistics.fmean(clocks), statistics.fmean(watts)

    def _look(self) -> None:
        while not self._is_over.wait(PERIOD):
            try:
                look = float(torch.cuda.clock_rate(self.device)), torch.cuda.power_draw(self.device) / 1e3
            except Exception:  # of no importance: no library to ask, or a driver that does not say
                return
            self._looks.append(look)
