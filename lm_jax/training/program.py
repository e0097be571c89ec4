"""The jitted training step of a run and the shapes of what it takes, known from settings alone."""

import dataclasses
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from typing import Any, TypeVar

import jax
import jax.numpy as jnp

from lm_jax.checkpoints.orbax import abstract_like
from lm_jax.checkpoints.runs import abstract_params, param_specs
from lm_jax.config import LoraConfig, ModelConfig, OptimConfig
from lm_jax.distributed.processes import at_work
from lm_jax.models.lora import abstract_adapters, adapter_specs, dropout_key, join
from lm_jax.sharding import state_shardings
from lm_jax.training.objective import Objective
from lm_jax.training.optim import make_optimizer, make_schedule
from lm_jax.training.step import TrainState, make_train_step

T = TypeVar("T")


@dataclasses.dataclass(frozen=True)
class StepProgram:
    """What a run compiles, and what a plan compiles without running it.

    Attributes:
      step: jitted (state, batch, frozen) -> (state, metrics); the state is donated.
      state: ShapeDtypeStructs of the state with their shardings.
      frozen: the same of what the step reads beside the state; None without adapters.
      begin: what is trained -> the state before the first step, on its shardings; what it is given is used up.
    """

    step: Any
    state: TrainState
    frozen: Any
    begin: Callable[[Any], TrainState]


def step_program(
    model: ModelConfig,
    objective: Objective,
    optim: OptimConfig,
    lora: LoraConfig,
    frozen_dtype: str,
    mesh: jax.sharding.Mesh,
    num_steps: int,
    seed: int,
) -> StepProgram:
    """The step of a run of `num_steps` steps.

    Args:
      frozen_dtype: of a model below adapters; what is trained is fp32.
      seed: of the adapters' dropout.

    Raises:
      UserError: a model or adapters that the mesh does not fit.
    """
    schedule = make_schedule(optim, num_steps)
    optimizer = make_optimizer(optim, schedule)

    def begin(trained):
        return TrainState.create(trained, optimizer, jax.tree.map(jnp.float32, objective.state.initial))

    if lora.rank:
        specs, trained = adapter_specs(model, lora, mesh), abstract_adapters(model, lora, mesh)
        frozen = abstract_params(model, mesh, frozen_dtype, lora.base)
    else:
        specs, trained, frozen = param_specs(model, mesh), abstract_params(model, mesh, "float32"), None
    abstract = jax.eval_shape(begin, trained)
    shardings = state_shardings(abstract, specs, mesh)

    def assemble_for(trained, frozen, step, microbatch):
        return assemble(trained, frozen, lora, dropout_key(seed, step, microbatch))

    step = make_train_step(objective, optimizer, schedule, assemble_for, num_steps)
    return StepProgram(
        step=jax.jit(step, donate_argnums=0, out_shardings=(shardings, None)),
        state=abstract_like(abstract, shardings),
        frozen=frozen,
        begin=jax.jit(begin, out_shardings=shardings, donate_argnums=0),
    )


def compile_beside(program: StepProgram, mesh: jax.sharding.Mesh, batches: Sequence[Any], load: Callable[[], T]) -> T:
    """What `load` gives, while the step compiles: the first steps then find it compiled.

    Each has a thread, so that the first of them to fail is raised at once, whatever the other still has to do.

    Args:
      batches: ShapeDtypeStructs of what the steps will be given, one for each shape.
    """

    def compile_step() -> None:
        with jax.set_mesh(mesh), at_work():  # a process that compiled before may have kept it
            for batch in batches:
                program.step.lower(program.state, batch, program.frozen).compile()

    def loaded() -> T:
        with jax.set_mesh(mesh):
            return load()

    def begin(name: str, do: Callable[[], Any]) -> Future:
        pool = ThreadPoolExecutor(1, name)
        future = pool.submit(do)
        pool.shutdown(wait=False)  # its thread ends with what it does
        return future

    loading = begin("load", loaded)
    for done in as_completed([begin("compile", compile_step), loading]):
        done.result()
    return loading.result()


def assemble(trained, frozen, lora: LoraConfig, key: jax.Array | None = None):
    """The parameters that the objective reads; with a key, adapters have their dropout."""
    return join(frozen, trained, lora, key) if lora.rank else trained
