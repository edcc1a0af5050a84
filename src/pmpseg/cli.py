"""What the commands share: one-line errors, and files that are never left half written.

``run(main)`` is how a command starts. ``did_you_mean`` and ``explain`` are for messages: the first names the
nearest right word, the second makes one line of what jsonargparse says about a value. No Lightning here.
"""

import argparse
import difflib
import errno
import os
import re
import sys
import traceback
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NoReturn

from pmpseg.errors import InputError

# no space, no permission, a file in the place of a folder: nothing that the code could have done better
USERS = {errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EPERM, errno.EROFS}
USERS |= {errno.EISDIR, errno.ENOTDIR, errno.EEXIST}

ADVICE = dict.fromkeys((errno.ENOSPC, errno.EDQUOT), ": free some space, or write to another disk")
ADVICE |= dict.fromkeys((errno.EACCES, errno.EPERM, errno.EROFS), ": choose a place that may be written")
ADVICE |= dict.fromkeys((errno.ENOTDIR, errno.EEXIST), ": a file stands where a folder is wanted: give another name")


def run(main: Callable[[], object]) -> NoReturn:
    """Run a command and leave Python, printing expected errors as one line on stderr.

    The status is what the command returns if that is an int, else 0: it may return what it made to Python.
    Bad input, a missing file, no space and no permission give status 2, Ctrl-C gives 130; anything else is a
    bug and keeps its traceback, which PMPSEG_TRACEBACK=1 shows for all of them.
    """
    try:
        result = main()
        sys.exit(result if isinstance(result, int) else 0)
    except (InputError, OSError, KeyboardInterrupt) as error:
        if isinstance(error, KeyboardInterrupt):
            status, line = 130, "interrupted"
        elif isinstance(error, InputError | FileNotFoundError) or getattr(error, "errno", None) in USERS:
            advice = ADVICE.get(getattr(error, "errno", None) or 0, "")
            status, line = 2, f"error: {one_line(re.sub(r'^.Errno [0-9]+. ', '', str(error)))}{advice}"
        else:
            raise
        if os.environ.get("PMPSEG_TRACEBACK") == "1":
            traceback.print_exc()
        print(f"pmpseg: {line}", file=sys.stderr)
        sys.exit(status)


@contextmanager
def whole_file(path: str | Path) -> Iterator[Path]:
    """Gives a temporary path beside ``path``, which takes its place when the block ends without an error."""
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def positive(text: str) -> int:
    """For argparse: an integer of 1 or more."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"got {text!r}, want an integer of 1 or more")
    return int(text)


def did_you_mean(word: str, known: Collection[str]) -> str:
    """``": did you mean 'x'?"`` for the nearest of the known words, or ``""`` where none is near.

    For dotted words the same last part counts as nearest: data.batch_size for model.batch_size.
    """
    last = word.rpartition(".")[2]
    same_end = [other for other in known if other.rpartition(".")[2] == last]
    cutoff = 0.0 if same_end else 0.6
    nearest = difflib.get_close_matches(word, sorted(same_end or known), n=1, cutoff=cutoff)
    return f": did you mean {nearest[0]!r}?" if nearest else ""


def explain(text: str) -> str:
    """One line of a message of jsonargparse about a value: ``data.batch_size: got 'many', want int``."""
    key, block = _innermost(text)
    if missing := re.search(r"arguments are required: (.+)", block):
        names = [f"{key}.{name}".lstrip(".") for name in missing[1].split(", ")]
        return f"{', '.join(names)} is missing: give a value"
    if unknown := re.search(r"[Oo]ption '(.+)' is not accepted", block):
        return f"unknown key {f'{key}.{unknown[1]}'.lstrip('.')!r}"
    got = re.search(r"G(?:iven|ot) value: (.*)", block)
    want = re.search(r"Subtypes: \[(.+)\]", block) or re.search(r"Expected an? (.+?)(\. Got|$)", block, re.M)
    if not (key and got and want):
        return one_line(text)[:300]
    words = re.findall(r"'([^']*)'", want[1].replace("<class ", "")) if "Literal" in want[1] else []
    is_plain = re.fullmatch(r"-?[\d.]+(e-?\d+)?|[\[{(].*|None|True|False|'.*'", got[1])
    value = got[1] if is_plain else repr(got[1])
    return f"{key}: got {value}, want {plain_type(want[1])}{did_you_mean(got[1], words)}"


def plain_type(text: str) -> str:
    """``<class 'int'>, <class 'NoneType'>`` -> ``int or null``."""
    text = re.sub(r"<class '([^']+)'>", r"\1", text)
    text = re.sub(r"(?:\w+\.)+(\w)", r"\1", text)  # typing.Literal -> Literal
    text = re.sub(r"Literal\[([^]]*)\]", lambda match: match[1].replace(", ", " or "), text)
    text = " or ".join(re.split(r", (?![^\[]*\])| \| ", text))  # not at the commas of dict[str, int]
    return text.replace("NoneType", "null").replace("None", "null")


def one_line(text: str) -> str:
    return " ".join(text.split())


def _innermost(text: str) -> tuple[str, str]:
    """The key that a tree of errors is about, and what is said of it.

    jsonargparse indents an error in an argument of a class below the error in the class.
    """
    keys: list[str] = []
    block, depth = "", -1
    for line in text.splitlines():
        indent = len(line) - len(line.lstrip())
        found = re.search(r'Parser key "([^"]+)"', line)
        if found and indent > depth:
            keys, block, depth = [*keys, found[1]], line, indent
        elif keys and indent <= depth:
            break
        else:
            block += f"\n{line}"
    return ".".join(keys), block
