"""Linear gradient prediction with control variates for ``transformers.Trainer``."""

from ._version import __version__
from .engine import SpliceBypassedError
from .head import HeadNotFoundError
from .probing import ProbeReport, probe
from .settings import LGPSettings
from .trainer import LGPTrainer
from .training_args import LGPTrainingArguments

__all__ = [
    "HeadNotFoundError",
    "LGPSettings",
    "LGPTrainer",
    "LGPTrainingArguments",
    "ProbeReport",
    "SpliceBypassedError",
    "__version__",
    "probe",
]
