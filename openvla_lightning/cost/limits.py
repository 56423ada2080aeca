"""The hardware's lower limit of the time per action."""

from torch import Tensor, nn

from openvla_lightning.cost.cards import Card
from openvla_lightning.model.vla import VLA


def bound(vla: VLA, hardware: Card, tokens: int, count: int) -> float:
    """Lower limit in seconds for writing a chunk id by id at batch 1: reading weights or computing, stage by stage.

    Args:
        vla: the model.
        hardware: the card.
        tokens: tokens in the prompt, visual ones included.
        count: number of ids to write.
    """
    read, times = hardware.bandwidth_gbs * 1e9, hardware.tflops * 1e12
    embedding = vla.llm.model.embed_tokens.weight
    layers, head = stored(vla.llm) - embedding.nbytes, vla.llm.lm_head.weight.numel()
    numbers = sum(p.numel() for p in vla.llm.parameters()) - embedding.numel() - head
    see = sum(p.numel() for p in [*vla.vision_backbone.parameters(), *vla.projector.parameters()])
    patches = vla.vision_backbone.num_patches
    vision = max(2 * see * patches / times, (stored(vla.vision_backbone) + stored(vla.projector)) / read)
    prefill = max(2 * (numbers * tokens + head) / times, layers / read)
    return vision + prefill + (count - 1) * layers / read


def stored(module: nn.Module) -> int:
    """Bytes of a module's weights in memory; for bitsandbytes, without the scales beside them."""

    def size(tensor: Tensor) -> int:
        flatten = getattr(tensor, "__tensor_flatten__", None)  # torchao's tensors contain other tensors
        return tensor.nbytes if flatten is None else sum(size(getattr(tensor, name)) for name in flatten()[0])

    return sum(size(parameter) for parameter in module.parameters())
