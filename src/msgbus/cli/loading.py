"""`app:bus` → the Bus: imports the user's module as `python -m` would, and says plainly what is wrong with it."""

from __future__ import annotations

import importlib
import inspect
import sys
import traceback
from collections.abc import Callable
from difflib import get_close_matches
from importlib.machinery import PathFinder
from pathlib import Path
from typing import Any, cast

import typer

from msgbus.bus import Bus
from msgbus.errors import ConfigurationError, MsgbusError
from msgbus.router import Router

DEFAULT_ATTRIBUTE = "bus"


def load_bus(where: str) -> Bus:
    """The bus at `module:attribute` (attribute `bus` unless said), with the current directory on the path.

    A function without parameters that returns a Bus is called. Raises `BadParameter` for what is no such pair, `ConfigurationError` for
    whatever stands in the way; what went wrong inside the user's module is told with its traceback.
    """
    module_name, _, attribute = where.partition(":")
    if not module_name or ":" in attribute or "/" in module_name or module_name.endswith(".py"):
        better = module_name.removesuffix(".py").strip("./").replace("/", ".") or "app"
        raise typer.BadParameter(f"{where!r} is no module:attribute; write {better}:{attribute.partition(':')[0] or DEFAULT_ATTRIBUTE}")
    here = str(Path.cwd())
    if here not in sys.path:
        sys.path.insert(0, here)
    module = _import(module_name)
    return _as_bus(_attribute(module, module_name, attribute or DEFAULT_ATTRIBUTE), where)


def _import(name: str) -> object:
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name is None or not (name == error.name or name.startswith(error.name + ".")):
            raise _broken(f"importing {name!r}", error) from error
        close = get_close_matches(name, _modules_here(), n=1)
        hint = f"; did you mean {close[0]!r}?" if close else f"; looked in {Path.cwd()} and on Python's path"
        raise ConfigurationError(f"there is no module {error.name!r}{hint}") from None
    except MsgbusError:
        raise
    except Exception as error:  # whatever the user's module does when it is imported
        raise _broken(f"importing {name!r}", error) from error


def _modules_here() -> list[str]:
    here = Path.cwd()
    modules = [path.stem for path in here.glob("*.py")]
    packages = [path.name for path in here.iterdir() if path.is_dir() and PathFinder.find_spec(path.name, [str(here)]) is not None]
    return modules + packages


def _attribute(module: object, module_name: str, path: str) -> object:
    found = module
    for part in path.split("."):
        try:
            found = getattr(found, part)
        except AttributeError:
            buses = [name for name, value in vars(module).items() if isinstance(value, Bus)]
            close = get_close_matches(part, [name for name in vars(module) if not name.startswith("_")], n=1)
            likely = buses if len(buses) == 1 else close
            hint = f"did you mean {module_name}:{likely[0]}?" if likely else f"its buses: {', '.join(buses) or 'none'}"
            raise ConfigurationError(f"module {module_name!r} has no {path!r}; {hint}") from None
    return found


def _as_bus(found: object, where: str) -> Bus:
    if isinstance(found, Bus):
        return found
    if isinstance(found, Router):
        raise ConfigurationError(f"{where} is a Router; give it to a Bus(routers=[...]) and name that")
    if not callable(found) or isinstance(found, type):
        raise ConfigurationError(f"{where} is no Bus and no function that makes one: it is {_kind(found)}")
    made = _call(cast("Callable[[], Any]", found), where)
    if isinstance(made, Bus):
        return made
    if inspect.iscoroutine(made):
        made.close()
        raise ConfigurationError(f"{where} is an async function; a function that makes a Bus is a plain one")
    raise ConfigurationError(f"{where} is a function that returns {_kind(made)}, not a Bus")


def _call(factory: Callable[[], Any], where: str) -> object:
    try:
        needed = [
            parameter.name
            for parameter in inspect.signature(factory).parameters.values()
            if parameter.default is parameter.empty and parameter.kind not in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD)
        ]
    except (TypeError, ValueError):
        needed = []
    if needed:
        raise ConfigurationError(f"{where} is a function that needs {', '.join(needed)}; one that makes a Bus is called without arguments")
    try:
        return factory()
    except MsgbusError:
        raise
    except Exception as error:  # whatever the user's function does
        raise _broken(f"calling {where}", error) from error


def _kind(value: object) -> str:
    return f"the class {value.__name__}" if isinstance(value, type) else f"of type {type(value).__name__}"


def _broken(what: str, error: Exception) -> ConfigurationError:
    """The user's own error, with the part of its traceback that is theirs."""
    frames = [
        frame
        for frame in traceback.extract_tb(error.__traceback__)
        if frame.filename != __file__ and "importlib" not in frame.filename.replace("\\", "/")
    ]
    shown = "".join(traceback.format_list(frames) + traceback.format_exception_only(error)).rstrip()
    return ConfigurationError(f"{what} failed: {type(error).__name__}: {error}\n{shown}")
