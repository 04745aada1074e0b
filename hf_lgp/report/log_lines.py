"""What a run logs, and the line that sums it up."""

from __future__ import annotations

import logging
from collections.abc import Mapping


def library_logger() -> logging.Logger:
    """The package's logger, from INFO on; it goes to stderr unless the program that uses it set up logging."""
    logger = logging.getLogger("hf_lgp")
    if not logger.handlers:
        handler = logging.StreamHandler()
        handler.addFilter(lambda _: not logging.getLogger().handlers)
        logger.addHandler(handler)
        logger.setLevel(logging.INFO)
    return logger


def postfix(figures: Mapping[str, float]) -> str:
    """What a progress bar says beside its steps; nothing while nothing is predicted."""
    if figures["fraction"] >= 1.0:
        return ""
    parts = [f"1/{1.0 / figures['fraction']:.3g} exact"]
    if "variance_explained" in figures:
        parts.append(f"{figures['variance_explained']:.0%} explained")
    if "seconds_saved" in figures:
        parts.append(f"{figures['seconds_saved']:.0f} s saved")
    return ", ".join(parts)


def summary(shares: Mapping[str, float], seconds: float, saved: float | None, refused: str | None) -> str:
    """One line for a person at the end of a run that took so many seconds and saved so many."""
    if shares:
        line = f"LGPTrainer: {shares['examples_predicted']:.0%} of examples had predicted gradients"
    else:
        why = (
            "; predictions did not pay, or the run was too short to tell" if refused is None else f", because {refused}"
        )
        line = f"LGPTrainer: all gradients were exact{why}"
    share = 0.0 if saved is None else saved / max(1e-9, seconds + saved)
    if abs(share) < 0.005:
        return f"{line}."
    return f"{line}; estimated {abs(share):.0%} {'less' if share > 0 else 'more'} time than Trainer at equal steps."
