"""The one exception a person is meant to read."""


class FFNError(Exception):
    """A mistake a person can make and mend: bad input, a missing file, an unknown name.

    The message is one line that names the file, the position, what was expected and what to do.
    The command line prints it without a traceback and exits with status 2.
    """
