"""What every compiler must be spared in the eBPF programs; that the kernel accepts them is tried where there is root."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

import testbed

SOURCES = sorted(Path(testbed.__file__).parent.glob("bpf/*.[ch]"))


@pytest.mark.parametrize("source", SOURCES, ids=lambda path: path.name)
def test_packet_pointers_are_read_only_where_their_width_is_hidden(source: Path) -> None:
    """Clang 17 and later may move ``skb->data``, an integer of 32 bits to it, so that the verifier rejects the program."""
    text = re.sub(r"/\*.*?\*/", "", source.read_text(), flags=re.DOTALL)
    assert not re.findall(r"\bskb->data(?:_end|_meta)?\b", text)


def test_the_programs_read_packet_pointers() -> None:
    text = "".join(path.read_text() for path in SOURCES)
    assert "packet_data(skb)" in text
    assert "packet_data_end(skb)" in text
