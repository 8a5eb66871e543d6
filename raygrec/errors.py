"""The one exception a user sees as a single line."""


class InputError(Exception):
    """Wrong input: its message is one line that names the file, line, column or key and what would be right.

    The command line prints it and exits with code 2.
    """
