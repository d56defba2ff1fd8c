"""The slot table on a device: rows are uploaded when sequences enter, and everything after that happens there."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from s1engine.engine.request import Sequence
from s1engine.engine.runner import keeps_logits
from s1engine.engine.slots import SlotTable
from s1engine.kernels.sampler_triton import SlotTensors
from s1engine.kernels.slot_layout import FIELD_WIDTH, MAX_BIASES, MAX_STOP_IDS, Field
from s1engine.thinking.layout import PROGRAM_WIDTH, STATE_WIDTH, State


def to_device(array: np.ndarray, device: torch.device) -> Tensor:
    """A copy of `array` on the device. Nobody waits for it: what is launched later runs after it."""
    tensor = torch.from_numpy(np.ascontiguousarray(array))
    if device.type == "cuda":
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.clone()


def needs_host(seq: Sequence) -> bool:
    """Whether sampling takes more than a slot can say: the host then edits the logits, or keeps them."""
    params, record = seq.request.params, seq.thinking
    if params.logprobs is not None and (keeps_logits(seq) or params.logprobs_mode != "raw_logprobs"):
        return True
    if params.min_tokens and (record is not None or len(seq.end_ids) > MAX_STOP_IDS):
        return True  # a slot bans its stop ids until then, and knows no others
    return any(len(word) > 1 for word in seq.request.bad_words) or len(_biases(seq)) > MAX_BIASES


def _biases(seq: Sequence) -> dict[int, float]:
    biases = dict(seq.request.params.logit_bias or {})
    return biases | dict.fromkeys((word[0] for word in seq.request.bad_words if len(word) == 1), float("-inf"))


class DeviceSlotTable(SlotTable):
    """The table twice: here what was last uploaded, in `tensors` and `device_block_tables` what steps read and change.

    Changes are collected, and `upload` sends them before the next step.
    """

    def __init__(
        self,
        num_slots: int,
        max_blocks: int,
        max_len: int,
        eos_token_ids: frozenset[int],
        vocab_size: int,
        device: torch.device,
    ) -> None:
        super().__init__(num_slots, max_blocks, max_len, eos_token_ids)
        self.vocab_size = vocab_size
        self.device = device
        self.bias_ids = np.zeros((num_slots, MAX_BIASES), np.int32)
        self.bias_values = np.zeros((num_slots, MAX_BIASES), np.float32)

        def of(width: int, dtype: torch.dtype = torch.int32) -> Tensor:
            return torch.zeros(num_slots, width, dtype=dtype, device=device)

        self.tensors = SlotTensors(
            fields=of(FIELD_WIDTH),
            programs=of(PROGRAM_WIDTH),
            states=of(STATE_WIDTH),
            tokens=of(max_len),
            bias_ids=of(MAX_BIASES),
            bias_values=of(MAX_BIASES, torch.float32),
        )
        self.device_block_tables = of(max_blocks)
        self._entered: dict[int, Sequence] = {}
        self._changed_blocks: list[tuple[int, list[int]]] = []  # (place in the flat table, blocks from there on)

    def assign(self, seq: Sequence) -> None:
        super().assign(seq)
        self._entered[seq.slot] = seq

    def _fields(self, seq: Sequence) -> np.ndarray:
        row = super()._fields(seq)
        params = seq.request.params
        if needs_host(seq):
            return row  # the host edits the logits, all of it
        biases = _biases(seq)
        row[Field.NUM_BIASES] = len(biases)
        self.bias_ids[seq.slot, : len(biases)] = list(biases)
        self.bias_values[seq.slot, : len(biases)] = list(biases.values())
        row[Field.MIN_LENGTH] = seq.num_prompt + params.min_tokens
        row[Field.WANTS_LOGPROB] = params.logprobs is not None
        if params.has_penalties:
            row[Field.HAS_PENALTIES] = 1
            strengths = (params.repetition_penalty, params.presence_penalty, params.frequency_penalty)
            row.view(np.float32)[Field.REPETITION : Field.FREQUENCY + 1] = strengths
        return row

    def release(self, seq: Sequence) -> None:
        self._entered.pop(seq.slot, None)
        width = self.block_tables.shape[1]
        self._changed_blocks = [change for change in self._changed_blocks if change[0] // width != seq.slot]
        super().release(seq)

    def read_state(self, slot: int) -> np.ndarray:
        """Waits for all that was launched, unless the slot was just entered."""
        if slot in self._entered:
            return super().read_state(slot)
        return self.tensors.states[slot].cpu().numpy().copy()

    @torch.inference_mode()  # in which the tensors may have been made
    def close_thinking(self, slot: int) -> None:
        super().close_thinking(slot)
        self.tensors.states[slot, State.MAX_TOKENS].fill_(0)
        self.tensors.fields[slot, Field.USER_CAP].fill_(0)

    def _write_blocks(self, slot: int, start: int, blocks: list[int]) -> None:
        super()._write_blocks(slot, start, blocks)
        self._changed_blocks.append((slot * self.block_tables.shape[1] + start, blocks))

    def upload(self) -> None:
        """Send what has changed since the last time."""
        if self._changed_blocks:
            places = np.concatenate([np.arange(at, at + len(blocks)) for at, blocks in self._changed_blocks])
            blocks = np.concatenate([np.array(blocks, np.int32) for _, blocks in self._changed_blocks])
            flat = self.device_block_tables.view(-1)
            flat.index_copy_(0, to_device(places, self.device), to_device(blocks, self.device))
            self._changed_blocks = []
        if self._entered:
            self._upload_rows(np.array(list(self._entered)), list(self._entered.values()))
            self._entered = {}

    def _upload_rows(self, slots: np.ndarray, seqs: list[Sequence]) -> None:
        index, tensors = to_device(slots, self.device), self.tensors
        longest = int(self.fields[slots, Field.LENGTH].max())
        for here, there in (
            (self.fields, tensors.fields),
            (self.programs, tensors.programs),
            (self.states, tensors.states),
            (self.tokens[:, :longest], tensors.tokens[:, :longest]),
            (self.bias_ids, tensors.bias_ids),
            (self.bias_values, tensors.bias_values),
        ):
            there.index_copy_(0, index, to_device(here[slots], self.device))
        for seq in seqs:
            if self.fields[seq.slot, Field.HAS_PENALTIES]:
                self._upload_occurrences(seq)

    def _upload_occurrences(self, seq: Sequence) -> None:
        """Which tokens the prompt has, and how often the output has each."""
        if self.tensors.output_counts is None:
            words = -(-self.vocab_size // 32)
            self.tensors = replace(
                self.tensors,
                prompt_mask=torch.zeros(self.num_slots, words, dtype=torch.int32, device=self.device),
                output_counts=torch.zeros(self.num_slots, self.vocab_size, dtype=torch.int32, device=self.device),
            )
        assert self.tensors.prompt_mask is not None and self.tensors.output_counts is not None
        present = np.zeros(self.vocab_size, bool)
        present[seq.request.prompt_token_ids] = True
        counts = np.bincount(seq.tokens[seq.num_prompt :], minlength=self.vocab_size).astype(np.int32)
        self.tensors.prompt_mask[seq.slot].copy_(to_device(bit_words(present), self.device))
        self.tensors.output_counts[seq.slot].copy_(to_device(counts, self.device))


def bit_words(bits: np.ndarray) -> np.ndarray:
    """int32 [ceil(n / 32)] of bool [n]: bit i % 32 of word i // 32."""
    padded = np.zeros(-(-len(bits) // 32) * 32, np.uint8)
    padded[: len(bits)] = bits
    return np.packbits(padded, bitorder="little").view(np.int32)
