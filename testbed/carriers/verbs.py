"""rdma-core's Python binding, wherever the system has it."""

from __future__ import annotations

import importlib
import sys
from types import SimpleNamespace

from testbed.errors import MachineError

# Debian's packages are built for its own Python: one of the same version may use them.
_SYSTEM_PACKAGES = "/usr/lib/python3/dist-packages"
_MODULES = ("addr", "cq", "device", "enums", "mr", "pd", "qp", "wr")


def import_verbs() -> SimpleNamespace:
    """Return pyverbs' modules by their names.

    Raises:
        MachineError: There is no pyverbs for this Python.
    """
    added = _SYSTEM_PACKAGES not in sys.path
    if added:
        sys.path.append(_SYSTEM_PACKAGES)
    try:
        return SimpleNamespace(**{name: importlib.import_module(f"pyverbs.{name}") for name in _MODULES})
    except ImportError as error:
        version = f"{sys.version_info.major}.{sys.version_info.minor}"
        raise MachineError(
            f"there is no pyverbs for Python {version}: {error}",
            hint="apt-get install python3-pyverbs ibverbs-providers",
        ) from None
    finally:
        if added:
            sys.path.remove(_SYSTEM_PACKAGES)
