"""Training on Transformers' `Trainer`: one process or several, from a checkpoint or the beginning.

Every step sees windows that its number alone decides: a training that goes on after an interruption
sees what an uninterrupted one would, and several processes see together what one would.
"""

from __future__ import annotations

import os
import time
from collections.abc import Generator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import nn
from torch.utils.data import Dataset, SequentialSampler
from transformers import Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_callback import PrinterCallback
from transformers.trainer_utils import get_last_checkpoint

from surgeon.calibrate.data import Places
from surgeon.emit.scratch import scratch
from surgeon.errors import Code, SurgeonError
from surgeon.recovery.bar import Bar
from surgeon.recovery.lora import adapted, merged
from surgeon.recovery.losses import hidden_loss, label_loss, logits_loss, together
from surgeon.recovery.settings import Settings, Trained
from surgeon.recovery.small import Small

POINTS = 200
"""A curve has about so many points, however long the training."""

KEPT = 2
"""Checkpoints that are kept; an interruption while one is written leaves the one before it."""


@dataclass(frozen=True)
class Job:
    """A training.

    Attributes:
        student: what is trained, in place.
        teacher: the dense model, only read; None where nothing is distilled.
        places: windows; they are gone through in a drawn order, over and over where they are few.
        settings: all options.
        folder: where checkpoints of this very training lie; None keeps none.
    """

    student: Small
    teacher: Small | None
    places: Places
    settings: Settings
    folder: Path | None = None


class Windows(Dataset[dict[str, torch.Tensor]]):
    """The windows of a training in the order in which they are seen."""

    def __init__(self, places: Places, count: int, seed: int) -> None:
        self.places = places
        draw = np.random.default_rng(seed)
        rounds = -(-count // len(places))
        every = [draw.permutation(len(places)) for _ in range(rounds)]
        self.order = np.concatenate(every)[:count]

    def __len__(self) -> int:
        return len(self.order)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {"input_ids": torch.from_numpy(self.places.window(int(self.order[index])).copy())}


def trained(job: Job) -> Trained:
    """Returns what a model has learnt after all steps.

    Raises:
        SurgeonError: `bad-option` for settings that the model, the processes or the machine don't
            allow; `runtime-failed` where the loss is no number.
    """
    settings, start = job.settings, time.perf_counter()
    world = int(os.environ.get("WORLD_SIZE", "1"))
    if settings.batch % (settings.accumulate * world):
        raise _refused(
            "batch",
            f"{settings.batch} windows can't be shared out evenly",
            f"a step is made of {settings.accumulate} parts on {world} processes",
            f"a multiple of {settings.accumulate * world}",
        )
    _check(job)
    torch.manual_seed(settings.seed)  # adapters are drawn
    model = adapted(job.student, settings) if settings.method == "lora" else job.student.model
    _prepare(model, settings)
    data = Windows(job.places, settings.steps * settings.batch, settings.seed)
    with scratch() as made, ExitStack() as stack:
        folder = made if job.folder is None else job.folder
        arguments = _arguments(settings, folder, world, keep=job.folder is not None)
        bar = stack.enter_context(Bar(settings.steps, f"recover ({settings.method})"))
        trainer = _Trainer(job, model, arguments, data, [_Progress(bar), _Finite()])
        if settings.method == "lora" and trainer.is_fsdp_enabled:
            raise _refused(
                "method",
                "adapters can't be merged into shards",
                "FSDP shares the weights out among the processes",
                "method=full, or processes that each hold the model",
            )
        stack.enter_context(trainer.listening())
        if settings.keep_zeros:
            stack.enter_context(_zeros_kept(job.student))
        before = get_last_checkpoint(str(folder)) if folder.is_dir() else None
        resumed = int(before.rpartition("-")[2]) if before else 0
        trainer.train(resume_from_checkpoint=before)
        state = _state(trainer, model, settings)
    curve = tuple(
        (int(entry["step"]), float(entry["loss"]))
        for entry in trainer.state.log_history
        if "loss" in entry
    )
    tokens = settings.steps * settings.batch * job.places.length
    seconds = time.perf_counter() - start
    return Trained(state, curve, settings.steps, tokens, resumed, seconds)


# --- the trainer ---------------------------------------------------------------------------------


class _Trainer(Trainer):
    """Transformers' trainer with this job's loss and order of windows."""

    def __init__(
        self,
        job: Job,
        model: nn.Module,
        arguments: TrainingArguments,
        data: Windows,
        callbacks: list[TrainerCallback],
    ) -> None:
        super().__init__(model=model, args=arguments, train_dataset=data, callbacks=callbacks)
        self.remove_callback(PrinterCallback)
        self.model_accepts_loss_kwargs = False  # the loss is a mean over a part of a step
        self.job = job
        self.own: dict[str, torch.Tensor] = {}
        self.wanted: dict[str, torch.Tensor] = {}
        if job.teacher is not None:
            dtype = _TYPES.get(job.settings.precision, torch.float32)
            self.teacher = job.teacher.model.to(arguments.device, dtype).eval()
            self.teacher.requires_grad_(False)

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        return SequentialSampler(cast(Any, self.train_dataset))

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
    ) -> Any:
        """Returns the loss of some windows: their own, the teacher's, or both."""
        ids, settings = inputs["input_ids"], self.job.settings
        logits = model(input_ids=ids).logits
        parts = {"label": label_loss(logits, ids)}
        if self.job.teacher is not None:
            with torch.no_grad():
                wanted = self.teacher(input_ids=ids).logits
            if settings.distill in ("logits", "both"):
                parts["logits"] = logits_loss(logits, wanted, settings.temperature)
            if settings.distill in ("hidden", "both"):
                layers = [s.layer for s in self.job.student.streams]
                parts["hidden"] = hidden_loss(
                    [self.own[layer] for layer in layers],
                    [self.wanted[layer] for layer in layers],
                    [s.kept for s in self.job.student.streams],
                )
        return together(parts, settings.weight)

    @contextmanager
    def listening(self) -> Generator[None]:
        """While active, what layers of both models make is kept for the loss."""
        handles: list[Any] = []
        if self.job.settings.distill in ("hidden", "both") and self.job.teacher is not None:
            for small, found in ((self.job.student, self.own), (self.job.teacher, self.wanted)):
                for stream in small.streams:
                    module = small.model.get_submodule(stream.module)
                    handles.append(module.register_forward_hook(_kept(found, stream.layer)))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()


def _kept(found: dict[str, torch.Tensor], layer: str) -> Any:
    def hook(module: nn.Module, given: Any, made: Any) -> None:
        found[layer] = made[0] if isinstance(made, tuple) else made

    return hook


class _Progress(TrainerCallback):
    """Tells the bar of each step."""

    def __init__(self, bar: Bar) -> None:
        self.bar = bar

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.bar.at(int(state.global_step))

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        if logs and "loss" in logs:
            self.bar.say(f"loss {float(logs['loss']):.3f}")


class _Finite(TrainerCallback):
    """Stops a training whose loss is no number, before a checkpoint of it is written."""

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        if logs and "loss" in logs and not np.isfinite(float(logs["loss"])):
            raise SurgeonError(
                Code.RUNTIME_FAILED,
                "the training has come apart",
                at=f"compensate/recover, step {state.global_step}",
                why=f"the loss is {logs['loss']}",
                try_="a smaller rate, a longer warmup, or precision fp32",
            )


# --- how it is set up ----------------------------------------------------------------------------

_TYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


def _arguments(settings: Settings, folder: Path, world: int, *, keep: bool) -> TrainingArguments:
    on_cpu = not torch.cuda.is_available()
    if settings.precision == "fp16" and on_cpu:
        raise _refused(
            "precision",
            "fp16 needs a GPU",
            "on a CPU its gradients vanish, and nothing scales them",
            "precision=bf16 or fp32",
        )
    if settings.fsdp and world == 1:
        raise _refused(
            "fsdp",
            "there is one process, and nothing to shard over",
            "parameters are shared out among the processes that a launcher starts",
            "accelerate launch -m surgeon.cli recover …, or leave the option out",
        )
    sharded = {"fsdp": True, "fsdp_config": settings.fsdp} if settings.fsdp else {}
    arguments = TrainingArguments(
        output_dir=str(folder),
        max_steps=settings.steps,
        per_device_train_batch_size=settings.batch // (settings.accumulate * world),
        gradient_accumulation_steps=settings.accumulate,
        learning_rate=settings.rate,
        lr_scheduler_type="cosine",
        warmup_steps=round(settings.warmup * settings.steps),
        weight_decay=settings.decay,
        max_grad_norm=1.0,
        seed=settings.seed,
        bf16=settings.precision == "bf16",
        fp16=settings.precision == "fp16",
        use_cpu=on_cpu,
        logging_steps=max(1, settings.steps // POINTS),
        logging_nan_inf_filter=False,
        save_strategy="steps" if keep else "no",
        save_steps=settings.save_every,
        save_total_limit=KEPT,
        report_to=[],
        disable_tqdm=True,
        remove_unused_columns=False,
        **cast(Any, sharded),
    )
    # Several GPUs of one process would be given copies of the model that no hook hears.
    arguments._n_gpu = min(arguments.n_gpu, 1)  # pyright: ignore[reportPrivateUsage]
    return arguments


def _check(job: Job) -> None:
    settings = job.settings
    if settings.distill in ("hidden", "both"):
        assert job.teacher is not None
        known = {s.layer for s in job.teacher.streams}
        if not job.student.streams or {s.layer for s in job.student.streams} - known:
            raise _refused(
                "distill",
                "the layers' residual streams can't be listened to",
                "no module of the model makes what a layer's last addition does",
                "distill=logits",
            )
    if settings.checkpointing and not hasattr(job.student.model, "gradient_checkpointing_enable"):
        raise _refused(
            "checkpointing",
            "this model can't compute its activations again",
            "it runs as a program, not as a class of Transformers",
            "a smaller batch, or a larger accumulate",
        )


def _prepare(model: Any, settings: Settings) -> None:
    if settings.method == "full":
        model.requires_grad_(True)
    if settings.checkpointing:
        # Transformers 5.23 calls it by the first name, earlier ones by the second.
        enable = getattr(model, "activation_checkpointing_enable", None)
        (enable or model.gradient_checkpointing_enable)({"use_reentrant": False})
        if settings.method == "lora":
            model.enable_input_require_grads()
    if hasattr(model, "config") and hasattr(model.config, "use_cache"):
        model.config.use_cache = False


@contextmanager
def _zeros_kept(small: Small) -> Generator[None]:
    """While active, what is zero in a map's weight gets no gradient, and so stays zero."""
    handles: list[Any] = []
    for name in small.maps:
        weight = small.model.get_parameter(small.names[name])
        zero = weight.detach() == 0
        if bool(zero.any()):
            handles.append(weight.register_hook(lambda g, zero=zero: g.masked_fill(zero, 0.0)))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _state(trainer: Trainer, model: nn.Module, settings: Settings) -> Mapping[str, torch.Tensor]:
    """Returns the trained tensors by the student's own names, on the CPU."""
    found: Any
    if settings.method == "lora":
        found = merged(model).state_dict()
    else:
        found = trainer.accelerator.get_state_dict(trainer.model_wrapped)
    return {name: tensor.detach().cpu() for name, tensor in found.items()}


def _refused(option: str, what: str, why: str, try_: str) -> SurgeonError:
    return SurgeonError(
        Code.BAD_OPTION, what, at=f"compensate/recover: {option}", why=why, try_=try_
    )
