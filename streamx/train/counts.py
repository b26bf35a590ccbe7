"""The count models (scVI, scANVI, totalVI, trVAE) on the engine: their minibatches, losses and latents."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from streamx.config import TrainConfig
from streamx.errors import BadValuesError, UsageError, warn
from streamx.loader.column import large_array
from streamx.loader.loader import Loader
from streamx.loader.pairs import pairs
from streamx.loader.rows import selection, split
from streamx.models.adversary import Adversary, Fooling
from streamx.models.background import empirical_background
from streamx.models.cells import Cells
from streamx.models.scanvi import from_scvi
from streamx.schema import Schema
from streamx.store.collection import Collection
from streamx.store.ingest.counts import LOG_MAXIMUM
from streamx.train.build import TAKES_ROWS, build_module, n_latent_of, takes_floats
from streamx.train.cells import Columns, check_proteins, columns_of, names_in
from streamx.train.distributed import Ranks
from streamx.train.engine import run_task, warm_up_steps
from streamx.train.feed import make_loader
from streamx.train.fit import Several, make_optimizer, seed_of
from streamx.train.model import Model, load_model
from streamx.train.task import Finished, Run, Task

ROWS = 4096  # per minibatch where its size does not matter
LN_DRAWS = 5000  # of a logistic-normal latent
FEW_PROTEINS = 10  # up to here mixtures of a cell's proteins say nothing
STRETCHES, STRETCH = 20, 32  # that a sample of a batch's proteins is taken from, and cells in each
ADVERSARY_LR = 1e-3
LIKE_NONE = ("", "unknown", "unlabeled", "unlabelled", "unassigned", "undefined", "none", "nan", "na")
FEWEST = 3  # cells of a minibatch that is not full, in training: batch norm needs several


def schema_of(view: Collection, config: TrainConfig, network: Any) -> Schema:
    """What a model of this view knows: genes, batches, and the obs columns that are asked for.

    Raises
    ------
    UsageError
        If a column is absent, or the model needs one that is not named.
    BadValuesError
        If the view holds no counts, and the model can't do without.
    """
    _check_values(view, config, network)
    if config.model == "scanvi" and config.label_key is None:
        raise UsageError(
            "scanvi learns from labels", fix=f"--label-key with one of: {', '.join(view.obs_columns)}"
        )
    labels: tuple[str, ...] = ()
    if config.label_key is not None:
        labels = names_in(view.obs_column(config.label_key), without=config.unlabeled)
    if config.model == "scanvi" and not labels:
        raise UsageError(f"no cell has a {config.label_key}", where=str(view.path), fix="another --label-key")
    nameless = [name for name in labels if name.lower() in LIKE_NONE]
    if config.model == "scanvi" and nameless:
        warn(
            f"{nameless[0]!r} counts as a label of {config.label_key}, learnt and predicted as any other",
            where=str(view.path),
            fix=f"--unlabeled {nameless[0]}, if it means that a cell has none",
        )
    proteins: tuple[str, ...] = ()
    if config.model == "totalvi":
        check_proteins(view, config.protein_key)
        proteins = tuple(map(str, view.modalities[config.protein_key]["names"]))
    return Schema(
        genes=tuple(map(str, view.var_names)),
        batches=tuple(view.batches),
        batch_key=view.batch_key,
        labels=labels,
        label_key=config.label_key,
        unlabeled=config.unlabeled if labels else None,
        categories=tuple((key, names_in(view.obs_column(key))) for key in config.category_keys),
        continuous=tuple(config.continuous_keys),
        proteins=proteins,
        protein_key=config.protein_key if config.model == "totalvi" else None,
    )


def _check_values(view: Collection, config: TrainConfig, network: Any) -> None:
    """Counts; or, for trVAE with mse, values that are not negative. Looks at the first cells."""
    if view.value_dtype.kind != "f":
        return
    value_v = view.read(0, min(ROWS, view.n_obs)).data
    if not len(value_v) or not (value_v % 1).any():
        return
    if not takes_floats(network):
        fix = "; trvae with --recon-loss mse takes normalised values too" if config.model == "trvae" else ""
        raise BadValuesError(
            "holds values that are no counts",
            where=str(view.path),
            fix=f"{config.model} models raw counts{fix}",
        )
    if value_v.min() < 0:
        raise BadValuesError(
            "holds negative values",
            where=str(view.path),
            fix="normalise without centring or scaling: what trVAE decodes with mse is never negative",
        )
    if network.log_input and value_v.max() < LOG_MAXIMUM:
        warn(
            f"the largest value is {value_v.max():.1f}: these look like logarithms, and ln(1 + x) is fitted",
            where=str(view.path),
            fix="--no-log-input (log_input=False) fits x as it is",
        )


def prepare(run: Run, progress: bool) -> Task:
    """A new network, or the one to begin from, and its minibatches from the view.

    scANVI begins from a scVI that is trained first, as its documentation has it, unless ``init`` names one.
    """
    config = run.config
    base: list[dict[str, float]] = []
    generator = torch.Generator().manual_seed(seed_of(config.seed, 0))
    if config.init is not None:
        module = _begun(run, load_model(config.init), generator)
    elif config.model == "scanvi" and config.base_epochs != 0:
        vae, base = _base(run, progress)
        module = from_scvi(vae, len(run.schema.labels), run.network, generator=generator)
    else:
        module = _new(run, config.model, generator)
    return replace(task_of(run, module.to(run.device)), base=base)


def _new(run: Run, kind: str, generator: torch.Generator) -> Any:
    tables: dict[str, Any] = {}
    if not getattr(run.network, "use_observed_lib_size", True):
        tables["library_b"] = log_library(run.view)
    if kind == "totalvi":
        tables |= protein_tables(run.view, run.schema, run.config)
    return build_module(kind, run.schema, run.network, generator, tables)


def _base(run: Run, progress: bool) -> tuple[Any, list[dict[str, float]]]:
    """A trained scVI of the same settings, on the CPU, and the history of its training."""
    config = replace(run.config, model="scvi", max_epochs=run.config.base_epochs, max_iteration=None)
    of_base = replace(run, config=config, name="base")
    vae = _new(run, "scvi", torch.Generator().manual_seed(seed_of(config.seed, 0))).to(run.device)
    trained = run_task(of_base, task_of(of_base, vae), run.view.n_obs, progress)
    return vae.cpu(), trained.state.history


def _begun(run: Run, model: Model, generator: torch.Generator) -> Any:
    """The network to go on with: the model's own, or scANVI on top of a trained scVI.

    Raises
    ------
    UsageError
        If the model is of another kind, or knows other genes or batches.
    """
    kind, own = run.config.model, run.schema
    if model.kind != kind and (kind, model.kind) != ("scanvi", "scvi"):
        raise UsageError(f"is a {model.kind}, no beginning for {kind}", where=str(model.path))
    for name in ("genes", "batches"):
        if getattr(model.schema, name) != getattr(own, name):
            raise UsageError(
                f"has other {name} than the view",
                where=str(model.path),
                fix="preprocess with --genes of its own, and the same batches; or begin without --init",
            )
    if model.kind != kind:
        return from_scvi(model.module, len(own.labels), run.network, generator=generator)
    return model.module


def protein_tables(view: Collection, schema: Schema, config: TrainConfig) -> dict[str, Any]:
    """Which proteins each batch measured, and where the prior of their background begins.

    A protein without a single count in a batch counts as not measured there (as in scvi-tools).
    """
    assert schema.protein_key is not None
    n_proteins, measured = len(schema.proteins), view.modalities[schema.protein_key]["measured"]
    nothing = [False] * n_proteins
    measured_bp = np.array([measured.get(name, nothing) for name in view.batches or [""]], bool)
    tables: dict[str, Any] = {"measured_bp": measured_bp}
    wanted = n_proteins > FEW_PROTEINS if config.empirical_prior is None else config.empirical_prior
    if wanted:
        rng = np.random.default_rng(config.seed)
        sampled = [_protein_sample(view, schema.protein_key, b, rng) for b in range(len(measured_bp))]
        tables["background"] = empirical_background(sampled, rng, measured_bp)
    return tables


def _protein_sample(view: Collection, key: str, batch: int, rng: np.random.Generator) -> np.ndarray:
    """Protein counts of some cells of a batch, from a few stretches of its rows."""
    bounds, code_r = view.batch_runs
    runs = np.flatnonzero(code_r == batch)
    if not len(runs):
        return np.zeros((0, len(view.modalities[key]["names"])), np.float32)
    size_r = (bounds[1:] - bounds[:-1])[runs]
    parts = []
    for run in rng.choice(runs, size=STRETCHES, p=size_r / size_r.sum()):
        low = int(rng.integers(bounds[run], max(bounds[run] + 1, bounds[run + 1] - STRETCH + 1)))
        parts.append(view.read_obsm(key, low, min(low + STRETCH, int(bounds[run + 1]))))
    return np.concatenate(parts)


def log_library(
    view: Collection, rows: tuple[int, int] | None = None, block: int = 65_536
) -> tuple[np.ndarray, np.ndarray]:
    """Mean and (population) variance of ln(sum) of the cells of each batch, float64 (n_batches,) each.

    The sum is over the view's genes; cells without counts are left out.
    """
    n_batches = max(1, len(view.batches))
    n_b, sum_b, square_b = np.zeros((3, n_batches))
    bounds, code_r = view.batch_runs
    for low, high in view.iter_rows(block, *(rows or ())):
        sum_n = np.asarray(view.read(low, high).sum(1, dtype=np.float64)).ravel()
        code_n = code_r[np.searchsorted(bounds, np.arange(low, high), side="right") - 1]
        there = (sum_n > 0) & (code_n >= 0)
        log_n, code_n = np.log(sum_n[there]), code_n[there]
        n_b += np.bincount(code_n, minlength=n_batches)
        sum_b += np.bincount(code_n, log_n, n_batches)
        square_b += np.bincount(code_n, log_n**2, n_batches)
    mean_b = sum_b / np.maximum(n_b, 1)
    return mean_b, np.maximum(square_b / np.maximum(n_b, 1) - mean_b**2, 1e-8)


def task_of(run: Run, module: Any, rows: tuple[int, int] | None = None) -> Task:
    """A network, and the minibatches to train it with: of all cells, or of a range of rows."""
    view, config, ranks = run.view, run.config, run.ranks
    columns = columns_of(view, run.schema, run.device)
    parts = _parts(view.n_obs, rows, run)
    n_cells = view.n_obs if rows is None else rows[1] - rows[0]
    options: dict[str, Any] = {
        "device": run.device,
        "transform": False,
        "sparse": config.model in TAKES_ROWS,
        **run.reading,
    }
    sampling: dict[str, Any] = {"weights": "balanced"} if config.sampling == "balanced" else {}
    training = make_loader(
        view,
        config.minibatch_size,
        rows=parts["train"],
        drop_last=_drops_last(_number(parts["train"], view.n_obs), config),
        seed=config.seed,
        rank=ranks.rank,
        world=ranks.world,
        **sampling,
        **options,
    )
    labelled = None
    with_label = _labelled(columns, parts["train"], view.n_obs) if config.model == "scanvi" else np.zeros(0)
    if with_label.any():
        labelled = make_loader(
            view,
            config.minibatch_size,
            rows=with_label,
            drop_last=True,  # they go round: every one has its turn
            seed=config.seed + 1,
            rank=ranks.rank,
            world=ranks.world,
            **options,
        )
    minibatches = _Minibatches(training, labelled, columns, config, run.device, n_cells)
    validation = None
    if parts["validation"] is not None:
        others = make_loader(
            view,
            ROWS,
            rows=parts["validation"],
            order="sequential",
            rank=ranks.rank,
            world=ranks.world,
            **options,
        )
        validation = _Validation(module, others, columns, config.seed, run.device)
    loss = module.loss if labelled is None else _with_labelled(module)
    recordable = config.model != "trvae"  # its discrepancy looks at which batches a minibatch holds
    task = Task(module, minibatches, loss, len(training), validation, recordable)
    if (
        config.model == "totalvi"
        and not bool(module.measured_bp.all())
        and module.n_batches > 1
        and rows is None
    ):
        return _with_adversary(task, run)
    return task


def _with_adversary(task: Task, run: Run) -> Task:
    """totalVI where batches lack proteins: it also learns to hide the batch from a classifier."""
    generator = torch.Generator().manual_seed(seed_of(run.config.seed, 5))
    adversary = Adversary(run.network.n_latent, task.module.n_batches, generator=generator)
    pair = Fooling(task.module, adversary.to(run.device))

    def optimizers(config: TrainConfig, ranks: Ranks) -> Any:
        eps, decay = config.eps or 1e-8, config.weight_decay
        of_model = make_optimizer(pair.model, config.lr, decay, ranks, eps=eps)
        return Several([of_model, make_optimizer(pair.adversary, ADVERSARY_LR, decay, ranks, eps=eps)])

    return replace(task, module=pair, loss=pair.loss, result=task.module, optimizer=optimizers)


def _with_labelled(module: Any) -> Callable[..., dict[str, Tensor]]:
    """The loss of scANVI on a minibatch and one of labelled cells."""

    def loss(cells: Cells, labelled: Cells, weight: float, generator: torch.Generator) -> dict[str, Tensor]:
        return module.loss(cells, weight, generator, labelled)

    return loss


def _parts(n: int, rows: tuple[int, int] | None, run: Run) -> dict[str, Any]:
    """Which of n cells train and which validate, as a loader takes it; no validation: None."""
    if run.split is not None:
        train, validation = run.split["train"], run.split["validation"]
        if (train & validation).any() or not train.any():
            raise UsageError("no cell trains, or some both train and validate", fix="another split")
        return {"train": train, "validation": validation if validation.any() else None}
    share = run.config.train_size or 1.0
    if share > 1:
        raise UsageError(f"train_size = {share}", fix="a share of the cells, above 0 and at most 1")
    low, high = rows or (0, n)
    if round((high - low) * (1 - share)) == 0:
        return {"train": rows, "validation": None}
    within = split(high - low, {"train": share, "validation": 1 - share}, seed=run.config.seed)
    return {name: np.pad(mask, (low, n - high)) for name, mask in within.items()}


def _drops_last(n_cells: int, config: TrainConfig) -> bool:
    """Whether an epoch leaves out what does not fill a minibatch.

    It trains on it as scvi-tools does: of a small query it may be a third of the steps.
    """
    return n_cells % config.minibatch_size < FEWEST


def _number(rows: Any, n: int) -> int:
    """How many of n cells a selection of rows has."""
    chosen = selection(rows, n)
    return len(range(n)[chosen]) if isinstance(chosen, slice) else len(chosen)


def _labelled(columns: Columns, train: Any, n: int) -> np.ndarray:
    """Those of the cells that train which have a label."""
    labelled = np.zeros(n, bool) if columns.label_n is None else columns.label_n.cpu().numpy() >= 0
    chosen = selection(train, n)
    mask = np.zeros(n, bool)
    mask[chosen] = True
    return labelled & mask


class _Minibatches:
    """(epoch, done) -> what the model's loss takes, minibatch by minibatch.

    Each has a generator of its own, seeded by (seed, epoch, number of the minibatch among those of all
    processes), and the weight of the KL divergence at its step.
    """

    def __init__(
        self,
        training: Loader,
        labelled: Loader | None,
        columns: Columns,
        config: TrainConfig,
        device: torch.device,
        n_cells: int,
    ) -> None:
        self.training, self.labelled, self.columns = training, labelled, columns
        self.config, self.device = config, device
        self.per_epoch = -(-len(training.at(0)) // config.accumulate)
        self.n_cells = n_cells

    def __call__(self, epoch: int, done: int) -> Iterator[tuple[Any, ...]]:
        world, number = self.training.world, done * self.training.world + self.training.rank
        for step, cells in enumerate(self._cells(epoch, done), start=done):
            generator = torch.Generator(self.device).manual_seed(seed_of(self.config.seed, 1, epoch, number))
            yield *cells, self._kl_weight(epoch, step), generator
            number += world

    def _cells(self, epoch: int, done: int) -> Iterator[tuple[Cells, ...]]:
        if self.labelled is None:
            for minibatch in self.training.at(epoch, done * self.training.world):
                yield (self.columns.cells(minibatch),)
        else:
            for every, labelled in pairs(self.training, self.labelled, epoch, done):
                yield self.columns.cells(every), self.columns.cells(labelled)

    def _kl_weight(self, epoch: int, minibatch: int) -> float:
        return kl_weight(
            self.config, self.n_cells, epoch, epoch * self.per_epoch + minibatch // self.config.accumulate
        )


def kl_weight(config: TrainConfig, n_cells: int, epoch: int, step: int) -> float:
    """Weight of the KL divergence, rising to 1: by steps where these are given, else by epochs."""
    steps = warm_up_steps(config, n_cells)
    if steps is not None:
        return min(1.0, step / steps) if steps else 1.0
    return min(1.0, epoch / config.warmup_epochs) if config.warmup_epochs else 1.0


class _Validation:
    """(epoch) -> sums of the losses over the validation cells, KL divergence in full; and their number."""

    def __init__(
        self, module: Any, loader: Loader, columns: Columns, seed: int, device: torch.device
    ) -> None:
        self.module, self.loader, self.columns = module, loader, columns
        self.seed, self.device = seed, device

    @torch.no_grad()
    def __call__(self, epoch: int) -> tuple[dict[str, Tensor], float]:
        sums: dict[str, Tensor] = {}
        n = 0
        generator = torch.Generator(self.device).manual_seed(seed_of(self.seed, 2, epoch, self.loader.rank))
        for minibatch in self.loader.at(0):
            losses = self.module.loss(self.columns.cells(minibatch), 1.0, generator)
            for name, value in losses.items():
                sums[name] = sums.get(name, 0) + value.double() * len(minibatch)
            n += len(minibatch)
        return sums, n


def finish(run: Run, module: Any) -> Finished:
    """Latents of the reference."""
    columns = columns_of(run.view, run.schema, run.device)
    options = {"device": run.device, "sparse": run.config.model in TAKES_ROWS, **run.reading}
    return Finished(latents(module, run.view, columns, **options))


@torch.no_grad()
def latents(module: Any, view: Collection, columns: Columns, **options: Any) -> np.ndarray:
    """Means of q(z|x) of all cells of a view, float32 (n_cells, n_latent), in row order.

    ``options``: of :func:`streamx.train.feed.make_loader`.
    """
    loader = make_loader(view, ROWS, order="sequential", transform=False, **options)
    z_nk, start = large_array((view.n_obs, n_latent_of(module.config)), np.float32), 0
    for minibatch in loader.at(0):
        z_nk[start : start + len(minibatch)] = latent_of(module, columns.cells(minibatch)).cpu().numpy()
        start += len(minibatch)
    return z_nk


def latent_of(module: Any, cells: Cells, n_draws: int = LN_DRAWS) -> Tensor:
    """The latents of a minibatch: means of q(z|x), (n, n_latent).

    Of a logistic-normal latent the mean of its softmax, over draws that are the same for every cell, so
    that a cell's latent does not depend on its neighbours (scvi-tools draws anew).
    """
    mean_nk, var_nk = module.encode(cells)[:2]
    if getattr(module.config, "latent_distribution", "normal") == "normal":
        return mean_nk
    generator = torch.Generator(mean_nk.device).manual_seed(0)
    sum_nk = torch.zeros_like(mean_nk)
    for _ in range(n_draws):
        noise_k = torch.randn(mean_nk.shape[1], generator=generator, device=mean_nk.device)
        sum_nk += torch.softmax(torch.addcmul(mean_nk, var_nk.sqrt(), noise_k), -1)
    return sum_nk / n_draws
