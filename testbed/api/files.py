"""The folder of a run's results: made, written, read back."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from testbed.errors import TestbedError

if TYPE_CHECKING:
    from testbed.results import Result
    from testbed.scenario import Scenario


def read_result(file: Path) -> tuple[Result, Scenario]:
    """Return a run's result and scenario from its ``result.json``, or the folder that holds it."""
    import json

    from testbed.results import Result
    from testbed.scenario import Scenario

    hint = "name the result.json that `testbed run` wrote"
    if file.is_dir():
        file /= "result.json"
    try:
        result = Result.from_json_dict(json.loads(file.read_text()))
        scenario = Scenario.model_validate(result.scenario)
    except OSError as error:
        raise TestbedError(f"{file} cannot be read: {error.strerror}", hint=hint) from None
    except (ValueError, AttributeError) as error:  # JSON's and pydantic's errors are ValueErrors
        raise TestbedError(f"{file}: {str(error).splitlines()[0]}", hint=hint) from None
    return result, scenario


def save_result(result: Result, folder: Path) -> None:
    """Write ``result.json`` and ``scenario.yaml`` (the resolved scenario) into a folder, made if missing.

    Raises:
        TestbedError: They cannot be written.
    """
    from testbed.results import render_json

    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_scenario(result.scenario, folder / "scenario.yaml")
        draft = folder / "result.json.new"
        draft.write_text(render_json(result))
        draft.rename(folder / "result.json")  # whole, or not there
    except OSError as error:
        raise TestbedError(f"results cannot be written to {folder}: {error.strerror}", hint="use --output") from None


def write_scenario(resolved: Mapping[str, object], path: Path) -> None:
    """Write a resolved scenario as a file that can be loaded."""
    from ruamel.yaml import YAML

    yaml = YAML(typ="safe", pure=True)
    yaml.default_flow_style = False
    # Keys in the order of the file format; ruamel's annotation knows only the default.
    yaml.sort_base_mapping_type_on_output = False  # type: ignore[assignment]
    with path.open("w") as file:
        yaml.dump(dict(resolved), file)


@contextlib.contextmanager
def result_folder(output: Path | None) -> Iterator[None]:
    """Make the folder of the results before anything is built; take it away again if nothing came of it."""
    if output is None:
        yield
        return
    made = not output.exists()
    try:
        output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise TestbedError(f"results cannot be written to {output}: {error.strerror}", hint="use --output") from None
    try:
        yield
    except BaseException:
        if made:
            with contextlib.suppress(OSError):
                output.rmdir()
        raise
