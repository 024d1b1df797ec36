"""README.md, docs/ and the pages of examples/ do what they say: code runs, commands exist, links lead somewhere, lists are complete."""

from __future__ import annotations

import ast
import asyncio
import importlib
import importlib.util
import inspect
import linecache
import re
import shlex
import sys
import tomllib
import types
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from msgbus.settings import Settings

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md")), *sorted((ROOT / "examples").rglob("*.md"))]
SUITE = "msgbus.testing.adapter_suite"
MOST_OF_IT = 75
"""Tests from which the suite counts as written."""


@dataclass(frozen=True)
class Block:
    """A fenced block of a page. `line` is where its first line stands, from 1."""

    language: str
    text: str
    line: int


def blocks(page: Path) -> list[Block]:
    """Every fenced block of a page, in order."""
    found: list[Block] = []
    language: str | None = None
    start = 0
    lines = page.read_text().splitlines()
    for number, line in enumerate(lines, 1):
        if not line.startswith("```"):
            continue
        if language is None:
            language, start = line[3:].strip(), number + 1
        else:
            found.append(Block(language, "\n".join(lines[start - 1 : number - 1]) + "\n", start))
            language = None
    assert language is None, f"{page}: the block that begins in line {start} does not end"
    return found


def prose(page: Path) -> str:
    """A page without its blocks."""
    return re.sub(r"^```.*?^```$", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)


def name(page: Path) -> str:
    return str(page.relative_to(ROOT))


@pytest.fixture(params=PAGES, ids=name)
def page(request: pytest.FixtureRequest) -> Path:
    found = request.param
    assert isinstance(found, Path)
    return found


# ---------------------------------------------------------------- code


@pytest.fixture
def namespace(page: Path) -> Iterator[types.ModuleType]:
    """The module that a page's blocks share; importable while they run, as pydantic and `get_type_hints` ask."""
    module = types.ModuleType("docs_" + re.sub(r"\W", "_", name(page)))
    module.__file__ = str(page)
    sys.modules[module.__name__] = module
    yield module
    del sys.modules[module.__name__]


def run_block(block: Block, page: Path, module: types.ModuleType, runner: asyncio.Runner) -> None:
    """Runs a block as `python -m asyncio` would: an `await` may stand at the top level."""
    source = "\n" * (block.line - 1) + block.text  # line numbers of a traceback are those of the page
    filename = f"{page}:block"
    linecache.cache[filename] = (len(source), None, source.splitlines(keepends=True), filename)
    code = compile(source, filename, "exec", flags=ast.PyCF_ALLOW_TOP_LEVEL_AWAIT, dont_inherit=True)
    if code.co_flags & inspect.CO_COROUTINE:

        async def run() -> None:
            async with asyncio.timeout(20):
                await eval(code, module.__dict__)  # our own page

        runner.run(run())
    else:
        exec(code, module.__dict__)  # our own page


def test_code_runs(
    page: Path, namespace: types.ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Every python block of a page runs, in order, in one namespace, away from any settings; what a page asserts holds.

    A line `# prints: TEXT` in a block means that the block has printed a line TEXT.
    """
    monkeypatch.chdir(tmp_path)
    for variable in ("MSGBUS_URL", "MSGBUS_SERVICE"):
        monkeypatch.delenv(variable, raising=False)
    with asyncio.Runner() as runner:
        for block in blocks(page):
            if block.language != "python":
                continue
            run_block(block, page, namespace, runner)
            printed = capsys.readouterr().out.splitlines()
            for promised in re.findall(r"# prints: (.*)", block.text):
                assert promised in printed


def test_every_block_says_its_language(page: Path) -> None:
    """A block is `python` (it runs), `sh` (its commands exist), `toml` (it is read) or `text`: nothing is left unchecked by accident."""
    for block in blocks(page):
        assert block.language in {"python", "sh", "toml", "text"}, f"line {block.line}: {block.language!r}"
        if block.language == "toml":
            table = tomllib.loads(block.text)
            if "project" not in table:  # a msgbus.toml, then
                Settings(**table)


# ---------------------------------------------------------------- commands


def targets() -> set[str]:
    """The targets of the Makefile that `make help` lists."""
    return set(re.findall(r"^([a-z]+):.*## ", (ROOT / "Makefile").read_text(), flags=re.MULTILINE))


def cli_commands() -> dict[str, set[str]] | None:
    """The commands that `msgbus` knows, those of groups as `dead list`, with their options; None while there is no command line."""
    if importlib.util.find_spec("msgbus.cli") is None:
        return None
    import typer.main

    def commands(group: object, before: str) -> Iterator[tuple[str, set[str]]]:
        members: dict[str, object] = getattr(group, "commands", {})  # a single command has none
        if not members:
            yield before.strip(), {option for parameter in getattr(group, "params", []) for option in parameter.opts}
        for own, member in members.items():
            yield from commands(member, f"{before} {own}")

    return dict(commands(typer.main.get_command(importlib.import_module("msgbus.cli.app").app), ""))


def check_msgbus(words: list[str], known: dict[str, set[str]]) -> None:
    """A line `msgbus ...`: its command is known, and so are the command's options."""
    command = next((name for name in (" ".join(words[:2]), words[0]) if name in known), None)
    assert command is not None, f"no such command: {words}"
    options = {word.partition("=")[0] for word in words if word.startswith("-")}
    assert options <= known[command], f"{command} has no {options - known[command]}"


def check_command(words: list[str], known: dict[str, set[str]] | None) -> None:
    """One command of an sh block. What nobody can check is refused."""
    match words:
        case ["make", *rest]:
            assert {word for word in rest if "=" not in word} <= targets()
        case ["msgbus", *rest]:
            if known is not None:
                check_msgbus(rest, known)
        case ["python", "-m", "pip", "install", *_]:
            pass
        case ["python", "-m", "pytest", "--pyargs", package]:
            assert package.startswith(("msgbus", "my_"))
        case ["curl", url, *_]:
            assert url.startswith("http://127.0.0.1:8000/")  # of examples/shop: tests/integration/test_shop.py sends it
        case ["python", "-m", module, *_]:
            assert importlib.util.find_spec(module) is not None
        case _:
            pytest.fail(f"a command that nobody checks: {words}")


def test_commands_exist(page: Path) -> None:
    """A `make` line of an sh block names targets of the Makefile, a `msgbus` line a command of it and its options."""
    known = cli_commands()
    for block in blocks(page):
        if block.language == "sh":
            for line in block.text.splitlines():
                words = shlex.split(line, comments=True)
                while words and (setting := re.fullmatch(r"([A-Z_]+)=.*", words[0])):
                    assert setting[1].removeprefix("MSGBUS_").lower() in Settings.model_fields
                    words.pop(0)
                if words:
                    check_command(words, known)


# ---------------------------------------------------------------- links


def slug(heading: str) -> str:
    """A heading's anchor, as GitHub makes it."""
    text = re.sub(r"[`*]|\[([^\]]*)\]\([^)]*\)", r"\1", heading).strip().lower()
    return re.sub(r"[^\w\- ]", "", text).replace(" ", "-")


def anchors(page: Path) -> set[str]:
    return {slug(heading) for heading in re.findall(r"^#+ (.*)$", prose(page), flags=re.MULTILINE)}


def links(page: Path) -> list[str]:
    return re.findall(r"(?<!!)\[[^\]]*\]\(([^)\s]+)\)", prose(page))


def test_links_resolve(page: Path) -> None:
    """A link to a file of the house leads to one that exists, and to a heading of it where it names one."""
    for link in links(page):
        if link.startswith(("https://", "http://")):
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), link
        assert target.is_relative_to(ROOT), link
        if anchor:
            assert anchor in anchors(target), link


def test_every_page_can_be_reached() -> None:
    """From README.md, by links, one comes to every page of docs/ and examples/."""
    reached: set[Path] = set()
    ahead = [ROOT / "README.md"]
    while ahead:
        page = ahead.pop()
        if page in reached:
            continue
        reached.add(page)
        for link in links(page):
            target = (page.parent / link.partition("#")[0]).resolve()
            if target.suffix == ".md" and target.exists():
                ahead.append(target)
    assert {name(page) for page in PAGES} <= {name(page) for page in reached}


# ---------------------------------------------------------------- lists


def test_the_settings_table_is_complete() -> None:
    """The guide's table of settings has every setting, no other, in the order of `Settings`."""
    text = (ROOT / "docs" / "guide.md").read_text()
    table = text[text.index("| setting |") :]
    table = table[: table.index("\n\n")]
    assert re.findall(r"^\| `(\w+)` \|", table, flags=re.MULTILINE) == list(Settings.model_fields)


def clauses() -> dict[str, list[str]]:
    """The clauses of docs/contract.md, each with the tests that it names."""
    text = (ROOT / "docs" / "contract.md").read_text()
    parts = re.split(r"^## (C\d+) ", text, flags=re.MULTILINE)[1:]
    found: dict[str, list[str]] = {}
    for number, body in zip(parts[::2], parts[1::2], strict=True):
        held_by = re.search(r"^Held by:((?:.|\n)+?)(?:\n\n|\Z)", body, flags=re.MULTILINE)
        assert held_by is not None, f"{number} names no tests"
        found[number] = re.findall(r"`(\w+)`", held_by[1])
    return found


def test_the_contract_has_thirteen_clauses() -> None:
    """C1 to C13, in order, each held by at least one test."""
    found = clauses()
    assert list(found) == [f"C{number}" for number in range(1, 14)]
    assert all(found.values())


def test_the_contracts_tests_exist() -> None:
    """Every test that a clause names is in the suite that adapters run."""
    if importlib.util.find_spec(SUITE) is None:
        pytest.skip(f"{SUITE} is not there yet")
    suite = importlib.import_module(SUITE)
    there = {found.removeprefix("test_") for found in suite_names(suite)}
    if len(there) < MOST_OF_IT:
        pytest.skip(f"{SUITE} has {len(there)} tests yet")
    named = {test for tests in clauses().values() for test in tests}
    assert named - there == set()


def suite_names(suite: types.ModuleType) -> set[str]:
    """The tests that the module brings to whoever imports it: its functions, and those of its classes."""
    found = {attribute for attribute in vars(suite) if attribute.startswith("test_")}
    for value in vars(suite).values():
        if inspect.isclass(value):
            found |= {attribute for attribute in dir(value) if attribute.startswith("test_")}
    return found
