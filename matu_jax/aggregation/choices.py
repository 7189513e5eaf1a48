"""The choices that MaTU's server has, with the defaults that are benchmarked."""

import dataclasses
from collections.abc import Iterator
from typing import Any, Literal

from matu_jax import fields
from matu_jax.fields import field

Magnitude = Literal["max", "mean"]
Transfer = Literal["none", "mean", "additive", "shrinkage"]
Similarity = Literal["cross_client", "aggregated"]
Uploads = Literal["vector", "change"]
Weighting = Literal["examples", "agreement"]


@dataclasses.dataclass(frozen=True)
class AggregationRules:
    """The server's choices in eqs. 5 to 9; the defaults follow experiments/results/ablation8.

    Attributes:
      magnitude: how eq. 2 sets magnitudes in what the server folds, and clients in experiments.
      agreement_threshold: rho of eq. 5, in [0, 1]; 0 turns the gate off.
      top_k: kappa of eq. 8, how many other tasks may lend to a task; 0 turns transfer off.
      min_similarity: epsilon of eq. 8, in [0, 1]; 1/2 is the similarity of unrelated directions.
      transfer: how lenders enter. "none": not at all. "mean": the mean of a task's own vector
        (weight 1) and its lenders' (weight A). "additive": own vector + sum of A times theirs.
        "shrinkage": as much as the evidence of all rounds warrants, see `aggregation.shrinkage`
        (no top_k, no min_similarity; needs uploads = "change" and similarity = "cross_client").
      similarity: what eq. 7 compares. "aggregated": the tasks' aggregated vectors, as in the paper.
        "cross_client": slots of *different* clients only, averaged over the pairs; two tasks of
        one client are masked copies of one vector and look alike whatever they are.
      uploads: what a client folds and sends. "vector": its task vectors, as in the paper; the
        server keeps the unified vector of all tasks alone. "change": what the round has added to
        them, its task vectors less its download; the server adds it to exact task vectors, one per
        task, which it keeps. What folding loses on the way down is then not taken over from round
        to round: the loss is measured at the folded vector and the exact one moves, as in
        quantisation-aware training with a straight-through estimator. Where every client folds
        the same contradictory tasks, no folded vector serves them all, and the exact ones move on
        without settling.
    """

    magnitude: Magnitude = "mean"
    agreement_threshold: float = field(0.0, at_least=0, at_most=1)
    top_k: int = field(3, at_least=0)
    min_similarity: float = field(0.5, at_least=0, at_most=1)
    transfer: Transfer = "shrinkage"
    similarity: Similarity = "cross_client"
    uploads: Uploads = "change"

    def conflicts(self, where: str) -> Iterator[str]:
        """Yields what is wrong where one rule needs another."""
        needed = ("change", "cross_client")
        if self.transfer == "shrinkage" and (self.uploads, self.similarity) != needed:
            yield (
                f"{where}.transfer: 'shrinkage' needs uploads = 'change' and similarity = "
                f"'cross_client'; found {self.uploads!r} and {self.similarity!r}."
            )


@dataclasses.dataclass(frozen=True)
class DefenceConfig:
    """How the server bounds what single clients can do to the others.

    The means over clients of the other algorithms follow the same three rules, of changes and with
    clients instead of slots where a client sends one vector; algorithms without such a mean have no
    defences and refuse other values than these. The defaults follow experiments/results/attacks4
    and defence8.

    Attributes:
      clip: no upload counts for more than this many times the median length; 0 = off. A slot's
        vector is scaled down where scale times length of its client's unified vector exceeds `clip`
        times the median over the round's slots (and that for no more than twice the lower median
        over clients of their longest slot, which neither half of them nor one with many slots can
        set). That product bounds the length of what the slot's mask lets through, so that neither
        a long vector nor a large scale nor a full mask gets past it.
      trim: how many of a task's largest and smallest numbers eq. 6 leaves out, parameter by
        parameter (the trimmed mean of Yin et al. 2018, arXiv 1803.01498; all but the middle ones
        where a task has too few holders: the median). Every holder counts the same then, whatever
        its weight. 0 = off.
      weighting: what eq. 6 weights holders by. "examples": `Slots.weight`. "agreement": less of
        that for a holder whose signs have a mean correlation with those of the task's other holders
        below half of the median holder's, and nothing for one with none (in the manner of FLTrust,
        Cao et al. 2021, arXiv 2012.13995, which weights by the cosine to a trusted vector), where
        five holders or more have reported: of fewer, one liar is more than a fifth, and honest
        holders whose labels are skewed differ as well. Only beside trim = 0.
    """

    clip: float = field(1.5, at_least=0)
    trim: int = field(0, at_least=0)
    weighting: Weighting = "agreement"

    def conflicts(self, where: str) -> Iterator[str]:
        """Yields what is wrong where two defences exclude each other."""
        if self.trim and self.weighting != "examples":
            yield (
                f"{where}.trim: found {self.trim}, which counts all holders the same, beside "
                f"weighting = {self.weighting!r}; for a trimmed mean set {where}.weighting = "
                "'examples'."
            )


NO_DEFENCE = DefenceConfig(clip=0.0, weighting="examples")


@dataclasses.dataclass(frozen=True)
class AggregationConfig(DefenceConfig, AggregationRules):
    """All choices of `aggregate`: the fields of `AggregationRules` and `DefenceConfig`.

    The defaults are what is benchmarked; `AggregationConfig.paper()` is what the paper says.

    Raises:
      ValueError: where it is made, with all that is wrong.
    """

    def __post_init__(self) -> None:
        fields.checked(self, "AggregationConfig")

    @classmethod
    def of(
        cls, rules: AggregationRules, defence: DefenceConfig = NO_DEFENCE
    ) -> "AggregationConfig":
        """The rules, of a block that may hold more than them, and the defences, as one."""
        chosen = {
            name: getattr(part, name)
            for part, schema in ((rules, AggregationRules), (defence, DefenceConfig))
            for name in fields.kinds(schema)
        }
        return cls(**chosen)

    @classmethod
    def paper(cls, **changes: Any) -> "AggregationConfig":
        """The paper's equations as this project reads them, without what goes beyond them.

        Magnitude "max", the gate of eq. 5 with rho = 0.4, whole vectors as uploads, neither
        transfer, whose rule the paper's summary leaves open, nor defences; and the changes given.
        Eq. 7 still compares slots of different clients; `paper(similarity="aggregated")` compares
        aggregated vectors, which looks related wherever tasks share a client.
        """
        rules = {"magnitude": "max", "agreement_threshold": 0.4, "transfer": "none"}
        return cls(**{**rules, "uploads": "vector", **dataclasses.asdict(NO_DEFENCE), **changes})

    def conflicts(self, where: str) -> Iterator[str]:
        """Yields what is wrong among the rules, and among the defences."""
        yield from AggregationRules.conflicts(self, where)
        yield from DefenceConfig.conflicts(self, where)
