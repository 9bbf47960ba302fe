"""The only package that touches the kernel: namespaces, netlink, tc, eBPF, scheduling, ownership.

Its functions take names and integers, never a Topology or a Scenario.
"""
