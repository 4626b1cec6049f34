"""What the tests of this folder share."""

import pytest
from PIL import Image
from planted_images import write_images

from asymflow.cli import main
from asymflow.cli import subspace as command


@pytest.fixture
def run(capsys):
    """Run a command in this process; returns (exit code, stdout, stderr without progress bars)."""

    def run(*argv):
        try:
            code = main([str(word) for word in argv])
        except SystemExit as end:
            code = end.code
        text = capsys.readouterr()
        err = [line.rpartition("\r")[2] for line in text.err.split("\n")]  # a terminal shows no more
        assert "Traceback" not in text.err
        return code, text.out, "\n".join(line for line in err if line.strip())

    return run


@pytest.fixture
def refused(run, tmp_path):
    """Run a command that is to end with exit code 2, one line and no new file; returns that line."""

    def refused(*argv):
        before = sorted(tmp_path.rglob("*"))
        code, out, err = run(*argv)
        assert code == 2, err
        assert out == ""
        assert len(err.splitlines()) == 1, err
        assert sorted(tmp_path.rglob("*")) == before
        return err

    return refused


@pytest.fixture
def quick(monkeypatch):
    """Pictures of one pixel, for tests that are not about them."""
    monkeypatch.setattr(command, "draw_subspace", lambda subspace, file: Image.new("L", (1, 1)).save(file))


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    return write_images(tmp_path_factory.mktemp("data") / "images")
