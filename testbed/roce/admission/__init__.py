"""What a sender must be granted before it sends, vectorised over all connections: one file per scheme behind `protocol`.

Pure: no frames, no clock. The engine tells the receivers' half what has arrived and carries its grants over the wire; the
senders' half says how far the grants received reach. A new scheme is a module here that exports ``NAME``, ``Parameters`` and
``Scheme`` (see `protocol.SchemeModule`); it is found by itself. docs/admission.md tells what there is.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Mapping
from typing import Any, cast

from testbed.roce.admission.protocol import AdmissionScheme, GrantsDue, Ints, SchemeModule


def find_schemes() -> Mapping[str, SchemeModule]:
    """Return every scheme of this package by name, in the order of the names."""
    modules = [importlib.import_module(f"{__name__}.{module.name}") for module in pkgutil.iter_modules(__path__)]
    found = [cast(SchemeModule, module) for module in modules if hasattr(module, "NAME")]
    return {scheme.NAME: scheme for scheme in sorted(found, key=lambda one: one.NAME)}


def make(name: str, parameters: Mapping[str, Any], connections: int) -> AdmissionScheme:
    """Return both halves of a scheme for that many connections.

    Args:
        name: The scheme, such as ``"cts"``.
        parameters: Values by field name of its ``Parameters``.
        connections: Number of connections.

    Raises:
        ValueError: If there is no such scheme, or a value is refused.

    Example:
        >>> make("none", {}, 2).admitted_packets(np.zeros(2, np.int64))  # doctest: +SKIP
    """
    schemes = find_schemes()
    if name not in schemes:
        raise ValueError(f"admission scheme must be one of {', '.join(schemes)}, got {name!r}")
    module = schemes[name]
    return module.Scheme(module.Parameters(**parameters), connections)


__all__ = ["AdmissionScheme", "GrantsDue", "Ints", "SchemeModule", "find_schemes", "make"]
