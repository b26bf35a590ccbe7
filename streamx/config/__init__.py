"""Every setting that a user can change, with its default and its help: the one place where they live.

The command line is generated from these classes; the Python functions take them field by field.
"""

from streamx.config.data import (
    ActivityConfig,
    BucketConfig,
    ConvertConfig,
    FetchConfig,
    PreprocessConfig,
    PublishConfig,
    SimulateConfig,
)
from streamx.config.mapping import (
    IntegrateConfig,
    MapConfig,
    MetricsConfig,
    PlotConfig,
    ProjectConfig,
    ReportConfig,
    TransferConfig,
)
from streamx.config.models import (
    ARCHES,
    NETWORKS,
    DifferentialConfig,
    FreezeConfig,
    ScalexConfig,
    ScanviConfig,
    ScviConfig,
    TotalviConfig,
    TrvaeConfig,
    TrvaeFreezeConfig,
)
from streamx.config.options import UNLABELED, build, option, parse_bytes
from streamx.config.training import TRAINING, SurgeryConfig, TrainConfig

__all__ = [
    "ARCHES",
    "NETWORKS",
    "TRAINING",
    "UNLABELED",
    "ActivityConfig",
    "BucketConfig",
    "ConvertConfig",
    "DifferentialConfig",
    "FetchConfig",
    "FreezeConfig",
    "IntegrateConfig",
    "MapConfig",
    "MetricsConfig",
    "PlotConfig",
    "PreprocessConfig",
    "ProjectConfig",
    "PublishConfig",
    "ReportConfig",
    "ScalexConfig",
    "ScanviConfig",
    "ScviConfig",
    "SimulateConfig",
    "SurgeryConfig",
    "TotalviConfig",
    "TrainConfig",
    "TransferConfig",
    "TrvaeConfig",
    "TrvaeFreezeConfig",
    "build",
    "option",
    "parse_bytes",
]
