"""The `layout:` block of a training stage: how many ranks each kind of parallelism takes. Loads no torch.

The ranks form a grid of pp × dp × fsdp × cp × tp, the last one varying fastest (so that the talkative ones lie on one
machine). `ep` takes no ranks of its own: it divides the dp × fsdp × cp ranks, which hold different tokens.
"""

from collections.abc import Iterable
from difflib import get_close_matches
from math import prod
from typing import Literal, Self

from pydantic import BaseModel, ConfigDict, Field, PositiveInt, model_validator

from soma.base.errors import UserError
from soma.model.config import ModelConfig
from soma.train.parallel.pipeline.search import NAMED

GRID = ("pp", "dp", "fsdp", "cp", "tp")  # the slowest first
REST = -1


class Layout(BaseModel):
    """How the ranks of `torchrun` share the work. The answer does not depend on it. -1: all ranks that are left."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    dp: int | None = Field(
        None,
        description="Replicas of the model, each with its own rows of the batch; gradients are summed. "
        "None: 1 where another size is -1 or the engine is deepspeed, else all ranks that are left.",
    )
    fsdp: int = Field(
        1,
        description="Ranks that share parameters, gradients and optimizer state (FSDP2, ZeRO). With engine deepspeed 1 "
        "is all ranks that are left, unless dp is given.",
    )
    zero: Literal[1, 2, 3] = Field(
        3,
        description="What the fsdp ranks cut: 1 the optimizer state; 2 gradients too, after each microbatch; "
        "3 parameters too.",
    )
    cpu_offload: bool = Field(
        False,
        description="With fsdp, or on one GPU alone: parameters, gradients and optimizer state lie in the CPU's "
        "memory; a layer's parameters come to the GPU for its turn, and the optimizer runs on the CPU. With engine "
        "deepspeed and zero 1 or 2 parameters stay on the GPU.",
    )
    tp: int = Field(1, description="Ranks that share each matrix, attention by heads (Megatron's tensor parallelism).")
    sp: bool = Field(False, description="With tp: norms and the residual stream are cut along the sequence as well.")
    cp: int = Field(1, description="Ranks that share each sequence (context parallelism).")
    cp_method: Literal["ring", "all_gather"] = Field(
        "ring", description="ring: keys and values go round, peak memory stays; all_gather: they are collected first."
    )
    pp: int = Field(1, description="Pipeline stages: ranks that share the layers.")
    ep: int = Field(1, description="Ranks that share the experts of a layer; it divides dp × fsdp × cp.")
    schedule: str = Field("1f1b", description="Pipeline schedule; `soma schedule` lists, draws and times them.")
    microbatches: int | None = Field(
        None, ge=1, description="Microbatches of a pipeline step. None: what microbatch_size gives."
    )
    virtual_stages: int = Field(1, ge=1, description="Pipeline stages on each rank, for interleaved schedules.")
    stage_layers: list[PositiveInt] | None = Field(
        None,
        description="Layers of every pipeline stage, in order: [9, 8, 8, 7]. None: as even as can be, with fewer for "
        "the last stage, which has the head.",
    )
    engine: Literal["soma", "accelerate", "deepspeed"] = Field(
        "soma",
        description="What does the data parallelism: soma, Hugging Face's Accelerate (dp), or DeepSpeed's ZeRO (fsdp "
        "with zero 1, 2 or 3).",
    )
    timeout: float = Field(
        1800.0,
        gt=0,
        description="Seconds after which an operation between ranks has failed; the error names who is missing.",
    )

    @model_validator(mode="after")
    def _sizes(self) -> Self:
        sizes = {name: getattr(self, name) for name in (*GRID, "ep")}
        for name, size in sizes.items():
            if size is not None and size != REST and size < 1:
                raise ValueError(f"{name} {size}: a size is 1 or more, or -1 for all ranks that are left")
        if self.ep == REST:
            raise ValueError("ep -1: experts divide the dp × fsdp × cp ranks, so there is no rest: say how many")
        rest = [name for name in GRID if sizes[name] == REST]
        if len(rest) > 1:
            raise ValueError(f"{' and '.join(rest)} are all -1: only one can be all ranks that are left")
        if self.schedule not in NAMED:
            near = get_close_matches(self.schedule.lower(), NAMED, 1, 0.0)[0]
            raise ValueError(f"schedule {self.schedule!r}: take {near} (there are {', '.join(NAMED)})")
        if self.pp == 1:
            for name in ("microbatches", "virtual_stages", "stage_layers"):
                if name in self.model_fields_set and getattr(self, name) != type(self).model_fields[name].default:
                    other = ", or microbatch_size in place of it" if name == "microbatches" else ""
                    raise ValueError(f"{name} is of a pipeline, and pp is 1: set pp{other}, or leave {name} out")
        if self.cpu_offload:
            self._check_offload()
        if self.sp and self.tp == 1:
            raise ValueError("sp cuts the sequence over the tp ranks and tp is 1: set tp, or leave sp out")
        return self

    def _check_offload(self) -> None:
        """Raise ValueError for what does not go with cpu_offload."""
        if self.engine == "deepspeed":  # takes the optimizer, and with zero 3 the parameters
            return
        if self.zero < 3:
            whole = "gradients and parameters" if self.zero == 1 else "parameters"
            raise ValueError(
                f"zero {self.zero} keeps whole {whole} on the GPU between microbatches, and cpu_offload takes them "
                "from there: take zero 3"
            )
        if self.pp != 1:
            raise ValueError("cpu_offload and pp exclude each other: take fsdp, or pp without cpu_offload")
        if self.engine != "soma":
            raise ValueError(f"cpu_offload and engine {self.engine} exclude each other: take engine soma")

    def resolve(self, world: int) -> "Layout":
        """The layout with every size settled for `world` ranks.

        Raises UserError with the arithmetic that fails and the nearest layout that works.
        Worked example: tp 2, dp open, 8 ranks: dp = 8 / 2 = 4.
        """
        sizes = {name: getattr(self, name) for name in GRID}
        if sizes["dp"] is None:
            if self.engine == "deepspeed" and sizes["fsdp"] == 1 and REST not in sizes.values():
                sizes["fsdp"] = REST
            sizes["dp"] = 1 if REST in sizes.values() else REST
        rest = next((name for name, size in sizes.items() if size == REST), None)
        fixed = prod(size for size in sizes.values() if size != REST)
        if rest is None and fixed != world:
            raise UserError(f"layout: {product(sizes)} = {fixed} ranks, and there are {world}: {advice(sizes, world)}")
        if rest is not None:
            if world % fixed:
                given = {name: size for name, size in sizes.items() if name != rest}
                raise UserError(
                    f"layout: {rest} takes the ranks that are left, but {world} ranks / ({product(given)} = {fixed}) = "
                    f"{world / fixed:.3g}: {advice(given, world)}"
                )
            sizes[rest] = world // fixed
        holders = sizes["dp"] * sizes["fsdp"] * sizes["cp"]
        if holders % self.ep:
            near = nearest_divisor(holders, self.ep)
            raise UserError(
                f"layout: ep {self.ep} does not divide dp × fsdp × cp = {sizes['dp']} × {sizes['fsdp']} × "
                f"{sizes['cp']} = {holders} ({holders / self.ep:.3g}): take ep {near}"
            )
        if self.cpu_offload and self.engine != "soma" and world == 1:
            raise UserError(
                f"layout: engine {self.engine} shares work between ranks, and there is 1: take engine soma for "
                "cpu_offload on one GPU"
            )
        if self.cpu_offload and sizes["fsdp"] == 1 and world > 1:
            raise UserError(
                "layout: cpu_offload takes what the fsdp ranks cut to the CPU's memory, and fsdp is 1: take fsdp -1"
            )
        if self.cpu_offload and 1 < self.ep == holders:
            raise UserError(
                f"layout: ep {self.ep} on {holders} ranks puts each expert on one rank, where fsdp has nothing to cut "
                f"and cpu_offload nothing to take: take ep {nearest_divisor(holders, holders // 2)}"
            )
        if sizes["tp"] == 1 and self.sp:
            return self.model_copy(update={**sizes, "sp": False})
        return self.model_copy(update=sizes)

    @property
    def data_ranks(self) -> int:
        """Ranks with rows of their own, dp × fsdp, of a resolved layout."""
        assert self.dp is not None
        assert self.dp != REST
        assert self.fsdp != REST
        return self.dp * self.fsdp

    @property
    def world(self) -> int:
        """Ranks of a resolved layout."""
        return self.data_ranks * self.pp * self.cp * self.tp

    def check_model(self, model: ModelConfig) -> None:
        """Raise UserError with the arithmetic where a resolved layout does not fit the model."""
        heads = model.num_attention_heads
        if heads % self.tp:
            raise UserError(
                f"layout: tp {self.tp} does not divide num_attention_heads {heads} ({heads / self.tp:.3g} each): take "
                f"{self.nearest('tp', divisors(heads))}"
            )
        if self.ep > 1 and not model.num_experts:
            raise UserError(f"layout: ep {self.ep}, but the model has no experts (num_experts 0): take ep 1")
        if self.ep > 1 and model.num_experts % self.ep:
            both = [size for size in divisors(model.num_experts) if self.data_ranks * self.cp % size == 0]
            raise UserError(
                f"layout: ep {self.ep} does not divide num_experts {model.num_experts} "
                f"({model.num_experts / self.ep:.3g} each): take ep {min(both, key=lambda size: abs(size - self.ep))}"
            )
        stages = self.pp * self.virtual_stages
        if stages > model.num_hidden_layers:
            virtual = f" × virtual_stages {self.virtual_stages} = {stages} stages" if self.virtual_stages > 1 else ""
            most = max(1, model.num_hidden_layers // self.virtual_stages)
            raise UserError(
                f"layout: pp {self.pp}{virtual} for {model.num_hidden_layers} layers, and every stage needs one: take "
                f"{self.nearest('pp', range(1, most + 1))}"
            )

    def nearest(self, name: str, works: Iterable[int]) -> str:
        """The size among those that work that is nearest to the one there is; where these ranks cannot have it, also
        the nearest that they can have. tp 8 of 12 heads on 8 ranks: `tp 6 on a multiple of 6 ranks, or tp 4`."""
        wanted, every = getattr(self, name), sorted(works)
        best = min(every, key=lambda size: abs(size - wanted))
        if self.world % best == 0:
            return f"{name} {best}"
        here = [size for size in every if self.world % size == 0]
        other = f", or {name} {min(here, key=lambda size: abs(size - wanted))}" if here else ""
        return f"{name} {best} on a multiple of {best} ranks{other}"

    @property
    def column_unit(self) -> int:
        """What a sequence's length becomes a multiple of, by padding: cp ranks take an early and a late piece each, and
        sp cuts these over the tp ranks."""
        return (2 * self.cp if self.cp > 1 else 1) * (self.tp if self.sp else 1)

    def padded_length(self, sequence_length: int) -> int:
        """The length with padding. 30 tokens with cp 2 and sp over tp 2: 32."""
        return -(-sequence_length // self.column_unit) * self.column_unit

    def check_batch(self, batch_size: int, microbatch_size: int | None) -> None:
        """Raise UserError with the arithmetic where a resolved layout does not fit the batch."""
        unit = (microbatch_size or 1) * self.data_ranks
        if batch_size % unit:
            raise UserError(
                f"batch_size {batch_size} is not a multiple of microbatch_size × dp × fsdp = {microbatch_size or 1} × "
                f"{self.dp} × {self.fsdp} = {unit}: take {max(unit, round(batch_size / unit) * unit)}"
            )


def product(sizes: dict[str, int]) -> str:
    """`dp 2 × tp 3`: the sizes that are not 1."""
    return " × ".join(f"{name} {size}" for name, size in sizes.items() if size != 1) or "1"


def divisors(number: int) -> list[int]:
    """All divisors, rising."""
    return [size for size in range(1, number + 1) if number % size == 0]


def nearest_divisor(number: int, wanted: int) -> int:
    """The divisor of `number` that is nearest to `wanted`, the smaller of two."""
    return min(divisors(number), key=lambda size: (abs(size - wanted), size))


def advice(sizes: dict[str, int], world: int) -> str:
    """The change of one size that makes the product divide the world (or be it), or the world that would do."""
    best = None
    for name, size in sizes.items():
        others = prod(other for key, other in sizes.items() if key != name)
        if size == 1 or world % others:
            continue
        exact = "dp" in sizes and len(sizes) == len(GRID)
        fits = world // others if exact else nearest_divisor(world // others, size)
        if best is None or abs(fits - size) < abs(best[1] - size):
            best = (name, fits, size)
    if best is not None:
        more = f", or start {prod(sizes.values())} ranks with torchrun" if world == 1 else ""
        return f"take {best[0]} {best[1]}{more}"
    return f"start {prod(sizes.values())} ranks"
