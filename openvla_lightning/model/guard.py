"""A check that costs little beside loading: does the image reach the logits?"""

from pathlib import Path

import torch

from openvla_lightning.model.source import CheckpointError
from openvla_lightning.model.vla import VLA


@torch.inference_mode()
def check_image_matters(vla: VLA, path: str | Path = "the model") -> None:
    """Refuse a model that answers alike to a black and a white image (transformers once dropped the image in silence).

    A few of the visual tokens are enough, so the check costs little beside loading.

    Raises:
        CheckpointError: when the logits are bit-equal.
    """
    backbone, llm = vla.vision_backbone, vla.language_model
    towers = len(backbone.featurizers)
    device = next(vla.parameters()).device
    shape = (1, 3 * towers, backbone.image_size, backbone.image_size)
    pixels = torch.cat([torch.full(shape, value, device=device) for value in (-1.0, 1.0)])
    visual = vla.projector(backbone(pixels))
    visual = visual[:, :: max(1, visual.shape[1] // 16)]
    bos = llm.embed(torch.full((2, 1), llm.architecture.get("bos_token_id", 1), device=device))
    black, white = llm.logits(llm.decode(torch.cat([bos, visual.to(bos.dtype)], dim=1))[:, -1])
    if torch.equal(black, white):
        raise CheckpointError(path, ["a black and a white image give the same logits: the image does not reach them"])
