"""The model card of an export: a README.md with the front matter that the hub reads, from the run's own files alone."""

import html
import re
from collections.abc import Mapping, Sequence
from typing import Any

from huggingface_hub import ModelCardData

_NOT_RESULTS = {  # of the machine, or of the run's course
    *("step", "learning_rate", "num_flops", "padding_fraction", "num_compiles", "tokens_per_second"),
    *("model_flops_utilization", "data_wait_fraction"),
}

_USE = {
    False: """from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained({name!r})
tokenizer = AutoTokenizer.from_pretrained({name!r})""",
    True: """from peft import PeftModel
from transformers import AutoModelForCausalLM

model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained({base!r}), {name!r})""",
}


def model_card(
    name: str, settings: Mapping[str, Any], step: int | None, records: Sequence[Mapping[str, Any]], adapter: bool
) -> str:
    """The text of a README.md.

    Of paths it holds those alone that the user gave to the training.

    Args:
      name: how the model will be found: a hub id, or the directory's name.
      settings: of the run, see `lm_jax.checkpoints.settings`.
      step: of the checkpoint that is exported.
      records: the run's metrics, see `training_records`.
      adapter: only adapters are exported.
    """
    config, origin = settings["config"], settings.get("origin") or {}
    method, made = settings.get("method") or {}, settings.get("made_with") or {}
    given, base = config["model"], origin.get("base_model")
    data = ModelCardData(
        base_model=None if adapter and base != given else base,  # adapters fit the very weights they were trained on
        datasets=origin.get("datasets") or None,
        library_name="peft" if adapter else "transformers",
        pipeline_tag="text-generation",
        tags=[*method.get("tags", ()), *(["lora"] if config["lora"]["rank"] else []), "jax"],
        **origin.get("license", {}),
    )
    facts = {
        "base model": given if base in (None, given) else f"{given}, trained from {base}",
        "data": config["input"],
        "held-out data": config.get("eval_input"),
        "steps": step,
        "devices": made.get("devices"),
    }
    parts = [
        f"---\n{data.to_yaml().strip()}\n---",
        f"# {_text(name)}",
        method.get("summary", ""),
        _table(("", ""), [(key, value) for key, value in facts.items() if value is not None]),
        "## Use",
        _code(_USE[adapter].format(name=name, base=given), "python"),
        "## Results",
        _results([record for record in records if record["step"] <= step]),
        "## Training",
        *([_code(made["command_line"], "sh")] if made else []),
        "Every setting:",
        _code("\n".join(_lines(config))),
        *(["Versions: " + ", ".join(f"{k} {v}" for k, v in made["versions"].items()) + "."] if made else []),
    ]
    return "\n\n".join(filter(None, parts)) + "\n"


def _results(records: Sequence[Mapping[str, Any]]) -> str:
    """The newest value of every metric, in training and in evaluation, each with its step."""
    trained: Mapping[str, Any] = next((r for r in reversed(records) if "loss" in r), {})
    held_out: Mapping[str, Any] = next((r for r in reversed(records) if "eval_loss" in r), {})
    evaluated = {key.removeprefix("eval_"): value for key, value in held_out.items() if key.startswith("eval_")}
    names = [name for name in {**trained, **evaluated} if name not in _NOT_RESULTS]
    header = ["metric", f"training, step {trained.get('step')}"]
    header += [f"held-out data, step {held_out['step']}"] if held_out else []
    cells = (trained, evaluated) if held_out else (trained,)
    return _table(header, [(name, *(_number(values.get(name)) for values in cells)) for name in names])


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.4f}" if isinstance(value, float) else f"{value}"


def _table(header: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(map(_text, line))} |" for line in lines) if rows else ""


def _text(value: Any) -> str:
    """What stands in Markdown for itself: no markup, no HTML, one line."""
    return re.sub(r"([\\`*_\[\]|#~])", r"\\\1", html.escape(" ".join(str(value).split()), quote=False))


def _code(text: str, language: str = "") -> str:
    """A fence that no run of backticks in `text` closes."""
    fence = "`" * max(3, 1 + max(map(len, re.findall("`+", text)), default=0))
    return f"{fence}{language}\n{text}\n{fence}"


def _lines(config: Mapping[str, Any], prefix: str = "") -> list[str]:
    lines = []
    for key, value in config.items():
        nested = isinstance(value, Mapping)
        lines += _lines(value, f"{prefix}{key}.") if nested else [f"{prefix}{key} = {value!r}"]
    return lines
