"""Repetition penalty (CTRL: Keskar et al., 2019, section 4.1), and OpenAI's presence and frequency penalties."""

from __future__ import annotations

from torch import Tensor


def apply_penalties(
    logits: Tensor, prompt_mask: Tensor, output_counts: Tensor, repetition: Tensor, presence: Tensor, frequency: Tensor
) -> None:
    """Penalise tokens that occurred, in place.

    logits         float32 [R, V], modified
    prompt_mask    bool [R, V], whether the prompt has the token
    output_counts  int32 [R, V], how often the output so far has it
    repetition     float32 [R], 1 is off: divides positive logits of prompt and output tokens, multiplies the others
    presence       float32 [R], 0 is off: subtracted once from output tokens
    frequency      float32 [R], 0 is off: subtracted from output tokens once per occurrence
    """
    in_output = output_counts > 0
    factor = repetition.unsqueeze(1).where(prompt_mask | in_output, 1.0)
    # A banned token (-inf) stays banned: multiplied by a positive factor, less something finite.
    logits.copy_((logits / factor).where(logits > 0, logits * factor))
    logits.sub_(frequency.unsqueeze(1) * output_counts)
    logits.sub_(presence.unsqueeze(1) * in_output)
