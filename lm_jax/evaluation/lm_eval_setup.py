"""lm-eval, which is optional, and its IFEval checkers, made to give the same verdicts every time."""

import contextlib
import functools
import importlib.util
import io
import os
import socket
from pathlib import Path

from lm_jax.errors import UserError

_NEEDED = ("lm_eval", "langdetect", "immutabledict", "nltk")
_OWN_DATA = Path(__file__).parent / "nltk_data"
_PATIENCE = 10.0  # seconds for NLTK's server to answer


def require_lm_eval() -> None:
    """Raises UserError, with the command to run, where the extra `eval` is not installed."""
    if lacking := [name for name in _NEEDED if importlib.util.find_spec(name) is None]:
        raise UserError(f"{lacking[0]} is not installed; run in the checkout: pip install -e '.[eval]'")


@functools.cache
def prepare_ifeval() -> str:
    """Makes lm-eval's IFEval checkers importable and deterministic, for this process. Returns how sentences are split.

    langdetect draws at random unless it is seeded. Two prompts count a `#` and a `!` as letters, where the checker
    counts a letter drawn at random; here it counts what was asked for.

    `punkt`: NLTK's trained model is on this machine or could be downloaded, which the checkers try when they are
    imported. `abbreviations`: neither; then NLTK's Punkt algorithm (Kiss and Strunk 2006) runs with a short list of
    English abbreviations of ours in place of the trained parameters: a sentence ends at . ! or ? unless the word is
    such an abbreviation, an initial, or a number that a lower-case word follows.

    Raises:
      UserError: the extra `eval` is not installed.
    """
    require_lm_eval()
    from langdetect import DetectorFactory

    DetectorFactory.seed = 0
    splitter = _sentence_splitter()
    from lm_eval.tasks.ifeval.instructions import LetterFrequencyChecker
    from lm_eval.tasks.ifeval.instructions_registry import INSTRUCTION_DICT

    class AnyCharacter(LetterFrequencyChecker):
        def build_description(self, *, letter: str | None = None, **kwargs) -> str:
            told = super().build_description(letter=letter, **kwargs)
            if letter and len(letter) == 1:
                self._letter = letter.lower()
            return told

    INSTRUCTION_DICT["keywords:letter_frequency"] = AnyCharacter
    return splitter


def _sentence_splitter() -> str:
    import nltk

    found = functools.partial(nltk.data.find, "tokenizers/punkt_tab")
    with contextlib.suppress(LookupError):
        found()
        return "punkt"
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(_PATIENCE)
    try:
        if nltk.download("punkt_tab", quiet=True, print_error_to=io.StringIO()):
            found()
            return "punkt"
    except (OSError, LookupError, ValueError):  # no place to put it, or no whole file
        pass
    finally:
        socket.setdefaulttimeout(before)
    nltk.data.path.append(os.fspath(_OWN_DATA))
    return "abbreviations"
