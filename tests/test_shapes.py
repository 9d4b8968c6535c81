from __future__ import annotations

from typing import Any

import pytest

from breastcli.errors import UserError
from breastcli.shapes import check_shape

SHAPE = {"name": str, "n": int, "share": float, "fold": (int, None), "rows": [{"x": float}], "old?": bool}
GOOD = {"name": "a", "n": 1, "share": 1, "fold": None, "rows": [{"x": 0.5}, {"x": 2, "more": []}], "further": 3}


def test_a_document_of_the_shape_passes() -> None:
    check_shape(GOOD, SHAPE, "a.json", "fix")
    check_shape(GOOD | {"fold": 2, "old": True, "rows": []}, SHAPE, "a.json", "fix")


@pytest.mark.parametrize(
    ("document", "message"),
    [
        (None, "a.json: holds NoneType, not dict: fix"),
        ([], "a.json: holds list, not dict: fix"),
        ({name: value for name, value in GOOD.items() if name != "rows"}, "a.json lacks rows: fix"),
        (GOOD | {"name": 3}, "a.json: name is int, not str: fix"),
        (GOOD | {"n": 1.0}, "a.json: n is float, not int: fix"),
        (GOOD | {"n": True}, "a.json: n is bool, not int: fix"),
        (GOOD | {"share": "1"}, "a.json: share is str, not float: fix"),
        (GOOD | {"fold": "1"}, "a.json: fold is str, not int or null: fix"),
        (GOOD | {"rows": {}}, "a.json: rows is dict, not list: fix"),
        (GOOD | {"rows": [{"x": 1}, {}]}, r"a.json lacks rows\[1\].x: fix"),
        (GOOD | {"old": 1}, "a.json: old is int, not bool: fix"),
    ],
)
def test_what_differs_is_named(document: Any, message: str) -> None:
    with pytest.raises(UserError, match=f"^{message}$"):
        check_shape(document, SHAPE, "a.json", "fix")
