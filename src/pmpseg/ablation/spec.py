"""A file of conf/ablation: a base run and named differences from it, one factor changed at a time.

    base_name: pooled
    base:
      configs: [conf/pmp_scenes.yaml]         # -c files of pmpseg.fit, beside this file or relative to a folder above it
      options: {trainer.max_steps: 300}       # its options
    variants:                                 # each is trained: the base with these options changed
      blind: {model.prompt_attention: none}
      other: {configs: [conf/clipseg_scenes.yaml], options: {trainer.max_steps: 300}}   # or a run of its own
    evaluate:                                 # each is a trained model, by default the base's, asked otherwise
      together: {asked: mixed}                # or with a second stage: a part's, or a CLIP as it is
      crop: {region: tiny_clip, mode: crop, weight: 0.5, templates: ["a {}"]}
    asked: alone                              # how phrases are asked where nothing else is said; mixed: together; forms: alone,
                                              # once by text and once by example, as CLIPSeg's tables have it
    groups:                                   # for reading the table: factor -> names
      attention: [blind]

``parts`` are trained like variants but have configs of their own, are not scored and have no row in the table. The value of an
option may name another run of the same seed, as in ``"{pooled}/model"``, which is then trained first. A part may take its data of
another seed, ``data.seed: "{seed+100}"``: what goes on from a run of the same data would meet the same samples again.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from graphlib import CycleError, TopologicalSorter
from pathlib import Path
from typing import Any

import yaml

from pmpseg.cli import did_you_mean
from pmpseg.errors import InputError

Options = dict[str, Any]
KEYS = ("base_name", "base", "variants", "evaluate", "parts", "groups", "asked")
RUN_KEYS = ("configs", "options")
STAGE = ("mode", "weight", "templates")  # of a second stage, where it is not as it was trained
EVALUATION = ("model", "asked", "region", *STAGE)  # whose model, how its phrases are asked, and a second stage
ASKED, MODES = ("alone", "mixed", "forms"), ("crop", "pool")
RESERVED = {"seed_everything", "data.seed", "trainer.default_root_dir", "ckpt_path"}  # which we set
OTHER_SEED = re.compile(r"\{seed\+(\d+)\}")


@dataclass
class Training:
    """One run of ``pmpseg.fit`` but for seed and folder. Its option ``data.seed``, if any, is one that follows the seed."""

    configs: list[Path]
    options: Options

    def arguments(self, seed: int) -> list[str]:
        words = [word for path in self.configs for word in ("-c", str(path))]
        words += [word for key, value in self.options.items() if key != "data.seed" for word in (f"--{key}", as_word(value))]
        further = OTHER_SEED.fullmatch(self.options.get("data.seed", ""))
        return [*words, "--seed_everything", str(seed), "--data.seed", str(seed + int(further[1]) if further else seed)]

    def needs(self) -> set[str]:
        """The runs that its options name."""
        return {name for value in self.options.values() for name in re.findall(r"\{([\w.-]+)\}", str(value))}


@dataclass
class Ablation:
    """``trainings`` holds base, variants and parts, ``evaluations`` the models that are asked otherwise; the base comes first."""

    path: Path
    base_name: str
    trainings: dict[str, Training]
    parts: set[str]
    evaluations: dict[str, Options]
    groups: dict[str, list[str]] = field(default_factory=dict)
    asked: str = "alone"

    @property
    def rows(self) -> list[str]:
        """What the table shows, the base first."""
        return [name for name in (*self.trainings, *self.evaluations) if name not in self.parts]

    @property
    def in_order(self) -> list[str]:
        """The trainings, each after those that it needs."""
        return list(TopologicalSorter({name: training.needs() for name, training in self.trainings.items()}).static_order())

    def factor(self, name: str) -> str:
        return next((factor for factor, names in self.groups.items() if name in names), "")

    def needs(self, name: str) -> set[str]:
        """The runs of the same seed that must be there before this one."""
        if name in self.evaluations:
            given = self.evaluations[name]
            return {given["model"], given.get("region")} & self.trainings.keys()
        return self.trainings[name].needs()

    @classmethod
    def read(cls, path: str | Path) -> "Ablation":
        """Reads a file and checks all that can be known without the model; raises ``InputError``, one line."""
        path = Path(path)
        content = _mapping(_load(path), KEYS, str(path))
        base = _mapping(content.get("base") or {}, RUN_KEYS, f"{path}: base")
        base_name = str(content.get("base_name", "base"))
        start = Training(_configs(base, path), _options(base.get("options"), f"{path}: base.options"))
        trainings, parts = {base_name: start}, set()
        for name, options in _entries(content, "variants", path):
            if isinstance(options, Mapping) and "configs" in options:
                own = _mapping(options, RUN_KEYS, f"{path}: {name}")
                trainings[name] = Training(_configs(own, path), _options(own.get("options"), f"{path}: {name}.options"))
                continue
            difference = _options(options, f"{path}: {name}")
            if not difference.keys() - {k for k, v in difference.items() if k in start.options and start.options[k] == v}:
                raise InputError(f"{path}: {name} does not differ from the base: give an option that it changes")
            trainings[name] = Training(start.configs, start.options | difference)
        for name, given in _entries(content, "parts", path):
            part = _mapping(given, RUN_KEYS, f"{path}: {name}")
            trainings[name] = Training(_configs(part, path), _options(part.get("options"), f"{path}: {name}.options", True))
            parts.add(name)
        usual = content.get("asked", "alone")
        _one_of(usual, set(ASKED), f"{path}: asked")
        evaluations = {}
        for name, given in _entries(content, "evaluate", path):
            asked = {"model": base_name, "asked": usual} | _mapping(given, EVALUATION, f"{path}: {name}")
            _one_of(asked["model"], set(trainings), f"{path}: {name}: model")
            _one_of(asked["asked"], set(ASKED), f"{path}: {name}: asked")
            _check_region(asked, f"{path}: {name}")
            evaluations[name] = asked
        groups = {str(k): list(map(str, v or [])) for k, v in (content.get("groups") or {}).items()}
        ablation = cls(path, base_name, trainings, parts, evaluations, groups, usual)
        ablation._check_names(content)
        return ablation

    def _check_names(self, content: Mapping[str, Any]) -> None:
        names = [self.base_name, *(str(n) for k in ("variants", "parts", "evaluate") for n in content.get(k) or {})]
        for name in names:
            if not re.fullmatch(r"[A-Za-z0-9][\w.-]*", name):
                raise InputError(f"{self.path}: the name {name!r} becomes a folder: use letters, digits, '_', '-' and '.'")
            if names.count(name) > 1:
                raise InputError(f"{self.path}: the name {name!r} is given twice: choose another")
        for factor, members in self.groups.items():
            for name in members:
                _one_of(name, set(self.rows), f"{self.path}: groups: {factor}")
        for name, training in self.trainings.items():
            for needed in training.needs():
                _one_of(needed, set(self.trainings) - {name}, f"{self.path}: {name}")
        try:
            self.in_order  # noqa: B018
        except CycleError as error:
            circle = " -> ".join(reversed(error.args[1]))
            raise InputError(f"{self.path}: {circle}: each needs the next, so none can be the first: break the circle") from None


def as_word(value: Any) -> str:
    """An option's value as it stands on a command line."""
    return value if isinstance(value, str) else yaml.safe_dump(value, default_flow_style=True, width=10**6).split("\n")[0]


def _load(path: Path) -> Any:
    if not path.is_file():
        others = [str(other) for other in path.parent.glob("*.yaml")]
        raise InputError(f"no ablation {str(path)!r}{did_you_mean(str(path), others)}")
    try:
        return yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise InputError(f"{path} is no valid YAML: {error}") from error


def _mapping(value: Any, keys: tuple[str, ...], where: str) -> dict[str, Any]:
    if not isinstance(value, Mapping):
        raise InputError(f"{where}: got {value!r}, want a mapping of {', '.join(keys)}")
    for key in value:
        if key not in keys:
            raise InputError(f"{where}: unknown key {key!r}{did_you_mean(str(key), keys) or ': want ' + ', '.join(keys)}")
    return dict(value)


def _entries(content: Mapping[str, Any], key: str, path: Path) -> list[tuple[str, Any]]:
    value = content.get(key) or {}
    if not isinstance(value, Mapping):
        raise InputError(f"{path}: {key}: got {value!r}, want a mapping of names")
    return [(str(name), given) for name, given in value.items()]


def _options(value: Any, where: str, is_part: bool = False) -> Options:
    if value is None:
        return {}
    if not isinstance(value, Mapping):
        raise InputError(f"{where}: got {value!r}, want options of pmpseg.fit, as in 'model.dim: 64'")
    for key, one in value.items():
        if key in RESERVED and not (is_part and key == "data.seed" and OTHER_SEED.fullmatch(str(one))):
            instead = ", or give a part's as '{seed+100}'" if key == "data.seed" else ""
            raise InputError(f"{where}: {key} is set for every run by pmpseg.ablate: leave it out{instead}")
    return {str(key): one for key, one in value.items()}


def _configs(run: Mapping[str, Any], path: Path) -> list[Path]:
    """A file beside the ablation's, or relative to a folder above it or to where we are."""
    found = []
    for name in run.get("configs") or []:
        places = [folder / name for folder in (*path.resolve().parents, Path.cwd())]
        there = [place for place in places if place.is_file()]
        if not there:
            others = [str(Path(name).with_name(p.name)) for place in places for p in place.parent.glob("*.yaml")]
            raise InputError(f"{path}: no configuration {name!r}{did_you_mean(str(name), others)}")
        found.append(there[0].resolve())
    return found


def _check_region(asked: Mapping[str, Any], where: str) -> None:
    if "mode" in asked:
        _one_of(asked["mode"], set(MODES), f"{where}: mode")
    weight = asked.get("weight", 0.5)
    if not isinstance(weight, int | float) or not 0 <= weight <= 1:
        raise InputError(f"{where}: weight: got {weight!r}, want 0 (the first stage alone) to 1 (the region's CLIP alone)")
    templates = asked.get("templates", ["{}"])
    if not isinstance(templates, list) or not templates or any(str(one).count("{}") != 1 for one in templates):
        raise InputError(f"{where}: templates: got {templates!r}, want a list of at least one, each with one '{{}}'")
    if "region" not in asked and asked.keys() & set(STAGE):
        raise InputError(f"{where}: {', '.join(STAGE)} are of a second stage: give region, the name of a part or a CLIP, too")


def _one_of(name: Any, known: set[str], where: str) -> None:
    if name not in known:
        raise InputError(f"{where}: got {name!r}, want one of {', '.join(sorted(known))}{did_you_mean(str(name), known)}")
