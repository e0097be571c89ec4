"""Which tensors of a checkpoint are the model's: wrappers' names taken off, strangers named, shapes compared.

Training libraries save a model under the names of what they put around it. That is harmless and undone here. What is
left must be exactly the model's weight table.
"""

import re
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path

import numpy as np

from lm_jax.checkpoints.weight_files import STORED_DTYPES, Tensor, listed
from lm_jax.config import ModelConfig
from lm_jax.console import say
from lm_jax.errors import UserError
from lm_jax.models.weights import WeightSpec

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
# Parts of a name that stand for a module around another: torch.compile, DistributedDataParallel, FSDP, activation
# checkpointing, Lightning, PEFT's layers
_WRAPPERS = frozenset(
    "_orig_mod module _fsdp_wrapped_module _checkpoint_wrapped_module _forward_module base_layer".split()
)
_BODY = re.compile(r"(embed_tokens|layers|norm|rotary_emb)\.")  # of a model without its output embedding
# Left out: rotary tables, which follow from config.json, and without a word; heads that no causal model has, with one
_TABLES = re.compile(r"model\.(layers\.\d+\.self_attn\.)?rotary_emb\.(original_)?(inv_freq|cos_cached|sin_cached)")
_OTHER_HEADS = re.compile(r"(v_head|value_head|reward_head|score|classifier)\.[\w.]+")
# What a name that is left over says of the checkpoint
_STRANGERS = {
    r"lora_|modules_to_save|original_module": "adapters that are not merged into the model; in PEFT call "
    "merge_and_unload() before save_pretrained(), or give the directory of the adapter alone",
    r"\.(qweight|qzeros|scales|g_idx|SCB|absmax|nested_absmax|quant_map|quant_state.*|weight_scale(_inv)?"
    r"|input_scale|weight_packed|weight_shape)$": "quantised weights, which are not read; use the unquantised ones",
    r"_flat_param|_fpw_module": "FSDP's flat shards; save with fsdp_state_dict_type FULL_STATE_DICT",
    r"qkv_proj|query_key_value|W_pack|gate_up_proj": "fused projections of another library; save the model with "
    "transformers' save_pretrained",
    r"^(tok_embeddings\.|layers\.\d+\.(attention|feed_forward)\.)": "Meta's or Mistral's own format; use the "
    "checkpoint in Hugging Face format, or transformers' conversion script",
    r"experts\.": "a mixture of experts, which is not supported",
}


def model_tensors(
    where: str | Path, tensors: Mapping[str, Tensor], table: Sequence[WeightSpec], config: ModelConfig
) -> dict[str, Tensor]:
    """The tensors of `table` by their names there, of a checkpoint that may have been saved from within a wrapper.

    Args:
      where: the checkpoint, for errors.

    Raises:
      UserError: names that are missing, unknown or doubled; shapes or dtypes that do not fit; a tied output embedding
        that differs from the input one.
    """
    expected = {name: spec.hf_shape(config) for spec in table for name in spec.hf_names(config)}
    found = _unwrapped(where, tensors)
    allowed = {HEAD} if config.tie_embeddings else set()
    unknown = [n for n in found if n not in expected and n not in allowed and not _TABLES.fullmatch(n)]
    heads = [n for n in unknown if _OTHER_HEADS.fullmatch(n)]
    unknown = [n for n in unknown if n not in heads]
    for pattern, what in _STRANGERS.items():
        if strange := [n for n in unknown if re.search(pattern, n)]:
            raise UserError(f"{where}: {listed(strange)}: {what}")
    if missing := [name for name in expected if name not in found]:
        raise UserError(f"{where}: {_missing(missing, found, unknown, config)}")
    if unknown:
        raise UserError(f"{where}: {listed(unknown)} unknown for this config.json; is it of another checkpoint?")
    _check_stored(where, found, {n: expected.get(n) for n in (*expected, *(allowed & found.keys()))})
    if heads:
        say(f"{where}: {listed(heads)} left out: a causal language model has no such head")
    if allowed & found.keys() and not _equal(found[HEAD], found[EMBEDDING]):
        raise UserError(
            f"{where}: {HEAD} differs from {EMBEDDING} although config.json ties them; "
            "set tie_word_embeddings to false in config.json"
        )
    return {name: found[name] for name in expected}


def without_wrappers(name: str) -> str:
    """A tensor's name without the parts that stand for modules around the model's own."""
    return ".".join(part for part in name.split(".") if part not in _WRAPPERS)


def _unwrapped(where: str | Path, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """By the names that the model itself would save; says what was taken off."""
    bare = {name: without_wrappers(name) for name in tensors}
    roots = sorted({n.removesuffix("embed_tokens.weight") for n in bare.values() if n.endswith("embed_tokens.weight")})
    if len(roots) > 1:
        raise UserError(
            f"{where}: {len(roots)} models in one checkpoint ({', '.join(f'{r}*' for r in roots)}); save one of them"
        )
    root = roots[0] if roots else "model."
    around = root.removesuffix("model.")

    def plain(name: str) -> str:
        rest = name.removeprefix(root)
        if name.startswith(root) and _BODY.match(rest):
            return f"model.{rest}"
        return name.removeprefix(around)

    found: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        if (to := plain(bare[name])) in found:
            raise UserError(f"{where}: {to} stands there twice, under several prefixes; save the model once")
        found[to] = tensor
    if changed := [n for n, to in zip(tensors, found, strict=True) if n != to]:
        say(f"{where}: its tensors have other names, as {changed[0]}; read as {plain(bare[changed[0]])}")
    return found


def _missing(missing: Sequence[str], found: Collection[str], unknown: Sequence[str], config: ModelConfig) -> str:
    if list(missing) == [HEAD]:
        return (
            f"{HEAD} missing: the model was saved without its output embedding (AutoModel); save it as "
            "AutoModelForCausalLM, or set tie_word_embeddings to true in config.json if it has none of its own"
        )
    layers = {int(m[1]) for n in found if (m := re.match(r"model\.layers\.(\d+)\.", n))}
    if layers and len(layers) != config.num_layers:
        return f"{len(layers)} layers, config.json says {config.num_layers}; give the config.json of these weights"
    beside = f", instead there are {listed(unknown)}" if unknown else ""
    return (
        f"{listed(missing)} missing from the weights{beside}; give the config.json of these weights, or all of their "
        "files and the index"
    )


def _check_stored(
    where: str | Path, tensors: Mapping[str, Tensor], shapes: Mapping[str, tuple[int, ...] | None]
) -> None:
    if empty := [n for n in shapes if 0 in tensors[n].shape]:
        raise UserError(
            f"{where}: {listed(empty)} without elements: one process's share of a sharded model (DeepSpeed ZeRO-3); "
            "save it gathered (stage3_gather_16bit_weights_on_model_save, or zero_to_fp32.py)"
        )
    if wrong := [
        f"{n} {tensors[n].shape}, expected {shape}"
        for n, shape in shapes.items()
        if shape not in (None, tensors[n].shape)
    ]:
        raise UserError(f"{where}: {listed(wrong)} of another shape than config.json gives; correct config.json")
    if dtypes := [f"{n} ({tensors[n].dtype})" for n in shapes if tensors[n].dtype not in STORED_DTYPES]:
        raise UserError(f"{where}: {listed(dtypes)} of an unsupported dtype; use weights in {', '.join(STORED_DTYPES)}")


_COMPARED_ROWS = 4096  # bounds host memory while two embeddings are compared


def _equal(x: Tensor, y: Tensor) -> bool:
    if x.shape != y.shape:
        return False
    a, b = x.array, y.array
    starts = range(0, len(a), _COMPARED_ROWS)
    return all(np.array_equal(a[i : i + _COMPARED_ROWS], b[i : i + _COMPARED_ROWS]) for i in starts)
