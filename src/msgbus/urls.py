"""URL → adapter. Adapters are found by entry points of the group `msgbus.adapters`, the door that third parties use too."""

from __future__ import annotations

from difflib import get_close_matches
from importlib.metadata import entry_points, metadata
from urllib.parse import parse_qsl, urlsplit, urlunsplit

from msgbus.contract.adapter import Adapter, AdapterSettings
from msgbus.errors import ConfigurationError, UnknownAdapter

ENTRY_POINTS = "msgbus.adapters"
EXTRAS = {
    "amqp": "rabbitmq",
    "amqps": "rabbitmq",
    "kafka": "kafka",
    "kafkas": "kafka",
    "redis": "redis",
    "rediss": "redis",
}
"""Which extra of msgbus brings the adapter of a scheme, for the pip line of an error."""


def hide_secrets(url: str) -> str:
    """The URL as it may be shown: without its password and its query; of one that could be read in two ways, its scheme alone."""
    head, slashes, rest = url.partition("//")
    if not slashes:
        return head.partition(":")[0]
    before, at, place = rest.rpartition("@")
    if any(mark in before for mark in "?#@"):
        return f"{head}//***"
    user = before.partition(":")[0].partition("/")[0]
    place = place.partition("?")[0].partition("#")[0]
    return f"{head}//{user}:***@{place}" if at else f"{head}//{place}"


def adapter_from_url(url: str, settings: AdapterSettings) -> Adapter:
    """The adapter of a URL's scheme, constructed without I/O. Raises `UnknownAdapter` with what to install, or `ConfigurationError`.

    The name of an entry point is the scheme, so nothing but the adapter that is asked for is imported.
    """
    try:
        parts = urlsplit(url)
        if "@" in parts.query + parts.fragment:  # what seems to be an option is the end of a password
            raise ValueError
        pairs = parse_qsl(parts.query, keep_blank_values=True, strict_parsing=bool(parts.query))
    except ValueError:  # its text may show a password
        raise ConfigurationError(
            f"the URL {hide_secrets(url)} cannot be read: options are ?name=value&..., and what is special in a password is "
            "percent-encoded (urllib.parse.quote)"
        ) from None
    options = dict(pairs)
    if len(options) != len(pairs):
        raise ConfigurationError(f"the URL {hide_secrets(url)} names an option twice")
    points = entry_points(group=ENTRY_POINTS)
    if parts.scheme not in points.names:
        raise _unknown(parts.scheme, url, sorted(points.names))
    try:
        adapter_class: type[Adapter] = points[parts.scheme].load()
    except ImportError as error:
        raise UnknownAdapter(f"the adapter for {parts.scheme}:// needs {error.name}: {_pip_line(parts.scheme)}") from error
    netloc_and_path = urlunsplit(("", parts.netloc, parts.path, "", "")).removeprefix("//")
    return adapter_class.from_url(f"{parts.scheme}://{netloc_and_path}", options, settings)


def _unknown(scheme: str, url: str, known: list[str]) -> UnknownAdapter:
    if not scheme:
        return UnknownAdapter(f"the URL {hide_secrets(url)!r} has no scheme; known: {', '.join(f'{name}://' for name in known)}")
    if scheme.partition("+")[0] in EXTRAS:
        return UnknownAdapter(f"no adapter for {scheme}:// is installed: {_pip_line(scheme)}")
    close = get_close_matches(scheme, [*known, *EXTRAS], n=1)
    hint = f"did you mean {close[0]}://?" if close else f"known: {', '.join(f'{name}://' for name in known)}"
    return UnknownAdapter(f"no adapter for {scheme}:// is installed; {hint}")


def _pip_line(scheme: str) -> str:
    extra = EXTRAS.get(scheme.partition("+")[0])
    if extra is None:
        return "reinstall the package that brings it"
    if extra not in (metadata("msgbus").get_all("Provides-Extra") or ()):
        return "this version of msgbus has no adapter for it"
    return f'pip install "msgbus[{extra}]"'
