"""``testbed interop``: our RoCEv2 judged by the kernel's."""

from __future__ import annotations

from typing import Annotated

import typer

from testbed.cli.options import Format, OutputFormat, Set, read_overrides
from testbed.cli.run import EXIT_CHECK_FAILED, StderrListener

MAX_INTEROP_BYTES = 1 << 30
"""Each direction has all of its bytes twice in memory."""


def interop(
    size: Annotated[str, typer.Option("--size", envvar="TESTBED_SIZE", help="Written in each direction.")] = "10 MiB",
    loss: Annotated[
        str, typer.Option("--loss", envvar="TESTBED_LOSS", help="Share of the frames that each uplink loses.")
    ] = "0",
    changes: Set = None,
    output_format: Format = OutputFormat.TABLE,
) -> None:
    """Write random bytes to this kernel's soft-RoCE and back across a small fabric; say whether all arrived. Needs root.

    It takes a kernel with rdma_rxe, and pyverbs: `testbed vm run` boots one. Exit code 3: bytes are missing.
    """
    from dataclasses import asdict

    from testbed import api
    from testbed.cli.text import render_columns, render_json
    from testbed.units import parse_size

    try:
        size_bytes = parse_size(size)
    except ValueError as error:
        raise typer.BadParameter(str(error), param_hint="--size") from None
    if not 1 <= size_bytes <= MAX_INTEROP_BYTES:
        raise typer.BadParameter(f"must be from 1 B to {MAX_INTEROP_BYTES >> 30} GiB, got {size}", param_hint="--size")
    overrides = [f"fabric.uplink.loss={loss}", *read_overrides(changes)]
    rows = api.check_interop(size_bytes, overrides, listener=StderrListener())
    if output_format is OutputFormat.JSON:
        print(render_json([asdict(row) for row in rows]))
    else:
        print(
            render_columns(
                ("direction", "bytes", "frames lost", "NAKs", "sent again", "all bytes there"),
                [
                    (
                        row.direction,
                        *map(str, (row.size_bytes, row.lost_packets, row.nak_packets, row.retransmitted_packets)),
                        row.error or ("yes" if row.is_whole else "NO"),
                    )
                    for row in rows
                ],
                right=("bytes", "frames lost", "NAKs", "sent again"),
            ),
            end="",
        )
    if not all(row.is_whole for row in rows):
        raise typer.Exit(EXIT_CHECK_FAILED)
