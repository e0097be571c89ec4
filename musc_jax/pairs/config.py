"""The settings of `launch.musc_pairs`."""

import dataclasses

from lm_jax.config import ComputeConfig, DecodeConfig, MeshConfig
from lm_jax.data.columns import RowKeys
from lm_jax.errors import UserError
from lm_jax.generation.generator import EndpointConfig, check_one_model
from lm_jax.generation.requests import SamplingConfig
from musc_jax.pairs.methods import BEST_OF, PLANS
from musc_jax.pairs.perturb import PerturbConfig
from musc_jax.pairs.prompts import STOP

MARKER = "{instruction}"


@dataclasses.dataclass(frozen=True)
class StageConfig:
    """How one stage samples; see `SamplingConfig`."""

    temperature: float = 0.1
    max_new_tokens: int = 1024
    repetition_penalty: float = 1.0


@dataclasses.dataclass(frozen=True, kw_only=True)
class PairsConfig(RowKeys):
    """`configs/musc_pairs.py` says what each key is for and why it has its value."""

    method: str = "musc"
    model: str | None = None
    input: str | None = None
    num_instructions: int | None = None
    output: str
    chat_template_kwargs: str = ""
    seed: int = 0
    dtype: str = "float32"
    examples: str = ""
    num_examples: int = 4
    format: str = "auto"
    system: bool = True
    text_template: str = "Instruction:\n{instruction}\n\nResponse:\n"
    full_instruction: str = "recombined"
    near_duplicate: float = 0.7
    verify: bool = False
    num_samples: int = 4
    judge_samples: int = 3
    max_failed_share: float = 0.05
    perturb: PerturbConfig = PerturbConfig()
    self_instruct: StageConfig = StageConfig(temperature=0.5)
    decompose: StageConfig = StageConfig()
    negate: StageConfig = StageConfig(max_new_tokens=128)
    recombine: StageConfig = StageConfig(max_new_tokens=512)
    check: StageConfig = StageConfig(temperature=0.0, max_new_tokens=256)
    respond: StageConfig = StageConfig(temperature=0.5)
    judge: StageConfig = StageConfig(temperature=0.7, max_new_tokens=512)
    critique: StageConfig = StageConfig(max_new_tokens=512)
    revise: StageConfig = StageConfig(temperature=0.5)
    decode: DecodeConfig = DecodeConfig(slots=8, max_length=4096, chunk=16)
    endpoint: EndpointConfig = EndpointConfig()
    mesh: MeshConfig = MeshConfig()
    compute: ComputeConfig = ComputeConfig()

    def __post_init__(self):
        super().__post_init__()
        for name, fits, must in (
            ("method", self.method in PLANS, ", ".join(PLANS)),
            ("seed", 0 <= self.seed < 2**32, "between 0 and 2**32 - 1"),
            ("num_examples", self.num_examples >= 1 + self.verify, "at least 1, and 2 with config.verify"),
            ("num_instructions", self.num_instructions is None or self.num_instructions >= 1, "at least 1"),
            ("format", self.format in ("auto", "messages", "text"), "auto, messages or text"),
            ("full_instruction", self.full_instruction in ("recombined", "original"), "recombined or original"),
            ("text_template", self.text_template.count(MARKER) == 1, f"a text with {MARKER} in it, once"),
            ("num_samples", self.num_samples >= 2, "at least 2"),
            ("judge_samples", self.judge_samples >= 1, "at least 1"),
            ("near_duplicate", 0 <= self.near_duplicate <= 1, "between 0 (off) and 1"),
            ("max_failed_share", 0 <= self.max_failed_share <= 1, "between 0 and 1"),
        ):
            if not fits:
                raise UserError(f"config.{name}={getattr(self, name)!r}: must be {must}")
        for stage in {stage: None for plan in PLANS.values() for stage in plan.stages}:
            self.sampling(stage, "messages")
        if self.method in BEST_OF:
            for stage, key, number in (
                ("respond", "num_samples", self.num_samples),
                ("judge", "judge_samples", self.judge_samples),
            ):
                if number > 1 and getattr(self, stage).temperature == 0:
                    raise UserError(
                        f"config.{stage}.temperature=0.0: config.{key}={number} would give the same answer {number} "
                        "times; raise the temperature"
                    )
        if (self.input is None) == (self.num_instructions is None):
            raise UserError(
                f"config.input={self.input!r} and config.num_instructions={self.num_instructions!r}: instructions come "
                "from a file or are invented, as many as config.num_instructions says; give one of the two"
            )
        check_one_model(self)

    def sampling(self, stage: str, format: str) -> SamplingConfig:
        """How a stage samples. Raw text stops where the model would go on with a further example."""
        keys: StageConfig = getattr(self, stage)
        stop: tuple[str, ...] = ()
        if format == "text":
            labels = self.text_template.split(MARKER)[0].split("\n")
            label = next((line for line in reversed(labels) if line.strip()), "").strip()
            stop = (*STOP, f"\n{label}") if stage == "respond" and label else STOP
        try:
            return SamplingConfig(**dataclasses.asdict(keys), stop=stop, seed=self.seed)
        except UserError as error:
            raise UserError(str(error).replace("config.", f"config.{stage}.", 1)) from error
