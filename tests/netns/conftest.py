"""Every test here builds labs on this machine, and must leave it as it was."""

from __future__ import annotations

import pytest


@pytest.fixture(autouse=True)
def _host_unchanged(host_unchanged: None) -> None:
    """Check links, network namespaces and labs after every test."""
