"""What the tests of this folder share."""

import pytest
from huggingface_hub.errors import EntryNotFoundError

from asymflow.cli import main


@pytest.fixture
def run(capsys):
    """Run a command in this process, successfully; return what it prints."""

    def run(*argv):
        assert main([str(word) for word in argv]) == 0
        return capsys.readouterr().out

    return run


@pytest.fixture
def refused(capsys):
    """Run a command that is to end with exit code 2 and one line; return that line."""

    def refused(*argv):
        try:
            code = main([str(word) for word in argv])
        except SystemExit as end:
            code = end.code
        text = capsys.readouterr()
        assert code == 2
        assert text.out == ""
        *progress, line = text.err.splitlines()
        assert all(line.startswith("reading ") for line in progress)
        assert line.startswith("asymflow")
        return line

    return refused


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A folder that is the Hub: ORG/NAME/FILE."""

    def download(repository, file):
        assert repository == "some-org/Some-Model-1.5"
        if not (tmp_path / repository / file).exists():
            raise EntryNotFoundError(file)
        return str(tmp_path / repository / file)

    monkeypatch.setattr("asymflow.hub.hf_hub_download", download)
    monkeypatch.setattr("asymflow.cli.info.training_step", lambda *_: (0, {}))  # which takes seconds
    return tmp_path
