"""DDIMScheduler, DDPMScheduler, PNDMScheduler and solvers <-> our process, its grid, and what the network predicts.

Of a solver (Euler, DPMSolver, UniPC) the process and the grid are read; how it steps is the choice of whoever samples.
Their `linear` is our `sqrt_linear`, and their `scaled_linear` our `linear`. The traps are what they do unless told
otherwise: DDIM clips (`clip_sample`), which harms latents, and ends at clean data (`set_alpha_to_one`), which PNDM and
the published samples do not.
"""

from __future__ import annotations

import math
from typing import Any

from ldm.bounds import Natural, Size
from ldm.compat.diffusers.rules import Component, Node, Rule, Values, defaults_of, fixed
from ldm.errors import ConfigError

_PROCESS, _GRIDS = "ldm.diffusion.discrete.DiscreteVP.", "ldm.diffusion.grids."
_PREDICTION = "ldm.diffusion.prediction."
_SCHEDULES = {"scaled_linear": "linear", "linear": "sqrt_linear", "squaredcos_cap_v2": "cosine"}
_PREDICTIONS = {"epsilon": "Epsilon", "sample": "Sample", "v_prediction": "Velocity"}
_SPACINGS = {"leading": "Leading", "trailing": "Trailing", "linspace": "Linspace"}
_OWN_SIGMAS = {"use_karras_sigmas": "Karras", "use_lu_lambdas": "LogSNR"}  # in place of a spacing
_COSINE_OFFSET = 0.008


def _node(target: str, **params: Any) -> Node:
    return {"target": target, "params": params}


def _choose(theirs: Values, name: str, choices: dict[str, str]) -> str:
    if theirs[name] not in choices:
        raise ConfigError(f"{theirs[name]!r} is not supported; only {', '.join(choices)}", name)
    return choices[theirs[name]]


def _read(theirs: Values) -> Values:
    """Return the nodes of process and prediction."""
    rescaled = {"zero_terminal_snr": True} if theirs["rescale_betas_zero_snr"] else {}
    steps = {"num_steps": theirs["num_train_timesteps"]}
    ends = {"start": theirs["beta_start"], "end": theirs["beta_end"]}
    if theirs["trained_betas"] is not None:
        name, params = "from_betas", {"betas": theirs["trained_betas"]}
    else:
        name = _choose(theirs, "beta_schedule", _SCHEDULES)
        params = steps if name == "cosine" else {**steps, **ends}
    process = _node(f"{_PROCESS}{name}", **params, **rescaled)
    spacing = _choose(theirs, "timestep_spacing", _SPACINGS)
    spacing = next((grid for field, grid in _OWN_SIGMAS.items() if theirs.get(field)), spacing)
    offset = {"offset": theirs["steps_offset"]} if spacing == "Leading" else {}
    grid = _node(f"{_GRIDS}{spacing}", **offset, end="clean" if theirs["set_alpha_to_one"] else "cleanest")
    prediction = _node(f"{_PREDICTION}{_choose(theirs, 'prediction_type', _PREDICTIONS)}")
    return {"process": _node(f"{_PROCESS}on_grid", process=process, grid=grid), "prediction": prediction}


_OF_THE_PROCESS = {
    "num_train_timesteps": (Size, 1000),
    "beta_start": (float, 1e-4),
    "beta_end": (float, 2e-2),
    "beta_schedule": (str, "linear"),
    "trained_betas": (list[float] | None, None),
    "prediction_type": (str, "epsilon"),
    "steps_offset": (Natural, 0),
    "rescale_betas_zero_snr": (bool, False),
}


def _scheduler(name: str, clips: bool, ends_clean: bool, *rules: Rule) -> Component:
    fields = _OF_THE_PROCESS | {"timestep_spacing": (str, "leading"), "set_alpha_to_one": (bool, ends_clean)}
    clipping = (fixed("clip_sample", False, default=clips), fixed("thresholding", False))
    unread = ("dynamic_thresholding_ratio", "clip_sample_range", "sample_max_value", "skip_prk_steps")
    read = Rule(fields, read=_read)
    return Component(name, "", (read, *clipping, *rules), lambda ours, theirs: [], ignored=unread)


# What only says how a solver steps, or is left over from the scheduler that it was made from.
_OF_SOLVERS = (
    "algorithm_type", "clip_sample_range", "disable_corrector", "dynamic_thresholding_ratio", "euler_at_final",
    "flow_shift", "interpolation_type", "lambda_min_clipped", "lower_order_final", "predict_x0", "sample_max_value",
    "set_alpha_to_one", "skip_prk_steps", "solver_order", "solver_p", "solver_type", "time_shift_type", "timestep_type",
    "variance_type",
)  # fmt: skip


def _solver(name: str) -> Component:
    fields = _OF_THE_PROCESS | {"timestep_spacing": (str, "linspace"), "final_sigmas_type": (str, "zero")}
    fields |= {field: (bool | None, False) for field in _OWN_SIGMAS}

    def read(theirs: Values) -> Values:
        is_clean = _choose(theirs, "final_sigmas_type", {"zero": "clean", "sigma_min": "cleanest"}) == "clean"
        return _read(theirs | {"set_alpha_to_one": is_clean})

    rules = (Rule(fields, read=read), fixed("thresholding", False))
    return Component(name, "", rules, lambda ours, theirs: [], ignored=_OF_SOLVERS)


SCHEDULERS = {
    "DDIMScheduler": _scheduler("DDIMScheduler", True, True),
    "DDPMScheduler": _scheduler("DDPMScheduler", True, True, fixed("variance_type", "fixed_small", "fixed_small_log")),
    "PNDMScheduler": _scheduler("PNDMScheduler", False, False),
    **{
        name: _solver(name)
        for name in ("EulerDiscreteScheduler", "EulerAncestralDiscreteScheduler", "DPMSolverMultistepScheduler",
                     "UniPCMultistepScheduler")
    },
}  # fmt: skip


# ------------------------------------------------------------------------------------------------------------- writing


def write_scheduler(process: Node, prediction: Node | None) -> Values:
    """Return the config of a DDIMScheduler. ConfigError names what it cannot express."""
    inner, grid = process, "uniform"
    if process["target"] == f"{_PROCESS}on_grid":
        inner, grid = process["params"]["process"], process["params"]["grid"]
    name = inner["target"].removeprefix(_PROCESS)
    if name not in (*_SCHEDULES.values(), "sqrt", "from_betas"):
        raise ConfigError(f"diffusers: {inner['target']} has no scheduler there; only DiscreteVP", "process.target")
    predicts = (prediction or {"target": f"{_PREDICTION}Epsilon"})["target"].removeprefix(_PREDICTION)
    kinds = {ours: theirs for theirs, ours in _PREDICTIONS.items()}
    if predicts not in kinds:
        raise ConfigError(f"diffusers: no scheduler predicts {predicts}", "prediction.target")
    return {
        "_class_name": "DDIMScheduler",
        **_betas(name, defaults_of(inner["target"]) | (inner.get("params") or {})),
        **_spacing(grid),
        "prediction_type": kinds[predicts],
        "clip_sample": False,
        "thresholding": False,
    }


def _betas(name: str, params: Values) -> Values:
    if params["posterior_weight"] != 0:
        problem = "diffusers: its schedulers have the exact posterior; only 0"
        raise ConfigError(problem, "process.params.posterior_weight")
    if params.get("s", _COSINE_OFFSET) != _COSINE_OFFSET:
        raise ConfigError(f"diffusers: its cosine has the offset {_COSINE_OFFSET}", "process.params.s")
    rescaled = {"rescale_betas_zero_snr": params.get("zero_terminal_snr", False)}
    if name == "from_betas":
        betas = [float(beta) for beta in params["betas"]]
        return {"num_train_timesteps": len(betas), "trained_betas": betas, **rescaled}
    kinds = {ours: theirs for theirs, ours in _SCHEDULES.items()}
    ends = {"beta_start": params["start"], "beta_end": params["end"]} if "start" in params else {}
    if name == "sqrt":
        return {"num_train_timesteps": params["num_steps"], "trained_betas": _sqrt_betas(**params), **rescaled}
    return {"num_train_timesteps": params["num_steps"], "beta_schedule": kinds[name], **ends, **rescaled}


def _sqrt_betas(num_steps: int, start: float, end: float, **_: Any) -> list[float]:
    """Return the betas of `DiscreteVP.sqrt`, for which they have no name."""
    step = (end - start) / max(num_steps - 1, 1)
    return [math.sqrt(start + index * step) for index in range(num_steps)]


def _spacing(grid: str | Node) -> Values:
    """Return the fields for a grid; `uniform` is their trailing wherever the number of steps divides T."""
    named = {"uniform": ("Trailing", {}), "trailing": ("Trailing", {}), "linspace": ("Linspace", {}),
             "leading": ("Leading", {}), "compvis": ("Leading", {"offset": 1})}  # fmt: skip
    if isinstance(grid, str) and grid in named:
        kind, params = named[grid]
    else:
        target = grid if isinstance(grid, str) else grid["target"]
        kind, params = target.removeprefix(_GRIDS), {} if isinstance(grid, str) else grid.get("params") or {}
    spacings = {ours: theirs for theirs, ours in _SPACINGS.items()}
    if kind not in spacings:
        raise ConfigError(f"diffusers: has no grid {kind}; only {', '.join(named)}", "process.params.grid")
    params = defaults_of(f"{_GRIDS}{kind}") | params
    return {
        "timestep_spacing": spacings[kind],
        "steps_offset": params.get("offset", 1),  # read by leading alone; StableDiffusionPipeline insists on 1
        "set_alpha_to_one": params["end"] == "clean",
    }
