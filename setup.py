"""Builds the eBPF object before setuptools collects the package's files; all else is in pyproject.toml."""

from __future__ import annotations

import subprocess
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py


class BuildWithBpf(build_py):
    """Runs scripts/build-bpf first; a wheel without the object would install and then fail at its first run."""

    def run(self) -> None:
        """Build the object, then the package."""
        done = subprocess.run([Path(__file__).parent / "scripts" / "build-bpf"])
        if done.returncode:
            raise SystemExit("error: testbed/bpf/fabric.bpf.o could not be built; the lines above say why")
        self.__dict__.pop("data_files", None)  # collected before the object existed
        super().run()


setup(cmdclass={"build_py": BuildWithBpf})
