"""Logs of `msgbus run`, on stderr: coloured on a terminal, plain lines elsewhere. A program that set up its own keeps them."""

from __future__ import annotations

import logging

from rich.logging import RichHandler

from msgbus.cli.console import err


class Remembering(logging.Filter):
    """Lets everything pass, and remembers the errors whose traceback was logged, so that none is shown twice."""

    def __init__(self) -> None:
        super().__init__()
        self.shown: set[int] = set()

    def filter(self, record: logging.LogRecord) -> bool:
        """Always true."""
        if isinstance(record.exc_info, tuple) and record.exc_info[1] is not None:
            self.shown.add(id(record.exc_info[1]))
        return True


def set_up(level: str | None) -> Remembering:
    """Logs from `level` on (default: info). Where the program has set up its own, only a level that is given is applied."""
    root = logging.getLogger()
    remembering = Remembering()
    if root.handlers:
        for theirs in root.handlers:
            theirs.addFilter(remembering)
        if level is not None:
            logging.getLogger("msgbus").setLevel(level.upper())
        return remembering
    handler: logging.Handler
    if err().is_terminal:
        handler = RichHandler(console=err(), show_path=False, log_time_format="%H:%M:%S", omit_repeated_times=False)
    else:
        handler = logging.StreamHandler()
        handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    handler.addFilter(remembering)
    root.addHandler(handler)
    root.setLevel((level or "info").upper())
    return remembering
