"""GRPO with rollouts through this engine, for length control (L1, arXiv 2503.04697) or plain correctness.

    s1engine grpo --config FILE                                          # one process
    torchrun --nproc-per-node 8 -m s1engine.train.grpo --config FILE     # or the `deepspeed` launcher

A round: prompts, `group` rollouts of each, rewards, advantages within the group, optimizer steps, and the engine has
the new weights. It decodes with the very model that is trained, so nothing is copied but, on a CPU, the packed form of
the matrices. There training passes run the operators that decode: log-probabilities are the engine's to the last bit,
which is asserted for every token of every round in float32, and no pass over old log-probabilities is needed. Under
ZeRO 3 the engine has a copy instead (engine_weights.py), and how far the two differ is in the metrics.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from statistics import fmean
from typing import Any

import torch

from s1engine import LLM
from s1engine.models import CausalLM, load_model
from s1engine.train.checkpoints import Checkpoints, check_resumable
from s1engine.train.distributed import adamw, load_for_training, processes
from s1engine.train.engine_weights import EngineWeights
from s1engine.train.export import export
from s1engine.train.grpo_config import GrpoConfig
from s1engine.train.length_control import LengthControl
from s1engine.train.losses import LossStatistics, Totals
from s1engine.train.metrics import Metrics
from s1engine.train.packing import plan_rows
from s1engine.train.policy_rows import Bundle, PolicyLoss, bundles, count, pack_bundles
from s1engine.train.problems import Problem, hold_out, read_problems
from s1engine.train.rollouts import Group, Rollouts
from s1engine.train.sft import plain_gradient_norm
from s1engine.train.sft_config import deepspeed_config, read_settings


def train(
    config: GrpoConfig, problems: list[Problem], held_out: list[Problem], rank: int, ranks: int, device: torch.device
) -> None:
    """The whole run, on every rank. Goes on from the newest checkpoint in the output folder, where there is one."""
    import deepspeed
    from transformers import AutoTokenizer

    settings = deepspeed_config(config)
    torch.manual_seed(config.seed)
    tokenizer = AutoTokenizer.from_pretrained(config.model)
    model = load_for_training(config.model, config.dtype, device, settings)
    model.checkpointing = config.checkpointing
    reference = (
        load_model(config.model, dtype=config.dtype, device=device, packed=False) if config.kl_coefficient else None
    )
    unknown = invalid_ids(tokenizer, model).to(device)
    policy = PolicyLoss(model, config.losing, config.temperature, unknown, reference)
    optimizer = adamw(model, config, settings)
    engine, *_ = deepspeed.initialize(model=policy, optimizer=optimizer, config=settings)

    folder = Path(config.output)
    checkpoints = Checkpoints(folder / "checkpoints", config, engine, rank)
    done = checkpoints.restore()
    draws = int(checkpoints.state.get("draws", 0))
    weights = EngineWeights(model, config.model, config.dtype, device)
    parity = weights.shared and weights.packed
    llm = LLM(
        weights.model,
        tokenizer=tokenizer,
        max_num_seqs=config.max_num_seqs,
        deterministic=weights.packed,
        seed=config.seed,
    )
    weights.renew(llm)
    rollouts = Rollouts(config, llm, problems, folder / "rollouts", rank, ranks)
    rollouts.forget_after(done + 1)
    control = LengthControl(config, rollouts, held_out) if config.evaluate_every and rank == 0 else None

    with Metrics(folder, done, config.steps, enabled=rank == 0) as metrics:
        seconds: dict[str, float] = {}
        for step in range(done, config.steps):
            with timed(seconds, "rollouts"):
                kept, dropped, used = rollouts.step(step, draws)
            draws += used
            with timed(seconds, "updates"):
                llm.sleep()
                statistics, norms = update(engine, weights, kept, config, step, rank, ranks, device)
                check_parity(statistics, parity and config.dtype == "float32", step)
            with timed(seconds, "weights"):
                weights.renew(llm)
                llm.wake_up()
            last = step + 1 == config.steps
            metrics.step(
                {"step": step + 1, "draws": draws, **summary(kept, dropped), **statistics.report()}
                | {"grad_norm": fmean(norms) if norms else 0.0, "bytes_weights": weights.nbytes}
                | {f"seconds_{name}": round(value, 3) for name, value in seconds.items()},
                f"reward {mean_reward(kept):.3f}, {mean_length(kept):.0f} tokens",
            )
            if control is not None and (last or (step + 1) % config.evaluate_every == 0):
                metrics.note({"step": step + 1, **control.run()})
            seconds = {}
            # After the step's lines, which a run that is killed in between writes again; its time is in the next one.
            if last or (config.save_every and (step + 1) % config.save_every == 0):
                with timed(seconds, "checkpoint"):
                    checkpoints.save(step + 1, {"draws": draws})
    export(model, config.model, folder / "model", rank)


def update(
    engine: Any,
    weights: EngineWeights,
    groups: list[Group],
    config: GrpoConfig,
    step: int,
    rank: int,
    ranks: int,
    device: torch.device,
) -> tuple[LossStatistics, list[float]]:
    """The optimizer steps of a round, each on its share of the groups. Returns the first one's statistics and norms.

    Only of the first are the weights those that rolled out.
    """
    rate = config.learning_rate * min(1.0, (step + 1) / max(1, config.warmup))
    for group in engine.optimizer.param_groups:
        group["lr"] = rate
    first: LossStatistics | None = None
    norms = []
    for number in range(config.updates):
        samples = bundles(groups[number :: config.updates], config.row_tokens)
        totals = count(samples)
        if not totals.tokens:
            continue
        if number:
            weights.pack_again()
        statistics, norm = optimizer_step(engine, samples, totals, config, number == 0, rank, ranks, device)
        first = first or statistics
        norms.append(norm)
    return first or LossStatistics({"tokens": torch.zeros(())}, {}), norms


def optimizer_step(
    engine: Any,
    samples: list[Bundle],
    totals: Totals,
    config: GrpoConfig,
    first: bool,
    rank: int,
    ranks: int,
    device: torch.device,
) -> tuple[LossStatistics, float]:
    """One step on these samples, of which this rank takes its share."""
    plan = plan_rows([sample.length for sample in samples], config.row_tokens, ranks)
    statistics: LossStatistics | None = None
    for number, indices in enumerate(plan[rank]):
        engine.set_gradient_accumulation_boundary(number + 1 == len(plan[rank]))
        row = pack_bundles([samples[i] for i in indices]).to(device)
        loss, seen = engine(row, totals, first)
        engine.backward(loss * ranks)  # DeepSpeed takes the mean over ranks
        statistics = seen if statistics is None else statistics + seen
    assert statistics is not None
    norm = plain_gradient_norm(engine)
    engine.step()
    for name in sorted(statistics.sums):
        torch.distributed.all_reduce(statistics.sums[name])
    for name in sorted(statistics.maxima):
        torch.distributed.all_reduce(statistics.maxima[name], op=torch.distributed.ReduceOp.MAX)
    return statistics, float(engine.get_global_grad_norm()) if norm is None else norm


def check_parity(statistics: LossStatistics, promised: bool, step: int) -> None:
    """Raise where the trainer's log-probabilities are not the engine's, to the last bit, of every token."""
    unequal = int(statistics.sums.get("mismatch_unequal", torch.zeros(())))
    if promised and unequal:
        raise RuntimeError(
            f"step {step + 1}: {unequal} of {int(statistics.sums['tokens'])} log-probabilities differ between engine "
            "and trainer, which must be equal to the last bit here; please report this"
        )


def invalid_ids(tokenizer: Any, model: CausalLM) -> torch.Tensor:
    """Ids of the model's vocabulary that the tokenizer lacks; the engine never samples them."""
    known = set(tokenizer.get_vocab().values())
    return torch.tensor([i for i in range(model.config.vocab_size) if i not in known], dtype=torch.int64)


def summary(kept: list[Group], dropped: list[Group]) -> dict[str, Any]:
    """What the rollouts of a round were like."""
    everything = [rollout for group in (*kept, *dropped) for rollout in group.rollouts]
    graded = [rollout for rollout in everything if rollout.correct is not None]
    asked = [(group.target, r.length) for group in (*kept, *dropped) if group.target for r in group.rollouts]
    found: dict[str, Any] = {
        "groups": len(kept),
        "dropped_no_variance": sum(group.dropped == "no_variance" for group in dropped),
        "dropped_ungraded": sum(group.dropped == "ungraded" for group in dropped),
        "accuracy": round(fmean(bool(r.correct) for r in graded), 4) if graded else None,
        "reward": round(mean_reward((*kept, *dropped)), 4),
        "length": round(mean_length((*kept, *dropped)), 2),
        "cut": round(fmean(r.finish_reason == "length" for r in everything), 4),
    }
    if asked:
        found["deviation"] = round(fmean(abs(length - target) / target for target, length in asked), 4)
        found["correlation"] = correlation(asked)
    return found


def correlation(pairs: Sequence[tuple[float, float]]) -> float:
    """Of targets and lengths: 0 where the policy does not listen."""
    both = torch.tensor(pairs, dtype=torch.float64).T
    value = float(torch.corrcoef(both)[0, 1]) if both.std(1).min() > 0 else 0.0
    return round(value, 4)


def mean_reward(groups: Sequence[Group]) -> float:
    rewards = [rollout.reward for group in groups for rollout in group.rollouts if rollout.reward is not None]
    return fmean(rewards) if rewards else 0.0


def mean_length(groups: Sequence[Group]) -> float:
    return fmean([rollout.length for group in groups for rollout in group.rollouts] or [0])


@contextmanager
def timed(seconds: dict[str, float], name: str) -> Iterator[None]:
    begun = time.perf_counter()
    yield
    seconds[name] = seconds.get(name, 0.0) + time.perf_counter() - begun


def prepare(config: GrpoConfig) -> tuple[list[Problem], list[Problem]]:
    """(Problems to train on, held out). Raises ValueError for what is wrong, before a weight is loaded."""
    deepspeed_config(config)
    check_resumable(Path(config.output) / "checkpoints", config)
    found = read_problems(
        config.data,
        split=config.split if not Path(config.data).suffix else None,
        question_column=config.question_column or None,
        answer_column=config.answer_column,
        skip_unanswered=config.skip_unanswered,
    )
    if not config.hold_out:
        return found.problems, []
    return hold_out(found.problems, config.hold_out)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--config", type=Path, required=True, help="TOML file of settings, see grpo_config.py")
    parser.add_argument("--set", action="append", default=[], metavar="NAME=VALUE", help="change one of them")
    parser.add_argument("--local_rank", type=int, default=0, help=argparse.SUPPRESS)  # of the deepspeed launcher
    parser.epilog = "example: s1engine grpo --config train/configs/tiny-l1-exact.toml"


def run(args: argparse.Namespace) -> int:
    config = read_settings(GrpoConfig, args.config, args.set)
    problems, held_out = prepare(config)
    with processes() as (rank, ranks, device):
        if rank == 0:
            print(f"{len(problems)} problems, {len(held_out)} held out", file=sys.stderr)
        train(config, problems, held_out, rank, ranks, device)
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """For launchers, which start a module. Returns the exit status: 0, or 2 for input that cannot be used."""
    parser = argparse.ArgumentParser(prog="python -m s1engine.train.grpo", description=__doc__.partition("\n")[0])
    add_arguments(parser)
    try:
        return run(parser.parse_args(argv))
    except (ValueError, OSError) as error:
        print(f"s1engine grpo: error: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
