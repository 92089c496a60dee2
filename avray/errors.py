"""The errors a person can cure, each with the exit code its command ends with.

A wrong setting is a plain ``ValueError`` (exit 2). Every message is one sentence that names the thing and the cure.
"""


class DataError(Exception):
    """The data cannot be used as it is: a missing file, too many rejected rows, a damaged cache (exit 3)."""


class MissingDependency(Exception):
    """Weights, a tool or an optional package is absent; the message says how to get it (exit 4)."""


class TrainingFailed(Exception):
    """Training stopped by policy or by a worker's error; the last good checkpoint is kept (exit 5)."""


class WorkerFailed(TrainingFailed):
    """A worker died or raised what nobody foresaw: trying again may help (exit 5)."""


class OutOfMemory(WorkerFailed):
    """A worker ran out of memory: the same settings will again (exit 5)."""


class SetupFailed(Exception):
    """Something that a run needs does not work here (exit 6)."""


class CheckpointError(Exception):
    """A checkpoint is missing, incomplete or damaged; the message names the file (exit 3)."""
