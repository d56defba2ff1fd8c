"""Problems and a tokenizer under which any model writes responses of one length, half of them right."""

from __future__ import annotations

import json
import random
from pathlib import Path

from tokenizers import Tokenizer
from tokenizers.decoders import ByteLevel
from tokenizers.models import BPE
from transformers import PreTrainedTokenizerFast

END = "<end>"
LETTERS = "abcdefghijklmnop"  # the first tokens; what problems are made of
TEMPLATE = "{{ messages[0]['content'] }}"


def text_of(token: int) -> str:
    """A letter, or a box of the token's last bit. A grader reads the last box, so the last token decides."""
    return LETTERS[token] if token < len(LETTERS) else f"w{token}\\boxed{{{token % 2}}}"


def write_endless(folder: Path) -> None:
    """Give the model in the folder a tokenizer that reads letters alone, and an end of text beyond its vocabulary."""
    path = folder / "config.json"
    config = json.loads(path.read_text())
    size = config["vocab_size"]
    path.write_text(json.dumps(config | {"eos_token_id": size}, indent=1))
    (folder / "generation_config.json").write_text(json.dumps({"do_sample": True, "eos_token_id": size}))
    for file in ("chat_template.jinja", "tokenizer.json", "tokenizer_config.json"):
        (folder / file).unlink(missing_ok=True)
    # Byte pairs without a merge: what AutoTokenizer makes of a file for this kind of model.
    letters = Tokenizer(BPE({text_of(token): token for token in range(size)} | {END: size}, []))
    letters.decoder = ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=letters, eos_token=END, chat_template=TEMPLATE).save_pretrained(folder)


def write_problems(path: Path, count: int, tokens: int, seed: int = 0) -> None:
    """Problems of so many tokens of that tokenizer, with the answers 0 and 1."""
    numbers = random.Random(seed)
    with path.open("w", encoding="utf-8") as file:
        for index in range(count):
            question = "".join(numbers.choices(LETTERS, k=tokens))
            file.write(json.dumps({"problem": question, "answer": str(index % 2)}) + "\n")
