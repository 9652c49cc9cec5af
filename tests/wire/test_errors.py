import pytest

from nnsight_hpc.wire import errors
from nnsight_hpc.wire.errors import ErrorReport, ExecutionFailed, HpcError, execution_error, from_report


@pytest.mark.parametrize("name", errors.__all__)
def test_every_error_survives_the_wire(name):
    """An error that is sent as a report comes back as the same class with the same words."""
    cls = getattr(errors, name)
    before = cls("it broke", where="a.py:3", why="because", next="mend it")
    after = from_report(before.report())
    assert str(after) == str(before)
    assert isinstance(after, cls)


def test_failed_operation_is_caught_as_its_own_type():
    """An operation that raised IndexError on the worker is caught by `except IndexError` on the laptop."""
    error = from_report(ExecutionFailed("IndexError: 9", where="a.py:3: x[9]", exception="IndexError").report())
    assert isinstance(error, IndexError)
    assert isinstance(error, ExecutionFailed)
    assert str(error).startswith("a.py:3: x[9]")


def test_exception_types_are_not_looked_up_by_name():
    """A report cannot name an arbitrary class: what is not a plain exception stays an ExecutionFailed."""
    assert execution_error("SystemExit") is ExecutionFailed
    assert execution_error("os.system") is ExecutionFailed


def test_unknown_kind_is_still_an_error():
    """A report of a newer version with a kind that this one does not know can be read."""
    error = from_report(ErrorReport("FromTheFuture", "what"))
    assert type(error) is HpcError


def test_message_shows_all_parts_with_their_lines_indented():
    """The text of an error has one line for each part, and the lines of a log stay together."""
    error = HpcError("the job ended", where="job 7", why="line one\nline two", next="look")
    assert str(error) == "the job ended\n  where: job 7\n  why: line one\n    line two\n  next: look"
