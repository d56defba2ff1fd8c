"""`s1engine bench throughput` and the host's costs: workloads, floors, engines that take turns, ratios."""

from __future__ import annotations

import argparse
import json
import random
from pathlib import Path
from typing import Any

import pytest

from s1engine.bench.speed import host, ours, peers, throughput
from s1engine.bench.speed.floor import Rates, Sizes, run_seconds, shape_sizes
from s1engine.bench.speed.shapes import SHAPES, make_model
from s1engine.bench.speed.workloads import nano, uniform
from s1engine.thinking import Machine

TINY = SHAPES["qwen3-0.6b"] | {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "vocab_size": 10240,
}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("tiny")
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(SHAPES, "tiny", TINY)
        return str(make_model("tiny", folder))


@pytest.fixture
def rates(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rates that take no time to measure."""
    monkeypatch.setattr("s1engine.bench.speed.machine.read_bandwidth", lambda device: 1e10)
    monkeypatch.setattr("s1engine.bench.speed.machine.matmul_rate", lambda dtype, device: 1e11)


def arguments(*argv: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    throughput.add_arguments(parser)
    return parser.parse_args(["--device", "cpu", "--dtype", "float32", *argv])


def test_nano_is_the_workload_of_nano_vllm() -> None:
    """As its bench.py draws it, with the module's own generator."""
    state = random.getstate()
    random.seed(0)
    prompts = [[random.randint(0, 10000) for _ in range(random.randint(100, 1024))] for _ in range(256)]
    new_tokens = [random.randint(100, 1024) for _ in range(256)]
    random.setstate(state)
    workload = nano()
    assert workload.prompts == prompts and workload.new_tokens == new_tokens and workload.temperature == 0.6
    assert (sum(map(len, workload.prompts)), workload.total_new) == (142_827, 133_966)
    part = nano(0.25)
    assert part.prompts == prompts[:64] and part.new_tokens == new_tokens[:64]


def test_the_floor_of_nano_on_an_h200() -> None:
    sizes, lengths = shape_sizes("qwen3-0.6b"), nano().lengths
    assert sizes.kv * 2 == 114_688
    rates = Rates(bandwidth=4.8e12, operations=1e30)
    seconds = run_seconds(sizes, lengths, 2, rates)
    assert seconds == pytest.approx(3.14, abs=0.005)
    # Request by request rather than step by step: keys and values of p + 1, …, p + n - 1 tokens; weights 1,024 times.
    contexts = sum(p * (n - 1) + n * (n - 1) // 2 for p, n in lengths)
    assert max(n for _, n in lengths) == 1024
    assert seconds == pytest.approx((contexts * 114_688 + 1024 * sizes.weights * 2) / 4.8e12)
    # With a real rate of products the prompts take time as well, and decoding does not.
    prompts = 2 * sizes.body * 142_827 / 8e14 - sizes.weights * 2 / 4.8e12
    assert run_seconds(sizes, lengths, 2, Rates(bandwidth=4.8e12, operations=8e14)) == pytest.approx(seconds + prompts)


def test_the_floor_of_a_slow_processor_is_arithmetic() -> None:
    """3 rows, 5 tokens in, 4 out: the body for 15 tokens, then three steps of all weights for three rows."""
    sizes = Sizes(weights=1000, body=600, kv=8, vocab=10)
    lengths = uniform(3, 5, 4, vocab=10, seed=0).lengths
    seconds = run_seconds(sizes, lengths, 4, Rates(bandwidth=1e30, operations=100))
    assert seconds == pytest.approx((2 * 600 * 15 + 3 * 2 * 1000 * 3) / 100)


def test_thinking_under_the_budget_never_ends() -> None:
    machine = Machine(ours.FORMAT, ours.BUDGET, [50, ours.OPENED])
    for token in (60, ours.END, ours.OPENED, 70, ours.END, ours.END):
        machine.step(token)
    assert machine.thinking_tokens == len(machine.output) == 6


@pytest.mark.usefixtures("rates")
def test_variations_and_both_peers_take_turns(model: str, capsys: pytest.CaptureFixture[str]) -> None:
    sizes = ["--batch", "1", "3", "--prompt-len", "7", "--new-tokens", "9", "--repeats", "3"]
    how = ["--attention-backend", "triton", "--budget", "--deterministic", "--peer", "generate", "continuous"]
    assert throughput.run(arguments("--model", model, *sizes, *how, "--json")) == 0
    *table, last = capsys.readouterr().out.splitlines()
    report = json.loads(last)
    names = ["s1engine", "s1engine, budget", "s1engine, deterministic", "transformers", "transformers CB"]
    assert [(row["batch"], row["engine"]) for row in report["rows"]] == [(b, name) for b in (1, 3) for name in names]
    for row in report["rows"]:
        assert len(row["seconds"]) == 3 and row["milliseconds_per_step"] == 1000 * sorted(row["seconds"])[1] / 9
        assert row["tokens_per_second"] == row["batch"] * 9 / sorted(row["seconds"])[1]
        own = next(r["seconds"] for r in report["rows"] if (r["batch"], r["engine"]) == (row["batch"], "s1engine"))
        turns = sorted(other / mine for mine, other in zip(own, row["seconds"], strict=True))
        assert row["s1engine_speedup"] == turns[1]
        is_variation = row["engine"].startswith("s1engine, ")
        line = (
            f"batch {row['batch']}: speed with {row['engine'].removeprefix('s1engine, ')} / without: {1 / turns[1]:.3f}"
        )
        assert (line in table) == is_variation
    memory = report["memory"]
    assert [row["phase"] for row in memory["rows"]] == ["load", "run"]
    assert memory["kv_bytes"] == 3 * (7 + 9) * 2 * 2 * 16 * 4  # keys and values, two heads of 16, float32
    assert sum(line.startswith(("memory, peak", "load ", "run ")) for line in table) == 3


@pytest.mark.usefixtures("rates")
def test_a_part_of_nano(model: str) -> None:
    report = throughput.measure(arguments("--model", model, "--workload", "nano", "--scale", "0.004", "--repeats", "1"))
    rows = report["rows"]
    assert [(row["batch"], row["engine"]) for row in rows] == [(1, "s1engine"), (1, "transformers")]
    assert rows[0]["tokens_per_second"] * rows[0]["seconds"][0] == pytest.approx(nano().new_tokens[0])


@pytest.mark.usefixtures("rates")
@pytest.mark.parametrize("peer", ["generate", "continuous"])
def test_a_slow_peer_is_given_up(model: str, peer: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not in its warm-up, where it has a token to make, but in its first turn."""
    real = peers.PEERS[peer].__call__

    def slow(self: Any, workload: Any) -> None:
        self._limit = 1e-3 if max(workload.new_tokens) > 2 else None
        real(self, workload)

    monkeypatch.setattr(peers.PEERS[peer], "__call__", slow)
    sizes = ["--batch", "2", "--prompt-len", "5", "--new-tokens", "400", "--repeats", "2"]
    report = throughput.measure(arguments("--model", model, *sizes, "--peer", peer))
    assert [row["engine"] for row in report["rows"]] == ["s1engine"]
    assert len(report["rows"][0]["seconds"]) == 2
    assert any("TooSlow" in note for note in report["notes"])


@pytest.mark.usefixtures("rates")
def test_a_peer_that_cannot_be_loaded_costs_nothing_else(model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: Any) -> None:
        raise RuntimeError("no such attention")

    monkeypatch.setattr(peers.Continuous, "__init__", fail)
    sizes = ["--batch", "1", "--prompt-len", "5", "--new-tokens", "3", "--repeats", "1"]
    report = throughput.measure(arguments("--model", model, *sizes, "--peer", "continuous"))
    assert [row["engine"] for row in report["rows"]] == ["s1engine"]
    assert report["notes"] == ["transformers, continuous: RuntimeError: no such attention"]


@pytest.mark.usefixtures("rates")
def test_turns_end_at_the_time_limit(model: str) -> None:
    seen: list[int] = []
    sizes = ["--batch", "1", "--prompt-len", "5", "--new-tokens", "3", "--repeats", "50", "--time-limit", "0.001"]
    report = throughput.measure(
        arguments("--model", model, *sizes, "--no-peer"),
        lambda report: seen.append(len(report["rows"][0]["seconds"]) if report["rows"] else 0),
    )
    assert seen == [0, 1] and len(report["rows"][0]["seconds"]) == 1


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--batch", "0"], "--batch 0: must be at least 1"),
        (["--new-tokens", "0"], "--new-tokens 0: must be at least 1"),
        (["--scale", "1.5"], r"--scale 1.5: must be above 0 and at most 1"),
    ],
)
def test_arguments_are_checked(argv: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        throughput.measure(arguments(*argv))


def test_nano_needs_its_token_ids(make_model: Any, rates: None) -> None:
    folder: Path = make_model("qwen2")
    with pytest.raises(ValueError, match="its token ids go to 10000, the vocabulary has 1000"):
        throughput.measure(arguments("--model", str(folder), "--workload", "nano"))


@pytest.mark.parametrize("kind", list(host.KINDS))
def test_the_host_is_timed_alone(kind: str) -> None:
    row = host.measure(kind, rows=5, prompt_len=20, launches=4)
    assert row["replays"] == (1 if host.KINDS[kind][0] else 8)
    assert row["rows"] == 5 and row["launches"] >= 3
    assert all(row[part] > 0 for part in host.PARTS)
    assert row["seconds"] >= max(row[part] for part in host.PARTS)
    step = row["seconds"] / row["replays"] * 1e6
    assert host.table([row]).splitlines()[1].split()[-1] == f"{step:.0f}"
