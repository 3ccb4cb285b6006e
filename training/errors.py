"""What stops a run: `ConfigError` before it starts (exit code 2), `NonFiniteLossError` while it runs (exit code 1)."""


class ConfigError(ValueError):
    """Bad input; the message names the setting, its value, what was expected, and the next step."""


class NonFiniteLossError(ArithmeticError):
    """A loss or gradient became NaN or infinite; the message names the rows or the step."""
