"""Instructions -> ids: the prompt, and the ids that the action head writes after it."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from openvla_lightning.action_head.base import ActionHead
from openvla_lightning.processor.gate import accepted
from openvla_lightning.processor.prompt import PromptKind, build_prompt
from openvla_lightning.processor.tokenizer import load_tokenizer
from openvla_lightning.types import IGNORE_INDEX, learnt_places

_SPACE = "▁"
MOST_TOKENS_A_BYTE, ROOM = 12, 128
"""Upper bounds of the tokens per byte of an instruction (some ligatures are expanded), and of the prompt's tokens."""


class TextProcessor:
    """The text part of a `Processor`, with the same arguments."""

    def __init__(
        self,
        action_head: ActionHead,
        tokenizer: str | Path,
        prompt: PromptKind,
        pad_token_id: int | None,
        max_length: int,
    ) -> None:
        build_prompt("check the prompt kind", prompt)
        self.action_head, self.prompt, self.max_length = action_head, prompt, max_length
        self._tokenizer_name, self._pad_token_id = str(tokenizer), pad_token_id
        self._tokenizer: Any = None
        self._prompt_ids: dict[str, list[int]] = {}

    @property
    def tokenizer(self) -> Any:
        """The tokenizer, loaded on first use, so that composing a recipe needs no download."""
        if self._tokenizer is None:
            self._tokenizer = load_tokenizer(self._tokenizer_name)
        return self._tokenizer

    @property
    def eos_token_id(self) -> int:
        """Id that ends an action."""
        return self.tokenizer.eos_token_id

    @property
    def pad_token_id(self) -> int:
        """Id on padded positions; the released tokenizer's `<PAD>` is the first id after its 32000 words."""
        if self._pad_token_id is not None:
            return self._pad_token_id
        pad = self.tokenizer.pad_token_id
        return self.eos_token_id if pad is None else pad

    def prompt_ids(self, instruction: str) -> list[int]:
        """Ids of BOS, prompt and, for a SentencePiece tokenizer, the lone space before the action.

        Raises:
            ValueError: when the prompt leaves no room within `max_length`.
        """
        if (known := self._prompt_ids.get(instruction)) is not None:
            return known
        ids = [self._bos(), *self._text(build_prompt(instruction, self.prompt)), *self._lone_space()]
        if len(ids) >= self.max_length:
            raise ValueError(f"the instruction takes {len(ids)} tokens of {self.max_length}: {instruction[:60]!r}...")
        if len(self._prompt_ids) < 100_000:
            self._prompt_ids[instruction] = ids
        return ids

    def refuses(self, instruction: str, dim: int) -> str | None:
        """Why steps with this instruction and `dim` action dimensions cannot be collated; None if they can be."""
        blank = torch.zeros(1, self.action_head.action_chunk, dim)
        answer = len(self.action_head.write(blank, 1, dim, self.eos_token_id)[0])
        try:
            if len(accepted(instruction).encode()) * MOST_TOKENS_A_BYTE + ROOM + answer < self.max_length:
                return None  # most texts need no tokenizer
            tokens = len(self.prompt_ids(instruction)) + answer
        except ValueError as error:
            return str(error)
        return None if tokens <= self.max_length else f"it takes {tokens} tokens of {self.max_length}"

    def _bos(self) -> int:
        # Tokenizers without BOS start with their end-of-text id, so that visual tokens always follow one such id.
        known = self.tokenizer.bos_token_id
        return self.eos_token_id if known is None else known

    def _text(self, text: str) -> list[int]:
        return self.tokenizer(text, add_special_tokens=False)["input_ids"]

    def _lone_space(self) -> list[int]:
        if self._tokenizer_name == "tiny":
            return []
        index = self.tokenizer.get_vocab().get(_SPACE)
        return [] if index is None else [index]

    def _written(self, instructions: Sequence[str], actions: Tensor | None, dim: int) -> dict[str, Any]:
        """`input_ids`, `attention_mask`, `labels` and `places` of prompts and the ids that the head writes after them.

        Raises:
            ValueError: when a text is longer than `max_length`.
        """
        prompts = [self.prompt_ids(text) for text in instructions]
        written = self.action_head.write(actions, len(prompts), dim, self.eos_token_id)
        lengths = [len(prompt) + len(ids) for prompt, ids in zip(prompts, written, strict=True)]
        width = max(lengths)
        if width > self.max_length:
            raise ValueError(f"prompt and action take {width} tokens, more than max_length={self.max_length}")
        pad, hidden = self.pad_token_id, IGNORE_INDEX
        rows = list(zip(prompts, written, lengths, strict=True))
        labels = torch.tensor([[hidden] * len(prompt) + ids + [hidden] * (width - n) for prompt, ids, n in rows])
        return {
            "input_ids": torch.tensor([prompt + ids + [pad] * (width - n) for prompt, ids, n in rows]),
            "attention_mask": torch.arange(width) < torch.tensor(lengths)[:, None],
            "labels": labels,
            "places": learnt_places(labels),
        }
