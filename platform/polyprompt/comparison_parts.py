"""The parts of a comparison's page below its table: figures, and what the papers look at in trained models."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from polyprompt import comparison_plots as plots
from polyprompt.comparison import Comparison, Setting
from polyprompt.comparison_analysis import METHODS, STACKS, Analysis, attempt, routing
from polyprompt.router_health import describe

Say = Callable[[str], None]


@dataclass(frozen=True)
class Part:
    """A headline, what was found (sentences), a figure and a small table below it. in_words: does it say something
    without its figure? folded: shown when asked for."""

    heading: str
    texts: Sequence[str]
    figure: str = ""
    table: Sequence[Sequence[str]] = ()
    in_words: bool = True
    folded: bool = False


def parts(comparison: Comparison, num_rows: int, say: Say) -> Iterator[Part]:
    """Make the parts, one after the other. say: takes a line for each model that is looked at."""
    yield Part(
        "Score against cost",
        ["Ringed: what no other setting beats at its cost or a lower one. Bars: standard deviation over seeds."],
        plots.svg(plots.front(comparison)),
        in_words=False,
    )
    single = all(len(run.result.evaluations) == 1 for s in comparison.settings for run in s.runs)
    texts = ["Mean over seeds, with their lowest and highest. Dotted: the majority answer."]
    if single:
        texts.append("Every run was scored once only, at its end; evaluate.steps gives curves.")
    yield Part("Learning curves", texts, plots.svg(plots.curves(comparison)), in_words=False)
    yield Part(
        "Training loss by task",
        ["Mean over seeds, with their lowest and highest."],
        plots.svg(plots.losses(comparison)),
        in_words=False,
        folded=True,
    )
    looked_at: dict[int, Analysis] = {}
    for place, setting in enumerate(plots.drawn(comparison)):
        wanted = num_rows > 0 and setting.method in METHODS
        run = setting.runs[0]
        if wanted:
            say(f"{setting.label}: looking at the prompts of {run.bundle}")
        seen = attempt(run.bundle, num_rows) if wanted else None
        yield from _router(setting, seen)
        if isinstance(seen, str):
            yield Part(f"Prompts of {setting.label}", [f"No analysis of the trained model, seed {run.seed}: {seen}."])
        elif seen is not None:
            looked_at[place] = seen
            yield from _prompts(setting, seen)
    yield from _entropy(comparison, looked_at)


def _router(setting: Setting, seen: Analysis | str | None) -> Iterator[Part]:
    """Which task uses which prompt, and is the router well?"""
    run = setting.runs[0]
    logged = routing(run)
    if logged is None:
        return
    routes = [str(route) for route in range(logged.usage.shape[1])]
    tables = {"as trained, noise and all": logged.usage}
    if isinstance(seen, Analysis) and seen.usage is not None:
        tables["in prediction"] = seen.usage[[seen.tasks.index(task) for task in logged.tasks]]
    collapsed = {own.seed: own.result.router_collapse for own in setting.runs if own.result.router_collapse}
    texts = [f"Seed {seed}: {describe(collapse)}." for seed, collapse in collapsed.items()]
    if not collapsed:
        count = len(setting.runs)
        texts.append(f"No router had collapsed at the end ({count} seed{'s' if count > 1 else ''}).")
    points = f"last {logged.num_points} logged points" if logged.num_points > 1 else "last logged point"
    texts.append(
        f"Seed {run.seed}: the part of each task's rows (or of their prompt, where prompts are mixed) that each prompt "
        f"makes up, over the {points}"
        + (
            f", and over {seen.num_rows} validation rows a task"
            if len(tables) > 1 and isinstance(seen, Analysis)
            else ""
        )
        + f". An even share is {1 / len(routes):.2f}. Entropy is a fraction of its highest; margin is the lead of the "
        "likeliest prompt; dead prompts have less than 1 % of their fair share."
    )
    names = [task.rpartition("/")[2] for task in logged.tasks]
    figure = plots.heat(tables, names, dict.fromkeys(tables, routes), name="share", low=0.0, high=1.0, xlabel="prompt")
    table = [["task", "entropy", "margin", "dead prompts", "most used prompt"]]
    for i, (_, line) in enumerate(logged.health.iterrows()):
        most = int(logged.usage[i].argmax())
        table.append(
            [
                names[i],
                f"{line['entropy']:.2f}",
                f"{line['margin']:.2f}",
                f"{line['dead_prompts']:.1f}",
                f"{most} ({logged.usage[i, most]:.0%})",
            ]
        )
    yield Part(f"Router of {setting.label}", texts, plots.svg(figure), table)


def _prompts(setting: Setting, seen: Analysis) -> Iterator[Part]:
    """How alike are the tasks' prompts, and how much do the layers attend to them?"""
    if not seen.similarity:
        return
    seed = setting.runs[0].seed
    names = [task.rpartition("/")[2] for task in seen.tasks]
    rows = f"seed {seed}, {seen.num_rows} validation rows a task at most"
    if len(seen.tasks) > 1:
        texts = [f"Cosine of the tasks' keys and values, all layers of a stack as one vector ({rows})."]
        for stack, table in seen.similarity.items():
            pairs = sorted((table[i, j], i, j) for i in range(len(table)) for j in range(i))
            (low, *least), (high, *most) = pairs[0], pairs[-1]
            mean = sum(pair[0] for pair in pairs) / len(pairs)
            texts.append(
                f"{stack.capitalize()}: mean {mean:.2f}; most alike {names[most[1]]} and {names[most[0]]} "
                f"({high:.2f}), least {names[least[1]]} and {names[least[0]]} ({low:z.2f})."
            )
        figure = plots.heat(
            seen.similarity, names, dict.fromkeys(seen.similarity, names), name="cosine", low=-1.0, high=1.0
        )
        yield Part(f"Similarity of the tasks' prompts, {setting.label}", texts, plots.svg(figure))
    texts = [
        f"The part of self-attention that falls on prompt keys: a mean over heads, queries and rows ({rows}). Dotted: "
        "what they would get if every key that a query sees had the same weight."
    ]
    for stack, table in seen.attention.items():
        layers = ", ".join(f"{value:.0%}" for value in table.mean(axis=0))
        texts.append(
            f"{stack.capitalize()}, layer by layer, mean of tasks: {layers}; even weights: {seen.even[stack]:.0%}."
        )
    tables = {stack: dict(enumerate(table)) for stack, table in seen.attention.items()}
    figure = plots.by_layer(tables, dict(enumerate(names)), "attention on prompts", seen.even)
    yield Part(f"Attention on prompts, {setting.label}", texts, plots.svg(figure))


def _entropy(comparison: Comparison, looked_at: Mapping[int, Analysis]) -> Iterator[Part]:
    """How widely do the layers look at the text, beside a model without prompts?"""
    lines = {place: seen for place, seen in looked_at.items() if seen.entropy}
    if not lines:
        return
    labels = {place: comparison.settings[place].label for place in lines}
    texts = [
        "Entropy of self-attention over the text alone, prompt keys left out, as a part of the highest there can be: a "
        "mean over heads, queries that see more than one token, rows and tasks (first seed). That of full is of a "
        "network without prompts."
    ]
    stacks = {stack for seen in lines.values() for stack in seen.entropy}
    tables = {
        stack: {place: seen.entropy[stack].mean(axis=0) for place, seen in lines.items() if stack in seen.entropy}
        for stack in STACKS
        if stack in stacks
    }
    for stack, table in tables.items():
        for place, values in table.items():
            texts.append(f"{stack.capitalize()}, {labels[place]}: {', '.join(f'{value:.0%}' for value in values)}.")
    yield Part("Entropy of attention over the text", texts, plots.svg(plots.by_layer(tables, labels, "entropy")))
