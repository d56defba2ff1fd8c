"""Trains the tiny reasoner from nothing and writes its Hugging Face folder: the one command of this package.

    python -m s1engine.train.tiny.train

Needs no data and no network: problems and traces are drawn as training goes. Questions get no loss, since they are
random digits; neither do tokens that the engine writes.
"""

import argparse
import json
import random
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from tqdm import tqdm
from transformers import GenerationConfig, PreTrainedTokenizerBase, Qwen2Config, Qwen2ForCausalLM

from s1engine.train.tiny import MODEL_DIR
from s1engine.train.tiny.task import MAX_STEPS, MIN_STEPS, draw, problems
from s1engine.train.tiny.tokenizer import MAX_LENGTH, build_tokenizer
from s1engine.train.tiny.traces import Role, Trace, write_trace
from s1engine.train.tiny.validate import curves

RECHECK_WEIGHT = 3.0
"""Weight in the loss of the token that says what to do after "Wait", which is one in fifty."""

POOL = 512
"""Traces drawn at a time and sorted by length, so that a batch holds little padding."""


@dataclass(frozen=True)
class Batch:
    """`ids`, `targets`, `roles`: int64 [traces, positions]; position t predicts `targets[:, t]`."""

    ids: torch.Tensor
    targets: torch.Tensor
    roles: torch.Tensor


def build_model(tokenizer: PreTrainedTokenizerBase) -> Qwen2ForCausalLM:
    """A Qwen2 of 0.8M parameters with random weights."""
    config = Qwen2Config(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=MAX_LENGTH,
        tie_word_embeddings=True,
        # 0.02 is meant for widths of thousands; at this one it starts the layers almost silent.
        initializer_range=0.06,
        use_cache=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    model = Qwen2ForCausalLM(config)
    model.generation_config = GenerationConfig(
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id, do_sample=True, temperature=1.0
    )
    return model


def max_steps_at(progress: float) -> int:
    """The curriculum: the longest chain. It stays short for the first tenth of training and is full from a third on."""
    shortest = MIN_STEPS + 1
    return min(MAX_STEPS, shortest + max(0, int((MAX_STEPS - shortest + 1) * (progress - 0.1) / 0.23)))


def batches(tokenizer: PreTrainedTokenizerBase, steps: int, batch_tokens: int, seed: int) -> Iterator[Batch]:
    """`steps` batches of at most `batch_tokens` tokens each, padding included."""
    rng = random.Random(seed)
    vocab = {tokenizer.decode([i]): i for i in range(len(tokenizer))}
    made = 0
    while made < steps:
        longest = max_steps_at(made / steps)
        pool = sorted((write_trace(draw(rng, "train", longest), rng) for _ in range(POOL)), key=lambda t: len(t.tokens))
        groups: list[list[Trace]] = [[]]
        for trace in pool:
            if (len(groups[-1]) + 1) * len(trace.tokens) > batch_tokens:
                groups.append([])
            groups[-1].append(trace)
        rng.shuffle(groups)
        for group in groups[: steps - made]:
            width = max(len(t.tokens) for t in group)
            ids = torch.full((len(group), width), tokenizer.pad_token_id)
            targets, roles = ids.clone(), torch.zeros_like(ids)
            for row, t in enumerate(group):
                n = len(t.tokens)
                ids[row, :n] = torch.tensor([vocab[x] for x in t.tokens])
                targets[row, :n] = torch.tensor([vocab[x] for x in t.targets])
                roles[row, :n] = torch.tensor(t.roles)
            yield Batch(ids[:, :-1].contiguous(), targets[:, 1:].contiguous(), roles[:, 1:].contiguous())
        made += len(groups)


def learning_rate(step: int, steps: int, peak: float) -> float:
    """Warm-up over 2% of training, flat, then a linear fall to 2% of the peak over its last 40%."""
    progress = step / steps
    return peak * min((step + 1) / (0.02 * steps), 1.0, 0.02 + 0.98 * (1 - progress) / 0.4)


class Tally:
    """Share of tokens predicted rightly (the likeliest one is the target), by role, since it was last read."""

    ROLES = (Role.RESULT, Role.RECHECK, Role.MEND, Role.ANSWER)

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        self.seen, self.right = dict.fromkeys(self.ROLES, 0), dict.fromkeys(self.ROLES, 0)

    def add(self, roles: torch.Tensor, hits: torch.Tensor) -> None:
        """`roles`, `hits`: [tokens], integer and boolean."""
        for role in self.ROLES:
            self.seen[role] += int((roles == role).sum())
            self.right[role] += int(hits[roles == role].sum())

    def read(self) -> dict[str, float]:
        shares = {r.name.lower(): round(self.right[r] / self.seen[r], 3) for r in self.ROLES if self.seen[r]}
        self.reset()
        return shares


def weighted_loss(model: Qwen2ForCausalLM, batch: Batch, tally: Tally) -> torch.Tensor:
    """Mean cross-entropy of the tokens that are learned, a scalar."""
    learned = batch.roles != Role.GIVEN
    targets, roles = batch.targets[learned], batch.roles[learned]
    # The head runs on learned positions only: a third of all are the question's.
    logits = model.lm_head(model.model(batch.ids, use_cache=False).last_hidden_state[learned])
    tally.add(roles, logits.argmax(-1) == targets)
    weights = torch.where((roles == Role.RECHECK) | (roles == Role.MEND), RECHECK_WEIGHT, 1.0)
    return (F.cross_entropy(logits, targets, reduction="none") * weights).sum() / weights.sum()


def build_optimizer(model: Qwen2ForCausalLM) -> torch.optim.AdamW:
    """AdamW that lets only matrices decay."""
    matrices = [p for p in model.parameters() if p.ndim == 2]
    vectors = [p for p in model.parameters() if p.ndim != 2]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, betas=(0.9, 0.98))


def train(arguments: argparse.Namespace) -> None:
    """Runs the whole training. The folder is written at every save, so an interrupted run leaves a usable model."""
    torch.manual_seed(arguments.seed)
    torch.set_num_threads(arguments.threads)
    tokenizer = build_tokenizer()
    model = build_model(tokenizer)
    optimizer = build_optimizer(model)
    validation = problems("validation", arguments.validation_problems)
    arguments.out.mkdir(parents=True, exist_ok=True)
    tokenizer.save_pretrained(arguments.out)
    started, tokens, tally = time.monotonic(), 0, Tally()
    shares: dict[str, float] = {}
    bar = tqdm(batches(tokenizer, arguments.steps, arguments.batch_tokens, arguments.seed), total=arguments.steps)
    for step, batch in enumerate(bar, start=1):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step - 1, arguments.steps, arguments.lr)
        loss = weighted_loss(model, batch, tally)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        tokens += batch.ids.numel()
        if step % 50 == 0:
            shares, seconds = tally.read(), time.monotonic() - started
            bar.set_postfix(loss=f"{loss.item():.3f}", **shares, tokens_per_s=int(tokens / seconds))
        if step % arguments.save_every == 0 or step == arguments.steps:
            model.save_pretrained(arguments.out)
            by_cap, by_wait = curves(model, tokenizer, validation, temperature=1.0)
            record = {
                "step": step,
                "tokens": tokens,
                "minutes": round((time.monotonic() - started) / 60, 1),
                "loss": round(loss.item(), 4),
                "token_accuracy": shares,
                "accuracy_by_cap": {k: round(v.accuracy, 3) for k, v in by_cap.items()},
                "accuracy_by_ignored_ends": {k: round(v.accuracy, 3) for k, v in by_wait.items()},
            }
            tqdm.write(json.dumps(record))


def positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{value} is not a positive integer")
    return value


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m s1engine.train.tiny.train",
        description="Train the tiny reasoner from nothing and write its Hugging Face folder. Half an hour on one core.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--out", type=Path, default=MODEL_DIR, help="folder to write")
    parser.add_argument("--steps", type=positive, default=7000, help="optimizer steps")
    parser.add_argument("--batch-tokens", type=positive, default=2048, help="tokens per step, padding included")
    parser.add_argument("--lr", type=float, default=2e-3, help="peak learning rate")
    parser.add_argument("--seed", type=int, default=1, help="of weights and data")
    # One, since two threads wait for each other: with anything else running they are slower than one.
    parser.add_argument("--threads", type=positive, default=1, help="CPU threads; more only on an idle machine")
    parser.add_argument("--save-every", type=positive, default=1000, help="steps between saves, each with a validation")
    parser.add_argument("--validation-problems", type=positive, default=100, help="problems per validated budget")
    return parser.parse_args(argv)


if __name__ == "__main__":
    train(parse())
