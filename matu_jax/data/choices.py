"""What of data may be chosen: which tasks there are, and who holds how much of them."""

import dataclasses
from collections.abc import Iterator

from matu_jax.fields import field

IMAGE_SOURCES = ("prepared", "synthetic")
"""Where the images of real datasets come from: the sources of the package."""


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """Which tasks there are, who holds them, and how much of them.

    Attributes:
      tasks: a set ("embedded8" or "embedded30", the benchmark that comes with the package;
        "vision8", "tfds30" or "emr30", real datasets), or names separated by commas: all of tasks
        of the embedded benchmark, or all of datasets of `matu_jax.data.datasets` and of folders in
        `folders`; "folders" is all of the latter. "" = "folders" where `folders` is given, else
        "embedded8".
      source: where the images of real datasets come from: "prepared" (what `python -m
        matu_jax.prepare` has put into the cache) or "synthetic" (generated stand-ins with the same
        names, classes and sizes, to try an experiment without its data). Or a name in
        `matu_jax.data.SOURCES`, whose tasks are taken, of which `tasks` may name some.
      folders: directory with one image folder per task, each `<task>/train/<class>/<image>` and
        `<task>/test/<class>/<image>`: of images of one's own, which need nothing else, and of
        datasets that are not in TFDS or shall not come from there; "" = `$MATU_JAX_FOLDERS`, or
        `folders` in the cache directory.
      sites: directory with one folder per site, each `<site>/<task>/<split>/<class>/<image>`: every
        site is a client and owns its images, see `matu_jax.data.sites`.
      manifest: a CSV file with a row per example: an image or features, label, task, site, split
        and group, see `matu_jax.data.manifest`. With a column of sites, each is a client and owns
        its examples.
      validation_fraction: part of the training split that is held out for validation; of no
        account for image folders that bring a validation split, as `val`.
      clients: number of clients; where data belongs to sites, how many of these there are.
      tasks_per_client: how many different tasks each client holds; sites hold those that they have.
      assignment: task positions per client, as a tuple of tuples; empty = drawn from the seed.
      examples_per_slot: training examples of each (client, task) pair; 0 = split all there are.
      dirichlet_alpha: label skew between the holders of a task; 0 = none (IID).
      seed: what the assignment and the partition are drawn from; in manifests and at sites also the
        splits that are not given.
    """

    tasks: str = ""
    source: str = "prepared"
    folders: str = ""
    sites: str = ""
    manifest: str = ""
    validation_fraction: float = field(0.1, above=0, at_most=0.5)
    clients: int = field(12, at_least=1)
    tasks_per_client: int = field(2, at_least=1)
    assignment: tuple[tuple[int, ...], ...] = ()
    examples_per_slot: int = field(0, at_least=0)
    dirichlet_alpha: float = field(0.0, at_least=0)
    seed: int = field(0, at_least=0, at_most=2**31 - 1)

    def conflicts(self, where: str) -> Iterator[str]:
        """Yields what is wrong with places of data that exclude each other, and the assignment."""
        places = [name for name in ("folders", "sites", "manifest") if getattr(self, name)]
        if places and self.source not in IMAGE_SOURCES:
            places.append("source")
        if len(places) > 1 or (places and places != ["folders"] and self.source == "synthetic"):
            given = ", ".join(f"{where}.{name} = {getattr(self, name)!r}" for name in places)
            yield (
                f"{given}: found more than one place of data, expected one; leave the others as "
                "they are by default."
            )
        for client, held in enumerate(self.assignment):
            if not isinstance(held, tuple) or not all(type(task) is int for task in held):
                yield (
                    f"{where}.assignment: client {client}: found {held!r}, expected a tuple of "
                    "task positions, such as ((0, 1), (2,))."
                )
