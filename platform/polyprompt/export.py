"""A trained run as something to hand on: folded tables, or a folder that PEFT or transformers loads. Each has a card.

folded   a bundle whose prompts are plain tables by task: no hypernetwork or re-parameterisation is computed any more
peft     what PEFT can compute: prompts before the input, a folder for each task, and LoRA
hf       weights and tokenizer, for runs that trained the network (or LoRA, merged into it), and the prompts beside
"""

import importlib.util
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors.torch
import torch

from polyprompt import checkpoint, folding
from polyprompt.checkpoint import Bundle
from polyprompt.errors import ConfigError
from polyprompt.folding import Folded
from polyprompt.method_configs import LoRAConfig
from polyprompt.methods.lora import LoRA
from polyprompt.model import PromptedModel, input_limit
from polyprompt.plan import model_of

PROMPTS, TABLES, CARD = "prompts.safetensors", "prompts.json", "README.md"
#: PEFT's own name.
PEFT_WEIGHTS = "adapter_model.safetensors"


def folded(bundle: Path, out: Path, backbone: str | None = None) -> Path:
    """Write the bundle with its prompts folded, as a bundle of its own; return its folder.

    backbone: where it is now, if not where it was in training. Raises ConfigError for a method that cannot be folded,
    and where `out` exists.
    """
    _check_free(out)
    opened, model = _load(bundle, backbone)
    if isinstance(opened.config.method, LoRAConfig) and opened.config.method.rank:
        raise ConfigError("LoRA's update is folded into the weights themselves: --format hf")
    tables, texts = _fold(opened, model)
    plain = PromptedModel(model.backbone, Folded(tables, texts))
    names: dict[str, Any] = {"names": sorted(tables), "texts": texts}
    checkpoint.write_folded(opened, out, plain.trained_state(), names)
    (out / CARD).write_text(card(opened, "a folded bundle: prompts by task as plain tables", _USE_BUNDLE), "utf-8")
    return out


def hub_folder(bundle: Path, out: Path, backbone: str | None = None) -> Path:
    """Write the trained network as a folder that transformers loads, its prompts beside it; return the folder.

    Raises ConfigError where the network was not trained, for a method whose prompts cannot be folded, and where `out`
    exists.
    """
    _check_free(out)
    opened, model = _load(bundle, backbone)
    lora = isinstance(opened.config.method, LoRAConfig)
    if opened.config.train_backbone is False and not lora:
        raise ConfigError(
            f"{bundle} trained prompts on a frozen backbone, whose weights are those of "
            f"{opened.backbone['name']!r} still; export it with --format folded"
        )
    tables, texts = ({}, {}) if lora else _fold(opened, model)
    model.method.leave(model.backbone.model)
    with checkpoint.filled(out) as draft:
        model.backbone.save(draft)
        if tables:
            safetensors.torch.save_file(tables, draft / PROMPTS, metadata={"format": "pt"})
            order = {"tasks": opened.config.task_names, "names": sorted(tables), "texts": texts}
            (draft / TABLES).write_text(json.dumps(order, indent=1))
        (draft / CARD).write_text(card(opened, "weights that transformers loads", _USE_HF), "utf-8")
    return out


def peft_folder(bundle: Path, out: Path, backbone: str | None = None) -> Path:
    """Write what PEFT loads with equal logits: prompts before the input (as PEFT's prompt tuning), or LoRA.

    Of prompts a folder for each task, named after it. Raises ConfigError with the reason for what PEFT cannot compute,
    and where `out` exists.
    """
    _check_free(out)
    opened, model = _load(bundle, backbone)
    if opened.config.train_backbone is not False:
        raise ConfigError(
            f"{bundle} trained the backbone too, which PEFT's folders do not hold; use --format hf or folded"
        )
    if importlib.util.find_spec("peft") is None:
        raise ConfigError("--format peft needs the package peft; install it: pip install 'polyprompt[peft]'")
    kind = "CAUSAL_LM" if model.backbone.dims(1).encoder is None else "SEQ_2_SEQ_LM"
    tables: dict[str, Any] = {}
    if not isinstance(model.method, LoRA):
        tables, _ = _fold(opened, model)
        if set(tables) != {"inputs_KPH"}:
            raise ConfigError(
                f"method.name={opened.config.method.name} is more than prompts before the input, and PEFT has nothing "
                "that computes it: its prefixes never reach T5's encoder, and in a decoder-only model they move the "
                "text to other positions. Use --format folded"
            )
    with checkpoint.filled(out) as draft:
        if isinstance(model.method, LoRA):
            _write_lora(model.method, opened, kind, draft)
        else:
            for task, prompt_PH in zip(opened.config.task_names, tables["inputs_KPH"], strict=True):
                _write_prompts(prompt_PH, opened, kind, draft / task.replace("/", "_"))
        (draft / CARD).write_text(card(opened, "a folder that PEFT loads", _USE_PEFT), "utf-8")
    return out


def _write_prompts(prompt_PH: torch.Tensor, bundle: Bundle, kind: str, folder: Path) -> None:
    from peft import PromptTuningConfig

    PromptTuningConfig(
        task_type=kind,
        num_virtual_tokens=prompt_PH.shape[0],
        token_dim=prompt_PH.shape[1],
        num_transformer_submodules=1,
        base_model_name_or_path=str(bundle.backbone["name"]),
        inference_mode=True,
    ).save_pretrained(folder)
    # Not a view into the table of all tasks, which would be written whole.
    safetensors.torch.save_file(
        {"prompt_embeddings": prompt_PH.clone()}, folder / PEFT_WEIGHTS, metadata={"format": "pt"}
    )


def _write_lora(method: LoRA, bundle: Bundle, kind: str, folder: Path) -> None:
    from peft import LoraConfig

    modules = [name.replace("/", ".") for name in method.layers]
    LoraConfig(
        task_type=kind,
        r=method.config.rank,
        lora_alpha=method.config.alpha,
        target_modules=modules,
        base_model_name_or_path=str(bundle.backbone["name"]),
        inference_mode=True,
    ).save_pretrained(folder)
    weights = {}
    for name, layer in zip(modules, method.layers.values(), strict=True):
        maps: Any = layer
        for part, linear in (("A", maps["down"]), ("B", maps["up"])):
            weights[f"base_model.model.{name}.lora_{part}.weight"] = linear.weight.detach().clone()
    safetensors.torch.save_file(weights, folder / PEFT_WEIGHTS, metadata={"format": "pt"})


_USE_PEFT = """    PeftModel.from_pretrained(AutoModelForSeq2SeqLM.from_pretrained(BACKBONE), "DIR/TASK")

(`AutoModelForCausalLM` for a decoder-only backbone; LoRA lies in DIR itself). The text of a row is what the task's
format makes of it."""
_USE_BUNDLE = """    python jobs/predict.py --model DIR --input questions.jsonl --output answers.jsonl

or `polyprompt.predictor.Predictor(Path("DIR"))`. It cannot be trained further; the bundle it was made of can."""
_USE_HF = """    AutoModelForSeq2SeqLM.from_pretrained("DIR"), AutoTokenizer.from_pretrained("DIR")

`prompts.safetensors`, where there is one, holds the prompts by task (`prompts.json` has the order), which transformers
does not apply: without them the model is the network alone."""


def card(bundle: Bundle, what: str, use: str) -> str:
    """Return the card (Markdown): what it is, how it was trained, its scores, how to use it."""
    config, state = bundle.config, bundle.state
    step = int(state["train"]["step"])
    lines = [
        f"# {config.name or config.method.name}",
        "",
        f"Made by polyprompt: {what}. Method `{config.method.name}` on `{bundle.backbone['name']}` (sha256 "
        f"`{str(bundle.backbone['sha256'])[:12]}`), {step:,} steps of {config.train.batch_size} rows.",
        "",
        "## Scores on the validation splits",
        "",
        "| task | score |",
        "|---|---|",
        *(f"| {task} | {values['score']:.4f} |" for task, values in _scores(state, step).items()),
        "",
        "## Use",
        "",
        use,
    ]
    return "\n".join(lines) + "\n"


def _scores(state: Mapping[str, Any], step: int) -> Mapping[str, Mapping[str, float]]:
    """Return the newest evaluation up to the bundle's step; a bundle between two has none of its own."""
    evaluations = [e for e in state["train"]["evaluations"] if e["step"] <= step]
    return evaluations[-1]["tasks"] if evaluations else {}


def _load(bundle: Path, backbone: str | None) -> tuple[Bundle, PromptedModel]:
    opened = checkpoint.read(bundle)
    # Whatever it was trained in: tables and merged weights are not rounded to bf16.
    train = opened.config.train.model_copy(update={"precision": "fp32"})
    config = opened.config.with_backbone_at(backbone).model_copy(update={"train": train})
    if opened.folded is not None:
        raise ConfigError(f"{bundle} is folded already; export the bundle that it was made of")
    return opened, model_of(config, len(config.tasks), opened).eval()


def _fold(bundle: Bundle, model: PromptedModel) -> tuple[dict[str, Any], dict[str, Any]]:
    dims = model.backbone.dims(len(bundle.config.tasks))
    limit = input_limit(bundle.config, model.backbone, model.method)
    return folding.fold(model.method, dims.num_tasks, dims.hidden, limit)


def _check_free(out: Path) -> None:
    if out.exists():
        raise ConfigError(f"--out {out} exists; choose another folder")
