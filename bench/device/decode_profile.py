"""A decode step in the engine's own loop: replays, the gaps between them, the kernels within, and the host's time."""

from __future__ import annotations

import statistics
from collections import defaultdict
from collections.abc import Callable, Iterable
from itertools import pairwise
from typing import Any

import torch

from s1engine import LLMEngine, SamplingParams
from s1engine.bench.speed import host
from s1engine.bench.speed.floor import model_sizes
from s1engine.config import EngineConfig

NEW_TOKENS = 400
LAUNCHES = 12  # that are timed; each is of eight steps where no row can end
PROFILED = 3
TOP_LINES = 25
NOT_MEASURED = "not measured: needs a GPU"


def measure(
    model: str, rows: int, prompt_len: int, dry: bool, keep: Callable[[dict[str, Any]], None]
) -> dict[str, Any]:
    """Of `rows` rows after prompts of `prompt_len` tokens. keep: called with the result as it grows.

    On a CPU the times that only a GPU has are "not measured", and the host's include the model's work.
    """
    engine = _engine(model, rows, prompt_len, dry)
    result: dict[str, Any] = {"text": ""}

    def add(name: str, found: Any, text: str) -> None:
        result[name] = found
        result["text"] = "\n".join(filter(None, [result["text"], text]))
        keep(result)

    _fill(engine, rows, prompt_len)  # compiles and captures
    _empty(engine, rows)
    if dry:
        add("replays", NOT_MEASURED, f"replays, gaps, kernels: {NOT_MEASURED}")
        _fill(engine, rows, prompt_len)
    else:
        prefill = _kernels(lambda: _fill(engine, rows, prompt_len))
        replays = _replays(engine)
        times = ", ".join(f"{name} {value * 1e6:.1f} us" for name, value in replays.items() if value is not None)
        add("replays", replays, f"{rows} rows, medians: {times}")
        decode = _kernels(lambda: _steps(engine, PROFILED))
        in_replay = sum(line["seconds"] for line in decode) / (8 * PROFILED)
        share = in_replay / replays["replay"] if replays["replay"] else 0.0
        add("kernel_seconds_a_step", in_replay, f"kernels of a step, added up: {in_replay * 1e6:.1f} us, {share:.1%}")
        add("decode", decode, f"decode, {PROFILED} launches of 8 steps\n{_table(decode)}")
        add("prefill", prefill, f"prefill, {rows} prompts of {prompt_len} tokens\n{_table(prefill)}")
    found = [_host(engine, "ignore_eos")]
    _empty(engine, rows)
    _fill(engine, rows, prompt_len, stop_token_ids=[0])  # an end that can come: one step a launch
    found.append(_host(engine, "stop id"))
    add("host", found, "host, with the device waited for before results are taken in\n" + host.table(found))
    return result


def _engine(model: str, rows: int, prompt_len: int, dry: bool) -> LLMEngine:
    itemsize = 4 if dry else 2
    longest = prompt_len + NEW_TOKENS
    config = EngineConfig(
        attention_backend="triton" if dry else "auto",
        max_num_seqs=rows,
        max_model_len=longest,
        enable_prefix_caching=False,
        kv_cache_memory=rows * (longest + 32) * model_sizes(model).kv * itemsize,
    )
    dtype = "float32" if dry else "bfloat16"
    return LLMEngine(model, dtype=dtype, device="cpu" if dry else "cuda", config=config)


def _fill(engine: LLMEngine, rows: int, prompt_len: int, **params: Any) -> None:
    """Add requests, and step until all of them decode."""
    generator = torch.Generator().manual_seed(0)
    prompts = torch.randint(1, 10_000, (rows, prompt_len), generator=generator).tolist()
    how = SamplingParams(temperature=0.6, max_tokens=NEW_TOKENS, ignore_eos=True, **params)
    for number, prompt in enumerate(prompts):
        engine.add_request(str(number), prompt, how)
    scheduler = engine.core.scheduler
    while scheduler.waiting or any(seq.known + seq.ahead - seq.computed > 1 for seq in scheduler.running):
        engine.step()
    _steps(engine, 2)
    _wait()


def _empty(engine: LLMEngine, rows: int) -> None:
    for number in range(rows):
        engine.abort_request(str(number))
    while engine.has_unfinished_requests():
        engine.step()
    _wait()


def _steps(engine: LLMEngine, count: int) -> None:
    for _ in range(count):
        engine.step()


def _wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def _replays(engine: LLMEngine) -> dict[str, float | None]:
    """Medians in seconds: of a replay, of the gap to the next of its launch, of that to the next launch's first.

    They are taken by events around each replay, which take a microsecond or two themselves.
    """
    runner: Any = engine.core.runner
    graphs = runner.graphs
    replay, launch = graphs.replay, runner.launch
    events: list[tuple[int, torch.cuda.Event, torch.cuda.Event]] = []
    launches = 0

    def timed_replay(*args: Any) -> None:
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        replay(*args)
        end.record()
        events.append((launches, start, end))

    def counted_launch(plan: Any) -> Any:
        nonlocal launches
        launches += 1
        return launch(plan)

    graphs.replay, runner.launch = timed_replay, counted_launch
    try:
        _steps(engine, LAUNCHES)
        _wait()
    finally:
        graphs.replay, runner.launch = replay, launch
    within: list[float] = []
    between: list[float] = []
    for (number, _, end), (following, start, _) in pairwise(events):
        (within if number == following else between).append(end.elapsed_time(start) / 1000)

    def median(values: Iterable[float]) -> float | None:
        found = list(values)
        return statistics.median(found) if found else None

    return {
        "replay": median(start.elapsed_time(end) / 1000 for _, start, end in events),
        "gap_in_a_launch": median(within),
        "gap_between_launches": median(between),
    }


def _kernels(call: Callable[[], None]) -> list[dict[str, Any]]:
    """What runs on the GPU during a call, by name: calls and seconds, the longest first."""
    from torch.autograd import DeviceType
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiler:
        call()
        _wait()
    lines: dict[str, dict[str, Any]] = defaultdict(lambda: {"calls": 0, "seconds": 0.0})
    for event in profiler.events() or []:
        if event.device_type == DeviceType.CUDA:
            line = lines[event.name]
            line["calls"] += 1
            line["seconds"] += event.time_range.elapsed_us() / 1e6
    return sorted(({"name": name} | line for name, line in lines.items()), key=lambda line: -line["seconds"])


def _table(lines: list[dict[str, Any]]) -> str:
    total = sum(line["seconds"] for line in lines)
    rows = [f"{'ms':>9} {'share':>6} {'calls':>6} {'us/call':>8}  name"]
    for line in lines[:TOP_LINES]:
        seconds, calls = line["seconds"], line["calls"]
        share, each = seconds / total if total else 0.0, seconds / calls * 1e6
        rows.append(f"{seconds * 1e3:>9.3f} {share:>6.1%} {calls:>6} {each:>8.2f}  {line['name'][:90]}")
    return "\n".join(rows)


def _host(engine: LLMEngine, kind: str) -> dict[str, Any]:
    """Medians of what the host does in a launch, as `host.table` takes them."""
    core: Any = engine.core
    before = core.scheduler.schedule, core.runner.launch
    clock = host.HostClock(engine, wait=_wait)
    try:
        steps = [clock.step() for _ in range(LAUNCHES + 2)][2:]
    finally:
        core.scheduler.schedule, core.runner.launch = before
    found = [step for step in steps if step is not None]
    result = {part: statistics.median(step[part] for step in found) for part in host.PARTS}
    seconds = statistics.median(sum(step[part] for part in host.PARTS) for step in found)
    return {"kind": kind, "rows": found[0]["rows"], "replays": found[0]["replays"], "seconds": seconds} | result
