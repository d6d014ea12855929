"""Put a trained run into MLflow's model registry, or make a version the champion.

    python jobs/register.py runs/mine --name support-tasks [--uri URI]
    python jobs/register.py --promote support-tasks [--version 3] [--uri URI]

The first makes a new version, the `candidate`. The second makes the candidate (or a version) the `champion`; it is
refused where it scores worse than the present champion, or was scored on other data. URI: as tracking.uri
($MLFLOW_TRACKING_URI, else mlflow.db here).
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "platform"))

from polyprompt.command import exit_status


def main() -> int:
    """Read the command line, register or promote; return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", nargs="?", type=Path, help="a finished run's folder")
    parser.add_argument("--name", help="of the registered model")
    parser.add_argument("--promote", metavar="NAME", help="make a version of this model the champion")
    parser.add_argument("--version", help="which one (the candidate)")
    parser.add_argument("--uri", help="of the tracking store")
    options = parser.parse_args()
    if (options.run is None) == (options.promote is None):
        parser.error("name a run's folder to register, or --promote NAME")
    if options.run is not None and not options.name:
        parser.error("--name: the registered model needs a name")

    def act() -> int:
        from polyprompt import registry, tracking
        from polyprompt.config import TrackingConfig

        uri = tracking.resolve_uri(TrackingConfig(uri=options.uri))
        if options.promote:
            version = registry.promote(options.promote, uri, options.version)
            print(f"{version.uri} is the champion: models:/{version.name}@champion")
        else:
            version = registry.register(options.run.absolute(), options.name, uri)
            print(f"{version.uri} is the candidate: models:/{version.name}@candidate")
        return 0

    return exit_status(act, stopped="stopped")


if __name__ == "__main__":
    sys.exit(main())
