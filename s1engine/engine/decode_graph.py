"""One decode step as a CUDA graph, for each number of rows that it is rounded up to.

Everything a step reads lies at fixed addresses and says for itself how much of it counts: the slots of the rows (-1 is
padding), their lengths, the work of the attention. So a graph may follow another at once.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from tqdm import tqdm


def bucket_sizes(max_rows: int) -> list[int]:
    """Numbers of rows that have a graph, ascending: padding stays below an eighth or so, but for the smallest."""
    sizes = [1, 2, 4, *range(8, 64, 8), *range(64, 256, 16), *range(256, max_rows, 32)]
    return [size for size in sizes if size < max_rows] + [max_rows]


class DecodeGraphs:
    """Runs `step(size, variant)`, captured where the device can.

    step     enqueues a decode step of `size` rows; variant says which optional kernels it has
    max_rows the largest size
    """

    def __init__(self, step: Callable[[int, Any], None], max_rows: int, device: torch.device) -> None:
        self.sizes = bucket_sizes(max_rows)
        self._step = step
        self._device = device
        self._graphs: dict[tuple[int, Any], torch.cuda.CUDAGraph] = {}
        self._pool: Any = None

    def size_for(self, rows: int) -> int:
        """The number of rows that `rows` are rounded up to."""
        return next(size for size in self.sizes if size >= rows)

    def lacks(self, size: int, variant: Any) -> bool:
        """Whether that step has to be captured before it can be replayed."""
        return self._device.type == "cuda" and (size, variant) not in self._graphs

    def replay(self, size: int, variant: Any) -> None:
        if self._device.type == "cuda":
            self._graphs[size, variant].replay()
        else:
            self._step(size, variant)

    def capture_all(self, variant: Any) -> None:
        """Capture every size, the largest first: the smaller ones find room in its memory."""
        if self._device.type == "cuda":
            for size in tqdm(self.sizes[::-1], desc="capture", unit="graph", leave=False, disable=None):
                self.capture(size, variant)

    @torch.inference_mode()
    def capture(self, size: int, variant: Any) -> None:
        """Capture one step, after running it once. Its rows must all be padding: then that leaves no trace."""
        stream = torch.cuda.Stream(self._device)
        stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(stream):
            self._step(size, variant)
        torch.cuda.current_stream(self._device).wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool):
            self._step(size, variant)
        self._pool = self._pool or graph.pool()
        self._graphs[size, variant] = graph
