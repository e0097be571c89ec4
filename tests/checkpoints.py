"""Tiny random checkpoints in Hugging Face format, made by transformers and torch."""

import json
from pathlib import Path

import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

TINY = {
    "vocab_size": 320,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "bos_token_id": None,
    "eos_token_id": 0,
    "pad_token_id": None,
    "attn_implementation": "eager",
}
FAMILY_TINY = {"llama": {}, "mistral": {"sliding_window": None}, "qwen2": {}, "qwen3": {"head_dim": 8}}
CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def make_checkpoint(path, family, *, seed=0, dtype="float32", max_shard_size="5GB", **overrides):
    """Writes a random checkpoint of `family` to `path` and returns the torch model, in eval mode.

    Every parameter is drawn anew, norm scales and biases too, so that none of them can be ignored without being seen.
    Logits spread over several nats. `overrides` are config.json fields; the sizes default to TINY.
    """
    config = transformers.AutoConfig.for_model(family, **{**TINY, **FAMILY_TINY[family], **overrides})
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.ndim == 2:
                gain = 2.0 if name.startswith(("model.embed_tokens", "lm_head")) else 1.5
                parameter.copy_(gain * noise / parameter.shape[1] ** 0.5)
            else:
                parameter.copy_(0.5 * noise + (0.0 if name.endswith("bias") else 1.0))
    model.to(getattr(torch, dtype)).save_pretrained(path, max_shard_size=max_shard_size)
    return model


def make_tokenizer(path):
    """Writes a byte-level BPE tokenizer of at most 300 tokens with a ChatML template; the end token has id 0."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<|im_end|>", "<|im_start|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(["the cat and the hat", "what is this and that", "user assistant system"], trainer)
    wrapped = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<|im_end|>", pad_token="<|im_end|>", chat_template=CHATML
    )
    wrapped.save_pretrained(path)
    return wrapped


def edit_config(path, remove=(), **fields):
    """Changes config.json in place."""
    file = Path(path) / "config.json"
    config = json.loads(file.read_text()) | fields
    file.write_text(json.dumps({k: v for k, v in config.items() if k not in remove}))
