"""Linear gradient prediction with control variates for ``transformers.Trainer``."""

from .settings import LGPSettings
from .trainer import LGPTrainer
from .training_args import LGPTrainingArguments

__version__ = "0.1.0.dev0"

__all__ = ["LGPSettings", "LGPTrainer", "LGPTrainingArguments", "__version__"]
