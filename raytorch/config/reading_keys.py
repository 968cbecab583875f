"""How samples are read that are not held in memory, whichever data set they are of: keys of each one's section."""

from typing import Annotated, Literal

from pydantic import Field

from raytorch.config.section import Section

OnError = Literal["stop", "skip"]


class ReadingKeys(Section):
    """Keys that every data set has that is read while the run goes on, from files or by code of your own."""

    readers: Annotated[int, Field(ge=0, le=256)] = 0
    """Processes of each worker that read samples ahead; 0 reads them where they are used."""
    on_error: OnError = "stop"
    """What follows a sample that cannot be read: the run ends, or the next one that can be is read in its place."""
    max_skipped: Annotated[int, Field(ge=1, le=1_000_000)] = 100
    """With ``on_error: skip``, samples that cannot be read before the run ends all the same: over all workers and
    restarts, each counted once."""

    @property
    def most_skipped(self) -> int:
        """How many samples may be skipped; 0 where the first ends the run.

        Example:
            >>> ReadingKeys().most_skipped, ReadingKeys(on_error="skip").most_skipped
            (0, 100)
        """
        return self.max_skipped if self.on_error == "skip" else 0
