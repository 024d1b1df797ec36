"""What type checkers see of the public interface: right uses pass, and each wrong one is refused by mypy and by pyright.

`tests/typing/wrong.py` marks each mistake with an ignore for each checker, and both run so that a mark that silences nothing is an
error: a run without errors is the proof that every marked line is refused, by both, and no other line is.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]
TYPING = ROOT / "tests" / "typing"
LEAST_MISTAKES = 40
MARKED = re.compile(r"# type: ignore\[[a-z, -]+\]  # pyright: ignore\[[A-Za-z, ]+\]$")


def checked(*arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYRIGHT_PYTHON_IGNORE_WARNINGS": "1"}
    return subprocess.run(
        [sys.executable, "-m", *arguments], cwd=ROOT, env=environment, capture_output=True, text=True, check=False, timeout=290
    )


@pytest.mark.timeout(300)
def test_mypy_strict_accepts_the_right_uses_and_refuses_each_wrong_one() -> None:
    """mypy --strict finds nothing in ok.py, and in wrong.py an error on exactly the marked lines."""
    result = checked("mypy", "--strict", "--warn-unused-ignores", "--no-error-summary", "tests/typing/ok.py", "tests/typing/wrong.py")
    assert result.returncode == 0, result.stdout + result.stderr


@pytest.mark.timeout(300)
def test_pyright_strict_accepts_the_right_uses_and_refuses_each_wrong_one() -> None:
    """pyright in strict mode finds nothing in ok.py, and in wrong.py an error on exactly the marked lines."""
    result = checked("pyright", "--project", str(TYPING / "pyrightconfig.json"), "--pythonpath", sys.executable, "--outputjson")
    report = json.loads(result.stdout)
    found = [f"{item['file']}:{item['range']['start']['line'] + 1}: {item['message']}" for item in report["generalDiagnostics"]]
    assert not found, "\n".join(found)
    assert report["summary"]["filesAnalyzed"] == 2


def test_the_wrong_uses_are_marked_for_both_checkers_and_the_right_ones_for_none() -> None:
    """A mark names both checkers and their rules, so neither can be silenced alone; and there are at least 40 mistakes."""
    wrong = (TYPING / "wrong.py").read_text().splitlines()
    code = wrong[wrong.index("from __future__ import annotations") :]
    marked = [line for line in code if "ignore[" in line]
    assert len(marked) >= LEAST_MISTAKES
    assert [line for line in marked if not MARKED.search(line)] == []
    assert "ignore[" not in (TYPING / "ok.py").read_text()


@pytest.mark.timeout(300)
@pytest.mark.parametrize("checker", ["mypy", "pyright"])
def test_a_mark_on_a_right_line_is_an_error(checker: str, tmp_path: Path) -> None:
    """The check checks: a marked line without a mistake does not pass."""
    mark = "# type: ignore[arg-type]" if checker == "mypy" else "# pyright: ignore[reportArgumentType]"
    (tmp_path / "right.py").write_text(f"text: str = 'right'  {mark}\n")
    if checker == "mypy":
        result = checked("mypy", "--strict", "--config-file=", "--cache-dir", os.devnull, str(tmp_path / "right.py"))
    else:
        settings = json.loads((TYPING / "pyrightconfig.json").read_text())
        (tmp_path / "pyrightconfig.json").write_text(json.dumps(settings))
        result = checked("pyright", "--project", str(tmp_path), "--pythonpath", sys.executable)
    assert result.returncode == 1, result.stdout + result.stderr
    assert "nnecessary" in result.stdout or "nused" in result.stdout
