"""Where a picture can go, and that it is whole or not there."""

from __future__ import annotations

import pytest

from hf_sparsity.files import write_whole
from hf_sparsity.pictures.files import check_picture


def test_where_a_picture_can_go(tmp_path):
    with pytest.raises(ValueError, match=r"must end in \.png or \.html"):
        check_picture(tmp_path / "x.svg")
    with pytest.raises(FileNotFoundError, match="does not exist"):
        check_picture(tmp_path / "nowhere" / "x.png")
    (tmp_path / "folder.png").mkdir()
    with pytest.raises(ValueError, match="is a folder"):
        check_picture(tmp_path / "folder.png")
    assert check_picture(tmp_path / "X.PNG").name == "X.PNG"


def test_whole_or_not_at_all(tmp_path, monkeypatch):
    file = write_whole(tmp_path / "x.png", b"old")

    def full(*given):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.replace", full)
    with pytest.raises(OSError, match="No space"):
        write_whole(file, b"new")
    assert file.read_bytes() == b"old" and list(tmp_path.iterdir()) == [file]
