"""A tree of frozen dataclasses that defines type, default and documentation of every key.

A configuration is read from a YAML preset and changed by ``key=value`` words, e.g. ``optim.base_lr=0.5``. Values of
text keys are used as typed; all other values are YAML. The string under each field is its documentation, which
``mcl pretrain --help`` prints.
"""

from dali_pipelines.settings import AugmentConfig, ConfigError, DataConfig, Trait
from mcl.config.configuration import Config, is_folder_name
from mcl.config.reading import (
    DETECTORS,
    PRESETS,
    Key,
    all_keys,
    at_home,
    changed_keys,
    from_dict,
    load,
    override,
    schema,
    to_dict,
    value,
)
from mcl.config.sections import Devices, EvaluationConfig, LogConfig, ModelConfig, OptimConfig, TrainerConfig

__all__ = [
    "DETECTORS",
    "PRESETS",
    "AugmentConfig",
    "Config",
    "ConfigError",
    "DataConfig",
    "Devices",
    "EvaluationConfig",
    "Key",
    "LogConfig",
    "ModelConfig",
    "OptimConfig",
    "TrainerConfig",
    "Trait",
    "all_keys",
    "at_home",
    "changed_keys",
    "from_dict",
    "is_folder_name",
    "load",
    "override",
    "schema",
    "to_dict",
    "value",
]
