"""Weights & Biases as a Fabric logger. Imported only when it is asked for: ``pip install 'unmask-core[wandb]'``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lightning_fabric.loggers.logger import Logger
from lightning_fabric.utilities.rank_zero import rank_zero_only

from unmask.core.errors import UnmaskError
from unmask.core.randomness import stable_id
from unmask.core.training.recipe import Recipe, as_dict


class WandbLogger(Logger):
    """Sends metrics of rank zero to one W&B run, which a resumed training continues.

    Args:
        run: what ``wandb.init`` returned.
    """

    def __init__(self, run: Any) -> None:
        super().__init__()
        self.run = run

    @property
    def name(self) -> str | None:
        """The W&B project."""
        return self.run.project

    @property
    def version(self) -> str | None:
        """The W&B run's id."""
        return self.run.id

    @rank_zero_only
    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        """Send one line of metrics."""
        self.run.log(dict(metrics), step=step)

    @rank_zero_only
    def log_hyperparams(self, params: Any, *args: Any, **kwargs: Any) -> None:
        """Send settings."""
        self.run.config.update(params, allow_val_change=True)


def make_wandb_logger(out: Path, recipe: Recipe) -> WandbLogger | None:
    """A logger for the run directory `out`; its name is the run's."""
    try:
        import wandb
    except ImportError:
        raise UnmaskError("Weights & Biases is not installed: pip install 'unmask-core[wandb]'") from None
    place = out.resolve()
    run = wandb.init(
        project="unmask",
        name=place.name,
        id=f"{stable_id(str(place)):x}",  # runs of the same name in other folders are other runs
        resume="allow",
        dir=str(out),
        config=as_dict(recipe),
        mode="disabled" if rank_zero_only.rank else None,  # Fabric sets it on every rank
    )
    return WandbLogger(run)
