"""Throws damaged and forged messages at `matu_jax.messages.wire` until time is up, and reports.

    python tests/messages/fuzz_wire.py --seconds 600 --out fuzz_wire.json

Half of the time a coverage-guided fuzzer (atheris, which is libFuzzer: `pip install atheris`)
mutates messages of every form: exact, bfloat16 and int8 vectors, masks left out, as they are and
compressed. Most get a fresh checksum and fingerprint, so that it comes past both; of some the masks
are compressed again, so that it comes past the decompressor. The other half hypothesis draws edits
of valid messages, streams of masks of any length, whole rounds with an edited message, and trees
of any shape, with a new seed each time. Anything but a
message that is read, a WireError or the end of a stream is a failure, a warning too, and so is
memory beyond a bound.
"""

import argparse
import contextlib
import datetime
import io
import json
import platform
import re
import resource
import struct
import subprocess
import sys
import tempfile
import time
import warnings
import zlib
from pathlib import Path
from typing import Any, get_args

MEGABYTES = 2000  # resident, JAX's own some 300 among them; the tree is of a few hundred bytes


def run_coverage_guided(seconds: int) -> None:
    """Never returns: libFuzzer ends the process."""
    import atheris

    with atheris.instrument_imports(  # pyright: ignore[reportAttributeAccessIssue]
        include=["matu_jax.messages"]
    ):
        from matu_jax.messages import wire
        from matu_jax.messages.layout import (
            Precision,
            WireError,
            fingerprint,
            message_bytes,
            overhead_bytes,
        )
    from test_wire import DATA, like, resealed, wide

    trees = like(), wide()
    prints = [fingerprint(tree) for tree in trees]

    def compressed(data: bytes, tree: Any) -> bytes:
        """A message with everything after its vector compressed, and said to be."""
        tasks, precision = data[16] % 5 + 1, get_args(Precision)[data[5] % 3]
        vector = message_bytes(tree, tasks, modulators=False, precision=precision)
        end = 44 + 8 * tasks + vector - overhead_bytes(tasks)
        masks = zlib.compress(data[end:-4])
        head = data[:7] + b"\2" + data[8:16] + struct.pack("<I", tasks) + data[20:36]
        return head + struct.pack("<Q", len(masks)) + data[44:end] + masks + data[-4:]

    def one(data: bytes) -> None:
        forged, data = data[:1], data[1:]
        flags = forged[0] if forged else 0
        tree, print_ = trees[flags & 1], prints[flags & 1]
        if flags & 6 and len(data) >= 48:  # past the fingerprint and the checksum
            if flags & 8:
                data = compressed(data, tree)
            data = resealed(data[:20] + print_ + data[36:])
        for function in (
            lambda: wire.decode(data, tree, num_tasks=5, max_tasks=5),
            lambda: wire.read(io.BytesIO(data), tree, num_tasks=5, max_tasks=5),
        ):
            with contextlib.suppress(WireError, EOFError):
                function()

    corpus = tempfile.mkdtemp()
    for number, (data, tree) in enumerate(DATA):
        which = int(fingerprint(tree) == prints[1])
        for flags in (which, which | 2, which | 10):
            (Path(corpus) / f"{number}-{flags}").write_bytes(bytes([flags]) + data)
    words = [f"-max_total_time={seconds}", f"-rss_limit_mb={MEGABYTES}", "-print_final_stats=1"]
    atheris.Setup([sys.argv[0], *words, "-max_len=4000", corpus], one)
    atheris.Fuzz()


def run_hypothesis(seconds: int) -> None:
    import hypothesis
    from test_wire import test_edited_messages_are_read_or_refused as edited
    from test_wire import test_every_tree_and_every_number_comes_out_as_it_went_in as trees
    from test_wire import test_masks_of_any_length_are_read_or_refused as masks
    from test_wire import test_noise_is_refused as noise
    from test_wire import test_the_server_takes_or_refuses_what_was_edited as server

    start, examples, seed = time.monotonic(), 0, 0
    while time.monotonic() - start < seconds:
        # As their settings say.
        tests = ((edited, 300), (masks, 100), (noise, 100), (server, 60), (trees, 150))
        for test, each in tests:
            hypothesis.seed(seed)(test)()
            examples += each
        seed += 1
    print(f"examples: {examples}")


def child(name: str, seconds: int) -> tuple[subprocess.CompletedProcess, float]:
    words = [sys.executable, __file__, "--child", name, "--seconds", str(seconds)]
    start = time.monotonic()
    run = subprocess.run(words, capture_output=True, text=True, check=False)
    return run, time.monotonic() - start


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=int, default=600)
    parser.add_argument("--out", type=Path, default=Path("fuzz_wire.json"))
    parser.add_argument("--child", default="")
    given = parser.parse_args()
    if given.child:
        warnings.simplefilter("error")
        (run_coverage_guided if given.child == "atheris" else run_hypothesis)(given.seconds)
        return 0
    report: dict[str, Any] = {
        "date": datetime.date.today().isoformat(),
        "python": platform.python_version(),
    }
    ok = True
    for name, pattern in (
        ("atheris", r"stat::number_of_executed_units: *(\d+)"),
        ("hypothesis", r"examples: (\d+)"),
    ):
        run, seconds = child(name, given.seconds // 2)
        text = run.stdout + run.stderr
        found = re.search(pattern, text)
        cover = re.findall(r"cov: (\d+)", text)
        report[name] = {
            "seconds": round(seconds),
            "messages": int(found[1]) if found else None,
            "covered": int(cover[-1]) if cover else None,
            "exit": run.returncode,
        }
        if run.returncode or not found:
            ok = False
            print(text[-20000:])
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss
    report["peak_megabytes"] = round(peak / 1024)
    print(json.dumps(report, indent=1))
    given.out.write_text(json.dumps(report, indent=1) + "\n")
    return 0 if ok and report["peak_megabytes"] < MEGABYTES else 1


if __name__ == "__main__":
    sys.exit(main())
