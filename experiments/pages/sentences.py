"""The numbers that stand in sentences of README and the result pages."""

from collections.abc import Callable
from typing import Any

from measured import kbit, percent, read, settings_of, timings

_ATTACKS = (
    "sign flip",
    "scaling x 100",
    "noise x 10",
    "constant x 10",
    "label flip",
    "masks",
    "scales x 100",
)
_FRAME_BITS = 8 * (40 + 4 * 2)  # of a message of two tasks


def _share(part: float, whole: float) -> str:
    return f"{100 * part / whole:.0f}"


def _uplink(comparison: str, setting: str, ours: str = "matu") -> str:
    """What an arm sends of what one adapter per task sends, in percent."""
    arms = settings_of(comparison)[setting]
    return _share(kbit(arms[ours]), kbit(arms["per_task"]))


def _both_links(comparison: str, setting: str) -> str:
    """The same of what MaTU sends and receives in int8 and apart."""
    arms = settings_of(comparison)[setting]
    ours, theirs = arms["matu, int8 apart"], arms["per_task"]
    up, down = (_share(kbit(ours, x), kbit(theirs, x)) for x in ("uplink", "downlink"))
    return f"{up} and {down}"


def _quickstart_uplink() -> str:
    rows = {row["name"]: row for row in read("quickstart")["rows"]}
    ours, theirs = (
        rows[name]["uplink, kbit per client and round"] for name in ("matu", "per_task")
    )
    return _share(ours, theirs)


def _of_thirty(arm: str) -> Any:
    return settings_of("compare30")["thirty"][arm]


def _thirty_accuracy() -> str:
    return f"{100 * percent(_of_thirty('matu')) / percent(_of_thirty('per_task')):.1f}"


def _thirty_digits() -> str:
    found = (
        _of_thirty(arm)["accuracy"]["per_task"]["digit/handwritten"]["mean"]
        for arm in ("matu", "per_task")
    )
    return "{:.0f} against {:.0f}".format(*(100 * mean for mean in found))


def _thirty_halfway() -> str:
    curves = [_of_thirty(arm)["curve"] for arm in ("matu", "per_task", "matfl")]
    return "{:.1f} against {:.1f} and {:.1f}".format(*(100 * x["mean"][0] for x in curves))


def _fours_per_task() -> str:
    arms = settings_of("traffic8")["fours"]
    return f"{kbit(arms['per_task']) / kbit(arms['matu']):.1f}"


def _message_sizes() -> str:
    arms = settings_of("traffic8")["pairs"]
    sizes = [kbit(arms[x]) + _FRAME_BITS / 1000 for x in ("matu", "matu, bfloat16", "matu, int8")]
    return "{:.0f} kbit of float32, {:.0f} of bfloat16 and {:.0f} of int8".format(*sizes)


def _apart_kbit() -> str:
    arm = settings_of("downloads8")["pairs"]["matu, int8 apart"]
    return f"{kbit(arm):.0f} and {kbit(arm, 'downlink'):.0f}"


def _apart_behind() -> str:
    """By how much MaTU in int8 and apart is behind MaT-FL, where it is."""
    found = [
        100 * arms["matfl"]["against_ours"]["difference"]
        for arms in settings_of("downloads8").values()
    ]
    behind = [points for points in found if points > 0]
    return f"{min(behind):.1f} to {max(behind):.1f}"


def _kept(arm: str) -> list[float]:
    """What an arm keeps of its accuracy without liars, in each attack by one of five."""
    settings = settings_of("attacks4")
    honest = percent(settings["nobody lies"]["matu"])
    return [100 * percent(settings[attack][arm]) / honest for attack in _ATTACKS]


def _undefended() -> str:
    kept = _kept("matu, undefended")
    return f"{min(kept):.0f} to {max(kept):.0f}"


def _defences_cost(setting: str) -> str:
    arms = settings_of("attacks4")[setting]
    return f"{percent(arms['matu, undefended']) - percent(arms['matu']):.1f}"


def _hosts(file: str, *, checkpoint: bool) -> str:
    """Seconds of a round with a sharded server, in place of one in which each process does all."""
    rows = {row["server"]: row for row in timings(file)}
    seconds = [
        rows[server]["round s"] - (0 if checkpoint else rows[server]["checkpoint s"])
        for server in ("shared", "each")
    ]
    return "{:.2f} s in place of {:.2f}".format(*seconds)


def _largest() -> dict[str, Any]:
    """The round of most clients."""
    return max(timings("scale"), key=lambda row: row["clients"])


def _largest_memory() -> str:
    """GB of that round and of its task vectors, which are float32."""
    row = _largest()
    vectors = row["clients"] * row["held"] * row["parameters"] * 4 / 1e9
    return f"{row['grows MB'] / 1000 + vectors:.0f}"


NUMBERS: dict[str, Callable[[], str]] = {
    "quickstart-uplink": _quickstart_uplink,
    "quickstart-two-devices": lambda: f"{read('quickstart')['two devices']['test accuracy, %']}",
    "compare8-uplink": lambda: _uplink("compare8", "pairs"),
    "compare30-accuracy": _thirty_accuracy,
    "compare30-uplink": lambda: _uplink("compare30", "thirty"),
    "compare30-digits": _thirty_digits,
    "compare30-halfway": _thirty_halfway,
    "settings8-uplink-fours": lambda: _uplink("settings8", "fours"),
    "settings8-uplinks": lambda: " or ".join(
        _uplink("settings8", setting) for setting in ("fours", "conflict")
    ),
    "traffic8-uplink": lambda: _uplink("traffic8", "pairs", "matu, int8"),
    "traffic8-fours": _fours_per_task,
    "downloads8-traffic-pairs": lambda: _both_links("downloads8", "pairs"),
    "downloads8-traffic-fours": lambda: _both_links("downloads8", "fours"),
    "downloads30-traffic": lambda: _both_links("downloads30", "thirty"),
    "downloads8-kbit": _apart_kbit,
    "downloads8-behind": _apart_behind,
    "message-sizes": _message_sizes,
    "attacks-kept": lambda: f"{min(_kept('matu')):.0f}",
    "attacks-kept-clip": lambda: f"{min(_kept('matu, clip')):.0f}",
    "attacks-kept-trim": lambda: f"{min(_kept('matu, clip and trim')):.0f}",
    "attacks-undefended": _undefended,
    "defences-cost-even": lambda: _defences_cost("nobody lies"),
    "defences-cost": lambda: _defences_cost("nobody lies, skewed 0.5"),
    "defences-cost-skewed": lambda: _defences_cost("nobody lies, skewed 0.1"),
    "hosts": lambda: _hosts("hosts", checkpoint=False),
    "hosts-small": lambda: _hosts("hosts_small", checkpoint=False),
    "hosts-small-checkpoint": lambda: _hosts("hosts_small", checkpoint=True),
    "scale-seconds": lambda: f"{_largest()['unify s'] + _largest()['aggregate s']:.0f}",
    "scale-memory": _largest_memory,
}
