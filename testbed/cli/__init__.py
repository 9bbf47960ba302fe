"""The command line: a thin layer over :mod:`testbed.api`. Everything heavy is imported inside the commands."""
