"""Responses to prompts, from a model that runs here or from a server.

    python -m launch.generate --config=configs/generate.py --config.model=DIR --config.input=prompts.jsonl \
        --config.output=answers.jsonl

Expect: the rows in their order, each with its `id`, `response` and `finish_reason` (stop, length or error); a list of
them with `num_samples` above 1; and one line of JSON with rows, failed, tokens and seconds. Rows are kept in
`answers.jsonl.partial` as they finish: the same command continues a run that was interrupted, and ends with the same
bytes as if it had not been.

Behind an OpenAI-compatible server (vLLM, SGLang) instead:

    python -m launch.generate --config=configs/generate.py --config.endpoint.url=http://localhost:8000/v1 \
        --config.endpoint.model=Qwen/Qwen3-8B --config.input=prompts.jsonl --config.output=answers.jsonl
"""

from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder


def get_config() -> ConfigDict:
    c = ConfigDict()
    c.model = placeholder(str)  # Hugging Face directory, hub id or run directory; none with an endpoint
    c.input = placeholder(str)  # rows with `prompt`: raw text, or messages for the chat template
    c.columns = ""  # ours=yours: "instruction=question" (docs/data.md); none: by their own names
    c.max_dropped_share = 0.01  # of a file's rows that may be faulty and are left out; with more nothing is written
    c.output = placeholder(str)  # a local .jsonl; appears when it is whole
    c.chat_template_kwargs = ""  # JSON for the chat template: {"enable_thinking": false}; a row's own column goes first
    c.seed = 0  # with a row's id it decides every random draw
    c.dtype = "float32"  # CPUs are no faster in bfloat16; accelerators are, in half the memory
    c.max_new_tokens = 512  # of one response; a row's own `max_new_tokens` may be less
    c.temperature = 0.7  # 0 takes the likeliest token
    c.top_k = 0  # off
    c.top_p = 1.0  # off
    c.min_p = 0.0  # off
    c.repetition_penalty = 1.0  # off
    c.num_samples = 1  # responses a prompt; above 1 the columns hold lists
    c.stop = ()  # texts or token ids that end a response, besides the model's end tokens: '("\n\n","User:")'
    c.max_failed_share = 0.05  # more rows than this without an answer are no accident: stop with an error

    c.decode = ConfigDict()
    c.decode.slots = 64  # responses written at once, over all devices; more keeps accelerators busier, in more memory
    c.decode.max_length = 2048  # tokens of prompt + response that a slot holds
    c.decode.chunk = 8  # tokens between two looks at what has finished; 32 where responses are long

    c.endpoint = ConfigDict()
    c.endpoint.url = ""  # as http://localhost:8000/v1; empty: the model runs here
    c.endpoint.model = ""  # the name that the server gives it
    c.endpoint.concurrency = 32  # requests under way at once, which the server batches
    c.endpoint.timeout = 600.0  # seconds that one request may take

    c.mesh = ConfigDict()
    c.mesh.data = 1  # copies of the model; -1 here and tensor=1 is fastest where a device holds it whole
    c.mesh.fsdp = 1  # cuts parameters that every token would gather anew: last resort
    c.mesh.tensor = -1  # all devices cut each layer

    c.compute = ConfigDict()
    c.compute.dtype = c.get_ref("dtype")
    c.compute.remat = "none"  # no gradient, nothing to recompute
    c.compute.attention = "auto"  # the platform's kernel
    c.compute.logprob_chunk = 256  # not read here
    c.compute.scan_unroll = 1  # layers compiled together
    return c
