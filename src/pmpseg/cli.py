"""What the commands share: one-line errors, files that are never left half written, and checks of configurations.

``run(main)`` is how a command starts. The rest is a small layer over jsonargparse, whose messages are neither one
line nor a suggestion: ``check_config`` and ``check_options`` find unknown keys and misspelt classes before it sees
them and name the nearest right one, and ``explain`` makes one line of what it says about values.

A *spec* is how a configuration chooses a class: ``{"class_path": "pmpseg.data.Scenes", "init_args": {...}}``.
``bases`` maps the keys whose values are specs to the class that they must be a subclass of. No Lightning here.
"""

import difflib
import errno
import importlib
import inspect
import os
import pkgutil
import re
import sys
import traceback
import typing
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

from pmpseg.errors import InputError

USER_ERRNOS = {errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EPERM, errno.EROFS, errno.EISDIR, errno.ENOTDIR,
    errno.EEXIST}
Bases = Mapping[str, type]


def run(main: Callable[[], int | None]) -> NoReturn:
    """Run a command and leave Python with its status, printing expected errors as one line on stderr.

    Bad input, a missing file, no space and no permission give status 2, Ctrl-C gives 130; anything else is a bug and
    keeps its traceback, which PMPSEG_TRACEBACK=1 shows for all of them.
    """
    try:
        sys.exit(main())
    except (InputError, OSError, KeyboardInterrupt) as error:
        if isinstance(error, KeyboardInterrupt):
            status, line = 130, "interrupted"
        elif isinstance(error, InputError | FileNotFoundError) or getattr(error, "errno", None) in USER_ERRNOS:
            status, line = 2, f"error: {_one_line(re.sub(r'^.Errno [0-9]+. ', '', str(error)))}"
        else:
            raise
        if os.environ.get("PMPSEG_TRACEBACK") == "1":
            traceback.print_exc()
        print(f"pmpseg: {line}", file=sys.stderr)
        sys.exit(status)


@contextmanager
def whole_file(path: str | Path) -> Iterator[Path]:
    """Gives a temporary path beside ``path``, which takes its place at the end of the block unless that failed."""
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def did_you_mean(word: str, known: Collection[str]) -> str:
    """``": did you mean 'x'?"`` for the nearest of the known words, or ``""`` where none is near.

    For dotted words the same last part counts as nearest: data.batch_size for model.batch_size.
    """
    last = word.rpartition(".")[2]
    same_end = [other for other in known if other.rpartition(".")[2] == last]
    nearest = difflib.get_close_matches(word, sorted(same_end or known), n=1, cutoff=0.0 if same_end else 0.6)
    return f": did you mean {nearest[0]!r}?" if nearest else ""


def check_config(config: Mapping[str, Any], keys: Collection[str], bases: Bases, source: str) -> None:
    """Raise ``InputError`` for an unknown key or class in a nested configuration.

    ``keys`` are the dotted keys of the parser, ``source`` the file that the message names.
    """
    known = {*keys, *_class_keys(config, bases, ".init_args.", f"{source}: ")}
    _check_mapping(config, "", known, bases, source)


def check_options(options: Sequence[str], config: Mapping[str, Any], keys: Collection[str], bases: Bases) -> None:
    """Raise ``InputError`` for an option of the command line that has an unknown key, or no value.

    Options are written ``--key value`` or ``--key=value``; a class's arguments are named as ``--model.width`` or as
    ``--model.init_args.width``. ``config`` says which classes are chosen.
    """
    short, long = (_class_keys(config, bases, joint) for joint in (".", ".init_args."))
    known = {*keys, *short, *long, "h"}
    suggested = {*short, *(key for key in keys if not key.endswith(".help"))}
    waiting = ""  # for its value
    for word in options:
        if waiting and not word.startswith("--"):
            waiting = ""
            continue
        if waiting and not waiting.endswith(("help", "print_config")):  # whose values may be left out
            break
        if not word.startswith("-"):
            raise InputError(f"unexpected argument {word!r}: options are written --key value")
        key, equals, _ = word.lstrip("-").partition("=")
        waiting = "" if equals else key
        key = key.removesuffix("+")
        if key not in known and not _is_open(key, config, bases):
            raise InputError(f"unknown key {key!r}{did_you_mean(key, suggested)}")
    if waiting and not waiting.endswith(("help", "print_config")) and waiting != "h":
        raise InputError(f"--{waiting} wants a value, as in '--{waiting} VALUE'")


def check_nulls(config: Mapping[str, Any], bases: Bases) -> None:
    """Raise ``InputError`` for null where a class wants a value, which jsonargparse lets pass (YAML's ``key:``)."""
    for base, spec in _specs(config, bases):
        for name, parameter in _parameters(spec["class_path"], bases[base]).items():
            hint, given = parameter.annotation, (spec.get("init_args") or {}).get(name, ...)
            nullable = {type(None), None, Any, inspect.Parameter.empty}.intersection(typing.get_args(hint) or (hint,))
            if given is None and parameter.default is not None and not nullable and not isinstance(hint, str):
                raise InputError(f"{base}.{name}: got null, want {_plain_type(str(hint))}")


def find_class(path: str, base: type, source: str = "") -> type:
    """The subclass of ``base`` at a dotted path, or of this name if it is imported. Raises ``InputError``."""
    module_name, _, name = path.rpartition(".")
    if not module_name:
        known = {cls.__name__: cls for cls in _subclasses(base)}
        if path not in known:
            raise InputError(f"{source}class_path {path!r} not found{did_you_mean(path, known)}")
        return known[path]
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if not f"{module_name}.".startswith(f"{error.name}."):  # it is there, but something that it needs is not
            raise InputError(f"{source}class_path {path!r}: {error}") from None
        module = None
    cls = getattr(module, name, None)
    if cls is None:
        imported = (_public_path(cls) for cls in _subclasses(base))
        raise InputError(f"{source}class_path {path!r} not found{did_you_mean(path, {*_beside(module_name), *imported})}")
    if not (isinstance(cls, type) and issubclass(cls, base)):
        raise InputError(f"{source}class_path {path!r} is no {base.__name__}")
    return cls


def explain(text: str) -> str:
    """One line of a message of jsonargparse about a value: ``data.batch_size: got 'many', want int``."""
    keys, start, depth = [], 0, -1
    lines = text.splitlines()
    for number, line in enumerate(lines):
        key = re.search(r'Parser key "([^"]+)"', line)
        if key and _indent(line) > depth:  # an error in an argument of a class stands below that of the class
            keys, start, depth = [*keys, key[1]], number, _indent(line)
    where = ".".join(keys)
    inner = [lines[start]] if lines else []
    for line in lines[start + 1 :]:
        if _indent(line) <= depth:
            break
        inner.append(line)
    block = "\n".join(inner)
    if missing := re.search(r"arguments are required: (.+)", block):
        return f"{', '.join(f'{where}.{name}'.lstrip('.') for name in missing[1].split(', '))} is missing: give a value"
    if unknown := re.search(r"[Oo]ption '(.+)' is not accepted", block):
        return f"unknown key '{where}.{unknown[1]}'".replace("'.", "'")
    got = re.search(r"G(?:iven|ot) value: (.*)", block)
    want = re.search(r"Subtypes: \[(.+)\]", block) or re.search(r"Expected an? (.+?)(?:\. Got value|$)", block, re.M)
    if not (keys and got and want):
        return _one_line(text)[:300]
    near = did_you_mean(got[1], re.findall(r"'([^']*)'", want[1].replace("<class ", ""))) if "Literal" in want[1] else ""
    return f"{where}: got {_literal(got[1])}, want {_plain_type(want[1])}{near}"


def _check_mapping(config: Mapping[str, Any], prefix: str, known: set[str], bases: Bases, source: str) -> None:
    for name, value in config.items():
        key = f"{prefix}{name}"
        below = any(other.startswith(f"{key}.") for other in known)
        if key in bases:
            for spec in value if isinstance(value, list) else [value]:
                if isinstance(spec, Mapping):
                    _check_spec(spec, key, known, bases[key], source)
        elif key not in known and not below:
            raise InputError(f"{source}: unknown key {key!r}{did_you_mean(key, known)}")
        elif isinstance(value, Mapping) and below:
            _check_mapping(value, f"{key}.", known, bases, source)
        elif below:
            raise InputError(f"{source}: {key}: got {value!r}, want a mapping of its keys")


def _check_spec(spec: Mapping[str, Any], key: str, known: set[str], base: type, source: str) -> None:
    if not isinstance(spec.get("class_path"), str):
        raise InputError(f"{source}: {key} names no class: give {key}.class_path, a subclass of {base.__name__}")
    parameters = _parameters(spec["class_path"], base, f"{source}: ")
    arguments = {f"{key}.init_args.{name}" for name in parameters}
    for name in spec:
        if name not in ("class_path", "init_args"):
            near = did_you_mean(f"{key}.{name}", {f"{key}.class_path", f"{key}.init_args", *arguments})
            raise InputError(f"{source}: unknown key '{key}.{name}'{near}")
    for name in spec.get("init_args") or {}:
        if name not in parameters and "**" not in parameters:
            near = did_you_mean(f"{key}.init_args.{name}", arguments or known)
            raise InputError(f"{source}: unknown key '{key}.init_args.{name}'{near}")


def _specs(config: Mapping[str, Any], bases: Bases) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """The keys of ``bases`` that have one class chosen, with their specs."""
    for base in bases:
        value: Any = config
        for part in base.split("."):
            value = value.get(part) if isinstance(value, Mapping) else None
        if isinstance(value, Mapping) and isinstance(value.get("class_path"), str):
            yield base, value


def _class_keys(config: Mapping[str, Any], bases: Bases, joint: str, source: str = "") -> set[str]:
    """The keys of the arguments of the chosen classes: ``model`` + joint + ``width``."""
    return {
        f"{base}{joint}{name}"
        for base, spec in _specs(config, bases)
        for name in _parameters(spec["class_path"], bases[base], source)
    }


def _is_open(key: str, config: Mapping[str, Any], bases: Bases) -> bool:
    """Whether only jsonargparse can tell if the key is right: below a list, or a class that takes ``**kwargs``."""
    base = next((base for base in bases if key.startswith(f"{base}.")), None)
    chosen = dict(_specs(config, bases))
    return base is not None and (base not in chosen or "**" in _parameters(chosen[base]["class_path"], bases[base]))


def _parameters(path: str, base: type, source: str = "") -> dict[str, inspect.Parameter]:
    """The arguments of a class by name; ``"**"`` stands for any further ones."""
    found = inspect.signature(find_class(path, base, source).__init__).parameters.values()
    return {"**" if p.kind is p.VAR_KEYWORD else p.name: p for p in list(found)[1:] if p.kind is not p.VAR_POSITIONAL}


def _subclasses(base: type) -> Iterator[type]:
    for cls in base.__subclasses__():
        yield cls
        yield from _subclasses(cls)


def _beside(module_name: str) -> list[str]:
    """The paths of what a module has; where there is no such module, of what the one of the nearest name has."""
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError:
        parent = sys.modules.get(module_name.rpartition(".")[0])
        modules = [f"{parent.__name__}.{info.name}" for info in pkgutil.iter_modules(parent.__path__)] if parent else []
        near = difflib.get_close_matches(module_name, modules, n=1)
        return _beside(near[0]) if near else []
    return [f"{module_name}.{name}" for name in getattr(module, "__all__", dir(module))]


def _public_path(cls: type) -> str:
    """The shortest path to a class: of the outermost package that has its name."""
    parts = cls.__module__.split(".")
    packages = (".".join(parts[:n]) for n in range(1, len(parts) + 1))
    for package in packages:
        if getattr(sys.modules.get(package), cls.__name__, None) is cls:
            return f"{package}.{cls.__name__}"
    return f"{cls.__module__}.{cls.__name__}"


def _plain_type(text: str) -> str:
    """``<class 'int'>, <class 'NoneType'>`` -> ``int or null``."""
    text = re.sub(r"<class '([^']+)'>", r"\1", text)
    text = re.sub(r"(?:\w+\.)+(\w)", r"\1", text)  # typing.Literal -> Literal
    text = re.sub(r"Literal\[([^]]*)\]", lambda match: match[1].replace(", ", " or "), text)
    text = " or ".join(re.split(r", (?![^\[]*\])| \| ", text))  # not at the commas of dict[str, int]
    return text.replace("NoneType", "null").replace("None", "null")


def _literal(text: str) -> str:
    """Numbers, lists and the like as they are, words in quotes."""
    return text if re.fullmatch(r"-?[\d.]+(e-?\d+)?|[\[{(].*|None|True|False|'.*'", text) else repr(text)


def _indent(line: str) -> int:
    return len(line) - len(line.lstrip())


def _one_line(text: str) -> str:
    return " ".join(text.split())
