"""What a type checker sees of the library, as it is installed."""

import json
import os
import subprocess
import sys
from pathlib import Path

import matu_jax

PACKAGE = Path(matu_jax.__file__).parent


def test_a_type_checker_knows_what_is_public(tmp_path):
    programs = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    command = [sys.executable, "-m", "pyright", "--verifytypes", "matu_jax", "--ignoreexternal"]
    out = subprocess.run(
        [*command, "--outputjson"],
        cwd=tmp_path,
        env={**os.environ, "PATH": programs, "PYTHONPATH": str(PACKAGE.parent)},
        capture_output=True,
        text=True,
    ).stdout
    found = json.loads(out)["typeCompleteness"]
    assert Path(found["packageRootDirectory"]) == PACKAGE
    unknown = [
        "\n  ".join([symbol["name"], *(each["message"] for each in symbol["diagnostics"])])
        for symbol in found["symbols"]
        if symbol["isExported"] and not (symbol["isTypeKnown"] and not symbol["isTypeAmbiguous"])
    ]
    assert found["completenessScore"] >= 0.98, "\n".join(unknown)
