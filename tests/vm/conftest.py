"""Tests of what only a full kernel can do; they run inside a guest of ``testbed vm run``, see ``scripts/test-vm``."""

from __future__ import annotations

import os

import pytest

from testbed.host import GUEST_VARIABLE
from tests.conftest import skip_or_fail


@pytest.fixture(autouse=True)
def _in_a_guest(host_unchanged: None) -> None:
    """Skip where this is no guest; check links, network namespaces and labs after every test."""
    if GUEST_VARIABLE not in os.environ:
        skip_or_fail("needs a guest of `testbed vm run`")
