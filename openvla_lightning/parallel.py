"""FSDP2 through Lightning's ModelParallelStrategy: what to shard is said by class name, in config."""

from collections.abc import Sequence

import torch
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import apply_activation_checkpointing
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard


class FSDP(ModelParallelStrategy):
    """Fully sharded data parallel: every module of the named classes is one shard unit, the rest is another.

    Args:
        wrap: class names of the shard units (`LlamaDecoderLayer`, timm's `Block`).
        checkpoint: class names whose activations are recomputed in the backward pass.
        param_dtype: dtype of computation (`bfloat16`, `float32`); the master weights keep theirs.
        reduce_dtype: dtype in which gradients are summed over ranks.
        reshard_after_forward: give the gathered weights back after the forward pass (saves memory, costs traffic).
    """

    def __init__(
        self,
        wrap: Sequence[str],
        checkpoint: Sequence[str] = (),
        param_dtype: str = "bfloat16",
        reduce_dtype: str = "float32",
        reshard_after_forward: bool = True,
    ) -> None:
        super().__init__(data_parallel_size="auto", tensor_parallel_size=1)
        self.wrap, self.checkpoint = set(wrap), set(checkpoint)
        self.policy = MixedPrecisionPolicy(
            param_dtype=getattr(torch, param_dtype), reduce_dtype=getattr(torch, reduce_dtype)
        )
        self.reshard_after_forward = reshard_after_forward

    def shard(self, model: nn.Module) -> None:
        """Shard `model` in place over the data-parallel mesh.

        Raises:
            ValueError: when a class name of `wrap` or `checkpoint` occurs nowhere in the model.
        """
        present = {type(module).__name__ for module in model.modules()}
        # Towers without ViT blocks and LLMs of other families are fine, as long as something matches.
        for argument, names in (("wrap", self.wrap), ("checkpoint", self.checkpoint)):
            if names and not names & present:
                raise ValueError(f"trainer.strategy.{argument}={sorted(names)} matches no module of this model")
        apply_activation_checkpointing(model, check_fn=lambda module: type(module).__name__ in self.checkpoint)
        assert self.device_mesh is not None
        mesh = self.device_mesh["data_parallel"]
        for module in model.modules():
            if type(module).__name__ in self.wrap:
                self._fully_shard(module, mesh)
        self._fully_shard(model, mesh)

    def _fully_shard(self, module: nn.Module, mesh: torch.distributed.DeviceMesh) -> None:
        fully_shard(module, mesh=mesh, mp_policy=self.policy, reshard_after_forward=self.reshard_after_forward)
