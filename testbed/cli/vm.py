"""``testbed vm``: run something under a full kernel, in a virtual machine around this machine's files."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from testbed.vm.kernels import DEFAULT_KERNEL, KernelName

app = typer.Typer(
    help="Run something under a full Debian kernel, in a virtual machine around this machine's files.",
    no_args_is_help=True,
    rich_markup_mode=None,
)
Kernel = Annotated[
    KernelName,
    typer.Option("--kernel", envvar="TESTBED_KERNEL", help="The guest's kernel, by the Debian suite that has it."),
]


class StderrListener:
    """What happens to the machine, a line each."""

    def note(self, text: str) -> None:
        """Write a line."""
        print(f"vm: {text}", file=sys.stderr, flush=True)


@app.command("run", context_settings={"allow_interspersed_args": False})
def run(
    command: Annotated[list[str], typer.Argument(metavar="-- COMMAND...", help="Program and arguments.")],
    kernel: Kernel = DEFAULT_KERNEL,
    virtual_time: Annotated[
        bool,
        typer.Option(
            "--virtual-time",
            envvar="TESTBED_VM_VIRTUAL_TIME",
            help="A nanosecond passes with each instruction of the guest, whatever this machine does meanwhile.",
        ),
    ] = False,
    skip_idle: Annotated[
        bool,
        typer.Option(
            "--skip-idle",
            help="In virtual time, skip what the guest waits for: fully repeatable, but deadlines pass while a file is read.",
        ),
    ] = False,
    output: Annotated[
        list[Path] | None,
        typer.Option(
            "--output",
            metavar="DIR",
            help="Folder that the command may write to, at the same path; may be repeated. All else it writes is lost.",
            show_default=False,
        ),
    ] = None,
    memory: Annotated[
        str, typer.Option("--memory", metavar="SIZE", envvar="TESTBED_VM_MEMORY", help="Of the guest.")
    ] = "2 GiB",
    timeout: Annotated[
        float | None,
        typer.Option(
            "--timeout",
            metavar="SECONDS",
            min=0,
            envvar="TESTBED_VM_TIMEOUT",
            help="How long the command may take on this machine's clock. [default: no limit]",
            show_default=False,
        ),
    ] = None,
) -> None:
    """Boot a guest, run a command in it as root, in this directory, and exit with its code.

    The guest sees this machine's files, read-only under a writable layer in its memory. Exit code 125: the virtual machine
    failed, which says nothing of the command.
    """
    from testbed import api
    from testbed.units import UnitError, parse_size

    try:
        memory_bytes = parse_size(memory)
    except UnitError as error:
        raise typer.BadParameter(str(error), param_hint="--memory") from None
    code = api.run_in_vm(
        command,
        kernel=kernel,
        virtual_time=virtual_time,
        skip_idle=skip_idle,
        outputs=output or (),
        memory_bytes=memory_bytes,
        timeout_s=timeout,
        listener=StderrListener(),
    )
    raise typer.Exit(code)


@app.command("fetch")
def fetch(
    kernel: Kernel = DEFAULT_KERNEL,
    cached: Annotated[bool, typer.Option("--cached", help="Be content with the one that is in the cache.")] = False,
) -> None:
    """Download the newest kernel of a suite into the cache; `run` does so by itself where there is none."""
    from testbed.vm import find_kernel

    found = find_kernel(kernel, refresh=not cached, report=StderrListener().note)
    print(f"Linux {found.release} ({found.package_version}) in {found.folder}")
