"""What a search for images meets, and does not use: counted, and said in one line for each reason."""

import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field

from asymflow.text import count


@dataclass
class PassedOver:
    """Names, or entries, by the reason why they are not used: others, of kinds that are not read; packed, archives;
    again, read before; gone, links to nothing. tars: those in folders, which are read. seen: real paths that were read.
    links: files in folders that are links, each by its name in the real path of its folder.
    """

    others: list = field(default_factory=list)
    packed: list = field(default_factory=list)
    again: list = field(default_factory=list)
    gone: list = field(default_factory=list)
    tars: list = field(default_factory=list)
    seen: set[str] = field(default_factory=set)
    links: set[str] = field(default_factory=set)

    @property
    def remarks(self) -> list[str]:
        said = [
            (self.others, "image", "passed over, of a kind that is not read: {}. Convert such files to png or jpg"),
            (self.packed, "archive", "not opened: {}. Unpack what has images in it"),
            (self.again, "path", "not read twice: {}"),
            (self.gone, "link", "left out, since they lead nowhere (is a disk not mounted?): {}"),
            (self.tars, "tar file", "tar files in folders are read as well: {}"),
        ]
        return [line.format(some(found, what)) for found, what, line in said if found]

    def say(self) -> None:
        for remark in self.remarks:
            print(remark, file=sys.stderr)

    def add(self, other: "PassedOver") -> None:
        for mine, more in zip(vars(self).values(), vars(other).values(), strict=True):
            (mine.update if isinstance(mine, set) else mine.extend)(more)

    def is_new(self, path: str) -> bool:
        """Whether a path is read for the first time, under whatever name; notes it."""
        real = os.path.realpath(path)
        if real in self.seen:
            self.again.append(path)
            return False
        self.seen.add(real)
        return True


def some(found: Sequence[object], what: str) -> str:
    """Such as "3 images (the first: a.heic)"."""
    return f"{count(len(found), what)} ({'the first: ' if len(found) > 1 else ''}{found[0]})"
