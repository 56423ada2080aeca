"""`VLA.states(causal=False)` with less work and static shapes: the same hidden states, sooner."""

import logging
from collections.abc import Callable
from dataclasses import fields, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from openvla_lightning.model.attention import run_layer
from openvla_lightning.model.llm import FAMILIES
from openvla_lightning.model.static_decoding import BUCKET
from openvla_lightning.types import Inputs

if TYPE_CHECKING:
    from openvla_lightning.model.vla import VLA

log = logging.getLogger(__name__)

BLANK = 1
"""Id at places whose embeddings are zeros, as OpenVLA-OFT released it: any would do."""


class ParallelReader:
    """Reads places of whole sequences in one pass in which every position sees every other.

    There is no cache and no head over the vocabulary, the towers stop at the layer that is read, and of the last
    decoder layer only keys and values are made of all positions. On a GPU, `captured` makes one CUDA graph of a
    function of inputs.

    Args:
        vla: in its place, in `eval`.
        compile: compile the decoder's layer, once for all layers. None: on a GPU; not with bitsandbytes' layers.
        graph: capture CUDA graphs. None: on a GPU, but not for bitsandbytes' 8 bits, which look at values on the way.
    """

    def __init__(self, vla: "VLA", compile: bool | None = None, graph: bool | None = None) -> None:
        self.vla = vla
        self.device = next(vla.parameters()).device
        gpu, bits = self.device.type == "cuda", (vla.quantisation or {}).get("bits")
        static = vla.llm.architecture["model_type"] in FAMILIES
        self.graph = static and (gpu and bits != 8 if graph is None else graph)
        self.compile = static and (gpu and bits is None if compile is None else compile)
        self._layer = torch.compile(run_layer) if self.compile else run_layer
        self._pool: Any = None

    def states(
        self, inputs: Inputs, *, slots: Tensor, extra: Tensor | None = None, visual: Tensor | None = None
    ) -> Tensor:
        """As `VLA.states` with `causal=False`."""
        embeddings, mask, places = self.vla._sequence(inputs, slots, extra, visual)
        return self.vla.llm.decode_at(embeddings, places, mask, causal=False, run=self._layer)

    def arranged(self, inputs: Inputs) -> Inputs:
        """Inputs on the device; for graphs in a shape that others share.

        Prompts are padded to a multiple of `BUCKET` tokens, and batches by repeating the last row to a power of two.
        """
        return (bucketed(inputs) if self.graph else inputs).sent(self.device)

    def captured(self, function: Callable[..., Tensor]) -> Callable[..., Tensor]:
        """`function` of inputs and tensors as one CUDA graph for each of their shapes; as it is without graphs.

        Args:
            function: of arguments on the device; it looks at no value on the host. What it returns is overwritten by
                the next call.
        """
        graphs: dict[tuple[Any, ...], tuple[list[Tensor], Tensor, torch.cuda.CUDAGraph]] = {}

        @torch.inference_mode()
        def call(*arguments: Inputs | Tensor) -> Tensor:
            if not self.graph:
                return function(*arguments)
            tensors = [tensor for argument in arguments for tensor in _tensors(argument).values() if tensor is not None]
            key = tuple((tensor.shape, tensor.dtype) for tensor in tensors)
            if key not in graphs:
                try:
                    graphs[key] = self._capture(function, arguments)
                except RuntimeError as error:  # an operation that cannot be captured, or no memory left to do it
                    log.warning(f"No CUDA graphs, so actions take longer: {str(error).splitlines()[0]}")
                    self.graph = False
                    return function(*arguments)
            static, out, graph = graphs[key]
            for place, tensor in zip(static, tensors, strict=True):
                place.copy_(tensor, non_blocking=True)
            graph.replay()
            return out

        return call

    def _capture(
        self, function: Callable[..., Tensor], arguments: tuple[Inputs | Tensor, ...]
    ) -> tuple[list[Tensor], Tensor, torch.cuda.CUDAGraph]:
        static = [_cloned(argument) for argument in arguments]
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):  # compiles, and makes what libraries make on first use
            for _ in range(2):
                function(*static)
        torch.cuda.current_stream().wait_stream(side)
        self._pool = self._pool or torch.cuda.graph_pool_handle()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
            out = function(*static)
        return [t for argument in static for t in _tensors(argument).values() if t is not None], out, graph


def parallel_states(vla: "VLA", inputs: Inputs, count: int, reader: ParallelReader | None = None) -> Tensor:
    """Hidden states [B, count, dim] at the first `count` places: their embeddings are zeros, all positions see all."""
    zeros = torch.zeros(len(inputs.input_ids), count, vla.llm.dim, device=inputs.input_ids.device)
    inputs = replace(inputs, places=inputs.places[:, :count])
    return vla.states(inputs, slots=zeros, causal=False) if reader is None else reader.states(inputs, slots=zeros)


def bucketed(inputs: Inputs) -> Inputs:
    """The same with padding to a shape that others share; rows beyond the first ones repeat the last."""
    count = len(inputs.input_ids)
    rows = torch.arange(1 << (count - 1).bit_length(), device=inputs.input_ids.device).clamp(max=count - 1)
    tensors = _tensors(inputs)
    values: dict[str, Any] = {name: None if tensor is None else tensor[rows] for name, tensor in tensors.items()}
    more = -inputs.input_ids.shape[1] % BUCKET
    for name in ("input_ids", "attention_mask"):
        values[name] = nn.functional.pad(values[name], (0, more))
    return replace(inputs, **values)


def _tensors(argument: Inputs | Tensor) -> dict[str, Tensor | None]:
    if isinstance(argument, Tensor):
        return {"": argument}
    values = {field.name: getattr(argument, field.name) for field in fields(argument)}
    return {name: value for name, value in values.items() if value is None or isinstance(value, Tensor)}


def _cloned(argument: Inputs | Tensor) -> Inputs | Tensor:
    if isinstance(argument, Tensor):
        return argument.clone()
    tensors = _tensors(argument)
    copies: dict[str, Any] = {name: None if tensor is None else tensor.clone() for name, tensor in tensors.items()}
    return replace(argument, **copies)
