"""Time series as files: Apache Arrow IPC streams, with a unit for every column in the header.

A stream is written block by block and is readable up to its last whole block, however the writer ended. Two files make up the
series of a run: `QUEUES_FILE`, what every port held, sent and marked, and `QPS_FILE`, what every sender did.

Source:
    Apache Arrow columnar format, "IPC Streaming Format".
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy.typing as npt

from testbed.errors import TestbedError

if TYPE_CHECKING:
    import pyarrow as pa

QUEUES_FILE = "queues.arrow"
QPS_FILE = "qps.arrow"
SERIES_VERSION = 1
# Larger than any block: a block is one write, whole in the file or not begun.
_BUFFER_BYTES = 4 << 20
_COMPRESSION = "zstd"


@dataclass(frozen=True, slots=True)
class Column:
    """One column of a series.

    Attributes:
        name: Its name, which ends in its unit where it has one.
        kind: Arrow's name of its type, or ``name`` for a text out of a list given by index.
        unit: Such as ``bytes`` or ``ns``; ``1`` for a plain number, a name or a truth value.
        meaning: One sentence.
    """

    name: str
    kind: str
    unit: str
    meaning: str


_WHEN = (
    Column("time_ns", "int64", "ns", "emulated time since the first iteration of the run began"),
    Column("interval_ns", "int64", "ns", "emulated time since the sample before, to which increments refer"),
    Column("row", "int16", "1", "index of the row of the results table, from 0"),
    Column("iteration", "int16", "1", "number of the iteration, from 0; warm-ups are counted for themselves"),
    Column("warmup", "bool", "1", "whether it is a warm-up"),
)
QUEUE_COLUMNS = (
    *_WHEN,
    Column("port", "name", "1", "the port, such as leaf0/up1"),
    Column("priority", "int8", "1", "the priority of its queue"),
    Column("depth_bytes", "int64", "bytes", "frame bytes in its egress queue at that time"),
    Column("enq_bytes", "int64", "bytes", "frame bytes that entered its egress queue in the interval"),
    Column("deq_bytes", "int64", "bytes", "frame bytes that left it in the interval"),
    Column("deq_packets", "int32", "packets", "frames that left it in the interval"),
    Column("marked_packets", "int32", "packets", "frames on which it set CE in the interval"),
    Column("drop_packets", "int32", "packets", "frames dropped before its egress queue in the interval"),
    Column("lost_packets", "int32", "packets", "frames lost on the link behind it in the interval"),
    Column("pause_frames", "int32", "packets", "PFC frames, XOFF and XON, that it received in the interval"),
    Column("paused", "bool", "1", "whether PFC held its egress queue back during the interval"),
    Column(
        "ingress_used_bytes", "int64", "bytes", "what it received and its switch holds at that time, lossless alone"
    ),
    Column("ingress_xoff", "bool", "1", "whether it asks the other end of its link to pause at that time"),
)
QP_COLUMNS = (
    *_WHEN,
    Column("qpn", "int32", "1", "queue pair number of the sender (requester)"),
    Column("src_rank", "int16", "1", "rank that sends"),
    Column("dst_rank", "int16", "1", "rank that receives"),
    Column("sent_packets", "int32", "packets", "data packets sent in the interval, repeated ones included"),
    Column("acked_packets", "int32", "packets", "data packets acknowledged in the interval"),
    Column("naks_packets", "int32", "packets", "NAKs received in the interval"),
    Column("cnps_packets", "int32", "packets", "CNPs received in the interval"),
    Column("cts_packets", "int32", "packets", "CTS frames received in the interval: grants of its receiver"),
)
RATE_COLUMN = Column(
    "rate_limit_bytes_per_s", "float64", "bytes/s", "what congestion control lets it send at that time"
)


def state_column(name: str) -> Column:
    """Return the column of a state of a congestion control, by its name."""
    unit = "bytes/s" if name.endswith("_bytes_per_s") else "ns" if name.endswith("_ns") else "1"
    return Column(name, "float64", unit, f"{name.replace('_', ' ')} of its congestion control at that time")


class SeriesWriter:
    """An open series; see `opened_series`.

    Attributes:
        written_bytes: Size of the file so far.
        rows: Rows of all blocks so far.
    """

    def __init__(self, writer: Any, file: Any, schema: pa.Schema, names: Mapping[str, pa.Array]) -> None:
        self._writer, self._file, self._schema, self._names = writer, file, schema, names
        self.written_bytes = 0
        self.rows = 0

    def write(self, values: Mapping[str, npt.NDArray[Any]]) -> None:
        """Append a block.

        Args:
            values: By name of column, all of one length; of a column of names, the indexes into its list.

        Raises:
            TestbedError: The disk is full, or something like that.
        """
        import pyarrow as pa

        arrays = []
        for field in self._schema:
            column = values[field.name]
            if field.name in self._names:
                arrays.append(pa.DictionaryArray.from_arrays(pa.array(column, pa.int16()), self._names[field.name]))
            else:
                arrays.append(pa.array(column, field.type))
        batch = pa.record_batch(arrays, schema=self._schema)
        try:
            self._writer.write_batch(batch)
            self._file.flush()
        except OSError as error:
            raise TestbedError(
                f"the time series cannot be written: {error}", hint="make room, or use --no-series"
            ) from None
        self.written_bytes = int(self._file.tell())
        self.rows += batch.num_rows


@contextlib.contextmanager
def opened_series(
    path: Path, columns: Sequence[Column], header: Mapping[str, Any], names: Mapping[str, Sequence[str]]
) -> Iterator[SeriesWriter]:
    """Create a series for the block; the file is removed again if nothing was written.

    Args:
        path: The file.
        columns: Its columns.
        header: Of the file, values as in JSON: each becomes an item of the schema's metadata, text as it is.
        names: The list of each column of names.

    Raises:
        TestbedError: The file cannot be written.
    """
    import pyarrow as pa

    schema = pa.schema([_field(column) for column in columns], metadata=_pack_header(header))
    lists = {name: pa.array(list(values), pa.string()) for name, values in names.items()}
    try:
        file = pa.output_stream(str(path), buffer_size=_BUFFER_BYTES)
    except OSError as error:
        raise TestbedError(f"{path} cannot be written: {error.strerror}", hint="use --output, or --no-series") from None
    series = None
    try:
        options = pa.ipc.IpcWriteOptions(compression=_COMPRESSION, use_threads=False)
        with file, pa.ipc.new_stream(file, schema, options=options) as writer:
            series = SeriesWriter(writer, file, schema, lists)
            yield series
    finally:
        if series is None or not series.rows:
            path.unlink(missing_ok=True)


def read_series(path: Path) -> pa.Table:
    """Return a series; of one whose writer was killed, all whole blocks.

    Raises:
        TestbedError: There is no such file, or it is no series.
    """
    import pyarrow as pa

    hint = f"name the folder of a run; `--no-series` leaves {QUEUES_FILE} and {QPS_FILE} out"
    try:
        with pa.OSFile(str(path)) as file, pa.ipc.open_stream(file) as reader:
            return pa.Table.from_batches(_whole_batches(reader), reader.schema)
    except OSError as error:
        reason = error.strerror or "it is no Arrow stream"
        raise TestbedError(f"{path} cannot be read: {reason}", hint=hint) from None
    except pa.ArrowInvalid:
        raise TestbedError(f"{path} is no Arrow stream", hint=hint) from None


def read_header(schema: pa.Schema) -> dict[str, Any]:
    """Return the header that `opened_series` was given."""
    return {key.decode(): json.loads(value) for key, value in (schema.metadata or {}).items()}


def _whole_batches(reader: Any) -> Iterator[Any]:
    import pyarrow as pa

    # ArrowInvalid and OSError: the file ends within a block.
    with contextlib.suppress(StopIteration, pa.ArrowInvalid, OSError):
        while True:
            yield reader.read_next_batch()


def _pack_header(header: Mapping[str, Any]) -> dict[str, str]:
    return {key: json.dumps(value) for key, value in {"series_version": SERIES_VERSION, **header}.items()}


def _field(column: Column) -> pa.Field:
    import pyarrow as pa

    kind = pa.dictionary(pa.int16(), pa.string()) if column.kind == "name" else getattr(pa, _FACTORIES[column.kind])()
    return pa.field(column.name, kind, False, {"unit": column.unit, "meaning": column.meaning})


_FACTORIES = {"bool": "bool_", **{kind: kind for kind in ("int8", "int16", "int32", "int64", "float64")}}
