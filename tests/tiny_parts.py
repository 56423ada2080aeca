"""A tower and a language model of a few thousand parameters, and a VLA of both."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from openvla_lightning.model import VLA  # takes seconds: imported by the tests that build one

TOWERS = {"tiny": {"id": "convnext_atto", "depths": [1, 1, 1, 1], "dims": [8, 16, 16, 8]}}
LLAMA = {
    "model_type": "llama",
    "vocab_size": 768,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": 256,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}


def tiny_vla(seed: int = 0) -> VLA:
    """A VLA for pictures of 32 x 32 with random weights."""
    from openvla_lightning.model import VLA
    from openvla_lightning.model.llm import CausalLM
    from openvla_lightning.model.projector import MLP
    from openvla_lightning.model.vision_backbone import VisionBackbone

    torch.manual_seed(seed)
    return VLA(
        vision_backbone=lambda: VisionBackbone(towers=TOWERS, image_size=32, pretrained=False),
        projector=MLP,
        llm=lambda: CausalLM(name="tiny", vocab_size=768, architecture=LLAMA, pretrained=False),
    )
