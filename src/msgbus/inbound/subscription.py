"""Subscription: what `@bus.subscribe` was told, as a plain record, and its signature read once."""

from __future__ import annotations

import functools
import inspect
import types
import typing
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, Literal, cast

from typing_extensions import is_typeddict

from msgbus.batch import Batch
from msgbus.checks import takes
from msgbus.context import Context, SyncContext
from msgbus.contract.envelope import check_group, check_topic
from msgbus.contract.idempotency import IdempotencyStore
from msgbus.errors import ConfigurationError, InvalidName, UnsupportedFeature
from msgbus.retry import Retry
from msgbus.topic import Topic


@dataclass(frozen=True, slots=True)
class SubscriptionOptions:
    """The options of one subscription. None: the bus's default."""

    name: str | None = None
    group: str | None = None
    retry: Retry | None = None
    concurrency: int | None = None
    timeout: timedelta | None = None
    idempotency: IdempotencyStore | Literal[False] | None = None
    window: int | None = None
    ordered: bool | None = None
    on_failure: Literal["block", "skip"] = "block"
    start: Literal["earliest", "latest"] = "earliest"
    broadcast: bool = False
    batch: Batch | None = None
    publish_to: Topic[Any] | None = None


_OPTIONS = frozenset(SubscriptionOptions.__dataclass_fields__)
_TAKES: dict[str, tuple[type, str]] = {
    "name": (str, "text"),
    "group": (str, "text"),
    "retry": (Retry, "msgbus.Retry(...)"),
    "concurrency": (int, "an int"),
    "timeout": (timedelta, "a timedelta"),
    "window": (int, "an int"),
    "ordered": (bool, "a bool"),
    "broadcast": (bool, "a bool"),
    "batch": (Batch, "msgbus.Batch(...)"),
    "publish_to": (Topic, "a Topic"),
}
"""What an option's value must be."""


@dataclass(frozen=True, slots=True)
class Subscription:
    """Topic × handler, as registered. Nothing is resolved yet: that needs the bus."""

    topic: Topic[Any] | str
    handler: Callable[..., Any]  # Any: a user's handler, bound by `bind`
    options: SubscriptionOptions
    place: str
    """Where it was written: what every error about it begins with."""

    @property
    def topic_name(self) -> str:
        return self.topic if isinstance(self.topic, str) else self.topic.name

    @property
    def name(self) -> str:
        """What health, `pause` and records call it."""
        return self.options.name or handler_name(self.handler)


@dataclass(frozen=True, slots=True)
class Signature:
    """What a handler takes."""

    model: Any  # a class or a type form
    is_async: bool
    context: str | None
    """The parameter that takes the context (a list of them with a batch), if any."""
    session: str | None = None
    """The parameter that takes the session of the handler's transaction, if any."""


def register(topic: Topic[Any] | str, handler: Callable[..., Any], options: dict[str, Any]) -> Subscription:
    """Checks what can be seen when the decorator runs. Raises `ConfigurationError` that names the handler's place."""
    place = place_of(handler)
    unknown = options.keys() - _OPTIONS
    if unknown:
        raise ConfigurationError(f"{place}: subscribe() has no option {', '.join(sorted(unknown))}; known: {', '.join(sorted(_OPTIONS))}")
    for name, value in options.items():
        if value is None:
            if name not in ("batch", "publish_to"):
                raise ConfigurationError(f"{place}: {name}=None; leave it out for the default")
        elif name in _TAKES:
            takes(f"{place}: {name}", value, *_TAKES[name])
        elif name == "idempotency" and value is not False and not isinstance(value, IdempotencyStore):
            raise ConfigurationError(f"{place}: idempotency={value!r}: takes a store, or False")
    checked = SubscriptionOptions(**options)
    if not callable(handler):
        raise ConfigurationError(f"{place}: a handler is a function")
    function = _function(handler)
    if inspect.isasyncgenfunction(function) or inspect.isgeneratorfunction(function):
        raise ConfigurationError(f"{place}: a handler returns or raises; this one is a generator (it has a yield)")
    if checked.timeout is not None:
        if not inspect.iscoroutinefunction(function):
            raise ConfigurationError(
                f"{place}: timeout on a sync handler; a thread cannot be stopped, so the work would run twice: make it async"
            )
        if checked.timeout <= timedelta(0):
            raise ConfigurationError(f"{place}: timeout must be positive, not {checked.timeout}")
    if checked.group is not None and checked.broadcast:
        raise ConfigurationError(f"{place}: group= beside broadcast=True; a broadcast has no group: every instance gets it")
    if "start" in options and checked.broadcast:
        raise ConfigurationError(f"{place}: start= beside broadcast=True; every instance gets what comes from now on")
    if checked.batch is not None and checked.publish_to is not None:
        raise ConfigurationError(f"{place}: publish_to on a batch handler; publish with context.publish instead")
    if checked.concurrency is not None and checked.concurrency < 1:
        raise ConfigurationError(f"{place}: concurrency must be at least 1, not {checked.concurrency}")
    if checked.window is not None and checked.window < (checked.concurrency or 1):
        raise ConfigurationError(
            f"{place}: window ({checked.window}) is what runs and what waits: at least concurrency ({checked.concurrency or 1})"
        )
    if checked.on_failure not in ("block", "skip"):
        raise ConfigurationError(f"{place}: on_failure={checked.on_failure!r}: 'block' or 'skip'")
    if checked.start not in ("earliest", "latest"):
        raise ConfigurationError(f"{place}: start={checked.start!r}: 'earliest' or 'latest'")
    try:
        if checked.group is not None:
            check_group(checked.group)
        if checked.name is not None:
            check_group(checked.name)
        if isinstance(topic, str):
            if "*" in topic or "#" in topic:
                raise UnsupportedFeature(f"the pattern {topic!r}", "this version", "one subscription a topic")
            check_topic(topic)
    except (InvalidName, UnsupportedFeature) as error:
        error.args = (f"{place}: {error.args[0]}",)
        raise
    if not _positional(handler, place):
        raise ConfigurationError(f"{place}: a handler takes the message as its first parameter; this one takes none")
    return Subscription(topic, handler, checked, place)


def bind(subscription: Subscription, topic: Topic[Any] | None) -> Signature:
    """Reads the handler's signature, once. `topic` is the bus's Topic of this name, if it has one.

    Raises `ConfigurationError` that names the place for a parameter that nothing can be given for, a missing or contradicting model.
    """
    handler, place, options = subscription.handler, subscription.place, subscription.options
    function = _function(handler)
    is_async = inspect.iscoroutinefunction(function)
    parameters = _positional(handler, place)
    hints = _hints(handler, place)
    first = parameters[0]
    annotated = hints.get(first.name, inspect.Parameter.empty)
    if annotated in (Context, SyncContext):
        raise ConfigurationError(f"{place}: a handler takes the message as its first parameter; {first.name!r} is a {annotated.__name__}")
    batch = options.batch is not None
    if batch and annotated is not inspect.Parameter.empty:
        if typing.get_origin(annotated) is not list or len(typing.get_args(annotated)) != 1:
            raise ConfigurationError(f"{place}: with batch= the first parameter is list[Model], not {_shown(annotated)}")
        annotated = typing.get_args(annotated)[0]
    if topic is not None:
        model = topic.model
        if not _fits(annotated, model):
            raise ConfigurationError(f"{place}: takes {_shown(annotated)}, but topic {topic.name!r} carries {_shown(model)}")
    elif annotated is inspect.Parameter.empty:
        raise ConfigurationError(
            f"{place}: under a plain topic name the model is the annotation of the first parameter; {first.name!r} has none"
        )
    else:
        model = annotated
    return Signature(model, is_async, *_other_parameters(handler, hints, first, batch, is_async, place))


def _other_parameters(
    handler: Callable[..., Any],
    hints: dict[str, Any],
    first: inspect.Parameter,
    batch: bool,
    is_async: bool,
    place: str,
) -> tuple[str | None, str | None]:
    """The names of those that take the context and the session."""
    wanted: Any = Context if is_async else SyncContext
    other: Any = SyncContext if is_async else Context
    found: str | None = None
    session: str | None = None
    for parameter in inspect.signature(handler).parameters.values():
        if parameter.name == first.name or parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
            continue
        hint = _without_none(hints.get(parameter.name, parameter.empty))
        one = typing.get_args(hint)[0] if batch and typing.get_origin(hint) is list and typing.get_args(hint) else hint
        if one is other:
            kind = "an async" if is_async else "a sync"
            raise ConfigurationError(
                f"{place}: {kind} handler takes {wanted.__name__}, not {other.__name__} (parameter {parameter.name!r})"
            )
        if one is wanted:
            if batch and one is hint:
                raise ConfigurationError(f"{place}: with batch= the contexts are list[{wanted.__name__}] (parameter {parameter.name!r})")
            if found is not None:
                raise ConfigurationError(f"{place}: two parameters take the context: {found!r} and {parameter.name!r}")
            if parameter.kind is parameter.POSITIONAL_ONLY:
                raise ConfigurationError(f"{place}: the context is given by name; {parameter.name!r} is positional-only")
            found = parameter.name
        elif (asked := _session_kind(one)) is not None:
            needed = "AsyncSession" if is_async else "Session"
            if asked != needed or batch or session is not None or parameter.kind is parameter.POSITIONAL_ONLY:
                raise ConfigurationError(
                    f"{place}: parameter {parameter.name!r} ({_shown(hint)}): {'an async' if is_async else 'a sync'} handler "
                    f"takes one {needed}, given by name; a batch handler takes none"
                )
            session = parameter.name
        elif parameter.default is parameter.empty:
            raise ConfigurationError(
                f"{place}: nothing can be given for parameter {parameter.name!r} ({_shown(hint)}); "
                f"a handler takes the message and, if it asks, {wanted.__name__} and a session"
            )
    return found, session


_SESSIONS = {"sqlalchemy.ext.asyncio.session.AsyncSession": "AsyncSession", "sqlalchemy.orm.session.Session": "Session"}


def _session_kind(hint: Any) -> str | None:
    """Which of SQLAlchemy's sessions a parameter takes, subclasses too. By name: SQLAlchemy is not imported for it."""
    classes = hint.__mro__ if isinstance(hint, type) else ()
    return next((kind for one in classes if (kind := _SESSIONS.get(f"{one.__module__}.{one.__qualname__}"))), None)


def _without_none(hint: Any) -> Any:
    """`Context` of `Context | None`, by which a handler can also be called without one."""
    members = [member for member in typing.get_args(hint) if member is not type(None)]
    return members[0] if typing.get_origin(hint) in _UNIONS and len(members) == 1 else hint


def _positional(handler: Callable[..., Any], place: str) -> list[inspect.Parameter]:
    try:
        parameters = inspect.signature(handler).parameters.values()
    except (TypeError, ValueError) as error:
        raise ConfigurationError(f"{place}: the handler's signature cannot be read: {error}") from error
    return [parameter for parameter in parameters if parameter.kind in (parameter.POSITIONAL_ONLY, parameter.POSITIONAL_OR_KEYWORD)]


def _hints(handler: Callable[..., Any], place: str) -> dict[str, Any]:
    function = _function(handler)
    if isinstance(function, type):
        function = cast("Callable[..., Any]", inspect.getattr_static(function, "__init__"))
    try:
        return typing.get_type_hints(function, include_extras=True)
    except Exception as error:  # a NameError, or whatever evaluating the user's annotation raises
        raise ConfigurationError(
            f"{place}: an annotation cannot be read at run time: {error} (is it imported under TYPE_CHECKING only?)"
        ) from error


def _fits(annotated: Any, model: Any) -> bool:
    """Whether a handler so annotated can take the topic's model, as far as run time can tell; the rest is the type checker's matter."""
    annotated, model = _bare(annotated), _bare(model)
    if annotated in (inspect.Parameter.empty, Any, object, model) or isinstance(annotated, typing.TypeVar):
        return True
    if typing.get_origin(model) in _UNIONS:
        return all(_fits(annotated, member) for member in typing.get_args(model))
    if typing.get_origin(annotated) in _UNIONS:
        return any(_fits(member, model) for member in typing.get_args(annotated))
    wanted, given = typing.get_origin(annotated) or annotated, typing.get_origin(model) or model
    if not isinstance(wanted, type) or not isinstance(given, type) or getattr(wanted, "_is_protocol", False):
        return True
    if is_typeddict(wanted):
        return is_typeddict(given)
    return issubclass(dict if is_typeddict(given) else given, wanted)


_UNIONS = (typing.Union, types.UnionType)


def _bare(hint: Any) -> Any:
    """A type without what `Annotated[...]` says about it."""
    while typing.get_origin(hint) is typing.Annotated:
        hint = typing.get_args(hint)[0]
    return hint


def _function(handler: Callable[..., Any]) -> Callable[..., Any]:
    """The function that says whether a handler is async, and has its annotations: through partials, methods, callable objects."""
    while isinstance(handler, functools.partial):
        handler = handler.func
    if inspect.isfunction(handler) or inspect.ismethod(handler) or inspect.isbuiltin(handler) or isinstance(handler, type):
        return handler
    called: Callable[..., Any] | None = getattr(handler, "__call__", None)  # noqa: B004  the bound method is wanted, not the answer
    return handler if called is None else called


def handler_name(handler: Callable[..., Any]) -> str:
    """The function's own name; of a callable object, its class's."""
    while isinstance(handler, functools.partial):
        handler = handler.func
    return str(getattr(handler, "__name__", type(handler).__name__))


def place_of(handler: Callable[..., Any]) -> str:
    """`module.function (file:line)`, as errors name a handler."""
    while isinstance(handler, functools.partial):
        handler = handler.func
    code = getattr(inspect.unwrap(handler), "__code__", None)
    name = f"{getattr(handler, '__module__', '?')}.{getattr(handler, '__qualname__', type(handler).__name__)}"
    return f"handler {name}" + (f" ({code.co_filename}:{code.co_firstlineno})" if code is not None else "")


def _shown(hint: Any) -> str:
    if hint is inspect.Parameter.empty:
        return "no annotation"
    return hint.__name__ if isinstance(hint, type) else str(hint)
