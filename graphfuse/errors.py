"""What graphfuse raises. A site that cannot be rewritten is never an error: it is a line of the report."""

from __future__ import annotations


class GraphfuseError(Exception):
    """Base of everything graphfuse raises on its own account."""


class ConfigError(GraphfuseError, ValueError):
    """An option or pattern name that does not exist; the message lists the valid ones."""


class VerificationError(GraphfuseError):
    """The first batch came out of the compiled model with more error than eager's own."""


class GraphfuseWarning(UserWarning):
    """Something inside graphfuse went wrong, and the graph was compiled as it was."""
