"""`s1engine bench peers`: its protocol, its turns, its figures, and what becomes of engines that fail.

Engines are scripted, a few lines of Python behind the same `serve.py` and with a clock of their own, and run by this
Python; s1engine and transformers run as they are, at a tiny shape.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import statistics
import subprocess
import sys
import time
import zipfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from s1engine.bench.peers import compare, making, processes, turns
from s1engine.bench.peers.engines import ENGINES, Engine, Environment, available
from s1engine.bench.peers.making import Failed
from s1engine.bench.peers.processes import Worker
from s1engine.bench.peers.turns import Case
from s1engine.bench.speed.floor import Rates, Sizes
from s1engine.bench.speed.shapes import SHAPES

TINY = {
    "architectures": ["Qwen2ForCausalLM"],
    "model_type": "qwen2",
    "hidden_act": "silu",
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "max_position_embeddings": 512,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 500,
    "tie_word_embeddings": True,
}

SCRIPT = """
import json, os, sys, threading, time
print("an engine talks while it is imported")
clock = [0.0]
time.perf_counter = lambda: clock[0]
{top}

def load(model, threads, cases, options):
    os.write(1, b"and past Python's own streams")
    {load}

    def generate(prompts, new_tokens):
        print("and at every call")
        with open({log!r}, "a") as log:
            log.write(json.dumps([{name!r}, prompts, new_tokens, time.monotonic()]) + chr(10))
        made = [[(sum(prompt) + i) % 500 for i in range(new_tokens)] for prompt in prompts]
        clock[0] += 0.5 + 0.25 * (new_tokens - 1)
        {generate}
        return made

    return generate, {{"script": "1.0"}}
"""


@pytest.fixture
def script(tmp_path: Path) -> Any:
    """script(name, …) makes an engine of that name; its calls go to tmp_path/calls, in the order of their ends."""

    def make(name: str, top: str = "", load: str = "pass", generate: str = "pass", **fields: Any) -> Engine:
        file = tmp_path / f"engine {name}.py"
        log = str(tmp_path / "calls")
        file.write_text(SCRIPT.format(name=name, top=top, load=load, generate=generate, log=log))
        return Engine(name=name, label=f"engine {name}", worker=str(file), **fields)

    return make


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Any]:
    """start(engine) is a loaded worker."""
    workers = []

    def make(engine: Engine) -> Worker:
        worker = Worker(Path(sys.executable), engine.worker, 1, {}, tmp_path / "log")
        workers.append(worker)
        worker.ask({"op": "load", "model": "", "threads": 1, "cases": [], "options": {}}, 60)
        return worker

    yield make
    for worker in workers:
        worker.close()


@pytest.fixture
def bench(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """bench(engines, …) runs the command on them, at a tiny shape, at rates that take no time to measure."""
    monkeypatch.setitem(SHAPES, "tiny", TINY)
    monkeypatch.setattr("s1engine.bench.speed.machine.read_bandwidth", lambda: 1e10)
    monkeypatch.setattr("s1engine.bench.speed.machine.matmul_rate", lambda dtype: 1e11)
    monkeypatch.setattr(turns, "QUIET_SECONDS", 0.01)
    threads = torch.get_num_threads()

    def run(engines: Sequence[Engine], *argv: str) -> int:
        monkeypatch.setattr(compare, "ENGINES", tuple(engines))
        parser = argparse.ArgumentParser()
        compare.add_arguments(parser)
        where = ["--models", str(tmp_path / "models"), "--venvs", str(tmp_path / "venvs")]
        size = ["--shape", "tiny", "--threads", "1", "--prompt-len", "12", "--new-tokens", "5"]
        return compare.run(parser.parse_args([*where, *size, *argv]))

    yield run
    torch.set_num_threads(threads)


def real(name: str) -> Engine:
    """s1engine or transformers, in this environment."""
    found = next(engine for engine in ENGINES if engine.name == name)
    return Engine(name=name, label=found.label, worker=found.worker)


def calls(folder: Path) -> list[Any]:
    return [json.loads(line) for line in (folder / "calls").read_text().splitlines()]


def test_table_json_and_plot_tell_the_same(
    bench: Any, script: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "out.json"
    twice = "clock[0] += 0.5 + 0.25 * (new_tokens - 1)"
    engines = [script("s1engine"), script("transformers", generate=twice), script("other", int8=True)]
    how = ["--batch", "1", "3", "--prefill", "20", "--repeats", "2", "--output", str(output), "--json"]
    assert bench(engines, *how) == 0
    lines = capsys.readouterr().out.splitlines()
    report = json.loads(lines[-1])
    assert report == json.loads(output.read_text())
    assert output.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
    assert [case["name"] for case in report["cases"]] == ["batch 1", "batch 3", "prefill 20"]
    assert [(row["case"], row["engine"]) for row in report["rows"]] == [
        (case, engine.name) for case in ("batch 1", "batch 3", "prefill 20") for engine in engines
    ]
    for row, line in zip(report["rows"], lines[1:], strict=False):
        assert line.startswith(row["case"]) and f"{row['tokens_per_second']:.1f}" in line
        assert report["engines"][row["engine"]]["label"] in line and f"{row['ratios']['s1engine']:.2f} x" in line
        slower = 2 if row["engine"] == "transformers" else 1
        expected = {"batch 1": 4.0, "batch 3": 12.0, "prefill 20": 40.0}[row["case"]] / slower
        assert row["turns"] == 2 and row["ratios"] == {"s1engine": slower}
        assert row["lowest"] == row["tokens_per_second"] == row["highest"] == expected
    floors = {case["name"]: case["floor"] for case in report["cases"]}
    assert all(row["share_of_floor"] == row["tokens_per_second"] / floors[row["case"]] for row in report["rows"])
    text = "\n".join(lines)
    assert "s1engine against the fastest of its weights' size: batch 1: 2.00 x engine transformers; batch 3: " in text
    assert report["engines"]["other"]["versions"]["script"] == "1.0" and report["notes"] == []


def test_tokens_are_compared_with_those_of_transformers(
    bench: Any, script: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    """s1engine's are equal, but for near ties in bfloat16; a script's are not."""
    engines = [real("s1engine"), script("odd"), real("transformers")]
    names = [engine.name for engine in engines]
    assert bench(engines, "--batch", "--prefill", "20", "--repeats", "1", "--engines", *names, "--json") == 0
    report = json.loads(capsys.readouterr().out.splitlines()[-1])
    found = report["engines"]
    assert int(found["s1engine"]["agreement"].split("/")[0]) >= 24 and found["transformers"]["agreement"] == "32/32"
    assert [note.split(",")[0] for note in report["notes"]] == [
        "WRONG TOKENS: engine odd: 0 of 32 are those of transformers"
    ]
    assert found["transformers"]["versions"]["torch"] == torch.__version__
    for entry in found.values():
        memory = entry["memory"]
        assert memory["imported"] > 0 and 0 < memory["anonymous"] <= memory["peak"] and memory["file_mapped"] > 0
    assert [row["engine"] for row in report["rows"]] == names


def test_turns_rotate_and_everybody_gets_the_same_prompts(bench: Any, script: Any, tmp_path: Path) -> None:
    names = ["a", "b", "c"]
    assert (
        bench([script(name) for name in names], "--batch", "2", "--prefill", "--repeats", "4", "--engines", *names) == 0
    )
    made = calls(tmp_path)
    check, made = made[:3], made[3:]
    assert [(name, len(prompts), new) for name, prompts, new, _ in check] == [(name, 8, 4) for name in names]
    warm_up, timed = made[:6], made[6:]
    assert [(name, new) for name, _, new, _ in warm_up] == [(name, new) for name in names for new in (1, 5)]
    expected = ["a", "b", "c", "b", "c", "a", "c", "a", "b", "a", "b", "c"]
    assert [(name, new) for name, _, new, _ in timed] == [(name, new) for name in expected for new in (1, 5)]
    prompts = [prompts for _, prompts, _, _ in timed]
    assert all(len(prompt) == 12 for some in prompts for prompt in some)
    assert all(some == prompts[6 * turn] for turn in range(4) for some in prompts[6 * turn : 6 * turn + 6])
    assert len({json.dumps(some) for some in [warm_up[0][1], *prompts]}) == 5


FAILURES = {
    "import": ({"top": "import no_such_engine"}, "ModuleNotFoundError: No module named 'no_such_engine'"),
    "load": ({"load": "raise RuntimeError('no such model')"}, "RuntimeError: no such model"),
    "death": ({"load": "os._exit(7)"}, "it ended with exit status 7: "),
    "late death": ({"generate": "if len(prompts) == 2: sys.stderr.write('alas'); os._exit(8)"}, "/ alas"),
    "raises": ({"generate": "if len(prompts) == 2: raise ValueError('too many')"}, "ValueError: too many"),
    "short": (
        {"generate": "made[-1].pop()"},
        "asked for 4 tokens of each of 8 prompts, it gave [4, 4, 4, 4, 4, 4, 4, 3]",
    ),
    "slow": ({"generate": "time.sleep(60)"}, "no answer to 'generate' in 4 s"),
}


def test_engines_that_fail_are_named_and_the_rest_goes_on(
    bench: Any, script: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for module in (compare, turns):
        monkeypatch.setattr(module, "CALL_TIMEOUT", 4.0)
    unmade = Environment(name="unmade", requirements=(str(tmp_path / "no-such.whl"),))
    engines = [script(name, **how) for name, (how, _) in FAILURES.items()]
    engines += [
        Engine(name="unmade", label="engine unmade", worker="", environment=unmade),
        Engine(name="s1engine-new", label="engine s1engine-new", worker="", options={"no_such_setting": 1}),
        script("good"),
    ]
    names = [engine.name for engine in engines]
    assert bench(engines, "--batch", "2", "--prefill", "--repeats", "2", "--engines", *names, "--json") == 0
    report = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert [row["engine"] for row in report["rows"]] == ["good"]
    reasons = {note.split(": ")[0].removeprefix("engine "): note for note in report["notes"]}
    for name, (_, reason) in FAILURES.items():
        assert reason in reasons[name], name
    assert "skipped: exit status 1 of " in reasons["unmade"] and "no-such.whl" in reasons["unmade"]
    assert reasons["s1engine-new"].endswith("skipped: this version of s1engine has no setting no_such_setting")


def test_without_ours_it_fails(bench: Any, script: Any) -> None:
    engines = [script("s1engine", load="raise RuntimeError"), script("other")]
    assert bench(engines, "--batch", "1", "--prefill", "--repeats", "1", "--engines", "s1engine", "other") == 1


def test_an_engine_that_spins_uses_nothing_between_its_turns(script: Any, start: Any) -> None:
    spin = "threading.Thread(target=lambda: [None for _ in iter(int, 1)], daemon=True).start()"
    turn = "begun = time.process_time()\n        while time.process_time() < begun + 0.1: time.sleep(0.01)"
    worker = start(script("spinner", load=spin, generate=turn))
    worker.generate([[1, 2]], 1, 60)
    used = worker.cpu_seconds()
    time.sleep(0.3)
    assert worker.cpu_seconds() <= used + 2 / processes.TICKS
    worker.generate([[1, 2]], 1, 60)
    assert worker.cpu_seconds() >= used + 0.08


def test_memory_is_split_and_its_peak_is_seen(script: Any, start: Any) -> None:
    hold = "kept = bytearray(b'x') * (100 << 20); time.sleep(0.5)"
    worker = start(script("eater", generate=hold))
    before = dict(worker.memory)
    worker.generate([[1]], 1, 60)
    grown = {name: worker.memory[name] - before[name] for name in before}
    assert (100 << 20) <= grown["anonymous"] < (120 << 20) and grown["file_mapped"] < (20 << 20)
    assert worker.memory["peak"] >= worker.memory["anonymous"]


def test_a_stopped_worker_dies_with_the_command(script: Any, tmp_path: Path) -> None:
    """However the command ends: else gigabytes would stay, stopped."""
    program = f"""
import os, signal, sys
from pathlib import Path
from s1engine.bench.peers.processes import Worker
worker = Worker(Path(sys.executable), {script("orphan").worker!r}, 1, {{}}, Path({str(tmp_path / "log")!r}))
worker.ask({{"op": "load", "model": "", "threads": 1, "cases": [], "options": {{}}}}, 60)
print(worker.pid, flush=True)
os.kill(os.getpid(), signal.SIGKILL)
"""
    ran = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert ran.returncode == -signal.SIGKILL
    state = Path(f"/proc/{int(ran.stdout)}/stat")
    deadline = time.monotonic() + 10
    while state.exists() and state.read_text().rpartition(")")[2].split()[0] != "Z":
        assert time.monotonic() < deadline, state.read_text()
        time.sleep(0.05)


def wheel(folder: Path, version: str) -> Path:
    """A package that needs no index: one module, `peer_stub`."""
    path = folder / f"peer_stub-{version}-py3-none-any.whl"
    info = f"peer_stub-{version}.dist-info"
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("peer_stub.py", f"VERSION = {version!r}")
        file.writestr(f"{info}/METADATA", f"Metadata-Version: 2.1\nName: peer-stub\nVersion: {version}\n")
        file.writestr(
            f"{info}/WHEEL", "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        file.writestr(f"{info}/RECORD", "")
    return path


def test_an_environment_is_made_once_for_a_recipe(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """With a converter and an engine that need what only it holds."""
    converter = tmp_path / "converter.py"
    converter.write_text(
        "import peer_stub, sys; open(sys.argv[2] + '/model', 'w').write(open(sys.argv[1]).read() + peer_stub.VERSION)"
    )
    model = tmp_path / "model"
    model.write_text("weights ")

    def prepare(version: str) -> tuple[Path, str]:
        environment = Environment(
            name="stub", requirements=(str(wheel(tmp_path, version)),), converter=str(converter), effort="seconds"
        )
        folder = making.make_environment(environment, tmp_path / "venvs")
        return folder, (making.convert(environment, folder, model, tmp_path / "models") / "model").read_text()

    folder, converted = prepare("1.0")
    assert converted == "weights 1.0" and any(line.startswith("peer-stub") for line in making.packages(folder))
    assert "making the environment of stub (seconds) in " in capsys.readouterr().err
    (folder / "mark").touch()
    assert prepare("1.0") == (folder, "weights 1.0") and (folder / "mark").exists()
    assert capsys.readouterr().err == ""


def test_what_was_not_finished_or_by_another_recipe_is_made_again(tmp_path: Path) -> None:
    def fails(folder: Path) -> None:
        (folder / "half").touch()
        raise Failed("no")

    with pytest.raises(Failed):
        making.once(tmp_path / "thing", {"a": 1}, "a thing", fails)
    made = making.once(tmp_path / "thing", {"a": 1}, "a thing", lambda folder: (folder / "whole").touch())
    assert sorted(path.name for path in made.iterdir()) == ["made-by.json", "whole"]
    making.once(tmp_path / "thing", {"a": 2}, "a thing", lambda folder: (folder / "other").touch())
    assert sorted(path.name for path in made.iterdir()) == ["made-by.json", "other"]


RATE = st.floats(0.1, 1e4)


@given(
    st.lists(st.tuples(RATE, st.dictionaries(st.sampled_from(["s1engine", "x", "y"]), RATE)), min_size=1, max_size=7)
)
def test_figures_are_medians_of_turns(drawn: list[tuple[float, dict[str, float]]]) -> None:
    case = Case(batch=2, prompt=3, new=4)
    taken = [{"floor": floor, "engines": {k: {"rate": v} for k, v in its.items()}} for floor, its in drawn]
    found = {row["engine"]: row for row in turns.rows(case, taken, ["s1engine"])}
    assert set(found) == {name for _, its in drawn for name in its}
    for name, row in found.items():
        its = [(floor, rates) for floor, rates in drawn if name in rates]
        assert row["turns"] == len(its) and row["case"] == "batch 2"
        assert row["tokens_per_second"] == statistics.median(rates[name] for _, rates in its)
        assert row["share_of_floor"] == statistics.median(rates[name] / floor for floor, rates in its)
        ratios = [rates["s1engine"] / rates[name] for _, rates in its if "s1engine" in rates]
        assert row["ratios"] == ({"s1engine": statistics.median(ratios)} if ratios else {})


@given(st.integers(1, 40), st.integers(1, 500), st.integers(2, 300), st.floats(0.01, 10), st.floats(0.001, 1))
def test_a_rate_counts_what_was_timed(batch: int, prompt: int, new: int, first: float, step: float) -> None:
    whole = first + (new - 1) * step
    assert Case(batch=batch, prompt=prompt, new=new).rate(first, whole) == pytest.approx(batch / step, rel=1e-6)
    assert Case(batch=batch, prompt=prompt, new=1).rate(first, first) == batch * prompt / first
    with pytest.raises(ValueError, match=f"{new} tokens took"):
        Case(batch=batch, prompt=prompt, new=new).rate(first, first)


def test_the_floor_reads_weights_and_cache_or_multiplies() -> None:
    """By hand, in bfloat16: a step of one row reads 1000 weights and 10 numbers a token; 64 rows multiply longer."""
    sizes = Sizes(weights=1000, body=800, kv=10, vocab=50)
    read = Rates(bandwidth=1e4, operations=1e30)
    step = sum(2 * (1000 + 10 * tokens) for tokens in (6, 7, 8)) / 1e4 / 3
    assert Case(batch=1, prompt=5, new=4).floor(sizes, read) == pytest.approx(1 / step)
    multiply = Rates(bandwidth=1e30, operations=1e6)
    assert Case(batch=64, prompt=5, new=4).floor(sizes, multiply) == pytest.approx(1e6 / 2000)
    assert Case(batch=1, prompt=64, new=1).floor(sizes, multiply) == pytest.approx(1e6 / 1600)


def test_everybody_goes_first_as_often() -> None:
    orders = [turns.rotated("abc", turn) for turn in range(6)]
    assert [order[0] for order in orders] == list("abcabc") and all(sorted(order) == list("abc") for order in orders)
    assert turns.rotated([], 3) == []


def test_agreement_ends_at_the_first_other_token() -> None:
    assert turns.leading([[1, 2, 3], [4, 9, 6], [9, 8, 9]], [[1, 2, 3], [4, 5, 6], [7, 8, 9]]) == 4


def test_int8_of_ours_waits_for_its_setting(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every other engine is there; and a setting that there is, is taken."""
    assert all(available(engine) for engine in ENGINES if engine.name != "s1engine-int8")
    assert available(Engine(name="s1engine-x", label="", worker="", options={"block_size": 32}))
    assert not available(Engine(name="s1engine-x", label="", worker="", options={"block_sizes": 32}))


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--threads", "0"], "--threads 0: must be at least 1"),
        (["--new-tokens", "1"], "--new-tokens 1: must be at least 2"),
        (["--batch", "4", "0"], "--batch 0: must be at least 1"),
        (["--batch", "--prefill"], "--batch and --prefill are both empty"),
        (["--output", "x.txt"], "--output x.txt: must end with .json"),
        (["--output", "no/such/folder/x.json"], "there is no folder no/such/folder"),
    ],
)
def test_arguments_that_cannot_be(bench: Any, argv: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        bench(ENGINES, *argv)


def test_every_engine_has_its_files_and_pins() -> None:
    for engine in ENGINES:
        assert (processes.WORKERS / engine.worker).is_file()
        if engine.environment is not None:
            assert all("==" in requirement for requirement in engine.environment.requirements)
            converter = engine.environment.converter
            assert converter is None or (processes.WORKERS / converter).is_file()
    assert len({engine.name for engine in ENGINES}) == len({engine.label for engine in ENGINES}) == len(ENGINES)
    assert os.path.isfile(processes.WORKERS / "serve.py")
