"""The one exception a user is meant to read."""


class UsageError(ValueError):
    """Something the user can put right: one line that names the file or option and the way out.

    Scripts print it without a traceback and exit with code 2.
    """


def system_reason(error: OSError) -> str:
    """Return what the system says, and of which path: `/runs/first: Permission denied`."""
    reason = error.strerror or str(error)
    if error.filename is None:
        return reason
    path = error.filename.decode(errors="replace") if isinstance(error.filename, bytes) else error.filename
    return f"{path}: {reason}"
