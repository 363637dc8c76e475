"""JSON that others wrote: nested beyond what Python follows, it is an error like any other."""

from pathlib import Path

import pytest

from parity_tests.json_files import parse_json, read_json

DEEP = {"lists": "[" * 100_000 + "]" * 100_000, "objects": '{"a":' * 100_000 + "1" + "}" * 100_000}


@pytest.mark.parametrize("kind", DEEP)
def test_what_is_nested_too_deeply_is_a_value_error(kind: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"^it is nested too deeply$"):
        parse_json(DEEP[kind])
    (tmp_path / "deep.json").write_text(DEEP[kind])
    with pytest.raises(ValueError, match=r"^it is nested too deeply$"):
        read_json(tmp_path / "deep.json")


def test_other_json_is_read_or_refused() -> None:
    assert parse_json('{"a": [1, 2.5, null]}') == {"a": [1, 2.5, None]}
    with pytest.raises(ValueError, match="Expecting value"):
        parse_json("[1,")
