"""`s1engine sft`: fine-tuning on reasoning traces with DeepSpeed.

    torchrun --nproc-per-node 8 -m s1engine.train.sft --config s1-32b.toml
    deepspeed --module s1engine.train.sft --config s1-32b.toml
    s1engine sft --config tiny.toml                              one process

- The model is the engine's own: one forward over packed rows, so what is trained is what decodes.
- A step is `batch_size` samples, packed without padding into rows of at most `row_tokens`, one row a micro-batch.
- The loss is the sum over all tokens that are learned, divided by their weight in the whole step: how samples fall into
  rows, micro-batches and ranks changes nothing but the order of sums.
- All that a step does is a function of its number and the state that checkpoints hold, so a killed run goes on with the
  same losses to the last bit.
"""

from __future__ import annotations

import argparse
import math
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from s1engine.models import CausalLM
from s1engine.models.batch import SampleBatch
from s1engine.train.checkpoints import Checkpoints, check_resumable
from s1engine.train.distributed import adamw, load_for_training, processes
from s1engine.train.examples import Example, Examples, read_examples
from s1engine.train.export import export
from s1engine.train.flops import peak_flops, training_flops
from s1engine.train.memory_plan import print_plan
from s1engine.train.metrics import Metrics
from s1engine.train.packing import PackedRow, pack, plan_rows, step_samples, steps_per_epoch
from s1engine.train.rows import Columns
from s1engine.train.sft_config import SftConfig, deepspeed_config, learning_rate, read_config
from s1engine.train.validation import Validation, read_questions


class RowLoss(nn.Module):
    """What DeepSpeed wraps: the weighted sum of a row's cross-entropies, times `scale`."""

    def __init__(self, model: CausalLM) -> None:
        super().__init__()
        self.model = model

    def forward(self, row: PackedRow, scale: float) -> Tensor:
        batch = SampleBatch(row.positions, row.sequence_start, row.sequence_start.tolist())
        hidden = self.model(row.token_ids, batch, None)
        return self.model.lm_head(hidden, row.targets, row.weights * scale)


def train(config: SftConfig, examples: Examples, tokenizer: Any, rank: int, ranks: int, device: torch.device) -> None:
    """The whole run, on every rank. Goes on from the newest checkpoint in the output folder, where there is one."""
    import deepspeed

    settings = deepspeed_config(config)
    torch.manual_seed(config.seed)
    model = load_for_training(config.model, config.dtype, device, settings)
    model.checkpointing, model.offloading = config.checkpointing, config.offload_layers
    optimizer = adamw(model, config, settings)
    engine, *_ = deepspeed.initialize(model=RowLoss(model), optimizer=optimizer, config=settings)

    folder = Path(config.output)
    steps = steps_per_epoch(len(examples.examples), config.batch_size) * config.epochs
    checkpoints = Checkpoints(folder / "checkpoints", config, engine, rank)
    done = checkpoints.restore()
    peak = peak_flops(device, model.config.dtype)
    validation = (
        Validation(config, model, tokenizer, settings["zero_optimization"].get("stage", 0), rank)
        if config.validate_every
        else None
    )
    with Metrics(folder, done, steps, enabled=rank == 0) as metrics:
        for step in range(done, steps):
            begun = time.perf_counter()
            samples = [examples.examples[i] for i in step_samples(
                len(examples.examples), config.batch_size, config.seed, step, config.shuffle
            )]  # fmt: skip
            rate = learning_rate(config, step, steps)
            for group in engine.optimizer.param_groups:
                group["lr"] = rate
            loss, norm = optimizer_step(engine, samples, config.row_tokens, rank, ranks, device)
            if not (math.isfinite(loss) and math.isfinite(norm)):
                raise ValueError(
                    f"step {step + 1}: the loss is {loss}, the gradient's norm {norm}. Nothing of it was saved; lower "
                    f"learning_rate={config.learning_rate}, or look into these samples. The same command goes on from "
                    f"the newest checkpoint"
                )
            seconds = time.perf_counter() - begun
            lengths = [len(sample.token_ids) for sample in samples]
            speed = training_flops(model.config, lengths) / seconds / ranks
            metrics.step(
                {
                    "step": step + 1,
                    "epoch": round((step + 1) * config.epochs / steps, 4),
                    "loss": loss,
                    "learning_rate": rate,
                    "grad_norm": norm,
                    "tokens": sum(lengths),
                    "tokens_per_second": round(sum(lengths) / seconds, 1),
                    "share_of_peak_flops": None if peak is None else round(speed / peak, 4),
                    "seconds": round(seconds, 4),
                },
                f"loss {loss:.4f}, {sum(lengths) / seconds:,.0f} tokens/s",
            )
            last = step + 1 == steps
            if validation is not None and (last or (step + 1) % config.validate_every == 0):
                metrics.note({"step": step + 1, **validation.run()})
            # After the step's lines, which a run that is killed in between writes again.
            if last or (config.save_every and (step + 1) % config.save_every == 0):
                checkpoints.save(step + 1)
    export(model, config.model, folder / "model", rank)


def optimizer_step(
    engine: Any, samples: Sequence[Example], row_tokens: int, rank: int, ranks: int, device: torch.device
) -> tuple[float, float]:
    """One step on these samples, of which this rank takes its share.

    Returns the loss, the weighted mean over all of their learned tokens, and the norm of its gradient before clipping.
    """
    plan = plan_rows([len(sample.token_ids) for sample in samples], row_tokens, ranks)
    total = float(sum(sample.weights.sum(dtype="float64") for sample in samples))
    own = torch.zeros((), dtype=torch.float64, device=device)
    for number, indices in enumerate(plan[rank]):
        engine.set_gradient_accumulation_boundary(number + 1 == len(plan[rank]))
        # DeepSpeed takes the mean over ranks, so each gives `ranks` times its share.
        loss = engine(on_device(pack([samples[i] for i in indices]), device), ranks / total)
        engine.backward(loss)
        own += loss.detach()
    norm = plain_gradient_norm(engine)
    engine.step()
    torch.distributed.all_reduce(own)
    return float(own) / ranks, float(engine.get_global_grad_norm()) if norm is None else norm


def plain_gradient_norm(engine: Any) -> float | None:
    """Where DeepSpeed computes none: float32 without ZeRO, whose gradients lie on every rank before the step."""
    if engine.zero_optimization_stage() or engine.bfloat16_enabled():
        return None
    return float(nn.utils.get_total_norm(p.grad for p in engine.module.parameters() if p.grad is not None))


def on_device(row: PackedRow, device: torch.device) -> PackedRow:
    return PackedRow(**{name: value.to(device, non_blocking=True) for name, value in vars(row).items()})


def prepare(config: SftConfig) -> tuple[Examples, Any]:
    """(Samples, tokenizer). Raises ValueError for what is wrong with settings and data, before a weight is loaded."""
    from transformers import AutoTokenizer

    from s1engine.models import resolve_model_path
    from s1engine.models.config import read_config as read_model_config

    deepspeed_config(config)
    check_resumable(Path(config.output) / "checkpoints", config)
    folder = resolve_model_path(config.model)
    positions = read_model_config(folder, config.dtype).max_position_embeddings
    if config.max_tokens > positions:
        raise ValueError(f"max_tokens={config.max_tokens}: {config.model} has {positions} positions; lower it")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    hub = not Path(config.data).suffix
    try:
        columns = Columns(**config.columns)
    except TypeError as error:
        raise ValueError(f"columns={config.columns}: {error}") from error
    examples = read_examples(
        config.data,
        tokenizer,
        config.template,
        config.max_tokens,
        columns=columns,
        split=config.split if hub else None,
        progress=os.environ.get("RANK", "0") == "0",
    )
    if config.validate_every:
        read_questions(config)
    return examples, tokenizer


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--config", type=Path, required=True, help="TOML file of settings, see sft_config.py")
    parser.add_argument("--set", action="append", default=[], metavar="NAME=VALUE", help="change one of them")
    parser.add_argument("--dry-run", action="store_true", help="say what the run needs, without loading a weight")
    parser.add_argument("--ranks", type=int, default=8, help="of the dry run: number of devices")
    parser.add_argument("--local_rank", type=int, default=0, help=argparse.SUPPRESS)  # of the deepspeed launcher
    parser.epilog = "example: torchrun --nproc-per-node 8 -m s1engine.train.sft --config train/configs/s1-32b.toml"


def run(args: argparse.Namespace) -> int:
    config = read_config(args.config, args.set)
    if args.dry_run:
        print_plan(config, args.ranks)
        return 0
    examples, tokenizer = prepare(config)
    with processes() as (rank, ranks, device):
        if rank == 0:
            dropped = "".join(f"; dropped {count} {reason}" for reason, count in examples.dropped.items())
            print(f"{len(examples.examples)} samples, {sum(examples.lengths)} tokens{dropped}", file=sys.stderr)
        train(config, examples, tokenizer, rank, ranks, device)
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """For launchers, which start a module. Returns the exit status: 0, or 2 for input that cannot be used."""
    parser = argparse.ArgumentParser(prog="python -m s1engine.train.sft", description=__doc__.partition("\n")[0])
    add_arguments(parser)
    try:
        return run(parser.parse_args(argv))
    except (ValueError, OSError) as error:
        print(f"s1engine sft: error: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
