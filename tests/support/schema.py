"""The record's JSON Schema as it is published, and a validator of it that is not ours."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Final

from jsonschema import Draft202012Validator

SCHEMA_FILE: Final = Path(__file__).parent.parent.parent / "docs" / "record.schema.json"
_VALIDATOR: Final = Draft202012Validator(json.loads(SCHEMA_FILE.read_text()))


def faults(line: bytes) -> list[str]:
    """What is wrong with a record's line, by place."""
    row: Any = json.loads(line)
    return [f"{'.'.join(map(str, error.path))}: {error.message[:200]}" for error in _VALIDATOR.iter_errors(row)]
