"""What a recipe asks of a model: checked, and as a budget and data."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from math import lcm, prod
from typing import TYPE_CHECKING

from surgeon.axes.budget import Budget, allowed, allowed_params, check_ratio, decoder_params
from surgeon.errors import Code, SurgeonError
from surgeon.memory import START, Memory
from surgeon.opening import Model
from surgeon.planning import Passes

if TYPE_CHECKING:
    from surgeon.calibrate.data import Recipe as CalibrationData
    from surgeon.calibrate.stored import Stored
    from surgeon.ir.program import Size
    from surgeon.recipes.schema import Recipe


def check_asked(recipe: Recipe, passes: Passes) -> None:
    """Refuses a recipe that doesn't say how much is to go, or says it of nothing."""
    budget = recipe.budget
    if passes.select is None:
        _check_whole(recipe, passes)
        return
    if budget.ratio is None and not budget.roles and recipe.vocabulary is None:
        raise SurgeonError(
            Code.BAD_RATIO,
            "nothing says how much to remove",
            at="--ratio, --role",
            why="neither a ratio nor a role was given",
            try_="--ratio 0.2, --role ffn=0.25, or --trim-vocab FILE",
        )
    if budget.ratio is not None:
        check_ratio(budget.ratio, "--ratio")
    for role, share in budget.roles.items():
        check_ratio(share, f"--role {role}")


def _check_whole(recipe: Recipe, passes: Passes) -> None:
    """Refuses, where nothing is removed, what says how much is to be, and passes without effect."""
    budget = recipe.budget
    said = {
        "--ratio": budget.ratio is not None,
        "--role": bool(budget.roles),
        "--limit": bool(budget.limits),
        "--multiple-of": bool(budget.multiple_of),
        "--measure": budget.measure != "parameters",
        "--latency": budget.latency is not None,
        "--tensor-parallel": budget.tensor_parallel != 1,
        "schedule": recipe.schedule is not None,
    }
    names = ", ".join(p.label for p in passes.every)
    for option, given in said.items():
        if given:
            raise SurgeonError(
                Code.BAD_OPTION,
                f"{option} would not be looked at",
                at=option,
                why=f"no pass of this recipe removes anything: it has {names}",
                try_="a score and a selection; or the option of a pass: see 'surgeon passes'",
            )
    if not passes.then and recipe.vocabulary is None:
        raise SurgeonError(
            Code.BAD_OPTION,
            "this recipe leaves the model as it was",
            at=names,
            why="nothing is removed, and every pass is exact: the model computes what it did",
            try_="a score and a selection, or a transform after these",
        )


def check_expressible(origin: Model, recipe: Recipe, passes: Passes) -> None:
    """Refuses, before any work, what a schedule or the target can't express."""
    if passes.groups and recipe.schedule is not None:
        raise SurgeonError(
            Code.BAD_OPTION,
            f"{passes.groups[0].label} can't be part of a schedule",
            at="schedule",
            why="the rounds after the first would group what is grouped already",
            try_=f"--transform {passes.groups[0].name} first, and the schedule on its result",
        )
    if not passes.factors:
        return
    if recipe.schedule is not None:
        raise SurgeonError(
            Code.BAD_OPTION,
            f"{passes.factors[0].label} can't be part of a schedule",
            at="schedule",
            why="every round would factor anew what the one before it left, and a plan of all "
            "rounds has one rank for a map",
            try_=f"a schedule without it, and --transform {passes.factors[0].name} on its result",
        )
    from surgeon.emit.target import TRANSFORMERS, Refusal, all_graphs, names_of, refusal

    source = origin.source
    for name in names_of(recipe.target) if source is not None else ():
        if name == TRANSFORMERS and source is not None:
            from surgeon.emit.huggingface import check_factors as expressible

            expressible(source.config, source.model_class)
        elif not all_graphs((name,)):
            from surgeon.emit.products import TWO_MAPS

            found = Refusal("", f"{TWO_MAPS} ({passes.factors[0].label})", "--to transformers")
            raise refusal(name, [found])


def budget_of(origin: Model, recipe: Recipe) -> Budget:
    """Returns what a recipe's budget means for a model.

    Raises:
        SurgeonError: `no-such-axis` for a glob that matches nothing; for a table of timings that
            can't be read.
    """
    asked = recipe.budget
    multiples = multiples_of(origin, recipe.target)
    axes, branches = allowed(origin.axes, asked.freeze, asked.only)
    alone = _whole(origin, recipe)
    axes, branches = axes - alone.keys(), branches - alone.keys()
    counted = decoder_params(origin.axes)
    clock = None
    if asked.latency is not None:
        from surgeon.axes.clock import Table

        if asked.measure != "latency":
            raise SurgeonError(
                Code.BAD_OPTION,
                "the table of timings would not be looked at",
                at=f"--latency {asked.latency}",
                why=f"the ratio is a share of the {asked.measure}",
                try_="--measure latency, or leave the table out",
            )
        clock = Table.read(asked.latency).clock
    wanted = dict(multiples())
    for name, multiple in asked.multiple_of.items():
        wanted[name] = lcm(multiple, wanted.get(name, 1))
    return Budget(
        ratio=asked.ratio,
        roles=dict(asked.roles),
        counted=counted,
        axes=axes,
        branches=branches,
        params=allowed_params(origin.program, asked.freeze, asked.only),
        multiple_of=wanted,
        measure=asked.measure,
        limits=dict(asked.limits),
        tensor_parallel=asked.tensor_parallel,
        clock=clock,
    )


def multiples_of(origin: Model, target: str) -> Callable[[], Mapping[str, int]]:
    """Returns what tells, when asked, which multiples the targets want.

    Raises:
        SurgeonError: `bad-option` for a target that there isn't, `target-refused` for one that
            can't express the model even as it is.
    """
    from surgeon.axes.plan import Plan
    from surgeon.emit.target import TRANSFORMERS, check_targets, get_target, names_of

    names = names_of(target)
    check_targets(names, origin.axes, Plan(), origin)
    source = origin.source

    def wanted() -> Mapping[str, int]:
        out: dict[str, int] = {}
        for name in names:
            found: Mapping[str, int] = {}
            if name != TRANSFORMERS:
                found = get_target(name).multiple_of(origin.axes)
            elif source is not None:
                from surgeon.emit.huggingface import multiple_of

                found = multiple_of(origin.axes, source.config, source.model_class)
            for axis, number in found.items():
                out[axis] = lcm(number, out.get(axis, 1))
        return out

    return wanted


def _whole(origin: Model, recipe: Recipe) -> Mapping[str, str]:
    """Returns the axes and branches that a target wants whole, with its reason.

    Raises:
        SurgeonError: `target-refused` where a role is to be cut that has no others.
    """
    from surgeon.emit.target import TRANSFORMERS, Refusal, get_target, names_of, refusal

    out: dict[str, str] = {}
    asked = recipe.budget.roles
    for name in names_of(recipe.target):
        found = {} if name == TRANSFORMERS else get_target(name).whole(origin.axes, asked)
        for role in asked:
            own = [axis.name for axis in origin.axes.of_role(role)]
            if own and found.keys() >= set(own):
                why = f"--role {role} can't be met: {found[own[0]]}"
                raise refusal(name, [Refusal(own[0], why, f"leave --role {role} out")])
        out.update(found)
    return out


def stored_of(recipe: Recipe) -> Stored | None:
    """Returns the statistics that a recipe names in place of data, or None."""
    if recipe.calibration.statistics is None:
        return None
    if recipe.schedule is not None:
        raise SurgeonError(
            Code.BAD_OPTION,
            "a schedule can't be run on saved statistics",
            at="calibration.statistics",
            why="every round looks at what the one before it left, and they are of the whole model",
            try_="--calibration FILE with a text, or leave the schedule out",
        )
    from surgeon.calibrate.stored import load

    return load(recipe.calibration.statistics)


def data_of(recipe: Recipe) -> CalibrationData:
    """Returns the data that a recipe names; without a source, the text of last resort."""
    asked = recipe.calibration
    from surgeon.calibrate.data import Piece
    from surgeon.calibrate.data import Recipe as Data

    pieces = tuple(Piece(piece.source, piece.weight) for piece in asked.sources)
    seed = recipe.seed if asked.seed is None else asked.seed
    return Data(pieces, asked.samples, asked.length, seed)


def check_memory(origin: Model, recipe: Recipe, passes: Passes, memory: Memory) -> None:
    """Refuses, before any work, a limit that the passes of a recipe can't keep.

    Passes that look at weights alone read them in blocks. Those that look at data hold one piece
    of the model in fp32, dense and pruned, the residual stream of all windows, and where they ask
    for second moments those of the widest value, twice.

    Raises:
        SurgeonError: `bad-option`, with the number that is needed.
    """
    memory.check(START, "tensors are read, scored, sliced and written in blocks")
    if not passes.look or not memory.asked:
        return
    from surgeon.calibrate.segments import segments

    def size(shape: Sequence[Size]) -> int:
        return prod(s for s in shape if isinstance(s, int))

    pieces = segments(origin.program)
    largest = max(sum(size(p.type.shape) for p in piece.program.params) for piece in pieces)
    streams = [piece.given for piece in pieces if piece.given is not None]
    stream = max((size(origin.program.types[name].shape) for name in streams), default=0)
    tokens = (recipe.calibration.samples or 0) * (recipe.calibration.length or 0)
    widest = max(
        (p.type.shape[-1] for p in origin.program.params if len(p.type.shape) == 2), key=int
    )
    wide = any("second moment" in n or "sequential" in n for p in passes.every for n in p.needs)
    need = 8 * largest + 8 * tokens * stream + (16 * int(widest) ** 2 if wide else 0)
    label = next(p.label for p in passes.every if p.looks)
    memory.check(
        need,
        f"{label} looks at what the model computes, piece after piece, on {tokens} tokens",
        "fewer or shorter --samples and --length, or --recipe fast, which looks at weights alone",
    )
