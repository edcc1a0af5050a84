"""The one exception for bad input, shared by the Python interface and the command line."""


class InputError(ValueError):
    """Something the user gave cannot be used: the text says what was got, what is wanted and how to mend it.

    The commands print the text as one line and exit with status 2; from Python it is an ordinary ``ValueError``.
    """
