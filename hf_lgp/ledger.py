"""The ledger: what the method did in a run so far, for logs, trackers and the line at its end."""

from __future__ import annotations

from collections.abc import Mapping

from .engine import LGPEngine


def readings(engine: LGPEngine, steps: Mapping[str, int]) -> dict[str, float]:
    """What to log of a run so far, by name; this waits for the device.

    Args:
        engine: The engine.
        steps: Numbers of ``exact`` and ``predicted`` micro-batches.
    """
    share = steps["exact"] / max(1, sum(steps.values()))
    return {name: round(value, 6) for name, value in {"exact_share": share, **engine.metrics()}.items()}


def summary(figures: Mapping[str, float], steps: Mapping[str, int], seconds: float) -> str:
    """One line for a person at the end of a run.

    Args:
        figures: The last :func:`readings`.
        steps: Numbers of ``exact`` and ``predicted`` micro-batches.
        seconds: Time of the whole run.
    """
    line = f"LGP: {steps['predicted']} of {sum(steps.values())} micro-batches with predicted gradients"
    if steps["predicted"]:
        line += f", {figures['rho2']:.0%} of their variance explained at the end"
    if not figures["window"] and not steps["predicted"]:
        return f"{line}: nothing was learnt to predict with, since the run was short or predictions would save too little time."
    if "time_saved" not in figures:
        return f"{line}, control fraction {figures['fraction']:.3g}."
    saved = figures["time_saved"]
    if saved <= 0.0:
        return f"{line}. They did not pay here within the variance budget; looking whether they would took about {-saved:.1f} s of {seconds:.1f} s."
    return (
        f"{line}. About {saved:.0f} s saved: {saved / (seconds + saved):.0%} of what exact training would have taken."
    )
