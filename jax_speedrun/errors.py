"""The one exception a user is meant to read."""


class UsageError(ValueError):
    """Something the user can put right: one line that names the file or option and the way out.

    Scripts print it without a traceback and exit with code 2.
    """
