"""How a body is written and read. `msgbus.topic` binds one codec a model, once."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Generic, TypeVar

M = TypeVar("M")


class Codec(ABC, Generic[M]):
    """Turns messages of one model into bytes and back. Shared by all tasks and threads of a process: keep no state a call."""

    content_type: str
    """What `encode` writes, as it travels in the `content-type` header."""

    @abstractmethod
    def accepts(self, content_type: str | None) -> bool:
        """Whether `decode` can read a body of this content type; None where the message names none."""

    @abstractmethod
    def encode(self, message: M) -> bytes:
        """The body. Raises ValueError or TypeError, saying why, when the message does not fit the model; never sends half of one."""

    @abstractmethod
    def decode(self, body: bytes) -> M:
        """The message. Raises ValueError, saying why, when the body does not fit the model. Runs no code that the body names."""
