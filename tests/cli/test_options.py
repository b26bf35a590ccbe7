"""Every setting of `streamx/config/` is an option, shows its default, and reaches the library."""

from __future__ import annotations

import argparse
import re
import shlex
from dataclasses import fields
from typing import Any

import pytest

from streamx import config
from streamx.cli.main import VERBS, invoke, make_parser
from streamx.cli.verb import Verb, given
from streamx.errors import UsageError

CONFIGS = {
    "convert": (config.ConvertConfig,),
    "activity": (config.ActivityConfig,),
    "preprocess": (config.PreprocessConfig,),
    "train": (config.TrainConfig, *config.NETWORKS.values()),
    "project": (config.ProjectConfig,),
    "surgery": (config.SurgeryConfig,),
    "transfer": (config.TransferConfig,),
    "metrics": (config.MetricsConfig,),
    "publish": (config.PublishConfig,),
    "fetch": (config.FetchConfig,),
}
POSITIONALS = {
    "convert": "a.h5ad -o store",
    "activity": "store -o genes",
    "preprocess": "store -o view",
    "train": "view -o model",
    "project": "model a.h5ad -o out",
    "surgery": "model a.h5ad -o out",
    "transfer": "model out",
    "metrics": "model out",
    "publish": "model",
    "fetch": "10.5281/zenodo.1 -o model",
}


def help_of(verb: str, capsys: pytest.CaptureFixture[str]) -> str:
    with pytest.raises(SystemExit) as stop:
        make_parser().parse_args([verb, "--help"])
    assert stop.value.code == 0
    return re.sub(r"-\s+", "-", re.sub(r"\s+", " ", capsys.readouterr().out))


@pytest.mark.parametrize("verb", CONFIGS)
def test_every_setting_is_an_option_with_its_default(verb: str, capsys: pytest.CaptureFixture[str]) -> None:
    text = help_of(verb, capsys)
    for cls in CONFIGS[verb]:
        for setting in fields(cls):
            option = setting.name.replace("_", "-")
            assert f"--no-{option}" in text if setting.default is True else f"--{option}" in text
            if isinstance(setting.default, int | float | str) and not isinstance(setting.default, bool):
                several = f"{cls.__name__.removesuffix('Config').lower()} {setting.default}"
                assert f"(default: {setting.default})" in text or several in text


@pytest.mark.parametrize("verb", CONFIGS)
def test_what_is_not_given_stays_absent(verb: str) -> None:
    args = make_parser().parse_args([verb, *POSITIONALS[verb].split()])
    assert given(args, *CONFIGS[verb]) == {}


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("convert a.h5ad -o s --shard-rows 7 --allow-float", {"shard_rows": 7, "allow_float": True}),
        ("preprocess s -o v --no-hvg-batch --target-sum 1e4", {"hvg_batch": False, "target_sum": 10_000.0}),
        (
            "preprocess s -o v --batches a 'b c' --min-features 1",
            {"batches": ("a", "b c"), "min_features": 1},
        ),
        ("train v -o m --lr 1e-3 --n-latent 5", {"lr": 1e-3, "n_latent": 5}),
        ("transfer m o --unlabeled '' none --threshold .5", {"unlabeled": ("", "none"), "threshold": 0.5}),
    ],
)
def test_values_are_parsed(line: str, expected: dict[str, object]) -> None:
    argv = shlex.split(line)
    assert given(make_parser().parse_args(argv), *CONFIGS[argv[0]]) == expected


@pytest.mark.parametrize(
    "line",
    [
        "",
        "nonsense",
        "convert",
        "convert a.h5ad",
        "convert a.h5ad -o s --join left",
        "convert a.h5ad -o s --batch_key x",
        "train v -o m --max-iter 5",
        "train v -o m --max-iteration many",
        "project m -o out",
    ],
)
def test_usage_errors_exit_2(line: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        make_parser().parse_args(shlex.split(line))
    assert stop.value.code == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "usage:" in captured.err


@pytest.mark.parametrize(
    ("line", "meant"),
    [
        ("convert a.h5ad -o s --batch_key x", "--batch-key"),
        ("convert a.h5ad -o s --batchkey x", "--batch-key"),
        ("train v -o m --max-iter 5", "--max-iteration"),
        ("train v -o m --model SCVI", "scvi"),
        ("projcet m a.h5ad -o out", "project"),
    ],
)
def test_a_misspelt_word_is_met_with_the_right_one(line: str, meant: str, capsys: Any) -> None:
    """And neither with the usage of another verb nor with a screen of options."""
    with pytest.raises(SystemExit):
        make_parser().parse_args(shlex.split(line))
    err = capsys.readouterr().err
    assert f"did you mean {meant}? " in err
    assert len(err.splitlines()) == 3
    assert meant == "project" or err.startswith(f"usage: streamx {line.split()[0]} ")


@pytest.mark.parametrize("line", ["preprocess s", "preprocess -o v", "preprocess s --update v"])
def test_preprocess_needs_a_store_or_an_update(line: str) -> None:
    with pytest.raises(UsageError):
        invoke(line.split())


def test_an_update_takes_no_settings() -> None:
    with pytest.raises(UsageError, match="--n-top-features"):
        invoke(["preprocess", "--update", "view", "--n-top-features", "5"])


@pytest.mark.parametrize("verb", VERBS, ids=lambda verb: verb.name)
def test_example_in_help_parses(verb: Verb, capsys: pytest.CaptureFixture[str]) -> None:
    assert verb.example.strip() in help_of_raw(verb.name, capsys)
    for line in verb.example.splitlines():
        words = shlex.split(line)
        assert words[0] == "streamx"
        args = make_parser().parse_args(words[1:])
        assert isinstance(args, argparse.Namespace)
        assert args.chosen is verb


def help_of_raw(verb: str, capsys: pytest.CaptureFixture[str]) -> str:
    with pytest.raises(SystemExit):
        make_parser().parse_args([verb, "--help"])
    return capsys.readouterr().out


def test_contract_of_verbs() -> None:
    names = "convert info verify annotate activity preprocess train project surgery transfer metrics plot"
    names += " map status export report integrate publish fetch simulate demo"
    assert [verb.name for verb in VERBS] == names.split()
