"""The command line, `msgbus`: one file a command group. What it needs comes with the extra `cli`; nothing of it is loaded before `main`.

Exit codes: 0 fine; 1 refused or failed, with the reason on stderr; 2 wrong usage; 130 interrupted by Ctrl-C.
"""

from __future__ import annotations

import sys
from importlib.util import find_spec

NEEDED = ("typer", "rich")
INSTALL = 'pip install "msgbus[cli]"'


def main() -> None:
    """The entry point `msgbus`. Without the extra it says what to install, and exits 1."""
    missing = [name for name in NEEDED if find_spec(name) is None]
    if missing:
        print(f"msgbus: the command line needs {' and '.join(missing)}: {INSTALL}", file=sys.stderr)
        raise SystemExit(1)
    from msgbus.cli.app import app

    app(prog_name="msgbus")
