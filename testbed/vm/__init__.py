"""A full Debian kernel in a virtual machine around this machine's own files: what this machine's kernel lacks, and virtual time.

``kernels`` finds and caches the kernel, ``guest`` writes the script that is the guest's first process, ``qemu`` the command
line of the machine, and ``boot`` runs a command in it. The guest sees the host's root read-only, under an overlay in its own
memory, so that a command finds the same programs, packages and checkout; only the folders named as outputs are shared.
"""

from testbed.vm.boot import run_in_vm
from testbed.vm.kernels import DEFAULT_KERNEL, GuestKernel, KernelName, find_kernel
from testbed.vm.model import VmJob, VmListener

__all__ = [
    "DEFAULT_KERNEL",
    "GuestKernel",
    "KernelName",
    "VmJob",
    "VmListener",
    "find_kernel",
    "run_in_vm",
]
