"""Scripted stand-ins for MAIN's two models: everything that they write says so, and real text never does."""

import hashlib
import random
import time

from lm_jax.generation.requests import Completion, Sample

SAMPLED = "sampled"  # stands in every text that was written here
ASK = "Ask for: {response}"  # `prompts.reverse_question` that tells the two models' prompts apart
FAULTY = {0: ("I'm sorry, but I cannot help with that.", "stop"), 1: ("", "stop"), 2: (f"{SAMPLED} and on", "length")}


class Writers:
    """A `Generator`: a request is answered by its id, the sample's number and the seed alone, in any order.

    Args:
      seconds: to wait before each answer.
      faulty: of ten samples, how many are no instruction and no response.
    """

    def __init__(self, seconds: float = 0.0, faulty: int = 3):
        self.seconds, self.faulty = seconds, faulty
        self.asked = []  # (request, sampling)

    def generate(self, requests, sampling):
        for request in random.sample(list(requests), len(requests)):
            time.sleep(self.seconds)
            self.asked.append((request, sampling))
            numbers = range(sampling.num_samples)
            yield [Completion(request.id, tuple(self._sample(request, sampling.seed, n) for n in numbers))]

    def _sample(self, request, seed: int, number: int) -> Sample:
        digest = hashlib.sha256(f"{seed} {request.id} {number}".encode()).digest()
        if digest[0] % 10 < self.faulty:
            text, reason = FAULTY[digest[1] % 3]
        else:
            reverse = request.prompt[-1]["content"].startswith(ASK.partition("{")[0])
            text = f"{'Instruction: ' if reverse else ''}{SAMPLED} words {digest[2]} for {request.id}"
            reason = "stop"
        return Sample(text, reason, len(text))
