"""What a case needs to stand on: a backbone's folder, and a config as a recipe would give it."""

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.cases import Backbone, Case
from polyprompt.backbone import EMBEDDED
from polyprompt.config import RunConfig
from polyprompt.errors import ConfigError
from polyprompt.recipe import check

#: config.json of models whose shape is measured; the weights are random. Vocabularies are the models' own, the
#: tokenizer is the embedded one: its 8,192 pieces cut a text into more tokens than T5's 32,000 would.
SHAPES: dict[Backbone, dict[str, Any]] = {
    "t5-base": {
        "model_type": "t5", "d_model": 768, "d_kv": 64, "d_ff": 3072, "num_heads": 12, "num_layers": 12,
        "num_decoder_layers": 12, "vocab_size": 32128, "dropout_rate": 0.1, "n_positions": 512,
    },
    "t5-small": {
        "model_type": "t5", "d_model": 512, "d_kv": 64, "d_ff": 2048, "num_heads": 8, "num_layers": 6,
        "num_decoder_layers": 6, "vocab_size": 32128, "dropout_rate": 0.1, "n_positions": 512,
    },
    "smollm2": {
        "model_type": "llama", "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30,
        "num_attention_heads": 9, "num_key_value_heads": 3, "vocab_size": 49152, "max_position_embeddings": 2048,
        "tie_word_embeddings": True, "rms_norm_eps": 1e-5,
    },
}  # fmt: skip
_T5 = {
    "is_encoder_decoder": True, "pad_token_id": 0, "eos_token_id": 1, "decoder_start_token_id": 0,
    "feed_forward_proj": "relu", "relative_attention_num_buckets": 32, "relative_attention_max_distance": 128,
}  # fmt: skip
EMBEDDED_TASKS = [
    f"embedded/{name}"
    for name in ("sentiment", "acceptability", "nli", "paraphrase", "wic", "boolq", "copa", "similarity")
]
SUPER_GLUE = [f"super_glue/{name}" for name in ("boolq", "cb", "copa", "multirc", "record", "rte", "wic", "wsc")]
GLUE = [f"glue/{name}" for name in ("cola", "sst2", "mrpc", "stsb", "qqp", "mnli", "qnli", "rte", "wnli")]
TASKS = {
    "superglue": SUPER_GLUE,
    "glue": GLUE,
    # RTE is in both benchmarks.
    "mixture": [*SUPER_GLUE, *(name for name in GLUE if name != "glue/rte")],
    # Those that have choices.
    "choices": EMBEDDED_TASKS[:-1],
}
#: Enough for every batch here; a run would go on.
ENDLESS = 10**9
#: Real inputs are cut there, the same for every case: with the longest prompt here they fill T5's 512 tokens.
INPUT_TOKENS = 412
#: Of each task: what a limit of examples-proportional mixing leaves of the large ones, and enough to score.
TRAIN_ROWS, VALIDATION_ROWS = 2000, 48


@dataclass(frozen=True)
class Setting:
    """Where things are. out: the benchmark's folder. data: with <task>/{train,validation}.jsonl. threads: of each case.
    trained: a run whose weights serve the cases that need some."""

    out: Path
    data: Path
    threads: int
    device: str
    trained: Path | None = None

    def backbone(self, name: Backbone) -> dict[str, Any]:
        """Return the recipe's section `backbone`, its folder made."""
        if name == "embedded":
            return {"name": "embedded"}
        folder = self.out / "backbones" / name
        folder.mkdir(parents=True, exist_ok=True)
        shape = SHAPES[name]
        more = _T5 if shape["model_type"] == "t5" else {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 1}
        (folder / "config.json").write_text(json.dumps({**more, **shape}, indent=1))
        for file in ("tokenizer.json", "tokenizer_config.json"):
            shutil.copy(EMBEDDED / file, folder / file)
        # The embedded tokenizer knows no newline.
        end = {} if shape["model_type"] == "t5" else {"input_end": "</s>"}
        return {"name": str(folder), "init": "random", **end}


def config_of(case: Case, setting: Setting) -> RunConfig:
    """Return the run that a case is. Raises ConfigError where its rows are not there."""
    if case.real and not setting.data.is_dir():
        raise ConfigError(
            f"--data {setting.data} does not exist; {case.name!r} reads real rows: give a folder with "
            "<task>/{train,validation}.jsonl in the official fields"
        )
    return check(
        {
            "backbone": setting.backbone(case.backbone),
            # PEFT's backbones are frozen, and so stored, as those of our prompts are.
            "method": {"name": "prompt_tuning"} if case.side.startswith("peft_") else case.method,
            "tasks": TASKS.get(str(case.lengths), EMBEDDED_TASKS),
            "data": {
                "root": str(setting.data) if case.real else None,
                "max_input_tokens": case.lengths if isinstance(case.lengths, int) else INPUT_TOKENS,
                "max_train_examples": TRAIN_ROWS,
                "max_validation_examples": VALIDATION_ROWS,
            },
            # The mixture is that of the examples; a single benchmark's tasks are drawn alike.
            "mixture": {"kind": "proportional" if case.lengths == "mixture" else "uniform"},
            "train": {
                "max_steps": ENDLESS,
                "batch_size": case.rows,
                "num_shards": case.shards,
                "learning_rate": 1e-4,
                "precision": case.precision,
                "logging_steps": 10 if case.loop == "tracked" else 1,
            },
            "evaluate": {"batch_size": case.rows},
            "compute": {
                "num_workers": 0,
                "cpus_per_worker": case.threads or setting.threads,
                "use_gpu": setting.device == "cuda",
            },
            "tracking": {"enabled": case.loop == "tracked", "uri": f"sqlite:///{setting.out / 'mlflow.db'}"},
        }
    )
