"""mnclglf search."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from rich.console import Console

from mnclglf.commands.embed import OfImages
from mnclglf.config import require, require_types
from mnclglf.runs.console import say

MOST_NEIGHBORS = 1000  # each is a picture in the page


@dataclass(frozen=True, kw_only=True)
class Search(OfImages):
    """Find the images of a folder or a data set that are most like some others, by the cosine similarity of their
    embeddings."""

    query: tuple[Path, ...]
    """Image files to search for; they need not be among the images searched."""
    neighbors: int = 10
    """Images to show for each query; one that is searched for finds itself first."""
    embeddings: Path | None = None
    """File of the embeddings, as `mnclglf embed --out` writes it; made if missing. None is
    RUN/embeddings/SOURCE.npy."""
    out: Path | None = None
    """Page with the pictures; None is FILE.search.html beside the embeddings."""

    def check(self) -> None:
        from mnclglf.evaluation.embedding_file import check_out

        require_types(self)
        require(self.run.is_dir(), f"{self.run} is no run directory; mnclglf train --out makes one")
        require(len(self.query) > 0, "--query names no image; give one or more image files")
        require(
            1 <= self.neighbors <= MOST_NEIGHBORS,
            f"neighbors {self.neighbors} cannot be shown; give --neighbors from 1 to {MOST_NEIGHBORS}",
        )
        check_out(self.embeddings or self.default_file())
        require(
            self.out is None or self.out.suffix in (".html", ".htm"),
            f"--out {self.out} must end in .html, which is what is written; --embeddings names the file of embeddings",
        )
        require(
            self.out is None or self.out.parent.is_dir(),
            f"--out {self.out}: there is no folder {self.out and self.out.parent}; make it first",
        )

    def execute(self, console: Console) -> int:
        self.prepare()
        from mnclglf.api import make_embedder
        from mnclglf.data.listing import list_source
        from mnclglf.data.sources import named_or_folder
        from mnclglf.evaluation.embed import embed_source
        from mnclglf.evaluation.embedding_file import beside, made_of
        from mnclglf.evaluation.search import embed_queries, find_nearest
        from mnclglf.reports.neighbors import print_neighbors, shown_neighbors, write_neighbors
        from mnclglf.training.ranks import ranks_of_environment

        ranks = ranks_of_environment()
        source, file = named_or_folder(self.source), self.embeddings or self.default_file()
        embedder = make_embedder(self.run, self.checkpoint, self.device)
        queries, pictures = embed_queries(embedder, self.query)
        listing = list_source(source, self.data_dir, download=self.download, skip_corrupt=self.skip_corrupt)
        stopped = embed_source(
            embedder, listing, source, file, skip_corrupt=self.skip_corrupt, console=console, ranks=ranks
        )
        if stopped:
            return 128 + stopped
        if not ranks.writes:
            return 0
        origin = made_of(file)
        found = find_nearest(queries, file, origin, self.neighbors, console)
        shown = shown_neighbors(self.query, pictures, found.rows, found.similarities, listing, list(origin.kept()))
        print_neighbors(shown, console)
        page = self.out or beside(file, "search.html")
        write_neighbors(page, shown, title=f"{source} by {self.run}")
        say(console, f"pictures: {page.resolve()}")
        return 0
