"""What several test files share."""

import os
from collections.abc import Callable
from pathlib import Path

import pytest

SHARED = Path(os.environ.get("PMPSEG_SHARED", Path(__file__).parents[2] / "shared"))


@pytest.fixture(scope="session")
def shared() -> Callable[..., Path]:
    """``shared("data", "camvid")``: a path in the folder of data and weights, $PMPSEG_SHARED or ../shared.

    A test that asks for what is not there is skipped.
    """

    def shared(*parts: str) -> Path:
        path = SHARED.joinpath(*parts)
        if not path.exists():
            pytest.skip(f"no {path}: set PMPSEG_SHARED to the folder that holds {parts[0]}/")
        return path

    return shared
