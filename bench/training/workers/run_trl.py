"""Trains with TRL's SFTTrainer in its own environment, and writes each step's seconds, tokens and loss."""

import json
import sys
import time
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
from trl import SFTConfig, SFTTrainer

options = json.loads(sys.argv[1])
rows = [json.loads(line) for line in Path(options["data"]).read_text().splitlines()]
dtype = getattr(torch, options["dtype"])
model = AutoModelForCausalLM.from_pretrained(options["model"], dtype=dtype, attn_implementation="sdpa")
seconds: list[float] = []
losses: list[float] = []


class Clock(TrainerCallback):
    """Times whole optimizer steps."""

    def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
        self.begun = time.perf_counter()

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        seconds.append(time.perf_counter() - self.begun)

    def on_log(self, *args: Any, **kwargs: Any) -> None:
        if "loss" in kwargs["logs"]:
            losses.append(float(kwargs["logs"]["loss"]))


trainer = SFTTrainer(
    model=model,
    processing_class=AutoTokenizer.from_pretrained(options["model"]),
    train_dataset=Dataset.from_list([{"input_ids": row["input_ids"]} for row in rows]),
    callbacks=[Clock()],
    args=SFTConfig(
        output_dir=str(Path(options["output"]).parent / "trl"),
        per_device_train_batch_size=options["micro_batch"],
        gradient_accumulation_steps=options["batch"] // options["micro_batch"],
        padding_free=options["padding_free"],
        max_length=None,  # all samples are shorter
        num_train_epochs=1,
        learning_rate=1e-5,
        lr_scheduler_type="cosine",
        weight_decay=1e-4,
        bf16=options["dtype"] == "bfloat16",
        use_cpu=True,
        gradient_checkpointing=False,
        train_sampling_strategy="sequential",
        save_strategy="no",
        report_to=[],
        logging_steps=1,
    ),
)
trainer.train()
lengths = [len(row["input_ids"]) for row in rows]
tokens = [sum(lengths[i : i + options["batch"]]) for i in range(0, len(lengths), options["batch"])]
Path(options["output"]).write_text(json.dumps({"seconds": seconds, "tokens": tokens, "losses": losses}))
