"""Where ranks live: which host, which GPU, which NIC."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class RankMap:
    """One rank per GPU, numbered host by host.

    The GPUs of a host share its NICs evenly and in order: with as many NICs as GPUs each GPU has its own, with half as many,
    GPUs 0 and 1 use NIC 0.

    Attributes:
        nhosts: Number of hosts; at least 1.
        gpus_per_host: GPUs of each; a multiple of ``nics_per_host``.
        nics_per_host: NICs of each; at least 1.

    Raises:
        ValueError: If a number breaks its rule.
    """

    nhosts: int
    gpus_per_host: int = 1
    nics_per_host: int = 1

    def __post_init__(self) -> None:
        if self.nhosts < 1 or self.nics_per_host < 1:
            raise ValueError(f"at least 1 host of at least 1 NIC, got {self.nhosts} of {self.nics_per_host}")
        if self.gpus_per_host < 1 or self.gpus_per_host % self.nics_per_host:
            raise ValueError(f"{self.gpus_per_host} GPUs cannot share {self.nics_per_host} NICs evenly")

    @property
    def nranks(self) -> int:
        """Return the number of ranks."""
        return self.nhosts * self.gpus_per_host

    def host(self, rank: int) -> int:
        """Return the host of a rank."""
        return rank // self.gpus_per_host

    def gpu(self, rank: int) -> int:
        """Return the number of a rank's GPU within its host."""
        return rank % self.gpus_per_host

    def nic(self, rank: int) -> int:
        """Return the NIC of a rank, counted over the fabric, as in ``Topology.nics``."""
        nic = self.gpu(rank) * self.nics_per_host // self.gpus_per_host
        return self.host(rank) * self.nics_per_host + nic
