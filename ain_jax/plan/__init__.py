"""An experiment compiled for TPUs that are not here: what it would need, do and cost there."""

from ain_jax.plan.command import main

__all__ = ["main"]
