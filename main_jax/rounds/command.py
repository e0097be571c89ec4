"""`launch.main_rounds`: a forward and a reverse model that teach each other, round by round (MAIN, arXiv 2504.12913).

Round 0 fits both on the seed pairs. In every further round the models of the round before write: the reverse one
instructions for unlabelled responses, the forward one responses to the seeds' instructions. Then both are trained
towards real text, from what the other wrote, beside the seeds.

    output/config.json               the settings
    output/rounds.jsonl              a row for every round that is done
    output/round_N/
      instructions.jsonl             from round 1: what the reverse model answered, .prompts.jsonl what it was asked
      responses.jsonl                from round 1: the same of the forward model
      candidates.jsonl               from round 1: every instruction that was sampled, for launch.main_filter
      forward.jsonl, reverse.jsonl   what the models learn
      forward/, reverse/             run directories
      round.json                     appears last
"""

import itertools
from collections.abc import Callable
from functools import partial
from typing import Any

import jax

from lm_jax.checkpoints.runs import ModelSource, open_model
from lm_jax.config import to_dict
from lm_jax.console import say
from lm_jax.data.faults import write_faults
from lm_jax.data.messages import TEMPLATE_KWARGS, Text
from lm_jax.data.rows import read_rows, write_jsonl
from lm_jax.data.supervised import SEED, SYNTHETIC
from lm_jax.data.text import TextEncoder
from lm_jax.data.tokenizers import end_token_ids, load_tokenizer, opens_thoughts, tokenizer_fingerprint
from lm_jax.distributed.processes import everywhere
from lm_jax.errors import UserError
from lm_jax.generation.command import generate_rows
from lm_jax.generation.requests import Generator
from lm_jax.generation.rounds import begin_directory, do_parts, do_rounds, made_from
from main_jax.prompts import open_prompts, prompt_columns
from main_jax.rounds import rows as round_rows
from main_jax.rounds.config import INSTRUCTIONS, MAY_CHANGE, RESPONSES, SAMPLER, Round, RoundsConfig
from main_jax.rounds.inputs import given_rows, read_seeds, read_unlabelled
from main_jax.rounds.report import rounds_table, training_summary
from main_jax.rounds.rows import DIRECTIONS, FORWARD, NO_LIMIT, REVERSE
from main_jax.training.command import train

Row = dict[str, Any]
Rows = list[Row]
Question = tuple[Any, int | str, Text]  # what is asked about, its id, the prompt
TOO_LONG_ROW = "too_long_to_learn"  # beside the reasons of `instructions.Fault`


def run_rounds(config: RoundsConfig, generator: Generator | None = None) -> None:
    """Does the rounds that are missing, round 0 first; called again after an interruption it goes on in the part where
    it was, and a round that is done is not looked at again.

    Args:
      generator: writes instead of both models.

    Raises:
      UserError: anything the user can mend; the rounds before it stay.
    """
    rounds = _Rounds(config, generator)
    everywhere(rounds.begin)
    do_rounds(config.output, range(config.rounds + 1), rounds.do, rounds_table)


def _train(this: Round, direction: str) -> None:
    train(this.training(direction))


class _Rounds:
    """What is read before any weights, and a round's work."""

    def __init__(self, config: RoundsConfig, generator: Generator | None):
        self._config, self._generator = config, generator
        seeds, seed_faults = read_seeds(config.seeds, config.columns, config.max_dropped_share)
        unlabelled, faults = read_unlabelled(config.unlabelled, config.unlabelled_columns, config.max_dropped_share)
        self._faults, self._given = (seed_faults, faults), given_rows(seeds, unlabelled)
        source, tokenizer = _open_one_tokenizer(config)
        self._encoder = TextEncoder(tokenizer, NO_LIMIT, end_token_ids(source.directory, tokenizer))
        self._context = source.config.max_position
        self._prompts = prompts = open_prompts(config.prompts, tokenizer, config.model)
        self._opened = opens_thoughts(tokenizer) if prompts.format == "messages" else ""
        say(f"{config.seeds}: {len(seeds)} seed pairs; {config.unlabelled}: {len(unlabelled)} responses")
        self._seed_rows, self._too_long = {}, {}
        for direction in DIRECTIONS:
            rows = self._fitting(direction, round_rows.seed_rows(direction, seeds, prompts))
            if not rows:
                limit = f"config.{direction}.max_length={getattr(config, direction)['max_length']}"
                raise UserError(f"{config.seeds}: all {len(seeds)} pairs are longer than {limit} tokens; raise it")
            self._seed_rows[direction], self._too_long[direction] = rows, len(seeds) - len(rows)
        learnable = self._learnable(unlabelled)
        # Under the seeds' tag, with which the model is to be used
        asked: dict[str, list[Any]] = {
            INSTRUCTIONS: [
                (row, row["id"], prompts.reverse(row["response"], row.get(TEMPLATE_KWARGS))) for row in learnable
            ],
            RESPONSES: [(seed, seed.row, prompts.forward(seed.instruction, SEED, seed.kwargs)) for seed in seeds],
        }
        self._asked = {sampled: self._with_room(sampled, questions) for sampled, questions in asked.items()}
        self._not_asked = {
            INSTRUCTIONS: len(unlabelled) - len(self._asked[INSTRUCTIONS]),
            RESPONSES: len(seeds) - len(self._asked[RESPONSES]),
        }
        for sampled, number in self._not_asked.items():
            if number:
                what = "unlabelled responses" if sampled == INSTRUCTIONS else "seed instructions"
                say(f"{number} {what} are too long and left out")

    def begin(self) -> None:
        """Makes the directory, or finds the same rounds in it to continue."""
        config = self._config
        models = {"model": config.model, "reverse_model": config.reverse_model}
        dropped = f"{config.output}/dropped.jsonl"
        for faults in self._faults:
            faults.say(dropped)
        contents = made_from(models, self._given)
        begin_directory(config.output, "main_rounds", to_dict(config), MAY_CHANGE, made_from=contents)
        write_faults(dropped, self._faults)

    def do(self, number: int) -> Row:
        """One round, or what of it is missing; its row in the report."""
        this = Round(self._config, number)
        starts = {direction: this.begins_with(direction) for direction in DIRECTIONS}
        say(f"round {number} of {self._config.rounds}: {', '.join(f'{d} from {m}' for d, m in starts.items())}")
        counts: dict[str, Row] = {}
        parts: dict[str, Callable[[], None]] = {}
        if number:
            parts |= {sampled: partial(self._sample, this, sampled) for sampled in SAMPLER}
        parts["rows"] = lambda: counts.update(self._write_rows(this))
        parts |= {d: partial(_train, this, d) for d in DIRECTIONS}
        seconds = do_parts(number, parts, self._config.naming)
        report: Row = {"round": number}
        for d in DIRECTIONS:
            found = everywhere(partial(training_summary, f"{this.directory}/{d}", this.training(d).epochs))
            report[d] = {"model": starts[d], **counts[d], **found}
        return {**report, "seconds": seconds}

    def _sample(self, this: Round, sampled: str) -> None:
        settings = this.sampling(sampled, self._prompts.stop(SAMPLER[sampled]))
        if jax.process_index() == 0:
            asked = ({"id": id, **prompt_columns(prompt)} for _, id, prompt in self._asked[sampled])
            write_jsonl(settings.input, asked)
        everywhere(lambda: None)  # all processes wait for the file
        say(f"round {this.number}: {sampled} by {settings.model}")
        generate_rows(settings, self._generator)
        everywhere(lambda: None)

    def _write_rows(self, this: Round) -> dict[str, Row]:
        """Writes what both models learn; the counts of each."""
        synthetic: dict[str, Rows] = {direction: [] for direction in DIRECTIONS}
        dropped: dict[str, dict[str, int]] = {direction: {} for direction in DIRECTIONS}
        if this.number:
            asked, answers = [row for row, *_ in self._asked[INSTRUCTIONS]], _answers(this, INSTRUCTIONS)
            candidates = list(round_rows.candidate_rows(asked, answers, self._opened))
            if jax.process_index() == 0:
                write_jsonl(f"{this.directory}/candidates.jsonl", candidates)
            answers = _answers(this, RESPONSES)
            responses, faults = zip(*round_rows.sampled_responses(answers, self._opened), strict=True)
            asked = [seed for seed, *_ in self._asked[RESPONSES]]
            read = {
                FORWARD: (round_rows.forward_rows(candidates, self._prompts), [row["fault"] for row in candidates]),
                REVERSE: (round_rows.reverse_rows(asked, responses, self._prompts), faults),
            }
            for direction, (rows, why) in read.items():
                fits = self._fitting(direction, rows)
                found = round_rows.counted(why)
                dropped[direction] = found | ({TOO_LONG_ROW: len(rows) - len(fits)} if len(fits) < len(rows) else {})
                if not fits:
                    raise UserError(_nothing_synthetic(this, direction, dropped[direction]))
                synthetic[direction] = fits
            synthetic[FORWARD] = round_rows.shared_weights(synthetic[FORWARD], self._config.learnt_candidates)
        if jax.process_index() == 0:
            for direction in DIRECTIONS:
                rows = [*self._seed_rows[direction], *synthetic[direction]]
                write_jsonl(f"{this.directory}/{direction}.jsonl", map(round_rows.supervised_row, rows))
        everywhere(lambda: None)
        sampled = {
            direction: name for name, reader in SAMPLER.items() for direction in DIRECTIONS if reader != direction
        }
        return {
            d: {
                "rows": {SEED: len(self._seed_rows[d]), SYNTHETIC: len(synthetic[d])},
                "seeds_too_long": self._too_long[d],
                "not_asked": self._not_asked[sampled[d]] if this.number else 0,
                "dropped": dropped[d],
            }
            for d in DIRECTIONS
        }

    def _fitting(self, direction: str, rows: Rows) -> Rows:
        return round_rows.fitting(rows, self._encoder, getattr(self._config, direction)["max_length"])

    def _learnable(self, unlabelled: Rows) -> Rows:
        """The responses that the forward model could learn if their instruction were empty."""
        empty = [{**row, "instruction": ""} for row in unlabelled]
        fits = {str(row["id"]) for row in self._fitting(FORWARD, round_rows.forward_rows(empty, self._prompts))}
        return [row for row in unlabelled if str(row["id"]) in fits]

    def _with_room(self, sampled: str, questions: list[Question]) -> list[Question]:
        """The questions that leave room for a whole answer."""
        settings = Round(self._config, 1).sampling(sampled, ())
        room = min(settings.decode.max_length, self._context) - settings.max_new_tokens
        fits = round_rows.room_to_answer([prompt for *_, prompt in questions], self._encoder, room)
        kept = list(itertools.compress(questions, fits))
        if not kept:
            path = self._config.unlabelled if sampled == INSTRUCTIONS else self._config.seeds
            raise UserError(
                f"{path}: all rows are too long: a prompt may have {room} tokens, of config.{sampled}.decode.max_length"
                f"={settings.decode.max_length} and the model's {self._context} less config.{sampled}.max_new_tokens="
                f"{settings.max_new_tokens}, and a response config.forward.max_length with its prompt; give shorter "
                "texts, or change these"
            )
        return kept


def _answers(this: Round, sampled: str) -> Rows:
    return read_rows(this.sampling(sampled, ()).output, ("response", "finish_reason"))


def _nothing_synthetic(this: Round, direction: str, dropped: Row) -> str:
    what = "instruction" if direction == FORWARD else "response"
    reasons = ", ".join(f"{number} {reason}" for reason, number in dropped.items())
    return (
        f"no {what} could be used of those that {this.directory.rpartition('/')[0]}/round_{this.number - 1} sampled "
        f"({reasons}); look at {this.directory}/{what}s.jsonl, and give a better model, more seed pairs, or more "
        f"config.{what}s.max_new_tokens where they are truncated"
    )


def _open_one_tokenizer(config: RoundsConfig) -> tuple[ModelSource, Any]:
    """The base of the forward model and the tokenizer, which must be that of the reverse model too."""
    models = dict.fromkeys(config.base(direction) for direction in DIRECTIONS)
    sources = [open_model(model) for model in models]
    tokenizers = [
        load_tokenizer(source.directory, source.config.vocab_size, config.chat_template_kwargs) for source in sources
    ]
    if len({tokenizer_fingerprint(tokenizer) for tokenizer in tokenizers}) > 1:
        raise UserError(
            f"config.model={config.model} and config.reverse_model={config.reverse_model}: their tokenizers or chat "
            "templates differ, so the mutual filter could not compare their scores a token; give two models of one"
        )
    return min(sources, key=lambda source: source.config.max_position), tokenizers[0]
