"""Actions as token ids of the language model, learnt by next-token prediction."""

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from openvla_lightning.action_head.base import Acting, Decoder, on_device, options_of
from openvla_lightning.actions import ActionTokenizer
from openvla_lightning.model.decoding import Sampling
from openvla_lightning.model.jacobi_decoding import JacobiDecoder
from openvla_lightning.model.llm import next_token_loss
from openvla_lightning.model.parallel_decoding import BLANK, ParallelReader, parallel_states
from openvla_lightning.model.static_decoding import StaticDecoder
from openvla_lightning.model.vla import VLA
from openvla_lightning.types import IGNORE_INDEX, Batch, Inputs, Prediction

if TYPE_CHECKING:
    from torchmetrics import Metric


class TokenHead:
    """Actions as the last `num_bins` token ids, one per dimension, learnt by next-token prediction (paper section 3.2).

    Args:
        num_bins: ids set aside for actions.
        vocab_size: ids in the tokenizer in use, without padding; the action ids are its last ones.
        action_chunk: T, actions of a chunk.
        parallel: predict all ids of a chunk in one forward pass, as OpenVLA-OFT does, instead of one after the other:
            attention goes in both directions, and the places of the ids hold zeros in training and acting alike.
    """

    def __init__(
        self, num_bins: int = 256, vocab_size: int = 32000, action_chunk: int = 1, parallel: bool = False
    ) -> None:
        if action_chunk < 1:
            raise ValueError(f"action_chunk must be at least 1, got {action_chunk}")
        self.tokenizer = ActionTokenizer(vocab_size=vocab_size, bins=num_bins)
        self.action_chunk, self.parallel = action_chunk, parallel
        self._centers = torch.from_numpy(self.tokenizer.bin_centers).float()

    @property
    def config(self) -> dict[str, Any]:
        """Plain constructor arguments."""
        return {
            "num_bins": self.tokenizer.num_bins,
            "vocab_size": self.tokenizer.vocab_size,
            "action_chunk": self.action_chunk,
            **({"parallel": True} if self.parallel else {}),
        }

    def write(self, actions: Tensor | None, rows: int, dim: int, end: int) -> list[list[int]]:
        """The chunk's ids, timestep after timestep, and the end token.

        When acting nothing, for the decoder writes them; all at once, blank places and the end token.
        """
        if actions is None:
            return [[*[BLANK] * (self.action_chunk * dim), end] if self.parallel else [] for _ in range(rows)]
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
        logits = self._parallel_logits(vla, batch) if self.parallel else next_token_logits(vla, batch)
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

    def metrics(self, datasets: Sequence[str]) -> "Metric":
        """Accuracy and L1, overall and for each of `datasets`."""
        from openvla_lightning.action_head.metrics import ActionMetrics  # torchmetrics takes a second

        return ActionMetrics(datasets)

    def decoder(self, vla: VLA, acting: Acting) -> Decoder:
        """Writes the chunk's ids one after the other, or all at once.

        Its options: `action_ids_only` (choose among the ids that stand for actions, instead of, as released, among all
        words), `temperature` and `top_k` (see `Sampling`), and `decoding`: `stepwise`, or `parallel_exact`, which
        guesses the ids of the action before and verifies them in one pass: the same ids, in fewer passes.
        """
        usual = {"action_ids_only": False, "temperature": 0.0, "top_k": None, "decoding": "stepwise"}
        options = options_of(self, acting, usual)
        if options["decoding"] not in ("stepwise", "parallel_exact"):
            raise ValueError(f"decoding={options['decoding']} is not known; choose stepwise or parallel_exact")
        within = (self.tokenizer.first_id, self.tokenizer.vocab_size) if options["action_ids_only"] else None
        choice = Sampling(options["temperature"], options["top_k"], within)
        if self.parallel:
            return self._parallel_decoder(vla, acting, choice)
        fast: StaticDecoder | JacobiDecoder | None = None
        if options["decoding"] == "parallel_exact":
            middle = self.tokenizer.first_id + self.tokenizer.num_bins // 2
            fast = JacobiDecoder(vla, acting.normalise, choice, middle)
        elif acting.static:
            fast = StaticDecoder(vla, acting.normalise, choice, acting.compile)

        def decode(inputs: Inputs, dim: int, generator: torch.Generator | None) -> Tensor:
            count = self.action_chunk * dim
            if fast is not None:
                ids = fast(inputs, count, generator, acting.clock)
            else:
                device_inputs = on_device(inputs, vla, acting)
                ids = vla.generate(
                    pixel_values=device_inputs.pixel_values,
                    input_ids=device_inputs.input_ids,
                    attention_mask=device_inputs.attention_mask,
                    proprio=device_inputs.proprio,
                    max_new_tokens=count,
                    choice=choice,
                    generator=generator,
                )
            return self.decode(ids).reshape(len(inputs), self.action_chunk, dim)

        return decode

    def _parallel_logits(self, vla: VLA, batch: Batch) -> Tensor:
        zeros = torch.zeros(len(batch), batch.actions[0].numel(), vla.llm.dim, device=batch.input_ids.device)
        return vla.logits(batch, slots=zeros)

    def _parallel_decoder(self, vla: VLA, acting: Acting, choice: Sampling) -> Decoder:
        reader = ParallelReader(vla, acting.compile) if acting.static else None

        def ids(inputs: Inputs, noise: Tensor | None = None) -> Tensor:
            count = inputs.places.shape[1] - 1  # the last place is the end token's
            inputs = replace(inputs, pixel_values=acting.normalise(inputs.pixel_values))
            hidden = parallel_states(vla, inputs, count, reader)
            flat = None if noise is None else noise.flatten(0, 1)
            return choice.ids(vla.llm, hidden.flatten(0, 1), flat).reshape(hidden.shape[:2])

        write = ids if reader is None else reader.captured(ids)

        @torch.inference_mode()
        def decode(inputs: Inputs, dim: int, generator: torch.Generator | None) -> Tensor:
            device = next(vla.parameters()).device
            device_inputs = inputs.to(device) if reader is None else reader.arranged(inputs)
            noise = choice.noise(vla.llm, len(device_inputs), self.action_chunk * dim, generator)
            acting.clock("copy")
            written = write(device_inputs) if noise is None else write(device_inputs, noise.to(device))
            acting.clock("decode")
            return self.decode(written[: len(inputs)]).reshape(len(inputs), self.action_chunk, dim)

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
