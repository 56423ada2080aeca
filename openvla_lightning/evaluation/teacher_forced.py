"""What a policy predicts on recorded steps, every token after the true ones before it."""

from collections.abc import Sequence

import torch

from openvla_lightning.model import VLAOutput
from openvla_lightning.policy import Policy
from openvla_lightning.types import Batch, Step


@torch.inference_mode()
def predict(policy: Policy, steps: Sequence[Step]) -> tuple[VLAOutput, Batch]:
    """One forward pass over the steps, as in training; what they become as a batch comes along."""
    batch = policy.processor.collate(list(steps)).to(policy.device)
    output = policy.vla(
        pixel_values=policy.processor.transform.normalise(batch.pixel_values).to(policy.dtype),
        input_ids=batch.input_ids,
        attention_mask=batch.attention_mask,
    )
    return output, batch
