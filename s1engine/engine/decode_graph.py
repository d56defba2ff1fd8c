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
    """Runs `step(size)`, captured where the device can.

    step      enqueues a decode step of `size` rows; it leaves what it makes in memory that is there before and after
    max_rows  the largest size
    """

    def __init__(self, step: Callable[[int], None], max_rows: int, device: torch.device) -> None:
        self.sizes = bucket_sizes(max_rows)
        self._step = step
        self._captures = device.type == "cuda"
        self._graphs: dict[int, torch.cuda.CUDAGraph] = {}
        # One for all: a matrix library keeps a workspace for each stream that it has seen.
        self._stream = torch.cuda.Stream(device) if self._captures else None

    def size_for(self, rows: int) -> int:
        """The number of rows that `rows` are rounded up to."""
        return next(size for size in self.sizes if size >= rows)

    def replay(self, size: int) -> None:
        if self._captures:
            self._graphs[size].replay()
        else:
            self._step(size)

    @torch.inference_mode()
    def capture(self, pool: Any = None) -> Any:
        """Capture every size, each after running it once. Its rows must all be padding: then that leaves no trace.

        pool  of memory to share with other graphs that never run at the same time; returns it
        """
        if not self._captures:
            return None
        # The largest first: the smaller ones find room in its memory.
        for size in tqdm(self.sizes[::-1], desc="capture", unit="graph", leave=False, disable=None):
            assert self._stream is not None
            self._stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(self._stream):
                self._step(size)
            torch.cuda.current_stream().wait_stream(self._stream)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, pool=pool, stream=self._stream):
                self._step(size)
            pool = pool or graph.pool()
            self._graphs[size] = graph
        return pool
