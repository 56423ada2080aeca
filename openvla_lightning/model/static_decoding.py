"""A faster `VLA.generate` with static shapes: the same ids, with CUDA graphs and compilation on a GPU."""

import logging
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from openvla_lightning.model.decoding import MOST_LIKELY, Sampling, decode
from openvla_lightning.model.llm import FAMILIES
from openvla_lightning.types import Inputs

if TYPE_CHECKING:
    from openvla_lightning.model.vla import VLA

log = logging.getLogger(__name__)

BUCKET = 16
"""To keep the number of captured or compiled shapes small, prompts are padded to a multiple of this many tokens, and
batches to a power of two by repeating their last row."""


@dataclass(slots=True)
class _Buffers:
    """The tensors of one action or of a batch of actions. A graph reads the first five and fills the others.

    Attributes:
        pixels: uint8 [B, 3V, H, W].
        input_ids: int64 [B, L], padding on the right.
        text_lengths: int64 [B], without padding.
        noise: see `Sampling.noise`.
        proprio: float32 [B, P], if the model reads it.
        embeddings: of prompt and visual tokens [B, S, dim].
        prefix: number of tokens between BOS and the other text.
        layers: keys and values of each layer.
        last: hidden state [B, dim] after the prompt.
        ids: the written ids, int64 [B, count].
        writing: state of a subclass's decoding between its steps.
    """

    pixels: Tensor
    input_ids: Tensor
    text_lengths: Tensor
    noise: Tensor | None
    proprio: Tensor | None
    count: int
    embeddings: Any = None
    prefix: int = 0
    layers: Any = None
    last: Any = None
    ids: Any = None
    writing: Any = None


class _KeysValues:
    """Keys and values [B, heads, S + room, head_dim] of one layer, in the form of attention's cache.

    The first call stores the prompt's, each later one writes at `place`, int64 [1]. Because each layer has its own
    object and the place is a tensor, all layers and steps share one compilation.
    """

    def __init__(self, room: int) -> None:
        self.room = room
        self.keys: Any = None
        self.values: Any = None
        self.place: Any = None

    def update(self, keys: Tensor, values: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        """Store keys and values [B, heads, L, head_dim]; return those to attend to."""
        if self.keys is None:
            self.keys = nn.functional.pad(keys, (0, 0, 0, self.room))
            self.values = nn.functional.pad(values, (0, 0, 0, self.room))
            return keys, values
        self.keys.index_copy_(2, self.place, keys)
        self.values.index_copy_(2, self.place, values)
        return self.keys, self.values


class StaticDecoder:
    """Writes ids for pixels and prompts, in stages of static shape: `vision`, `prefill`, `decode`.

    Args:
        vla: the model, on its device and in `eval`.
        normalise: uint8 [B, 3V, H, W] -> float [B, 3 * towers * V, H, W] on any device (`ImageTransform.normalise`).
        choice: how ids are chosen.
        compile: compile the language model's layer, once for all layers. At most three versions are compiled; the third
            serves all further shapes. None: only on a GPU, because on a CPU compilation costs more than it saves.
            bitsandbytes' layers are never compiled.
        graph: capture each stage as a CUDA graph. None: on a GPU, except for bitsandbytes' 8 bits, which inspect
            values.
    """

    def __init__(
        self,
        vla: "VLA",
        normalise: Callable[[Tensor], Tensor],
        choice: Sampling = MOST_LIKELY,
        compile: bool | None = None,
        graph: bool | None = None,
    ) -> None:
        self.vla, self.choice, self._normalise = vla, choice, normalise
        self.device = next(vla.parameters()).device
        gpu = self.device.type == "cuda"
        bits = (vla.quantisation or {}).get("bits")  # bitsandbytes' layers: 4 and 8
        self._static = self.vla.llm.architecture["model_type"] in FAMILIES
        self.graph = self._static and (gpu and bits != 8 if graph is None else graph)
        self.compile = self._static and (gpu and bits is None if compile is None else compile)
        self._layer = torch.compile(_layer) if self.compile else _layer
        self._captured: dict[tuple[int, ...], tuple[_Buffers, list[Callable[[], None]]]] = {}
        self._pool: Any = None

    @torch.inference_mode()
    def __call__(
        self,
        inputs: Inputs,
        count: int = 7,
        generator: torch.Generator | None = None,
        clock: Callable[[str], None] = lambda stage: None,
    ) -> Tensor:
        """Ids [B, count] on the device.

        Args:
            inputs: on the CPU, pixels uint8 [B, 3V, H, W], padding on either side.
            count: how many ids to write.
            generator: on the CPU, for sampling.
            clock: called with the name of each stage when its work has been handed to the device: `copy`, `vision`,
                `prefill`, `decode`.
        """
        action, stages = self._prepared(inputs, count, generator)
        clock("copy")
        for name, stage in zip(("vision", "prefill", "decode"), stages, strict=True):
            stage()
            clock(name)
        return action.ids[: len(inputs)].clone()

    def _prepared(
        self, inputs: Inputs, count: int, generator: torch.Generator | None
    ) -> tuple[_Buffers, list[Callable[[], None]]]:
        """The tensors of one call on the device, and the functions to run on them: graphs, or the stages themselves."""
        action = self._arranged(inputs, count, generator)
        if self.graph:
            try:
                return self._ready(action)
            except RuntimeError as error:  # an operation cannot be captured, or there is no memory
                log.warning(f"No CUDA graphs, so actions take longer: {str(error).splitlines()[0]}")
                self.graph = False
        _move(action, self.device)
        return action, [partial(stage, action) for stage in self._stages]

    def _arranged(self, inputs: Inputs, count: int, generator: torch.Generator | None) -> _Buffers:
        """Move padding to the right, where causal attention never looks, and pad inputs to one of a few shapes."""
        pixels, mask, proprio = inputs.pixel_values, inputs.attention_mask, inputs.proprio
        lengths = mask.long().sum(1)
        width = int(lengths.max())
        order = mask.int().argsort(dim=1, descending=True, stable=True)
        ids = inputs.input_ids.gather(1, order)[:, :width]
        if self.graph or self.compile:
            ids = nn.functional.pad(ids, (0, -width % BUCKET))
            rows = torch.arange(1 << (len(ids) - 1).bit_length()).clamp(max=len(ids) - 1)
            pixels, ids, lengths = pixels[rows], ids[rows], lengths[rows]
            proprio = None if proprio is None else proprio[rows]
        noise = self.choice.noise(self.vla.llm, len(ids), count, generator)
        return _Buffers(pixels, ids, lengths, noise, proprio, count)

    @property
    def _stages(self) -> list[Callable[[_Buffers], None]]:
        return [self._see, self._read, self._write] if self._static else [self._see, lambda action: None, self._plainly]

    def _see(self, action: _Buffers) -> None:
        ids, lengths = action.input_ids, action.text_lengths
        mask = torch.arange(ids.shape[1], device=ids.device) < lengths[:, None]
        action.embeddings, prefix = self.vla.prompt(self._normalise(action.pixels), ids, mask, action.proprio)
        action.prefix = prefix.shape[1]

    def _read(self, action: _Buffers) -> None:
        """Run image and prompt through the language model in one pass."""
        llm, embeddings = self.vla.llm, action.embeddings
        action.layers = [_KeysValues(action.count - 1) for _ in llm.model.layers]
        positions = torch.arange(embeddings.shape[1], device=embeddings.device)[None]
        hidden = self._decode(action, embeddings, positions, None)
        rows = torch.arange(len(hidden), device=hidden.device)
        action.last = hidden[rows, action.text_lengths + action.prefix - 1]

    def _write(self, action: _Buffers) -> None:
        """Write one id after the other, in all rows at the same place right of the padding, which a mask hides."""
        llm, steps = self.vla.llm, torch.arange(action.count - 1, device=action.last.device)
        draws = [None] * action.count if action.noise is None else action.noise.unbind(1)
        ids = [self.choice.ids(llm, action.last, draws[0])]
        for step in range(action.count - 1):
            hidden = self._follow(action, ids[-1], steps[step : step + 1])
            ids.append(self.choice.ids(llm, hidden, draws[step + 1]))
        action.ids = torch.stack(ids, dim=1)

    def _follow(self, action: _Buffers, ids: Tensor, step: Tensor) -> Tensor:
        """Hidden states [B, dim] after ids [B], which were written in step `step`, int64 [1]."""
        width = action.input_ids.shape[1] + action.prefix
        lengths, place = action.text_lengths[:, None] + action.prefix, width + step
        places = torch.arange(width + action.count - 1, device=ids.device)
        mask = (places < lengths) | ((places >= width) & (places <= place))
        for layer in action.layers:
            layer.place = place
        return self._decode(action, self.vla.llm.embed(ids[:, None]), lengths + step, mask[:, None, None])[:, -1]

    def _decode(self, action: _Buffers, hidden: Tensor, positions: Tensor, mask: Tensor | None) -> Tensor:
        decoder = self.vla.llm.model
        self.vla.llm.attend_without_mask()
        rotary = decoder.rotary_emb(hidden, positions)
        for layer, kept in zip(decoder.layers, action.layers, strict=True):
            hidden = self._layer(layer, hidden, mask, positions, rotary, kept)
        return self.vla.llm.norm(hidden)

    def _plainly(self, action: _Buffers) -> None:
        lengths = action.text_lengths + action.prefix
        action.ids = decode(self.vla.llm, action.embeddings, lengths, action.count, self.choice, action.noise)

    def _ready(self, buffers: _Buffers) -> tuple[_Buffers, list[Callable[[], None]]]:
        """The graphs for these shapes, captured if they are new, with `buffers` copied into their input tensors."""
        key = (*buffers.pixels.shape, *buffers.input_ids.shape, buffers.count)
        if key not in self._captured:
            action = _Buffers(
                buffers.pixels, buffers.input_ids, buffers.text_lengths, buffers.noise, buffers.proprio, buffers.count
            )
            _move(action, self.device)
            self._captured[key] = action, self._capture(action)
        action, stages = self._captured[key]
        for name in _INPUTS:
            value = getattr(buffers, name)
            if value is not None:
                getattr(action, name).copy_(value.pin_memory(), non_blocking=True)
        return action, stages

    def _capture(self, action: _Buffers) -> list[Callable[[], None]]:
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):  # compile, and let libraries initialise themselves
            for _ in range(2):
                for stage in self._stages:
                    stage(action)
        torch.cuda.current_stream().wait_stream(side)
        self._pool = self._pool or torch.cuda.graph_pool_handle()
        graphs = []
        for stage in self._stages:
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
                stage(action)
            graphs.append(graph.replay)
        return graphs


_INPUTS = ("pixels", "input_ids", "text_lengths", "noise", "proprio")


def _move(action: _Buffers, device: torch.device) -> None:
    for name in _INPUTS:
        value = getattr(action, name)
        setattr(action, name, None if value is None else value.to(device))


def _layer(
    layer: nn.Module, hidden: Tensor, mask: Tensor | None, positions: Tensor, rotary: Any, kept: _KeysValues
) -> Tensor:
    """One decoder layer; a separate function, so that compilation treats all layers as the same code."""
    return layer(hidden, attention_mask=mask, position_ids=positions, position_embeddings=rotary, past_key_values=kept)
