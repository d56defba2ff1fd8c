"""Output tokens per second, beside transformers' `generate` and the machine's floor, interleaved in one run.

Both engines load the same folder and get the same token ids: `batch` prompts of `prompt_len` tokens, `new_tokens`
each, greedy, EOS ignored. Times include prefill. They take turns, and the ratio is taken turn by turn, since a shared
machine's speed drifts.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from s1engine import LLM, SamplingParams
from s1engine.bench.speed import machine
from s1engine.bench.speed.shapes import SHAPES, make_model

EXAMPLE = "example: s1engine bench throughput --shape qwen2.5-0.5b --batch 1 32 --repeats 3"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description, parser.epilog = __doc__, EXAMPLE
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    source = parser.add_mutually_exclusive_group()
    source.add_argument("--model", help="a model folder or hub id")
    source.add_argument(
        "--shape", choices=sorted(SHAPES), default="qwen2.5-0.5b", help="random weights at a real shape"
    )
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="bfloat16")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 32], help="prompts at a time")
    parser.add_argument("--prompt-len", type=int, default=128, help="tokens a prompt")
    parser.add_argument("--new-tokens", type=int, default=128, help="tokens generated per prompt")
    parser.add_argument("--repeats", type=int, default=3, help="turns of each engine")
    parser.add_argument("--no-peer", action="store_true", help="do not run transformers")
    parser.add_argument("--json", action="store_true", help="print one JSON object last")


def run(args: argparse.Namespace) -> int:
    if args.model:
        return _run(args, args.model)
    with tempfile.TemporaryDirectory() as folder:
        print(f"writing random weights of {args.shape} …", file=sys.stderr)
        return _run(args, str(make_model(args.shape, Path(folder), getattr(torch, args.dtype))))


def _run(args: argparse.Namespace, model: str) -> int:
    dtype = getattr(torch, args.dtype)
    bandwidth, rate = machine.read_bandwidth(), machine.matmul_rate(dtype)
    engines: dict[str, Callable[[list[list[int]], int], Any]] = {}
    memory: dict[str, int] = {}
    for name in ("s1engine",) if args.no_peer else ("s1engine", "transformers"):
        before = machine.resident_memory()
        engines[name] = _ours(model, args) if name == "s1engine" else _transformers(model, dtype)
        memory[name] = machine.resident_memory() - before
    shape = _shape(model)
    generator = torch.Generator().manual_seed(0)
    rows = []
    for batch in args.batch:
        times: dict[str, list[float]] = {name: [] for name in engines}
        for engine in engines.values():
            engine(_prompts(generator, batch, args.prompt_len, shape), 2)  # warm-up
        for turn in range(args.repeats):
            prompts = _prompts(generator, batch, args.prompt_len, shape)
            order = list(engines.items())
            for name, engine in order if turn % 2 == 0 else order[::-1]:
                start = time.perf_counter()
                engine(prompts, args.new_tokens)
                times[name].append(time.perf_counter() - start)
                print(f"batch {batch}, turn {turn + 1}/{args.repeats}: {name} {times[name][-1]:.2f} s", file=sys.stderr)
        floor = floor_seconds(shape, batch, args.prompt_len, args.new_tokens, dtype, bandwidth, rate)
        for name in engines:
            seconds = statistics.median(times[name])
            ratios = [other / own for own, other in zip(times["s1engine"], times[name], strict=True)]
            rows.append(
                {
                    "batch": batch,
                    "engine": name,
                    "tokens_per_second": batch * args.new_tokens / seconds,
                    "share_of_floor": floor / seconds,
                    "s1engine_speedup": statistics.median(ratios),
                    "seconds": times[name],
                }
            )
    print(f"{'batch':>5} {'engine':<13} {'tok/s':>8} {'of floor':>9} {'s1engine is':>12}")
    for row in rows:
        print(
            f"{row['batch']:>5} {row['engine']:<13} {row['tokens_per_second']:>8.1f} {row['share_of_floor']:>8.0%} "
            f"{row['s1engine_speedup']:>10.2f} x"
        )
    print(
        f"floor: weights and KV cache read at {bandwidth / 1e9:.1f} GB/s, operations at {rate / 1e9:.0f} GFLOP/s, both "
        "measured just before"
    )
    print("in memory after loading: " + ", ".join(f"{name} {size / 2**20:.0f} MiB" for name, size in memory.items()))
    if args.json:
        report = {
            "rows": rows,
            "read_bytes_per_second": bandwidth,
            "operations_per_second": rate,
            "args": {k: v for k, v in vars(args).items() if k != "run"},
        }
        report |= {"machine": machine.describe(), "loaded_bytes": memory}
        print(json.dumps(report, default=str))
    return 0


def floor_seconds(
    shape: dict[str, int], batch: int, prompt: int, new: int, dtype: torch.dtype, bandwidth: float, rate: float
) -> float:
    """Least time for the whole run: each step reads the weights and the KV cache, and multiplies by the weights."""
    prefill = max(shape["weights"] * dtype.itemsize / bandwidth, 2 * shape["body"] * batch * prompt / rate)
    seconds = prefill
    for position in range(prompt + 1, prompt + new):
        num_bytes = (shape["weights"] + batch * position * shape["kv"]) * dtype.itemsize
        seconds += max(num_bytes / bandwidth, 2 * shape["weights"] * batch / rate)
    return seconds


def _shape(model: str) -> dict[str, int]:
    """Numbers of weights read in a step, of those outside the LM head, of KV values per token, and the vocabulary."""
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.from_pretrained(model)
    with torch.device("meta"):
        net = AutoModelForCausalLM.from_config(config)
    head = config.vocab_size * config.hidden_size
    total = sum(p.numel() for p in net.parameters())
    body = total - head - (0 if config.tie_word_embeddings else head)
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    kv = 2 * config.num_hidden_layers * config.num_key_value_heads * head_dim
    return {"weights": body + head, "body": body, "kv": kv, "vocab": config.vocab_size}


def _prompts(generator: torch.Generator, batch: int, length: int, shape: dict[str, int]) -> list[list[int]]:
    return torch.randint(0, min(shape["vocab"], 100_000), (batch, length), generator=generator).tolist()


def _ours(model: str, args: argparse.Namespace) -> Callable[[list[list[int]], int], Any]:
    longest = args.prompt_len + args.new_tokens
    llm = LLM(model, dtype=args.dtype, max_model_len=longest, max_num_seqs=max(args.batch), enable_prefix_caching=False)

    def generate(prompts: list[list[int]], new_tokens: int) -> Any:
        params = SamplingParams(temperature=0, max_tokens=new_tokens, ignore_eos=True)
        outputs = llm.generate(prompts, params, use_tqdm=False)
        assert all(len(o.outputs[0].token_ids) == new_tokens for o in outputs)
        return outputs

    return generate


def _transformers(model: str, dtype: torch.dtype) -> Callable[[list[list[int]], int], Any]:
    from transformers import AutoModelForCausalLM

    net = AutoModelForCausalLM.from_pretrained(model, dtype=dtype).eval()

    def generate(prompts: list[list[int]], new_tokens: int) -> Any:
        ids = torch.tensor(prompts)
        with torch.inference_mode():
            return net.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=new_tokens,
                min_new_tokens=new_tokens,
                do_sample=False,
                pad_token_id=0,
            )

    return generate
