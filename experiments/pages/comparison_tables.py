"""The tables that are made of comparisons: README's, and those of attacks in reliability.md."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial

from measured import accuracy, bold_highest, grid, kbit, percent, read, settings_of, signed

_NAMES = {"matu": "**`matu`**", "matu (paper's server)": "`matu`, the paper's server"}
_KEPT = {
    "matfl": "a vector per slot",
    "matu": "a vector per task",
    "per_task": "a vector per task",
    "matu (paper's server)": "one unified",
    "fedper": "3/4 of a vector",
    "fedrep": "3/4 of a vector",
    "individual": "nothing",
    "emr_one_shot": "nothing",
    "fedavg": "one vector",
    "fedprox": "one vector",
    "ntk_fedavg": "one vector",
    "fed_lora_b": "half a vector",
    "ties": "one vector",
}
_SETTINGS8 = {
    "solo": "solo: one task a client, three holders",
    "fours": "fours: four tasks a client",
    "conflict": "conflict: two questions about the same images",
    "distant": "distant: two questions about two kinds of images",
    "skew 0.5": "skew 0.5: labels of holders from Dirichlet 0.5",
    "skew 0.1": "skew 0.1: the same with 0.1",
    "part-time": "part-time: 30 % of twenty clients a round",
}
_FOLD = {
    "the download is not folded": ("ablation_fold", "download not folded"),
    "the upload is not folded": ("ablation_fold", "upload not folded"),
    "without masks": ("ablation_fold", "masks off"),
    "with B of LoRA alone": ("ablation_fold", "B only"),
    "without scales": ("ablation_fold", "scales off"),
    "scales by least squares": ("ablation_fold", "least-squares scales"),
    "a scale per layer": ("ablation_fold", "scales per layer"),
    "products A B folded, not A and B": ("ablation_products", "products folded"),
}
_RULES = {
    "no transfer": ("ablation_rules", "no transfer"),
    "mean of 3": ("ablation_rules", "mean of 3"),
    "the same, epsilon = 0.51": ("ablation_rules", "mean of 3, epsilon = 0.51"),
    "the same, added instead of averaged": ("ablation_rules", "additive"),
    "the gate of eq. 5, rho = 0.2": ("ablation_rules", "rho = 0.2"),
    "the same, rho = 0.6": ("ablation_rules", "rho = 0.6"),
    "the same, rho = 1": ("ablation_rules", "rho = 1"),
    "the maximum in eq. 2": ("ablation_rules", "maximum magnitude"),
}
_SIMILARITIES = {
    "slots of different clients (ablation_similarity)": ("ablation_similarity", "mean of 3"),
    "aggregated vectors, as the paper has it (ablation_similarity)": (
        "ablation_similarity",
        "mean of 3, aggregated",
    ),
    "slots of different clients (ablation_fold)": ("ablation_fold", "mean of 3"),
    "their products A B (ablation_fold)": ("ablation_fold", "mean of 3, of products"),
    "slots, sharpened (ablation_fold)": ("ablation_fold", "mean of 3, sharpened"),
    "their products A B, sharpened (ablation_fold)": (
        "ablation_fold",
        "mean of 3, of products, sharpened",
    ),
}
_DEFENDED = ("matu", "matu, clip", "matu, clip and trim")


def rivals(comparison: str, settings: Mapping[str, str], *, kept: bool = False) -> str:
    """A row an arm, best first: accuracy and uplink in the first setting, accuracy in others."""
    first, *others = (settings_of(comparison)[name] for name in settings)
    labels = sorted(first, key=lambda label: -percent(first[label]))
    names = [_NAMES.get(label, f"`{label}`") for label in labels]
    best, *bests = (bold_highest([accuracy(arms[x]) for x in labels]) for arms in (first, *others))
    clients = read(f"{comparison}/comparison")["settings"][0]["clients"]
    sent = [f"{kbit(first[label]):.0f}" for label in labels]
    once = first["emr_one_shot"]["communication"]["uplink_bits_total"] / clients / 1000
    sent[labels.index("emr_one_shot")] += f" ({once:.0f}, once)"
    title, *titles = settings.values()
    header = ["", title, "kbit up, per client and round", *titles]
    columns = [names, best, sent, *bests]
    if kept:
        header.append("kept at the server")
        columns.append([_KEPT[label] for label in labels])
    return grid(header, list(zip(*columns, strict=True)))


def traffic() -> str:
    pairs, kin, fours = settings_of("traffic8").values()
    rows = [
        [f"`{x}`", accuracy(arm), f"{kbit(arm):.0f}", accuracy(fours[x]), accuracy(kin[x])]
        for x, arm in pairs.items()
    ]
    return grid(["", "pairs", "kbit up, per client and round", "four tasks a client", "kin"], rows)


def federations(
    comparison: str, labels: Sequence[str], ours: str, words: Mapping[str, str], more: str = ""
) -> str:
    """A row a setting, those of a second comparison after the first's; a column an arm."""
    settings = settings_of(comparison) | (settings_of(more) if more else {})
    rows = [
        [words.get(name, name), *bold_highest([accuracy(arms.get(label)) for label in labels])]
        for name, arms in settings.items()
    ]
    header = [f"**`{label}`**" if label == ours else f"`{label}`" for label in labels]
    return grid([comparison, *header], rows)


def attacks(comparison: str, labels: Sequence[str]) -> str:
    settings = settings_of(comparison)
    if left_out := {label for arms in settings.values() for label in arms} - set(labels):
        raise ValueError(f"{comparison} has arms without a column: {left_out}")
    rows = [[name, *(accuracy(arms.get(x)) for x in labels)] for name, arms in settings.items()]
    return grid(["", *labels], rows)


def transfer() -> str:
    """What each rule of transfer adds to none, in points."""
    eight, rules = settings_of("ablation8"), settings_of("ablation_rules")
    settings = [eight["kin"], eight["other kin"], eight["pairs"], rules["other pairs"]]
    rows = []
    for rule in ("shrinkage", "mean of 1", "mean of 3", "mean of 4"):
        cells = []
        for arms in settings:
            names = {"shrinkage": ["matu"]}.get(rule, [rule, f"transfer: {rule}"])
            arm = next((arms[name] for name in names if name in arms), None)
            cells.append(signed(arm and (percent(arm) - percent(arms["no transfer"])) / 100))
        rows.append([rule, *cells])
    return grid(["points over no transfer", "kin", "other kin", "pairs", "other pairs"], rows)


def choices(
    header: str, arms: Mapping[str, tuple[str, str]], settings: Sequence[str], *, points: bool
) -> str:
    """A row a choice, which is an arm of a comparison: its accuracy, or that minus ours."""
    rows = []
    for words, (comparison, label) in arms.items():
        measured = settings_of(comparison)
        found = [measured.get(setting, {}).get(label) for setting in settings]
        against = [signed(arm and arm["against_ours"]["difference"]) for arm in found]
        rows.append([words, *(against if points else map(accuracy, found))])
    return grid([header, *settings], rows)


TABLES: dict[str, Callable[[], str]] = {
    "compare8": partial(rivals, "compare8", {"pairs": "pairs", "kin": "kin"}, kept=True),
    "compare30": partial(rivals, "compare30", {"thirty": "thirty"}),
    "settings8": partial(
        federations, "settings8", ("matu", "per_task", "matfl", "fedavg"), "matu", _SETTINGS8
    ),
    "traffic8": traffic,
    "downloads8": partial(
        federations,
        "downloads8",
        ("matu", "matu, int8", "matu, apart", "matu, int8 apart", "per_task", "matfl"),
        "matu, int8 apart",
        {
            "pairs": "pairs: two tasks a client, as above",
            "thirty": "all thirty tasks (downloads30)",
        },
        more="downloads30",
    ),
    "transfer": transfer,
    "fold": partial(
        choices, "points against the fold as it is", _FOLD, ("pairs", "fours"), points=True
    ),
    "rules": partial(
        choices, "points against the defaults", _RULES, ("pairs", "fours", "kin"), points=True
    ),
    "similarities": partial(
        choices, "similarity of", _SIMILARITIES, ("pairs", "fours", "kin"), points=False
    ),
    "attacks4": partial(
        attacks,
        "attacks4",
        (
            *_DEFENDED,
            "matu, undefended",
            "matu, maximum",
            "fedavg",
            "fedavg, clip",
            "fedavg, clip and trim",
            "fedavg, undefended",
        ),
    ),
    "attacks4-large": partial(
        attacks, "attacks4_large", (*_DEFENDED, "matu, trim", "matu, undefended", "fedavg")
    ),
}
