"""Hold our methods, PEFT's and those of `adapters` to the conformance checks, and show who passes what.

    python jobs/conformance.py --out DIR [--libraries polyprompt PEFT adapters] [--families t5 gpt2 …]
                               [--methods NAME …] [--checks NAME …] [--all]

Writes DIR/conformance.md and DIR/conformance.json; what is in DIR is not done again. All models are
tiny and random. `adapters` pins an older transformers: its environment is made with pip in DIR/adapters_env. Needs
the dev extra (peft). docs/conformance.md.
"""

import argparse
import json
import platform
import sys
import time
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence, Set
from importlib.metadata import version
from itertools import product
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "platform"))

import test_methods
import tiny
import transformers
from conformance import isolated, ours, with_adapters, with_peft
from conformance.checks import CHECKS
from conformance.results import Key, Result, hold
from rich.console import Console
from rich.table import Table

from polyprompt import __version__
from polyprompt.errors import ConfigError, PolypromptError, hint

LIBRARIES = ("polyprompt", "PEFT", "adapters")


def first_of_each_method() -> list[str]:
    """Return the names of the first configuration of each of our methods."""
    names: dict[type, str] = {}
    for name, config in test_methods.CONFIGS.items():
        names.setdefault(type(config), name)
    return list(names.values())


def read(file: Path, found: Mapping[str, str]) -> list[Result]:
    """Return the results of an earlier call. Raises ConfigError if they are of other versions."""
    if not file.exists():
        file.write_text(json.dumps(found) + "\n")
    first, *rest = file.read_text().splitlines()
    if json.loads(first) != found:
        raise ConfigError(f"{file} holds results of {first}, but here is {json.dumps(found)}. Give another --out")
    return [Result(*json.loads(line)) for line in rest]


def run(options: argparse.Namespace, done: Set[Key], notes: list[str]) -> Iterator[Result]:
    """Yield what comes of all that was asked for and is not done; notes: what could not be run is said there."""

    def chosen(names: Iterable[str], wanted: Sequence[str] | None) -> list[str]:
        return [name for name in names if wanted is None or name in wanted]

    checks = chosen(CHECKS, options.checks)
    if "polyprompt" in options.libraries:
        names = list(test_methods.CONFIGS) if options.all or options.methods else first_of_each_method()
        cells = product(chosen(names, options.methods), chosen(ours.FAMILIES, options.families))
        yield from hold((ours.Ours(*cell) for cell in cells), checks, done)
    if "PEFT" in options.libraries:
        cells = product(chosen(with_peft.METHODS, options.methods), chosen(with_peft.FAMILIES, options.families))
        yield from hold((with_peft.Peft(*cell) for cell in cells), checks, done)
    if "adapters" in options.libraries:
        families, methods = (
            chosen(with_adapters.FAMILIES, options.families),
            chosen(with_adapters.METHODS, options.methods),
        )
        if families and methods:
            try:
                python = isolated.environment(options.out / "adapters_env")
            except isolated.NoEnvironmentError as error:
                notes.append(f"adapters was not run: {error}")
                return
            found = ", ".join(f"{name} {number}" for name, number in isolated.versions(python).items())
            notes.append(f"adapters ran in an environment of its own: {found}.")
            yield from isolated.results(python, {f: tiny.folder(f) for f in families}, methods, checks, done)


def cell(results: Sequence[Result]) -> str:
    """Return what came of one check of one method on all families: ✓, ✗, –, or how many families pass."""
    held = [r for r in results if r.status != "n/a"]
    passed = sum(r.status == "pass" for r in held)
    if not held:
        return "–"
    return "✓" if passed == len(held) else "✗" if not passed else f"{passed}/{len(held)}"


def lines(results: Sequence[Result]) -> list[list[str]]:
    """Return the table's lines: headings, then one for each method of each library."""
    checks = [check for check in CHECKS if any(r.check == check for r in results)]
    rows: dict[tuple[str, str], list[Result]] = {}
    for result in results:
        rows.setdefault((result.library, result.method), []).append(result)
    body = [["library", "method", *checks]]
    for (library, method), own in sorted(rows.items(), key=lambda row: LIBRARIES.index(row[0][0])):
        body.append([library, method, *(cell([r for r in own if r.check == check]) for check in checks)])
    return body


def reasons(results: Sequence[Result]) -> list[list[str]]:
    """Return the second table's lines: every failure and n/a with its reason, equal ones together."""
    groups: dict[tuple[str, ...], list[Result]] = {}
    for r in results:
        if r.status != "pass":
            # The numbers in a failure's reason differ from family to family.
            same = r.method if r.status == "fail" else r.reason
            groups.setdefault((r.status, r.library, r.check, same), []).append(r)
    body = [["", "library", "check", "where", "reason"]]
    for (status, library, check, _), own in sorted(groups.items()):
        methods, families = dict.fromkeys(r.method for r in own), dict.fromkeys(r.family for r in own)
        body.append([status, library, check, f"{', '.join(methods)}: {', '.join(families)}", own[0].reason])
    return body


def markdown(body: Sequence[Sequence[str]]) -> str:
    """Return the lines as a Markdown table."""
    rows = [f"| {' | '.join(entry.replace('|', '¦') for entry in row)} |" for row in body]
    return "\n".join([rows[0], "|---" * len(body[0]) + "|", *rows[1:]]) + "\n"


def show(body: Sequence[Sequence[str]], console: Console) -> None:
    table = Table(*body[0])
    for row in body[1:]:
        table.add_row(*row)
    console.print(table)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder of the tables and of the environment")
    parser.add_argument("--all", action="store_true", help="every configuration of our methods, not one of each")
    methods = [*test_methods.CONFIGS, *with_peft.METHODS, *with_adapters.METHODS]
    for key, known in (
        ("libraries", LIBRARIES),
        ("families", ours.FAMILIES),
        ("methods", methods),
        ("checks", list(CHECKS)),
    ):
        parser.add_argument(f"--{key}", nargs="+", metavar="NAME", default=LIBRARIES if key == "libraries" else None)
        parser.set_defaults(**{f"known_{key}": known})
    options = parser.parse_args()
    for key in ("libraries", "families", "methods", "checks"):
        known = getattr(options, f"known_{key}")
        for name in getattr(options, key) or ():
            if name not in known:
                raise ConfigError(f"--{key} {name} is unknown; expected some of {', '.join(known)}.{hint(name, known)}")
    return options


def main() -> int:
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    try:
        options = parse()
        options.out.mkdir(parents=True, exist_ok=True)
        found = {name: version(name) for name in ("torch", "transformers", "peft")}
        file = options.out / "results.jsonl"
        results = read(file, found)
    except PolypromptError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    console, notes, start = Console(stderr=True), list[str](), time.monotonic()
    with console.status("") as status, file.open("a") as kept:
        for result in run(options, {r[:4] for r in results}, notes):
            results.append(result)
            kept.write(json.dumps(result) + "\n")
            kept.flush()
            status.update(f"{len(results)} checks; {result.library} {result.method} on {result.family}: {result.check}")
    command = " ".join(["jobs/conformance.py", *sys.argv[1:]])
    notes[:0] = [
        f"`{command}`",
        f"polyprompt {__version__}, {', '.join(f'{n} {v}' for n, v in found.items())}, "
        f"Python {platform.python_version()}; "
        f"{len(results)} checks in {time.monotonic() - start:.0f} s.",
    ]
    table, why = lines(results), reasons(results)
    text = "\n\n".join([*notes, markdown(table), markdown(why)]).rstrip() + "\n"
    (options.out / "conformance.md").write_text(text)
    record = {"command": command, "versions": found, "notes": notes, "results": [r._asdict() for r in results]}
    (options.out / "conformance.json").write_text(json.dumps(record, indent=1))
    out = Console()
    for note in notes:
        out.print(note, markup=False)
    show(table, out)
    show(why, out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
