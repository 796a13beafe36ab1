"""The one exception a user is meant to see, also from inside of another."""


class UserError(Exception):
    """A mistake the user can mend: one sentence saying what is wrong, what was got, what was expected and what to do.

    `main.py` prints the sentence without a traceback and exits with status 1; any other exception is a defect of ours.
    """


def unwrap(error: BaseException) -> BaseException:
    """What Hydra wraps when a data set cannot be made: the sentence inside, one on an option it does not take, or itself."""
    cause: BaseException | None = error
    while cause is not None and not isinstance(cause, UserError):
        cause = cause.__cause__
    if cause is None and isinstance(error.__cause__, TypeError) and "argument" in str(error.__cause__):
        return UserError(f"dataset: {error.__cause__}, see the files in cfgs/dataset for the options it takes")
    return error if cause is None else cause
