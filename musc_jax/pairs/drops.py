"""Why a row leaves the construction of pairs; the table at the end of a run counts rows by these names."""

import enum


class Drop(enum.StrEnum):
    """A reason to drop a row. Parsers return it in place of a result, so that no fault stops a run."""

    EMPTY = "empty"  # nothing but white space was answered
    REFUSAL = "refusal"
    TRUNCATED = "truncated"  # the answer ran into the limit of tokens before it was complete
    UNPARSABLE = "unparsable"  # no answer of the kind that was asked for
    TOO_FEW_CONSTRAINTS = "too_few_constraints"
    TOO_MANY_CONSTRAINTS = "too_many_constraints"
    INVENTED_INPUT = "invented_input"  # the answer's input does not stand in the instruction
    TOO_SHORT = "too_short"
    ECHO = "echo"  # the question or an in-context example again, instead of an answer
    LOST_CONSTRAINT = "lost_constraint"  # the recombined instruction does not ask for one of its constraints
    KEPT_CONSTRAINT = "kept_constraint"  # the perturbed instruction still asks for a constraint that it should not
    IDENTICAL_INSTRUCTIONS = "identical_instructions"  # the perturbation changed nothing in the instruction
    NEAR_DUPLICATE = "near_duplicate"  # of an earlier row's instruction
    EMPTY_RESPONSE = "empty_response"
    IDENTICAL_PAIR = "identical_pair"
    NOT_ENOUGH_SCORED = "not_enough_scored"  # fewer than two of a row's responses have a score
    TIE = "tie"  # all of a row's responses have the same score
    NOTHING_TO_CORRECT = "nothing_to_correct"  # so the model says of its own response
