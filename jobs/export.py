"""Hand a trained run on: its prompts folded into plain tables, or as a folder that transformers loads.

    python jobs/export.py SOURCE --out DIR --format folded|peft|hf

SOURCE: a run's folder (its best bundle), a bundle, models:/NAME@ALIAS or models:/NAME/NUMBER. folded: a bundle for
prediction, in which nothing that hangs on the task alone is computed any more. peft: prompts before the input and LoRA,
for Hugging Face PEFT. hf: weights and tokenizer of a run that trained the network (or LoRA, merged into it), prompts
beside. What cannot be exported is refused with the reason.
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "platform"))

from polyprompt.command import exit_status


def main() -> int:
    """Read the command line, export, say where to; return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR")
    parser.add_argument("--format", choices=("folded", "peft", "hf"), required=True)
    parser.add_argument("--backbone", help="where the backbone is now, if not where it was in training")
    parser.add_argument("--uri", help="of the tracking store, for models:/…")
    options = parser.parse_args()

    def act() -> int:
        from polyprompt import export, registry

        write = {"folded": export.folded, "peft": export.peft_folder, "hf": export.hub_folder}[options.format]
        with registry.opened(options.source, options.uri) as bundle:
            print(f"exported to {write(bundle, options.out.absolute(), options.backbone)}")
        return 0

    return exit_status(act, stopped="stopped")


if __name__ == "__main__":
    sys.exit(main())
