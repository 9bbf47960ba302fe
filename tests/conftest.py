"""What all tests share: the ``--update-golden`` option."""

from __future__ import annotations

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--update-golden", action="store_true", help="rewrite the expected files of the golden tests")


@pytest.fixture
def update_golden(request: pytest.FixtureRequest) -> bool:
    """Whether golden tests shall write what they find instead of comparing."""
    return bool(request.config.getoption("--update-golden"))
