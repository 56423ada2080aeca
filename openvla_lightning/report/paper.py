"""What the OpenVLA paper reports where this repository measures the same."""

from collections.abc import Mapping

LIBERO = "OpenVLA in the paper (Table 12: LoRA r=32, 3 x 500 rollouts)"

SUCCESS: Mapping[str, Mapping[str, str]] = {
    "libero_spatial": {LIBERO: "84.7 %"},
    "libero_object": {LIBERO: "88.4 %"},
    "libero_goal": {LIBERO: "79.2 %"},
    "libero_10": {LIBERO: "53.7 %"},
}
"""Task set -> row -> success rate. A policy evaluated on another selection of tasks has another task set."""
