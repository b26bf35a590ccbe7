"""``publish`` and ``fetch``: a model to a record and back, killed and repeated on the way."""

from __future__ import annotations

import hashlib
import json
import shutil
import zipfile
from pathlib import Path
from typing import Any

import pytest
from fake_zenodo import TOKEN, Fault, Zenodo, serving
from views import write_view

import streamx as sx
from streamx.cli.main import invoke, main
from streamx.errors import BadFileError, IntegrityError, ResourceError, StorageError, UsageError
from streamx.share.fetch import parse_source
from streamx.train.card import render
from streamx.train.model import seal

QUICK = {"retry_seconds": 0.1, "progress": False}
JANE = "Doe, Jane"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("share")
    view = write_view(folder / "view", [60, 40], expressed=0.2)
    sx.train(view, folder / "lung", max_iteration=4, n_hidden=8, threads=1, progress=False)
    return folder / "lung"


def contents(folder: Path, without: str = "origin.json") -> dict[str, bytes]:
    files = {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}
    return {name: data for name, data in files.items() if name != without}


def published(model: Path, zenodo: Zenodo, **more: Any) -> dict[str, Any]:
    return sx.publish(model, base_url=zenodo.api, **{"creator": JANE} | QUICK | more)


def test_there_and_back_by_commands(model: Path, zenodo: Zenodo, tmp_path: Path) -> None:
    told = invoke(["publish", str(model), "--to", "zenodo", "--url", zenodo.api, "--creator", JANE])
    assert told["status"] == "published"
    assert told["doi"] == "10.5281/zenodo.100"
    assert told["link"] == f"{zenodo.url}/records/100"
    assert list(zenodo.files[100]) == ["streamx-lung.zip"]
    metadata = zenodo.depositions[100]["metadata"]
    assert metadata["creators"] == [{"name": JANE}]
    assert "batch0" in metadata["description"]
    found = invoke(["fetch", told["doi"], "-o", str(tmp_path / "got"), "--url", zenodo.api])
    assert (found["status"], found["model"]) == ("fetched", "scalex")
    assert contents(tmp_path / "got") == contents(model)
    assert sx.verify(tmp_path / "got")["ok"]
    assert json.loads((tmp_path / "got" / "origin.json").read_text())["source"] == told["doi"]
    again = invoke(["fetch", told["doi"], "-o", str(tmp_path / "got"), "--url", zenodo.api])
    assert again["status"] == "found"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["got"]
    told = published(tmp_path / "got", zenodo, name="lung")  # a fetched copy is the same model
    assert (told["status"], told["deposition"]) == ("found", "100")


def test_one_draft_whatever_breaks(model: Path, zenodo: Zenodo) -> None:
    for method, path in (("PUT", "bucket"), ("POST", "publish")):
        zenodo.faults.append(Fault(method, path, 500, times=100))
        with pytest.raises(StorageError, match="answered 500"):
            published(model, zenodo)
        zenodo.faults.clear()
    assert len(zenodo.depositions) == 1
    assert published(model, zenodo, title="Lung")["status"] == "published"
    assert published(model, zenodo)["status"] == "found"
    assert list(zenodo.depositions) == [100]
    assert zenodo.depositions[100]["metadata"]["title"] == "Lung"
    assert zenodo.count("PUT", "bucket") >= 2
    assert zenodo.count("POST", "depositions$") == 1


def test_drafts_are_found_on_every_page(model: Path, zenodo: Zenodo) -> None:
    for number in range(5):
        zenodo.new({"title": f"other {number}"})
    assert published(model, zenodo, draft=True)["status"] == "draft"
    again = published(model, zenodo, draft=True)
    assert (again["status"], again["deposition"]) == ("draft", "105")
    assert again["doi"] == "10.5281/zenodo.105"
    assert zenodo.count("PUT", "bucket") == 1


def test_refusals(model: Path, zenodo: Zenodo, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UsageError, match="who made it"):
        published(model, zenodo, creator=())
    with pytest.raises(BadFileError, match="is no model"):
        published(tmp_path, zenodo)
    monkeypatch.setenv("ZENODO_TOKEN", "stale")
    with pytest.raises(UsageError, match="answered 401") as found:
        published(model, zenodo)
    assert "stale" not in str(found.value)
    monkeypatch.delenv("ZENODO_TOKEN")
    with pytest.raises(UsageError, match="no access token"):
        published(model, zenodo)
    (tmp_path / "token").write_text(TOKEN)
    assert published(model, zenodo, token_file=str(tmp_path / "token"), draft=True)["status"] == "draft"


def test_a_hostile_name_is_text(zenodo: Zenodo, tmp_path: Path) -> None:
    view = write_view(tmp_path / "view", [40, 40], expressed=0.2)
    sx.train(view, tmp_path / "model", max_iteration=2, n_hidden=8, threads=1, progress=False)
    card = json.loads((tmp_path / "model" / "model.json").read_text())
    name = "<script>alert(1)</script> | [x](javascript:y) `\n# Heading"
    text = render(card | {"data": card["data"] | {"batches": {name: 3}}})
    assert "<script>" not in text
    assert "\n# Heading" not in text
    row = next(line for line in text.splitlines() if "script" in line)
    assert row == (r"| &lt;script&gt;alert(1)&lt;/script&gt; \| \[x\](javascript:y) \` \# Heading | 3 |")


def test_a_download_is_taken_up(model: Path, zenodo: Zenodo, tmp_path: Path) -> None:
    published(model, zenodo)
    size = len(zenodo.files[100]["streamx-lung.zip"])
    zenodo.faults += [Fault("GET", "content", cut=size // 2), Fault("GET", "content", cut=0, times=100)]
    source = f"{zenodo.url}/records/100"
    with pytest.raises(StorageError, match="broke off"):
        sx.fetch(source, tmp_path / "got", base_url=zenodo.api, **QUICK)
    assert not (tmp_path / "got").exists()
    zenodo.faults.clear()
    assert sx.fetch(source, tmp_path / "got", base_url=zenodo.api, **QUICK)["status"] == "fetched"
    assert zenodo.asked[-1][2]["Range"] == f"bytes={size // 2}-"
    assert contents(tmp_path / "got") == contents(model)


def test_what_is_left_of_another_download(model: Path, zenodo: Zenodo, tmp_path: Path) -> None:
    published(model, zenodo)
    (tmp_path / "got.part").mkdir()
    (tmp_path / "got.part" / "archive.zip").write_bytes(b"another record's")
    assert sx.fetch("100", tmp_path / "got", base_url=zenodo.api, **QUICK)["status"] == "fetched"


def rezipped(zenodo: Zenodo, model: Path, changes: dict[str, bytes | None]) -> None:
    """The record's archive is of the same model with other files, without a list that tells."""
    files = {name: data for name, data in (contents(model) | changes).items() if data is not None}
    path = model.parent / "made.zip"
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in files.items():
            archive.writestr(name, data)
    zenodo.files[100]["streamx-lung.zip"] = path.read_bytes()


@pytest.mark.parametrize(
    ("changes", "error"),
    [
        ({"model.safetensors": b"changed"}, IntegrityError),
        ({"model.json": None}, BadFileError),
        ({"../evil": b"evil"}, BadFileError),
        ({"model.json": b'{"format": 1}'}, IntegrityError),
    ],
)
def test_what_is_wrong_never_appears(
    changes: dict[str, bytes | None], error: type, model: Path, zenodo: Zenodo, tmp_path: Path
) -> None:
    published(model, zenodo)
    rezipped(zenodo, model, changes)
    home = tmp_path / "home"
    home.mkdir()
    with pytest.raises(error):
        sx.fetch("100", home / "got", base_url=zenodo.api, **QUICK)
    assert list(home.iterdir()) == []
    assert list(tmp_path.iterdir()) == [home]


CARD = {"format": 1, "model": "scalex", "id": "x", "files": {}}


@pytest.mark.parametrize(
    "card",
    [
        b"[" * 100_000,
        seal({}),
        seal(CARD | {"files": ["model.safetensors"]}),
        seal(CARD | {"files": {"model.safetensors": 3}}),
        seal(CARD | {"files": {"../../../../../etc/passwd": [1, "00000000"]}}),
        seal(CARD | {"files": {"a\0b": [1, "00000000"]}}),
        seal(CARD | {"model": {"scalex": 1}}),
        seal(CARD | {"format": "1"}),
    ],
)
def test_a_card_that_is_sealed_and_none(card: bytes, model: Path, zenodo: Zenodo, tmp_path: Path) -> None:
    """A seal shows damage, not who made it."""
    published(model, zenodo)
    rezipped(zenodo, model, {"model.json": card})
    with pytest.raises(IntegrityError):
        sx.fetch("100", tmp_path / "got", base_url=zenodo.api, **QUICK)
    assert list(tmp_path.iterdir()) == []


def test_wrong_checksums_and_limits(model: Path, zenodo: Zenodo, tmp_path: Path) -> None:
    published(model, zenodo)
    with pytest.raises(ResourceError, match="are allowed"):
        sx.fetch("100", tmp_path / "got", base_url=zenodo.api, limit="1kB", **QUICK)
    shutil.rmtree(tmp_path / "got.part")
    zenodo.wrong_checksum = True
    with pytest.raises(IntegrityError, match="was announced"):
        sx.fetch("100", tmp_path / "got", base_url=zenodo.api, **QUICK)
    assert not (tmp_path / "got").exists()


def test_what_can_not_be_is_refused_before_a_request(zenodo: Zenodo, tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    with pytest.raises(UsageError, match="holds something else"):
        sx.fetch("100", tmp_path / "mine", base_url=zenodo.api, **QUICK)
    with pytest.raises(UsageError, match="no size in bytes"):
        sx.fetch("100", tmp_path / "got", base_url=zenodo.api, limit="-1", **QUICK)
    assert zenodo.asked == []


def test_which_file_of_a_record(model: Path, zenodo: Zenodo, tmp_path: Path) -> None:
    published(model, zenodo)
    whole = zenodo.files[100].pop("streamx-lung.zip")
    zenodo.files[100] |= {"a.zip": whole, "b.zip": b"no zip", "table.csv": b""}
    with pytest.raises(BadFileError, match="2 archives") as found:
        sx.fetch("100", tmp_path / "got", base_url=zenodo.api, **QUICK)
    assert "a.zip, b.zip, table.csv" in str(found.value)
    with pytest.raises(BadFileError, match="no sound zip file"):
        sx.fetch("100", tmp_path / "got", base_url=zenodo.api, file="b.zip", **QUICK)
    assert sx.fetch("100", tmp_path / "got", base_url=zenodo.api, file="a.zip", **QUICK)["file"] == "a.zip"
    with pytest.raises(UsageError, match="something else"):
        sx.fetch("100", tmp_path / "got", base_url=zenodo.api, file="b.zip", **QUICK)
    with pytest.raises(BadFileError, match="answered 404"):
        sx.fetch("999", tmp_path / "other", base_url=zenodo.api, **QUICK)
    with pytest.raises(UsageError, match="to a folder"):
        sx.fetch("100", "s3://bucket/model", base_url=zenodo.api, **QUICK)


def test_an_address_of_no_service_gets_no_token(model: Path, zenodo: Zenodo, tmp_path: Path) -> None:
    published(model, zenodo)
    with serving() as other:
        other.plain["/share/lung.zip"] = zenodo.files[100]["streamx-lung.zip"]
        found = sx.fetch(f"{other.url}/share/lung.zip?signature=x", tmp_path / "got", **QUICK)
        assert found["status"] == "fetched"
        assert all("Authorization" not in headers for _, _, headers in other.asked)
    assert "signature" not in (tmp_path / "got" / "origin.json").read_text()


@pytest.mark.parametrize(
    ("source", "base", "record", "file"),
    [
        ("10.5281/zenodo.123", "https://zenodo.org/api", "123", None),
        ("doi:10.5281/zenodo.123", "https://zenodo.org/api", "123", None),
        ("https://doi.org/10.5281/ZENODO.123", "https://zenodo.org/api", "123", None),
        ("10.5072/zenodo.9", "https://sandbox.zenodo.org/api", "9", None),
        ("123", "https://zenodo.org/api", "123", None),
        ("https://zenodo.org/records/123", "https://zenodo.org/api", "123", None),
        ("https://www.zenodo.org/record/123/", "https://zenodo.org/api", "123", None),
        ("https://sandbox.zenodo.org/records/7", "https://sandbox.zenodo.org/api", "7", None),
        ("https://zenodo.org/record/1/files/a%20b.zip?download=1", "https://zenodo.org/api", "1", "a b.zip"),
    ],
)
def test_what_names_a_record(source: str, base: str, record: str, file: str | None) -> None:
    wanted = parse_source(source)
    assert (wanted.base_url, wanted.record, wanted.file, wanted.url) == (base, record, file, None)


@pytest.mark.parametrize("source", ["", "model", "ftp://host/a.zip", "file:///a.zip", "10.1234/other.5"])
def test_what_names_nothing(source: str) -> None:
    with pytest.raises(UsageError, match="is no DOI"):
        parse_source(source)


def test_info_shows_the_card(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    about = invoke(["info", str(model)])
    assert about["data"]["batches"] == {"batch0": 60, "batch1": 40}
    assert about["data"]["n_cells"] == about["n_cells"] == 100
    assert about["settings"]["train"]["max_iteration"] == 4
    assert main(["info", str(model)]) == 0
    assert capsys.readouterr().out == (model / "README.md").read_text() + "\n"
    text = (model / "README.md").read_text()
    for fact in ("# scalex model", "| batch0 | 60 |", about["id"], "* torch:", "* loss:"):
        assert fact in text


def test_scores_in_the_card(model: Path, zenodo: Zenodo, tmp_path: Path) -> None:
    shutil.copytree(model, tmp_path / "model")
    before = (tmp_path / "model" / "README.md").read_text()
    found = invoke(["metrics", str(tmp_path / "model"), "--label-key", "type", "--card"])
    about = invoke(["info", str(tmp_path / "model")])
    text = (tmp_path / "model" / "README.md").read_text()
    assert about["card"] == text
    lines = text.split("## Metrics of the reference's latents")[1].split("##")[0].split("\n")
    assert f"* ilisi: {found['ilisi']:.4f}" in lines
    assert "* label_key: type" in lines
    assert about["metrics"]["values"]["nmi"]["value"] == found["nmi"]
    assert sx.verify(tmp_path / "model")["ok"]
    assert sx.metrics(tmp_path / "model", label_key="type")["nmi"] == found["nmi"]
    published(tmp_path / "model", zenodo)
    sx.fetch("100", tmp_path / "got", base_url=zenodo.api, **QUICK)
    assert (tmp_path / "got" / "README.md").read_text() == text
    card = json.loads((tmp_path / "model" / "model.json").read_text())
    assert render(card | {"added": ["added/later.zarr"]}) == before  # of fewer cells than there are now
    with pytest.raises(UsageError, match="of the reference alone"):
        sx.metrics(tmp_path / "model", tmp_path / "mapped", card=True)


def test_cards_have_counts_of_labels_and_what_surgery_added(tmp_path: Path) -> None:
    import anndata as ad

    view = write_view(tmp_path / "view", [60, 40], expressed=0.2)
    small = {"max_epochs": 1, "n_hidden": 8, "minibatch_size": 32, "progress": False}
    sx.train(view, tmp_path / "model", model="scvi", arches=True, label_key="type", **small)
    card = json.loads((tmp_path / "model" / "model.json").read_text())
    counts = view.obs_column("type").value_counts()
    assert card["data"]["labels"] == {f"type{i}": int(counts[f"type{i}"]) for i in range(4)}
    cells = view.to_anndata()
    query = ad.AnnData(cells.X[:30].copy(), obs=cells.obs[:30][["type"]].copy(), var=cells.var.copy())
    query.write_h5ad(tmp_path / "late.h5ad")
    sx.surgery(
        tmp_path / "model",
        [tmp_path / "late.h5ad"],
        tmp_path / "up",
        max_epochs=1,
        min_features=0,
        progress=False,
    )
    text = (tmp_path / "up" / "README.md").read_text()
    assert "| late | 30 | late |" in text
    assert "reference before surgery: " + card["id"] in text
    first = hashlib.sha256(text.encode()).hexdigest()
    sx.surgery(
        tmp_path / "model",
        [tmp_path / "late.h5ad"],
        tmp_path / "up",
        max_epochs=1,
        min_features=0,
        progress=False,
    )
    assert hashlib.sha256((tmp_path / "up" / "README.md").read_bytes()).hexdigest() == first


def test_a_model_that_python_trained_on_is_shared_too(zenodo: Zenodo, tmp_path: Path) -> None:
    """It is of several trainings: the card says what is known, and `SCVI.load` takes what was fetched."""
    view = write_view(tmp_path / "view", [60, 40], expressed=0.2)
    adata = view.to_anndata()
    model = sx.SCVI(adata, n_hidden=8, n_latent=3, batch_key="batch")
    for _ in range(2):
        model.train(1, progress=False)
    model.save(tmp_path / "model")
    assert "# scvi model" in (tmp_path / "model" / "README.md").read_text()
    assert invoke(["info", str(tmp_path / "model")])["model"] == "scvi"
    published(tmp_path / "model", zenodo)
    sx.fetch("100", tmp_path / "got", base_url=zenodo.api, **QUICK)
    loaded = sx.SCVI.load(tmp_path / "got", adata)
    want = model.get_latent_representation()
    assert (loaded.get_latent_representation() == want).all()


def test_no_path_of_a_machine_is_published(model: Path, zenodo: Zenodo, tmp_path: Path) -> None:
    shutil.copytree(model, tmp_path / "model")
    card = json.loads((tmp_path / "model" / "model.json").read_text())
    del card["seal"]
    card["settings"]["train"]["init"] = "/home/jane/secret/base"
    (tmp_path / "model" / "model.json").write_bytes(seal(card))
    published(tmp_path / "model", zenodo)
    sx.fetch("100", tmp_path / "got", base_url=zenodo.api, **QUICK)
    assert json.loads((tmp_path / "got" / "model.json").read_text())["settings"]["train"]["init"] == "base"
    assert sx.verify(tmp_path / "got")["ok"]
    for name, data in contents(tmp_path / "got").items():
        assert b"jane" not in data, name
