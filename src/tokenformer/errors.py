"""The error types that the command line turns into a message."""


class TokenFormerError(Exception):
    """Something the user can put right: a wrong field, a missing file, a size that cannot be.

    The message names the field or file, what was found and what was expected. The command line prints it
    and exits with ``exit_code``; a traceback is shown only with ``--debug``.
    """

    exit_code = 2


class LostRankError(TokenFormerError):
    """Another process of the run hung or is gone. Nothing is wrong with this one: going on may succeed, which is what
    ``EX_TEMPFAIL`` of sysexits.h says."""

    exit_code = 75


class ToldElsewhere(TokenFormerError):
    """One of several processes has told the user what is wrong; this one ends as that one, without a word."""


class DataError(TokenFormerError):
    """Data that was there when the work began cannot be read any more: a file cut off or gone, a disk that fails.

    Nothing that was done so far is wrong: the work can be saved, and goes on once the data are back.
    """
