"""A virtual machine with a full kernel: for any command, and for a run in virtual time."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from testbed.api.files import result_folder, write_scenario
from testbed.api.listener import RunListener, SilentListener
from testbed.api.planning import build_plan
from testbed.errors import TestbedError

if TYPE_CHECKING:
    from testbed.results import Result
    from testbed.scenario import Scenario
    from testbed.vm import KernelName, VmListener


def run_in_virtual_time(
    scenario: Scenario,
    *,
    kernel: KernelName | None = None,
    listener: RunListener | None = None,
    output: Path | None = None,
    series: bool = True,
    timeout_s: float | None = None,
) -> Result:
    """Run a scenario in a virtual machine whose clock counts instructions; return what was found out. Needs root.

    Fabric, engine and all are in the guest: what else this machine does changes how long the run takes, not what it finds.

    Args:
        scenario: The scenario.
        kernel: The guest's kernel.
        listener: Told of the machine; what the run in it says of its progress goes to standard error.
        output: Folder for ``result.json`` and ``scenario.yaml``; made if missing. None writes nothing.
        series: Write the time series of the run into ``output`` too.
        timeout_s: Wall time that the run may take on this machine; None for no limit.

    Raises:
        MachineError: This machine lacks something.
        VmError: The virtual machine failed.
        RunError: The run in it failed; it has said why.
    """
    import json
    import sys
    import tempfile

    from testbed.errors import RunError
    from testbed.results import Result

    build_plan(scenario, measure=False)  # what cannot be planned needs no machine
    with tempfile.TemporaryDirectory(prefix="testbed-run-") as name, result_folder(output):
        private = Path(name).resolve()
        folder = private if output is None else output.resolve()
        write_scenario(scenario.resolved(), private / "scenario.yaml")
        command = [sys.executable, "-m", "testbed", "run", str(private / "scenario.yaml"), "--output", str(folder)]
        command += ["--format", "json", "--series" if series and output is not None else "--no-series"]
        code = run_in_vm(
            ["sh", "-c", 'exec "$@" >/dev/null', "sh", *command],  # the result comes as a file
            kernel=kernel,
            virtual_time=True,
            # A run waits for timers alone, but applications for their files, which are this machine's: time must not fly then.
            skip_idle=not scenario.applications,
            outputs=[folder],
            timeout_s=timeout_s,
            environment={},  # its options are given, and must not be read a second time
            listener=listener,
        )
        try:
            return Result.from_json_dict(json.loads((folder / "result.json").read_text()))
        except (OSError, ValueError) as error:
            raise RunError(
                f"the run in the virtual machine left no result, and ended with exit code {code}",
                hint="what it said is above",
            ) from error


def run_in_vm(
    command: Sequence[str],
    *,
    kernel: KernelName | None = None,
    virtual_time: bool = False,
    skip_idle: bool = False,
    outputs: Sequence[Path] = (),
    memory_bytes: int = 2 << 30,
    timeout_s: float | None = None,
    folder: Path | None = None,
    environment: Mapping[str, str] | None = None,
    listener: VmListener | None = None,
) -> int:
    """Run a command as root under a full kernel, in a virtual machine around this machine's files. Needs root.

    Its output goes to this process's. The guest sees this machine's root read-only, under a layer in its own memory.

    Args:
        command: Program and arguments.
        kernel: Which; by default the newest that is tried.
        virtual_time: Let a nanosecond pass with each guest instruction, whatever this machine does.
        skip_idle: In virtual time, skip what the guest waits for: no figure depends on this machine, deadlines may be missed.
        outputs: Folders that the command may write to, made if missing; all else it writes is lost.
        memory_bytes: The guest's memory.
        timeout_s: Wall time that the command may take; None for no limit.
        folder: Its working directory; by default this process's.
        environment: Variables that it gets beside PATH and the like; by default those of this process that begin with
            ``TESTBED_`` or ``PYTEST_``.
        listener: Told of the machine.

    Returns:
        The command's exit code.

    Raises:
        MachineError: This machine lacks something; the hint is what mends it.
        VmError: The virtual machine died twice, or the command took too long.
    """
    import os

    from testbed.kernel.netlink import require_root
    from testbed.vm import DEFAULT_KERNEL, VmJob, find_kernel
    from testbed.vm import run_in_vm as boot_and_run

    if not command:
        raise TestbedError("there is no command to run", hint="testbed vm run -- COMMAND")
    require_root()
    heard = listener or SilentListener()
    for path in outputs:
        try:
            path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise TestbedError(f"{path} cannot be made: {error.strerror}", hint="use --output") from None
    found = find_kernel(kernel or DEFAULT_KERNEL, report=heard.note)
    if environment is None:
        environment = {name: os.environ[name] for name in os.environ if name.startswith(("TESTBED_", "PYTEST_"))}
    job = VmJob(
        tuple(command),
        (folder or Path.cwd()).resolve(),
        tuple(path.resolve() for path in outputs),
        environment,
        virtual_time=virtual_time,
        skip_idle=skip_idle,
        memory_bytes=memory_bytes,
        timeout_s=timeout_s,
    )
    return boot_and_run(job, found, heard)
