"""FSDP2 through Lightning's ModelParallelStrategy; the config names the classes to shard."""

from collections.abc import Callable, Sequence
from concurrent.futures import Future
from contextlib import nullcontext
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from lightning.pytorch import Trainer
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import nn
from torch.distributed.checkpoint import state_dict as shards
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from torch.utils import _pytree as pytree

from openvla_lightning.checkpoint.disk import CheckpointWriteError, Queue, commit, on_host, remove, unfinished, write
from openvla_lightning.checkpoint.format import CheckpointError
from openvla_lightning.checkpoint.sharded import ABOUT, ShardReader, is_sharded, read_about
from openvla_lightning.model.last_layer import READ_PLACES
from openvla_lightning.model.sequence import PASSES, Read
from openvla_lightning.types import VLAOutput

M = TypeVar("M", bound=nn.Module)

# FSDP of torch 2.11 looks for tensors in registered classes only, and frees weights that the others' backward needs.
for output in (VLAOutput, Read):
    pytree.register_dataclass(output)


class FSDP(ModelParallelStrategy):
    """Fully sharded data parallel: every module of the named classes is one shard unit, the rest of the model another.

    Args:
        wrap: class names of the shard units (`LlamaDecoderLayer`, timm's `Block`).
        param_dtype: dtype of the computation (`bfloat16`, `float32`); the master weights keep their dtype.
        reduce_dtype: dtype in which gradients are summed over ranks.
        reshard_after_forward: free the gathered weights after the forward pass (saves memory, costs traffic).
        replicas: HSDP: this many groups of processes hold a whole model each, sharded within the group. With one
            replica per node, weights are not gathered over the network between nodes.
    """

    def __init__(
        self,
        wrap: Sequence[str],
        param_dtype: str = "bfloat16",
        reduce_dtype: str = "float32",
        reshard_after_forward: bool = True,
        replicas: int = 1,
    ) -> None:
        super().__init__(tensor_parallel_size=1)
        self.wrap = set(wrap)
        self.policy = MixedPrecisionPolicy(
            param_dtype=getattr(torch, param_dtype), reduce_dtype=getattr(torch, reduce_dtype)
        )
        self.reshard_after_forward, self.replicas = reshard_after_forward, replicas
        self.write_in_background(False)

    def setup_environment(self) -> None:
        """Start the process group and arrange the processes.

        Raises:
            ValueError: when they cannot form `replicas` groups.
        """
        self._data_parallel_size = world = self.num_nodes * self.num_processes
        if self.replicas < 1 or world % self.replicas:
            fitting = [n for n in range(1, world + 1) if world % n == 0]
            raise ValueError(
                f"trainer.strategy.replicas={self.replicas}: {world} processes can form {fitting} replicas"
            )
        super().setup_environment()
        self.mesh = self.device_mesh["data_parallel"]
        if self.replicas > 1:
            shape = (self.replicas, world // self.replicas)
            self.mesh = init_device_mesh(self.root_device.type, shape, mesh_dim_names=("replicate", "shard"))
        # The background writer communicates during training, so it needs its own process group.
        self._writers: Any = dist.new_group(backend="gloo")

    def write_in_background(self, asynchronous: bool) -> None:
        """Set whether training continues while a checkpoint is written."""
        self.asynchronous, self._queue = asynchronous, Queue(asynchronous)

    def build(self, build: Callable[[], M]) -> M:
        """Build a model in memory only in the first process; the others have no weights until `shard`."""
        with nullcontext() if self.global_rank == 0 else torch.device("meta"):
            model = build()
        torch.set_rng_state(self.broadcast(torch.get_rng_state()))  # as if all had built it
        return model

    def shard(self, model: nn.Module) -> None:
        """Shard `model` in place over the data-parallel mesh, then distribute the first process' weights.

        Raises:
            ValueError: when no class name of `wrap` occurs in the model.
        """
        present = {type(module).__name__ for module in model.modules()}
        # Towers without ViT blocks and LLMs of other families are fine, as long as one class matches.
        if self.wrap and not self.wrap & present:
            raise ValueError(f"trainer.strategy.wrap={sorted(self.wrap)} matches no module of this model")
        kinds = self.broadcast(sorted({str(parameter.dtype) for parameter in model.parameters()}))
        if kinds != ["torch.float32"]:
            raise ValueError(f"sharded weights are kept in float32, these are {', '.join(kinds)}: set model.dtype=null")
        weights = model.state_dict() if self.global_rank == 0 else {}
        self._empty(model)
        for module in list(model.modules()):
            if type(module).__name__ in self.wrap:
                self._fully_shard(module, self.policy)
                if hasattr(module, READ_PLACES):
                    register_fsdp_forward_method(module, READ_PLACES)
            elif isinstance(module, nn.modules.batchnorm._BatchNorm):  # its running statistics are not sharded
                exact = MixedPrecisionPolicy(param_dtype=torch.float32, output_dtype=self.policy.param_dtype)
                self._fully_shard(module, exact)
        if (head := getattr(model, "action_head", None)) is not None:  # called outside the model's `forward`
            public = {name for name in vars(type(head)) if not name.startswith("_")}  # sharding changes the class
            self._fully_shard(head, self.policy)
            for name in public - {"forward"}:
                register_fsdp_forward_method(head, name)
        self._fully_shard(model, self.policy)
        for name in PASSES:
            if hasattr(model, name):
                register_fsdp_forward_method(model, name)
        options = shards.StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
        shards.set_model_state_dict(model, weights, options=options)

    def _fully_shard(self, module: nn.Module, policy: MixedPrecisionPolicy) -> None:
        fully_shard(module, mesh=self.mesh, mp_policy=policy, reshard_after_forward=self.reshard_after_forward)

    def _empty(self, model: nn.Module) -> None:
        """Give parameters no memory, keep tied ones tied, and put buffers on the device."""
        emptied: dict[nn.Parameter, nn.Parameter] = {}
        for module in model.modules():
            for name, parameter in module.named_parameters(recurse=False):
                if parameter not in emptied:
                    learns = parameter.requires_grad
                    emptied[parameter] = nn.Parameter(torch.empty_like(parameter, device="meta"), requires_grad=learns)
                setattr(module, name, emptied[parameter])
            for name, buffer in module.named_buffers(recurse=False):
                place = torch.empty_like(buffer, device=self.root_device)
                module._buffers[name] = place if buffer.is_meta else buffer.to(self.root_device)

    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: str | Path, storage_options: Any = None) -> None:
        """Write a folder: every process writes its shards, the first one the rest. It appears only when complete.

        Raises:
            CheckpointWriteError: on all processes, when any of them could not write this checkpoint or, in the
                background, the last one.
        """
        self.finish_checkpoints()
        path = Path(self.broadcast(str(filepath)))
        beside = unfinished(path)
        tensors = {"state_dict": checkpoint.pop("state_dict")}
        tensors |= {f"optimizer_{i}": state for i, state in enumerate(checkpoint.pop("optimizer_states", []))}
        checkpoint = on_host(checkpoint) if self.asynchronous else checkpoint
        self._together(path, lambda: self._start_over(beside))
        if not self.asynchronous:
            self._together(path, lambda: self._write(tensors, checkpoint, path))
            return
        writing = dcp.async_save(tensors, checkpoint_id=beside, process_group=self._writers)
        assert isinstance(writing, Future)
        self._path = path
        self._queue.add(lambda: self._complete(writing.result, checkpoint, path))

    def _write(self, tensors: dict[str, Any], checkpoint: dict[str, Any], path: Path) -> None:
        self._complete(lambda: dcp.save(tensors, checkpoint_id=unfinished(path)), checkpoint, path)

    def _start_over(self, beside: Path) -> None:
        if self.global_rank == 0:
            remove(beside)
            beside.mkdir(parents=True)

    def _complete(self, shards_written: Callable[[], Any], checkpoint: dict[str, Any], path: Path) -> None:
        shards_written()
        if self.global_rank == 0:
            write(checkpoint, unfinished(path) / ABOUT)
            commit(unfinished(path), path)

    def _together(self, path: Path, job: Callable[[], None]) -> None:
        """Run `job` on all processes, and fail on all if it failed on one."""
        problem = None
        try:
            job()
        except (OSError, RuntimeError, CheckpointException) as error:
            problem = str(error) or type(error).__name__
        problems: list[str | None] = [None] * self.world_size
        dist.all_gather_object(problems, problem)
        if failures := [problem for problem in problems if problem is not None]:
            if self.global_rank == 0:
                remove(unfinished(path))
            raise CheckpointWriteError(path, min(failures, key=len))

    def finish_checkpoints(self) -> None:
        """Return when all checkpoints are on the disk.

        Raises:
            CheckpointWriteError: on all processes, when one could not be written.
        """
        if self.asynchronous and self._queue.waiting:
            self._together(self._path, self._queue.wait)

    def remove_checkpoint(self, filepath: str | Path) -> None:
        """Remove a checkpoint, once the newer one is on the disk."""
        self._queue.add(lambda: remove(Path(filepath)) if self.global_rank == 0 else None)

    def load_checkpoint(self, checkpoint_path: str | Path, weights_only: bool | None = None) -> dict[str, Any]:
        """Read a sharded checkpoint, written by any number of processes; every process reads its own part.

        Raises:
            CheckpointError: for any other file or folder.
        """
        path = Path(self.broadcast(str(checkpoint_path)))
        if not is_sharded(path):
            problem = "it is one file: go on from it with the trainer that wrote it (gpu, ddp), or start from its "
            raise CheckpointError(path, [f"{problem}weights with model.init_from={path}"])
        assert self.model is not None
        reader = ShardReader(path)
        stored = reader.read_metadata().state_dict_metadata
        weights = shards.get_model_state_dict(self.model)
        lacking = [f"{name}: missing" for name in weights if f"state_dict.{name}" not in stored]
        if lacking and self.lightning_module.strict_loading:  # type: ignore[union-attr]
            raise CheckpointError(path, lacking)
        weights = {name: tensor for name, tensor in weights.items() if f"state_dict.{name}" in stored}
        content: dict[str, Any] = {"state_dict": weights}
        model = self.model
        optimizers: list[Any] = [shards.get_optimizer_state_dict(model, optimizer) for optimizer in self.optimizers]
        for number, state in enumerate(optimizers):
            start = f"optimizer_{number}.state."
            # A parameter that never had a gradient, such as those of a tower's last block, has no optimiser state.
            moved = {key.removeprefix(start).rpartition(".")[0] for key in stored if key.startswith(start)}
            content[f"optimizer_{number}"] = {**state, "state": {k: v for k, v in state["state"].items() if k in moved}}
        dcp.load(content, storage_reader=reader)
        shards.set_model_state_dict(self.model, weights, options=shards.StateDictOptions(strict=False))
        for optimizer, state in zip(self.optimizers, optimizers, strict=True):
            shards.set_optimizer_state_dict(self.model, optimizer, state)
        return {**read_about(path), "state_dict": weights}


def accumulate(trainer: Trainer, global_batch_size: int, per_device: int | None) -> None:
    """Let `trainer` accumulate batches of `per_device` samples until they make up an optimiser step.

    Args:
        trainer: knows the number of devices.
        global_batch_size: samples of an optimiser step.
        per_device: samples that fit on one device; None: follows from the trainer's `accumulate_grad_batches`.

    Raises:
        ValueError: the numbers do not divide evenly; the message names numbers that do.
    """
    if per_device is None:
        return
    world, configured = trainer.world_size, trainer.accumulate_grad_batches
    share, rest = divmod(global_batch_size, world)
    if rest:
        fitting = " or ".join(str(n * world) for n in (share, share + 1) if n)
        raise ValueError(
            f"data.global_batch_size={global_batch_size} cannot be shared by {world} devices; {fitting} can"
        )
    if per_device < 1 or share % per_device:
        fitting = ", ".join(str(n) for n in range(1, share + 1) if share % n == 0)
        raise ValueError(
            f"batch_size_per_device={per_device} does not divide the {share} samples of a device "
            f"(data.global_batch_size={global_batch_size} on {world}); these do: {fitting}"
        )
    if configured not in (1, share // per_device):
        raise ValueError(
            f"trainer.accumulate_grad_batches={configured} and batch_size_per_device={per_device}, which makes "
            f"{share // per_device} of them, say different things: give one"
        )
    trainer.accumulate_grad_batches = batches = share // per_device
    for name in ("val_check_interval", "limit_val_batches"):  # Lightning counts these in batches, we count in steps
        if isinstance(count := getattr(trainer, name), int):
            setattr(trainer, name, count * batches)
