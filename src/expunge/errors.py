"""The one exception that is meant for the user: a clear line that says what is wrong, where, and what to do.

Errors of others pass, but for those of memory that ran out, which `is_out_of_memory` tells.
"""

import re


class ExpungeError(Exception):
    """Bad input. `str(error)` is one line; the command line prints it and exits with status 2, without a traceback."""


class Interrupted(ExpungeError):
    """Stopped by Ctrl-C after a checkpoint was saved; the same command goes on. Exit status 130."""


def is_out_of_memory(error: BaseException) -> bool:
    """Of an accelerator or of the host. torch has a class for the first alone, told by its name: torch may not be loaded."""
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return True
    said = re.search("out of memory|allocate memory|CUBLAS_STATUS_ALLOC_FAILED", str(error))
    return isinstance(error, RuntimeError) and said is not None
