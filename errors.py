"""The one exception a user is meant to see."""


class UserError(Exception):
    """A mistake the user can mend: one sentence saying what is wrong, what was got, what was expected and what to do.

    `main.py` prints the sentence without a traceback and exits with status 1; any other exception is a defect of ours.
    """
