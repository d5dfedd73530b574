"""The one exception for what a user handed in and can mend."""


class BadInput(ValueError):
    """Bad input: one clear line that names the file or the configuration key.

    The command line prints the line and exits with 2. Everything else that fails is a
    failure of the run (exit 1) and keeps its traceback.
    """
