"""Takes a model out of a run: `python -m matu_jax.export --workdir RUN --task svhn --out DIR`.

What a task's client was measured with, in one of three formats:

    peft         a PEFT LoRA adapter (for runs with config.model.trainable = 'lora')
    merged       a Hugging Face checkpoint with the fine-tuned image tower
    safetensors  the raw task vector (fine-tuned minus base), with this package's names

and beside it head.safetensors ("weight" [classes, features]; "bias" of a trained head or
"logit_scale" of a zero-shot one) and a model card, README.md: how it was made, how to load it.

Of a model of the experiment's own (`matu_jax.models.MODELS`) there is safetensors alone: the task
vector, the parameters that it makes of the base, and the card.

The round is the one that the run's results speak of, the best on validation, or --round. Of the
clients that hold the task it is the one that is best on validation, which the last lines and the
card name, or --client. Data, base checkpoint and state have to be the run's, byte for byte. Then
the model is measured as the run did: it must get as many validation and test examples right as the
run recorded, up to those that are near ties, which rounding may decide; else nothing is written. Of
a round that the run did not measure nothing can be compared. The card's accuracy is that on the
test examples in float32. All files of tensors are read back and compared bit for bit. Algorithms
that train a linearised model (ntk_fedavg) have none that these formats could hold.

Exit codes: 0 done; 2 a mistake in the command or the run, said in one message.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from matu_jax.errors import UserError
from matu_jax.models import MODELS
from matu_jax.runs import model_folder, own_model
from matu_jax.runs.commandline import Parser, check_words, run_file, run_program
from matu_jax.runs.exported import exported
from matu_jax.runs.model_folder import FORMATS
from matu_jax.runs.saved import read_slot


def main(argv: Sequence[str]) -> int:
    """Runs the program; returns the exit code."""
    parser = Parser(
        prog="python -m matu_jax.export",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--workdir", type=Path, required=True, help="of a run of matu_jax.train")
    parser.add_argument("--task", required=True, help="one of the run's tasks")
    parser.add_argument("--format", choices=FORMATS, default="merged")
    parser.add_argument("--out", type=Path, required=True, help="a new folder")
    parser.add_argument(
        "--client",
        metavar="CLIENT",
        help="whose model: a client's number, or a site's name (default: of the clients that hold "
        "the task the one that is best on validation, which the last lines name)",
    )
    parser.add_argument(
        "--round",
        type=int,
        help="after which round (default: the one of the run's results, the best on validation)",
    )
    parser.add_argument(
        "--config",
        type=Path,
        metavar="FILE",
        help="an experiment file to execute first, where it registers algorithms, architectures, "
        "models, sources or datasets",
    )

    def work(console: Console) -> None:
        check_words(argv[1:])
        options = parser.parse_args(argv[1:])
        if options.config:
            run_file(options.config)  # for what it registers; the config is the run's own
        try:
            slot = read_slot(options.workdir, options.task, options.client, options.round)
        except OSError as error:
            raise UserError(f"{error.filename or options.workdir}: {error.strerror}") from None
        try:
            if slot.config.model.architecture in MODELS:
                own_model.write(slot, options.format, options.out, console.print)
            else:
                model_folder.write(exported(slot), options.format, options.out, console.print)
        except OSError as error:
            raise UserError(f"--out {options.out}: {error}") from None
        name = slot.client_name
        console.print(
            f"{options.out}: task {options.task}, {name}, after round {slot.round}, as "
            f"{options.format}. README.md there says how to load it.\n"
            f"{name[0].upper()}{name[1:]}: {slot.why_client}.\n"
            f"Round {slot.round} of {slot.config.rounds}: {slot.why}."
        )

    return run_program(work, interrupted="Interrupted. Nothing is left in --out.")


if __name__ == "__main__":
    sys.exit(main(sys.argv))
