"""Where tensors lie that name a GPU on a machine without one; `fake_gpu` notes what passes to and from it."""

from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode

GPU, UNNUMBERED = torch.device("cuda", 0), torch.device("cuda")
SEEN = {"__get__", "linear", "matmul", "__matmul__", "mm", "bmm", "addmm", "baddbmm", "conv2d"}
SEEN |= {"scaled_dot_product_attention", "layer_norm", "group_norm", "softmax", "log_softmax"}
SEEN |= {"cross_entropy", "nll_loss"}
"""Functions that are told where a tensor is: `tensor.is_cuda` is one, and autocast asks before it multiplies."""
USUAL = (torch.Tensor.__torch_function__, torch._C._disabled_torch_function_impl)


class Fake(FakeTensorMode):
    """Torch's own code asks the driver about the device of a tensor that names one: here it names none."""

    def __init__(self, gpu: Any) -> None:
        super().__init__(allow_non_fake_inputs=True)
        self.gpu = gpu

    def dispatch(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.prim.device.default and self.gpu.disguised:
            return torch.device("meta")
        return super().dispatch(func, types, args, placed(kwargs or {}))


def placed(options: dict[str, Any]) -> dict[str, Any]:
    """A tensor like one that says that it is nowhere lies on the GPU, but for models that are built on `meta`."""
    nowhere = (device := options.get("device")) is not None and torch.device(device).type == "meta"
    return {**options, "device": GPU} if nowhere and torch.get_default_device().type != "meta" else options


class Devices(TorchFunctionMode):
    """Names the one GPU in full, as finding out its number would ask the driver.

    And makes `torch.tensor(values, device="cuda")` what it is: a tensor on the CPU and a copy that the host waits for.
    """

    def __init__(self, gpu: Any) -> None:
        super().__init__()
        self.gpu = gpu

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function is torch.device:
            return _numbered(function(*args, **(kwargs or {})))
        given = {name: _numbered(value) for name, value in (kwargs or {}).items()}
        own = next((kind for kind in types if kind.__torch_function__ not in USUAL), None)
        if own is not None and torch._C._is_torch_function_enabled():
            with self:  # what a quantised tensor does instead
                return own.__torch_function__(function, types, tuple(map(_numbered, args)), given)
        if function in (torch.tensor, torch.as_tensor) and given.get("device") == GPU:
            return function(*args, **{**given, "device": "cpu"}).to(GPU)
        self.gpu.disguised = getattr(function, "__name__", "") not in SEEN
        try:
            return function(*map(_numbered, args), **given)
        finally:
            self.gpu.disguised = True


def _numbered(value: Any) -> Any:
    unnumbered = value == "cuda" if isinstance(value, str) else isinstance(value, torch.device) and value == UNNUMBERED
    return GPU if unnumbered else value
