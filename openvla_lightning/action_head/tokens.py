"""Actions as token ids of the language model, learnt by next-token prediction."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torchmetrics import Metric

from openvla_lightning.action_head.base import Acting, Decoder, on_device, options_of
from openvla_lightning.action_head.metrics import ActionMetrics
from openvla_lightning.actions import ActionTokenizer
from openvla_lightning.model.decoding import Choice
from openvla_lightning.model.llm import next_token_loss
from openvla_lightning.model.static_decoding import StaticDecoder
from openvla_lightning.model.vla import VLA
from openvla_lightning.types import IGNORE_INDEX, Batch, Inputs, Prediction


class TokenHead:
    """Actions as the last `num_bins` token ids, one per dimension, learnt by next-token prediction (paper section 3.2).

    Args:
        num_bins: ids set aside for actions.
        vocab_size: ids in the tokenizer in use, without padding; the action ids are its last ones.
        action_chunk: T, actions written one after the other.
    """

    def __init__(self, num_bins: int = 256, vocab_size: int = 32000, action_chunk: int = 1) -> None:
        if action_chunk < 1:
            raise ValueError(f"action_chunk must be at least 1, got {action_chunk}")
        self.tokenizer = ActionTokenizer(vocab_size=vocab_size, bins=num_bins)
        self.action_chunk = action_chunk
        self._centers = torch.from_numpy(self.tokenizer.bin_centers).float()

    @property
    def config(self) -> dict[str, Any]:
        """Plain constructor arguments."""
        return {
            "num_bins": self.tokenizer.num_bins,
            "vocab_size": self.tokenizer.vocab_size,
            "action_chunk": self.action_chunk,
        }

    def write(self, actions: Tensor | None, rows: int, dim: int, end: int) -> list[list[int]]:
        """The chunk's ids, timestep after timestep, and the end token; nothing when acting: the decoder writes them."""
        if actions is None:
            return [[] for _ in range(rows)]
        return [[*ids, end] for ids in self.encode(actions).tolist()]

    def network(self, dim: int) -> nn.Module | None:
        """None: the language model's own head is all that it needs."""
        return None

    def encode(self, actions: Tensor) -> Tensor:
        """Ids [B, T * D] of normalised actions [B, T, D]; one row is one chunk, timestep after timestep."""
        return torch.from_numpy(self.tokenizer.encode(actions.numpy())).flatten(1)

    def decode(self, ids: Tensor) -> Tensor:
        """Bin centres of `ids`, float64 on the CPU (not every accelerator has float64), in the same shape."""
        return torch.from_numpy(self.tokenizer.decode(ids.cpu().numpy()))

    def loss(self, vla: VLA, batch: Batch) -> tuple[Tensor, Prediction]:
        """What `criterion` says of the ids at `batch.places`, and the actions behind the most likely ids there."""
        logits = next_token_logits(vla, batch)
        targets = batch.labels[:, 1:].gather(1, batch.places)
        if batch.padded is not None:
            targets = self._without_padded(targets, batch)
        loss = self.criterion(logits, targets)
        with torch.no_grad():
            return loss, self.prediction(logits, batch)

    def criterion(self, logits: Tensor, targets: Tensor) -> Tensor:
        """Mean cross-entropy of logits [B, K, vocab] over action tokens and the end token [B, K], as released."""
        return next_token_loss(logits, targets)

    def prediction(self, logits: Tensor, batch: Batch) -> Prediction:
        """The actions behind logits [B, K, vocab] at `batch.places`.

        As in the released metrics the prediction is the most likely id of the whole vocabulary, and the end token
        is not counted.
        """
        targets = batch.labels[:, 1:].gather(1, batch.places)
        rows, where = self._of_actions(targets, batch)
        target, chosen = targets[rows, where], logits[rows, where]
        predicted = chosen.argmax(-1)
        shape = batch.actions.shape
        return Prediction(
            actions=self._center(predicted).reshape(shape),
            targets=self._center(target).reshape(shape),
            correct=predicted == target,
            logits=chosen.detach(),
            counted=None if batch.padded is None else ~batch.padded.repeat_interleave(shape[2], dim=1),
        )

    def metrics(self, datasets: Sequence[str]) -> Metric:
        """Accuracy and L1, overall and for each of `datasets`."""
        return ActionMetrics(datasets)

    def decoder(self, vla: VLA, acting: Acting) -> Decoder:
        """Writes the chunk's ids one after the other.

        Its options: `action_ids_only` (choose among the ids that stand for actions, instead of, as released, among all
        words), `temperature` and `top_k` (see `Choice`).
        """
        own = options_of(self, acting, {"action_ids_only": False, "temperature": 0.0, "top_k": None})
        within = (self.tokenizer.first_id, self.tokenizer.vocab_size) if own["action_ids_only"] else None
        choice = Choice(own["temperature"], own["top_k"], within)
        fast = StaticDecoder(vla, acting.normalise, choice, acting.compile) if acting.static else None

        def decode(inputs: Inputs, dim: int, generator: torch.Generator | None) -> Tensor:
            count = self.action_chunk * dim
            if fast is not None:
                ids = fast(inputs, count, generator, acting.clock)
            else:
                given = on_device(inputs, vla, acting)
                ids = vla.generate(
                    pixel_values=given.pixel_values,
                    input_ids=given.input_ids,
                    attention_mask=given.attention_mask,
                    proprio=given.proprio,
                    max_new_tokens=count,
                    choice=choice,
                    generator=generator,
                )
            return self.decode(ids).reshape(len(inputs), self.action_chunk, dim)

        return decode

    def _of_actions(self, targets: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
        """Where action tokens are among `targets` [B, N]: rows [B, 1] and columns [B, T * D]."""
        is_action = (targets >= self.tokenizer.first_id) & (targets < self.tokenizer.vocab_size)
        # Sorting finds the same number of positions in each row without waiting for the device, as nonzero() would.
        where = is_action.byte().argsort(dim=1, descending=True, stable=True)[:, : batch.actions[0].numel()]
        return torch.arange(len(targets), device=targets.device)[:, None], where

    def _without_padded(self, targets: Tensor, batch: Batch) -> Tensor:
        """Targets [B, K] with `IGNORE_INDEX` for actions past the end of a trajectory; the end token stays."""
        assert batch.padded is not None
        rows, where = self._of_actions(targets, batch)
        hidden = batch.padded.repeat_interleave(batch.actions.shape[2], dim=1)
        return targets.scatter(1, where, targets[rows, where].masked_fill(hidden, IGNORE_INDEX))

    def _center(self, ids: Tensor) -> Tensor:
        if self._centers.device != ids.device:
            self._centers = self._centers.to(ids.device)
        index = self.tokenizer.vocab_size - ids - 1
        return self._centers[index.clamp(0, len(self._centers) - 1)]

    def __getstate__(self) -> dict[str, Any]:
        return vars(self) | {"_centers": self._centers.cpu()}


def next_token_logits(vla: VLA, batch: Inputs) -> Tensor:
    """float32 logits [B, K, vocab] of the ids at `batch.places`."""
    pixels = batch.pixel_values if len(batch.pixel_values) else None  # conversations may have no image
    return vla(pixel_values=pixels, input_ids=batch.input_ids, places=batch.places, proprio=batch.proprio).logits
