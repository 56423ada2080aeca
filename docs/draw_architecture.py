"""Draws docs/architecture.png, the picture of the README: python docs/draw_architecture.py"""

from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import FancyBboxPatch

HEADS = ["tokens", "tokens, parallel", "FAST", "L1", "diffusion", "flow", "CogACT"]
FROZEN, LEARNT, OUTSIDE = "#dbe7f3", "#f6dfc4", "#eeeeee"


def box(axes: Axes, left: float, bottom: float, width: float, height: float, text: str, colour: str) -> None:
    """A part of the model, or what goes in and out."""
    round_corners = "round,pad=0,rounding_size=0.12"
    axes.add_patch(
        FancyBboxPatch((left, bottom), width, height, boxstyle=round_corners, facecolor=colour, edgecolor="0.35")
    )
    axes.text(left + width / 2, bottom + height / 2, text, ha="center", va="center", fontsize=9)


def arrow(axes: Axes, start: tuple[float, float], end: tuple[float, float]) -> None:
    """What flows from one box into another."""
    axes.annotate("", end, start, arrowprops={"arrowstyle": "-|>", "color": "0.35"})


def main() -> None:
    """Draw it beside this file."""
    figure = Figure(figsize=(11, 3.6), layout="constrained")
    axes = figure.subplots()
    axes.set(xlim=(0, 22), ylim=(0, 7.2))
    axes.set_axis_off()
    box(axes, 0.1, 4.6, 3.6, 1.4, "camera images\none or several views", OUTSIDE)
    box(axes, 0.1, 2.7, 3.6, 1.2, "instruction", OUTSIDE)
    box(axes, 0.1, 0.8, 3.6, 1.2, "robot state (optional)", OUTSIDE)
    box(axes, 4.7, 5.4, 2.5, 1.1, "SigLIP", FROZEN)
    box(axes, 4.7, 4.0, 2.5, 1.1, "DINOv2", FROZEN)
    box(axes, 8.2, 4.6, 2.3, 1.4, "projector\n(MLP)", FROZEN)
    box(axes, 4.7, 0.8, 2.5, 1.2, "MLP", LEARNT)
    box(axes, 11.5, 1.6, 2.8, 4.2, "Llama-2 7B\n\nfull, LoRA,\nQLoRA, frozen", FROZEN)
    for place, head in enumerate(reversed(HEADS)):
        box(axes, 15.3, 0.25 + 0.97 * place, 2.9, 0.78, head, LEARNT)
    box(axes, 19.2, 2.7, 2.7, 1.9, "chunk of actions\n[T, D], in the\nrobot's units", OUTSIDE)
    for end in (5.95, 4.55):
        arrow(axes, (3.7, 5.3), (4.7, end))
        arrow(axes, (7.2, end), (8.2, 5.3))
    arrow(axes, (10.5, 5.3), (11.5, 4.8))
    arrow(axes, (3.7, 3.3), (11.5, 3.6))
    arrow(axes, (3.7, 1.4), (4.7, 1.4))
    arrow(axes, (7.2, 1.4), (11.5, 2.6))
    arrow(axes, (14.3, 3.7), (15.3, 3.7))
    arrow(axes, (18.2, 3.7), (19.2, 3.7))
    axes.text(16.75, 7.05, "action_head=", ha="center", fontsize=9, family="monospace")
    figure.savefig(Path(__file__).with_name("architecture.png"), dpi=130)


if __name__ == "__main__":
    main()
