"""What is installed is what was promised: the wheel alone runs on memory://, and with every extra the command is there.

Needs the package index that pip is set up with.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import venv
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
HAS_CLI = any((ROOT / "src" / "msgbus" / name).exists() for name in ("cli.py", "cli/__init__.py"))


def run(*command: str | Path, where: Path, check: bool = True) -> subprocess.CompletedProcess[str]:
    """Runs a command in a directory, cut off from this checkout; fails with all that it said."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "MSGBUS_", "VIRTUAL_ENV"))}
    done = subprocess.run([str(word) for word in command], cwd=where, env=environment, capture_output=True, text=True, check=False)
    if check and done.returncode:
        pytest.fail(f"{command} ended with {done.returncode}\n{done.stdout}\n{done.stderr}")
    return done


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel of this checkout."""
    place = tmp_path_factory.mktemp("dist")
    run(sys.executable, "-m", "hatchling", "build", "--target", "wheel", "--directory", place, where=ROOT)
    (built,) = place.glob("*.whl")
    return built


def installed(place: Path, wheel: Path, extras: str = "") -> Path:
    """The interpreter of a new environment that has the wheel, and what it asks for, and nothing else."""
    environment = place / "venv"
    venv.create(environment, symlinks=True)
    python = environment / "bin" / "python"
    pip = (sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet", "--python", python)
    run(*pip, "install", "--constraint", ROOT / "constraints.txt", f"{wheel}{extras}", where=place)
    return python


def test_the_wheel_holds_the_packages_and_nothing_else(wheel: Path) -> None:
    """The import packages, each with its py.typed, the license and the entry points; no tests, examples or left-overs."""
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        (points,) = (archive.read(name).decode() for name in names if name.endswith(".dist-info/entry_points.txt"))
    assert {name.split("/")[0].partition("-")[0] for name in names} == {
        "msgbus",
        "msgbus_kafka",
        "msgbus_memory",
        "msgbus_rabbitmq",
        "msgbus_redis",
    }
    assert {f"msgbus{one}/py.typed" for one in ("", "_kafka", "_memory", "_rabbitmq", "_redis")} <= set(names)
    assert any(name.endswith("/licenses/LICENSE") for name in names)
    assert not [name for name in names if name.endswith(".pyc")]
    assert "[msgbus.adapters]" in points
    assert "memory = msgbus_memory:MemoryAdapter" in points


def test_without_extras(wheel: Path, tmp_path: Path) -> None:
    """The wheel and its dependencies run the README's program on memory://; no client library and no extra is there.

    What needs an extra says so, with the line that installs it.
    """
    python = installed(tmp_path, wheel)
    listed = run(python, "-I", "-c", _DISTRIBUTIONS, where=tmp_path).stdout.split()
    assert {"msgbus", "pydantic", "pydantic-settings", "tenacity"} <= set(listed)
    extras = {"typer", "rich", "pytest", "pytest-asyncio", "sqlalchemy", "aiormq", "aiokafka", "redis", "opentelemetry-api"}
    assert extras & set(listed) == set()

    block = re.search(r"^```python\n(.*?)^```$", (ROOT / "README.md").read_text(), flags=re.MULTILINE | re.DOTALL)
    assert block is not None
    (tmp_path / "program.py").write_text(block[1])
    assert run(python, "-I", "program.py", where=tmp_path).stdout == "invoice for A-1: 42\n"

    asking: list[tuple[str, list[str | Path]]] = [("testing", [python, "-I", "-c", "import msgbus.testing"])]
    if HAS_CLI:
        asking.append(("cli", [python.parent / "msgbus", "--help"]))
    for extra, command in asking:
        done = run(*command, where=tmp_path, check=False)
        assert done.returncode != 0
        assert f'pip install "msgbus[{extra}]"' in done.stderr, done.stderr


def test_with_every_extra(wheel: Path, tmp_path: Path) -> None:
    """With `msgbus[all]` the command answers, and the suite that adapters run can be collected."""
    python = installed(tmp_path, wheel, "[all]")
    if HAS_CLI:
        assert "explain" in run(python.parent / "msgbus", "--help", where=tmp_path).stdout
    collected = run(python, "-m", "pytest", "--collect-only", "--quiet", "--pyargs", "msgbus.testing", where=tmp_path)
    assert "test_publish_returns_after_confirm" in collected.stdout


_DISTRIBUTIONS = """
from importlib.metadata import distributions
print(*(distribution.name.lower().replace("_", "-") for distribution in distributions()))
"""
