"""Builds an engine from a model's name and settings, and gives it vLLM's loop: add_request, step, abort_request."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch

from s1engine.config import DEVICES, DTYPES, EngineConfig, check_choice
from s1engine.engine.admission import Admission
from s1engine.engine.core import EngineCore
from s1engine.engine.kv_cache import KVCache
from s1engine.engine.memory import block_shape, num_kv_blocks
from s1engine.engine.pages import clear_pages
from s1engine.engine.scheduler import Scheduler
from s1engine.engine.slots import SlotTable
from s1engine.engine.thinking import answer_now
from s1engine.engine.torch_runner import MAX_REPLAYS, TorchRunner
from s1engine.kernels import native
from s1engine.kernels.attention_flash import unusable_because
from s1engine.kernels.slot_layout import MAX_ROWS
from s1engine.models import CausalLM, load_model
from s1engine.models.config import ModelConfig
from s1engine.models.weights import update_weights
from s1engine.outputs import RequestOutput
from s1engine.params import SamplingParams
from s1engine.thinking import ThinkingBudget

if TYPE_CHECKING:
    from s1engine.engine.device_runner import DeviceRunner

logger = logging.getLogger(__name__)


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
        if device == "auto" and isinstance(model, torch.nn.Module):
            device = next(model.parameters()).device.type  # where it lies already
        self.device = resolve_device(device, self.config.attention_backend)
        if self.device.type == "cuda" and self.config.max_num_seqs > MAX_ROWS:
            raise ValueError(f"max_num_seqs={self.config.max_num_seqs}: a step on a GPU has at most {MAX_ROWS} rows")
        if isinstance(model, str | os.PathLike):
            name = os.fspath(model)
            self.model = load_model(
                name,
                dtype=dtype,
                device=self.device,
                row_invariant=self.config.deterministic,
                quantization=self.config.quantization,
            )
            self.tokenizer = load_tokenizer(name, tokenizer)
        else:
            if self.config.quantization is not None:
                raise ValueError("quantization: this model is loaded already; pass it to load_model instead")
            self.model, self.tokenizer = model, tokenizer
            if native.AVAILABLE and self.device.type == "cpu" and not is_packed(model):
                logger.info("the model's matrices are plain, as a trainer holds them: products are torch's, and slower")
        eos = set(self.model.config.eos_token_ids)
        if self.tokenizer is not None and self.tokenizer.eos_token_id is not None:
            eos.add(self.tokenizer.eos_token_id)
        self.eos_token_ids = frozenset(eos)

        positions = self.model.config.max_position_embeddings
        wanted_len = self.config.max_model_len or positions
        if wanted_len > positions:
            raise ValueError(f"max_model_len={wanted_len}: the model has {positions} positions")
        num_blocks = num_kv_blocks(self.model.config, self.config, wanted_len, self.device)
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
        self.asleep = False
        self.kv = KVCache(num_blocks, self.config.block_size, self.config.enable_prefix_caching)
        runner = self._runner(num_blocks)
        self.scheduler = Scheduler(
            self.kv,
            runner.slots,
            self.config.max_num_batched_tokens,
            self.config.block_size,
            runner.max_replays,
            runner.rows_may_end,
        )
        self.core = EngineCore(
            runner,
            self.scheduler,
            self.kv,
            runner.slots,
            self.tokenizer,
            self.eos_token_ids,
            self.admission.split_format(),
        )

    def _runner(self, num_blocks: int) -> TorchRunner | DeviceRunner:
        """The runner for the device and backend, with slot table and KV cache."""
        config, model = self.config, self.model.config
        layers, *block = block_shape(model, config.block_size)
        # Zeros, not garbage: masked keys have weight 0, and 0 x NaN would still be NaN.
        storage = torch.empty(layers, 2, num_blocks, *block, dtype=model.dtype, device=self.device)
        if not clear_pages(storage):
            storage.zero_()
        valid = valid_tokens(self.tokenizer, self.model)
        max_blocks = -(-self.max_model_len // config.block_size)
        size = (config.max_num_seqs, max_blocks, self.max_model_len, self.eos_token_ids)
        if self.device.type == "cpu" and config.attention_backend != "triton":
            # One step a launch where a row's bits depend on the batch: what a launch holds is a matter of time.
            max_replays = MAX_REPLAYS if config.deterministic or is_packed(self.model) else 1
            return TorchRunner(self.model, storage, SlotTable(*size), valid, max_replays)
        # Imported here: a CPU does not wait for Triton.
        from s1engine.engine.device_runner import DeviceRunner
        from s1engine.engine.device_slots import DeviceSlotTable

        slots = DeviceSlotTable(*size, model.vocab_size, self.device)
        flash = use_flash(config, model, self.device)
        return DeviceRunner(self.model, storage, slots, valid, deterministic=config.deterministic, flash=flash)

    def add_request(
        self,
        request_id: str,
        prompt: Any,
        params: SamplingParams | None = None,
        *,
        stream: bool = False,
        score_only: bool = False,
        sweep: tuple[ThinkingBudget, ...] | None = None,
    ) -> str:
        """Queue a request. With stream=True `step` returns it whenever it has something new to show.

        sweep: budgets that each sample branches into; `step` returns a SweepOutput. See `LLM.sweep`.
        Raises ValueError, and queues nothing, where the request can never run or a parameter is wrong.
        """
        if request_id in self.core.requests:
            raise ValueError(f"request_id={request_id!r}: there is an unfinished request of that name")
        if self.asleep:
            raise ValueError("the engine sleeps, without memory for keys and values: call wake_up first")
        params = params or SamplingParams()
        self.core.add(self.admission.request(prompt, params, request_id, stream, score_only, sweep))
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
        if request.sweep is not None:
            raise ValueError(f"request_id={request_id!r}: a sweep's budgets are fixed; abort it instead")
        for seq in request.samples:
            answer_now(seq, self.core.slots)

    def update_weights(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Overwrite parameters in place, as `models.weights.update_weights`; cached prefixes are forgotten.

        Raises ValueError, having changed nothing, for names or shapes that do not fit, and while requests are running.
        """
        if self.core.requests:
            raise ValueError(f"update_weights: {len(self.core.requests)} requests are unfinished; finish or abort them")
        update_weights(self.model, tensors)
        self.kv.reset_prefix_cache()

    def sleep(self) -> int:
        """Give back the memory of the KV cache, for a trainer's step in the same process. Returns its bytes.

        Cached prefixes are forgotten. Raises ValueError while requests are unfinished.
        """
        if self.core.requests:
            raise ValueError(f"sleep: {len(self.core.requests)} requests are unfinished; finish or abort them")
        self.kv.reset_prefix_cache()
        self.asleep = True
        return self.core.runner.release_cache()

    def wake_up(self) -> None:
        """Take the memory of the KV cache again; nothing where it was not given back."""
        if self.asleep:
            self.core.runner.restore_cache()
            self.asleep = False

    def has_unfinished_requests(self) -> bool:
        return bool(self.core.requests)


def is_packed(model: CausalLM) -> bool:
    """Whether its matrices are in the C++ operators' layout. (A stand-in for a model has none.)"""
    return getattr(getattr(model, "lm_head", None), "packed", None) is not None


def resolve_device(device: str, attention_backend: str) -> torch.device:
    """The device of that name. Raises ValueError where it is not there, or the backend is not for it."""
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda" and not torch.cuda.is_available():
        raise ValueError("device='cuda': torch sees no GPU here; use 'cpu', or install a CUDA build of torch")
    valid = ("auto", "triton", "flash-attn") if device == "cuda" else ("auto", "torch", "triton")
    if attention_backend not in valid:
        raise ValueError(f"attention_backend={attention_backend!r}: on {device} it must be one of {', '.join(valid)}")
    return torch.device(device)


def use_flash(config: EngineConfig, model: ModelConfig, device: torch.device) -> bool:
    """Whether prompts are attended by flash-attn. Raises ValueError where that is asked for and cannot be."""
    if config.attention_backend == "triton" or device.type != "cuda":
        return False
    reason = unusable_because(config.block_size, model.head_dim, model.dtype)
    if reason is None and config.deterministic:
        reason = "deterministic=True needs the arithmetic of decoding in prompts"
    if reason is not None and config.attention_backend == "flash-attn":
        raise ValueError(f"attention_backend='flash-attn': {reason}; use 'auto' or 'triton'")
    return reason is None


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
