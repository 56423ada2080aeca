"""Writing FAST tokens with static shapes: the same ids as `write_fast_tokens` with a grammar, but faster.

The number of ids per chunk is not known in advance. So one step is one stage, which is captured once as a CUDA graph
and repeated until every robot's chunk is complete. All values that change between steps are tensors that are
overwritten.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from openvla_lightning.action_head.fast_decoding import FastGrammar
from openvla_lightning.model.static_decoding import StaticDecoder, _Buffers
from openvla_lightning.model.vla import VLA
from openvla_lightning.types import Inputs

LOOKED_AT = 4
"""After this many steps, the host checks whether all chunks are complete; each check waits for the GPU."""


@dataclass(slots=True)
class _Writing:
    """State of the sequences; all tensors are on the device.

    Attributes:
        state, remaining: int64 [B], see `FastGrammar`.
        going: bool [B], rows whose chunk is not complete.
        ids: int64 [B], the last ids in the vocabulary that were written.
        step: int64 [1], number of steps after the prompt.
        written: int64 [B, count], FAST ids; -1 after the end of a sequence.
    """

    state: Tensor
    remaining: Tensor
    going: Tensor
    ids: Tensor
    step: Tensor
    written: Tensor


class StaticFastDecoder(StaticDecoder):
    """Writes FAST ids for inputs, always the most likely ones that lead to a complete chunk.

    Args:
        vla: the model, on its device and in `eval`; its language model is one of `FAMILIES`.
        normalise: uint8 [B, 3V, H, W] -> float [B, 3 * towers * V, H, W] on any device (`ImageTransform.normalise`).
        first_id: the first FAST id in the vocabulary; the vocabulary's last id is FAST id 0.
        grammar: allows only ids that lead to a complete chunk; on the model's device.
        compile, graph: see `StaticDecoder`.
    """

    def __init__(
        self,
        vla: VLA,
        normalise: Callable[[Tensor], Tensor],
        first_id: int,
        grammar: FastGrammar,
        compile: bool | None = None,
        graph: bool | None = None,
    ) -> None:
        super().__init__(vla, normalise, compile=compile, graph=graph)
        self.first_id, self.grammar = first_id, grammar
        self._every = LOOKED_AT if self.device.type == "cuda" else 1

    @torch.inference_mode()
    def write(
        self, inputs: Inputs, coefficients: int, clock: Callable[[str], None] = lambda stage: None
    ) -> list[list[int]]:
        """A sequence of FAST ids for each row, which encodes a chunk of `coefficients` numbers.

        Args:
            inputs: as for `StaticDecoder`.
            coefficients: T * D.
            clock: see `StaticDecoder`.
        """
        action, (see, read, begin, step) = self._prepared(inputs, self.grammar.most_ids * coefficients, None)
        clock("copy")
        see()
        clock("vision")
        read()
        clock("prefill")
        begin()
        for count in range(action.count - 1):
            if count % self._every == 0 and not bool(action.writing.going.any()):
                break
            step()
        written = action.writing.written[: len(inputs)].tolist()
        clock("decode")
        return [[index for index in row if index >= 0] for row in written]

    @property
    def _stages(self) -> list[Callable[[_Buffers], None]]:
        return [self._see, self._read, self._begin, self._step]

    def _begin(self, action: _Buffers) -> None:
        """Write the first ids, after the prompts."""
        rows, device = len(action.last), action.last.device
        zeros = torch.zeros(rows, dtype=torch.int64, device=device)
        action.writing = _Writing(
            state=zeros,
            remaining=torch.full_like(zeros, action.count // self.grammar.most_ids),
            going=torch.ones_like(zeros, dtype=torch.bool),
            ids=torch.zeros_like(zeros),
            step=torch.zeros(1, dtype=torch.int64, device=device),
            written=torch.full((rows, action.count), -1, dtype=torch.int64, device=device),
        )
        self._choose(action.writing, action.last)

    def _step(self, action: _Buffers) -> None:
        """Write one more id per row."""
        writing = action.writing
        hidden = self._follow(action, writing.ids, writing.step)
        writing.step.add_(1)
        self._choose(writing, hidden)

    def _choose(self, writing: _Writing, hidden: Tensor) -> None:
        llm, going = self.vla.llm, writing.going
        logits = llm.logits(hidden)[:, self.first_id : llm.vocab_size].flip(1)
        allowed = self.grammar.allowed(writing.state, writing.remaining)
        fast = logits.masked_fill(~allowed, -torch.inf).argmax(-1)
        writing.written.index_copy_(1, writing.step, torch.where(going, fast, -1)[:, None])
        state, remaining = self.grammar.step(writing.state, writing.remaining, fast)
        writing.state.copy_(torch.where(going, state, writing.state))
        writing.remaining.copy_(torch.where(going, remaining, writing.remaining))
        writing.ids.copy_(llm.vocab_size - 1 - fast)
        going.logical_and_(writing.remaining > 0)
