"""The prompts, in one place."""

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
    """The kind of prompt for a language model: a chat if it was trained on chats, like Vicuna."""
    return "vicuna" if "vicuna" in llm.lower() else "pure"


def build_prompt(instruction: str, kind: PromptKind = "pure") -> str:
    """Return the released prompt for `instruction`, which is put in lower case.

    Args:
        instruction: the task, for example "put the spoon on the towel".
        kind: `pure` as in openvla-7b, `vicuna` (a chat) as in openvla-7b-v01.

    Raises:
        ValueError: for an unknown kind or an empty instruction. External texts first pass `gate.accepted`, which is
            stricter.
    """
    if not instruction.strip():
        raise ValueError("the instruction is empty: say what the robot should do, for example 'lift the red cube'")
    words = instruction.strip(CONTROL) or instruction
    return build_turn(_QUESTION.format(instruction=words.lower()), kind)


def build_turn(message: str, kind: PromptKind = "pure", first: bool = True) -> str:
    """Return the text before the model's answer to `message`, as in the released VLMs.

    Args:
        message: the person's message.
        kind: as in `build_prompt`.
        first: whether the conversation begins with `message`.

    Raises:
        ValueError: for an unknown kind.
    """
    if kind not in _TURN:
        raise ValueError(f"unknown prompt kind {kind!r}; known: {', '.join(_TURN)}")
    return (_SYSTEM[kind] if first else "") + _TURN[kind].format(message=message)
