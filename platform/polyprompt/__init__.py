"""polyprompt: multi-task learning with prompt-based task conditioning, on Ray."""

__version__ = "0.1.0"
