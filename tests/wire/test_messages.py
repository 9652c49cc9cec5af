import pytest

from nnsight_hpc.wire.errors import InvalidInput
from nnsight_hpc.wire.messages import RequestStatus, decode
from nnsight_hpc.wire.names import check_name, check_request_id, new_request_id
from nnsight_hpc.wire.states import RequestState


def test_newer_side_may_add_fields():
    """A field that this version does not know is ignored in what programs exchange."""
    status = decode(b'{"id":"r","kind":"run","pool":"p","state":"QUEUED","user":"u","new":1}', RequestStatus)
    assert status.state is RequestState.QUEUED


@pytest.mark.parametrize("name", ["", ".", "..", "a/b", "../a", "a b", "-a", "a\n", "ä", "a" * 65, "$(x)"])
def test_names_that_are_no_file_names_are_refused(name):
    """What could leave a folder, end an option or start a command is no name."""
    with pytest.raises(InvalidInput):
        check_name(name, of="pool")


@pytest.mark.parametrize("name", ["a", "smol", "run-1.v2_b", "9"])
def test_plain_names_are_taken(name):
    """Letters, digits, dot, underscore and hyphen make a name."""
    assert check_name(name, of="pool") == name


def test_request_ids_are_fresh_and_valid():
    """A thousand ids are distinct, and each is taken as an id."""
    ids = {new_request_id() for _ in range(1000)}
    assert len(ids) == 1000
    assert all(check_request_id(one) == one for one in ids)
