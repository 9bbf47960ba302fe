"""``testbed doctor``: what this machine can do."""

from __future__ import annotations

import typer

from testbed.cli.options import Format, OutputFormat


def doctor(output_format: Format = OutputFormat.TABLE) -> None:
    """Try everything that runs need here; say what it means and what command mends it."""
    from testbed import api
    from testbed.cli.text import render_columns, render_json
    from testbed.kernel.probe import Status

    findings = api.probe_machine()
    missing = [finding.name for finding in findings if finding.status is Status.MISSING]
    if output_format is OutputFormat.JSON:
        import dataclasses

        print(render_json({"ok": not missing, "findings": [dataclasses.asdict(finding) for finding in findings]}))
    else:
        print(
            render_columns(
                ("thing", "status", "meaning"),
                [(finding.name, str(finding.status), finding.meaning) for finding in findings],
            ),
            end="",
        )
        mends = [(finding.name, finding.mend) for finding in findings if finding.mend]
        if mends:
            print("\nTo mend:")
            print(render_columns(("thing", "command"), mends), end="")
        print(f"\nmissing: {', '.join(missing)}" if missing else "\nThis machine can run fabrics.")
    if missing:
        raise typer.Exit(1)
