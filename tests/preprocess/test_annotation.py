"""Names of peaks and annotations become half-open stretches from 0, whatever the file counts from."""

from __future__ import annotations

import gzip
from pathlib import Path

import numpy as np
import pytest

from streamx.errors import BadFileError, GeneError, UsageError
from streamx.preprocess.annotation import (
    Regions,
    chromosome_key,
    peak_key,
    read_annotation,
    read_gene_peaks,
    read_peaks,
)


def rows(found: Regions) -> list[tuple[str, str, int, int, str]]:
    starts, ends = found.start_r.tolist(), found.end_r.tolist()
    return list(zip(found.names, found.chromosomes, starts, ends, found.strands, strict=True))


def gtf(chromosome: str, kind: str, start: int, end: int, strand: str, attributes: str) -> str:
    return "\t".join([chromosome, "hand", kind, str(start), str(end), ".", strand, ".", attributes]) + "\n"


@pytest.mark.parametrize(
    ("name", "place"),
    [
        ("chr1:100-200", ("chr1", 100, 200)),
        ("chr1_100_200", ("chr1", 100, 200)),
        ("chr1-100-200", ("chr1", 100, 200)),
        ("1:0-1", ("1", 0, 1)),
        ("chrUn_KI270742v1_5_9", ("chrUn_KI270742v1", 5, 9)),
        ("HLA-A-5-9", ("HLA-A", 5, 9)),
        ("GL000194.1:5-9", ("GL000194.1", 5, 9)),
    ],
)
def test_names_of_peaks(name: str, place: tuple[str, int, int]) -> None:
    assert rows(read_peaks([name])) == [(name, *place, ".")]
    assert peak_key(name) == (chromosome_key(place[0]), *place[1:])


def test_one_place_has_one_key() -> None:
    names = ["chr1:100-200", "chr1_100_200", "1-100-200", "Chr1:100-200"]
    assert {peak_key(name) for name in names} == {("1", 100, 200)}
    assert chromosome_key("chrM") == chromosome_key("MT") == "M"
    assert peak_key("peak17") == "peak17"


@pytest.mark.parametrize("name", ["Gapdh", "chr1:200-100", "chr1:100-100", "chr1:-5-9x", "chr1", ":1-2", ""])
def test_what_is_no_peak_is_named(name: str) -> None:
    with pytest.raises(GeneError, match="1 of 2 features are not named as peaks") as caught:
        read_peaks(["chr1:1-2", name])
    assert repr(name) in str(caught.value)
    assert "--peak-genes" in str(caught.value)


GTF = (
    "#!genome-build hand\n"
    + gtf("chr1", "gene", 1001, 2000, "+", 'gene_id "G1"; gene_name "Aa"; note "gene_name of x"')
    + gtf("chr1", "transcript", 1001, 1500, "+", 'gene_id "G1"; transcript_id "T1"; gene_name "Aa";')
    + gtf("2", "gene", 1, 1, "-", 'gene_id "G2"; gene_type "x";')
    + "\n"
    + gtf("chrX", "gene", 5, 9, ".", 'gene_name "B b"; gene_id "G3"')
)


@pytest.mark.parametrize("name", ["a.gtf", "a.gtf.gz", "a.b.GTF"])
def test_gtf_counts_from_one_and_includes_the_end(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    path.write_bytes(gzip.compress(GTF.encode()) if name.endswith("gz") else GTF.encode())
    assert rows(read_annotation(path, "gene_name")) == [
        ("Aa", "chr1", 1000, 2000, "+"),
        ("G2", "2", 0, 1, "-"),
        ("B b", "chrX", 4, 9, "."),
    ]
    assert read_annotation(path, "gene_id").names == ["G1", "G2", "G3"]


def test_gff3_and_files_of_transcripts(tmp_path: Path) -> None:
    (tmp_path / "a.gff3").write_text(gtf("chr1", "gene", 3, 9, "-", "ID=gene:1;gene_id=G1;Name=Aa"))
    assert rows(read_annotation(tmp_path / "a.gff3", "Name")) == [("Aa", "chr1", 2, 9, "-")]
    lines = [gtf("chr1", "transcript", low, low + 9, "+", 'gene_id "Aa";') for low in (1, 101)]
    (tmp_path / "b.gtf").write_text("".join(lines) + gtf("chr1", "exon", 1, 2, "+", 'gene_id "Aa";'))
    assert rows(read_annotation(tmp_path / "b.gtf", "gene_name")) == [
        ("Aa", "chr1", 0, 10, "+"),
        ("Aa", "chr1", 100, 110, "+"),
    ]


def test_bed_counts_from_zero(tmp_path: Path) -> None:
    path = tmp_path / "genes.bed.gz"
    text = "track name=x\nbrowser position\n# c\nchr1\t0\t10\tAa\t0\t-\nchr1\t5\t6\tBb\r\nchr2 7 8 Cc 0 +\n"
    path.write_bytes(gzip.compress(text.encode()))
    assert rows(read_annotation(path, "gene_name")) == [
        ("Aa", "chr1", 0, 10, "-"),
        ("Bb", "chr1", 5, 6, "."),
        ("Cc", "chr2", 7, 8, "+"),
    ]


@pytest.mark.parametrize(
    ("name", "text", "words"),
    [
        ("a.bed", "chr1\t0\t10\n", "line 1: a gene needs"),
        ("a.bed", "chr1\t0\t10\tAa\nchr1\t10\t9\tBb\n", "line 2: 10 to 9 is no range"),
        ("a.bed", "chr1\tx\t10\tAa\n", "line 1: 'x' to '10' is no range"),
        ("a.bed", "chr1\t0\t10\tAa\t0\tplus\n", "line 1: 'plus' is no strand"),
        ("a.gtf", "chr1\thand\tgene\n", "line 1: 3 columns instead of 9"),
        ("a.gtf", gtf("chr1", "gene", 0, 9, "+", 'gene_id "x"'), "line 1: 0 to 9 is no range"),
        ("a.gtf", gtf("chr1", "gene", 1, 9, "+", 'transcript_id "x"'), "neither gene_name nor gene_id"),
        ("a.gtf", gtf("chr1", "exon", 1, 9, "+", 'gene_id "x"'), "holds no gene"),
        ("a.bed", "", "holds no gene"),
    ],
)
def test_a_bad_annotation_is_named_by_its_line(tmp_path: Path, name: str, text: str, words: str) -> None:
    (tmp_path / name).write_text(text)
    with pytest.raises(BadFileError, match=words) as caught:
        read_annotation(tmp_path / name, "gene_name")
    assert caught.value.where == str(tmp_path / name)


def test_files_that_are_none(tmp_path: Path) -> None:
    whole = gzip.compress(GTF.encode() * 50)
    (tmp_path / "cut.gtf.gz").write_bytes(whole[: len(whole) // 2])
    for path in (tmp_path / "cut.gtf.gz", tmp_path / "absent.bed"):
        with pytest.raises(BadFileError, match="can't be read"):
            read_annotation(path, "gene_name")
    with pytest.raises(UsageError, match=r"neither \.gtf"):
        read_annotation(tmp_path / "genes.txt.gz", "gene_name")


def test_tables_of_genes_and_peaks(tmp_path: Path) -> None:
    (tmp_path / "a.tsv.gz").write_bytes(gzip.compress(b"gene\tpeak\nNA\tchr1_1_2\nBb\tchr1_3_4\n"))
    (tmp_path / "b.csv").write_text("Peak,score,gene_name\nchr1_1_2,7,NA\nchr1_3_4,8,Bb\n")
    for name in ("a.tsv.gz", "b.csv"):
        found = read_gene_peaks(tmp_path / name)
        np.testing.assert_array_equal(found, [["NA", "chr1_1_2"], ["Bb", "chr1_3_4"]])
    (tmp_path / "c.tsv").write_text("Aa\tchr1_1_2\n")
    with pytest.raises(BadFileError, match="columns Aa, chr1_1_2, not gene and peak"):
        read_gene_peaks(tmp_path / "c.tsv")
    with pytest.raises(BadFileError, match="can't be read"):
        read_gene_peaks(tmp_path / "absent.tsv")
