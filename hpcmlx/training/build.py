"""From the configuration of jobs/finetune.py to what it runs: data, stages, trainer."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from hpcmlx.mesh import Mesh
from hpcmlx.observe import gantt
from hpcmlx.observe.sinks import require_sinks
from hpcmlx.observe.timeline import Timeline
from hpcmlx.settings_finetune import FinetuneConfig
from hpcmlx.training.data.batches import Batches
from hpcmlx.training.data.dataset import Dataset, open_dataset
from hpcmlx.training.data.examples import ExampleSettings
from hpcmlx.training.executor import Executor
from hpcmlx.training.methods import Method
from hpcmlx.training.optim import Optimizer, OptimSettings
from hpcmlx.training.placement import Gathered
from hpcmlx.training.reduce import GradientSum
from hpcmlx.training.stages import Announce, Stages, load_stages
from hpcmlx.training.trainer import Trainer
from hpcmlx.training.zero import Zero1


@dataclass(frozen=True)
class Data:
    """What is trained on and what it is measured with.

    Attributes:
        valid, valid_batches: None where nothing is evaluated.
    """

    train: Dataset
    batches: Batches
    valid: Dataset | None
    valid_batches: Batches | None


def require_packages(cfg: FinetuneConfig) -> None:
    """Raises ConfigError where a package that the settings ask for is missing."""
    require_sinks(cfg.train.sinks)
    if cfg.timeline:
        gantt.require_matplotlib()


def open_data(cfg: FinetuneConfig, mesh: Mesh, tokenizer: Any) -> Data:
    """Tokenize, or find what was tokenized before. Collective."""
    own, train = cfg.data, cfg.train
    settings = ExampleSettings(own.max_length, own.targets, own.too_long)
    common: dict[str, Any] = {
        "global_batch_size": train.batch_size,
        "micro_batch_size": train.micro_batch_size,
        "max_length": own.max_length,
        "dp": mesh.dims.dp,
        "packing": own.packing,
        "seed": train.seed,
    }
    dataset = open_dataset(own.train, tokenizer, settings, own.cache, mesh.world, split="train")
    length: dict[str, Any] = (
        {"num_steps": train.steps} if train.steps else {"num_epochs": train.num_epochs}
    )
    batches = Batches(dataset.lengths, dataset.num_targets, **common, **length)
    if not own.valid:
        return Data(dataset, batches, None, None)
    valid = open_dataset(own.valid, tokenizer, settings, own.cache, mesh.world, split="valid")
    valid_batches = Batches(valid.lengths, valid.num_targets, **common, num_epochs=1)
    return Data(dataset, batches, valid, valid_batches)


def build_trainer(
    cfg: FinetuneConfig,
    mesh: Mesh,
    stages: Stages,
    total_steps: int,
    timeline: Timeline,
    asked_to_stop: Callable[[], bool],
) -> tuple[Trainer, GradientSum]:
    """The trainer and the sums it works with, which the caller closes.

    Args:
        total_steps: of the whole run.
        asked_to_stop: whether this rank was.
    """
    gathered = Gathered(mesh.tp_group, stages.places)
    whole = Optimizer(optim_settings(cfg), total_steps, gathered)
    optimizer: Optimizer | Zero1 = whole
    if cfg.optim.zero1:
        sizes = {name: math.prod(place.shape) for name, place in stages.places.items()}
        optimizer = Zero1(whole, mesh.dp_group, sizes)
    gradient_sum = GradientSum(mesh, stages.places)
    executor = Executor(mesh, stages.chunks, recompute=cfg.train.recompute, timeline=timeline)
    trainer = Trainer(
        mesh,
        stages,
        executor,
        gradient_sum,
        optimizer,
        schedule=cfg.train.schedule,
        clip_norm=cfg.optim.clip_norm,
        asked_to_stop=asked_to_stop,
    )
    return trainer, gradient_sum


def optim_settings(cfg: FinetuneConfig) -> OptimSettings:
    """The optimizer's part of the configuration."""
    own = vars(cfg.optim).copy()
    del own["clip_norm"], own["zero1"]
    own["no_decay"] = tuple(own["no_decay"])
    own["betas"] = None if own["betas"] is None else tuple(own["betas"])
    return OptimSettings(**own)


def load(cfg: FinetuneConfig, mesh: Mesh, data: Data, announce: Announce) -> Stages:
    """Load this rank's stages with what is to be trained in them. Collective.

    Args:
        data: what they will be trained on.
        announce: `Run.check_room`.
    """
    own, train = cfg.method, cfg.train
    method = Method(
        own.kind, own.rank, own.scale, own.num_layers, tuple(own.modules), seed=train.seed
    )
    options = cfg.load_options()
    del options["adapter"]
    return load_stages(
        cfg.model.path,
        mesh,
        method,
        num_chunks=train.num_chunks,
        recompute=train.recompute,
        loss_chunk=train.loss_chunk,
        target_share=data.train.target_share,
        announce=announce,
        **options,
    )
