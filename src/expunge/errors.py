"""The one exception that is meant for the user: a clear line that says what is wrong, where, and what to do."""


class ExpungeError(Exception):
    """Bad input. `str(error)` is one line; the command line prints it and exits with status 2, without a traceback."""


class Interrupted(ExpungeError):
    """Stopped by Ctrl-C after a checkpoint was saved; the same command goes on. Exit status 130."""
