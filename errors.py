"""The one exception a user is meant to see."""


class UserError(Exception):
    """A mistake the user can correct: one sentence that says what is wrong, what the program got, what it expected, what to do.

    `main.py` prints the sentence without a traceback and exits with status 1; any other exception is a defect of ours.
    """
