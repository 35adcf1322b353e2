"""Finds teachers by name through the entry-point group `p4dprep.teachers`; ours come the same way as a stranger's."""

import difflib
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib.metadata import EntryPoint, entry_points

from p4dprep.errors import P4DError, RequestError, TeacherError
from p4dprep.targets import Teacher, TeacherInfo

GROUP = "p4dprep.teachers"
RESERVED_NAMES = frozenset({"ledger", "heads", "clips", "time_seconds"})
"""Names a cache's root uses itself; no teacher's group may take one."""

_KIND = re.compile(r"[a-z][a-z0-9_-]*")
_NAME = re.compile(r"[a-z_][a-z0-9_]{0,39}")
_SHAPE = "[NAME=]KIND[:ARGUMENT][?key=value&key=value]"


@dataclass(frozen=True, kw_only=True)
class TeacherSpec:
    """One `--teacher` of a command, as `[NAME=]KIND[:ARGUMENT][?key=value&key=value]`.

    Attributes:
        name: the group of the cache its targets go to; a lower-case identifier of at most 40 characters.
        kind: the entry point's name, such as `depth-anything`.
        argument: what the kind asks for, such as `ORG/NAME@REV`; may be empty.
        options: keys and values after `?`.
    """

    name: str
    kind: str
    argument: str = ""
    options: Mapping[str, str] = field(default_factory=dict, hash=False)

    def __post_init__(self) -> None:
        if not _KIND.fullmatch(self.kind):
            raise RequestError(f"teacher kind {self.kind!r} is not lower-case letters, digits and -; write {_SHAPE}")
        if not _NAME.fullmatch(self.name):
            raise RequestError(f"teacher name {self.name!r} must be a lower-case identifier of at most 40 characters")
        if self.name in RESERVED_NAMES:
            raise RequestError(
                f"teacher name {self.name!r} is the cache's own; choose another, such as my_{self.name}={self.kind}"
            )
        if "?" in self.argument:
            raise RequestError(f"teacher argument {self.argument!r} holds a ?, which starts the options")
        for key, value in self.options.items():
            if not key.isidentifier() or "&" in value:
                raise RequestError(f"teacher option {key!r}={value!r} must be an identifier and a value without &")

    def __str__(self) -> str:
        name = "" if self.name == _default_name(self.kind) else f"{self.name}="
        argument = f":{self.argument}" if self.argument else ""
        options = "?" + "&".join(f"{key}={value}" for key, value in self.options.items()) if self.options else ""
        return f"{name}{self.kind}{argument}{options}"


def _default_name(kind: str) -> str:
    return kind.replace("-", "_")


def parse_teacher(text: str) -> TeacherSpec:
    """Read `[NAME=]KIND[:ARGUMENT][?key=value&key=value]`; `str()` of the result reads back the same.

    The argument may hold `:`, `/`, `@`, `.` and `=`. The name defaults to the kind with `-` as `_`.

    Raises:
        RequestError: a part is missing or malformed.
    """
    spec, question, query = text.partition("?")
    prefix, equals, rest = spec.partition("=")
    name, spec = (prefix, rest) if equals and ":" not in prefix and prefix.isidentifier() else ("", spec)
    kind, colon, argument = spec.partition(":")
    if colon and not argument:
        raise RequestError(f"teacher {text!r} has nothing after the colon; write {_SHAPE}")
    options = _parse_options(query, text) if question else {}
    return TeacherSpec(name=name or _default_name(kind), kind=kind, argument=argument, options=options)


def _parse_options(query: str, text: str) -> dict[str, str]:
    options: dict[str, str] = {}
    for pair in query.split("&"):
        key, equals, value = pair.partition("=")
        if not equals or not key or not value:
            raise RequestError(f"teacher {text!r}: option {pair!r} is not key=value; write {_SHAPE}")
        if key in options:
            raise RequestError(f"teacher {text!r} gives option {key!r} twice")
        options[key] = value
    return options


def available() -> dict[str, EntryPoint]:
    """Every kind of teacher that is installed, in name order; imports none of them.

    Raises:
        TeacherError: two packages claim one name.
    """
    found: dict[str, EntryPoint] = {}
    for point in sorted(entry_points(group=GROUP), key=lambda point: point.name):
        if point.name in found and found[point.name].value != point.value:
            raise TeacherError(
                f"packages {package_of(found[point.name])} and {package_of(point)} both name a teacher {point.name!r}; "
                "uninstall one"
            )
        found[point.name] = point
    return found


def package_of(point: EntryPoint) -> str:
    """Name of the distribution that brought an entry point."""
    return point.dist.name if point.dist is not None else "unknown"


def load(kind: str) -> type[Teacher]:
    """Import one kind of teacher.

    Raises:
        RequestError: there is no such kind; the message lists the ones that are.
        TeacherError: its package cannot be imported, or what it registered is no teacher.
    """
    points = available()
    if kind not in points:
        near = difflib.get_close_matches(kind, points, n=1)
        hint = f", did you mean {near[0]!r}?" if near else ""
        raise RequestError(f"no teacher of kind {kind!r}{hint} (installed: {', '.join(points) or 'none'})")
    where = f"teacher {kind!r} of package {package_of(points[kind])} ({points[kind].value})"
    try:
        loaded = points[kind].load()
    except Exception as error:  # a stranger's module may fail in any way while it is imported
        if isinstance(error, P4DError):
            raise
        raise TeacherError(f"{where} cannot be imported: {type(error).__name__}: {error}") from error
    if not (isinstance(loaded, type) and issubclass(loaded, Teacher)):
        raise TeacherError(f"{where} is not a subclass of p4dprep.targets.Teacher")
    if not isinstance(getattr(loaded, "info", None), TeacherInfo):
        raise TeacherError(f"{where} has no `info` of type p4dprep.targets.TeacherInfo")
    return loaded


def build(spec: TeacherSpec) -> Teacher:
    """The teacher a spec names, without weights in memory yet.

    Raises:
        RequestError: unknown kind, or an argument or option the kind refuses.
        TeacherError: the kind cannot be imported.
    """
    return load(spec.kind).from_spec(spec.argument, spec.options)


def take_options(kind: str, options: Mapping[str, str], choices: Mapping[str, tuple[str, ...]]) -> dict[str, str]:
    """A teacher's options, each given or its default. For use in `Teacher.from_spec`.

    Args:
        kind: for the message.
        options: what the user wrote.
        choices: option name to its allowed values, the default first; `()` allows any text and defaults to empty.

    Raises:
        RequestError: an unknown option or value, with the ones that exist.
    """
    unknown = sorted(set(options) - set(choices))
    if unknown:
        known = ", ".join(choices) or "none"
        raise RequestError(f"teacher {kind!r} has no option {', '.join(map(repr, unknown))}; it knows: {known}")
    taken = {name: options.get(name, allowed[0] if allowed else "") for name, allowed in choices.items()}
    for name, value in taken.items():
        if choices[name] and value not in choices[name]:
            raise RequestError(f"teacher {kind!r}: {name}={value} is not one of {', '.join(choices[name])}")
    return taken
