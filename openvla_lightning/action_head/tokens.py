"""Actions as token ids of the language model, learnt by next-token prediction."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from openvla_lightning.action_head.metrics import ActionMetrics
from openvla_lightning.actions import ActionTokenizer
from openvla_lightning.model.llm import next_token_loss
from openvla_lightning.types import Batch, VLAOutput


class TokenHead:
    """Actions as the last `num_bins` token ids, one per dimension, learnt by next-token prediction (paper section 3.2).

    Args:
        num_bins: ids set aside for actions.
        vocab_size: ids in the tokenizer in use, without padding; the action ids are its last ones.
    """

    def __init__(self, num_bins: int = 256, vocab_size: int = 32000) -> None:
        self.tokenizer = ActionTokenizer(vocab_size=vocab_size, bins=num_bins)
        self._centers = torch.from_numpy(self.tokenizer.bin_centers).float()

    @property
    def config(self) -> dict[str, Any]:
        """Plain constructor arguments."""
        return {"num_bins": self.tokenizer.num_bins, "vocab_size": self.tokenizer.vocab_size}

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> "TokenHead":
        """Rebuild from `config`."""
        return cls(**config)

    def encode(self, actions: Tensor) -> Tensor:
        """Ids [B, T * D] of normalised actions [B, T, D]; one row is one chunk, timestep after timestep."""
        return torch.from_numpy(self.tokenizer.encode(actions.numpy())).flatten(1)

    def loss(self, output: VLAOutput, batch: Batch) -> Tensor:
        """Mean cross-entropy over action tokens and the end token, as released."""
        return next_token_loss(output.next_token_logits, output.targets(batch.labels))

    def score(self, output: VLAOutput, batch: Batch) -> tuple[Tensor, Tensor]:
        """Was each action token predicted exactly, and how far off is its bin centre: bool and float [B, T * D].

        As in the released metrics the prediction is the most likely id of the whole vocabulary, and the end token
        is not counted.
        """
        targets = output.targets(batch.labels)
        rows, where = self._of_actions(targets, batch)
        target, predicted = targets[rows, where], output.next_token_logits[rows, where].argmax(-1)
        return predicted == target, (self._center(predicted) - self._center(target)).abs()

    def metrics(self, datasets: Sequence[str]) -> ActionMetrics:
        """Accuracy and L1, overall and for each of `datasets`."""
        return ActionMetrics(datasets)

    def entropy(self, output: VLAOutput, batch: Batch) -> Tensor:
        """How undecided each action token's prediction is: entropy in nats, float32 [B, T * D]."""
        rows, where = self._of_actions(output.targets(batch.labels), batch)
        return torch.distributions.Categorical(logits=output.next_token_logits[rows, where].float()).entropy()

    def _of_actions(self, targets: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
        """Where action tokens are among `targets` [B, N]: rows [B, 1] and columns [B, T * D]."""
        is_action = (targets >= self.tokenizer.first_id) & (targets < self.tokenizer.vocab_size)
        # Sorting finds the same number of positions in each row without waiting for the device, as nonzero() would.
        where = is_action.byte().argsort(dim=1, descending=True, stable=True)[:, : batch.actions[0].numel()]
        return torch.arange(len(targets), device=targets.device)[:, None], where

    def decode(self, ids: Tensor) -> Tensor:
        """Bin centres of `ids`, float64 on the CPU (not every accelerator has float64), in the same shape."""
        return torch.from_numpy(self.tokenizer.decode(ids.cpu().numpy()))

    def _center(self, ids: Tensor) -> Tensor:
        if self._centers.device != ids.device:
            self._centers = self._centers.to(ids.device)
        index = self.tokenizer.vocab_size - ids - 1
        return self._centers[index.clamp(0, len(self._centers) - 1)]
