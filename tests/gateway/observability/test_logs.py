"""Format of the log lines on stderr, including those of Python warnings."""

from __future__ import annotations

import json
import logging
import warnings
from collections.abc import Iterator

import pytest

from gateway.observability import logs


@pytest.fixture(autouse=True)
def restored_logging() -> Iterator[None]:
    loggers = [logging.getLogger(name) for name in ("antares", "py.warnings")]
    before = [(logger.handlers, logger.level, logger.propagate) for logger in loggers]
    format_warning = warnings.formatwarning
    yield
    logging.captureWarnings(False)
    warnings.formatwarning = format_warning
    for logger, state in zip(loggers, before, strict=True):
        logger.handlers, logger.level, logger.propagate = state


def test_json_log_is_one_object_per_line(capsys: pytest.CaptureFixture[str]) -> None:
    logs.configure("info", "json")
    logging.getLogger("antares.proxy").warning("two\nlines, %s", "a value")
    logging.getLogger("antares.proxy").debug("not shown")
    (line,) = capsys.readouterr().err.splitlines()
    entry = json.loads(line)
    assert (entry["level"], entry["logger"], entry["message"]) == ("warning", "antares.proxy", "two\nlines, a value")


def test_text_log_shows_a_warning_on_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    logs.configure("info", "text")
    warnings.warn("option 'thrift' is now 'cost_weight'", FutureWarning, stacklevel=1)
    (line,) = capsys.readouterr().err.splitlines()
    assert " W py.warnings: " in line
    assert line.endswith("FutureWarning: option 'thrift' is now 'cost_weight'")


def test_json_log_shows_a_warning_as_one_object(capsys: pytest.CaptureFixture[str]) -> None:
    logs.configure("info", "json")
    warnings.warn("option 'thrift' is now 'cost_weight'", FutureWarning, stacklevel=1)
    (line,) = capsys.readouterr().err.splitlines()
    entry = json.loads(line)
    assert (entry["level"], entry["logger"]) == ("warning", "py.warnings")
    assert entry["message"].endswith("FutureWarning: option 'thrift' is now 'cost_weight'")


def test_log_level_error_hides_warnings(capsys: pytest.CaptureFixture[str]) -> None:
    logs.configure("error", "text")
    warnings.warn("not shown", FutureWarning, stacklevel=1)
    assert capsys.readouterr().err == ""
