"""The ``testbed`` command.

Exit codes: 0 ok; 1 an error we name; 2 usage; 3 the run finished and a check failed; 4 the figure cannot be trusted; 128 + N
ended by signal N; of `vm run` the command's own, or 125 where the virtual machine failed.
"""

from __future__ import annotations

import sys

import typer

from testbed.cli import doctor, frames, graph, interop, lab, plot, run, scenario, vm
from testbed.cli.signals import end_on_signals
from testbed.cli.text import print_error
from testbed.errors import TestbedError

app = typer.Typer(
    help="What does this fabric do to my all-reduce? RoCE CLOS fabrics, packet by packet, on Linux network namespaces.",
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.command("doctor")(doctor.doctor)
app.command("validate")(scenario.validate)
app.command("plan")(scenario.plan)
app.command("paths")(scenario.paths)
app.command("predict")(scenario.predict)
app.command("graph")(graph.graph)
app.command("schema")(scenario.schema)
app.command("run")(run.run)
app.command("plot")(plot.plot)
app.command("deploy")(lab.deploy)
app.command("inspect")(lab.inspect)
app.command("break")(lab.break_)
app.command("heal")(lab.heal)
app.command("exec")(lab.execute)
app.command("inject")(frames.inject)
app.command("capture")(frames.capture)
app.command("interop")(interop.interop)
app.command("destroy")(lab.destroy)
app.command("gc")(lab.collect_garbage)
app.add_typer(vm.app, name="vm")


def main() -> None:
    """Run the command line and exit."""
    end_on_signals()
    try:
        app()
    except TestbedError as error:
        print_error(error)
        sys.exit(error.exit_code)


if __name__ == "__main__":
    main()
