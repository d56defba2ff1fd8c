"""Time of each kernel of a decode step alone, and its share of the machine's floor, measured in the same run.

The floor is the bytes that a kernel must read and write over the memory bandwidth, or its operations over the rate of a
large matrix product, whichever takes longer. Sets of inputs take turns, so that they come from memory rather than from
the cache; only the smallest kernels, whose time is that of a launch, still find them there. On a GPU launches are
replayed from a CUDA graph, and the time is the median; on a CPU it is the least.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
import time
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from s1engine.bench.speed import machine
from s1engine.bench.speed.decode_cases import decode_cases
from s1engine.bench.speed.decode_step import Case, Launch, Step
from s1engine.bench.speed.shapes import SHAPES, model_shape
from s1engine.kernels.triton_build import ModelShape

EXAMPLE = "example: s1engine bench kernels --shape qwen3-0.6b --batch 1 32 --context 2048"
DTYPES = {"float32": "fp32", "bfloat16": "bf16"}

WARM_UPS = 2
GRAPH_LAUNCHES = 32  # at least, so that the start of a replay does not count
MAX_SETS = 256
CPU_CACHE_BYTES = 64 << 20
CPU_SECONDS = 2.0  # after which a kernel is not measured again


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description, parser.epilog = __doc__, EXAMPLE
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--shape", choices=sorted(SHAPES), default="qwen3-0.6b", help="sizes of this model")
    parser.add_argument("--dtype", choices=sorted(DTYPES), default="bfloat16")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 32, 256], help="rows of the step")
    parser.add_argument("--context", type=int, default=1024, help="tokens that each row attends to")
    parser.add_argument(
        "--repeats", type=int, default=20, help="measurements of each kernel; fewer of slow ones on a CPU"
    )
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument("--json", action="store_true", help="print one JSON object last")


def run(args: argparse.Namespace) -> int:
    for name in ("context", "repeats"):
        if getattr(args, name) < 1:
            raise ValueError(f"--{name} {getattr(args, name)}: must be at least 1")
    if min(args.batch) < 1:
        raise ValueError(f"--batch {min(args.batch)}: must be at least 1")
    if args.device == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda: torch finds no GPU")
    cuda = args.device != "cpu" and torch.cuda.is_available()
    device, dtype = torch.device("cuda" if cuda else "cpu"), getattr(torch, args.dtype)
    bandwidth, rate = machine.read_bandwidth(device), machine.matmul_rate(dtype, device)
    shape = model_shape(args.shape, DTYPES[args.dtype])
    rows = []
    for batch in args.batch:
        rows += measure(shape, batch, args.context, args.repeats, dtype, device, bandwidth, rate)
    print(table(rows))
    print(
        f"floor: bytes {'read' if device.type == 'cpu' else 'read and written'} at {bandwidth / 1e9:.1f} GB/s, "
        f"operations at {rate / 1e12:.2f} TFLOP/s, both measured just before"
    )
    if args.json:
        report = {
            "rows": rows,
            "bytes_per_second": bandwidth,
            "operations_per_second": rate,
            "args": {k: v for k, v in vars(args).items() if k != "run"},
            "machine": machine.describe(),
        }
        print(json.dumps(report, default=str))
    return 0


@torch.inference_mode()
def measure(
    shape: ModelShape,
    batch: int,
    context: int,
    repeats: int,
    dtype: torch.dtype,
    device: torch.device,
    bandwidth: float,
    rate: float,
) -> list[dict[str, Any]]:
    """One row a kernel, with times in seconds.

    bandwidth  bytes per second
    rate       operations per second
    Raises RuntimeError where a kernel leaves part of what it should write unwritten, or writes NaN.
    """
    launches = (WARM_UPS + repeats) * GRAPH_LAUNCHES + 1  # of one set at most
    step = Step(shape=shape, batch=batch, context=context, launches=launches, dtype=dtype, device=device)
    rows = []
    for case in tqdm(decode_cases(step), f"batch {batch}", unit="kernel", file=sys.stderr):
        torch.manual_seed(0)
        sets = [case.make() for _ in range(_num_sets(case, device))]
        seconds = _cuda_seconds(case, sets, repeats) if device.type == "cuda" else _cpu_seconds(case, sets, repeats)
        floor = max(case.num_bytes / bandwidth, case.operations / rate)
        rows.append(
            {
                "batch": batch,
                "kernel": case.kernel,
                "seconds": seconds,
                "bytes": case.num_bytes,
                "operations": case.operations,
                "floor_seconds": floor,
                "share_of_floor": floor / seconds,
            }
        )
    return rows


def table(rows: list[dict[str, Any]]) -> str:
    width = max(len(row["kernel"]) for row in rows)
    lines = [f"{'batch':>5} {'kernel':<{width}} {'time (us)':>10} {'floor (us)':>10} {'GB/s':>7} {'of floor':>8}"]
    for row in rows:
        lines.append(
            f"{row['batch']:>5} {row['kernel']:<{width}} {row['seconds'] * 1e6:>10.2f} "
            f"{row['floor_seconds'] * 1e6:>10.2f} {row['bytes'] / row['seconds'] / 1e9:>7.1f} "
            f"{row['share_of_floor']:>8.1%}"
        )
    return "\n".join(lines)


def _num_sets(case: Case, device: torch.device) -> int:
    """So many that all together are twice the last-level cache."""
    cache = CPU_CACHE_BYTES
    if device.type == "cuda":
        cache = torch.cuda.get_device_properties(device).L2_cache_size
    return min(math.ceil(2 * cache / case.num_bytes), MAX_SETS)


def _cpu_seconds(case: Case, sets: list[Launch], repeats: int) -> float:
    for launch in sets:
        _poison(launch())
        _check_written(case, launch())
    times: list[float] = []
    while len(times) < repeats and sum(times) < CPU_SECONDS:
        start = time.perf_counter()
        for launch in sets:
            launch()
        times.append(time.perf_counter() - start)
    return min(times) / len(sets)


def _cuda_seconds(case: Case, sets: list[Launch], repeats: int) -> float:
    for launch in sets:
        launch()
    torch.cuda.synchronize()
    graph, rounds, outputs = torch.cuda.CUDAGraph(), math.ceil(GRAPH_LAUNCHES / len(sets)), []
    with torch.cuda.graph(graph):
        for _ in range(rounds):
            outputs = [launch() for launch in sets]
    for output in outputs:
        _poison(output)
    times = []
    for _ in range(WARM_UPS + repeats):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) / 1000)
    for output in outputs:
        _check_written(case, output)
    return statistics.median(times[WARM_UPS:]) / (rounds * len(sets))


def _poison(output: Tensor) -> None:
    output.fill_(_poison_value(output))


def _poison_value(output: Tensor) -> float:
    return math.nan if output.is_floating_point() else torch.iinfo(output.dtype).min


def _check_written(case: Case, output: Tensor) -> None:
    left = output.isnan() if output.is_floating_point() else output == _poison_value(output)
    if left.any():
        raise RuntimeError(f"{case.kernel}: {int(left.sum())} of {output.numel()} outputs are not written, or NaN")
