"""RoCEv2: frames, the invariant CRC, and tables of queue pairs as values.

`wire` and `icrc` need numpy alone. `bth` builds frames with scapy, whose import takes a second: import it where
templates are made.
"""
