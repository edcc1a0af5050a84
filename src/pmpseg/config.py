"""Configurations as nested dicts: reading, merging, and checks that name the nearest right word.

A layer over jsonargparse, whose messages are neither one line nor a suggestion: what is found wrong here it
does not get to see. A *spec* is how a configuration chooses a class: ``{"class_path": "pmpseg.data.Scenes",
"init_args": {"batch_size": 16}}``; the name alone will do where there are no arguments. No Lightning here.
"""

import difflib
import importlib
import inspect
import pkgutil
import sys
import typing
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from pmpseg.cli import did_you_mean, plain_type
from pmpseg.errors import InputError

Config = dict[str, Any]


class Schema:
    """What a configuration may hold: the dotted ``keys`` of a parser, and specs below some of them.

    ``bases`` gives for each key whose value is a spec, or a list of specs, the class that they must derive
    from. All methods raise ``InputError`` with one line.
    """

    def __init__(self, keys: Collection[str], bases: Mapping[str, type]) -> None:
        self.options, self.bases = set(keys), bases
        self.keys = {k for k in keys if not k.endswith(".help")} - {"help", "config", "print_config"}

    def read(self, path: str | Path) -> Config:
        """A YAML file, with names of classes written as specs."""
        path = Path(path)
        if not path.is_file():
            others = [str(other) for other in path.parent.glob("*.yaml")]
            raise InputError(f"no configuration {str(path)!r}{did_you_mean(str(path), others)}")
        try:
            config = yaml.safe_load(path.read_text(encoding="utf-8"))
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            raise InputError(f"{path} is no valid YAML: {error}") from error
        if not isinstance(config, dict):
            raise InputError(f"{path} must hold a mapping of keys to values, got {config!r}")
        return self.with_specs(config)

    def with_specs(self, value: Any, key: str = "") -> Any:
        """``{"model": "X"}`` -> ``{"model": {"class_path": "X"}}``; ``key`` is where the value stands."""
        if key in self.bases:
            if isinstance(value, list):
                return [self.with_specs(item, key) for item in value]
            return {"class_path": value} if isinstance(value, str) else value
        if isinstance(value, Mapping):
            return {
                name: self.with_specs(below, f"{key}.{name}".lstrip(".")) for name, below in value.items()
            }
        return value

    def check(self, config: Mapping[str, Any], source: str) -> None:
        """Finds unknown keys and classes; ``source`` is the file that the message names."""
        known = self.keys | self._arguments(config, ".init_args.", source)
        self._check_mapping(config, "", known, source)

    def check_options(self, options: Sequence[str], config: Mapping[str, Any]) -> None:
        """Finds unknown keys and missing values in ``--key value`` and ``--key=value``.

        An argument of a class that ``config`` chooses is ``--model.width`` or ``--model.init_args.width``.
        """
        short = self._arguments(config, ".")
        known = self.options | short | self._arguments(config, ".init_args.") | {"h"}
        suggested = self.keys | short | {"config", "help"}
        words = list(options)
        while words:
            word = words.pop(0)
            if not word.startswith("-"):
                raise InputError(f"unexpected argument {word!r}: options are written --key value")
            key, equals, _ = word.lstrip("-").partition("=")
            name = key.removesuffix("+")  # which adds to a list
            if name not in known and not self._is_open(name, config):
                raise InputError(f"unknown key {name!r}{did_you_mean(name, suggested)}")
            if not equals and words and not words[0].startswith("--"):
                words.pop(0)
            elif not equals and not name.endswith(("help", "print_config")) and name != "h":
                raise InputError(f"{word} wants a value, as in '{word} VALUE'")

    def check_nulls(self, config: Mapping[str, Any]) -> None:
        """Finds null where a class wants a value: YAML's ``batch_size:``, which jsonargparse lets pass."""
        for base, spec in self._specs(config):
            for name, value in (spec.get("init_args") or {}).items():
                parameter = _parameters(spec["class_path"], self.bases[base]).get(name)
                if value is None and parameter and not _takes_none(parameter):
                    raise InputError(f"{base}.{name}: got null, want {plain_type(str(parameter.annotation))}")

    def _check_mapping(self, config: Mapping[str, Any], prefix: str, known: set[str], source: str) -> None:
        for name, value in config.items():
            key = f"{prefix}{name}"
            is_group = any(other.startswith(f"{key}.") for other in known)
            if key in self.bases:
                for spec in value if isinstance(value, list) else [value]:
                    if isinstance(spec, Mapping):
                        self._check_spec(spec, key, source)
            elif is_group and isinstance(value, Mapping):
                self._check_mapping(value, f"{key}.", known, source)
            elif is_group:
                raise InputError(f"{source}: {key}: got {value!r}, want a mapping of its keys")
            elif key not in known:
                raise InputError(f"{source}: unknown key {key!r}{did_you_mean(key, known)}")

    def _check_spec(self, spec: Mapping[str, Any], key: str, source: str) -> None:
        base = self.bases[key]
        if not isinstance(spec.get("class_path"), str):
            raise InputError(f"{source}: {key} names no class: give {key}.class_path, a {base.__name__}")
        arguments = _parameters(spec["class_path"], base, source)
        known = {f"{key}.class_path", f"{key}.init_args", *(f"{key}.init_args.{name}" for name in arguments)}
        named = [f"{key}.{name}" for name in spec]
        if "**" not in arguments:
            named += [f"{key}.init_args.{name}" for name in spec.get("init_args") or {}]
        for name in named:
            if name not in known:
                raise InputError(f"{source}: unknown key {name!r}{did_you_mean(name, known)}")

    def _specs(self, config: Mapping[str, Any]) -> Iterator[tuple[str, Mapping[str, Any]]]:
        """The keys of ``bases`` that have one class chosen, with their specs."""
        for base in self.bases:
            value: Any = config
            for part in base.split("."):
                value = value.get(part) if isinstance(value, Mapping) else None
            if isinstance(value, Mapping) and isinstance(value.get("class_path"), str):
                yield base, value

    def _arguments(self, config: Mapping[str, Any], joint: str, source: str = "") -> set[str]:
        """The keys of the arguments of the chosen classes: ``model`` + joint + ``width``."""
        keys = set()
        for base, spec in self._specs(config):
            arguments = _parameters(spec["class_path"], self.bases[base], source)
            keys |= {f"{base}{joint}{name}" for name in arguments}
        return keys

    def _is_open(self, key: str, config: Mapping[str, Any]) -> bool:
        """Whether only jsonargparse can tell if a key is right: below a list or a class with ``**kwargs``."""
        base = next((base for base in self.bases if key.startswith(f"{base}.")), "")
        spec = dict(self._specs(config)).get(base)
        return bool(base) and (spec is None or "**" in _parameters(spec["class_path"], self.bases[base]))


def merge(config: Mapping[str, Any], layer: Mapping[str, Any]) -> Config:
    """``config`` with ``layer`` on top, key by key; both stay as they are.

    Lists are replaced, and another class drops the arguments of the one before.
    """
    merged = dict(config)
    if "class_path" in layer and layer["class_path"] != config.get("class_path"):
        merged.pop("init_args", None)
    for key, value in layer.items():
        below = merged.get(key)
        merged[key] = (
            merge(below, value) if isinstance(below, Mapping) and isinstance(value, Mapping) else value
        )
    return merged


def find_class(path: str, base: type, source: str = "") -> type:
    """The subclass of ``base`` at a dotted path, or of this name if it is imported. Raises ``InputError``."""
    where = f"{source}: class_path {path!r}".removeprefix(": ")
    module_name, _, name = path.rpartition(".")
    if not module_name:
        known = {cls.__name__: cls for cls in _subclasses(base)}
        if path not in known:
            raise InputError(f"{where} not found{did_you_mean(path, known)}")
        return known[path]
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if not f"{module_name}.".startswith(f"{error.name}."):  # the module is there, but not what it imports
            raise InputError(f"{where}: {error}") from None
        module = None
    cls = getattr(module, name, None)
    if cls is None:
        paths = {*_beside(module_name), *(_public_path(cls) for cls in _subclasses(base))}
        raise InputError(f"{where} not found{did_you_mean(path, paths)}")
    if not (isinstance(cls, type) and issubclass(cls, base)):
        raise InputError(f"{where} is no {base.__name__}")
    return cls


def _parameters(path: str, base: type, source: str = "") -> dict[str, inspect.Parameter]:
    """The arguments of a class by name; ``"**"`` stands for any further ones."""
    found = inspect.signature(find_class(path, base, source)).parameters.values()
    return {"**" if p.kind is p.VAR_KEYWORD else p.name: p for p in found if p.kind is not p.VAR_POSITIONAL}


def _takes_none(parameter: inspect.Parameter) -> bool:
    hint = parameter.annotation
    if parameter.default is None or isinstance(hint, str):  # a hint that is not evaluated: nobody knows
        return True
    return not {type(None), None, Any, parameter.empty}.isdisjoint(typing.get_args(hint) or (hint,))


def _subclasses(base: type) -> Iterator[type]:
    cls: type
    for cls in base.__subclasses__():
        yield cls
        yield from _subclasses(cls)


def _beside(module_name: str) -> list[str]:
    """The paths of what a module has; where there is no such module, of what that of the nearest name has."""
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError:
        parent = sys.modules.get(module_name.rpartition(".")[0])
        modules = (
            [f"{parent.__name__}.{m.name}" for m in pkgutil.iter_modules(parent.__path__)] if parent else []
        )
        near = difflib.get_close_matches(module_name, modules, n=1)
        return _beside(near[0]) if near else []
    return [f"{module_name}.{name}" for name in getattr(module, "__all__", dir(module))]


def _public_path(cls: type) -> str:
    """The shortest path to a class: of the outermost package that has its name."""
    parts = cls.__module__.split(".")
    packages = [".".join(parts[:n]) for n in range(1, len(parts) + 1)]
    public = (p for p in packages if getattr(sys.modules.get(p), cls.__name__, None) is cls)
    return f"{next(public, cls.__module__)}.{cls.__name__}"
