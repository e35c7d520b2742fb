"""The one exception that reaches a user as a single line."""


class UserError(Exception):
    """Something the user can put right: names the field or file, and what would be right.

    The command line prints the message alone and exits with code 2; `--debug` shows the traceback.
    """
