"""Builds an engine from a model's name and settings, and gives it vLLM's loop: add_request, step, abort_request."""

from __future__ import annotations

import logging
import os
from typing import Any

import torch

from s1engine.config import DEVICES, DTYPES, EngineConfig, check_choice
from s1engine.engine.admission import Admission
from s1engine.engine.core import EngineCore
from s1engine.engine.kv_cache import KVCache
from s1engine.engine.runner import Runner
from s1engine.engine.scheduler import Scheduler
from s1engine.engine.slots import SlotTable
from s1engine.engine.thinking import answer_now
from s1engine.models import CausalLM, load_model
from s1engine.outputs import RequestOutput
from s1engine.params import SamplingParams

logger = logging.getLogger(__name__)

CPU_KV_BYTES = 4 * 2**30


class LLMEngine:
    """One model, its KV cache and its queue of requests.

    model: a folder, a hub id, or a model that was loaded already. tokenizer: a Hugging Face tokenizer, the folder or id
    of one, or None for the model's own (a folder without one can still be used with token ids).
    """

    def __init__(
        self,
        model: str | os.PathLike[str] | CausalLM,
        *,
        tokenizer: Any = None,
        dtype: str = "auto",
        device: str = "auto",
        config: EngineConfig | None = None,
    ) -> None:
        check_choice("dtype", dtype, DTYPES)
        check_choice("device", device, DEVICES)
        self.config = config or EngineConfig()
        if isinstance(model, str | os.PathLike):
            name = os.fspath(model)
            self.model = load_model(name, dtype=dtype, device="cpu", row_invariant=self.config.deterministic)
            self.tokenizer = load_tokenizer(name, tokenizer)
        else:
            self.model, self.tokenizer = model, tokenizer
        eos = set(self.model.config.eos_token_ids)
        if self.tokenizer is not None and self.tokenizer.eos_token_id is not None:
            eos.add(self.tokenizer.eos_token_id)
        self.eos_token_ids = frozenset(eos)

        positions = self.model.config.max_position_embeddings
        wanted_len = self.config.max_model_len or positions
        if wanted_len > positions:
            raise ValueError(f"max_model_len={wanted_len}: the model has {positions} positions")
        num_blocks = self._num_blocks(wanted_len)
        self.max_model_len = min(wanted_len, num_blocks * self.config.block_size)
        if self.max_model_len < wanted_len:
            if self.config.max_model_len is not None:
                raise ValueError(
                    f"max_model_len={wanted_len}: the KV cache holds {self.max_model_len} tokens; "
                    "lower it or raise kv_cache_memory"
                )
            logger.info("the KV cache holds %d tokens: max_model_len is that", self.max_model_len)

        self.admission = Admission(
            self.tokenizer,
            self.model.config.vocab_size,
            self.eos_token_ids,
            self.max_model_len,
            self.config.thinking_format,
            self.config.seed,
        )
        self.kv = KVCache(num_blocks, self.config.block_size, self.config.enable_prefix_caching)
        slots = SlotTable(self.config.max_num_seqs, -(-self.max_model_len // self.config.block_size))
        shape = self._block_shape()
        # Zeros, not garbage: masked keys have weight 0, and 0 x NaN would still be NaN.
        storage = torch.zeros(shape[0], 2, num_blocks, *shape[1:], dtype=self.model.config.dtype)
        runner = Runner(self.model, storage, slots, valid_tokens(self.tokenizer, self.model))
        self.scheduler = Scheduler(self.kv, slots, self.config.max_num_batched_tokens, self.config.block_size)
        self.core = EngineCore(
            runner, self.scheduler, self.kv, slots, self.tokenizer, self.eos_token_ids, self.admission.split_format()
        )

    def add_request(
        self,
        request_id: str,
        prompt: Any,
        params: SamplingParams | None = None,
        *,
        stream: bool = False,
        score_only: bool = False,
    ) -> str:
        """Queue a request. With stream=True `step` returns it whenever it has something new to show.

        Raises ValueError, and queues nothing, where the request can never run or a parameter is wrong.
        """
        if request_id in self.core.requests:
            raise ValueError(f"request_id={request_id!r}: there is an unfinished request of that name")
        self.core.add(self.admission.request(prompt, params or SamplingParams(), request_id, stream, score_only))
        return request_id

    def step(self) -> list[RequestOutput]:
        """Run one step; the requests that finished in it, and the streaming ones that took part in it."""
        return self.core.step()

    def abort_request(self, request_id: str) -> RequestOutput | None:
        """End a request now; what it had is returned with finish_reason "abort". None if it is not there."""
        return self.core.abort(request_id)

    def answer_now(self, request_id: str) -> None:
        """Tell a request with a thinking budget to close its thinking at the next position."""
        request = self.core.requests.get(request_id)
        if request is None:
            raise ValueError(f"request_id={request_id!r}: there is no such unfinished request")
        for seq in request.samples:
            answer_now(seq, self.core.slots)

    def has_unfinished_requests(self) -> bool:
        return bool(self.core.requests)

    def _block_shape(self) -> tuple[int, int, int, int]:
        model = self.model.config
        return (model.num_layers, self.config.block_size, model.num_kv_heads, model.head_dim)

    def _num_blocks(self, max_model_len: int) -> int:
        layers, *rest = self._block_shape()
        block_bytes = 2 * layers * rest[0] * rest[1] * rest[2] * self.model.config.dtype.itemsize
        given = self.config.kv_cache_memory
        budget = given or min(CPU_KV_BYTES, int(self.config.gpu_memory_utilization * free_memory()))
        if budget < block_bytes:
            field = "gpu_memory_utilization" if given is None else f"kv_cache_memory={given}"
            raise ValueError(f"{field}: leaves no memory for one KV block, which takes {block_bytes} bytes")
        full = self.config.max_num_seqs * -(-max_model_len // self.config.block_size)
        return min(budget // block_bytes, full) if given is None else budget // block_bytes


def load_tokenizer(model: str, tokenizer: Any) -> Any:
    """The tokenizer that was passed or named, or the model's own; None where the model's folder has none."""
    from transformers import AutoTokenizer

    if tokenizer is not None and not isinstance(tokenizer, str | os.PathLike):
        return tokenizer
    if tokenizer is None and os.path.isdir(model):
        files = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json")
        if not any(os.path.exists(os.path.join(model, name)) for name in files):
            logger.warning("%s has no tokenizer: prompts must be token ids", model)
            return None
    return AutoTokenizer.from_pretrained(tokenizer or model)


def valid_tokens(tokenizer: Any, model: CausalLM) -> torch.Tensor | None:
    """Bool [vocab]: ids that the tokenizer has, the others are never sampled. None where there is no tokenizer."""
    if tokenizer is None:
        return None
    valid = torch.zeros(model.config.vocab_size, dtype=torch.bool)
    ids = [i for i in tokenizer.get_vocab().values() if i < model.config.vocab_size]
    valid[torch.tensor(ids)] = True
    return valid


def free_memory() -> int:
    """Bytes that could be allocated now without swapping: what is free, and on Linux also what caches would give up."""
    try:
        with open("/proc/meminfo") as lines:
            fields = dict(line.split(":", 1) for line in lines)
        return int(fields["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError):
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
