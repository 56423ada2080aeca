"""Equal blocks of a model: only a few of them are run, and represent the others."""

from collections import Counter
from collections.abc import Hashable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

from torch import Tensor, nn


class Watched(Protocol):
    """An object that is told which block is being computed."""

    block: int | None
    """The number of the block that is being computed, forward or backward; None: the model around the blocks."""


def stand_ins(signatures: Sequence[Hashable]) -> dict[int, int]:
    """Blocks that need not be run -> number of a block with the same costs.

    In a sequence of equal blocks, the first two and the last one are run; the second one represents the inner blocks.
    In an alternating sequence, the first two pairs and the last pair are run.
    """
    replacements: dict[int, int] = {}
    start = 0
    while start < len(signatures):
        length = 1
        for period in (1, 2):
            end = start + period
            while end < len(signatures) and signatures[end] == signatures[end - period]:
                end += 1
            if end - start >= 4 * period:
                length = end - start
                left_out = length - 3 * period - length % period
                skipped = range(start + 2 * period, start + 2 * period + left_out)
                replacements |= {number: start + period + (number - start) % period for number in skipped}
                break
        start += length
    return replacements


def signature(block: nn.Module) -> Hashable:
    """Equal for two blocks with the same costs: their layers, which weights learn, whether they are recomputed."""
    parameters = tuple((name, p.shape, p.dtype, p.requires_grad) for name, p in block.named_parameters())
    own_forward = type(vars(block).get("forward"))
    return str(block), getattr(block, "attention_type", None), own_forward, parameters


@contextmanager
def shortened(blocks: Sequence[nn.Module], skipped: dict[int, int], watched: Watched) -> Iterator[Counter[int]]:
    """Inside this context, `skipped` blocks return their input, and `watched` is told which other block runs.

    Args:
        blocks: blocks whose first argument is a tensor [B, N, dim], and which return such a tensor.
        skipped: the result of `stand_ins`.
        watched: gets its `block` set.

    Yields:
        How many skipped blocks each running block represented. They are counted when they are called, because blocks
        above the layer that a model reads are not called.
    """
    calls: Counter[int] = Counter()
    last: list[Tensor | None] = [None]

    def enter(number: int | None) -> None:
        watched.block = number

    def handing_on(number: int) -> Any:
        def forward(hidden: Tensor, *_: Any, **__: Any) -> Tensor:
            calls[skipped[number]] += 1
            return hidden

        return forward

    def watching(number: int, original: Any) -> Any:
        def forward(hidden: Tensor, *arguments: Any, **options: Any) -> Tensor:
            if hidden.requires_grad and hidden is not last[0]:  # its backward pass leaves the blocks here
                hidden.register_hook(lambda gradient: enter(None))
            enter(number)
            out = original(hidden, *arguments, **options)
            enter(None)
            if out.requires_grad:
                out.register_hook(lambda gradient: enter(number))
            last[0] = out
            return out

        return forward

    before = [vars(block).get("forward") for block in blocks]
    for number, block in enumerate(blocks):
        new: Any = handing_on(number) if number in skipped else watching(number, block.forward)
        block.forward = new
    try:
        yield calls
    finally:
        for block, previous in zip(blocks, before, strict=True):
            if previous is None:
                del block.forward
            else:
                block.forward = previous
