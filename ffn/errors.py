"""The one exception a person is meant to read."""


class FFNError(Exception):
    """A mistake a person can make and mend: bad input, a missing file, an unknown name.

    The message is one line that names the file, the position, what was expected and what to do.
    The command line prints it without a traceback and exits with status 2.
    """


class Fault(FFNError):
    """What no person did wrong and another attempt may mend: a store that is away, a process that was killed.

    Read like any other, but a step of the pipeline that it ends is begun again.
    """
