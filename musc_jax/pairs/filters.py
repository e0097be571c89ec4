"""What is thrown out once it has been made: pairs that teach nothing, lost constraints."""

from collections.abc import Sequence

from lm_jax.data.similarity import tokens
from lm_jax.generation.refusals import is_refusal
from musc_jax.pairs.drops import Drop


def instructions_fault(full: str, perturbed: str) -> Drop | None:
    """IDENTICAL_INSTRUCTIONS where the two sides differ at most in case, spaces or punctuation, else None."""
    return Drop.IDENTICAL_INSTRUCTIONS if tokens(full) == tokens(perturbed) else None


def pair_fault(chosen: str, rejected: str, chosen_finish: str = "stop", rejected_finish: str = "stop") -> Drop | None:
    """Why two responses are no pair to learn from, or None.

    EMPTY_RESPONSE, IDENTICAL_PAIR (up to white space), REFUSAL of either, TRUNCATED (either finished with `length`).
    """
    if chosen.strip() and chosen.split() == rejected.split():
        return Drop.IDENTICAL_PAIR
    faults = {response_fault(chosen, chosen_finish), response_fault(rejected, rejected_finish)}
    return next((fault for fault in (Drop.EMPTY_RESPONSE, Drop.REFUSAL, Drop.TRUNCATED) if fault in faults), None)


def response_fault(response: str, finish_reason: str = "stop") -> Drop | None:
    """Why nothing is to be learnt from a response: EMPTY_RESPONSE, REFUSAL, TRUNCATED (it ended with `length`)."""
    if not response.strip():
        return Drop.EMPTY_RESPONSE
    if is_refusal(response):
        return Drop.REFUSAL
    return Drop.TRUNCATED if finish_reason == "length" else None


def verdicts_fault(verdicts: Sequence[bool], expected: Sequence[bool]) -> Drop | None:
    """LOST_CONSTRAINT or KEPT_CONSTRAINT where an instruction does not ask for exactly what it should, else None.

    Args:
      verdicts: whether the instruction asks for each of the full side's constraints, as `parse_verdicts` gives it.
      expected: all True for the full side, `Perturbation.kept` for the perturbed one.
    """
    if any(wanted and not found for found, wanted in zip(verdicts, expected, strict=True)):
        return Drop.LOST_CONSTRAINT
    return None if tuple(verdicts) == tuple(expected) else Drop.KEPT_CONSTRAINT
