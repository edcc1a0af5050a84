"""The long lists of a JSON file, item by item: COCO's instances of 450 MB are never a million Python objects at once."""

import json
import re
from collections.abc import Callable, Mapping

from pmpseg.errors import InputError

Visit = Callable[[dict], None]
_SPACE = re.compile(r"[ \t\r\n]*")


def visit_lists(content: bytes, visits: Mapping[str, Visit], where: str) -> None:
    """Call ``visits[key]`` for each item of the list under ``key`` in the JSON object ``content``; other keys are passed over.

    ``where`` is the file's name. Raises InputError where it is no JSON object, a key is missing, or an item lacks what a visit
    looks for.
    """
    missing = set(visits)
    try:
        text = content.decode("utf-8")
        del content
        scan = json.JSONDecoder().raw_decode
        at = _after(text, _skip(text, 0), "{")
        while text[at] != "}":
            key, at = scan(text, at)
            at = _skip(text, _after(text, _skip(text, at), ":"))
            if key in visits and text[at] == "[":
                missing.discard(key)
                at = _items(text, at, visits[key], scan)
            else:
                _, at = scan(text, at)
            at = _skip(text, at)
            if text[at] == ",":
                at = _skip(text, at + 1)
    except InputError:
        raise
    except OverflowError as error:
        raise InputError(f"{where} is not as COCO's files are: a number in it is too large ({error})") from None
    except (ValueError, IndexError) as error:
        raise InputError(f"{where} is not a whole JSON file: {error}") from None
    except (KeyError, TypeError) as error:
        said = f"{error} is missing in it" if isinstance(error, KeyError) else error
        raise InputError(f"{where} is not as COCO's files are: {said}") from None
    if missing:
        raise InputError(f"{where} is not as COCO's files are: it has no list {min(missing)!r}")


def _items(text: str, at: int, visit: Visit, scan: Callable) -> int:
    """Visit the items of the list that begins at ``at``; returns the place after it."""
    at = _skip(text, at + 1)
    while text[at] != "]":
        item, at = scan(text, at)
        visit(item)
        at = _skip(text, at)
        if text[at] == ",":
            at = _skip(text, at + 1)
    return at + 1


def _skip(text: str, at: int) -> int:
    return _SPACE.match(text, at).end()  # type: ignore[union-attr]


def _after(text: str, at: int, wanted: str) -> int:
    if text[at] != wanted:
        raise ValueError(f"want {wanted} at character {at}, got {text[at]}")
    return _skip(text, at + 1)
