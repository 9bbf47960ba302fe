"""The exceptions of testbed, named by whose fault it is.

::

    TestbedError                 base: message, optional hint, exit code
    ├── ScenarioError            the user's file is wrong: every mistake with file, key, rule and value
    ├── PlanError                the scenario is valid, but no fabric can be planned from it
    ├── MachineError             this machine lacks something; the hint is the command that mends it
    ├── KernelError              the kernel refused an operation
    ├── LabError                 a lab of that name exists, is missing, or is in use
    ├── RunError                 a run could not finish (a QP ran out of retries, a rank never completed)
    └── VmError                  a virtual machine could not be run to its end; says nothing of the command in it
"""

from __future__ import annotations

import errno
import os
from collections.abc import Sequence
from dataclasses import dataclass


class TestbedError(Exception):
    """Base of all errors that testbed reports without a traceback.

    Args:
        message: One sentence saying what is wrong, naming file and key, node or operation.
        hint: What to do about it, in the imperative.
    """

    exit_code = 1
    __test__ = False  # pytest: not a test class

    def __init__(self, message: str, *, hint: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint


@dataclass(frozen=True, slots=True, order=True)
class Mistake:
    """One mistake in a scenario.

    Attributes:
        line: Line in the file, 1-based; 0 when the value came from ``--set`` or a default.
        key: Dotted path of the key, such as ``fabric.host_link.rate``.
        rule: What must hold, such as ``must be a rate such as "400 Gbit/s"``.
        got: The offending value as the user wrote it, or ``""`` when there is none.
        hint: A suggestion in the imperative, or ``""``.
    """

    line: int
    key: str
    rule: str
    got: str = ""
    hint: str = ""

    def describe(self, file: str) -> str:
        """Return the mistake as one line, ``file:line: key: rule, got value``."""
        where = f"{file}:{self.line}" if self.line else file
        key = f"{self.key}: " if self.key else ""
        got = f", got {self.got}" if self.got else ""
        return f"{where}: {key}{self.rule}{got}"


class ScenarioError(TestbedError):
    """The user's scenario is wrong; carries every mistake found, in file order."""

    def __init__(self, file: str, mistakes: Sequence[Mistake]) -> None:
        self.file = file
        self.mistakes = tuple(mistakes)
        lines = []
        for mistake in self.mistakes:
            lines.append(mistake.describe(file))
            if mistake.hint:
                lines.append(f"  hint: {mistake.hint}")
        super().__init__("\n".join(lines))


class PlanError(TestbedError):
    """The scenario is valid, but no fabric can be planned from it."""


class MachineError(TestbedError):
    """This machine lacks something; the hint names the command that mends it."""


class KernelError(TestbedError):
    """The kernel refused an operation.

    Args:
        operation: What was tried, as its ``describe()`` says it.
        code: The errno.
        kernel_message: The kernel's own words (netlink extended ACK), or ``""``.
        hint: The likely cause and its cure.
    """

    def __init__(self, operation: str, code: int, kernel_message: str = "", *, hint: str | None = None) -> None:
        self.operation = operation
        self.code = code
        name = errno.errorcode.get(code, str(code))
        words = f": {kernel_message}" if kernel_message else ""
        super().__init__(f"{operation}: {name} ({os.strerror(code)}){words}", hint=hint or _LIKELY_CAUSE.get(code))


_LIKELY_CAUSE = {
    errno.EPERM: "run as root, or in a privileged container",
    errno.EACCES: "run as root, or in a privileged container",
    errno.EOPNOTSUPP: "run `testbed doctor` to see what this kernel lacks",
    errno.ENOENT: "run `testbed doctor` to see what this kernel lacks",
    errno.ENOMEM: "free memory, or use a smaller fabric",
}


class LabError(TestbedError):
    """A lab of that name exists already, is missing, or is in use."""


class RunError(TestbedError):
    """A run could not finish; the message names rank, QP and link where known."""


class VmError(TestbedError):
    """A virtual machine died, or what it ran took too long: the infrastructure failed, not the command's own check.

    The exit code is the one by which container engines tell their own failure from the command's.
    """

    exit_code = 125
