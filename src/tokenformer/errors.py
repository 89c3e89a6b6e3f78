"""The one error type that the command line turns into a message."""


class TokenFormerError(Exception):
    """Something the user can put right: a wrong field, a missing file, a size that cannot be.

    The message names the field or file, what was found and what was expected. The command line prints it
    and exits with code 2; a traceback is shown only with ``--debug``.
    """
