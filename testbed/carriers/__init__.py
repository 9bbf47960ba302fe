"""What carries bytes from rank to rank: the engine's own RoCEv2 here; the kernel's soft-RoCE and TCP are to come."""
