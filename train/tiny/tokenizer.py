"""The model's tokenizer: byte-level BPE, so that text round-trips, with one token for each piece of the task.

It is a Qwen2 tokenizer with another vocabulary: `AutoTokenizer` gives a model of type `qwen2` that class, and with it
Qwen2's way of splitting text, whatever `tokenizer.json` says. Merges stay inside words, so digits, operators,
colons and newlines are tokens of their own wherever they stand, and a text that is continued where a token ends, by
"Wait" say, has the same tokens as the whole text encoded at once.
"""

from tokenizers import pre_tokenizers
from transformers import Qwen2Tokenizer

WORDS = ("system", "user", "assistant", "think", "answer", "Final", "Answer", "Wait", "ok")
END_OF_TEXT, IM_START, IM_END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
MAX_LENGTH = 1024

CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n<|im_start|>think{% endif %}"
)


def build_tokenizer() -> Qwen2Tokenizer:
    """The tokenizer, made of nothing but the words above: no corpus is needed."""
    tokens = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges: list[tuple[str, str]] = []
    for word in WORDS:
        # Each merge glues the next character to the word's prefix. A merge at the word's start ranks before those
        # that need its result, so every word ends as one token.
        for end in range(1, len(word)):
            pair = (word[:end], word[end])
            if pair not in merges:
                merges.append(pair)
                tokens.append(word[: end + 1])
    return Qwen2Tokenizer(
        vocab={token: i for i, token in enumerate([*tokens, END_OF_TEXT, IM_START, IM_END])},
        merges=merges,  # type: ignore[arg-type]  # pairs are what the BPE model behind it takes
        unk_token=END_OF_TEXT,
        pad_token=END_OF_TEXT,
        eos_token=IM_END,
        additional_special_tokens=[IM_START],
        clean_up_tokenization_spaces=False,
        model_max_length=MAX_LENGTH,
        chat_template=CHAT_TEMPLATE,
    )
