"""Log records: one line a message, nothing that a terminal obeys, bounded."""

import io
import logging
from collections.abc import Iterator

import pytest

from service.logs import CONTINUED, MAX_MESSAGE, MAX_TRACEBACK, escape_record, escape_records

FORGED = "x\r\n2026-01-01 [INFO] forged\x1b[31m\x9b\x7f\u2028\u202e\ud800"


@pytest.fixture
def written() -> Iterator[io.StringIO]:
    """What a logger writes while records are escaped."""
    before = logging.getLogRecordFactory()
    stream = io.StringIO()
    handler = logging.StreamHandler(stream)
    handler.setFormatter(logging.Formatter("TIME %(message)s"))
    logging.getLogger("escaped").addHandler(handler)
    escape_records()
    yield stream
    logging.setLogRecordFactory(before)
    logging.getLogger("escaped").removeHandler(handler)


log = logging.getLogger("escaped")


def test_messages_are_one_printable_line(written: io.StringIO) -> None:
    log.error("no adapter %r at %s", "ok", FORGED)
    log.error(FORGED)
    lines = written.getvalue().split("\n")
    assert len(lines) == 3
    assert all(line.isprintable() for line in lines)
    assert "no adapter 'ok' at x\\r\\n2026" in lines[0]


def test_plain_messages_are_as_they_were(written: io.StringIO) -> None:
    log.error("10 %% of %s, ä … 🎈", "a\\n")
    assert written.getvalue() == "TIME 10 % of a\\n, ä … 🎈\n"


def test_no_line_has_the_secret_of_a_key(written: io.StringIO) -> None:
    secret = "Abc_" * 10 + "-xy"
    key = f"lf-0f3a5c7e9b1d-{secret}"
    log.error("GET /v1/models/%s", key)
    try:
        raise ValueError(f"no model {key!r}")
    except ValueError:
        log.exception("%s", {"model": key})
    assert secret not in written.getvalue()
    assert written.getvalue().count("lf-0f3a5c7e9b1d-...") >= 3


def test_lines_of_tracebacks_cannot_pass_for_log_lines(written: io.StringIO) -> None:
    try:
        raise ValueError(FORGED)
    except ValueError:
        log.exception("failed")
    first, second, *others = written.getvalue().splitlines()
    assert (first, second) == ("TIME failed", "Traceback (most recent call last):")
    assert all(line.startswith(CONTINUED) and line.isprintable() for line in others)
    assert any("[INFO] forged" in line for line in others)


def test_lines_are_bounded(written: io.StringIO) -> None:
    log.error("%s", "x" * 10**6)
    assert len(written.getvalue()) < MAX_MESSAGE + 100
    try:
        raise ValueError("y\n" * 10**6)
    except ValueError:
        log.exception("failed")
    assert len(written.getvalue()) < MAX_MESSAGE + 5 * MAX_TRACEBACK


def test_escaping_twice_is_escaping_once(written: io.StringIO) -> None:
    escape_records()
    log.error("a\nb\\n")
    assert written.getvalue() == "TIME a\\nb\\n\n"


def test_wrong_formats_are_the_handler_s_to_report() -> None:
    record = logging.LogRecord("escaped", logging.ERROR, "", 1, "%d", (FORGED,), None)
    assert escape_record(record).args == (FORGED,)
