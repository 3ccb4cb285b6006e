"""Single values of rows: whether they are there, and how messages show them."""

import math


def shorten(value: object) -> str:
    """The value for a message, at most 60 characters of it."""
    return repr(str(value)[:60])


def is_missing(value: object) -> bool:
    """Whether a value is null or NaN."""
    return value is None or (isinstance(value, float) and math.isnan(value))


def has_value(value: object) -> bool:
    """Whether a value is neither missing nor empty."""
    return not is_missing(value) and value not in ("", [], {})


def is_void(value: object) -> bool:
    """Whether a part that a row need not have is missing, or says that it is."""
    return is_missing(value) or (isinstance(value, str) and value.strip().lower() in ("", "nan", "none", "null"))
