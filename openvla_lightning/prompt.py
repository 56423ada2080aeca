"""The sentence a robot is asked with, written once."""

from typing import Literal

PromptKind = Literal["pure", "vicuna"]

_QUESTION = "What action should the robot take to {instruction}?"
_SENTENCES: dict[str, str] = {
    "pure": f"In: {_QUESTION}\nOut:",
    "vicuna": (
        "A chat between a curious user and an artificial intelligence assistant. The assistant gives helpful, detailed,"
        f" and polite answers to the user's questions. USER: {_QUESTION} ASSISTANT:"
    ),
}


def build_prompt(instruction: str, kind: PromptKind = "pure") -> str:
    """Return the released prompt for `instruction`, which is put in lower case.

    Args:
        instruction: what the robot is told, for example "put the spoon on the towel".
        kind: `pure` as in openvla-7b, `vicuna` (a chat) as in openvla-7b-v01.

    Raises:
        ValueError: for an unknown kind or an empty instruction.
    """
    if kind not in _SENTENCES:
        raise ValueError(f"unknown prompt kind {kind!r}; known: {', '.join(_SENTENCES)}")
    if not instruction.strip():
        raise ValueError("the instruction is empty: say what the robot should do, for example 'lift the red cube'")
    return _SENTENCES[kind].format(instruction=instruction.lower())
