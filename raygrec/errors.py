"""The exceptions a user sees as a single line."""


class InputError(Exception):
    """Wrong input: its message is one line that names the file, line, column or key and what would be right.

    The command line prints it and exits with code 2.
    """


class StorageError(RuntimeError):
    """Something cannot be written, and could not be after a restart either: one line that names the file and the room.

    The command line prints it and exits with code 1.
    """
