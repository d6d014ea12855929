"""What is shown of the results: rich tables, Markdown, a plot."""

from collections.abc import Iterator, Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table

from benchmarks.cases import Group
from benchmarks.ratios import RATIOS
from benchmarks.results import Found, Machine, Measured, Results, Spread, found, total_bytes
from polyprompt.errors import ConfigError
from polyprompt.result import write_whole

BEGIN, END = "<!-- benchmark -->", "<!-- /benchmark -->"
RATIO_HEADINGS = ("Ratio", "Measured", "Range over turns", "Bound", "Met")
CASE_HEADINGS = (
    "Case", "Step, s", "Range", "Examples/s", "Real tokens/s", "GFLOP/example", "Inference GFLOP",
    "Closed form ÷ counted", "Of GEMM", "Above backbone, MiB", "All tensors, MiB",
    "Without activations, MiB", "Resident peak, MiB",
)  # fmt: skip
#: What a terminal has room for; the rest is in the Markdown.
SHORT = ("Case", "Step, s", "Examples/s", "Real tokens/s", "Of GEMM", "Above backbone, MiB", "Without activations, MiB")
Row = tuple[str, ...]


def ratios(results: Results) -> list[Found]:
    """Return the ratios whose groups were measured."""
    return [one for ratio in RATIOS if (one := found(ratio, results.groups)) is not None]


def _shown(results: Results) -> list[tuple[str, tuple[Group, list[Measured]]]]:
    """The groups whose figures are not in a table of their own."""
    return [(name, found) for name, found in results.groups.items() if len(found[1]) > 1]


def ratio_row(one: Found) -> Row:
    spread = "" if one.value.low == one.value.high else f"{one.value.low:.3g} to {one.value.high:.3g}"
    sign = "≥" if one.ratio.direction == "at least" else "≤"
    return one.ratio.name, f"{one.value.median:.3g}", spread, f"{sign} {one.ratio.bound:g}", "yes" if one.met else "no"


def case_row(measured: Measured, gemm: Measured | None) -> Row:
    """Return the figures of a case. gemm: of its group, if there is one."""
    facts = measured.facts
    if measured.case.kind == "gemm":
        rate = Spread.of([rate / 1e9 for rate in measured.rates])
        return measured.case.name, "", f"{rate.low:.0f} to {rate.high:.0f} GFLOP/s", *[""] * 10
    seconds, speed = Spread.of(measured.step_seconds), Spread.of(measured.examples_per_second).median

    used = ""
    if gemm is not None and "step_flops" in facts:
        used = f"{Spread.of([a / b for a, b in zip(measured.flops_per_second, gemm.rates, strict=True)]).median:.2f}"
    counted, closed = facts.get("inference_flops"), facts.get("closed_inference_flops")
    return (
        measured.case.name,
        f"{seconds.median:.3g}",
        f"{seconds.low:.3g} to {seconds.high:.3g}",
        f"{speed:.3g}",
        f"{facts['real_tokens'] / seconds.median:.0f}" if "real_tokens" in facts else "",
        f"{facts['step_flops'] / facts['rows'] / 1e9:.3g}" if "step_flops" in facts else "",
        "" if counted is None else f"{counted / 1e9:.3g}",
        "" if counted is None or closed is None else f"{closed / counted:.3f}",
        used,
        *_memory(measured),
    )


def _memory(measured: Measured) -> Row:
    """Above the backbone, in all, without activations, resident; MiB."""
    facts, whole = measured.facts, {"method_bytes", "peak_step_bytes"} <= measured.facts.keys()
    sizes = (
        measured.above_backbone_bytes if whole else None,
        total_bytes(measured) if whole else None,
        facts.get("held_bytes"),
        facts.get("peak_resident_bytes"),
    )
    return tuple("" if size is None else f"{size / 2**20:.0f}" for size in sizes)


def group_rows(measured: Sequence[Measured]) -> Iterator[Row]:
    gemm = next((one for one in measured if one.case.kind == "gemm"), None)
    return (case_row(one, gemm) for one in measured)


def describe(group: Group) -> str:
    """Say on what a group was measured."""
    case = group.cases[0]
    lengths = f"{case.lengths} tokens" if isinstance(case.lengths, int) else f"{case.lengths} rows"
    return (
        f"{case.kind}, {case.backbone}, {case.precision}, {lengths}, {case.rows} examples a step in {case.shards} "
        f"blocks, {case.batches} batches, {group.turns} turns"
    )


def tables(results: Results) -> Iterator[Table]:
    """Yield the closing tables of the terminal."""
    for name, (group, measured) in _shown(results):
        yield _table(f"{name}: {describe(group)}", *_without_empty(CASE_HEADINGS, list(group_rows(measured)), SHORT))
    for title, (headings, cells) in results.tables.items():
        yield _table(title, tuple(headings), [tuple(row) for row in cells])
    if rows := [ratio_row(one) for one in ratios(results)]:
        yield _table("Ratios", RATIO_HEADINGS, rows)


def _table(title: str, headings: Row, rows: Sequence[Row]) -> Table:
    shown = Table(title=title)
    for number, heading in enumerate(headings):
        shown.add_column(heading, justify="right" if number else "left")
    for row in rows:
        shown.add_row(*row)
    return shown


def _without_empty(headings: Row, rows: Sequence[Row], wanted: Row = CASE_HEADINGS) -> tuple[Row, list[Row]]:
    """Leave out the columns that no row fills, and those that are not wanted."""
    kept = [i for i, heading in enumerate(headings) if heading in wanted and any(row[i] for row in rows)]
    return tuple(headings[i] for i in kept), [tuple(row[i] for i in kept) for row in rows]


def markdown(results: Results, command: str) -> str:
    """Return all tables, and where they come from."""
    text = [f"{_where(results.machine)}\n\n    {command}\n"]
    if rows := [ratio_row(one) for one in ratios(results)]:
        text += ["### Ratios\n", _markdown(RATIO_HEADINGS, rows)]
    for name, (group, measured) in _shown(results):
        headings, rows = _without_empty(CASE_HEADINGS, list(group_rows(measured)))
        text += [f"### {name[0].upper()}{name[1:]}\n", f"{describe(group)}\n", _markdown(headings, rows)]
    for title, (own_headings, cells) in results.tables.items():
        text += [f"### {title}\n", _markdown(tuple(own_headings), [tuple(row) for row in cells])]
    return "\n".join(text)


def _where(machine: Machine) -> str:
    return (
        f"{machine.processor}, {machine.num_cpus} CPUs, {machine.threads} threads, device {machine.device}, "
        f"{machine.memory_gib} GiB; {machine.system}; torch {machine.torch}, transformers {machine.transformers}; "
        f"commit {machine.commit or 'unknown'}."
    )


def _markdown(headings: Row, rows: Sequence[Row]) -> str:
    lines = ["| " + " | ".join(cells) + " |" for cells in (headings, *rows)]
    lines.insert(1, "|---" + "|---:" * (len(headings) - 1) + "|")
    return "\n".join(lines) + "\n"


def into_page(page: Path, text: str) -> None:
    """Put the tables between the marks of a page. Raises ConfigError where it has none."""
    whole = page.read_text() if page.is_file() else ""
    before, begin, rest = whole.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not (begin and end):
        raise ConfigError(f"--page {page} needs the marks {BEGIN} and {END}, between which the tables go; add them")
    write_whole(page, f"{before}{BEGIN}\n{text}{END}{after}".encode())


def plot(results: Results, path: Path) -> None:
    """Draw each ratio against its bound: the bar is the figure over the bound, turned so that 1 and more is met."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    found_ratios = [one for one in ratios(results) if one.ratio.quantity != "loss"]
    if not found_ratios:
        return
    figure, axes = plt.subplots(figsize=(9, 0.5 + 0.35 * len(found_ratios)), layout="constrained")
    for at, one in enumerate(reversed(found_ratios)):
        up = one.ratio.direction == "at least"
        ends = sorted(value / one.ratio.bound if up else one.ratio.bound / value for value in one.value)
        axes.barh(at, ends[1], color="tab:green" if one.met else "tab:red", height=0.6)
        axes.plot([ends[0], ends[2]], [at, at], color="black", linewidth=1)
    axes.axvline(1, color="black", linestyle=":")
    axes.set_yticks(range(len(found_ratios)), [one.ratio.name for one in reversed(found_ratios)], fontsize=8)
    axes.set_xlabel("over its bound: 1 or more is met; lines: range over turns")
    figure.savefig(path, dpi=120)
    plt.close(figure)


def write(results: Results, folder: Path, command: str) -> list[Path]:
    """Write results.json, benchmark.md and benchmark.png; return what is there."""
    results.write(folder / "results.json")
    write_whole(folder / "benchmark.md", markdown(results, command).encode())
    plot(results, folder / "benchmark.png")
    return [path for name in ("results.json", "benchmark.md", "benchmark.png") if (path := folder / name).exists()]


def show(results: Results, console: Console) -> None:
    for table in tables(results):
        console.print(table)
