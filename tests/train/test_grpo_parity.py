"""Twenty steps of `s1engine grpo`: every log-probability that was learned from, computed again from what lies on disk.

The run's own count of unequal ones is not trusted: its rollouts are replayed with the weights of its checkpoints, by a
training pass of each response after a prompt of its own, by an engine that loads these weights as any model, and by
transformers in float64.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from conditions import needs_csrc
from grpo_runs import grpo, write_config
from torch import Tensor

from s1engine import LLM
from s1engine.kernels.logprobs import token_logprobs
from s1engine.models import CausalLM, load_model
from s1engine.models.batch import SampleBatch
from s1engine.models.layers import Linear
from s1engine.train.export import export
from s1engine.train.grpo import check_parity
from s1engine.train.grpo_config import GrpoConfig
from s1engine.train.losses import LossConfig, LossStatistics
from s1engine.train.policy_rows import PolicyLoss, bundles, count, pack_bundles
from s1engine.train.problems import read_problems
from s1engine.train.rollouts import Rollouts, read_groups
from s1engine.train.sft_config import read_settings
from s1engine.train.tiny import MODEL_DIR

pytest.importorskip("deepspeed", reason="training is an extra: pip install 's1engine[train]'")
pytestmark = needs_csrc

STEPS = 20


@dataclass(frozen=True)
class Run:
    """A finished run: its settings' file, and its metrics by step, from 1."""

    file: Path
    metrics: dict[int, dict[str, Any]]

    @property
    def config(self) -> GrpoConfig:
        return read_settings(GrpoConfig, self.file)

    @property
    def output(self) -> Path:
        return self.file.parent / "out"

    def journal(self, step: int) -> Path:
        return self.output / "rollouts" / f"step-{step}-rank-0.jsonl"

    def responses(self, step: int, kept_only: bool = False) -> list[tuple[list[int], dict[str, Any]]]:
        """(Prompt, rollout) of every response of a step."""
        groups = [json.loads(line) for line in self.journal(step).read_text().splitlines()]
        return [(g["prompt"], r) for g in groups if not (kept_only and g["dropped"]) for r in g["rollouts"]]

    def model_before(self, step: int) -> CausalLM:
        """With the weights that rolled out a step: plain matrices, without a packed form."""
        model = load_model(str(MODEL_DIR), dtype=self.config.dtype, packed=False)
        if step > 1:
            file = self.output / "checkpoints" / f"step-{step - 1}" / "mp_rank_00_model_states.pt"
            module = torch.load(file, weights_only=False)["module"]
            model.load_state_dict({name.removeprefix("model."): value for name, value in module.items()})
        return model


def run(folder: Path, **settings: Any) -> Run:
    file = write_config(folder, updates=1, max_num_seqs=16, **settings)
    return Run(file, {line["step"]: line for line in grpo(file)})


@pytest.fixture(scope="module")
def twenty(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Run]:
    made = run(tmp_path_factory.mktemp("float32"), steps=STEPS, keep=STEPS)
    yield made
    shutil.rmtree(made.output / "checkpoints")  # 200 MB


def replayed(model: CausalLM, responses: list[tuple[list[int], dict[str, Any]]]) -> Tensor:
    """float32 [N], of every token of the responses, in their order: one training pass by the engine's operators."""
    lengths = [len(prompt) + len(rollout["token_ids"]) for prompt, rollout in responses]
    starts = [0, *torch.tensor(lengths).cumsum(0).tolist()]
    positions = torch.cat([torch.arange(length) for length in lengths])
    rows = torch.cat(
        [
            torch.arange(start + len(prompt) - 1, end - 1)
            for (prompt, _), start, end in zip(responses, starts, starts[1:], strict=False)
        ]
    )
    ids = torch.tensor([token for prompt, rollout in responses for token in prompt + rollout["token_ids"]])
    with torch.no_grad():
        hidden = model(ids, SampleBatch(positions, torch.tensor(starts, dtype=torch.int32), starts), None)[rows]
        return token_logprobs(model.compute_logits(hidden), ids[rows + 1], 0)[0]


def recorded(responses: list[tuple[list[int], dict[str, Any]]], name: str) -> Tensor:
    return torch.tensor([value for _, rollout in responses for value in rollout[name]])


def trainers_view(found: Run, model: CausalLM, step: int) -> LossStatistics:
    """The trainer's statistics of a step's rollouts under this model, in one row."""
    samples = bundles([group for group in read_groups(found.journal(step)) if not group.dropped], 100_000)
    policy = PolicyLoss(model, LossConfig(), found.config.temperature, torch.tensor([], dtype=torch.int64))
    return policy(pack_bundles(samples), count(samples), True)[1]


def test_the_weights_move(twenty: Run) -> None:
    steps = [twenty.metrics[step] for step in range(1, STEPS + 1)]
    assert all(step["grad_norm"] > 0 and step["mismatch_unequal"] == 0 for step in steps)
    assert len({step["loss"] for step in steps}) == STEPS


def test_every_log_probability_is_the_engines_to_the_last_bit(twenty: Run) -> None:
    """Those of tokens and groups that are not learned from as well; and the weights before would not do."""
    unequal = tokens = stale = 0
    before: CausalLM | None = None
    for step in range(1, STEPS + 1):
        learned = int(recorded(twenty.responses(step, kept_only=True), "learned").sum())
        assert twenty.metrics[step]["tokens"] == learned  # the run has left none out
        responses = twenty.responses(step)
        want = recorded(responses, "logprobs")
        model = twenty.model_before(step)
        model.pack_beside()
        unequal += int((replayed(model, responses) != want).sum())
        if before is not None:
            stale += int((replayed(before, responses) != want).sum())
        tokens += len(want)
        before = model
    assert unequal == 0 and tokens > 10_000 and stale > tokens / 2


@pytest.mark.parametrize("step", [1, 11, STEPS])
def test_an_engine_that_loads_the_weights_makes_the_same_rollouts(twenty: Run, step: int, tmp_path: Path) -> None:
    """And, of a later step, the first weights others."""

    def made(model: str, folder: str) -> list[tuple[list[int], list[float]]]:
        config = twenty.config
        llm = LLM(model, max_num_seqs=config.max_num_seqs, deterministic=True, seed=config.seed)
        problems = read_problems(config.data, answer_column=config.answer_column).problems
        rollouts = Rollouts(config, llm, problems, tmp_path / folder, 0, 1)
        kept, dropped, _ = rollouts.step(step - 1, twenty.metrics[step - 1]["draws"] if step > 1 else 0)
        groups = sorted((*kept, *dropped), key=lambda group: group.draw)
        return [(rollout.token_ids, rollout.logprobs) for group in groups for rollout in group.rollouts]

    export(twenty.model_before(step), str(MODEL_DIR), tmp_path / "model", 0)
    want = [(rollout["token_ids"], rollout["logprobs"]) for _, rollout in twenty.responses(step)]
    assert made(str(tmp_path / "model"), "again") == want
    if step > 1:
        assert made(str(MODEL_DIR), "first")[: len(want)] != want


@pytest.mark.parametrize("step", [1, STEPS])
def test_transformers_agrees(twenty: Run, step: int, tmp_path: Path) -> None:
    export(twenty.model_before(step), str(MODEL_DIR), tmp_path / "model", 0)
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype=torch.float64)
    responses = twenty.responses(step)
    found = []
    for prompt, rollout in responses:
        ids = torch.tensor([prompt + rollout["token_ids"]])
        with torch.no_grad():
            every = model(ids).logits[0, len(prompt) - 1 : -1].log_softmax(1)
        found.append(every.gather(1, ids[0, len(prompt) :, None]).squeeze(1))
    apart = (torch.cat(found) - recorded(responses, "logprobs")).abs()
    assert apart.mean() < 1e-6 and apart.max() < 4e-5  # transformers' own in float32: 2e-7 and 7e-6


def test_one_bit_of_one_weight_stops_a_run(twenty: Run) -> None:
    """Of the packed form alone, as if an update had not reached it."""
    model = twenty.model_before(STEPS)
    model.pack_beside()
    check_parity(trainers_view(twenty, model, STEPS), True, STEPS - 1)
    storage = next(module.packed for module in model.layers.modules() if isinstance(module, Linear)).storage.view(-1)
    weight = storage[int(storage.abs().argmax())]
    weight.copy_(weight.nextafter(torch.tensor(torch.inf)))
    found = trainers_view(twenty, model, STEPS)
    check_parity(found, False, STEPS - 1)
    with pytest.raises(RuntimeError, match=f"step {STEPS}: .* log-probabilities differ between engine and trainer"):
        check_parity(found, True, STEPS - 1)


def test_in_bfloat16_the_mismatch_is_reported(tmp_path: Path) -> None:
    """As it is computed again from the rollouts on disk. (It is 0 where these lines were written.)"""
    found = run(tmp_path, dtype="bfloat16", steps=3, keep=3)
    for step in (1, 2, 3):
        responses = found.responses(step, kept_only=True)
        model = found.model_before(step)
        model.pack_beside()
        learned = recorded(responses, "learned")
        mismatch = (replayed(model, responses) - recorded(responses, "logprobs"))[learned].double()
        want = {
            "mismatch": mismatch.abs().mean(),
            "mismatch_max": mismatch.abs().max(),
            "mismatch_k3": ((-mismatch).exp() - 1 + mismatch).mean(),
            "mismatch_unequal": (mismatch != 0).double().mean(),
        }
        assert found.metrics[step]["grad_norm"] > 0 and found.metrics[step]["tokens"] == len(mismatch)
        for name, value in want.items():
            assert found.metrics[step][name] == pytest.approx(float(value), rel=1e-3, abs=1e-9), name


def test_without_the_operators_a_run_reports_its_mismatch_and_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("S1ENGINE_DISABLE_CSRC", "1")
    found = run(tmp_path, dtype="bfloat16", steps=2)
    assert sorted(found.metrics) == [1, 2]
    for step in found.metrics.values():
        assert 0 < step["mismatch"] < step["mismatch_max"] < 0.5 and 0 < step["mismatch_unequal"] <= 1
        assert 0 < step["mismatch_k3"] < step["mismatch_max"]
