"""Which steps are traced, and what is refused. That a trace appears is tested with a training, in test_musc_train."""

import jax
import jax.numpy as jnp
import pytest

from lm_jax.errors import UserError
from lm_jax.training.profile import Tracer, steps_to_trace
from lm_jax.training.step import TrainState


@pytest.mark.parametrize(
    ("profile", "done", "expected"),
    [("2:3", 0, [2, 3]), ("2:3", 2, [3]), ("4:9", 0, [4, 5]), ("1:1", 0, [1]), (None, 0, [])],
)
def test_steps(profile, done, expected, monkeypatch):
    tracer = Tracer(steps_to_trace(profile), done, 5, "nowhere")
    monkeypatch.setattr(jax.profiler, "start_trace", lambda directory: calls.append(("start", at[0])))
    monkeypatch.setattr(jax.profiler, "stop_trace", lambda: calls.append(("stop", at[0])))
    calls, at, state = [], [0], TrainState(jnp.int32(0), None, None, None, None)
    for step in range(done + 1, 6):
        at[0] = step
        tracer.before_step(step, state)
        tracer.on_state(step, state)
    assert calls == [*(("start", step) for step in expected[:1]), *(("stop", step) for step in expected[-1:])]


@pytest.mark.parametrize(("profile", "done"), [("2:3", 3), ("6:8", 0), ("2:3", 5)])
def test_steps_that_do_not_come(profile, done, capsys):
    tracer = Tracer(steps_to_trace(profile), done, 5, "nowhere")
    assert not any(tracer.wants_state(step) for step in range(1, 9))
    assert capsys.readouterr().err == f"nothing is traced: {done} of 5 steps are done, config.profile={profile}\n"


@pytest.mark.parametrize("profile", ["", "5", "0:2", "3:2", "a:b", "1:2:3", "-1:2"])
def test_what_is_refused(profile):
    with pytest.raises(UserError, match="config.profile=.*as 5:8"):
        steps_to_trace(profile)
