"""Images that could not be read: counted over all ranks and logged by name. Too many of them end the run."""

import torch.distributed as dist

from asymflow.training.run.folder import Journal
from asymflow.training.run.ranks import AgreedError, rank0_broadcast

SHARE = 0.01  # of the images in the data set may be unreadable


class Problems:
    """`known`: "name: reason" of each image that could not be read so far, each only once."""

    def __init__(self, journal: Journal | None, images: int):
        """journal: given on rank 0 only. images: how many the data set has. Called by all ranks."""
        self.journal, self.images = journal, images
        read = rank0_broadcast(lambda: [entry["problem"] for entry in journal.entries()], "problems.log cannot be read")
        self.known = dict.fromkeys(read)

    def add(self, step: int, mine: list[str]) -> None:
        """mine: what this rank could not read. Called by all ranks; all raise AgreedError if it is too much."""
        everyone = [None] * dist.get_world_size()
        dist.all_gather_object(everyone, mine)
        new = [p for p in dict.fromkeys(problem for each in everyone for problem in each) if p not in self.known]
        self.known |= dict.fromkeys(new)
        if self.journal:
            for problem in new:
                self.journal.add({"step": step, "problem": problem})
        if len(self.known) > SHARE * self.images:
            first = "; ".join(list(self.known)[:10])
            more = f"; and {len(self.known) - 10} more" if len(self.known) > 10 else ""
            raise AgreedError(
                f"{len(self.known)} of the {self.images} images could not be read, more than {SHARE:.0%}: {first}{more}"
            )
