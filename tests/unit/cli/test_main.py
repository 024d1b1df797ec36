"""The entry points: `msgbus`, `python -m msgbus`, and what they say without the extra."""

from __future__ import annotations

import subprocess
import sys

import pytest

from msgbus import cli


@pytest.mark.parametrize("missing", ["typer", "rich"])
def test_without_the_extra_it_says_what_to_install(
    missing: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The exact pip line, on stderr, and exit 1."""
    monkeypatch.setitem(sys.modules, missing, None)
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == 1
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err == f'msgbus: the command line needs {missing}: pip install "msgbus[cli]"\n'


def test_python_m_msgbus_is_the_command_line() -> None:
    """It answers with its version, and with exit 2 for what is no command."""
    version = subprocess.run([sys.executable, "-m", "msgbus", "--version"], capture_output=True, text=True, check=True, timeout=30)
    assert version.stdout.startswith("msgbus ")
    wrong = subprocess.run([sys.executable, "-m", "msgbus", "walk"], capture_output=True, text=True, check=False, timeout=30)
    assert (wrong.returncode, wrong.stdout) == (2, "")
    assert "walk" in wrong.stderr
