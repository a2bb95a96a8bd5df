"""What the launchers share: how processes join, agree and stop, and the commands that start them elsewhere."""

TOLD = "every process of the run was told"  # a note on such a fault


class Interrupted(KeyboardInterrupt):
    """The run was asked to stop, all its processes know, and what was done is saved; the same command goes on."""


class OtherProcess(ValueError):
    """The first process stopped at a fault, which is the message."""
