"""Random models with a tokenizer of their own, small enough to run thousands of requests."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

SPECIAL = ["<|im_start|>", "<|im_end|>"]
ADDED = ["<think>", "</think>"]
CORPUS = [
    "Wait, let me think again. The answer is 42.\n\nFinal Answer: 7\n",
    "user assistant system answer think Hmm so that is it\n",
    "naïve café 数学の問題 🙂🙃 Ωμέγα\n",
]


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level BPE of 400 tokens: every text has a code, and most characters outside ASCII take several tokens."""
    raw = Tokenizer(models.BPE())
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=390, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False
    )
    raw.train_from_iterator(CORPUS * 8, trainer)
    raw.add_tokens(ADDED)
    template = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    template += "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    return PreTrainedTokenizerFast(tokenizer_object=raw, eos_token="<|im_end|>", chat_template=template)


@pytest.fixture(scope="session")
def model_folder(make_model: Callable[..., Path], tokenizer: PreTrainedTokenizerFast) -> Callable[..., Path]:
    """Makes a folder with a small random model and the tokenizer; the vocabulary has more rows than the tokenizer."""

    def make(arch: str = "qwen2", **config: Any) -> Path:
        settings = {"vocab_size": 416, "max_position_embeddings": 512, "eos_token_id": None, "bos_token_id": None}
        folder = make_model(arch, **settings | config)
        tokenizer.save_pretrained(folder)
        return folder

    return make
