"""Congestion control at the sender, vectorised over all QPs: one file per algorithm behind `protocol`.

A new algorithm is a module here that exports ``NAME``, ``Parameters`` and ``Algorithm`` (see
`protocol.CongestionAlgorithm`); it is found by itself. docs/congestion-control.md tells what there is.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Mapping
from typing import Any, cast

import numpy as np

from testbed.roce.congestion.protocol import (
    CongestionAlgorithm,
    CongestionControl,
    Feedback,
    Floats,
    read_parameters,
)


def find_algorithms() -> Mapping[str, CongestionAlgorithm]:
    """Return every algorithm of this package by name, in the order of the names."""
    modules = [importlib.import_module(f"{__name__}.{module.name}") for module in pkgutil.iter_modules(__path__)]
    found = [cast(CongestionAlgorithm, module) for module in modules if hasattr(module, "NAME")]
    return {algorithm.NAME: algorithm for algorithm in sorted(found, key=lambda one: one.NAME)}


def make(name: str, parameters: Mapping[str, Any], line_rate_bytes_per_s: Floats) -> CongestionControl:
    """Return the reaction points of all QPs, at line rate and at time 0.

    Args:
        name: The algorithm, such as ``"dcqcn"``.
        parameters: Values by field name of its ``Parameters``; what is missing has its default.
        line_rate_bytes_per_s: Rate of each QP's NIC, shape ``(qps,)``, each above 0.

    Raises:
        ValueError: If there is no such algorithm or parameter, or a value is refused; the message lists those there are.

    Example:
        >>> make("dcqcn", {"machine": "paper"}, np.full(4, 50e9)).rate_bytes_per_s
        array([5.e+10, 5.e+10, 5.e+10, 5.e+10])
    """
    module = _find(name)
    rates = np.asarray(line_rate_bytes_per_s, np.float64)
    if rates.ndim != 1 or not (rates > 0).all():
        raise ValueError("line rates must be an array of one rate above 0 per QP")
    return module.Algorithm(read_parameters(module.Parameters, parameters, name), rates)


def cnp_interval_ns(name: str, parameters: Mapping[str, Any]) -> int:
    """Return the time in which a responder sends at most one CNP per QP, emulated; 0 where the algorithm wants none.

    Raises:
        ValueError: As `make`.
    """
    module = _find(name)
    read = getattr(module, "cnp_interval_ns", None)
    return int(read(read_parameters(module.Parameters, parameters, name))) if read else 0


def _find(name: str) -> CongestionAlgorithm:
    algorithms = find_algorithms()
    if name not in algorithms:
        raise ValueError(f"congestion control must be one of {', '.join(algorithms)}, got {name!r}")
    return algorithms[name]


__all__ = ["CongestionAlgorithm", "CongestionControl", "Feedback", "cnp_interval_ns", "find_algorithms", "make"]
