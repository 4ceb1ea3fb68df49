"""Recipe -> predicted peak memory, before anything is loaded or rented.

Weights, adapter, gradients and optimizer are exact arithmetic on shapes. Activations are those of the
largest chunk of the data's longest groups, which is the most that the engine has in hand at once. What
cannot be known is said.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Group, RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text
from transformers import TrainingArguments

from rrhf_peft.data import read_groups, tokenize_groups
from rrhf_peft.logprobs.engine import attention_tokens, causal_lm_of, default_chunk_tokens
from rrhf_peft.logprobs.layout import plan_chunks
from rrhf_peft.modeling import (
    prepare_for_training,
    refuse_beyond_context,
    resolve_source,
    tokenizer_of,
    uses_checkpointing,
)
from rrhf_peft.modeling.base_model import DTYPES, load_config
from rrhf_peft.plan.activations import head_bytes, pass_bytes
from rrhf_peft.plan.weights import Weights, is_paged, optimizer_bytes, shaped_weights, step_bytes
from rrhf_peft.recipe import Recipe
from rrhf_peft.recipe.stages import JudgeScorer, RuleScorer
from rrhf_peft.records import UserError

#: Responses per prompt that a plan allows for unless told otherwise.
USUAL_RESPONSES = 8


@dataclass(frozen=True)
class Item:
    """One line of the plan.

    Attributes:
        name: what takes the memory.
        bytes: how much.
        note: how it was counted.
    """

    name: str
    bytes: int
    note: str


@dataclass(frozen=True)
class MemoryPlan:
    """Predicted peak memory of a training run, per process.

    Attributes:
        model: the base model's name.
        device: cuda or cpu.
        processes: over how many processes the weights are sharded.
        items: what adds up to `peak_bytes`.
        peak_bytes: the prediction.
        host_bytes: optimizer state that a paged optimizer keeps in host memory.
        parameters: of the base model.
        trainable: trained values.
        chunk_tokens: tokens of the chunk whose activations are counted.
        responses: responses of the longest group, or those that were assumed.
        from_data: whether the data was read for the longest groups; else `data.max_tokens` stands for them.
        gradient_checkpointing: whether layers are recomputed in the backward pass.
        unknown: what the prediction leaves out.
    """

    model: str
    device: str
    processes: int
    items: list[Item]
    peak_bytes: int
    host_bytes: int
    parameters: int
    trainable: int
    chunk_tokens: int
    responses: int
    from_data: bool
    gradient_checkpointing: bool
    unknown: list[str]

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return asdict(self)

    def __rich__(self) -> Any:
        return _table(self)


def plan_memory(
    recipe: Recipe, *, device: str = "cuda", processes: int = 1, responses: int | None = None
) -> MemoryPlan:
    """Predict the peak memory per process of training a recipe.

    Args:
        recipe: checked recipe.
        device: cuda (a GPU that computes in bfloat16) or cpu; it need not be here.
        processes: FSDP over this many: weights, gradients and optimizer state are divided by it.
        responses: k, with every response at its longest. None: what the data holds where it is on this machine,
            else the recipe's own k or `USUAL_RESPONSES`.

    Raises:
        UserError: the model's configuration, the adapter or the data cannot be read, or training would refuse them.
    """
    section = recipe.model
    on_cpu = device == "cpu"
    dtype = DTYPES["float32" if on_cpu else "bfloat16"] if section.dtype == "auto" else DTYPES[section.dtype]
    config = load_config(
        resolve_source(section.name, revision=section.revision), trust_remote_code=section.trust_remote_code
    )
    refuse_beyond_context(config, recipe.data.max_tokens, "data.max_tokens", section.name)
    batch = longest_groups(recipe) if responses is None else None
    all_weights = recipe.adapter is None and section.init_adapter is None
    dtype = torch.float32 if all_weights else dtype  # what is trained has float32 weights
    weights = shaped_weights(
        config,
        dtype=dtype,
        quantization=section.quantization,
        double_quant=section.double_quant,
        attention=section.attention if section.attention in ("eager", "flex_attention") else "sdpa",
        adapter=None if recipe.adapter is None or section.init_adapter else recipe.adapter.model_dump(),
        init_adapter=section.init_adapter,
        trust_remote_code=section.trust_remote_code,
    )
    compute = _compute_dtype(recipe, dtype, on_cpu)
    model = weights.model.to(compute)
    checkpointing = uses_checkpointing(recipe.engine.gradient_checkpointing, weights.parameters)
    prepare_for_training(model, gradient_checkpointing=checkpointing)
    chunk_tokens = recipe.engine.chunk_tokens
    if chunk_tokens == "auto":
        chunk_tokens = default_chunk_tokens(causal_lm_of(model))
    if batch is not None:
        responses = max(len(lengths) for _, lengths in batch)
        rows, width = _largest_chunk(recipe, chunk_tokens, batch, config.get_text_config())
    else:
        responses = responses or _usual_responses(recipe)
        rows, width = _chunk(recipe, chunk_tokens, responses)

    optimizer = _optimizer(recipe)
    state = optimizer_bytes(optimizer, weights.trainable) or 0
    trained = sum(values * size for values, size, _ in weights.trainable)
    shared_out = f", {processes} shards" if processes > 1 else ""
    standing = [
        Item("base weights", sum(weights.stored.values()), " + ".join(weights.stored) + shared_out),
        Item("adapter weights", weights.adapter, "float32" + shared_out),
        Item("gradients", trained, f"{sum(values for values, _, _ in weights.trainable):,} trained values{shared_out}"),
        Item("optimizer state", 0 if is_paged(optimizer) else state, optimizer + shared_out),
    ]
    standing = [dataclasses.replace(item, bytes=-(-item.bytes // processes)) for item in standing if item.bytes]
    passing = [
        *_activations(model, weights, recipe, rows, width, on_cpu),
        *_copies(weights, dtype, compute, checkpointing, processes),
    ]
    if recipe.online is not None:
        cache = _decoding_cache(causal_lm_of(model), recipe.online.batch_tokens)
        if cache.bytes > sum(item.bytes for item in passing):  # the policy answers, or is trained
            passing = [cache]
    update = Item("optimizer step", step_bytes(optimizer, weights.trainable) // processes, f"{optimizer}, all at once")
    if update.bytes > sum(item.bytes for item in passing):  # the two do not come together
        passing = [update]
    items = [*standing, *passing]
    return MemoryPlan(
        model=section.name,
        device=device,
        processes=processes,
        items=items,
        peak_bytes=sum(item.bytes for item in items),
        host_bytes=state // processes if is_paged(optimizer) else 0,
        parameters=weights.parameters,
        trainable=sum(values for values, _, _ in weights.trainable),
        chunk_tokens=rows * width,
        responses=responses,
        from_data=batch is not None,
        gradient_checkpointing=checkpointing,
        unknown=_unknown(recipe, optimizer, on_cpu, responses, batch is not None),
    )


#: What makes a training smaller, what costs least first; a later one of a key replaces an earlier one.
SMALLER = (
    "engine.gradient_checkpointing=true",
    "engine.chunk_tokens=4096",
    "engine.chunk_tokens=2048",
    "training.optim=paged_adamw_8bit",
    "model.quantization=nf4",
    "engine.chunk_tokens=1024",
)

#: Bytes of a GPU that the prediction leaves out: its context, workspaces, fragmentation.
RESERVED = 3 * 2**29


def fit_memory(
    make: Callable[[list[str]], Recipe], gib: float, *, device: str = "cuda", **options: Any
) -> tuple[MemoryPlan, list[str]]:
    """The changes of `SMALLER` that make a recipe fit, as overrides, with the plan that they make; none if it fits.

    Args:
        make: the recipe with these overrides.
        gib: the memory of a device. Of a GPU `RESERVED` stays free.
        device, options: as for `plan_memory`.

    Raises:
        UserError: no such change makes it fit; says what the least is.
    """
    room = gib * 2**30 - (RESERVED if device == "cuda" else 0)
    chosen: list[str] = []
    plan = plan_memory(make([]), device=device, **options)

    def attempt(changes: list[str]) -> MemoryPlan | None:
        try:
            return plan_memory(make(changes), device=device, **options)
        except UserError:  # not with this recipe: 4-bit weights cannot be trained themselves
            return None

    for change in SMALLER:
        if plan.peak_bytes <= room:
            break
        key = change.split("=")[0]
        changes = [*(other for other in chosen if other.split("=")[0] != key), change]
        smaller = attempt(changes)
        if smaller is not None and smaller.peak_bytes < plan.peak_bytes:
            plan, chosen = smaller, changes
    if plan.peak_bytes > room:
        raise UserError(
            f"--fit {gib:g}: the least that was found is {plan.peak_bytes / 2**30:.1f} GiB, with "
            f"{' '.join(chosen) or 'no change'}, and {room / 2**30:.1f} GiB are there beside the GPU's own needs. "
            "Lower data.max_tokens, shard over several GPUs (--processes), or take a smaller model."
        )
    for change in chosen[:-1]:  # one that a later one has made needless
        fewer = [other for other in chosen if other != change]
        other_plan = attempt(fewer)
        if other_plan is not None and other_plan.peak_bytes <= room:
            plan, chosen = other_plan, fewer
    return plan, chosen


def _compute_dtype(recipe: Recipe, weights: torch.dtype, on_cpu: bool) -> torch.dtype:
    """What the layers compute in: on a GPU under bfloat16 autocast, unless the recipe says otherwise."""
    training: Any = recipe.training
    if training.fp16:
        return torch.float16
    if training.bf16 or (training.bf16 is None and not on_cpu):
        return torch.bfloat16
    return weights


def _optimizer(recipe: Recipe) -> str:
    default = next(field.default for field in dataclasses.fields(TrainingArguments) if field.name == "optim")
    name = recipe.training.optim or default  # type: ignore[attr-defined]
    return str(getattr(name, "value", name))


def longest_groups(recipe: Recipe) -> list[tuple[int, list[int]]] | None:
    """Prompt length and response lengths, in tokens, of the micro-batch that has most; None where no data is here.

    Only the groups with most characters are tokenised.
    """
    data = recipe.data
    paths = [data.train] if isinstance(data.train, str) else data.train
    if recipe.online is not None or not all(Path(path).expanduser().exists() for path in paths):
        return None
    groups = read_groups(data.train, format=data.format, split=data.split, max_groups=data.max_groups)
    groups.sort(key=lambda group: len(str(group.prompt)) + sum(map(len, group.responses)), reverse=True)
    tokenized, _ = tokenize_groups(
        groups[: max(64, 4 * _batch_size(recipe))],
        tokenizer_of(recipe.model, recipe.data.template),
        template=data.template,
        max_prompt_tokens=data.max_prompt_tokens,
        max_tokens=data.max_tokens,
        overlong_prompt=data.overlong_prompt,
        needs_pairs=False,
    )
    lengths = [(len(group.prompt_ids), [len(ids) for ids in group.response_ids]) for group in tokenized]
    lengths.sort(key=lambda group: group[0] + sum(group[1]), reverse=True)
    return lengths[: _batch_size(recipe)]


def _batch_size(recipe: Recipe) -> int:
    """Groups of a micro-batch."""
    return recipe.training.per_device_train_batch_size or TrainingArguments.per_device_train_batch_size  # type: ignore[attr-defined]


def _largest_chunk(
    recipe: Recipe, chunk_tokens: int, batch: list[tuple[int, list[int]]], config: Any
) -> tuple[int, int]:
    """Rows and width of the chunk that takes most room, when the engine lays out these groups."""
    chunks = plan_chunks(
        [prompt for prompt, _ in batch],
        [length for _, lengths in batch for length in lengths],
        [index for index, (_, lengths) in enumerate(batch) for _ in lengths],
        layout="plain" if recipe.engine.layout == "plain" else "shared",
        chunk_tokens=chunk_tokens,
        attention_tokens=attention_tokens(config),
    )
    # Masks grow with the square of the width.
    rows, width = max((tuple(chunk.token.shape) for chunk in chunks), key=lambda shape: (shape[0] * shape[1], shape[1]))
    return rows, width


def _usual_responses(recipe: Recipe) -> int:
    return USUAL_RESPONSES if recipe.online is None else recipe.online.decoding.k


def _decoding_cache(model: Any, batch_tokens: int) -> Item:
    """Keys and values of all layers for as many tokens as online training decodes at once."""
    config = model.config.get_text_config()
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    values = 2 * batch_tokens * config.num_hidden_layers * heads * size
    return Item("decoding cache", values * model.dtype.itemsize, f"keys and values of {batch_tokens:,} tokens, online")


def _chunk(recipe: Recipe, chunk_tokens: int, responses: int) -> tuple[int, int]:
    """Rows and width of the fullest chunk: a row per group of the longest responses, or per response."""
    plain = recipe.engine.layout == "plain"
    longest = recipe.data.max_tokens * (1 if plain else responses)
    tokens = min(chunk_tokens, _batch_size(recipe) * responses * recipe.data.max_tokens)
    rows = max(1, round(tokens / longest))
    return rows, tokens // rows


def _activations(model: Any, weights: Weights, recipe: Recipe, rows: int, width: int, on_cpu: bool) -> list[Item]:
    casts = bool(weights.adapter) and not weights.largest_quantized and model.dtype != torch.float32
    need = pass_bytes(model, rows=rows, width=width, shared=recipe.engine.layout != "plain", casts=casts)
    language_model: Any = causal_lm_of(model)
    head, config = language_model.get_output_embeddings(), language_model.config.get_text_config()
    size = next(model.parameters()).element_size()
    sliced = head_bytes(
        rows * width,
        config.vocab_size,
        config.hidden_size,
        size=size,
        on_cpu=on_cpu,
        trained=any(parameter.requires_grad for parameter in head.parameters()),
    )
    unpacked = weights.largest_quantized * size
    return [
        Item("activations", need.kept, f"chunk of {rows * width:,} tokens"),
        Item("working memory", max(need.peak - need.kept + unpacked, sliced), "backward pass of a layer, or logits"),
    ]


def _copies(
    weights: Weights, stored: torch.dtype, compute: torch.dtype, checkpointing: bool, processes: int
) -> list[Item]:
    """Weights that exist a second time: gathered from the shards, or cast by autocast."""
    model: Any = causal_lm_of(weights.model)
    layers = max(1, model.config.get_text_config().num_hidden_layers)
    ends = {id(end.weight): end.weight.numel() for end in (model.get_input_embeddings(), model.get_output_embeddings())}
    outside = sum(ends.values())
    layer = (weights.parameters - outside) // layers
    if processes > 1:  # two layers under way, one layer's gradients, and what belongs to no layer
        return [Item("gathered weights", (3 * layer + outside) * compute.itemsize, "FSDP: whole layers, for a moment")]
    if stored == compute or stored.itemsize <= compute.itemsize or weights.largest_quantized:
        return []
    kept = layer if checkpointing and weights.adapter else layer * layers
    return [Item("cast weights", kept * compute.itemsize, f"autocast's {str(compute).removeprefix('torch.')} copies")]


def _unknown(recipe: Recipe, optimizer: str, on_cpu: bool, responses: int, from_data: bool) -> list[str]:
    notes = []
    if not on_cpu:
        notes.append("the CUDA context, libraries' workspaces and fragmentation: commonly 1 to 2 GiB more")
    else:
        notes.append("what the C library's allocator holds back: often more than the activations themselves")
    if not from_data:
        notes.append(f"groups of more than {responses} responses: say how many with --responses")
    if recipe.online is not None and not isinstance(recipe.online.scorer, (RuleScorer, JudgeScorer)):
        notes.append("the model that scores online, beside the one that is trained")
    if recipe.model.quantization == "int8":
        notes.append("int8's float16 copies of activations")
    if optimizer_bytes(optimizer, []) is None:
        notes.append(f"the state of optimizer {optimizer}, which is counted as nothing")
    notes.append("loading: the host holds about one weight file at a time; and other programs on the device")
    return notes


def _table(plan: MemoryPlan) -> RenderableType:
    """What takes how much, the sum, and what the sum leaves out."""
    where = "one GPU" if plan.device == "cuda" else "CPU"
    if plan.processes > 1:
        where = f"each of {plan.processes} processes"
    recomputed = "layers recomputed" if plan.gradient_checkpointing else "layers kept"
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="bold", show_footer=True, footer_style="bold")
    table.add_column("", "predicted peak")
    table.add_column("GiB", f"{plan.peak_bytes / 2**30:.2f}", justify="right")
    table.add_column("counted as", f"{recomputed} in the backward pass")
    for item in plan.items:
        table.add_row(item.name, f"{item.bytes / 2**30:.2f}", Text(item.note))
    parts: list[RenderableType] = [
        Text(f"Memory plan for {plan.model} on {where}", style="bold underline"),
        Text(f"{plan.parameters:,} parameters, {plan.trainable:,} values trained"),
        Text(
            f"{plan.responses} responses per prompt, "
            + ("as the longest group of the data" if plan.from_data else "assumed: all as long as data.max_tokens")
        ),
        table,
    ]
    if plan.host_bytes:
        parts.append(Text(f"and {plan.host_bytes / 2**30:.2f} GiB of paged optimizer state in host memory"))
    parts.append(Text("Not in it:"))
    parts += [Padding(Text(f"- {note}"), (0, 0, 0, 2)) for note in plan.unknown]
    return Group(*parts)
