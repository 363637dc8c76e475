"""Reads JSON files that others wrote, and checks that they have the expected form.

Standard library only: ledgers are read in pytest sessions that have nothing to do with losses.
"""

import json
from pathlib import Path
from typing import Any

NUMBER = (int, float)
_WORDS = {dict: "an object", list: "a list", str: "a text", int: "an integer", float: "a number", bool: "true or false"}


class Optional:
    """The form of an entry that may be missing."""

    def __init__(self, form: Any) -> None:
        """Take the form that it has if it is there."""
        self.form = form


def read_json(path: Path) -> Any:
    """Return the content of a JSON file.

    Raises:
        OSError: the file cannot be read.
        ValueError: it is no JSON, or nested too deeply for this Python.
    """
    return parse_json(path.read_text(encoding="utf-8"))


def parse_json(text: str) -> Any:
    """Return the content of a JSON text; see `read_json`."""
    try:
        return json.loads(text)
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error


def check_form(value: Any, form: Any, where: str = "it") -> None:
    """Check that a value has a form.

    Args:
        value: what `json.loads` returned.
        form: a type or a tuple of types (None for null); [form] for a list; {str: form} for an object with any names;
            {"name": form} for an object with these names alone, or with others too if one of the names is `...`.
            Numbers are never true or false.
        where: what the value is called in messages.

    Raises:
        ValueError: it has another form; the message names the first entry that is wrong.

    Example:
        >>> check_form({"versions": {"numpy": "2.0"}}, {"versions": {str: str}, "date": Optional(str)})
        >>> check_form({"versions": {"numpy": 2}}, {"versions": {str: str}})
        Traceback (most recent call last):
        ValueError: versions.numpy must be a text, got 2
    """
    if isinstance(form, list):
        _check_type(value, (list,), where)
        for i, entry in enumerate(value):
            check_form(entry, form[0], f"{where}[{i}]")
    elif isinstance(form, dict):
        _check_type(value, (dict,), where)
        forms = dict.fromkeys(value, form[str]) if str in form else form
        unknown = [] if ... in form else [name for name in value if name not in forms]
        if unknown:
            raise ValueError(f"{where} has an unknown entry {unknown[0]!r}")
        for name, entry in ((name, entry) for name, entry in forms.items() if name is not ...):
            place = name if where == "it" else f"{where}.{name}"
            if name in value:
                check_form(value[name], entry.form if isinstance(entry, Optional) else entry, place)
            elif not isinstance(entry, Optional):
                raise ValueError(f"{place} is missing")
    else:
        _check_type(value, form if isinstance(form, tuple) else (form,), where)


def _check_type(value: Any, types: tuple[type | None, ...], where: str) -> None:
    wanted = tuple(type(None) if each is None else each for each in types)
    if not isinstance(value, wanted) or (isinstance(value, bool) and bool not in wanted):
        words = list(dict.fromkeys("null" if each is None else _WORDS[each] for each in types))
        given = "null" if value is None else _WORDS[type(value)] if isinstance(value, dict | list) else repr(value)
        raise ValueError(f"{where} must be {' or '.join(words)}, got {given[:40]}")
