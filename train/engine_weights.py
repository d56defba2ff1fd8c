"""The way of the weights from the trainer to the engine that rolls out.

Up to ZeRO 2 the engine decodes with the trainer's own parameters: nothing is copied but, on a CPU, the packed form of
the matrices. Under ZeRO 3 no process holds them whole: the engine has a model of its own on every rank, which is filled
in place from one gathered layer after the other.
"""

from __future__ import annotations

from itertools import groupby

import torch

from s1engine import LLM
from s1engine.kernels import native
from s1engine.models import CausalLM, load_model
from s1engine.models.layers import Linear
from s1engine.models.weights import Place, checkpoint_places
from s1engine.train.distributed import gathered, is_partitioned


class EngineWeights:
    """What the engine decodes with. To be made after a checkpoint is restored; `renew` before the first rollout.

    model   the trained model itself, if `shared`, or a copy
    packed  its matrices are in the layout of the C++ operators, so that rows do not depend on their neighbours
    nbytes  what this rank holds beside the trainer's parameters: their packed form, or the copy
    """

    def __init__(self, trained: CausalLM, source: str, dtype: str, device: torch.device) -> None:
        self.trained = trained
        self.shared = not is_partitioned(trained.parameters())
        self.packed = device.type == "cpu" and native.AVAILABLE
        if self.shared:
            self.model = trained
            self.nbytes = trained.pack_beside() if self.packed else 0
        else:
            self.model = load_model(source, dtype=dtype, device=device)
            self.nbytes = _size(self.model)

    def renew(self, llm: LLM) -> None:
        """The engine of this model has the trainer's weights, and no prefix that older ones computed. On every rank."""
        if self.shared:
            llm.update_weights({})
            return
        for _, places in groupby(checkpoint_places(self.trained), key=lambda pair: _part(pair[0])):
            part: list[tuple[str, Place]] = list(places)
            with gathered([place.parameter for _, place in part]):
                llm.update_weights((name, place.target()) for name, place in part)

    def pack_again(self) -> None:
        """Before an optimizer step that follows another one: training passes run on the packed matrices, too."""
        if self.shared and self.packed:
            self.trained.pack_again()


def _part(name: str) -> str:
    """Of a tensor's name: what is gathered at a time, a decoder layer or a parameter outside of them."""
    return ".".join(name.split(".")[:3])


def _size(model: CausalLM) -> int:
    packed = [module.packed for module in model.modules() if isinstance(module, Linear)]
    return sum(p.nbytes for p in model.parameters()) + sum(p.storage.nbytes for p in packed if p is not None)
