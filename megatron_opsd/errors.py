"""The one exception whose message is written for the user: the CLI prints it as a single line and exits with 2."""


class UserError(Exception):
    """Bad input. The message names the file, the field, the value and the remedy."""
