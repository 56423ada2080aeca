"""A GPU without one: what runs on it has shapes and no values, what runs on the CPU is real, and what passes between
them is written down.

    with fake_gpu() as gpu:
        policy = random_policy(config, torch.device("cuda"), torch.bfloat16, None)
        policy.act_chunk([seen])
        assert gpu.where("read") == ["policy.py:act_chunk"]
"""

import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

import bitsandbytes  # noqa: F401  peft imports it late, and older ones look at the device then
import fake_devices
import torch
from fake_devices import GPU, Devices, Fake, placed
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, unset_fake_temporarily
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

ROOT, OWN = Path(__file__).parents[1], {__file__, fake_devices.__file__}
SMALL = 1 << 16
"""Bytes up to which a copy from memory that is not pinned is staged at once, and hence waits for nobody."""
ATEN = torch.ops.aten
PRODUCTS = {ATEN.mm, ATEN.addmm, ATEN.convolution}
"""Of layers; what torch does for attention where it has no kernel is no sign of what a GPU does."""
INDEXING = {ATEN.index, ATEN.index_put, ATEN.index_put_}


class CaptureError(AssertionError):
    """While a CUDA graph is captured: what CUDA refuses, or what the graph would keep for ever."""


@dataclass(frozen=True)
class Event:
    """Something that a GPU would have noticed.

    Attributes:
        kind: `read`: the host waits for a value. `copy`: a copy to the device for which the host waits. `pageable`: a
            large copy from memory that is not pinned, for which it waits, too. `quick`: a copy that nobody waits for.
            `float64`: a result of that dtype. `float32 product`: of matrices.
        where: the innermost place in the repository, `file.py:function`.
    """

    kind: str
    where: str


class FakeGPU(TorchDispatchMode):
    """What `fake_gpu` gives.

    Attributes:
        events: what was noticed since this list was cleared.
        scalar: what the host gets when it reads a value.
        captures: of each CUDA graph that was captured the operations, with the shapes of their results.
        replays: how often one was replayed.
    """

    def __init__(self) -> None:
        super().__init__()
        self.events: list[Event] = []
        self.scalar: float = 1
        self.captures: list[list[tuple[str, Any]]] = []
        self.replays = 0
        self.capturing = False
        self.disguised = True  # see `fake_devices.Fake`
        self.pinned: set[int] = set()
        self.alive: list[Tensor] = []  # pinned memory, so that no address comes twice
        self.modes: tuple[Any, ...] = (Fake(self), self, Devices(self))

    @contextmanager
    def here(self) -> Iterator[None]:
        """Have this GPU in the thread that asks: the others have none."""
        with ExitStack() as stack:
            for mode in self.modes:
                stack.enter_context(mode)
            yield

    def where(self, *kinds: str) -> list[str]:
        """Where events of these kinds happened, in order."""
        return [event.where for event in self.events if event.kind in kinds]

    def summary(self) -> dict[str, int]:
        """How often each event happened, as `kind at place`."""
        return dict(Counter(f"{event.kind} at {event.where}" for event in self.events))

    def note(self, kind: str) -> None:
        """Write an event down.

        Raises:
            CaptureError: when a graph is being captured.
        """
        self.events.append(Event(kind, _place()))
        if self.capturing and kind in ("read", "copy", "pageable", "quick"):
            raise CaptureError(f"{kind} at {_place()} while a CUDA graph is captured")

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        packet = function._overloadpacket
        if function.namespace == "prim":  # a question about a tensor
            return function(*args, **kwargs)
        if packet is ATEN.pin_memory:
            return self._pin(args[0])
        tensors = [value for value in tree_leaves((args, kwargs)) if isinstance(value, Tensor)]
        on_gpu = any(isinstance(tensor, FakeTensor) for tensor in tensors)
        kwargs = placed(kwargs)
        device = kwargs.get("device")
        if not on_gpu and (device is None or torch.device(device).type != "cuda"):
            with unset_fake_temporarily():
                return function(*args, **kwargs)
        if torch.is_inference_mode_enabled() or any(tensor.is_inference() for tensor in tensors):
            # autograd, which would have taken the operation apart, was passed by
            with self:
                parts = function.decompose(*args, **kwargs)
            if parts is not NotImplemented:
                return parts
        if packet in (ATEN.normal_, ATEN.uniform_):  # there are no values to draw
            return args[0]
        if packet is ATEN._local_scalar_dense:
            self.note("read")
            return bool(self.scalar) if args[0].dtype == torch.bool else self.scalar
        if packet in (ATEN.equal, ATEN.nonzero, ATEN.masked_select, ATEN._unique2):
            self.note("read")
        if packet is ATEN._to_copy and device is not None and torch.device(device).type == "cpu":
            self.note("read")
            with unset_fake_temporarily():
                return torch.zeros(args[0].shape, dtype=kwargs.get("dtype") or args[0].dtype, device="cpu")
        if packet is ATEN.copy_ and not isinstance(args[0], FakeTensor):
            self.note("read")
            return args[0]
        self._copies(packet, args, kwargs, tensors)
        if packet is ATEN._to_copy and not on_gpu:
            dtype = kwargs.get("dtype") or args[0].dtype
            result: Any = torch.empty_strided(args[0].shape, args[0].stride(), dtype=dtype, device=GPU)
        elif packet is ATEN.copy_ and not isinstance(args[1], FakeTensor):
            result = args[0]
        else:
            result = function(*args, **kwargs)
        self._results(packet, result)
        return result

    def _pin(self, tensor: Tensor) -> Tensor:
        with unset_fake_temporarily():
            pinned = tensor.clone()
        self.pinned.add(pinned.untyped_storage().data_ptr())
        self.alive.append(pinned)
        return pinned

    def _copies(self, packet: Any, args: Any, kwargs: Any, tensors: list[Tensor]) -> None:
        for tensor in tensors:
            if isinstance(tensor, FakeTensor) or (tensor.ndim == 0 and packet not in (ATEN._to_copy, ATEN.copy_)):
                continue  # a number is handed to the kernel with its other arguments
            quick = kwargs.get("non_blocking") or (packet is ATEN.copy_ and args[2:3] == (True,))
            if packet not in (ATEN._to_copy, ATEN.copy_):
                if packet not in INDEXING:
                    continue  # the fake tensors refuse
                quick = False
            if quick and tensor.untyped_storage().data_ptr() not in self.pinned and tensor.nbytes > SMALL:
                self.note("pageable")
            else:
                self.note("quick" if quick else "copy")

    def _results(self, packet: Any, result: Any) -> None:
        for tensor in tree_leaves(result):
            if not isinstance(tensor, FakeTensor):
                continue
            if tensor.dtype in (torch.float64, torch.complex128):
                self.note("float64")
            if packet in PRODUCTS and tensor.dtype == torch.float32:
                self.note("float32 product")
            if self.capturing:
                self.captures[-1].append((packet.__name__, tuple(tensor.shape)))


def _place() -> str:
    """The innermost frame in the package or in a test's file, without the fake GPU's own."""
    frame = sys._getframe(1)
    while frame is not None:
        path = frame.f_code.co_filename
        if path.startswith(str(ROOT)) and path not in OWN and "site-packages" not in path:
            return f"{Path(path).name}:{frame.f_code.co_name}"
        frame = frame.f_back  # type: ignore[assignment]
    return "elsewhere"


def _stand_ins(gpu: FakeGPU) -> Iterator[tuple[Any, str, Any]]:
    """What asks for a real GPU, and what answers instead."""

    class Graph:
        def replay(self) -> None:
            gpu.replays += 1

    @contextmanager
    def capture(*_: Any, **__: Any) -> Iterator[None]:
        gpu.captures.append([])
        gpu.capturing = True
        try:
            yield
        finally:
            gpu.capturing = False

    class Stream:
        def wait_stream(self, other: Any) -> None:
            """In order anyway."""

    class Generator(torch.Generator):
        def __new__(cls, device: Any = "cpu") -> "Generator":
            return super().__new__(cls, "cpu")

    def place(module: nn.Module, change: Any, recurse: bool = True) -> nn.Module:
        """`nn.Module._apply`, which swaps tensors in a way that fake ones do not survive."""
        for child in module.children():
            child._apply(change)
        for name, parameter in module._parameters.items():
            if parameter is not None and (new := change(parameter)) is not parameter:
                module._parameters[name] = nn.Parameter(new.detach(), parameter.requires_grad)
        for name, buffer in module._buffers.items():
            module._buffers[name] = None if buffer is None else change(buffer)
        return module

    yield torch, "Generator", Generator
    yield nn.Module, "_apply", place
    yield torch, "compile", lambda function=None, **_: function
    yield torch.cuda, "is_available", lambda: True
    yield torch.cuda, "is_bf16_supported", lambda *_, **__: True
    yield torch.cuda, "current_device", lambda: 0
    yield torch.cuda, "get_device_capability", lambda *_: (9, 0)
    yield torch.cuda, "Stream", Stream
    yield torch.cuda, "current_stream", Stream
    yield torch.cuda, "stream", lambda stream: nullcontext()
    yield torch.cuda, "CUDAGraph", Graph
    yield torch.cuda, "graph", capture
    yield torch.cuda, "graph_pool_handle", lambda: (0, 1)
    yield FakeTensor, "tolist", lambda tensor: tensor.cpu().tolist()  # one copy, not one for each number
    yield torch.Tensor, "pin_memory", lambda tensor, *_: gpu._pin(tensor)
    yield torch._subclasses.fake_tensor, "init_gpu_context", lambda device: None


@contextmanager
def fake_gpu() -> Iterator[FakeGPU]:
    """Inside, `device="cuda"` is to be had: forward passes run, backward ones do not."""
    gpu = FakeGPU()
    with ExitStack() as stack:
        for target, name, value in _stand_ins(gpu):
            stack.enter_context(patch.object(target, name, value))
        stack.enter_context(gpu.here())
        yield gpu
