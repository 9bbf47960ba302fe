"""The tick loop: every QP of every host at once, about a thousand times a second.

The kernel does what is per packet; the engine does what is per tick, on numpy arrays that are the eBPF maps.
"""
