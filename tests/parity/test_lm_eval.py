"""Our model against lm-eval's own `hf` model: the same requests, the same numbers."""

import shutil

import numpy as np
import pytest
import transformers
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from lm_eval.models.utils import postprocess_generated_text
from tokenizers.processors import TemplateProcessing

from lm_jax.checkpoints.runs import open_model
from lm_jax.config import BatchConfig, ComputeConfig, DecodeConfig, MeshConfig
from lm_jax.errors import UserError
from lm_jax.evaluation.harness import JaxLM
from lm_jax.evaluation.tasks import Tasks
from lm_jax.generation.requests import Completion, Sample
from lm_jax.sharding import make_mesh
from tests.checkpoints import make_checkpoint, make_tokenizer
from tests.lm_eval_tasks import make_tasks

CONTEXT = 64


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> str:
    path = tmp_path_factory.mktemp("model")
    # lm-eval's own model draws ids that the tokenizer lacks; ours never does
    make_checkpoint(path, "llama", max_position_embeddings=CONTEXT, vocab_size=len(make_tokenizer(path)))
    return str(path)


@pytest.fixture(scope="module")
def ours(checkpoint) -> JaxLM:
    return make_ours(checkpoint)


def make_ours(checkpoint: str, kwargs: str = "", think_end: str = "</think>") -> JaxLM:
    return JaxLM(
        open_model(checkpoint),
        checkpoint,
        make_mesh(MeshConfig(1, 1, 1)),
        "float32",
        2048,  # more than the model's context, which then decides
        ComputeConfig("float32"),
        BatchConfig(4, 2 * CONTEXT),
        DecodeConfig(8, 2048, 4),
        seed=0,
        chat_template_kwargs=kwargs,
        think_end=think_end,
    )


@pytest.fixture(scope="module")
def theirs(checkpoint) -> HFLM:
    return HFLM(pretrained=checkpoint, device="cpu", dtype="float32", batch_size=8)


@pytest.fixture(scope="module")
def results(tmp_path_factory, ours, theirs):
    """`results(name, limit)`: what lm-eval found for our model and for its own."""
    paths = make_tasks(tmp_path_factory.mktemp("tasks"))
    tasks = Tasks(list(paths.values()), None)
    return lambda name, limit: [tasks.run(paths[name], lm, None, limit, False) for lm in (ours, theirs)]


def asked(kind: str, *arguments: tuple) -> list[Instance]:
    return [Instance(kind, {}, args, i) for i, args in enumerate(arguments)]


def answers(found: dict, task: str) -> list:
    """What the model said to each question."""
    return [row["resps"] for row in found["samples"][task]]


def test_log_likelihoods_of_a_task(ours, results):
    """200 questions of two to four choices, every tenth longer than the model's context."""
    before = ours.truncated
    a, b = results("choose", None)
    said, expected = (answers(x, "local_choose") for x in (a, b))
    assert len(said) == 200 and ours.truncated > before
    for x, y in zip(said, expected, strict=True):
        (logprobs, greedy), (true, is_greedy) = (zip(*(choice for (choice,) in z), strict=True) for z in (x, y))
        np.testing.assert_allclose(np.array(logprobs, float), np.array(true, float), rtol=0, atol=1e-3)
        assert greedy == is_greedy
    for key, value in b["results"]["local_choose"].items():
        if isinstance(value, float):
            assert a["results"]["local_choose"][key] == pytest.approx(value, abs=1e-6), key


def test_texts_of_a_task(results):
    said, expected = (answers(x, "local_write") for x in results("write", 40))
    assert said == expected
    assert len({str(x) for x in said}) > 10  # they are not all empty
    assert not any("c" in text for ((text,),) in said)


def test_perplexity_of_a_task(results):
    """Texts longer than the context go in windows."""
    said, expected = (np.array(answers(x, "local_read"), float).ravel() for x in results("read", 41))
    assert len(said) == 41
    np.testing.assert_allclose(said, expected, rtol=0, atol=1e-3)


def test_greedy_is_told(ours, theirs):
    """A continuation that greedy decoding gives, and the same with another end."""
    contexts = ["the cat", "what is this", "user"]
    stops = {"until": [], "max_gen_toks": 5}
    greedy = ours.generate_until(asked("generate_until", *((c, stops) for c in contexts)))
    pairs = [(c, g) for c, g in zip(contexts, greedy, strict=True)] + [("the cat", " zzz"), ("", "the"), ("a ", "b")]
    said, expected = (lm.loglikelihood(asked("loglikelihood", *pairs)) for lm in (ours, theirs))
    assert [g for _, g in said] == [g for _, g in expected]
    assert any(g for _, g in said) and not all(g for _, g in said)
    np.testing.assert_allclose([x for x, _ in said], [x for x, _ in expected], atol=1e-3)


def test_a_leading_special_token_is_not_doubled(checkpoint, tmp_path):
    """Of a tokenizer that sets one before every text, as Llama's do; a template's text begins with it already."""
    path = shutil.copytree(checkpoint, tmp_path / "model")
    tokenizer = transformers.AutoTokenizer.from_pretrained(path, bos_token="<|im_start|>")
    lead = ("<|im_start|>", tokenizer.bos_token_id)
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single=f"{lead[0]} $A", special_tokens=[lead])
    tokenizer.save_pretrained(path)
    a, b = make_ours(str(path)), HFLM(pretrained=str(path), device="cpu", dtype="float32")
    texts = ["the cat", "<|im_start|>user\nthe<|im_end|>\n", "<|im_end|>the"]
    assert [a.tok_encode(t) for t in texts] == [b.tok_encode(t) for t in texts]
    assert [a.tok_encode(t)[:2].count(lead[1]) for t in texts] == [1, 1, 1]
    pairs = [(text, " hat") for text in texts] + [("", " hat"), ("", "<|im_start|>hat")]
    said, expected = (lm.loglikelihood(asked("loglikelihood", *pairs)) for lm in (a, b))
    np.testing.assert_allclose([x for x, _ in said], [x for x, _ in expected], atol=1e-3)
    requests = asked("generate_until", *((text, {"until": ["\n"], "max_gen_toks": 6}) for text in texts))
    assert a.generate_until(requests) == b.generate_until(requests)


def test_the_chat_template(ours, theirs):
    chat = [{"role": "system", "content": "see"}, {"role": "user", "content": "what is this"}]
    assert ours.apply_chat_template(chat) == theirs.apply_chat_template(chat)
    begun = [*chat, {"role": "assistant", "content": "that"}]
    assert ours.apply_chat_template(begun, False) == theirs.apply_chat_template(begun, False)
    assert ours.chat_template(True) == theirs.chat_template(True)


def test_what_cannot_be_asked(ours):
    with pytest.raises(UserError, match="raise config.max_length"):
        ours.generate_until(asked("generate_until", ("the", {"until": [], "max_gen_toks": CONTEXT})))
    with pytest.raises(UserError, match="a continuation has .* tokens"):
        ours.loglikelihood(asked("loglikelihood", ("the", " zq" * CONTEXT)))
    with pytest.raises(UserError, match="'penalty_alpha'"):
        ours.generate_until(asked("generate_until", ("the", {"until": [], "penalty_alpha": 1.0})))
    with pytest.raises(UserError, match="beam search"):
        ours.generate_until(asked("generate_until", ("the", {"until": [], "num_beams": 4})))


def test_a_draw_repeats(ours):
    request = ("the cat", {"until": [], "max_gen_toks": 8, "do_sample": True, "temperature": 1.5, "top_p": 0.9})
    first, second = (ours.generate_until(asked("generate_until", request, request)) for _ in range(2))
    assert first == second and first[0] != first[1]


class Said:
    """A generator that says what it is told to, and keeps what it was asked."""

    def __init__(self, tokenizer, texts):
        self.ids, self.asked = [tuple(tokenizer(text)["input_ids"]) for text in texts], []

    def generate(self, requests, sampling):
        self.asked += requests
        yield [Completion(r.id, (Sample("", "stop", 1, self.ids[int(r.id)]),)) for r in requests]


@pytest.mark.parametrize("special", [False, True])
def test_answers_without_thoughts(checkpoint, tmp_path, special):
    """As lm-eval's own postprocessing, which takes thoughts off before it cuts at a stop; also of special tokens."""
    path = shutil.copytree(checkpoint, tmp_path / "model")
    if special:
        tokenizer = transformers.AutoTokenizer.from_pretrained(path)
        tokenizer.add_special_tokens({"additional_special_tokens": ["<think>", "</think>"]})
        tokenizer.save_pretrained(path)
        make_checkpoint(path, "llama", max_position_embeddings=CONTEXT, vocab_size=len(tokenizer))
    texts = ["<think>a\n\nb</think> hat\n\ncat", "a\n\nb</think>hat", "hat\n\ncat", "<think>a\n\nb", "a\n\nb"]
    contexts = ["the", "the<think>\n", "the", "the", "the<think>\n"]
    stops = {"until": ["\n\n"], "max_gen_toks": 5}
    for end, expected in (("</think>", ["hat", "hat", "hat", "", ""]), ("", None)):
        lm = make_ours(str(path), think_end=end)
        lm._generator = Said(lm.tokenizer, texts)
        found = lm.generate_until(asked("generate_until", *((c, stops) for c in contexts)))
        assert {request.think_end for request in lm._generator.asked} == {end}
        if expected is None:  # all of it, and cut in the thoughts
            decoded = [lm.tokenizer.decode(ids, skip_special_tokens=True) for ids in lm._generator.ids]
            expected = [postprocess_generated_text(text, ["\n\n"], None) for text in decoded]
        assert found == expected


def test_arguments_reach_the_chat_template(checkpoint, tmp_path):
    path = shutil.copytree(checkpoint, tmp_path / "model")
    template = "{% for m in messages %}{{ m.content }}{% endfor %}{{ 'aloud' if enable_thinking is false else 'hm' }}"
    (path / "chat_template.jinja").write_text(template)
    kwargs = {"enable_thinking": False}
    ours = make_ours(str(path), kwargs='{"enable_thinking": false}')
    theirs = HFLM(pretrained=str(path), device="cpu", dtype="float32", chat_template_args=kwargs)
    chat = [{"role": "user", "content": "what is this "}]
    assert ours.apply_chat_template(chat) == theirs.apply_chat_template(chat) == "what is this aloud"
