"""Loss recovery: what a NIC sends again, one file per scheme behind `testbed.engine.recovery.protocol.LossRecovery`."""

from testbed.engine.recovery.go_back_n import GoBackN
from testbed.engine.recovery.protocol import RETRY_LIMIT, LossRecovery, Resent
from testbed.engine.recovery.selective import Selective

__all__ = ["RETRY_LIMIT", "GoBackN", "LossRecovery", "Resent", "Selective"]
