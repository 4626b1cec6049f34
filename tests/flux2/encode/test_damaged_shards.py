"""Encoded shards with any damage are read or refused in one line."""

import shutil

from fuzzing import COUNTS, fuzz

from asymflow.data.encoded import EncodedShards
from asymflow.entries import UnreadableError
from asymflow.errors import InputError


def read(folder):
    shards, problems = EncodedShards(folder), 0
    for index in range(len(shards)):
        try:
            shards[index], shards.pair(index)
        except UnreadableError:
            problems += 1
    if problems:
        raise InputError(f"{folder}: {problems} cannot be read")


@COUNTS
def test_damaged_shards_are_read_or_refused_in_one_line(shards, count, tmp_path):
    fuzz(shutil.copytree(shards, tmp_path / "shards"), read, count)
