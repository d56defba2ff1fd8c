"""Trains with TRL's GRPOTrainer in its own environment, and writes each round's seconds, lengths and tokens."""

import json
import re
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
from trl import GRPOConfig, GRPOTrainer

options = json.loads(sys.argv[1])
rows = [json.loads(line) for line in Path(options["data"]).read_text().splitlines()]
ANSWER = re.compile(r"(?:\\boxed\{|Answer: )(-?\d+)")


class Rounds(TrainerCallback):
    """Times whole rounds and the parts of them that `watch` is told of, and counts the tokens of forward passes."""

    def __init__(self) -> None:
        self.rounds: list[dict[str, Any]] = []
        self.now: dict[str, Any] = {}

    def watch(self, owner: Any, method: str, phase: Callable[[], str]) -> None:
        inner = getattr(owner, method)

        def timed(*args: Any, **kwargs: Any) -> Any:
            name, begun = phase(), time.perf_counter()
            found = inner(*args, **kwargs)
            self.now["seconds"][name] = self.now["seconds"].get(name, 0.0) + time.perf_counter() - begun
            if name == "generation":
                self.now["prompts"] = [len(ids) for ids in args[0]][:: options["group"]]
                lengths = [len(ids) for ids in found[0]]
                self.now["responses"] = [
                    lengths[i : i + options["group"]] for i in range(0, len(lengths), options["group"])
                ]
            return found

        setattr(owner, method, timed)

    def count(self, module: Any, args: Any, kwargs: dict[str, Any]) -> None:
        ids = kwargs["input_ids"] if kwargs.get("input_ids") is not None else args[0]
        self.now["computed"]["updates" if torch.is_grad_enabled() else "rollouts"] += ids.numel()

    def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
        self.now = {"seconds": {}, "computed": {"rollouts": 0, "updates": 0}}
        self.begun = time.perf_counter()

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        self.now["seconds"]["whole"] = time.perf_counter() - self.begun
        self.rounds.append(self.now)

    def on_log(self, *args: Any, **kwargs: Any) -> None:
        if "grad_norm" in kwargs["logs"]:
            self.rounds[-1]["grad_norm"] = float(kwargs["logs"]["grad_norm"])


def reward(completions: list[Any], completion_ids: list[list[int]], answer: list[str], **_: Any) -> list[float]:
    """Right or wrong, and DAPO's penalty of the length over the whole range."""
    room = options["max_response"] - 1
    found = []
    for completion, ids, wanted in zip(completions, completion_ids, answer, strict=True):
        answers = ANSWER.findall(completion[0]["content"])
        right = bool(answers) and answers[-1] == wanted
        found.append(right + 0.5 * min(0.0, max(-1.0, (1 - len(ids)) / room)))
    return found


rollouts = options["prompts"] * options["group"]
model = AutoModelForCausalLM.from_pretrained(
    options["model"], dtype=getattr(torch, options["weights"]), attn_implementation="sdpa"
)
rounds = Rounds()
trainer = GRPOTrainer(
    model=model,
    processing_class=AutoTokenizer.from_pretrained(options["model"]),
    train_dataset=Dataset.from_list(
        [{"prompt": [{"role": "user", "content": row["problem"]}], "answer": row["answer"]} for row in rows]
    ),
    reward_funcs=reward,
    callbacks=[rounds],
    args=GRPOConfig(
        output_dir=str(Path(options["output"]).parent / "trl"),
        per_device_train_batch_size=options["micro_batch"],
        gradient_accumulation_steps=rollouts // options["micro_batch"],  # and so steps_per_generation
        num_generations=options["group"],
        max_completion_length=options["max_response"],
        temperature=1.0,
        loss_type="dapo",
        beta=0.0,
        num_iterations=1,
        max_steps=options["rounds"],
        learning_rate=options["learning_rate"],
        lr_scheduler_type="constant",
        max_grad_norm=1.0,
        bf16=options["autocast"],
        use_cpu=True,
        gradient_checkpointing=False,
        shuffle_dataset=False,
        save_strategy="no",
        report_to=[],
        logging_steps=1,
    ),
)
rounds.watch(trainer, "_generate_single_turn", lambda: "generation")
rounds.watch(trainer, "_calculate_rewards", lambda: "rewards")
rounds.watch(trainer, "_generate_and_score_completions", lambda: "rollouts")
# Passes over old log-probabilities run without gradients.
rounds.watch(
    trainer, "_get_per_token_logps_and_entropies", lambda: "forward" if torch.is_grad_enabled() else "logprobs"
)
model.model.register_forward_pre_hook(rounds.count, with_kwargs=True)
trainer.train()
Path(options["output"]).write_text(json.dumps(rounds.rounds))
