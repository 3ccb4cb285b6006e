"""The weights that an adapter's maker recommends, in its adapter_config.json."""

from adapters.errors import AdapterError, quote

WEIGHT_RANGE = "weight_range"
"""Our own key: [lowest, highest], such as the weights that it was trained at."""
MAX_RANGE = 1024
"""No weight of a range is farther from 0."""


def read_range(value: object) -> tuple[float, float] | None:
    """The range that `value` of the key states, None for null; AdapterError 'bad_config' for anything else."""
    if value is None:
        return None
    numbers = value if isinstance(value, list) else []
    if len(numbers) == 2 and all(isinstance(n, int | float) and not isinstance(n, bool) for n in numbers):
        low, high = numbers
        if -MAX_RANGE <= low <= high <= MAX_RANGE:  # neither NaN nor infinite, then
            return float(low), float(high)
    raise AdapterError(
        "bad_config",
        f"{WEIGHT_RANGE} is {quote(value)}: expected [lowest, highest], two numbers from -{MAX_RANGE} to {MAX_RANGE}",
    )
