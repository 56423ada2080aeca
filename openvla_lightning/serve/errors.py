"""Errors that a client gets instead of an action."""

from typing import Any


class Refused(Exception):
    """A request that gets no action.

    Args:
        status: HTTP status code.
        code: the reason as a word, for programs.
        message: what was wrong and what is expected, for people.
        facts: further data for programs, such as the known keys.
    """

    def __init__(self, status: int, code: str, message: str, **facts: Any) -> None:
        super().__init__(message)
        self.status, self.code, self.message, self.facts = status, code, message, facts

    @property
    def body(self) -> dict[str, Any]:
        """`{"error": {"status": ..., "code": ..., "message": ..., ...}}`."""
        return {"error": {"status": self.status, "code": self.code, "message": self.message, **self.facts}}
