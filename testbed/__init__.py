"""testbed: what does this fabric do to my all-reduce?

The calls of :mod:`testbed.api` are here by name: ``testbed.load``, ``run``, ``deploy``, ``inspect``, ``labs``, ``execute``,
``destroy``, ``collect_garbage``, ``paths``, ``build_plan``, ``probe_machine``, ``save_result``, ``inject``, ``capture``,
``describe_graph``, ``describe_result_graph``; and :class:`Fabric`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from testbed.api import (
        build_plan,
        capture,
        collect_garbage,
        compare_paths,
        deploy,
        describe_graph,
        describe_result_graph,
        destroy,
        execute,
        inject,
        inspect,
        labs,
        load,
        paths,
        predict,
        probe_machine,
        run,
        save_result,
    )
    from testbed.fabric import Fabric
    from testbed.results import Result

__all__ = [
    "Fabric",
    "Result",
    "build_plan",
    "capture",
    "collect_garbage",
    "compare_paths",
    "deploy",
    "describe_graph",
    "describe_result_graph",
    "destroy",
    "execute",
    "inject",
    "inspect",
    "labs",
    "load",
    "paths",
    "predict",
    "probe_machine",
    "run",
    "save_result",
]


def __getattr__(name: str) -> Any:
    """Import the API when it is first asked for: ``import testbed`` alone costs nothing."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    import importlib

    homes = {"Fabric": "testbed.fabric", "Result": "testbed.results"}
    return getattr(importlib.import_module(homes.get(name, "testbed.api")), name)
