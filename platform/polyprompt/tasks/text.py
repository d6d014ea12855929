"""A user's plain text as a task, written in YAML."""

from polyprompt.errors import ConfigError, DataError, hint
from polyprompt.task_configs import TextConfig, TextTaskConfig
from polyprompt.tasks.records import HubSource, TextSource, TextTask

SUFFIXES = (".txt", ".txt.gz", ".jsonl", ".jsonl.gz", ".parquet")


def text_task_of(config: TextTaskConfig) -> TextTask:
    """Build the task. Raises ConfigError for a split that is missing, DataError for a file that is not there."""
    return TextTask(
        name=config.name,
        source=_source(config.text, f"tasks: {config.name}: text"),
        field=config.text.field,
        objective=config.objective,
        input_tokens=config.input_tokens,
        noise_density=config.noise_density,
        mean_span_length=config.mean_span_length,
        weight=config.weight,
    )


def _source(config: TextConfig, where: str) -> TextSource | HubSource:
    if config.hub:
        if set(config.hub.splits) < {"train", "validation"}:
            raise ConfigError(f"{where}.hub.splits: both train and validation are needed; a part of a split will do")
        splits = {str(split): name for split, name in config.hub.splits.items()}
        return HubSource(config.hub.path, config.hub.config, config.hub.revision, splits)
    files = {str(split): tuple(paths) for split, paths in (config.files or {}).items()}
    for path in (path for paths in files.values() for path in paths):
        if not path.name.lower().endswith(SUFFIXES):
            raise ConfigError(f"{where}.files: {path}: unknown file type; expected one of {', '.join(SUFFIXES)}")
        if not path.is_file():
            near = hint(path.name, [p.name for p in path.parent.iterdir()]) if path.parent.is_dir() else ""
            raise DataError(f"{where}.files: {path} does not exist.{near} Relative paths start at the working folder")
    return TextSource(files, config.held_out)
