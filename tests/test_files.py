"""Files that survive a write that fails."""

import pytest

from files import read_json, replacing, write_json


def test_a_write_that_fails_leaves_the_old_file_and_nothing_beside_it(tmp_path):
    path = tmp_path / "values.json"
    write_json(path, [1])
    with pytest.raises(OSError, match="values.json"):  # the system's error does not name it
        with replacing(path) as part:
            part.write_text("[2")
            raise OSError(28, "No space left on device")
    assert read_json(path) == [1]
    assert list(tmp_path.iterdir()) == [path]
