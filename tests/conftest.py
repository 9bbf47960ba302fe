"""What all tests share: the ``--update-golden`` option, and what tests that need root must find and leave."""

from __future__ import annotations

import json
import os
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import settings

# How long an example may take says something about the machine alone: no deadline.
settings.register_profile("testbed", deadline=None)
settings.load_profile("testbed")

# A shell starts what it runs in the background with Ctrl-C ignored; the commands that tests start would inherit that.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

# Labs of this run of the tests are named so: others on the machine may come and go meanwhile.
TEST_LAB_PREFIX = f"tbtest-{os.getpid()}-"


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--update-golden", action="store_true", help="rewrite the expected files of the golden tests")


@pytest.fixture
def update_golden(request: pytest.FixtureRequest) -> bool:
    """Whether golden tests shall write what they find instead of comparing."""
    return bool(request.config.getoption("--update-golden"))


def skip_or_fail(reason: str) -> None:
    """Skip for want of something; fail where TESTBED_REQUIRE_ALL=1 says that nothing may be wanting."""
    if os.environ.get("TESTBED_REQUIRE_ALL") == "1":
        pytest.fail(reason)
    pytest.skip(f"{reason} (TESTBED_REQUIRE_ALL=1 makes this a failure)")


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("root") is not None and os.geteuid() != 0:
        skip_or_fail("needs root")


def read_root_links() -> object:
    """Return the links of the host's own namespace, without what changes by itself."""
    links = json.loads(subprocess.run(["ip", "-j", "link"], check=True, capture_output=True, text=True).stdout)
    return sorted((link["ifindex"], link["ifname"], link.get("address"), tuple(link["flags"])) for link in links)


def list_test_namespaces() -> list[str]:
    """Return the named network namespaces of tests."""
    listed = subprocess.run(["ip", "netns", "list"], check=True, capture_output=True, text=True).stdout
    return sorted(line.split()[0] for line in listed.splitlines() if line.startswith(TEST_LAB_PREFIX))


def list_test_labs() -> list[str]:
    """Return the recorded labs of tests."""
    folder = Path("/run/testbed/labs")
    return sorted(entry.name for entry in folder.glob(f"{TEST_LAB_PREFIX}*")) if folder.exists() else []


@pytest.fixture
def host_unchanged() -> Iterator[None]:
    """Check that the test leaves links, network namespaces and labs as it found them; tidy up if it does not."""
    from testbed.errors import TestbedError

    links, namespaces, labs = read_root_links(), list_test_namespaces(), list_test_labs()
    yield
    after = read_root_links(), list_test_namespaces(), list_test_labs()
    for name in set(after[2]) - set(labs):
        from testbed import api

        try:
            api.destroy(name)
        except TestbedError:
            api.collect_garbage()
    assert after == (links, namespaces, labs)
