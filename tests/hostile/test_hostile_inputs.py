"""Bad inputs for every verb, more than 700: exit code 1 or 2, one paragraph, no traceback, every file as it was.

The cases are a table: what is spoilt, and the commands that meet it. What an answer says in detail is tested beside the
code that says it; here the promise that holds for all is.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hostile.conftest import Refused
from safetensors.torch import load_file, save_file

Spoil = Callable[[Path], Any]

#: The verbs that read a recipe, as far as their own arguments go.
READS_RECIPE = {
    "sample": "sample recipe.yaml",
    "score": "score recipe.yaml",
    "train": "train recipe.yaml",
    "evaluate": "evaluate recipe.yaml",
    "rounds": "rounds rounds.yaml",
    "compare": "compare compare.yaml",
    "plan": "plan recipe.yaml",
    "inspect": "inspect recipe.yaml",
}
CASES: dict[str, tuple[str, Spoil | None]] = {}


def add(name: str, command: str, spoil: Spoil | None = None) -> None:
    assert name not in CASES, name
    CASES[name] = (command, spoil)


def written(path: str, content: str | bytes) -> Spoil:
    data = content if isinstance(content, bytes) else content.encode("utf-8", "surrogatepass")
    return lambda folder: ((folder / path).parent.mkdir(exist_ok=True), (folder / path).write_bytes(data))


def without(path: str) -> Spoil:
    return lambda folder: (folder / path).unlink()


def a_folder(path: str) -> Spoil:
    return lambda folder: ((folder / path).unlink(missing_ok=True), (folder / path).mkdir())


def a_fifo(path: str) -> Spoil:
    return lambda folder: ((folder / path).unlink(missing_ok=True), os.mkfifo(folder / path))


def cut(path: str, share: float = 0.5) -> Spoil:
    def spoil(folder: Path) -> None:
        data = (folder / path).read_bytes()
        (folder / path).write_bytes(data[: int(len(data) * share)])

    return spoil


def edited(path: str, **values: Any) -> Spoil:
    def spoil(folder: Path) -> None:
        now = json.loads((folder / path).read_text())
        now.update(values)
        (folder / path).write_text(json.dumps(now))

    return spoil


def tensors(path: str, change: Callable[[torch.Tensor], torch.Tensor]) -> Spoil:
    def spoil(folder: Path) -> None:
        save_file({name: change(tensor) for name, tensor in load_file(folder / path).items()}, folder / path)

    return spoil


# Recipes that are none, before every verb that reads one.

ALIASES = "a: &a [x, x]\n" + "".join(
    f"{new}: &{new} [*{old}, *{old}, *{old}, *{old}]\n" for old, new in zip("abcdefghijkl", "bcdefghijklm", strict=True)
)
NO_RECIPE: dict[str, Spoil | str | bytes] = {
    "missing": "",
    "an empty file": "",
    "only a comment": "# nothing\n",
    "a list": "- model\n",
    "a word": "model\n",
    "bytes": bytes(range(256)),
    "utf-16": "model: {name: x}".encode("utf-16"),
    "cut in the middle": "model: {name: x, ",
    "a tab": "model:\n\tname: x\n",
    "a key twice": "model: {name: x}\nmodel: {name: y}\n",
    "a key that is a number": "1: 2\n",
    "a key that is a list": "? [a, b]\n: 1\n",
    "an alias bomb": ALIASES,
    "an alias to itself": "model: &m {name: *m}\n",
    "deep nesting": "model: " + "[" * 3000 + "]" * 3000,
    "a python tag": "model: !!python/object/apply:os.system [echo]\n",
    "an int that is none": "model: {name: !!int x}\n",
    "a bad date": "model: {name: !!timestamp 2024-99-99}\n",
    "huge numbers": "data: {train: x, max_tokens: " + "9" * 5000 + "}\n",
    "nul": "model: {name: 'a\x00b'}\n",
    "a megabyte": "#" * 1_000_000,
    "escapes in a key": '"\\x1b[31m": {}\n',
    "two documents": "model: {name: x}\n---\nmodel: {name: y}\n",
    "extends itself": "extends: recipe.yaml\n",
    "extends nothing": "extends: nowhere.yaml\n",
    "many wrong keys": "model: {" + ", ".join(f"k{n}: 1" for n in range(500)) + "}\n",
    "sections that are none": "model: 1\ndata: 2\ntraining: 3\nsampling: 4\nscoring: 5\nevaluation: 6\nrounds: 7\n",
    "empty sections": "model: {}\ndata: {}\ntraining: {}\nsampling: {}\nscoring: {}\nevaluation: {}\nrounds: {}\n",
    "null sections": "model:\ndata:\ntraining:\nsampling:\nscoring:\nevaluation:\nrounds:\n",
}
for verb, command in READS_RECIPE.items():
    file = command.split()[1]
    for name, text in NO_RECIPE.items():
        add(f"{verb}: recipe {name}", command, without(file) if name == "missing" else written(file, text))
    add(f"{verb}: recipe a folder", command, a_folder(file))
    add(f"{verb}: recipe a fifo", command, a_fifo(file))
    for override in (
        "nonsense",
        "=",
        "a=b",
        "model.name",
        "model..name=x",
        "model=[",
        ".=1",
        "model.name=\x1b]0;x\x07",
    ):
        add(f"{verb}: override {override!r}", f"{command} {override}")

# Values that the schema, transformers, PEFT, the optimizer or the scheduler refuse.

TRAINING = (
    "training.learning_rate=-1 training.learning_rate=0 training.num_train_epochs=-1 training.num_train_epochs=0 "
    "training.max_steps=-5 training.logging_steps=-1 training.save_steps=0 training.per_device_train_batch_size=0 "
    "training.gradient_accumulation_steps=0 training.optim=adamw_nowhere training.lr_scheduler_type=upwards "
    "training.lr_scheduler_kwargs={num_cycle:1} training.optim_args=nonsense training.warmup_steps=-3 "
    "training.bf16=maybe training.output_dir= training.output_dir=. training.output_dir=/ "
    "training.output_dir=ranked.jsonl training.output_dir=ranked.jsonl/x training.save_strategy=never "
    "training.report_to=[nowhere] "
    "training.deepspeed=nowhere.json training.fsdp=nonsense training.seed=-1 training.max_grad_norm=-1 "
    "training.adam_beta1=2 training.weight_decay=-1 training.eval_strategy=steps training.load_best_model_at_end=true "
    "adapter.r=0 adapter.r=-1 adapter.lora_dropout=2 adapter.target_modules=[nowhere] adapter.target_modules=nowhere( "
    "adapter.init_lora_weights=nonsense adapter.bias=some adapter.modules_to_save=[nowhere] "
    "adapter.layers_to_transform=[99] model.name=nowhere model.name= model.name=ranked.jsonl model.name=run "
    "model.dtype=float8 model.quantization=nf5 model.attention=fast model.attention=flash_attention_2 "
    "model.tokenizer=nowhere model.init_adapter=nowhere model.init_adapter=model "
    "data.train= data.train=nowhere.jsonl data.train=[] data.train=letter.txt data.train=model data.format=nonsense "
    "data.format=hh data.template=chat data.max_tokens=1 data.max_tokens=100000 data.max_prompt_tokens=64 "
    "data.max_groups=0 data.eval_size=0 data.eval_size=4 data.eval_size=1.5 data.eval=nowhere.jsonl data.eval= "
    "engine.chunk_tokens=0 "
    "engine.layout=round objective.name=rrfh objective.margin=.nan objective.rank_weight=-1 objective.variant=x"
).split()
for override in TRAINING:
    add(f"train: {override}", f"train recipe.yaml {override}")
for override in (
    "sampling.output= sampling.output=. sampling.output=prompts.txt sampling.output=runs/x.csv sampling.prompts= "
    "sampling.prompts=below/nowhere/x.txt sampling.prompts=model sampling.candidates.0.k=0 sampling.candidates.0.k=-1 "
    "sampling.candidates.0.temperature=0 sampling.candidates.0.top_p=2 sampling.candidates.0.strategy=guess "
    "sampling.candidates.0.num_beams=2 sampling.candidates.0.adapter=nowhere sampling.candidates.0.adapter=model "
    "sampling.candidates.0.model=nowhere sampling.candidates.0.model=ranked.jsonl "
    "sampling.candidates.0.backend=endpoint sampling.candidates.1.k=2 sampling.candidates=[] "
    "sampling.max_prompts=0 sampling.template=chat "
    "sampling.batch_tokens=0 sampling.seed=-1 sampling.stop=[''] sampling.format=nonsense model.name=nowhere"
).split():
    add(f"sample: {override}", f"sample recipe.yaml {override}")
for override in (
    "scoring.output= scoring.output=. scoring.output=x.csv scoring.output=candidates.jsonl scoring.input=nowhere.jsonl "
    "scoring.input= scoring.input=letter.txt scoring.scorer.function=nowhere:f scoring.scorer.function=hostile.rules "
    "scoring.scorer.function=hostile.rules:nowhere scoring.scorer.function=hostile.rules:not_callable "
    "scoring.scorer.function=hostile.rules:raises scoring.scorer.function=hostile.rules:leaves "
    "scoring.scorer.function=hostile.rules:too_few scoring.scorer.function=hostile.rules:returns_text "
    "scoring.scorer.function=hostile.rules:returns_strings scoring.scorer.function=hostile.rules:returns_nothing "
    "scoring.scorer.function=hostile.rules:returns_sets scoring.scorer.function=hostile.rules:returns_a_mapping "
    "scoring.scorer.function=hostile.rules:returns_nan scoring.scorer.function=hostile.rules:returns_infinity "
    "scoring.scorer.function= scoring.scorer.name=rul scoring.scorer={name:reward_model,model:nowhere} "
    "scoring.scorer={name:policy,adapter:nowhere} scoring.scorer={name:policy,model:ranked.jsonl} scoring.scorer=3 "
    "scoring.scorer={name:human,sheet:letter.txt} scoring.scorer={name:human,sheet:x.csv,annotations:[nowhere.csv]} "
    "scoring.scorer={name:human,sheet:x.csv,annotations:[letter.txt]} scoring.scorer={name:source,scores:{}} "
    "scoring.max_groups=0 scoring.unit_groups=0 scoring.format=nonsense"
).split():
    add(f"score: {override}", f"score recipe.yaml {override}")
for override in (
    "evaluation.output= evaluation.output=. evaluation.output=letter.txt evaluation.output=model evaluation.prompts= "
    "evaluation.prompts=below/nowhere/x.txt evaluation.policies={} evaluation.policies.base.model=nowhere "
    "evaluation.policies.base.adapter=nowhere evaluation.policies.base.adapter=model evaluation.decoding.k=0 "
    "evaluation.decoding.temperature=-1 evaluation.best_of=[9] evaluation.confidence=1 evaluation.resamples=1 "
    "evaluation.wins={} evaluation.references=nowhere.jsonl evaluation.pairs=letter.txt evaluation.max_tokens=1 "
    "evaluation.scorers.length.function=hostile.rules:raises evaluation.scorers.length.function=hostile.rules:leaves "
    "evaluation.scorers.length.function=nowhere:f evaluation.perplexity.model=nowhere evaluation.template=chat"
).split():
    add(f"evaluate: {override}", f"evaluate recipe.yaml {override}")
for override in (
    "rounds.output= rounds.output=. rounds.output=/ rounds.output=letter.txt rounds.output=model rounds.count=0 "
    "rounds.start_from=middle rounds.prompts_per_round=0 model.name=nowhere sampling.prompts=below/nowhere/x.txt "
    "scoring.scorer.function=nowhere:f training.learning_rate=-1 sampling.candidates=[] training.optim=adamw_nowhere"
).split():
    add(f"rounds: {override}", f"rounds rounds.yaml {override}")
for override in (
    "compare.output= compare.output=. compare.output=letter.txt compare.only=[x] compare.only=[] compare.objectives={} "
    "compare.objectives.dpo.beta=-1 compare.objectives.dpo.name=x training.output_dir=x training.optim=adamw_nowhere "
    "model.name=nowhere data.train=nowhere.jsonl training.learning_rate=-1"
).split():
    add(f"compare: {override}", f"compare compare.yaml {override}")
for override in "model.name=nowhere model.name=ranked.jsonl adapter.target_modules=[nowhere] data.max_tokens=0".split():
    add(f"plan: {override}", f"plan recipe.yaml {override}")

# A user's first commands.

for words in (
    "new -m nowhere -d ranked.jsonl -o new.yaml,new -m model -d nowhere.jsonl -o new.yaml,"
    "new -m model -d letter.txt -o new.yaml,new -m letter.txt -d ranked.jsonl -o new.yaml,"
    "new -m model -d ranked.jsonl -o recipe.yaml,new -m model -d ranked.jsonl -o letter.txt,"
    "new -m model -d ranked.jsonl -o .,new -m model -d ranked.jsonl -o letter.txt/new.yaml,new -m model -o new.yaml,"
    "new -m model -d ranked.jsonl --fit 0,new -m model -d candidates.jsonl --fit x,"
    "chat nowhere,chat letter.txt,chat measured,chat run --temperature -1,chat run --max-new-tokens 0,"
    "chat run --top-p 2,push nowhere me/x,push letter.txt me/x,push measured me/x,push run x/y/z,push run --yes,"
    "push run ../x,push run me/x --evaluation run/nowhere,push run me/x --evaluation model,push run me/x --yes,"
    "recipes copy nowhere,recipes copy ../quickstart,recipes copy quickstart letter.txt,recipes nonsense,recipes copy,"
    "doctor nonsense,train recipe.yaml --dry-run model.name=nowhere,train recipe.yaml --dry-run data.max_tokens=9999,"
    "train recipe.yaml --dry-run training.optim=adamw_nowhere,train recipe.yaml --dry-run adapter.target_modules=[no]"
).split(","):
    add(f"begin: {words}", words)
for name, spoil in {
    "recipe.yaml no recipe": written("run/recipe.yaml", "- model\n"),
    "recipe.yaml bytes": written("run/recipe.yaml", bytes(range(256))),
    "adapter_config.json cut": cut("run/adapter_config.json"),
    "adapter cut": cut("run/adapter_model.safetensors"),
    "base gone": lambda folder: (folder / "model").rename(folder / "away"),
}.items():
    add(f"chat: {name}", "chat run", spoil)
add("push: no weights", "push run me/x", without("run/adapter_model.safetensors"))
add("push: no card", "push run me/x", without("run/README.md"))
add("push: metrics that are none", "push run me/x", written("run/metrics.jsonl", 'no\n{"step": 1}\n'))
add("push: card bytes", "push run me/x", written("run/README.md", bytes(range(256))))
add("new: a schema that is none", "new -m model -d ranked.jsonl -o new.yaml", written("recipe.schema.json", "mine"))

# Data that is damaged, or no data.

ROW = {"prompt": "?", "responses": ["a", "b"], "scores": [1, 0]}


def row(**changes: Any) -> str:
    return json.dumps({**ROW, **changes}) + "\n"


DATA: dict[str, str | bytes] = {
    "empty": "",
    "blank lines": "\n\n\n",
    "no json": "hello\n",
    "cut": row() + row()[:20],
    "bytes": bytes(range(256)),
    "utf-16": row().encode("utf-16"),
    "a list on each line": "[1, 2]\n",
    "a number on each line": "1\n",
    "no scores": '{"prompt": "?", "responses": ["a", "b"]}\n',
    "more scores than responses": row(scores=[1, 2, 3]),
    "scores that are text": row(scores=["high", "low"]),
    "scores that are null": row(scores=[None, None]),
    "scores that are lists": row(scores=[[1], [2]]),
    "scores that are nan": row(scores=[float("nan"), 1]),
    "scores that are infinite": row(scores=[float("inf"), 1]),
    "scores beyond float": '{"prompt": "?", "responses": ["a", "b"], "scores": [1e999, 0]}\n',
    "responses that are text": row(responses="ab"),
    "responses that are numbers": row(responses=[1, 2]),
    "responses that are null": row(responses=None),
    "a prompt that is a number": row(prompt=3),
    "a prompt that is a mapping": row(prompt={"a": "b"}),
    "messages without content": row(prompt=[{"role": "user"}]),
    "messages that are text": row(prompt=["hello"]),
    "no messages": row(prompt=[]),
    "deep nesting": '{"prompt": ' + "[" * 20000 + "]" * 20000 + "}\n",
    "unknown columns": '{"\\u001b[31mquestion": "?", "answer": "x"}\n',
    "huge integers": '{"prompt": "?", "responses": ["a", "b"], "scores": [' + "9" * 5000 + ", 0]}\n",
}  # fmt: skip
for name, data in DATA.items():
    add(f"inspect: data {name}", "inspect ranked.jsonl", written("ranked.jsonl", data))
    add(f"convert: data {name}", "convert ranked.jsonl -o new.jsonl", written("ranked.jsonl", data))
    add(f"train: data {name}", "train recipe.yaml", written("ranked.jsonl", data))
    add(f"new: data {name}", "new -m model -d ranked.jsonl -o new.yaml", written("ranked.jsonl", data))
for name in (
    "empty",
    "no json",
    "cut",
    "bytes",
    "a list on each line",
    "responses that are numbers",
    "a prompt that is a number",
):
    add(f"score: data {name}", "score recipe.yaml", written("candidates.jsonl", DATA[name]))
for ending in ("parquet", "csv", "json", "jsonl.gz", "arrow"):
    add(
        f"inspect: a .{ending} that is none",
        f"inspect bad.{ending}",
        written(f"bad.{ending}", b"PAR1 \x00\xff nothing"),
    )
add("inspect: data a folder without files", "inspect empty", lambda folder: (folder / "empty").mkdir())
add("inspect: data missing", "inspect nowhere.jsonl")
add("inspect: plot over a letter", "inspect ranked.jsonl --plot letter.txt")
add("inspect: plot without a known ending", "inspect ranked.jsonl --plot new.xyz")
add("inspect: plot into nowhere", "inspect ranked.jsonl --plot letter.txt/x.png")
add("inspect: group without tokenizer", "inspect ranked.jsonl --group 1")
add("inspect: group that is not there", "inspect recipe.yaml --group 99")
add("inspect: tokenizer nowhere", "inspect ranked.jsonl --tokenizer nowhere")
add("inspect: group that is no number", "inspect ranked.jsonl --group x")
add("sample: no prompts", "sample recipe.yaml", written("prompts.txt", ""))
add("sample: prompts of bytes", "sample recipe.yaml", written("prompts.txt", bytes(range(256))))
add("sample: output is there", "sample recipe.yaml", written("runs/candidates.jsonl", "mine\n"))
add("score: output is there", "score recipe.yaml", written("runs/scored.jsonl", "mine\n"))
add("score: output is there, overwrite", "score recipe.yaml scoring.output=letter.jsonl --overwrite",
    written("letter.jsonl/inner.txt", "mine\n"))  # fmt: skip
add("convert: over a letter", "convert ranked.jsonl -o letter.txt")
add("convert: over a letter, overwrite", "convert ranked.jsonl -o letter.txt --overwrite")
add("convert: over its input", "convert ranked.jsonl -o ranked.jsonl")
add("convert: over its input, overwrite", "convert ranked.jsonl -o ranked.jsonl --overwrite")
add("convert: into a folder", "convert ranked.jsonl -o model")
add("convert: below a file", "convert ranked.jsonl -o letter.txt/x.jsonl")
add("convert: nothing", "convert")
add("convert: without output", "convert ranked.jsonl")
add("convert: format nonsense", "convert ranked.jsonl -o new.jsonl --format nonsense")
add("convert: another format", "convert ranked.jsonl -o new.jsonl --format nectar")
add("convert: max groups", "convert ranked.jsonl -o new.jsonl --max-groups 0")
add("convert: missing", "convert nowhere.jsonl -o new.jsonl")

# Models, adapters and runs that are damaged.

MODEL: dict[str, Spoil] = {
    "config missing": without("model/config.json"),
    "config empty": written("model/config.json", ""),
    "config a list": written("model/config.json", "[]"),
    "config cut": cut("model/config.json"),
    "config of no known type": edited("model/config.json", model_type="nonsense"),
    "config without type": written("model/config.json", "{}"),
    "config with text for numbers": edited("model/config.json", hidden_size="large"),
    "config with negative sizes": edited("model/config.json", hidden_size=-64),
    "config with heads that do not fit": edited("model/config.json", num_attention_heads=7),
    "config nested deeply": written("model/config.json", '{"a":' * 5000 + "1" + "}" * 5000),
}
WEIGHTS: dict[str, Spoil] = {
    "weights missing": without("model/model.safetensors"),
    "weights empty": written("model/model.safetensors", b""),
    "weights cut": cut("model/model.safetensors"),
    "weights of text": written("model/model.safetensors", "hello"),
    "weights of NaN": tensors("model/model.safetensors", lambda tensor: torch.full_like(tensor, float("nan"))),
    "weights of other shapes": tensors("model/model.safetensors", lambda tensor: torch.zeros(3, 3)),
}
TOKENIZER: dict[str, Spoil] = {
    "tokenizer missing": without("model/tokenizer.json"),
    "tokenizer empty": written("model/tokenizer.json", ""),
    "tokenizer cut": cut("model/tokenizer.json"),
    "tokenizer a list": written("model/tokenizer.json", "[]"),
    "tokenizer config cut": cut("model/tokenizer_config.json"),
}
for name, spoil in {**MODEL, **WEIGHTS, **TOKENIZER}.items():
    add(f"train: model {name}", "train recipe.yaml", spoil)
for name, spoil in {**MODEL, **WEIGHTS}.items():
    add(f"merge: model {name}", "merge run -o merged --base-model model", spoil)
for name, spoil in MODEL.items():
    if name != "config with text for numbers":
        add(f"plan: model {name}", "plan recipe.yaml", spoil)
for name in ("config cut", "config of no known type"):
    add(f"sample: model {name}", "sample recipe.yaml", MODEL[name])
for name in ("weights missing", "weights cut", "weights of NaN", "tokenizer empty"):
    add(f"sample: model {name}", "sample recipe.yaml", {**WEIGHTS, **TOKENIZER}[name])

ADAPTER = {
    "config missing": without("run/adapter_config.json"),
    "config empty": written("run/adapter_config.json", ""),
    "config a list": written("run/adapter_config.json", "[]"),
    "config cut": cut("run/adapter_config.json"),
    "config of another kind": edited("run/adapter_config.json", peft_type="NONSENSE"),
    "config with text for r": edited("run/adapter_config.json", r="many"),
    "config with unknown modules": edited("run/adapter_config.json", target_modules=["nowhere"]),
    "weights missing": without("run/adapter_model.safetensors"),
    "weights empty": written("run/adapter_model.safetensors", b""),
    "weights cut": cut("run/adapter_model.safetensors"),
    "weights of NaN": tensors("run/adapter_model.safetensors", lambda tensor: torch.full_like(tensor, float("nan"))),
    "weights of other shapes": tensors("run/adapter_model.safetensors", lambda tensor: torch.zeros(3, 3)),
}
for name, spoil in ADAPTER.items():
    add(f"merge: adapter {name}", "merge run -o merged", spoil)
    add(f"train: init adapter {name}", "train recipe.yaml model.init_adapter=run", spoil)
for name in ("config cut", "weights missing", "weights cut"):
    add(f"sample: adapter {name}", "sample recipe.yaml sampling.candidates.0.adapter=run", ADAPTER[name])
for name, text in {
    "cut": "model: {name: ",
    "a list": "- x\n",
    "bytes": bytes(range(256)),
    "nested": "a: " + "[" * 2000,
}.items():
    add(f"merge: the run's recipe {name}", "merge run -o merged", written("run/recipe.yaml", text))
    add(f"train: resume with the run's recipe {name}", "train recipe.yaml training.output_dir=run --resume",
        written("run/recipe.yaml", text))  # fmt: skip
add("merge: nowhere", "merge nowhere -o merged")
add("merge: a model", "merge model -o merged")
add("merge: a file", "merge letter.txt -o merged")
add("merge: without output", "merge run")
add("merge: over the run", "merge run -o run")
add("merge: over the run, overwrite", "merge run -o run --overwrite")
add("merge: over the model, overwrite", "merge run -o model --overwrite")
add("merge: over their parent, overwrite", "merge run -o . --overwrite")
add("merge: over a letter", "merge run -o letter.txt --overwrite")
add("merge: over a folder of letters", "merge run -o letters --overwrite", written("letters/one.txt", "mine"))
add("merge: below a file", "merge run -o letter.txt/merged")
add("merge: dtype", "merge run -o merged --dtype float8")
add("merge: shard size", "merge run -o merged --shard-size huge")
add("merge: shard size negative", "merge run -o merged --shard-size -5GB")
add("merge: tolerance", "merge run -o merged --tolerance -1")
add("merge: quantization", "merge run -o merged --quantization nf5")
add("merge: base model nowhere", "merge run -o merged --base-model nowhere")
add("train: output is there", "train recipe.yaml training.output_dir=run training.max_steps=2")
add("train: output holds letters", "train recipe.yaml training.output_dir=letters", written("letters/a.txt", "mine"))
add("train: output holds letters, overwrite", "train recipe.yaml training.output_dir=letters --overwrite",
    written("letters/a.txt", "mine"))  # fmt: skip
add(
    "train: overwrite with a bad rate",
    "train recipe.yaml training.output_dir=run --overwrite training.learning_rate=-1",
)
add("train: overwrite with a bad optimizer", "train recipe.yaml training.output_dir=run --overwrite training.optim=x")
add("train: overwrite with no model", "train recipe.yaml training.output_dir=run --overwrite model.name=nowhere")
add("train: overwrite of its data", "train recipe.yaml training.output_dir=run --overwrite data.train=run/data.jsonl",
    written("run/data.jsonl", row()))  # fmt: skip
add("train: resume and overwrite", "train recipe.yaml --resume --overwrite")
add("train: ignore changes alone", "train recipe.yaml --ignore-changes")
add(
    "train: resume with other data",
    "train recipe.yaml training.output_dir=run --resume",
    written("ranked.jsonl", row() * 2),
)
add("train: unknown option", "train recipe.yaml --fast")
add("plan: processes", "plan recipe.yaml --processes 0")
add("plan: device", "plan recipe.yaml --device tpu")

for path, kinds in {
    "run/data_report.json": ("cut", "text", "list"),
    "run/recipe.yaml": ("text",),
    "measured/evaluation.json": ("cut", "text", "list", "nested"),
}.items():
    for kind in kinds:
        text = {"text": "hello {", "list": "[1]", "nested": '{"policies":' * 3000}.get(kind)
        folder = path.partition("/")[0]
        add(f"report: {path} {kind}", f"report {folder}", cut(path, 0.6) if text is None else written(path, text))
add("report: nowhere", "report nowhere")
add("report: nothing", "report")
add("report: a file", "report letter.txt")
add("report: a model", "report model")
add("report: over a letter", "report run -o letter.txt")
add("report: into a folder", "report run -o model")
for path, content in {
    "candidates.jsonl": b"",
    "bytes.jsonl": bytes(range(256)),
    "nothing.jsonl": b'{"prompt": "Hello"}\n',
    "one.jsonl": b'{"prompt": "Hello", "responses": ["Hi"]}\n',
    "nan.jsonl": b'{"prompt": "Hello", "responses": ["a", "b"], "scores": [NaN, 1]}\n',
    "numbers.jsonl": b'{"prompt": "Hello", "responses": [1, 2]}\n',
    "many.jsonl": json.dumps({"prompt": "Hello", "responses": ["a"] * 27}).encode(),
    "nested.jsonl": b'{"prompt": ' + b"[" * 3000,
}.items():
    add(f"rank: {path}", f"rank {path} --port 0", written(path, content))
for words in (
    "", "nowhere.jsonl", "letter.txt", "model", "candidates.jsonl --compare nobody response-1",
    "candidates.jsonl --compare response-1 response-1", "candidates.jsonl --compare response-1",
    "candidates.jsonl --annotator ../x", "candidates.jsonl --annotator \x1b[31m", "candidates.jsonl --annotator=",
    "candidates.jsonl --guidelines nowhere.md", "candidates.jsonl --guidelines model", "candidates.jsonl --export",
    "candidates.jsonl --port 99999", "candidates.jsonl --shared -1", "candidates.jsonl --per-group 0",
    "candidates.jsonl --max-groups 0", "candidates.jsonl --format nonsense", "candidates.jsonl -o letter.txt",
    "candidates.jsonl -o letter.txt/x", "candidates.jsonl -o model", "candidates.jsonl -o .", "candidates.jsonl -o run",
):  # fmt: skip
    add(f"rank: {words or 'nothing'}", f"rank {words} --port 0" if "--port" not in words else f"rank {words}")
add("rank: damaged answers", "rank candidates.jsonl -o kept --port 0", lambda folder: (
    written("kept/.rrhf-peft.json", '{"made_by": "rrhf-peft", "verb": "rank", "writes": ["*"]}')(folder),
    written("kept/answers.sqlite", "no database" * 100)(folder),
))  # fmt: skip
add("rank: answers to other groups", "rank candidates.jsonl -o kept --port 0", lambda folder: (
    written("kept/.rrhf-peft.json", '{"made_by": "rrhf-peft", "verb": "rank", "writes": ["*"]}')(folder),
    written("kept/groups.jsonl", row())(folder),
))  # fmt: skip
add("schema: over a letter", "schema -o letter.txt")
add("schema: into a folder", "schema -o model")
add("schema: below a file", "schema -o letter.txt/x.json")
add("schema: an argument too many", "schema x")
add("demo: over a letter", "demo -o letter.txt")
add("demo: below a letter", "demo -o letter.txt/x")
add("demo: over a folder of letters", "demo -o model")
add("demo: an option too many", "demo --fast")
add("no such verb", "trian recipe.yaml")


def test_the_table_is_as_long_as_it_says() -> None:
    assert len(CASES) > 700
    verbs = {command.split()[0] for command, _ in CASES.values()}
    assert verbs >= {*READS_RECIPE, "convert", "merge", "report", "schema", "demo", "rank"}


#: Every second case is for `-m slow`: the other half has some of every verb and kind.
CHOSEN = [pytest.param(name, marks=pytest.mark.slow) if number % 2 else name for number, name in enumerate(CASES)]


@pytest.mark.timeout(120, func_only=True)
@pytest.mark.parametrize("name", CHOSEN)
def test_it_is_refused(name: str, refused: Refused) -> None:
    command, spoil = CASES[name]
    refused(command.split(" "), spoil)
