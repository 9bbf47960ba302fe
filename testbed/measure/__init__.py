"""What was measured about the machine, and whether the figures of a run can be trusted."""
