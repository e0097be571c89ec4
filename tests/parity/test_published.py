"""config.json of published models, sizes shrunk: read, with transformers' log-probs; others are refused by name."""

import json
import re

import numpy as np
import pytest
import torch
import transformers
from safetensors.numpy import save_file

from lm_jax.checkpoints.hf import load_params
from lm_jax.errors import UserError
from lm_jax.models.registry import config_from_hf, read_model_config
from tests.parity.test_families import our_logprobs
from tests.published_configs import OTHERS, PUBLISHED, shrunk

TOKENS = 48
TOLERANCE = 1e-5  # nats


def torch_model(directory):
    """transformers' model of a directory's config.json, every parameter random; its weights are written there."""
    config = transformers.AutoConfig.from_pretrained(directory)
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager", dtype=torch.float32)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(noise / parameter.shape[1] ** 0.5 if parameter.ndim == 2 else 1 + 0.3 * noise)
    save_file({name: x.detach().numpy() for name, x in model.named_parameters()}, directory / "model.safetensors")
    return model.eval()


@pytest.mark.parametrize("name", PUBLISHED)
def test_logprobs_equal_transformers(name, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(shrunk(PUBLISHED[name])))
    model = torch_model(tmp_path)
    tokens = np.random.default_rng(0).integers(0, model.config.vocab_size, (2, TOKENS), dtype=np.int32)
    with torch.no_grad():
        theirs = torch.log_softmax(model(torch.tensor(tokens, dtype=torch.long)).logits, dim=-1).numpy()
    assert theirs.std() > 0.5, "flat logits would hide differences"
    config = read_model_config(tmp_path)
    ours = our_logprobs(load_params(tmp_path, config, None), config, tokens)
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("name", OTHERS)
def test_other_architectures_are_refused_by_name(name):
    model_type, architecture, fields = OTHERS[name]
    with pytest.raises(UserError, match=f"model_type '{model_type}' .*{re.escape(architecture)}.*not supported"):
        config_from_hf({"model_type": model_type, "architectures": [architecture], **fields})
