"""Answer rows of any tasks over HTTP, with one model or several.

    python jobs/serve.py --model [NAME=]SOURCE … [--port 8000] [--replicas N] [--gpu]

SOURCE: a run's folder (its best bundle), a bundle, models:/NAME@champion (followed when the alias moves) or
models:/NAME/3. POST /predict takes {"rows": [{"task": …, …}]}; / is a page to try it, /openapi.json says everything.
It listens to this machine alone. $POLYPROMPT_ADMIN_TOKEN opens /admin/models/NAME, which loads, replaces and drops
models while it runs. SIGTERM and Ctrl-C end it, after what was taken is answered. docs/serving.md.
"""

import argparse
import logging
import os
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "platform"))

from polyprompt.command import exit_status


def main() -> int:
    """Read the command line and serve; return the exit status."""
    from polyprompt.serving_limits import Limits

    limits = Limits()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", nargs="+", required=True, metavar="[NAME=]SOURCE")
    parser.add_argument("--host", default="127.0.0.1", help="who may come: 0.0.0.0 is everyone (docs/security.md)")
    parser.add_argument("--port", type=int, default=8000)
    parser.add_argument("--replicas", type=int, default=1, help="processes with the models, on Ray")
    parser.add_argument("--cpus", type=float, default=1, help="of each replica")
    parser.add_argument("--gpu", action="store_true", help="one GPU for each replica")
    parser.add_argument("--batch-rows", type=int, default=64, help="rows that are answered together at most")
    parser.add_argument("--backbone", help="where the backbones are now, if not where they were in training")
    parser.add_argument("--uri", help="of the tracking store, for models:/…")
    parser.add_argument("--max-rows", type=int, default=limits.rows, help="of a request")
    parser.add_argument("--max-characters", type=int, default=limits.characters, help="of a row")
    parser.add_argument("--max-rate", type=float, default=limits.requests_per_second, help="requests a second (0: any)")
    parser.add_argument("--max-waiting", type=int, default=limits.waiting_rows, help="rows that wait for an answer")
    parser.add_argument("--timeout", type=float, default=limits.timeout_seconds, help="seconds for a request")
    options = parser.parse_args()
    positive = ("replicas", "batch_rows", "max_rows", "max_characters", "max_waiting", "timeout", "cpus")
    for name in positive:
        if getattr(options, name) <= 0:
            parser.error(f"--{name.replace('_', '-')} {getattr(options, name)}: expected more than 0")
    if options.max_waiting < options.max_rows:
        parser.error(
            f"--max-waiting {options.max_waiting}: a request of --max-rows {options.max_rows} would never be taken; "
            "expected at least as many"
        )
    if not 0 <= options.port < 2**16:
        parser.error(f"--port {options.port}: expected 0 to 65535")
    if options.max_rate < 0:
        parser.error(f"--max-rate {options.max_rate}: expected 0 or more")
    logging.basicConfig(format="%(message)s", level=logging.WARNING)
    return exit_status(lambda: serve(options), stopped="stopped")


def serve(options: argparse.Namespace) -> int:
    """Serve until it is told to stop; return 0. Raises PolypromptError."""
    from polyprompt.config import TrackingConfig
    from polyprompt.errors import ConfigError
    from polyprompt.serving import Endpoint, serve_forever
    from polyprompt.serving_app import TOKEN_VARIABLE
    from polyprompt.serving_limits import Limits
    from polyprompt.serving_models import named
    from polyprompt.tracking import resolve_uri

    models: dict[str, str] = {}
    for name, source in map(named, options.model):
        if name in models:
            raise ConfigError(f"--model: two models are called {name}; call one otherwise: NAME={source}")
        models[name] = source
    limits: dict[str, Any] = {
        "rows": options.max_rows,
        "characters": options.max_characters,
        "requests_per_second": options.max_rate,
        "waiting_rows": options.max_waiting,
        "timeout_seconds": options.timeout,
    }
    same = ("host", "port", "replicas", "cpus", "gpu", "batch_rows", "backbone")
    serve_forever(
        Endpoint(
            models=models,
            uri=resolve_uri(TrackingConfig(uri=options.uri)),
            token=os.environ.pop(TOKEN_VARIABLE, ""),  # before Ray hands the environment to the replicas
            limits=Limits(**limits),
            **{name: getattr(options, name) for name in same},
        )
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
