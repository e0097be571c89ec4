"""MAIN's rounds around a training that only notes what it was called with: what each model learns, and from where."""

import json
from pathlib import Path

import pytest

from configs.main_rounds import get_config
from lm_jax.config import from_config_dict
from lm_jax.data.rows import read_rows, write_jsonl
from lm_jax.errors import UserError
from main_jax.rounds import command as rounds
from main_jax.rounds import rows as round_rows
from main_jax.rounds.candidates import Candidates
from main_jax.rounds.config import RoundsConfig
from main_jax.rounds.inputs import read_seeds
from main_jax.rounds.report import rounds_table, training_summary
from main_jax.rounds.rows import DIRECTIONS, shared_weights
from tests.checkpoints import make_checkpoint, make_tokenizer
from tests.main_writers import ASK, SAMPLED, Writers

SEEDS = [{"instruction": f"Say {i}.", "input": "Real." if i % 2 else "", "output": f"Here is {i}."} for i in range(6)]
RESPONSES = [{"id": f"r{i}", "response": f"Real text {i} that nobody asked for.", "document": i} for i in range(8)]
WORDS = {"seed_system": "S", "synthetic_system": "W", "reverse_system": "", "reverse_question": ASK}


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> str:
    path = tmp_path_factory.mktemp("model")
    make_checkpoint(path, "llama", max_position_embeddings=512)
    make_tokenizer(path)
    return str(path)


class Trainings:
    """Stands in for `train`. `fault`: (direction, round) that ends with an error."""

    def __init__(self):
        self.configs, self.fault = [], None

    def train(self, config):
        here = Path(config.output)
        self.configs.append(config)
        if self.fault == (here.name, int(here.parent.name.removeprefix("round_"))):
            raise UserError("config.optim.learning_rate is bad and config.model too")
        steps = [{"step": n + 1, "loss": 4.0 - n, "loss/seed": 1.0 * n, "num_tokens": 10 * n + 10} for n in range(4)]
        write_jsonl(f"{config.output}/metrics.jsonl", [*steps, {"step": 4, "eval_loss": 9.0}])

    def named(self):
        return [(Path(c.output).name, int(Path(c.output).parent.name.removeprefix("round_"))) for c in self.configs]


@pytest.fixture
def trainings(monkeypatch) -> Trainings:
    trainings = Trainings()
    monkeypatch.setattr(rounds, "train", trainings.train)
    return trainings


@pytest.fixture
def run(tmp_path, trainings, model):
    """run(**settings): the rows of the report."""

    def call(seeds=SEEDS, unlabelled=RESPONSES, writers=None, **settings):
        files = {"seeds": f"{tmp_path}/seeds.jsonl", "unlabelled": f"{tmp_path}/responses.jsonl"}
        for path, rows in zip(files.values(), (seeds, unlabelled), strict=True):
            write_jsonl(path, rows) if rows else Path(path).write_text("")
        config = get_config("tiny")
        config.prompts.update(WORDS)
        for name in ("instructions", "responses"):
            config[name].max_new_tokens = 16
        for name in DIRECTIONS:
            config[name].max_length = 256
        config.update({"model": model, "output": f"{tmp_path}/out", **files})
        config.update(settings)
        rounds.run_rounds(from_config_dict(RoundsConfig, config.to_dict()), writers or Writers())
        return read_rows(f"{tmp_path}/out/rounds.jsonl")

    return call


def learnt(tmp_path, number: int, direction: str) -> list[dict]:
    rows = read_rows(f"{tmp_path}/out/round_{number}/{direction}.jsonl")
    assert all([m["role"] for m in row["messages"]][-2:] == ["user", "assistant"] for row in rows)
    return [{**row, "prompt": row["messages"][:-1], "response": row["messages"][-1]["content"]} for row in rows]


def user(row: dict) -> str:
    return row["prompt"][-1]["content"]


def test_the_target_is_always_real_text(run, tmp_path):
    run()
    real = {
        "forward": {row["output"] for row in SEEDS} | {row["response"] for row in RESPONSES},
        "reverse": {"\n".join(filter(None, (row["instruction"], row["input"]))) for row in SEEDS},
    }
    for number in range(3):
        for direction in DIRECTIONS:
            rows = learnt(tmp_path, number, direction)
            assert {row["response"] for row in rows} <= real[direction]
            assert not any(SAMPLED in row["response"] for row in rows)
            # What the other model wrote is only ever read, and is all that makes a row synthetic
            assert [SAMPLED in user(row) for row in rows] == [row["source"] == "synthetic" for row in rows]
            assert sum(row["source"] == "seed" for row in rows) == len(SEEDS)
            assert (len(rows) > len(SEEDS)) == (number > 0)


def test_the_pairs_that_belong_together(run, tmp_path):
    run(rounds=1)
    written = {row["id"]: row["response"] for row in read_rows(f"{tmp_path}/out/round_1/responses.jsonl")}
    responses = {row["id"]: row["response"] for row in RESPONSES}
    for row in learnt(tmp_path, 1, "forward"):
        tag = {"role": "system", "content": "S" if row["source"] == "seed" else "W"}
        assert row["prompt"][0] == tag
        if row["source"] == "synthetic":
            assert row["response"] == responses[row["id"]] and user(row).endswith(f"for {row['id']}")
    for row in learnt(tmp_path, 1, "reverse"):
        number = int(row["id"].rpartition("-")[2])
        given = SEEDS[number]["output"] if row["source"] == "seed" else written[number]
        assert row["response"].startswith(f"Say {number}.") and user(row) == ASK.format(response=given)


def test_what_is_asked(run, tmp_path):
    writers = Writers()
    run(rounds=1, writers=writers, seed=5, responses={"temperature": 0.3})
    reverse = {r.id: (r, s) for r, s in writers.asked if r.id in {row["id"] for row in RESPONSES}}
    forward = {r.id: (r, s) for r, s in writers.asked if r.id not in reverse}
    assert len(reverse) == 8 and sorted(forward) == [str(i) for i in range(6)]
    for row in RESPONSES:
        request, sampling = reverse[row["id"]]
        assert request.prompt == [{"role": "user", "content": ASK.format(response=row["response"])}]
        assert (sampling.num_samples, sampling.seed, sampling.temperature) == (4, 6, 0.7)
    for i, row in enumerate(SEEDS):
        request, sampling = forward[str(i)]
        question = "\n".join(filter(None, (row["instruction"], row["input"])))
        assert request.prompt == [{"role": "system", "content": "S"}, {"role": "user", "content": question}]
        assert (sampling.num_samples, sampling.seed, sampling.temperature) == (1, 6, 0.3)


def test_all_candidates_are_written_and_a_response_counts_once(run, tmp_path):
    (_, row) = run(rounds=1)
    path = f"{tmp_path}/out/round_1/candidates.jsonl"
    found = read_rows(path)
    assert len(Candidates(path)) == 32 and len(Candidates(path).first) == 8
    assert [(c["id"], c["candidate"], c["document"]) for c in found] == [
        (f"r{i}", n, i) for i in range(8) for n in range(4)
    ]
    valid = [c for c in found if c["fault"] is None]
    assert all(c["instruction"].startswith(SAMPLED) for c in valid)  # read, without its label
    assert all(c["instruction"] is None for c in found if c["fault"])
    synthetic = [r for r in learnt(tmp_path, 1, "forward") if r["source"] == "synthetic"]
    assert [user(r) for r in synthetic] == [c["instruction"] for c in valid]
    for name in {r["id"] for r in synthetic}:
        weights = [r["weight"] for r in synthetic if r["id"] == name]
        assert sum(weights) == pytest.approx(1.0) and len({*weights}) == 1
    dropped = row["forward"]["dropped"]
    assert {*dropped} == {"refusal", "empty", "truncated"} and sum(dropped.values()) == 32 - len(valid)
    assert row["forward"]["rows"] == {"seed": 6, "synthetic": len(valid)}
    assert row["reverse"]["rows"]["synthetic"] + sum(row["reverse"]["dropped"].values()) == 6


def test_one_candidate_is_learnt(run, tmp_path):
    run(rounds=1, learnt_candidates=1)
    first = {}
    for c in read_rows(f"{tmp_path}/out/round_1/candidates.jsonl"):
        if c["instruction"]:
            first.setdefault(c["id"], c["instruction"])
    synthetic = [r for r in learnt(tmp_path, 1, "forward") if r["source"] == "synthetic"]
    assert {r["id"]: user(r) for r in synthetic} == first and {r["weight"] for r in synthetic} == {1.0}


def test_shared_weights():
    rows = [{"id": name, "weight": 1.0, "n": n} for name, count in (("a", 3), ("b", 1)) for n in range(count)]
    assert [r["weight"] for r in shared_weights(rows, None)] == [1 / 3, 1 / 3, 1 / 3, 1.0]
    assert [(r["id"], r["n"], r["weight"]) for r in shared_weights(rows, 2)] == [
        *(("a", 0, 0.5), ("a", 1, 0.5)),
        ("b", 0, 1.0),
    ]


@pytest.mark.parametrize("start", ["base", "previous"])
def test_where_models_begin(run, trainings, tmp_path, model, start, monkeypatch):
    out, generate, writers = f"{tmp_path}/out", rounds.generate_rows, []

    def generate_rows(config, generator):
        writers.append((Path(config.output).stem, config.model))
        generate(config, generator)

    monkeypatch.setattr(rounds, "generate_rows", generate_rows)
    rows = run(seed=7, start=start, forward={"optim": {"learning_rate": 2e-3}}, reverse={"alpha": {"rule": "fixed"}})
    assert trainings.named() == [(d, n) for n in range(3) for d in DIRECTIONS]
    for config, (direction, number) in zip(trainings.configs, trainings.named(), strict=True):
        expected = model if start == "base" or number == 0 else f"{out}/round_{number - 1}/{direction}"
        assert config.model == expected == rows[number][direction]["model"]
        assert config.input == f"{out}/round_{number}/{direction}.jsonl" and config.seed == 7 + number
        assert config.eval_input is None and config.response_column is None
        assert config.optim.learning_rate == (2e-3 if direction == "forward" else 1e-3)
        assert config.alpha.rule == ("fixed" if direction == "reverse" else "loss_ratio")
    # The models of the round before write: the reverse one instructions, the forward one responses
    assert writers == [
        (sampled, f"{out}/round_{n}/{direction}")
        for n in range(2)
        for sampled, direction in (("instructions", "reverse"), ("responses", "forward"))
    ]


def test_another_reverse_model(run, trainings, tmp_path):
    other = tmp_path / "other"
    make_checkpoint(other, "llama", max_position_embeddings=256, seed=1)
    make_tokenizer(other)
    run(rounds=1, reverse_model=str(other))
    assert [c.model == str(other) for c in trainings.configs] == [False, True, False, True]
    tokenizer = json.loads((other / "tokenizer.json").read_text())
    tokenizer["model"]["merges"].pop()
    (other / "tokenizer.json").write_text(json.dumps(tokenizer))
    with pytest.raises(UserError, match=rf"config.reverse_model={other}: their tokenizers or chat templates differ"):
        run(rounds=1, reverse_model=str(other), output=f"{tmp_path}/new")
    assert not (tmp_path / "new").exists()


def test_what_is_too_long(run, tmp_path):
    """Texts of more tokens than are learnt (256), or than leave room to answer (512): counted, each where it is."""
    long, longer = "word " * 70, "word " * 200
    seeds = [*SEEDS, *({"instruction": text, "output": "So."} for text in (long, longer))]
    seeds += [{"instruction": "Say it.", "output": long}]
    responses = [*RESPONSES, {"id": "long", "response": long}, {"id": "longer", "response": longer}]
    first, row = run(seeds, responses, Writers(faulty=0), rounds=1)
    assert first["forward"]["rows"] == first["reverse"]["rows"] == {"seed": 6, "synthetic": 0}
    assert row["forward"]["seeds_too_long"] == row["reverse"]["seeds_too_long"] == 3
    assert row["forward"]["not_asked"] == 2
    assert not {"long", "longer"} & {c["id"] for c in read_rows(f"{tmp_path}/out/round_1/candidates.jsonl")}
    assert row["reverse"]["not_asked"] == 1 and row["reverse"]["dropped"] == {"too_long_to_learn": 1}
    # The seed with a long response and a short instruction: what is sampled for it can be learnt
    assert row["reverse"]["rows"]["synthetic"] == 7 and row["forward"]["dropped"] == {}


def test_a_part_that_fails(run, trainings, tmp_path):
    trainings.fault = "reverse", 1
    with pytest.raises(UserError, match="^round 1: config.reverse.optim.learning_rate is bad and config.model too"):
        run()
    done = [tmp_path / f"out/round_{n}/round.json" for n in range(3)]
    assert [path.exists() for path in done] == [True, False, False]
    trainings.fault = None
    trainings.configs.clear()
    writers = Writers()
    assert len(run(writers=writers)) == 3 and trainings.named()[0] == ("forward", 1)
    assert {s.seed for _, s in writers.asked} == {2}  # round 1 had its answers
    trainings.configs.clear()
    assert len(run(writers=writers)) == 3 and not trainings.configs


def test_more_rounds_follow(run, trainings):
    run(rounds=1)
    trainings.configs.clear()
    rows = run(rounds=2, instructions={"decode": {"slots": 2}}, forward={"checkpoints": {"every": 7}})
    assert trainings.named() == [("forward", 2), ("reverse", 2)] and [row["round"] for row in rows] == [0, 1, 2]


@pytest.mark.parametrize(
    ("changed", "part"),
    [
        ({"candidates": 3}, "config.candidates=4, now 3"),
        ({"start": "previous"}, "config.start='base', now 'previous'"),
        ({"prompts": {"seed_system": "T"}}, "config.prompts.seed_system='S', now 'T'"),
        ({"instructions": {"temperature": 0.5}}, "config.instructions.temperature=0.7, now 0.5"),
        ({"seeds": SEEDS[:5]}, "other rows than config.seeds="),
        ({"unlabelled": RESPONSES[:5]}, "other rows than config.unlabelled="),
    ],
)
def test_other_settings_are_refused(run, changed, part):
    run(rounds=1)
    with pytest.raises(UserError) as raised:
        run(rounds=1, **changed)
    assert part in str(raised.value)


@pytest.mark.parametrize(
    ("settings", "part"),
    [
        ({"rounds": 0}, "config.rounds=0: must be at least 1"),
        ({"candidates": 0}, "config.candidates=0: must be at least 1"),
        ({"learnt_candidates": 5}, "config.learnt_candidates=5: must be between 1 and config.candidates=4"),
        ({"start": "seed"}, "config.start='seed': must be base or previous"),
        ({"sharing": "half"}, "config.sharing='half': must be full or adapters"),
        ({"sharing": "adapters"}, "config.forward.lora.rank=0: config.sharing=adapters trains adapters"),
        ({"forward": {"lora": {"rank": 4}}}, "config.forward.lora.rank=4: config.sharing=full"),
        ({"seed": 2**32 - 1}, "config.seed"),
        ({"instructions": {"temperature": 0.0}}, "config.instructions.temperature=0.0: config.candidates=4"),
        ({"responses": {"top_p": 2.0}}, "config.responses.top_p=2.0"),
        ({"reverse": {"epochs": 0}}, "config.reverse.epochs: must be at least 1"),
        ({"forward": {"batch": {"examples": 0}}}, "config.forward.batch.examples: must be at least 1"),
        ({"prompts": {"format": "text", "reverse_text": "x"}}, "config.prompts.reverse_text"),
        ({"seeds": []}, "seeds.jsonl: the file is empty"),
        ({"unlabelled": []}, "responses.jsonl: the file is empty"),
        ({"seeds": [{"question": "a"}]}, "seeds.jsonl row 0: column 'response' is missing"),
        ({"seeds": [{"instruction": "Say."}]}, "seeds.jsonl row 0: column 'output' is missing"),
        ({"seeds": [{"instruction": "", "output": "a"}]}, "seeds.jsonl row 0: instruction and input are both empty"),
        ({"seeds": [*SEEDS, {"instruction": "Say.", "output": " "}]}, "seeds.jsonl row 6: its response is empty"),
        ({"seeds": [{**SEEDS[0], "weight": 0}]}, "no seed pairs left"),
        ({"seeds": [{**SEEDS[0], "source": "synthetic"}]}, "seeds.jsonl row 0: source is 'synthetic'"),
        ({"unlabelled": [{"id": 1}]}, "row 0: column 'response' is missing"),
        ({"unlabelled": [RESPONSES[0], RESPONSES[0]]}, "responses.jsonl row 1: has the same id 'r0' as row 0"),
        ({"unlabelled": [{"id": 1, "response": "\n"}]}, "responses.jsonl row 0: response must be a text"),
        ({"unlabelled": [{"id": 1, "response": "w " * 300}]}, "responses.jsonl: all rows are too long"),
        ({"instructions": {"max_new_tokens": 512}}, "responses.jsonl: all rows are too long"),
        ({"seeds": [{"prompt": "a", "response": "w " * 300}]}, "seeds.jsonl: all 1 pairs are longer than config.forw"),
    ],
)
def test_settings_and_inputs(run, trainings, tmp_path, settings, part):
    with pytest.raises(UserError) as raised:
        run(**settings)
    assert part in str(raised.value), raised.value
    assert not trainings.configs and not (tmp_path / "out").exists()


def test_adapters_do_not_nest(run):
    lora = {"sharing": "adapters", "forward": {"lora": {"rank": 2}}, "reverse": {"lora": {"rank": 2}}}
    with pytest.raises(UserError, match="config.start='previous': adapters belong to the one frozen base"):
        run(start="previous", **lora)
    with pytest.raises(UserError, match="config.reverse_model='m': with config.sharing=adapters"):
        run(reverse_model="m", **lora)


def test_nothing_that_could_be_used(run, tmp_path):
    with pytest.raises(UserError, match=r"^round 1: no instruction could be used .*\(\d+ \w+") as raised:
        run(writers=Writers(faulty=10))
    assert f"{tmp_path}/out/round_1/instructions.jsonl" in str(raised.value)


@pytest.mark.parametrize(
    "row",
    [
        {"messages": [{"role": "user", "content": "Q"}, {"role": "assistant", "content": "A"}]},
        {"prompt": "Q", "response": "A"},
        {"prompt": [{"role": "user", "content": "Q"}], "response": [{"role": "assistant", "content": "A"}]},
        {"conversations": [{"from": "human", "value": "Q"}, {"from": "gpt", "value": "A"}]},
        {"instruction": "Q", "output": "A", "weight": 0.5},
    ],
)
def test_layouts_of_seeds(tmp_path, row):
    write_jsonl(f"{tmp_path}/seeds.jsonl", [row])
    (pair,), _ = read_seeds(f"{tmp_path}/seeds.jsonl")
    assert (pair.instruction, pair.response, pair.weight) == ("Q", "A", row.get("weight", 1.0))


def test_arguments_of_the_template_go_along(run, tmp_path):
    """A row's own reach all that is asked about it and learnt of it, in the column that training reads."""
    own, writers = {"enable_thinking": False}, Writers()
    more = {"chat_template_kwargs": own}
    run([SEEDS[0] | more, *SEEDS[1:]], [RESPONSES[0] | more, *RESPONSES[1:]], writers=writers, rounds=1)
    asked = {request.id: request.prompt[0] for request, _ in writers.asked}
    head = {"role": "template_arguments", "content": json.dumps(own)}
    assert {id for id, first in asked.items() if first == head} == {RESPONSES[0]["id"], "0"}
    for direction in DIRECTIONS:
        rows = learnt(tmp_path, 1, direction)
        names = {str(row["id"]) for row in rows if row.get("chat_template_kwargs") == own}
        other = RESPONSES[0]["id"] if direction == "forward" else "synthetic-0"
        assert names == {"seed-0", other} and not any("chat_template_kwargs" in r for r in rows if r["id"] not in names)
    write_jsonl(f"{tmp_path}/tools.jsonl", [SEEDS[0] | {"tools": [{"type": "function", "function": {"name": "f"}}]}])
    with pytest.raises(UserError, match="tools.jsonl row 0: has tools"):
        read_seeds(f"{tmp_path}/tools.jsonl")


@pytest.mark.parametrize("extra", ["system", "turns"])
def test_seeds_of_more_than_one_turn(tmp_path, extra):
    turns = [{"role": "user", "content": "Q"}, {"role": "assistant", "content": "A"}]
    turns = [{"role": "system", "content": "S"}, *turns] if extra == "system" else turns * 2
    write_jsonl(f"{tmp_path}/seeds.jsonl", [{"messages": turns}])
    with pytest.raises(UserError, match="seeds.jsonl row 0: has messages of .* a seed is one instruction and one"):
        read_seeds(f"{tmp_path}/seeds.jsonl")


def test_the_report(run, capsys, tmp_path):
    rows = run(rounds=1, forward={"epochs": 2})
    printed = capsys.readouterr().out
    assert printed.endswith(rounds_table(rows) + "\n")
    assert rows[1]["seconds"].keys() == {"instructions", "responses", "rows", "forward", "reverse"}
    assert rows[0]["forward"] | {"rows": 0} == {
        **{"model": rows[0]["forward"]["model"], "rows": 0, "seeds_too_long": 0, "not_asked": 0, "dropped": {}},
        **{"steps": 4, "tokens": 40, "loss": 1.5, "loss/seed": 2.5},  # of the last of two epochs: steps 3 and 4
    }
    assert training_summary(f"{tmp_path}/out/round_0/reverse", 1)["loss"] == 2.5
    row = {"round": 3, "seconds": {"instructions": 1.0, "responses": 20.0, "rows": 9.0, "forward": 2.0, "reverse": 5.0}}
    found = {"rows": {"seed": 6, "synthetic": 9}, "dropped": {"empty": 2, "copy": 1}, "steps": 4, "tokens": 40}
    means = {"loss": 1.5, "loss/seed": 2.0, "loss/synthetic": 1.0, "alpha": 0.5}
    assert rounds_table([row | {"forward": found | means, "reverse": found | {"loss": 1.5}}]).splitlines() == [
        "round    model  seed  synthetic  dropped  steps    loss  loss/seed  loss/synthetic   alpha  tokens  seconds",
        "    3  forward     6          9        3      4  1.5000     2.0000          1.0000  0.5000      40      3.0",
        "    3  reverse     6          9        3      4  1.5000          -               -       -      40     25.0",
    ]


def test_the_settings_are_those_of_the_neighbours():
    from configs import generate, main_filter, main_train

    config = get_config("tiny").to_dict()
    assert config["prompts"] == main_filter.get_config().prompts.to_dict()
    for section, whole in (
        *((name, generate.get_config().to_dict()) for name in ("instructions", "responses")),
        *((name, main_train.get_config("tiny").to_dict()) for name in DIRECTIONS),
    ):
        own = {*whole} - {*config[section]}
        whole.get("checkpoints", {}).pop("remote", None)  # a copy is of one run
        changed = {k for k in config[section] if config[section][k] != whole[k]}
        assert changed <= {"max_new_tokens"} and {"model", "input", "output", "seed"} <= own and len(own) == 8
    changed = get_config()
    changed.forward.dtype = "float32"
    assert changed.forward.compute.dtype == "float32" and changed.reverse.compute.dtype == "bfloat16"


@pytest.mark.parametrize("opened", ["", "<think>"])
def test_thoughts_are_no_instruction_and_no_response(opened):
    """Also where the prompt has their opening: then an answer without their end is all thoughts."""
    begin = "" if opened else "<think>"
    texts = [f"{begin}1. So\nInstruction: Say no.</think>\n\nSay what the sea is.", f"{begin}Hm, the sea. Say what is"]
    answers = [{"response": texts, "finish_reason": ["stop", "stop"]}]
    found = list(round_rows.candidate_rows([{"id": 1, "response": "It is wide and blue."}], answers, opened))
    assert [(row["instruction"], row["fault"]) for row in found] == [
        ("Say what the sea is.", None),
        (None, "truncated"),
    ]
    answers = [
        {"response": text, "finish_reason": "stop"} for text in [*texts, f"{begin}hm</think>I cannot help with it."]
    ]
    assert round_rows.sampled_responses(answers, opened) == [
        ("Say what the sea is.", None),
        (None, "truncated"),
        (None, "refusal"),
    ]
