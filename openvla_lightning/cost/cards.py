"""Speed and memory of accelerators, from data sheets: the table for estimates, logs and benchmarks."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Card:
    """An accelerator.

    Attributes:
        name: a part of torch's device name.
        memory_gb: in 10^9 bytes.
        tflops: 10^12 dense bfloat16 operations per second, with sums in float32.
        bandwidth_gbs: memory bandwidth, 10^9 bytes per second.
    """

    name: str
    memory_gb: float
    tflops: float
    bandwidth_gbs: float


# A name that contains another one comes before it.
CARDS = (
    Card("GH200", 96, 989, 4000),
    Card("H200", 141, 989, 4800),
    Card("H100 PCIe", 80, 756, 2039),
    Card("H100", 80, 989, 3350),
    Card("B200", 180, 2250, 8000),
    Card("A100-SXM4-40GB", 40, 312, 1555),
    Card("A100-PCIE-40GB", 40, 312, 1555),
    Card("A100", 80, 312, 2039),
    Card("L40S", 48, 362, 864),
    Card("L40", 48, 181, 864),
    Card("L4", 24, 121, 300),
    Card("RTX A6000", 48, 155, 768),
    Card("RTX 5090", 32, 210, 1792),
    Card("RTX 4090", 24, 165, 1008),
)


def card(device_name: str) -> Card | None:
    """The entry for a name from `torch.cuda.get_device_name`; None for a card that is not in the table."""
    return next((known for known in CARDS if known.name.lower() in device_name.lower()), None)
