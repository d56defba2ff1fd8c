"""What the host spends on a decode step: beside what a GPU needs for it at least, or all that a CPU does but the model.

The engine's own loop runs with nothing behind it: the model (and, of the device path, the kernels) do nothing, and the
results are random tokens. What is left is scheduling, the bookkeeping of a launch, and taking results in; on the CPU
path also sampling from a small vocabulary. On a CPU an upload is a copy within memory; to a GPU it takes longer, and
each launch of a graph some microseconds more.

A launch is of one step where somebody watches each token as it comes (`--stream`), and on a GPU where any row may end;
else of eight.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import time
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch

from s1engine import LLMEngine, SamplingParams
from s1engine.bench.speed import machine
from s1engine.bench.speed.floor import Rates, shape_sizes, step_seconds
from s1engine.bench.speed.ours import BUDGET, OPENED
from s1engine.config import EngineConfig
from s1engine.kernels.slot_layout import Result

EXAMPLE = "example: python -m s1engine.bench.speed.host --rows 256 --cpu"
VOCAB, EOS = 16384, 3
CPU_VOCAB = 512  # small, since a CPU's sampler is not replaced
SHAPE = "qwen3-0.6b"
# Of an H200, as its maker gives it: memory and bfloat16 products.
H200 = Rates(bandwidth=4.8e12, operations=989e12)

# Of each kind of rows, whether they may end by EOS and whether they have a budget.
KINDS = {
    "ignore_eos": (False, False),
    "EOS": (True, False),
    "budget, ignore_eos": (False, True),
    "budget, EOS": (True, True),
}
PARTS = ("schedule", "launch", "collect", "commit")
REPLAYS = 8


class HostClock:
    """Steps an engine of the device path and notes what its host does in each step, in seconds.

    wait   called before results are taken in, and not counted: what waits for a device
    clock  in seconds; of the thread's own time where nothing else is waited for: others then disturb less
    """

    def __init__(
        self,
        engine: LLMEngine,
        wait: Callable[[], None] = lambda: None,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self._engine, self._wait, self._clock = engine, wait, clock
        self._spent = dict.fromkeys((*PARTS, "wait"), 0.0)
        self._plan: Any = None
        core: Any = engine.core  # whose methods are replaced
        schedule, launch = self._timed("schedule", core.scheduler.schedule), self._timed("launch", core.runner.launch)

        def kept_launch(plan: Any) -> Any:
            self._plan = plan
            launched = launch(plan)

            def collect() -> Any:
                self._timed("wait", self._wait)()
                return self._timed("collect", launched.collect)()

            return SimpleNamespace(collect=collect)

        core.scheduler.schedule = schedule
        core.runner.launch = kept_launch

    def _timed(self, part: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*args: Any, **kwargs: Any) -> Any:
            start = self._clock()
            result = call(*args, **kwargs)
            self._spent[part] += self._clock() - start
            return result

        return timed

    def step(self) -> dict[str, Any] | None:
        """One step. Of a launch in which all rows decoded and none ended: its rows, its replays, and each of PARTS."""
        self._spent = dict.fromkeys(self._spent, 0.0)
        self._plan = None
        start = self._clock()
        outputs = self._engine.step()
        spent = self._spent
        spent["commit"] = self._clock() - start - sum(spent.values())
        ended = any(output.finished for output in outputs)
        if self._plan is None or ended or any(chunk.length > 1 for chunk in self._plan.chunks):
            return None
        return {"rows": len(self._plan.chunks), "replays": self._plan.replays} | {part: spent[part] for part in PARTS}


class Nothing:
    """A model that says nothing: its logits are random, for tokens that end nothing, and on a GPU not looked at."""

    def __init__(self, rows: int, max_positions: int, vocab: int) -> None:
        self._logits = torch.rand(rows, vocab)
        self._logits[:, :100] = 0
        self.config = SimpleNamespace(
            vocab_size=vocab,
            num_layers=1,
            num_heads=1,
            num_kv_heads=1,
            head_dim=16,
            hidden_size=1,
            intermediate_size=1,
            dtype=torch.float32,
            max_position_embeddings=max_positions,
            eos_token_ids=(EOS,),
        )

    def __call__(self, token_ids: torch.Tensor, batch: Any, kv_cache: torch.Tensor) -> torch.Tensor:
        return torch.zeros(len(token_ids), 1)

    def lm_head(self, hidden: torch.Tensor) -> torch.Tensor:
        return hidden

    def compute_logits(self, hidden: torch.Tensor) -> torch.Tensor:
        return self._logits[: len(hidden)].clone()


def empty_engine(rows: int, max_model_len: int, cpu: bool = False) -> LLMEngine:
    """An engine whose steps do nothing and sample random tokens that end nothing; on the CPU path, or a device's."""
    config = EngineConfig(
        attention_backend="torch" if cpu else "triton",
        max_num_seqs=rows,
        max_num_batched_tokens=rows * max_model_len,  # all prompts in one step, so that all rows are equally long
        max_model_len=max_model_len,
        enable_prefix_caching=False,
        kv_cache_memory=rows * (max_model_len + 16) * 2 * 16 * 4,
    )
    model: Any = Nothing(rows, max_model_len, CPU_VOCAB if cpu else VOCAB)
    engine = LLMEngine(model, device="cpu", config=config)
    runner: Any = engine.core.runner
    engine.scheduler.max_replays = REPLAYS
    if cpu:
        runner.launch_seconds = math.inf
        return engine
    runner.graphs.replay = lambda *args: None
    runner._sample_slots = lambda *args: None
    runner._results.zero_()
    runner._results[..., Result.TOKEN].random_(100, VOCAB)
    runner._results[..., Result.ACTIVE] = 1
    return engine


def measure(
    kind: str, rows: int, prompt_len: int, launches: int, *, cpu: bool = False, stream: bool = False
) -> dict[str, Any]:
    """Medians in seconds of PARTS and of a whole launch, over `launches` launches or so of `rows` rows of `kind`.

    They are seconds of the thread's own time.
    """
    ends, thinks = KINDS[kind]
    replays = 1 if stream or (ends and not cpu) else REPLAYS
    new_tokens = replays * (launches + 4)
    engine = empty_engine(rows, prompt_len + new_tokens + 1, cpu)
    prompt = [100] * prompt_len + [OPENED] * thinks
    budget = BUDGET if thinks else None
    params = SamplingParams(temperature=0, max_tokens=new_tokens, ignore_eos=not ends, thinking=budget)
    for number in range(rows):
        engine.add_request(str(number), prompt, params, stream=stream)
    clock = HostClock(engine, clock=time.thread_time)
    found: list[dict[str, Any]] = []
    while engine.has_unfinished_requests() and len(found) < launches + 1:
        row = clock.step()
        if row is not None and row["replays"] == replays:
            found.append(row)
    del found[0]  # it finds the results of prompts
    result: dict[str, Any] = {part: statistics.median(row[part] for row in found) for part in PARTS}
    result["seconds"] = statistics.median(sum(row[part] for part in PARTS) for row in found)
    return {"kind": kind, "rows": rows, "launches": len(found), "replays": replays} | result


def table(results: list[dict[str, Any]], floor: float | None = None) -> str:
    """Microseconds. floor: seconds that a GPU needs for a step at least."""
    head = f"{'rows':>5} {'kind':<19} {'steps':>5} " + " ".join(f"{part:>9}" for part in PARTS)
    lines = [f"{head} {'us/launch':>10} {'us/step':>9}" + (" of floor" if floor else "")]
    for row in results:
        step = row["seconds"] / row["replays"]
        parts = " ".join(f"{row[part] * 1e6:>9.0f}" for part in PARTS)
        line = f"{row['rows']:>5} {row['kind']:<19} {row['replays']:>5} {parts} {row['seconds'] * 1e6:>10.0f}"
        lines.append(f"{line} {step * 1e6:>9.0f}" + (f" {step / floor:>8.0%}" if floor else ""))
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EXAMPLE, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rows", type=int, default=256)
    parser.add_argument("--context", type=int, default=512, help="tokens of each row's prompt")
    parser.add_argument("--launches", type=int, default=60, help="measured of each kind")
    parser.add_argument("--cpu", action="store_true", help="the CPU path, not a GPU's")
    parser.add_argument("--stream", action="store_true", help="every request streams")
    parser.add_argument("--json", action="store_true", help="print one JSON object last")
    args = parser.parse_args()
    for name in ("rows", "context", "launches"):
        if getattr(args, name) < 1:
            parser.error(f"--{name} {getattr(args, name)}: must be at least 1")
    torch.set_num_threads(1)  # a thread that waits for another would count as busy
    results = [
        measure(kind, args.rows, args.context, args.launches, cpu=args.cpu, stream=args.stream) for kind in KINDS
    ]
    floor = None if args.cpu else step_seconds(shape_sizes(SHAPE), args.rows, args.rows * args.context, 2, H200)
    print(table(results, floor))
    if floor is not None:
        print(
            f"floor: {floor * 1e3:.2f} ms, of a step of {SHAPE} with {args.rows} rows of {args.context} tokens on an "
            f"H200 ({H200.bandwidth / 1e12:.1f} TB/s)"
        )
    if args.json:
        print(json.dumps({"rows": results, "floor_seconds": floor, "machine": machine.describe()}))


if __name__ == "__main__":
    main()
