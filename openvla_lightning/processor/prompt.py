"""The sentence a robot is asked with, written once."""

from typing import Literal

from openvla_lightning.processor.gate import CONTROL

PromptKind = Literal["pure", "vicuna"]

_QUESTION = "What action should the robot take to {instruction}?"
_SYSTEM = {
    "pure": "",
    "vicuna": (
        "A chat between a curious user and an artificial intelligence assistant. The assistant gives helpful, detailed,"
        " and polite answers to the user's questions. "
    ),
}
_TURN = {"pure": "In: {message}\nOut:", "vicuna": "USER: {message} ASSISTANT:"}


def prompt_of(llm: str) -> PromptKind:
    """How a language model wants to be asked: as a chat if it was trained on chats, as Vicuna was."""
    return "vicuna" if "vicuna" in llm.lower() else "pure"


def build_prompt(instruction: str, kind: PromptKind = "pure") -> str:
    """Return the released prompt for `instruction`, which is put in lower case.

    Args:
        instruction: what the robot is told, for example "put the spoon on the towel".
        kind: `pure` as in openvla-7b, `vicuna` (a chat) as in openvla-7b-v01.

    Raises:
        ValueError: for an unknown kind or an empty instruction. `gate.accepted` is stricter: what comes from outside
            goes through it first.
    """
    if not instruction.strip():
        raise ValueError("the instruction is empty: say what the robot should do, for example 'lift the red cube'")
    words = instruction.strip(CONTROL) or instruction
    return build_turn(_QUESTION.format(instruction=words.lower()), kind)


def build_turn(message: str, kind: PromptKind = "pure", first: bool = True) -> str:
    """Return what stands before the model's answer to `message`, as in the released VLMs.

    Args:
        message: what the person says.
        kind: as above.
        first: whether the conversation begins with it.

    Raises:
        ValueError: for an unknown kind.
    """
    if kind not in _TURN:
        raise ValueError(f"unknown prompt kind {kind!r}; known: {', '.join(_TURN)}")
    return (_SYSTEM[kind] if first else "") + _TURN[kind].format(message=message)
