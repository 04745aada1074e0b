"""Linear gradient prediction with control variates for ``transformers.Trainer``."""

from ._version import __version__
from .settings import LGPSettings
from .trainer import LGPTrainer
from .training_args import LGPTrainingArguments

__all__ = ["LGPSettings", "LGPTrainer", "LGPTrainingArguments", "__version__"]
