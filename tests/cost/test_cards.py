"""Cards are recognised by the names that torch gives them."""

import pytest

from openvla_lightning.cost.cards import CARDS, card


@pytest.mark.parametrize(
    ("device_name", "name"),
    [
        ("NVIDIA A100-SXM4-80GB", "A100"),
        ("NVIDIA A100-SXM4-40GB", "A100-SXM4-40GB"),
        ("NVIDIA H100 80GB HBM3", "H100"),
        ("NVIDIA H100 PCIe", "H100 PCIe"),
        ("NVIDIA H200", "H200"),
        ("NVIDIA GH200 480GB", "GH200"),
        ("NVIDIA B200", "B200"),
        ("NVIDIA L40S", "L40S"),
        ("NVIDIA L40", "L40"),
        ("NVIDIA L4", "L4"),
        ("NVIDIA GeForce RTX 4090", "RTX 4090"),
        ("NVIDIA GeForce RTX 5090", "RTX 5090"),
    ],
)
def test_names_of_torch_find_their_card(device_name: str, name: str) -> None:
    found = card(device_name)
    assert found is not None
    assert found.name == name


def test_every_entry_can_be_found_and_others_are_not() -> None:
    assert [card(known.name) for known in CARDS] == list(CARDS)
    assert card("Radeon") is None
