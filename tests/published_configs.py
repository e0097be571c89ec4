"""config.json of published models with all of its keys, as their repositories have it; sizes are shrunk for tests.

`PUBLISHED` are read; `OTHERS` are of architectures that are not.
"""

from typing import Any

CONTEXT_PARTS = 256  # so that scalings and windows matter within a few tokens
_HEADS, _HEAD_DIM, _LAYERS, _VOCABULARY = 4, 8, 3, 96
_CONTEXTS = ("max_position_embeddings", "original_max_position_embeddings", "sliding_window")


def _model(family: str, sizes: str, **others: Any) -> dict[str, Any]:
    """`sizes`: width, inner width, layers, heads, key/value heads, words, context."""
    width, inner, layers, heads, kv_heads, words, context = map(int, sizes.split())
    architecture = {"llama": "Llama", "mistral": "Mistral", "qwen2": "Qwen2", "qwen3": "Qwen3"}[family]
    return {
        "architectures": [f"{architecture}ForCausalLM"],
        "attention_dropout": 0.0,
        "hidden_act": "silu",
        "hidden_size": width,
        "initializer_range": 0.02,
        "intermediate_size": inner,
        "max_position_embeddings": context,
        "model_type": family,
        "num_attention_heads": heads,
        "num_hidden_layers": layers,
        "num_key_value_heads": kv_heads,
        "rms_norm_eps": 1e-05,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
        "use_cache": True,
        "vocab_size": words,
    } | others


def _llama(sizes: str, **others: Any) -> dict[str, Any]:
    ends = {"bos_token_id": 1, "eos_token_id": 2}
    return _model("llama", sizes, **(ends | {"pretraining_tp": 1, "rope_scaling": None} | others))


def _llama3(sizes: str, factor: float | None = None, **others: Any) -> dict[str, Any]:
    scaling = {"factor": factor, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "rope_type": "llama3"}
    scaling["original_max_position_embeddings"] = 8192
    given = {"attention_bias": False, "bos_token_id": 128000, "eos_token_id": 128001, "rope_theta": 500000.0}
    return _llama(sizes, **(given | {"mlp_bias": False, "rope_scaling": scaling if factor else None} | others))


def _mistral(sizes: str, **others: Any) -> dict[str, Any]:
    return _model("mistral", sizes, **({"bos_token_id": 1, "eos_token_id": 2, "sliding_window": None} | others))


def _qwen2(sizes: str, **others: Any) -> dict[str, Any]:
    given = {"bos_token_id": 151643, "eos_token_id": 151643, "rms_norm_eps": 1e-06, "rope_theta": 1000000.0}
    windows = {"max_window_layers": 28, "sliding_window": 131072, "use_sliding_window": False}
    return _model("qwen2", sizes, **(given | windows | others))


def _qwen3(sizes: str, **others: Any) -> dict[str, Any]:
    given = {"attention_bias": False, "bos_token_id": 151643, "eos_token_id": 151645, "head_dim": 128}
    windows = {"max_window_layers": 36, "sliding_window": None, "use_sliding_window": False}
    rope = {"rms_norm_eps": 1e-06, "rope_scaling": None, "rope_theta": 1000000}
    return _model("qwen3", sizes, **(given | windows | rope | others))


_YARN = {"factor": 4.0, "original_max_position_embeddings": 32768, "type": "yarn"}
_JS = {"transformers.js_config": {"kv_cache_dtype": {"fp16": "float16", "q4f16": "float16"}, "dtype": "q4"}}
_NANOTRON = {"is_llama_config": True, "rope_interleaved": False}
_ENDS_31 = {"eos_token_id": [128001, 128008, 128009]}

PUBLISHED = {
    "Llama-2-7b-hf": _llama(
        "4096 11008 32 32 32 32000 4096", _name_or_path="meta-llama/Llama-2-7b-hf", transformers_version="4.31.0.dev0"
    ),
    "Llama-2-70b-chat-hf": _llama("8192 28672 80 64 8 32000 4096", torch_dtype="float16"),
    "CodeLlama-7b-hf": _llama("4096 11008 32 32 32 32016 16384", rope_theta=1000000, transformers_version="4.33.0"),
    "vicuna-7b-v1.5": _llama("4096 11008 32 32 32 32000 4096", pad_token_id=0, _name_or_path="vicuna", temperature=0.9),
    "Meta-Llama-3-8B-Instruct": _llama3("4096 14336 32 32 8 128256 8192", eos_token_id=128009),
    "Llama-3.1-8B-Instruct": _llama3("4096 14336 32 32 8 128256 131072", 8.0, **_ENDS_31),
    "Llama-3.2-1B-Instruct": _llama3(
        "2048 8192 16 32 8 128256 131072", 32.0, head_dim=64, tie_word_embeddings=True, **_ENDS_31
    ),
    "Llama-3.2-3B": _llama3("3072 8192 28 24 8 128256 131072", 32.0, head_dim=128, tie_word_embeddings=True),
    "Llama-3.3-70B-Instruct": _llama3("8192 28672 80 64 8 128256 131072", 8.0, head_dim=128, **_ENDS_31),
    "TinyLlama-1.1B-Chat-v1.0": _llama("2048 5632 22 32 4 32000 2048", attention_bias=False, rope_theta=10000.0),
    "Yi-6B": _llama("4096 11008 32 32 4 64000 4096", pad_token_id=0, rope_theta=5000000.0),
    "Yi-1.5-9B-Chat": _llama(
        "4096 11008 48 32 4 64000 4096", eos_token_id=7, rms_norm_eps=1e-06, rope_theta=5000000.0, mlp_bias=False
    ),
    "deepseek-coder-6.7b-instruct": _llama(
        "4096 11008 32 32 32 32256 16384",
        **{"bos_token_id": 32013, "eos_token_id": 32021, "rms_norm_eps": 1e-06},
        rope_scaling={"factor": 4.0, "type": "linear"},
        rope_theta=100000,
    ),
    "DeepSeek-R1-Distill-Llama-8B": _llama3("4096 14336 32 32 8 128256 131072", 8.0),
    "DeepSeek-R1-Distill-Qwen-1.5B": _qwen2(
        "1536 8960 28 12 2 151936 131072",
        **{"max_window_layers": 21, "rope_theta": 10000, "sliding_window": 4096, "use_mrope": False},
    ),
    "Llama-3.1-Tulu-3-8B": _llama3(
        "4096 14336 32 32 8 128264 131072", 8.0, _name_or_path="allenai/open_instruct_dev", eos_token_id=128009
    ),
    "SmolLM2-135M-Instruct": _llama(
        "576 1536 30 9 3 49152 8192",
        **{"attention_bias": False, "mlp_bias": False, "pad_token_id": 2, "rope_theta": 100000},
        tie_word_embeddings=True,
        **_NANOTRON,
        **_JS,
    ),
    "SmolLM2-1.7B": _llama(
        "2048 8192 24 32 32 49152 8192", rope_theta=130000, tie_word_embeddings=True, unk_token_id=0, **_NANOTRON
    ),
    "Mistral-7B-v0.1": _mistral("4096 14336 32 32 8 32000 32768", rope_theta=10000.0, sliding_window=4096),
    "Mistral-7B-Instruct-v0.2": _mistral("4096 14336 32 32 8 32000 32768", rope_theta=1000000.0),
    "Mistral-7B-Instruct-v0.3": _mistral("4096 14336 32 32 8 32768 32768", rope_theta=1000000.0),
    "Mistral-Nemo-Instruct-2407": _mistral("5120 14336 40 32 8 131072 131072", head_dim=128, rope_theta=1000000.0),
    "Mistral-Small-24B-Instruct-2501": _mistral(
        "5120 32768 40 32 8 131072 32768", head_dim=128, rope_theta=100000000.0, transformers_version="4.49.0.dev0"
    ),
    "zephyr-7b-beta": _mistral(
        "4096 14336 32 32 8 32000 32768",
        **{"_name_or_path": "mistralai/Mistral-7B-v0.1", "pad_token_id": 2, "rope_theta": 10000.0},
        sliding_window=4096,
    ),
    "Qwen1.5-7B-Chat": _qwen2("4096 11008 32 32 32 151936 32768", eos_token_id=151645, sliding_window=32768),
    "Qwen2-7B-Instruct": _qwen2("3584 18944 28 28 4 152064 32768", eos_token_id=151645),
    "Qwen2.5-0.5B-Instruct": _qwen2(
        "896 4864 24 14 2 151936 32768",
        **{"eos_token_id": 151645, "max_window_layers": 21, "sliding_window": 32768, "tie_word_embeddings": True},
    ),
    "Qwen2.5-7B with its card's yarn": _qwen2("3584 18944 28 28 4 152064 131072", use_mrope=False, rope_scaling=_YARN),
    "Qwen2.5-7B-Instruct-1M": _qwen2(
        "3584 18944 28 28 4 152064 1010000",
        dual_chunk_attention_config={
            "chunk_size": 262144,
            "local_size": 8192,
            "original_max_position_embeddings": 262144,
        },
        **{"eos_token_id": 151645, "rope_theta": 10000000.0, "sliding_window": 32768},
    ),
    "Qwen3-8B": _qwen3("4096 12288 36 32 8 151936 40960", transformers_version="4.51.0"),
    "Qwen3-0.6B": _qwen3("1024 3072 28 16 8 151936 40960", max_window_layers=28, tie_word_embeddings=True),
    "Qwen3-Embedding-0.6B": _qwen3(
        "1024 3072 28 16 8 151669 32768", eos_token_id=151643, max_window_layers=28, tie_word_embeddings=True
    ),
    "DeepSeek-R1-0528-Qwen3-8B with attention_factor": _qwen3(
        "4096 12288 36 32 8 151936 131072",
        **{"eos_token_id": 151645, "pad_token_id": 151645},
        rope_scaling={"attention_factor": 1.0, "rope_type": "yarn"} | {k: v for k, v in _YARN.items() if k != "type"},
    ),
}

# model_type, architecture, and a few of the fields that make them what they are
OTHERS = {
    "Mixtral-8x7B-v0.1": ("mixtral", "MixtralForCausalLM", {"num_local_experts": 8, "num_experts_per_tok": 2}),
    "gemma-2-9b": ("gemma2", "Gemma2ForCausalLM", {"attn_logit_softcapping": 50.0, "sliding_window": 4096}),
    "gemma-3-270m": ("gemma3_text", "Gemma3ForCausalLM", {"query_pre_attn_scalar": 256}),
    "gemma-7b": ("gemma", "GemmaForCausalLM", {"hidden_activation": None, "head_dim": 256}),
    "phi-2": ("phi", "PhiForCausalLM", {"partial_rotary_factor": 0.4}),
    "Phi-3-mini-4k-instruct": (
        "phi3",
        "Phi3ForCausalLM",
        {"auto_map": {"AutoConfig": "configuration_phi3.Phi3Config"}},
    ),
    "DeepSeek-V3": ("deepseek_v3", "DeepseekV3ForCausalLM", {"kv_lora_rank": 512, "n_routed_experts": 256}),
    "gpt2": ("gpt2", "GPT2LMHeadModel", {"n_embd": 768, "n_head": 12, "n_layer": 12}),
    "pythia-160m": ("gpt_neox", "GPTNeoXForCausalLM", {"rotary_pct": 0.25}),
    "Qwen2-VL-7B-Instruct": ("qwen2_vl", "Qwen2VLForConditionalGeneration", {"vision_config": {"depth": 32}}),
    "Qwen2.5-VL-7B-Instruct": ("qwen2_5_vl", "Qwen2_5_VLForConditionalGeneration", {"vision_config": {"depth": 32}}),
    "Qwen1.5-MoE-A2.7B": ("qwen2_moe", "Qwen2MoeForCausalLM", {"num_experts": 60}),
    "Qwen3-30B-A3B": ("qwen3_moe", "Qwen3MoeForCausalLM", {"num_experts": 128}),
    "Qwen-7B": ("qwen", "QWenLMHeadModel", {"auto_map": {"AutoModel": "modeling_qwen.QWenLMHeadModel"}}),
    "Llama-3.2-11B-Vision": ("mllama", "MllamaForConditionalGeneration", {"text_config": {"hidden_size": 4096}}),
    "Llama-4-Scout-17B-16E": ("llama4", "Llama4ForConditionalGeneration", {"text_config": {"hidden_size": 5120}}),
    "Mistral-Small-3.1-24B": ("mistral3", "Mistral3ForConditionalGeneration", {"text_config": {"hidden_size": 5120}}),
    "Ministral-8B": ("ministral", "MinistralForCausalLM", {"layer_types": ["sliding_attention"]}),
    "OLMo-2-1124-7B": ("olmo2", "Olmo2ForCausalLM", {}),
    "c4ai-command-r-v01": ("cohere", "CohereForCausalLM", {"logit_scale": 0.0625}),
    "falcon-7b": ("falcon", "FalconForCausalLM", {"multi_query": True}),
    "granite-3.1-8b-instruct": ("granite", "GraniteForCausalLM", {"logits_scaling": 16.0}),
    "stablelm-2-1_6b": ("stablelm", "StableLmForCausalLM", {"partial_rotary_factor": 0.25}),
    "internlm2-7b": ("internlm2", "InternLM2ForCausalLM", {"auto_map": {"AutoModel": "modeling_internlm2.X"}}),
    "flan-t5-base": ("t5", "T5ForConditionalGeneration", {"is_encoder_decoder": True}),
    "bert-base-uncased": ("bert", "BertForMaskedLM", {}),
    "a Llama reward model": ("llama", "LlamaForSequenceClassification", {"num_labels": 1}),
    "a Qwen2 reward model": ("qwen2", "Qwen2ForRewardModel", {}),
}


def shrunk(published: dict[str, Any]) -> dict[str, Any]:
    """The same model with few small layers; grouped heads stay grouped, contexts and windows keep their ratio."""
    grouped = published["num_key_value_heads"] < published["num_attention_heads"]
    small = {
        "hidden_size": _HEADS * _HEAD_DIM,
        "intermediate_size": 48,
        "num_attention_heads": _HEADS,
        "num_hidden_layers": _LAYERS,
        "num_key_value_heads": _HEADS // 2 if grouped else _HEADS,
        "vocab_size": _VOCABULARY,
    }
    if "head_dim" in published:
        own = published["head_dim"] * published["num_attention_heads"] != published["hidden_size"]
        small["head_dim"] = _HEAD_DIM * (1 + own)

    def contexts(fields: dict[str, Any]) -> dict[str, Any]:
        return {k: v // CONTEXT_PARTS for k, v in fields.items() if k in _CONTEXTS and v}

    if scaling := published.get("rope_scaling"):
        small["rope_scaling"] = scaling | contexts(scaling)
    tokens = {k: min(v, _VOCABULARY - 1) for k, v in published.items() if k.endswith("token_id") and isinstance(v, int)}
    return published | contexts(published) | tokens | small
