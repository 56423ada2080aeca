"""Chunks of actions as FAST tokens: a few ids for a whole chunk, learnt by next-token prediction."""

from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from openvla_lightning.action_head.base import Acting, Decoder, on_device, options_of
from openvla_lightning.action_head.fast_decoding import ArrivalCounter, FastGrammar, write_fast_tokens
from openvla_lightning.action_head.fast_static import StaticFastDecoder
from openvla_lightning.action_head.fast_tokenizer import FastTokenizer
from openvla_lightning.action_head.tokens import next_token_logits
from openvla_lightning.model.decoding import Sampling
from openvla_lightning.model.llm import FAMILIES
from openvla_lightning.model.vla import VLA
from openvla_lightning.types import IGNORE_INDEX, Batch, Inputs, Prediction

if TYPE_CHECKING:
    from torchmetrics import Metric


class FastHead:
    """Actions as FAST tokens (arXiv 2501.09747), which use the last rows of the vocabulary.

    FAST id i is the vocabulary's id `vocab_size - 1 - i`. So the head uses as many rows as the tokenizer has
    ids, 1,024 or 2,048, while the released head uses 256. In Llama's vocabulary these are its rarest glyphs; the lone
    space before the actions, 29871, lies below the last 2,048 and stays free. The shape of the embedding, and so of
    checkpoints, does not change.

    Args:
        tokenizer: folder of a tokenizer, from `openvla fit-fast` or a copy of the universal one; or the result of
            `FastTokenizer.config`. None: a tokenizer that is fitted in memory on smooth random motion, which works for
            any robot but is not optimised for one.
        vocab_size: ids in the language model's tokenizer, without padding.
        action_chunk: T, actions in a chunk.
        learnt_ids: ids of the tokenizer that is fitted in memory.

    Raises:
        ValueError: when the tokenizer has more ids than the vocabulary.
    """

    def __init__(
        self,
        tokenizer: str | Path | Mapping[str, Any] | None = None,
        vocab_size: int = 32000,
        action_chunk: int = 8,
        learnt_ids: int = 256,
    ) -> None:
        if isinstance(tokenizer, Mapping):
            self.tokenizer = FastTokenizer.from_config(dict(tokenizer))
        elif tokenizer is not None:
            self.tokenizer = FastTokenizer.read(tokenizer)
        else:
            self.tokenizer = of_smooth_motion(action_chunk, learnt_ids)
        if self.tokenizer.vocab_size >= vocab_size:
            raise ValueError(
                f"{self.tokenizer.vocab_size} FAST ids do not fit the {vocab_size} of the vocabulary beside its words"
            )
        self.vocab_size, self.action_chunk = vocab_size, action_chunk

    @property
    def first_id(self) -> int:
        """The first action id in the vocabulary."""
        return self.vocab_size - self.tokenizer.vocab_size

    @property
    def config(self) -> dict[str, Any]:
        """Plain constructor arguments, including the tokenizer's vocabulary."""
        return {
            "tokenizer": self.tokenizer.config,
            "vocab_size": self.vocab_size,
            "action_chunk": self.action_chunk,
        }

    def write(self, actions: Tensor | None, rows: int, dim: int, end: int) -> list[list[int]]:
        """The chunk's ids and the end token; nothing when acting, because the decoder writes the ids.

        Raises:
            ValueError: for chunks of another length.
        """
        if actions is None:
            return [[] for _ in range(rows)]
        if actions.shape[1] != self.action_chunk:
            raise ValueError(
                f"this head writes chunks of {self.action_chunk} actions, the data have chunks of {actions.shape[1]}: "
                "set data.action_chunk"
            )
        sequences = self.tokenizer.encode(actions.clamp(-1, 1).numpy())
        return [[*(self.vocab_size - 1 - index for index in ids), end] for ids in sequences]

    def network(self, dim: int) -> nn.Module | None:
        """None: the language model's own head is enough."""
        return None

    def loss(self, vla: VLA, batch: Batch) -> tuple[Tensor, Prediction]:
        """Cross-entropy of FAST ids and the end token, and the chunks that the most likely ids encode."""
        logits = next_token_logits(vla, batch)
        with torch.no_grad():
            prediction = self.prediction(logits, batch)
        return self.criterion(logits, batch), prediction

    def criterion(self, logits: Tensor, batch: Batch) -> Tensor:
        """Cross-entropy of logits [B, K, vocab] at `batch.places`: the mean over samples of each sample's mean.

        As in openpi, long sequences do not count more than short ones. So the loss is also the same if a batch is split
        over processes with different numbers of ids.
        """
        targets = batch.labels[:, 1:].gather(1, batch.places)
        losses = nn.functional.cross_entropy(
            logits.flatten(0, 1), targets.flatten(), ignore_index=IGNORE_INDEX, reduction="none"
        ).view(targets.shape)
        return (losses.sum(1) / (targets != IGNORE_INDEX).sum(1).clamp(min=1)).mean()

    def prediction(self, logits: Tensor, batch: Batch) -> Prediction:
        """The chunks that the most likely ids encode, each id under the true ids before it, without the end token.

        A wrong id may encode more or fewer coefficients than the true one; then only complete frequencies are used.
        """
        targets = batch.labels[:, 1:].gather(1, batch.places)
        predicted = logits.argmax(-1)
        columns = torch.stack([predicted, targets]).cpu()  # chunks are decoded on the host, which a step waits for
        rows = self._counted(columns[1])
        spelt = [self._decoded(ids, rows, batch.actions.shape[2]) for ids in columns]
        actions, target_actions = (
            torch.from_numpy(chunk).float().to(logits.device, non_blocking=True) for chunk in spelt
        )
        correct, counted = predicted == targets, self._counted(targets)
        return Prediction(
            actions=actions, targets=target_actions, correct=correct, logits=logits.detach(), counted=counted
        )

    def _counted(self, targets: Tensor) -> Tensor:
        return (targets >= self.first_id) & (targets < self.vocab_size)

    def metrics(self, datasets: Sequence[str]) -> "Metric":
        """Accuracy over ids and L1 of the chunks, overall and for each of `datasets`."""
        from openvla_lightning.action_head.metrics import ActionMetrics  # torchmetrics takes a second

        return ActionMetrics(datasets)

    def decoder(self, vla: VLA, acting: Acting) -> Decoder:
        """Writes the chunk's ids one after the other; each robot stops when its chunk is complete.

        Its options are `constrained` (True: only ids that lead to a complete chunk) and `temperature`. Sequences that
        encode no complete chunk, which only an unconstrained head writes, are counted and logged.
        """
        options = options_of(self, acting, {"constrained": True, "temperature": 0.0})
        temperature = Sampling(options["temperature"]).temperature
        grammar = FastGrammar(self.tokenizer).to(next(vla.parameters()).device) if options["constrained"] else None
        spell = ArrivalCounter(self.tokenizer)
        known = vla.llm.architecture["model_type"] in FAMILIES
        if acting.static and known and grammar is not None and temperature == 0:
            fast = StaticFastDecoder(vla, acting.normalise, self.first_id, grammar, acting.compile)

            def write(inputs: Inputs, dim: int, generator: torch.Generator | None) -> Tensor:
                ids = fast.write(inputs, self.action_chunk * dim, acting.clock)
                return torch.from_numpy(spell(ids, self.action_chunk, dim))

            return write

        def decode(inputs: Inputs, dim: int, generator: torch.Generator | None) -> Tensor:
            device_inputs = on_device(inputs, vla, acting)
            embeddings, prefix = vla.prompt(
                device_inputs.pixel_values, device_inputs.input_ids, device_inputs.attention_mask, device_inputs.proprio
            )
            acting.clock("vision")
            alike = bool(inputs.attention_mask.all())
            lengths = None if alike else device_inputs.attention_mask.sum(1) + prefix.shape[1]
            ids = write_fast_tokens(
                vla.llm,
                embeddings,
                lengths,
                self.action_chunk * dim,
                self.first_id,
                _end(vla),
                grammar,
                temperature,
                generator,
            )
            acting.clock("decode")
            return torch.from_numpy(spell(ids, self.action_chunk, dim))

        return decode

    def _decoded(self, ids: Tensor, counted: Tensor, dim: int) -> NDArray[np.float64]:
        sequences = [(self.vocab_size - 1 - row[where]).tolist() for row, where in zip(ids, counted, strict=True)]
        return self.tokenizer.decode(sequences, self.action_chunk, dim)[0]


def _end(vla: VLA) -> int:
    """Id of the end token, from the language model's own config."""
    known = vla.llm.model.config.eos_token_id
    return -1 if known is None else known[0] if isinstance(known, list) else int(known)


@cache
def of_smooth_motion(horizon: int, learnt_ids: int, dim: int = 7, chunks: int = 400) -> FastTokenizer:
    """A FAST tokenizer for robots without a fitted one, from random smooth motion in [-1, 1].

    Its range covers all chunks of this length.
    """
    random, time = np.random.default_rng(0), np.linspace(0, 1, horizon)[:, None]
    shape = (chunks, 1, dim)
    waves = random.normal(size=shape) * np.sin(4 * time * random.random(shape) + 6 * random.random(shape))
    waves[..., -1] = np.where(random.random((chunks, horizon)) < 0.1, -1, 1).cumprod(axis=1)  # a gripper
    ends = np.concatenate([np.full((1, horizon, dim), sign) for sign in (-1.0, 1.0)])
    return FastTokenizer.fit([*waves.clip(-1, 1), *ends], learnt_ids)
