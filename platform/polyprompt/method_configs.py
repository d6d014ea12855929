"""The config sections of the methods: a part of config.py."""

from importlib.util import find_spec
from typing import Annotated, ClassVar, Literal, Self, get_args

from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt, model_validator

from polyprompt.section import AbsolutePath, Section

#: Parameters of a group share a learning rate.
ParameterGroup = Literal["prompt", "router", "hypernetwork", "backbone", "embedding", "task", "adapter"]
#: gelu_new is the tanh approximation.
Activation = Literal["gelu", "gelu_new", "relu", "swish"]


class MethodSection(Section):
    """What is common to all methods."""

    #: The groups that its own parameters may come in. Not stated: any.
    groups: ClassVar[frozenset[ParameterGroup]] = frozenset(get_args(ParameterGroup))

    name: str

    def _needs(self, key: str, met: bool, condition: str) -> None:
        """Refuse a value that would do nothing. The default passes: a resolved config states every key."""
        value, default = getattr(self, key), type(self).model_fields[key].default
        if not met and value != default:
            raise ValueError(
                f"method.{key}={value} does nothing without {condition}; drop it (which leaves {default}), or set "
                f"{condition}"
            )


class FullConfig(MethodSection):
    """Plain multi-task fine-tuning: no prompts, every backbone weight trained."""

    groups = frozenset()
    name: Literal["full"] = "full"


class PromptStartConfig(MethodSection):
    """What input prompts start from.

    vocabulary: rows of the embedding matrix, drawn from the 5,000 most common pieces. normal: N(0, init_std^2). zero.
    labels: the mean embedding of each choice of the task, then vocabulary. text: init_text, repeated or cut to length.
    file: init_file.
    """

    init: str
    #: Of init=normal.
    init_std: PositiveFloat
    #: One text for all prompts, or a list with one for each (tasks in order, or the router's prompts).
    init_text: str | list[str] | None = None
    #: A bundle's folder, or a .safetensors file with one tensor [prompts or 1, length, hidden] or [length, hidden].
    #: Of a bundle with prompts for several tasks each task takes the prompt of its own name.
    init_file: AbsolutePath | None = None

    @model_validator(mode="after")
    def _start_fits(self) -> Self:
        for key, init, value in (("init_text", "text", self.init_text), ("init_file", "file", self.init_file)):
            if self.init == init and value is None:
                raise ValueError(f"method.init={init} needs method.{key}")
            if self.init != init and value is not None:
                raise ValueError(f"method.{key} needs method.init={init}, not {self.init}; set it or drop method.{key}")
        self._needs("init_std", self.init == "normal", "method.init=normal")
        return self


class TaskPromptConfig(PromptStartConfig):
    """Trained vectors before the input: a prompt for each task, or one for all."""

    length: NonNegativeInt
    per_task: bool = True
    init: Literal["vocabulary", "labels", "text", "file", "zero", "normal"] = "vocabulary"
    init_std: PositiveFloat = 0.5


class PromptTuningConfig(TaskPromptConfig):
    """Soft prompts before the input (Lester et al. 2021)."""

    groups = frozenset({"prompt"})
    name: Literal["prompt_tuning"] = "prompt_tuning"
    length: NonNegativeInt = 20


class RoutingConfig(MethodSection):
    """A router that picks or mixes prompts for each row."""

    num_prompts: PositiveInt = 4
    #: top_k: the top_k likeliest prompts; none: all of them, mixed; gumbel: one drawn with Gumbel noise, gradient
    #: straight through; stochastic: one drawn by its probability. Prediction takes the likeliest instead of drawing.
    routing: Literal["top_k", "none", "gumbel", "stochastic"] = "top_k"
    top_k: PositiveInt = 1
    #: Multiply the router's logits by 1 + N(0, 1) in training. None: with routing=top_k.
    perturbation: bool | None = None
    #: Of routing=gumbel; lower is closer to one prompt in the gradient too.
    gumbel_temperature: PositiveFloat = 1.0
    #: Weight of the load-balance loss (Fedus et al. 2022, eq. 4, use 0.01). 0: none.
    load_balance: NonNegativeFloat = 0.0
    #: shared: one router for all tasks; per_task: one router a task. The prompts are shared either way.
    router: Literal["shared", "per_task"] = "shared"

    @model_validator(mode="after")
    def _top_k_fits(self) -> Self:
        if self.top_k > self.num_prompts:
            raise ValueError(f"method.top_k={self.top_k} must be at most method.num_prompts={self.num_prompts}")
        if self.top_k != 1 and self.routing != "top_k":
            raise ValueError(
                f"method.top_k={self.top_k} belongs to method.routing=top_k, not {self.routing}; "
                "set method.top_k=1 or method.routing=top_k"
            )
        self._needs("gumbel_temperature", self.routing == "gumbel", "method.routing=gumbel")
        return self

    @property
    def perturbed(self) -> bool:
        return self.routing == "top_k" if self.perturbation is None else self.perturbation

    @property
    def num_mixed(self) -> int:
        """How many prompts make up a row's prompt in prediction."""
        return {"top_k": self.top_k, "none": self.num_prompts}.get(self.routing, 1)


class SMoPConfig(RoutingConfig, PromptStartConfig):
    """Sparse mixture of prompts (Choi et al. 2023): k short prompts and a router."""

    groups = frozenset({"prompt", "router"})
    name: Literal["smop"] = "smop"
    length: NonNegativeInt = 5
    #: probability: the paper. batch_sum: what the authors' code does at top-1; rows then depend on their batch-mates.
    gate: Literal["probability", "batch_sum"] = "probability"
    #: No labels: its prompts belong to no task.
    init: Literal["vocabulary", "text", "file", "zero", "normal"] = "normal"
    init_std: PositiveFloat = 1.0

    @model_validator(mode="after")
    def _gate_fits(self) -> "SMoPConfig":
        if self.gate == "batch_sum" and (self.top_k != 1 or self.routing != "top_k"):
            raise ValueError(
                "method.gate=batch_sum exists at method.routing=top_k, method.top_k=1 only; "
                "set these, or method.gate=probability"
            )
        return self


class KeyValueConfig(MethodSection):
    """Prompt keys and values for the self-attention layers of one stack or both."""

    #: A decoder-only backbone has no encoder: decoder.
    stacks: Literal["both", "encoder", "decoder"] = "both"
    encoder_length: NonNegativeInt = 16
    decoder_length: NonNegativeInt = 6

    @model_validator(mode="after")
    def _lengths_have_stacks(self) -> Self:
        for stack, length in (("encoder", self.encoder_length), ("decoder", self.decoder_length)):
            self._needs(f"{stack}_length", self.stacks in ("both", stack) or length == 0, "method.stacks=both")
        return self


class HypernetworkConfig(KeyValueConfig):
    """The sizes of hypernetworks that make them."""

    #: Bottleneck b = hidden size / reduction.
    reduction: PositiveInt = 32
    #: t: size of the layer-aware task embedding (global only).
    layer_task_embedding_size: PositiveInt = 64
    #: t': size of the task embedding and of the layer embedding (global only).
    task_embedding_size: PositiveInt = 64
    #: e: hidden size of the MLP that joins the two (global only).
    mlp_hidden_size: PositiveInt = 64


class HyperPromptConfig(HypernetworkConfig):
    """Prompts for every self-attention layer, made by hypernetworks (He et al. 2022)."""

    groups = frozenset({"prompt", "hypernetwork"})
    name: Literal["hyperprompt"] = "hyperprompt"
    variant: Literal["share", "sep", "global"] = "global"


class RoutedHyperPromptConfig(HypernetworkConfig, RoutingConfig):
    """A router picks a global prompt for each row, hypernetworks make keys and values of it (ours)."""

    groups = frozenset({"prompt", "hypernetwork", "router"})
    name: Literal["routed_hyperprompt"] = "routed_hyperprompt"
    variant: Literal["share", "global"] = "global"
    #: Do the hypernetworks know the task? None: with variant=global, which alone has a task embedding.
    task_embedding: bool | None = None

    @model_validator(mode="after")
    def _task_embedding_fits(self) -> "RoutedHyperPromptConfig":
        if self.task_embedding and self.variant != "global":
            raise ValueError(
                f"method.task_embedding=true needs method.variant=global, not {self.variant}, whose hypernetworks have "
                "no task in them. Leave it out, or set method.router=per_task to let the router know the task"
            )
        return self

    @property
    def hypernetworks_know_task(self) -> bool:
        return self.variant == "global" if self.task_embedding is None else self.task_embedding


class PrefixTuningConfig(KeyValueConfig):
    """Trained keys and values for every self-attention layer (Li & Liang 2021; P-tuning v2, Liu et al. 2022)."""

    groups = frozenset({"prompt", "hypernetwork"})
    name: Literal["prefix_tuning"] = "prefix_tuning"
    per_task: bool = True
    #: mlp: prefixes are made by a two-layer MLP from vectors of the hidden size; none: they are trained as they are.
    reparameterisation: Literal["none", "mlp"] = "none"
    mlp_hidden_size: PositiveInt = 512
    #: Standard deviation of the keys and values at the start.
    init_std: PositiveFloat = 0.1

    @model_validator(mode="after")
    def _mlp_is_there(self) -> "PrefixTuningConfig":
        self._needs("mlp_hidden_size", self.reparameterisation == "mlp", "method.reparameterisation=mlp")
        return self


class PTuningConfig(MethodSection):
    """Soft prompts before the input, made by a prompt encoder (Liu et al. 2021)."""

    groups = frozenset({"prompt", "hypernetwork"})
    name: Literal["p_tuning"] = "p_tuning"
    length: NonNegativeInt = 20
    per_task: bool = True
    encoder: Literal["mlp", "lstm"] = "mlp"
    encoder_hidden_size: PositiveInt = 128
    #: Layers of the LSTM (lstm only).
    lstm_layers: PositiveInt = 1

    @model_validator(mode="after")
    def _lstm_is_there(self) -> "PTuningConfig":
        self._needs("lstm_layers", self.encoder == "lstm", "method.encoder=lstm")
        return self


class DePTConfig(TaskPromptConfig):
    """A short soft prompt and a low-rank update of the input embeddings (Shi & Lipani 2024)."""

    groups = frozenset({"prompt", "embedding"})
    name: Literal["dept"] = "dept"
    length: NonNegativeInt = 60
    rank: NonNegativeInt = 30
    #: Tokens of an input whose embeddings are updated, from its first on.
    max_positions: PositiveInt = 256

    @model_validator(mode="after")
    def _update_is_there(self) -> "DePTConfig":
        self._needs("max_positions", self.rank > 0, "method.rank above 0")
        return self


class AttemptConfig(TaskPromptConfig):
    """Attention over frozen source prompts and a trained target prompt (Asai et al. 2022)."""

    groups = frozenset({"prompt", "router"})
    name: Literal["attempt"] = "attempt"
    length: NonNegativeInt = 20
    #: Bundles (step_… folders) of prompt_tuning runs on this backbone: each of their prompts is a source. They are read
    #: once, at the start; the run's own bundles keep what was read.
    sources: list[AbsolutePath] = []
    #: Hidden size of the attention's sub-network.
    bottleneck: PositiveInt = 100
    #: None: hidden size times e.
    temperature: PositiveFloat | None = None

    @model_validator(mode="after")
    def _has_sources(self) -> "AttemptConfig":
        if self.length and not self.sources:
            raise ValueError("method.sources=[] must name at least one bundle of a prompt_tuning run on this backbone")
        return self


class MPTConfig(PromptStartConfig):
    """A shared soft prompt times a rank-one matrix for each task (Wang et al. 2023)."""

    groups = frozenset({"prompt", "task"})
    name: Literal["mpt"] = "mpt"
    length: NonNegativeInt = 20
    #: Standard deviation around 1 of the tasks' vectors at the start.
    task_std: PositiveFloat = 0.02
    #: Of the shared prompt. Not zero: the tasks' vectors would have no gradient.
    init: Literal["vocabulary", "labels", "text", "file", "normal"] = "vocabulary"
    init_std: PositiveFloat = 0.5
    #: Bundles (step_… folders) of prompt_tuning runs on this backbone: a task's own prompt there is its teacher. They
    #: are read once, at the start; the run's own bundles keep what was read. Empty: no distillation.
    teachers: list[AbsolutePath] = []
    #: λ: weight of the distillation loss beside the tasks' own.
    distillation_weight: PositiveFloat = 1.0
    #: Of both output distributions in it; higher is softer.
    distillation_temperature: PositiveFloat = 1.0

    @model_validator(mode="after")
    def _teachers_are_there(self) -> Self:
        self._needs("teachers", self.length > 0, "method.length above 0")
        for key in ("distillation_weight", "distillation_temperature"):
            self._needs(key, bool(self.teachers), "method.teachers")
        return self


class AdapterConfig(MethodSection):
    """Bottlenecks behind the parts of each layer (Houlsby et al. 2019; Pfeiffer et al. 2021)."""

    groups = frozenset({"adapter"})
    name: Literal["adapter"] = "adapter"
    #: houlsby: behind self-attention and feed-forward; pfeiffer: behind the feed-forward alone.
    variant: Literal["houlsby", "pfeiffer"] = "houlsby"
    per_task: bool = True
    bottleneck: NonNegativeInt = 64
    activation: Activation = "gelu"
    #: Standard deviation of the weights at the start, cut off at two of them; biases start at 0.
    init_std: PositiveFloat = 0.01


class HyperFormerConfig(MethodSection):
    """Adapters made by a hypernetwork from task, layer and position: HyperFormer++ (Mahabadi et al. 2021)."""

    groups = frozenset({"hypernetwork"})
    name: Literal["hyperformer"] = "hyperformer"
    #: Bottleneck = hidden size / reduction.
    reduction: PositiveInt = 32
    #: t': size of the task, layer and position embeddings.
    task_embedding_size: PositiveInt = 64
    #: e: hidden size of the MLP that joins them.
    mlp_hidden_size: PositiveInt = 128
    #: t: size of what it joins them to.
    projected_embedding_size: PositiveInt = 64
    activation: Activation = "gelu_new"


class LoRAConfig(MethodSection):
    """Low-rank updates of linear maps of the backbone (Hu et al. 2021), by PEFT, whose defaults these are."""

    groups = frozenset({"adapter"})
    name: Literal["lora"] = "lora"
    rank: NonNegativeInt = 8
    #: The update is multiplied by alpha / rank.
    alpha: PositiveFloat = 8.0
    dropout: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.0
    #: Ends of the names of the backbone's linear modules; all-linear: every one but the output layer. None: PEFT's
    #: choice for the family (q and v of T5, c_attn of GPT-2, q_proj and v_proj of Llama and Qwen).
    target_modules: Annotated[list[str], Field(min_length=1)] | Literal["all-linear"] | None = None

    @model_validator(mode="after")
    def _peft_is_there(self) -> "LoRAConfig":
        if find_spec("peft") is None:
            raise ValueError(
                "method.name=lora needs the package peft, which is not installed: pip install 'polyprompt[peft]'"
            )
        return self
