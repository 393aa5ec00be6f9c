"""Exceptions that end a run in one line, or a step without an effect."""


class UserError(Exception):
    """Shown to the user as one line. The message names the file or field, the value and the remedy."""

    def __str__(self) -> str:
        return " ".join(super().__str__().split("\n"))  # a name in a user's file may hold a line break


class RunStoppedError(UserError):
    """The run has ended itself, for good: going on from where it was would not help."""


class StepAbortedError(Exception):
    """A step was aborted because a signal left no time to finish it. The student has not changed."""
