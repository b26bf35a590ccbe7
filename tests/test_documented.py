"""What SCALEX's and scArches' documentation list is here: the tables of examples/README.md, row by row.

Every row names what provides it, which must exist, and tests, which must exist, one of them with the row's id
in its name; rows without a test of their own elsewhere have it here.
"""

from __future__ import annotations

import argparse
import ast
import inspect
import re
import shlex
from importlib import import_module
from pathlib import Path
from typing import Any

import anndata
import numpy as np
import pytest
from views import make_counts

import streamx as sx
from streamx.cli.main import VERBS, make_parser
from streamx.errors import UsageError

torch = pytest.importorskip("torch", reason="torch is not installed")
ROOT = Path(__file__).parent.parent
TEXT = (ROOT / "examples" / "README.md").read_text()
ROWS = re.findall(r"^\| (S[XA]\d\d) \| (.+?) \| (.+?) \| `(.+?)` \|$", TEXT, flags=re.MULTILINE)
IDS = [f"SX{n:02d}" for n in range(1, 30)] + [f"SA{n:02d}" for n in range(1, 25)]


def test_every_row_once() -> None:
    assert [row[0] for row in ROWS] == IDS


def resolve(name: str) -> Any:
    """The object of a dotted name, from the package or from a module of it."""
    parts = name.split(".")
    value: Any = sx if parts[0] == "sx" else import_module(parts[0])
    for part, path in zip(parts[1:], (".".join(parts[: n + 1]) for n in range(1, len(parts))), strict=True):
        value = getattr(value, part) if hasattr(value, part) else import_module(path)
    return value


@pytest.mark.parametrize(("id", "documented", "here", "test"), ROWS, ids=[row[0] for row in ROWS])
def test_what_provides_a_row_exists(id: str, documented: str, here: str, test: str) -> None:
    verbs = {name for verb in VERBS for name in (verb.name, *verb.aliases)}
    for name in re.findall(r"`(.+?)`", here):
        if name.endswith(".py"):
            assert (ROOT / "examples" / name).is_file()
        elif name.startswith("streamx "):
            assert name.split()[1] in verbs
        else:
            assert callable(resolve(name)), name
    tests = [name.split("::") for name in test.split("`, `")]
    assert any(f"_{id.lower()}_" in function for _, function in tests)
    for path, function in tests:
        tree = ast.parse((ROOT / path).read_text())
        assert function in {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}


# Arguments as documented (scvi-tools 0.8.0-beta.0, as scArches exposed it)
METHODS = {
    "SA05": ("TRVAE.__init__", "adata condition_key conditions hidden_layer_sizes latent_dim dr_rate use_mmd "
             "mmd_on mmd_boundary recon_loss beta use_bn use_ln"),
    "SA05 ": ("TRVAE.get_latent", "x c mean"),
    "SA06": ("SCVI.__init__", "adata n_hidden n_latent n_layers dropout_rate dispersion gene_likelihood "
             "latent_distribution use_cuda"),
    "SA06 ": ("SCVI.train", "n_epochs train_size test_size lr n_epochs_kl_warmup n_iter_kl_warmup frequency"),
    "SA07": ("SCANVI.__init__", "adata unlabeled_category pretrained_model n_hidden n_latent n_layers "
             "dropout_rate dispersion gene_likelihood use_cuda"),
    "SA07 ": ("SCANVI.train", "n_epochs_unsupervised n_epochs_semisupervised train_base_model train_size "
              "test_size lr n_epochs_kl_warmup n_iter_kl_warmup frequency unsupervised_trainer_kwargs "
              "semisupervised_trainer_kwargs unsupervised_train_kwargs semisupervised_train_kwargs"),
    "SA07  ": ("SCANVI.predict", "adata indices soft batch_size"),
    "SA08": ("TOTALVI.__init__", "adata n_latent gene_dispersion protein_dispersion gene_likelihood "
             "latent_distribution empirical_protein_background_prior use_cuda"),
    "SA09": ("SCVI.get_latent_representation", "adata indices give_mean mc_samples batch_size"),
    "SA10": ("SCVI.get_marginal_ll", "adata indices n_mc_samples batch_size"),
    "SA10 ": ("TOTALVI.get_reconstruction_error", "adata indices mode batch_size"),
    "SA11": ("SCVI.get_normalized_expression", "adata indices transform_batch gene_list library_size "
             "n_samples batch_size return_mean return_numpy"),
    "SA11 ": ("TOTALVI.get_normalized_expression", "adata indices transform_batch gene_list protein_list "
              "library_size n_samples sample_protein_mixing scale_protein include_protein_background "
              "batch_size return_mean return_numpy"),
    "SA12": ("SCVI.differential_expression", "adata groupby group1 group2 idx1 idx2 mode delta batch_size "
             "all_stats batch_correction batchid1 batchid2 fdr_target"),
    "SA13": ("SCVI.posterior_predictive_sample", "adata indices n_samples gene_list batch_size"),
    "SA14": ("SCVI.get_feature_correlation_matrix", "adata indices n_samples batch_size rna_size_factor "
             "transform_batch correlation_type"),
    "SA15": ("SCVI.get_likelihood_parameters", "adata indices n_samples give_mean batch_size"),
    "SA16": ("SCVI.get_latent_library_size", "adata indices give_mean batch_size"),
    "SA17": ("TOTALVI.get_protein_foreground_probability", "adata indices transform_batch protein_list "
             "n_samples batch_size return_mean return_numpy"),
    "SA18": ("SCVI.load_query_data", "adata reference_model use_cuda freeze_dropout freeze_expression "
             "freeze_batchnorm_encoder freeze_batchnorm_decoder"),
    "SA19": ("SCVI_EVAL.__init__", "model adata trainer cell_type_key batch_key"),
    "SA19 ": ("TRVAE_EVAL.__init__", "model adata trainer condition_key cell_type_key"),
}  # fmt: skip

# SCALEX's functions, as documented: all arguments, in order; what is ours beside them goes by name alone
FUNCTIONS = {
    "label_transfer": "ref query rep label",
    "load_data": "data_list batch_categories profile join batch_key batch_name min_features min_cells "
                 "target_sum n_top_features backed batch_size chunk_size fraction n_obs processed log "
                 "num_workers use_layer",
    "concat_data": "data_list batch_categories join batch_key index_unique save",
    "load_files": "root",
    "load_file": "path backed",
    "read_mtx": "path",
    "preprocessing": "adata profile min_features min_cells target_sum n_top_features backed chunk_size log",
    "preprocessing_rna": "adata min_features min_cells target_sum n_top_features chunk_size backed log",
    "preprocessing_atac": "adata min_features min_cells target_sum n_top_features chunk_size backed log",
    "batch_scale": "adata chunk_size",
    "reindex": "adata genes chunk_size",
    "BatchSampler": "batch_size batch_id drop_last",
    "onehot": "y n",
    "embedding": "adata color color_map groupby groups cond2 v2 save legend_loc legend_fontsize "
                 "legend_fontweight sep basis size show",
    "plot_meta": "adata use_rep color batch colors cmap vmax vmin mask annot save fontsize",
    "plot_meta2": "adata use_rep color batch color_map figsize cmap batches annot save cbar keep "
                  "fontsize vmin vmax",
    "plot_confusion": "y y_pred save cmap",
    "batch_entropy_mixing_score": "data batches n_neighbors n_pools n_samples_per_pool",
    "silhouette_score": "X labels",
    "create_logger": "name ch fh levelname overwrite",
}  # fmt: skip


@pytest.mark.parametrize("id", METHODS)
def test_documented_arguments(id: str) -> None:
    """In the documented order, but for what later releases put between them."""
    cls, method = METHODS[id][0].split(".")
    parameters = list(inspect.signature(getattr(getattr(sx, cls), method)).parameters)
    places = [parameters.index(name) for name in METHODS[id][1].split()]
    assert places == sorted(places)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_arguments_of_scalex(name: str) -> None:
    parameters = inspect.signature(getattr(sx.scalex, name)).parameters.values()
    assert [p.name for p in parameters if p.kind is not p.KEYWORD_ONLY] == FUNCTIONS[name].split()


# -- SCALEX --------------------------------------------------------------------------------------------


def cells(sizes: list[int], seed: int = 0, n_genes: int = 40) -> anndata.AnnData:
    x_ng, _, type_n = make_counts(sizes, n_genes, seed=seed)
    adata = anndata.AnnData(x_ng)
    adata.obs_names = [f"{seed}-{i}" for i in range(adata.n_obs)]
    adata.var_names = [f"GENE{g}" for g in range(n_genes)]
    adata.obs["celltype"] = [f"t{t}" for t in type_n]
    return adata


def test_sx12_network_and_domain_norms(golden: Path) -> None:
    """A batch of no cell, of one, of many in a minibatch: the fixture has all but the first."""
    from streamx.config import ScalexConfig
    from streamx.interop.scalex import to_ours
    from streamx.models.scalex import Scalex

    f = dict(np.load(golden / "scalex_net.npz"))
    model = Scalex(12, 3, ScalexConfig(n_latent=3, n_hidden=16))
    model.load_state_dict(to_ours({k[3:]: torch.as_tensor(v) for k, v in f.items() if k.startswith("sd:")}))
    before = model.decoder.norm.running_mean.clone()
    mu_nk, y_n = torch.as_tensor(f["mu_train"]), torch.as_tensor(f["y"])
    seen = torch.sigmoid(model.decoder(mu_nk, y_n)).detach().numpy()
    np.testing.assert_allclose(seen, f["rec_train"], atol=1e-5)
    sizes = np.bincount(f["y"], minlength=3)
    moved = (model.decoder.norm.running_mean != before).any(dim=1).tolist()
    assert moved == (sizes > 1).tolist()
    one = torch.full((5,), int(sizes.argmax()))
    kept = model.decoder.norm.running_mean.clone()
    model.decoder(mu_nk[:5], one)
    moved = (model.decoder.norm.running_mean != kept).any(dim=1).tolist()
    assert moved == [code == int(one[0]) for code in range(3)]  # no cell: nothing changes


def test_sx13_sx27_a_whole_run(tmp_path: Path) -> None:
    """Epochs are ceil(steps / whole minibatches); the folder holds what is documented."""
    files = [cells([90], seed=seed) for seed in (1, 2)]
    settings: dict[str, Any] = {"min_features": 0, "min_cells": 0, "n_top_features": 0, "show": False}
    adata = sx.SCALEX(files, ["x", "y"], outdir=str(tmp_path), max_iteration=7, ignore_umap=True, **settings)
    history = (tmp_path / "model" / "history.csv").read_text().splitlines()
    assert len(history) - 1 == 4  # 180 cells: 2 whole minibatches of 64, ceil(7 / 2) epochs
    for name in ("adata.h5ad", "checkpoint/model.pt", "checkpoint/config.pt", "log.txt"):
        assert (tmp_path / name).stat().st_size > 0, name
    written = anndata.read_h5ad(tmp_path / "adata.h5ad")
    assert written.obs["batch"].tolist() == ["x"] * 90 + ["y"] * 90
    np.testing.assert_array_equal(written.obsm["latent"], adata.obsm["latent"])


def test_sx15_a_checkpoint_with_more_keys(tmp_path: Path) -> None:
    """Keys that the model has not are left aside, as by `load_model`; a missing one is an error."""
    from streamx.errors import BadFileError
    from streamx.interop.scalex import read_checkpoint, write_checkpoint
    from streamx.models.scalex import Scalex

    model = Scalex(12, 3)
    write_checkpoint(tmp_path, model, [f"G{g}" for g in range(12)])
    found, genes = read_checkpoint(tmp_path)
    assert list(genes) == [f"G{g}" for g in range(12)]
    for name, value in model.state_dict().items():
        assert torch.equal(found.state_dict()[name], value), name
    state = torch.load(tmp_path / "model.pt", weights_only=True)
    key = next(iter(state))
    del state[key]
    torch.save(state, tmp_path / "model.pt")
    with pytest.raises(BadFileError):
        read_checkpoint(tmp_path)


def test_sx16_losses() -> None:
    """Binary cross-entropy summed over genes and KL to N(0, 1), written out; half of the KL counts."""
    from streamx.models.scalex import Scalex

    model = Scalex(6, 2).eval()
    rng = np.random.default_rng(0)
    x_ng, batch_n = torch.tensor(rng.random((9, 6)), dtype=torch.float32), torch.tensor([0, 1] * 4 + [0])
    with torch.no_grad():
        loss = model.loss(x_ng, batch_n, torch.zeros(9, 10))
        mu_nk, log_var_nk = (t.double().numpy() for t in model.encoder(x_ng))
        p_ng = torch.sigmoid(model.decoder(torch.tensor(mu_nk).float(), batch_n)).double().numpy()
    x = x_ng.double().numpy()
    entropy = -(x * np.log(p_ng) + (1 - x) * np.log(1 - p_ng)).sum(axis=1).mean()
    kl = 0.5 * (np.exp(log_var_nk) + mu_nk**2 - 1 - log_var_nk).sum(axis=1).mean()
    assert float(loss.reconstruction) == pytest.approx(entropy, rel=1e-5)
    assert float(loss.kl) == pytest.approx(kl, rel=1e-4)
    assert float(loss.total) == pytest.approx(entropy + 0.5 * kl, rel=1e-5)


def test_sx17_early_stopping() -> None:
    """Ten epochs without a lower loss, or a NaN, end the training; the best epoch is the one that is kept."""
    from streamx.train.early_stopping import EarlyStopping

    rule = EarlyStopping(patience=10)
    for epoch, loss in enumerate([5.0, 3.0, *[4.0] * 9]):
        rule = rule.after(epoch, loss)
        assert not rule.stopped
    rule = rule.after(11, 3.0)  # no lower than the best
    assert rule.stopped
    assert (rule.best, rule.best_epoch) == (3.0, 1)
    assert EarlyStopping(patience=10).after(0, float("nan")).stopped


def test_sx23_batch_entropy_mixing_score() -> None:
    """ln 2 where two batches mix, 0 where they are apart (values of SCALEX after the same seed)."""
    np.random.seed(0)  # noqa: NPY002 - the values were made so
    mixed = np.random.normal(size=(600, 8))  # noqa: NPY002
    batches = np.repeat(["a", "b"], 300)
    assert sx.scalex.batch_entropy_mixing_score(mixed, batches) == pytest.approx(np.log(2), abs=0.005)
    apart = mixed + 100 * (batches == "b")[:, None]
    assert sx.scalex.batch_entropy_mixing_score(apart, batches) == pytest.approx(-1e-8, abs=1e-9)
    with pytest.raises(Exception, match="two batches"):
        sx.scalex.batch_entropy_mixing_score(mixed, ["a"] * 600)


def test_sx24_silhouette_score() -> None:
    from sklearn.metrics import silhouette_score

    rng = np.random.default_rng(0)
    x_nk, labels = rng.normal(size=(120, 5)), rng.choice(["a", "b", "c"], 120).astype("<U7")
    labels[:9] = "Unknown"  # a label as any other
    want = silhouette_score(x_nk, labels)
    found = sx.scalex.silhouette_score(x_nk, labels, metric="euclidean", sample_size=None, random_state=None)
    assert found == pytest.approx(want, abs=1e-6)
    some = [sx.scalex.silhouette_score(x_nk, labels, sample_size=60, random_state=s) for s in range(20)]
    assert np.mean(some) == pytest.approx(want, abs=0.02)
    assert len(set(some)) > 10
    with pytest.raises(UsageError, match="metric 'cosine'"):
        sx.scalex.silhouette_score(x_nk, labels, metric="cosine")


def test_sx26_command_line() -> None:
    """Every option of release 1.0.2, and the spellings that only its texts have."""
    line = (
        "scalex --data_list a.h5ad b.h5ad --batch_categories a b --join outer --batch_key batch "
        "--batch_name s --profile ATAC -t c.h5ad --min_features 100 --min_cells 3 --n_top_features 500 "
        "--target_sum 1000 --processed -p before --impute a -o out --lr 1e-3 --batch_size 32 -g 1 "
        "--max_iteration 10 --seed 1 --chunk_size 100 --ignore_umap --repeat --assess --eval"
    )
    args = make_parser().parse_args(shlex.split(line))
    assert args.data_list == ["a.h5ad", "b.h5ad"]
    given = {"batch_categories": ["a", "b"], "join": "outer", "batch_name": "s", "profile": "ATAC", "gpu": 1}
    given |= {"n_top_features": "500", "projection": "before", "outdir": "out", "lr": 1e-3, "eval": True}
    assert {name: getattr(args, name) for name in given} == given
    args = make_parser().parse_args(
        shlex.split("scalex -d a.h5ad -c out --min_cell 5 --min_gene 7 --n_top_genes 9")
    )
    assert isinstance(args, argparse.Namespace)
    found = (args.projection, args.min_cells, args.min_features, args.n_top_features)
    assert found == ("out", 5, 7, "9")


def test_sx28_two_modalities_as_batches(tmp_path: Path) -> None:
    """RNA and gene activity, which share some genes, without a filter: all cells, on the shared genes."""
    rna, activity = cells([80], seed=1), cells([70], seed=2)[:, 10:].copy()
    settings: dict[str, Any] = {"min_features": 0, "min_cells": 0, "n_top_features": 20, "show": False}
    adata = sx.SCALEX([rna, activity], ["RNA", "ATAC"], max_iteration=4, ignore_umap=True, **settings)
    assert adata.shape == (150, 20)
    assert adata.obs["batch"].value_counts().to_dict() == {"RNA": 80, "ATAC": 70}
    assert set(adata.var_names) <= set(activity.var_names)
    assert np.isfinite(adata.obsm["latent"]).all()


# -- scArches ------------------------------------------------------------------------------------------


def test_sa03_setup_anndata() -> None:
    """Sorted categories; what is not there is an error; the object itself is left as it is."""
    adata = cells([30, 20])
    adata.obs["study"] = ["z"] * 25 + ["m"] * 25
    before = (list(adata.obs), dict(adata.uns))
    assert sx.setup_anndata(adata, batch_key="study", labels_key="celltype") is None
    assert (list(adata.obs), dict(adata.uns)) == before
    model = sx.SCVI(adata, n_hidden=8, n_latent=2)
    model.train(1, progress=False)
    assert model.state.model.batches == ("m", "z")
    with pytest.raises(UsageError, match="no obs column 'donor'"):
        sx.setup_anndata(adata, batch_key="donor")
    names = "adata batch_key labels_key layer protein_expression_obsm_key protein_names_uns_key "
    names += "categorical_covariate_keys continuous_covariate_keys copy"
    assert list(inspect.signature(sx.setup_anndata).parameters)[:9] == names.split()


def test_sa22_training_tips() -> None:
    """What the tips name is there by that name, and what no longer exists is refused by name."""
    adata = cells([30])
    for likelihood in ("nb", "zinb"):
        sx.SCVI(adata, gene_likelihood=likelihood)
        sx.TRVAE(adata, recon_loss=likelihood, hidden_layer_sizes=[128, 128])
    for wrong in ({"recon_loss": "sse"}, {"alpha": 1e-4}):
        with pytest.raises(UsageError, match=next(iter(wrong))):
            sx.TRVAE(adata, **wrong)
    assert "2,000 variable genes" in TEXT.split("## Training tips")[1]


def test_sa23_every_example_is_short_and_listed() -> None:
    scripts = sorted((ROOT / "examples").glob("[0-9]*.py"))
    listed = re.findall(r"^\| `(\d\d_\w+\.py)` \|", TEXT, flags=re.MULTILINE)
    assert [path.name for path in scripts] == listed
    for path in scripts:
        text = path.read_text()
        code = [line for line in text.split('"""', 2)[2].splitlines() if line.strip()]
        assert len(code) < 60, path.name
        assert "--quick" in text
