"""Linear gradient prediction with control variates for ``transformers.Trainer``."""

from ._version import __version__
from .probe import ProbeReport, probe
from .settings import LGPSettings
from .trainer import LGPTrainer
from .training_args import LGPTrainingArguments

__all__ = ["LGPSettings", "LGPTrainer", "LGPTrainingArguments", "ProbeReport", "__version__", "probe"]
