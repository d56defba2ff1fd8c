"""What is learned of a row: the s1 text token for token, and the tokenizer's own chat templates."""

import json
from typing import Any

import numpy as np
import pytest
from conditions import data_folder
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from s1engine.train.rows import Columns, Row
from s1engine.train.templates import ChatTemplate, Encoded, S1Template, learns_to_stop
from s1engine.train.tiny.tokenizer import build_tokenizer

MARKED = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' }}"
    "{% if message['role'] == 'assistant' %}{% generation %}{{ message['content'] }}<|im_end|>{% endgeneration %}"
    "{% else %}{{ message['content'] }}<|im_end|>{% endif %}{{ '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
TURNS = [
    {"role": "user", "content": "1 a:+5"},
    {"role": "assistant", "content": "think 6"},
    {"role": "user", "content": "2 a:+5"},
    {"role": "assistant", "content": "answer 7"},
]


def real(name: str) -> Any:
    return AutoTokenizer.from_pretrained(data_folder() / "tokenizers" / name)


@pytest.fixture(scope="module")
def qwen() -> Any:
    return real("qwen2")


@pytest.fixture(scope="module")
def deepseek() -> Any:
    return real("deepseek-r1-distill-qwen")


def bytes_only() -> PreTrainedTokenizerFast:
    """A tokenizer without any special token."""
    vocab = {character: i for i, character in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


def s1(tokenizer: Any, question: str, thinking: str | list[str], attempt: str) -> Encoded:
    template = S1Template(tokenizer, Columns())
    row = Row("here", {"question": question, "thinking_trajectories": thinking, "attempt": attempt})
    return template.encode([template.render(row)])[0]


def chat(tokenizer: Any, cells: dict[str, Any], columns: Columns | None = None) -> Encoded:
    template = ChatTemplate(tokenizer, columns or Columns())
    return template.encode([template.render(Row("here", cells))])[0]


def authors_text(tokenizer: Any, question: str, thinking: list[str], attempt: str) -> str:
    """What `process_cot_example` of the s1 authors makes of a row (data/tokenization.py), by the chat template."""
    answer = "Answer: " + attempt if "Answer:" not in attempt else attempt
    content = "<|im_start|>think\n" + "\n".join(thinking).strip() + "\n<|im_start|>answer\n" + answer.strip()
    messages = [{"role": "user", "content": question}, {"role": "assistant", "content": content}]
    return str(tokenizer.apply_chat_template(messages, tokenize=False))


def trl_labels(tokenizer: Any, ids: list[int]) -> np.ndarray:
    """The mask of TRL's `DataCollatorForCompletionOnlyLM` for one turn: all that follows the response template."""
    response = tokenizer.encode("<|im_start|>assistant\n", add_special_tokens=False)
    start = next(i for i in range(len(ids)) if ids[i : i + len(response)] == response) + len(response)
    return np.arange(len(ids)) >= start


def check_s1(tokenizer: Any, question: str, thinking: list[str], attempt: str) -> None:
    encoded = s1(tokenizer, question, thinking, attempt)
    text = authors_text(tokenizer, question, thinking, attempt)
    ids = tokenizer.encode(text, add_special_tokens=False)
    assert encoded.token_ids.tolist() == ids
    assert encoded.learned.tolist() == trl_labels(tokenizer, ids).tolist()
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": question}], add_generation_prompt=True, return_dict=False
    )
    assert encoded.token_ids[~encoded.learned].tolist() == prompt


@pytest.mark.parametrize(
    ("question", "thinking", "attempt"),
    [
        ("1+1?", ["It is 2."], "2"),
        ("1+1?\n", ["\n\nOne.\n\nTwo.\n\n"], "\n\nSo:\n\n\\boxed{2}\n"),
        ("  {x} is {0}?", ["a\r\n", "b"], "Answer: {y}"),
        ("naïve é 数 🙂", ["don't  stop\t"], "The answer is **2**.\n\nAnswer: 2  "),
    ],
)
def test_s1_is_the_text_of_its_authors(qwen: Any, question: str, thinking: list[str], attempt: str) -> None:
    check_s1(qwen, question, thinking, attempt)


WORDS = st.text(max_size=30).filter(lambda text: text.strip() and "<|" not in text)


@given(question=WORDS, thinking=WORDS, attempt=WORDS)
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_s1_of_any_text(qwen: Any, question: str, thinking: str, attempt: str) -> None:
    check_s1(qwen, question, [thinking], attempt)


def test_s1_of_real_rows(qwen: Any) -> None:
    path = data_folder() / "train" / "s1k_traces5.jsonl"
    for line in path.read_text().splitlines():
        row = json.loads(line)
        check_s1(qwen, row["problem"], [row["thinking"]], row["attempt"])


def test_s1_learns_from_the_header_to_the_last_newline() -> None:
    """On the shipped tokenizer, whose ids are read back as text."""
    tokenizer = build_tokenizer()
    encoded = s1(tokenizer, "1 a:+5", "a:1+5=6", "6")
    assert tokenizer.decode(encoded.token_ids[encoded.learned]) == (
        "<|im_start|>think\na:1+5=6\n<|im_start|>answer\nAnswer: 6<|im_end|>\n"
    )
    assert tokenizer.decode(encoded.token_ids[~encoded.learned]).endswith("1 a:+5<|im_end|>\n<|im_start|>assistant\n")
    assert learns_to_stop(encoded, tokenizer.eos_token_id)
    # Inference seeds the prompt up to `think`: the model is asked to write the newline, and nothing before that.
    seed = tokenizer.encode("<|im_start|>think\n")
    start = int(encoded.learned.argmax())
    assert encoded.token_ids[start : start + 3].tolist() == seed and len(seed) == 3


def test_answer_is_announced_once() -> None:
    tokenizer = build_tokenizer()
    for attempt in ("6", "it is\nAnswer: 6"):
        assert tokenizer.decode(s1(tokenizer, "1", "2", attempt).token_ids).count("Answer:") == 1


def test_tokenizers_without_the_control_tokens_are_refused(deepseek: Any) -> None:
    for tokenizer in (deepseek, bytes_only()):
        with pytest.raises(ValueError, match=r"no token <\|im_start\|> and no token <\|im_end\|>.*template 'chat'"):
            S1Template(tokenizer, Columns())


@pytest.mark.parametrize("token", ["<|im_start|>", "<|im_end|>"])
def test_control_tokens_in_a_text_are_refused(token: str) -> None:
    for cells in (("a" + token, "b", "c"), ("a", token + "b", "c"), ("a", "b", f"c{token}c")):
        with pytest.raises(ValueError, match=r"here, .*control token <\|im_"):
            s1(build_tokenizer(), *cells)


def test_chat_by_prefix_learns_the_last_turn(qwen: Any) -> None:
    encoded = chat(qwen, {"messages": TURNS})
    assert encoded.token_ids.tolist() == qwen.apply_chat_template(TURNS, return_dict=False)
    assert qwen.decode(encoded.token_ids[encoded.learned]) == "answer 7<|im_end|>\n"
    prompt = qwen.apply_chat_template(TURNS[:-1], add_generation_prompt=True, return_dict=False)
    assert encoded.token_ids[~encoded.learned].tolist() == prompt
    assert learns_to_stop(encoded, qwen.eos_token_id)


def test_chat_of_a_template_that_drops_thinking(deepseek: Any) -> None:
    """DeepSeek-R1's opens the thinking in the prompt and leaves it out of every answer: the last is learned whole."""
    answers = ["<think>\nold\n</think>\n\none", "<think>\n\nnew\n</think>\n\ntwo"]
    messages = [m | {"content": answers[i // 2]} if i % 2 else m for i, m in enumerate(TURNS)]
    encoded = chat(deepseek, {"messages": messages})
    prompt = deepseek.apply_chat_template(messages[:-1], add_generation_prompt=True, return_dict=False)
    assert encoded.token_ids[~encoded.learned].tolist() == prompt
    assert "old" not in deepseek.decode(prompt) and deepseek.decode(prompt[-2:]) == "<think>\n"
    assert deepseek.decode(encoded.token_ids[encoded.learned]) == "\nnew\n</think>\n\ntwo" + deepseek.eos_token
    assert learns_to_stop(encoded, deepseek.eos_token_id)
    messages[-1]["content"] = "two"
    with pytest.raises(ValueError, match=r"here, messages: .*its prompt ends in '<think>\\n'"):
        chat(deepseek, {"messages": messages})


def test_what_a_template_leaves_out_is_learned_all_the_same() -> None:
    """A template that keeps only what follows </think> of an answer, and does not open the thinking in its prompt."""
    tokenizer = build_tokenizer()
    tokenizer.chat_template = MARKED.replace("{% generation %}", "").replace("{% endgeneration %}", "")
    tokenizer.chat_template = tokenizer.chat_template.replace("message['content']", "message['content'].split('/')[-1]")
    encoded = chat(tokenizer, {"messages": [TURNS[0], {"role": "assistant", "content": "think/6"}]})
    assert tokenizer.decode(encoded.token_ids[encoded.learned]) == "think/6<|im_end|>\n"


def test_chat_of_question_thinking_and_attempt(deepseek: Any, qwen: Any) -> None:
    cells = {"question": "1+1?", "thinking": " It is 2.\n", "attempt": "2"}
    for tokenizer, opening in ((deepseek, ""), (qwen, "<think>\n")):
        encoded = chat(tokenizer, cells)
        text = tokenizer.decode(encoded.token_ids[encoded.learned]).strip()
        assert text == f"{opening}It is 2.\n</think>\n\n2{tokenizer.eos_token}"
    plain = chat(qwen, {"problem": "1+1?", "answer": "2"}, Columns(attempt="answer"))
    assert qwen.decode(plain.token_ids[plain.learned]) == "2<|im_end|>\n"


def test_chat_by_markers_learns_every_turn() -> None:
    tokenizer = build_tokenizer()
    tokenizer.chat_template = MARKED
    encoded = chat(tokenizer, {"messages": TURNS})
    pieces = [("<|im_start|>user\n1 a:+5<|im_end|>\n<|im_start|>assistant\n", False), ("think 6<|im_end|>", True)]
    pieces += [("\n<|im_start|>user\n2 a:+5<|im_end|>\n<|im_start|>assistant\n", False)]
    pieces += [("answer 7<|im_end|>", True), ("\n", False)]
    expected = [(i, learned) for text, learned in pieces for i in tokenizer.encode(text)]
    assert list(zip(encoded.token_ids.tolist(), encoded.learned.tolist(), strict=True)) == expected
    assert learns_to_stop(encoded, tokenizer.eos_token_id)


def test_the_end_must_be_learned_in_the_last_turn() -> None:
    ids = np.array([5, 9, 5, 9, 5, 5, 9])
    for learned, expected in (
        ([0, 1, 0, 1, 0, 1, 1], True),
        ([0, 1, 0, 1, 0, 1, 0], False),  # of earlier turns only
        ([1, 1, 1, 1, 0, 0, 0], True),
        ([0, 0, 0, 0, 0, 0, 0], False),
    ):
        assert learns_to_stop(Encoded(ids, np.array(learned, bool)), 9) is expected


def test_chat_templates_that_cannot_serve_are_refused() -> None:
    tokenizer = build_tokenizer()
    tokenizer.chat_template = None
    with pytest.raises(ValueError, match="no chat template"):
        ChatTemplate(tokenizer, Columns())
    # A template that says who is asked: the prompt is no beginning of the whole, and no part of it either.
    tokenizer.chat_template = "{{ messages|length }}{% for m in messages %}{{ m['content'] }}{% endfor %}"
    with pytest.raises(ValueError, match=r"here, messages: .*not the beginning"):
        chat(tokenizer, {"messages": TURNS})
    tokenizer.chat_template = "{{ raise_exception('users only') }}"
    with pytest.raises(ValueError, match=r"here, messages: .*users only"):
        chat(tokenizer, {"messages": TURNS})
