"""The one exception type that means "the input is not usable", level 0 of the ladder."""


class MLAError(ValueError):
    """A user's mistake, told in one line: what was expected, what came, and what to do.

    The command line prints the message and ends with exit status 2; a library caller can catch it as a
    ``ValueError``. Anything else that escapes is a defect of this package and keeps its traceback.
    """
