"""Named errors: each says what is wrong, where, and how to mend it.

::

    StreamxError                 exit 1
    ├── UsageError               exit 2   an option or argument that can't be right
    │   └── UntrainedError                a model that was not trained yet (a RuntimeError too)
    ├── InputError               exit 3   data that can't be used as they are
    │   ├── BadValuesError                NaN, inf, negative, non-integer counts, log-normalised data
    │   ├── BadFileError                  a file that can't be read as what it claims to be
    │   ├── GeneError                     duplicate, absent or foreign genes
    │   ├── BatchError                    no batch, an unknown one, one that would alias another
    │   └── EmptyError                    nothing left to work on
    ├── PartialError             exit 4   some inputs were done, others were not
    ├── StorageError             exit 5   a disk or bucket that fails
    │   ├── IncompleteError               a store whose writing has not finished
    │   ├── LockedError                   another process is writing here
    │   └── SettingsChangedError          a partial run was started with other settings or inputs
    ├── IntegrityError           exit 6   bytes that are not those that were written
    └── ResourceError            exit 7   more memory or disk than was allowed
"""

from __future__ import annotations

import errno
import warnings


class StreamxError(Exception):
    """Base of every error that streamx raises on purpose.

    Parameters
    ----------
    what
        What is wrong: what was found, and the limit that it breaks.
    where
        File, cell, gene, batch or object that it concerns.
    fix
        What to do next, as a command or option where there is one.
    """

    exit_code = 1

    def __init__(self, what: str, *, where: str | None = None, fix: str | None = None) -> None:
        self.what, self.where, self.fix = what, where, fix
        super().__init__(what)

    def __str__(self) -> str:
        text = f"{self.where}: {self.what}" if self.where else self.what
        return f"{text}\n  fix: {self.fix}" if self.fix else text


class UsageError(StreamxError):
    exit_code = 2


class UntrainedError(UsageError, RuntimeError):
    pass


class InputError(StreamxError):
    exit_code = 3


class BadValuesError(InputError):
    pass


class BadFileError(InputError):
    pass


class GeneError(InputError):
    pass


class BatchError(InputError):
    pass


class EmptyError(InputError):
    pass


class PartialError(StreamxError):
    exit_code = 4


class StorageError(StreamxError):
    exit_code = 5


class IncompleteError(StorageError):
    pass


class LockedError(StorageError):
    pass


class SettingsChangedError(StorageError):
    pass


class IntegrityError(StreamxError):
    exit_code = 6


class ResourceError(StreamxError):
    exit_code = 7


class StreamxWarning(UserWarning):
    """Something that a user should know and that does not stop the work."""


def named(error: BaseException) -> StreamxError:
    """The error as one of ours: memory, disks and files keep their kind, anything else is internal."""
    if isinstance(error, StreamxError):
        return error
    if isinstance(error, MemoryError):
        return ResourceError("out of memory", fix="give a smaller --memory, or fewer --threads")
    if isinstance(error, OSError) and error.errno is not None:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        kind, fix = (ResourceError, "free some space") if full else (StorageError, "mend it")
        fix = f"{fix} and run the same command again"
        if error.errno in (errno.EEXIST, errno.ENOTDIR):  # a file where a folder is to be
            fix = "choose another place"
        return kind(str(error.strerror), where=error.filename, fix=fix)
    return StreamxError(
        f"internal error: {type(error).__name__}: {str(error).strip() or 'no message'}",
        fix="run again with --debug and report the traceback",
    )


def warn(what: str, *, where: str | None = None, fix: str | None = None) -> None:
    """Warn in the same words and shape as the errors."""
    warnings.warn(str(StreamxError(what, where=where, fix=fix)), StreamxWarning, stacklevel=3)
