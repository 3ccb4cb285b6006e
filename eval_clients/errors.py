"""What can go wrong, one class per cause. Command lines print the message and exit with status 2."""


class EvaluationError(Exception):
    """Base of all errors here; the message names the value, what was expected, and the next step."""


class UsageError(EvaluationError):
    """Command-line arguments that contradict each other."""


class DataError(EvaluationError):
    """An evaluation set that cannot be used: which file, what is wrong with it, what is expected."""


class EndpointError(EvaluationError):
    """An endpoint that cannot be used: what was asked, what came back, what to do."""


class FolderError(EvaluationError):
    """The results folder holds another run."""


class RunError(EvaluationError):
    """Inspect cannot start the run."""


class TemplateError(EvaluationError):
    """A recipe template or grid that cannot be read."""


class LimitError(EvaluationError):
    """A limit that cannot be read, that no task measures, or that compares with no measured model."""
